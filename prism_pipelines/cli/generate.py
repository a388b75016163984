"""`prism generate MODEL --prompts FILE --out FILE`: in this process, or launched in several."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys

from ..generation.batch import generate_many, read_prompts
from .arguments import COUNT, Commands, add_command, add_seed_flag, add_temperature_flags, values
from .loading import add_model_flags, leave_processes, load_pipeline
from .quiet import is_quiet

COMMAND = ("-m", "prism_pipelines", "generate")  # what each of several processes runs


def add_parser(commands: Commands) -> None:
    """Add the subcommand `generate` to the subparsers of `prism`."""
    parser = add_command(
        commands,
        "generate",
        run,
        "MODEL --prompts FILE --out FILE [FLAGS]",
        help="continue every prompt of a file; resumable, on one or several GPUs",
        description="Continue every prompt of a file, in order, a JSON line each. "
        "The same command goes on after a kill.",
        examples="""
            prism generate MODEL --prompts prompts.jsonl --out out.jsonl --gen-length 256
            prism generate MODEL --prompts prompts.jsonl --out out.jsonl --num-processes 4""",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id: a pipeline, a model, or a head")
    parser.add_argument("--prompts", metavar="FILE", required=True, help=".jsonl or .txt, a prompt a line")
    parser.add_argument("--out", metavar="FILE", required=True, help="the .jsonl to write; an unfinished one goes on")
    parser.add_argument("--batch-size", metavar="N", type=COUNT, default=8, help="prompts a forward pass (default: 8)")
    parser.add_argument("--max-prompts", metavar="N", type=COUNT, help="only that many, from the first")
    parser.add_argument("--too-long", choices=["error", "skip"], default="error", help="prompts that do not fit")
    parser.add_argument("--num-processes", metavar="N", type=COUNT, default=1, help="one for each GPU (default: 1)")
    add_sampling_flags(parser.add_argument_group("sampling"))
    chat = parser.add_argument_group("chat")
    chat.add_argument("--no-chat-template", action="store_true", help="continue prompts as plain text")
    chat.add_argument(
        "--chat-template-kwargs", metavar="JSON", type=json.loads, help="such as '{\"enable_thinking\": false}'"
    )
    chat.add_argument(
        "--continue-final-message", action="store_true", help="the last message begins the assistant's answer"
    )
    add_model_flags(parser)


def add_sampling_flags(group: argparse._ActionsContainer) -> None:
    """How each prompt is continued."""
    group.add_argument("--gen-length", metavar="N", type=int, default=128, help="tokens to generate (default: 128)")
    group.add_argument("--num-inference-steps", metavar="N", type=int, help="forward passes of a prompt")
    group.add_argument("--block-length", metavar="N", type=int, help="tokens of a block (default: the pipeline's)")
    add_temperature_flags(group)
    group.add_argument("--cfg-scale", metavar="X", type=float, help="guidance: a second forward pass in each step")
    group.add_argument("--threshold", metavar="P", type=float, help="also write every token surer than this, in (0, 1]")
    group.add_argument("--stop", metavar="TEXT", action="append", help="end a text before this; may be given again")
    group.add_argument("--eos-early-stop", action="store_true", help="spend no blocks after the end token")
    group.add_argument("--cache", choices=["none", "prefix", "block"], default="none", help="see docs/cache.md")
    group.add_argument("--cache-refresh-interval", metavar="N", type=int, help="steps between full forward passes")
    add_seed_flag(group)


def run(args: argparse.Namespace) -> int:
    """Generate in this process, or print and run the command for several. Returns the exit status."""
    try:
        read_prompts(args.prompts)  # a bad file is reported before minutes of loading
        return launch(args) if args.num_processes > 1 else generate(args)
    except TypeError as error:  # `prism` reports ValueError; a row of a wrong type is bad input too
        raise ValueError(str(error)) from error


def launch(args: argparse.Namespace) -> int:
    """Print the command for several processes on this machine and run it. Returns the exit status."""
    import torch

    cpu = args.device == "cpu" or not torch.cuda.is_available()
    words = command(flags_of(args), args.num_processes, cpu)
    print(shlex.join(words), file=sys.stderr, flush=True)
    if words[0] == "accelerate":  # which need not be on PATH, and lists the defaults it takes
        words = [sys.executable, "-m", "prism_pipelines.cli.launch", *words[2:]]
    return 0 if subprocess.run(words, check=False).returncode == 0 else 2


def command(flags: list[str], num_processes: int, cpu: bool) -> list[str]:
    """The words that start `num_processes` processes with these flags on one machine."""
    if cpu:  # accelerate launches several CPU processes by MPI only; torch's own launcher does without
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_processes), *COMMAND, *flags]
    return ["accelerate", "launch", "--multi_gpu", "--num_processes", str(num_processes), *COMMAND, *flags]


def flags_of(args: argparse.Namespace) -> list[str]:
    """The flags of `prism generate` that say what `args` says, for one process."""
    flags = [args.model]
    for name, value in vars(args).items():
        if name in ("model", "run", "num_processes", "quiet") or value is None or value is False:
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"{flag}={one}" for one in values]
    return flags


def generate(args: argparse.Namespace) -> int:
    """Load and generate, in this process or as one of several. Returns the exit status."""
    pipe = load_pipeline(args)
    how = values(args, "gen_length", "block_length", "num_inference_steps", "temperature", "top_p", "cfg_scale", "stop")
    how |= values(args, "eos_early_stop", "threshold", "cache", "cache_refresh_interval", "chat_template_kwargs")
    how |= values(args, "continue_final_message", "batch_size", "seed", "max_prompts", "too_long")
    chat = not args.no_chat_template
    told = generate_many(pipe, args.prompts, args.out, use_chat_template=chat, progress=not is_quiet(), **how)
    leave_processes()
    rate = f"{told['prompts_per_second']:.3g} prompts/s, {told['tokens_per_second']:,.0f} tokens/s"
    print(f"generated {told['generated']} prompts in {told['seconds']:.1f} s ({rate})", file=sys.stderr)
    if told["prompts"] is not None:
        parts = [f"{told['prompts']} prompts"]
        parts += [f"{told['skipped']} skipped as too long"] if told["skipped"] else []
        parts += [f"{told['not_ended']} without an end token"] if told["not_ended"] else []
        print(f"{args.out}: {', '.join(parts)}", file=sys.stderr)
    return 0
