"""The command `prism`. Heavy imports wait until a command runs, so that `prism --help` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import PackageNotFoundError, version

from . import convert, generate, infill, info, score, sudoku, text, train, train_head, tune
from . import eval as evaluate
from .quiet import hide_loading_bars, silence


class _Parser(argparse.ArgumentParser):
    """Reports a usage error in one line; argparse prints the whole usage before it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _version() -> str:
    try:
        return version("prism-pipelines")
    except PackageNotFoundError:
        return "unknown (not installed)"


def build_parser() -> argparse.ArgumentParser:
    """The parser of `prism` with all its subcommands; a parsed command carries its function in `args.run`."""
    parser = _Parser(
        prog="prism",
        description="Self-correcting inference for masked diffusion models (PRISM).",
        epilog="Start here: prism sudoku",
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="no bars and no warnings, of any command: results and errors alone"
    )
    parser.add_argument("--version", action="version", version=f"prism-pipelines {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    sudoku.add_parser(commands)
    text.add_parser(commands)
    generate.add_parser(commands)
    infill.add_parser(commands)
    score.add_parser(commands)
    info.add_parser(commands)
    convert.add_parser(commands)
    train.add_parser(commands)
    train_head.add_parser(commands)
    evaluate.add_parser(commands)
    tune.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `prism` with `argv` (default: the process's own arguments).

    Returns:
        Exit status: 0 done, 1 not solved, 2 bad input (one line on stderr), 130 interrupted.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if "run" not in args:
        parser.print_help()
        return 0
    if args.quiet:
        silence()
    try:
        if args.run is not train.run:  # that is another process
            hide_loading_bars()
        return args.run(args)
    except BrokenPipeError:
        # The reader (`| head`) has gone; a second failure when Python flushes stdout at exit would show a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes one reports
            print(f"prism: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prism: interrupted", file=sys.stderr)
        return 130
