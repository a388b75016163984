"""`prism generate MODEL --prompts FILE --out FILE`: in this process, or launched in several."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys

from ..generation import batch as generate_many

MODULE = ("-m", "prism_pipelines.generation.batch")


def add_parser(commands) -> None:
    """Add the subcommand `generate` to the subparsers of `prism`."""
    parser = commands.add_parser(
        "generate",
        help="continue every prompt of a file; resumable, on one or several GPUs",
        description="Continue every prompt of a file and write a JSON line for each, in input order. The same command "
        "again goes on after a kill.",
        epilog="Exit status: 0 done, 2 bad input.",
    )
    generate_many.add_flags(parser)
    parser.add_argument("--num_processes", type=int, default=1, help="one for each GPU (default: %(default)s)")
    parser.set_defaults(run=run)


def command(flags: list[str], num_processes: int, cpu: bool) -> list[str]:
    """The words that start `num_processes` processes with these flags on one machine."""
    if cpu:  # accelerate launches several CPU processes by MPI only; torch's own launcher does without
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_processes), *MODULE, *flags]
    return ["accelerate", "launch", "--multi_gpu", "--num_processes", str(num_processes), *MODULE, *flags]


def flags_of(args: argparse.Namespace) -> list[str]:
    """The flags of `prism_pipelines.generation.batch` that say what `args` says."""
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


def run(args: argparse.Namespace) -> int:
    """Generate, or print the command for several processes and run it. Returns the exit status."""
    if args.num_processes < 1:
        raise ValueError(f"--num_processes must be at least 1, got {args.num_processes}.")
    if args.num_processes == 1:
        try:
            return generate_many.run(args)
        except TypeError as error:  # `prism` reports ValueError; a row of a wrong type is bad input too
            raise ValueError(str(error)) from error
    generate_many.read_prompts(args.prompts)
    import torch

    cpu = args.device == "cpu" or not torch.cuda.is_available()
    words = command(flags_of(args), args.num_processes, cpu)
    print(shlex.join(words), file=sys.stderr, flush=True)
    if words[0] == "accelerate":  # which need not be on PATH, and lists the defaults it takes
        words = [sys.executable, "-m", "prism_pipelines.cli.launch", *words[2:]]
    return 0 if subprocess.run(words, check=False).returncode == 0 else 2
