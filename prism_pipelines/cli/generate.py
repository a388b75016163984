"""`prism generate MODEL --prompts FILE --out FILE`: in this process, or launched in several."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys

from ..generation.batch import generate_many, read_prompts
from .loading import add_model_flags, leave_processes, load_pipeline
from .quiet import is_quiet

COMMAND = ("-m", "prism_pipelines", "generate")  # what each of several processes runs


def add_parser(commands) -> None:
    """Add the subcommand `generate` to the subparsers of `prism`."""
    parser = commands.add_parser(
        "generate",
        help="continue every prompt of a file; resumable, on one or several GPUs",
        description="Continue every prompt of a file and write a JSON line for each, in input order. The same command "
        "again goes on after a kill.",
        epilog="Exit status: 0 done, 2 bad input. On several machines: accelerate launch -m prism_pipelines generate",
    )
    add_flags(parser)
    parser.add_argument("--num_processes", type=int, default=1, help="one for each GPU (default: %(default)s)")
    parser.set_defaults(run=run)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `prism generate` but for --num_processes."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id: a pipeline, a model, or a head")
    parser.add_argument("--prompts", metavar="FILE", required=True, help=".jsonl or .txt, a prompt a line")
    parser.add_argument("--out", metavar="FILE", required=True, help="the .jsonl to write; an unfinished one goes on")
    parser.add_argument("--gen_length", type=int, default=128, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--block_length", type=int, help="blocks of this many tokens (default: the pipeline's)")
    parser.add_argument("--steps", type=int, help="forward passes of a prompt (default: the pipeline's)")
    parser.add_argument("--temperature", type=float, help="default: the scheduler's")
    parser.add_argument("--top-p", "--top_p", type=float, help="nucleus, in (0, 1] (default: the scheduler's)")
    parser.add_argument("--cfg-scale", "--cfg_scale", type=float, help="guidance: a second forward pass in each step")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end a text before this; may be given again")
    parser.add_argument("--eos_early_stop", action="store_true", help="spend no blocks after the end token")
    parser.add_argument("--threshold", type=float, help="also write every token surer than this, in (0, 1]")
    parser.add_argument("--cache", choices=["none", "prefix", "block"], default="none", help="see docs/cache.md")
    parser.add_argument("--cache_refresh_interval", type=int, help="steps between full forwards (default: a block's)")
    parser.add_argument("--no_chat_template", action="store_true", help="continue prompts as plain text")
    parser.add_argument(
        "--chat_template_kwargs",
        metavar="JSON",
        type=json.loads,
        help="for the chat template, such as '{\"enable_thinking\": false}'",
    )
    parser.add_argument(
        "--continue-final-message",
        "--continue_final_message",
        action="store_true",
        help="the last of the messages is the assistant's and begins the answer",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="prompts a forward (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_prompts", type=int, help="only that many, from the first")
    parser.add_argument("--too_long", choices=["error", "skip"], default="error", help="default: %(default)s")
    add_model_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Generate in this process, or print and run the command for several. Returns the exit status."""
    if args.num_processes < 1:
        raise ValueError(f"--num_processes must be at least 1, got {args.num_processes}.")
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
        if value is True:
            flags.append(f"--{name}")
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}={one}" for one in values]
    return flags


def generate(args: argparse.Namespace) -> int:
    """Load and generate, in this process or as one of several. Returns the exit status."""
    pipe = load_pipeline(args)
    told = generate_many(
        pipe,
        args.prompts,
        args.out,
        gen_length=args.gen_length,
        block_length=args.block_length,
        num_inference_steps=args.steps,
        temperature=args.temperature,
        top_p=args.top_p,
        cfg_scale=args.cfg_scale,
        stop=args.stop,
        eos_early_stop=args.eos_early_stop,
        threshold=args.threshold,
        cache=args.cache,
        cache_refresh_interval=args.cache_refresh_interval,
        use_chat_template=not args.no_chat_template,
        chat_template_kwargs=args.chat_template_kwargs,
        continue_final_message=args.continue_final_message,
        batch_size=args.batch_size,
        seed=args.seed,
        max_prompts=args.max_prompts,
        too_long=args.too_long,
        progress=not is_quiet(),
    )
    leave_processes()
    rate = f"{told['prompts_per_second']:.3g} prompts/s, {told['tokens_per_second']:,.0f} tokens/s"
    print(f"generated {told['generated']} prompts in {told['seconds']:.1f} s ({rate})", file=sys.stderr)
    if told["prompts"] is not None:
        parts = [f"{told['prompts']} prompts"]
        parts += [f"{told['skipped']} skipped as too long"] if told["skipped"] else []
        parts += [f"{told['not_ended']} without an end token"] if told["not_ended"] else []
        print(f"{args.out}: {', '.join(parts)}", file=sys.stderr)
    return 0
