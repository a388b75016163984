"""`prism train ...`: the training command, printed and run."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

from .arguments import Commands

# As shown; what runs is that of this very environment, which need not be on PATH. --quiet leaves out accelerate's own
# traceback below the error of a training that fails.
LAUNCH = ("accelerate", "launch", "--quiet")
MODULE = ("-m", "prism_pipelines.training")
PAGE = """\
usage: prism train [ACCELERATE FLAGS --] TRAINING FLAGS

Print the training command (accelerate launch -m prism_pipelines.training), then run it. Flags
of accelerate go before `--`, those of the training after it; without `--` all are the training's.

the training flags that most runs need (all of them: prism train -- --help):
  --objective NAME              mdm (pretrain), prism (fine-tune with a head), critic, or distill
  --preset NAME                 flags of the paper's sudoku, owt or llada run; those given win
  --args-file FILE              flags in a file; those given win
  --base-model MODEL            Hub id or folder to start from; without one a new model
  --dataset DATA                sudoku (generated grids), or a Hub id, file or folder
  --output-dir FOLDER           where checkpoints, logs and the result go
  --max-steps N                 optimizer steps; or --num-train-epochs N
  --max-length N                most tokens of an example
  --per-device-train-batch-size N, --gradient-accumulation-steps N, --learning-rate X
  --rank N                      of the LoRA adapter; or --freeze-backbone (head alone), --full
  --head KIND                   linear, mlp, block or block_mlp
  --resume-from-checkpoint latest
                                go on from the newest whole checkpoint
  --push-to-hub --hub-model-id OWNER/NAME

examples:
  prism train --preset llada --base-model GSAI-ML/LLaDA-8B-Base --dataset you/data --output-dir head
  prism train --objective mdm --dataset sudoku --output-dir runs/sudoku --max-steps 1000
  prism train --num_processes 2 -- --args-file examples/sudoku/prism.args --output-dir runs/prism

Exit status: that of accelerate launch, which is 1 for any training that fails.
"""


def add_parser(commands: Commands) -> None:
    """Add the subcommand `train` to the subparsers of `prism`."""
    parser = commands.add_parser(
        "train",
        help="train a model or a quality head (accelerate launch -m prism_pipelines.training)",
        prefix_chars="\0",  # nothing here is a flag of ours: all pass through
        add_help=False,
    )
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def command(flags: list[str]) -> list[str]:
    """The words of the command for these flags."""
    launch, training = (flags[: flags.index("--")], flags[flags.index("--") + 1 :]) if "--" in flags else ([], flags)
    return [*LAUNCH, *launch, *MODULE, *training]


def run(args: argparse.Namespace) -> int:
    """Print and run. Returns the exit status."""
    if args.flags in ([], ["-h"], ["--help"]):
        print(PAGE, end="")
        return 0 if args.flags else 2
    words = command(args.flags)
    print(shlex.join(words), file=sys.stderr, flush=True)
    words = [sys.executable, "-m", "prism_pipelines.cli.launch", *words[2:]]
    return subprocess.run(words, check=False).returncode
