"""`prism train ...`: the training command, printed and run."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

# As shown; what runs is that of this very environment, which need not be on PATH. --quiet leaves out accelerate's own
# traceback below the error of a training that fails.
LAUNCH = ("accelerate", "launch", "--quiet")
MODULE = ("-m", "prism_pipelines.training")


def add_parser(commands) -> None:
    """Add the subcommand `train` to the subparsers of `prism`."""
    parser = commands.add_parser(
        "train",
        help="train a model or a quality head (accelerate launch -m prism_pipelines.training)",
        description="Print the training command, then run it. Flags of accelerate go before `--`, those of the "
        "training after it; without `--` all are the training's. `prism train -- --help` lists them.",
        epilog="Exit status: that of accelerate launch, which is 1 for any training that fails.",
        prefix_chars="\0",  # nothing here is a flag of ours: all pass through
        add_help=False,
    )
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="[ACCELERATE FLAGS --] TRAINING FLAGS")
    parser.set_defaults(run=run)


def command(flags: list[str]) -> list[str]:
    """The words of the command for these flags."""
    launch, training = (flags[: flags.index("--")], flags[flags.index("--") + 1 :]) if "--" in flags else ([], flags)
    return [*LAUNCH, *launch, *MODULE, *training]


def run(args: argparse.Namespace) -> int:
    """Print and run. Returns the exit status."""
    words = command(args.flags)
    print(shlex.join(words), file=sys.stderr, flush=True)
    words = [sys.executable, "-m", "prism_pipelines.cli.launch", *words[2:]]
    return subprocess.run(words, check=False).returncode
