"""The command `prism`. Heavy imports wait until a command runs, so that `prism --help` answers at once."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version

from . import convert, generate, infill, info, score, sudoku, text, train, train_head, tune
from . import eval as evaluate
from .arguments import OneLineErrors, Parser, page
from .quiet import hide_loading_bars, silence


def _version() -> str:
    try:
        return version("prism-pipelines")
    except PackageNotFoundError:
        return "unknown (not installed)"


def build_parser() -> OneLineErrors:
    """The parser of `prism` with all its subcommands; a parsed command carries its function in `args.run`."""
    parser = OneLineErrors(
        prog="prism",
        usage="prism [-q] COMMAND ...",
        formatter_class=page,
        description="Self-correcting inference for masked diffusion models (PRISM).",
        epilog="Start here: prism sudoku. Of each command: prism COMMAND --help",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="results and errors alone: no bars, no warnings")
    parser.add_argument("--version", action="version", version=f"prism-pipelines {_version()}")
    commands = parser.add_subparsers(prog="prism", title="commands", metavar="COMMAND", parser_class=Parser)
    for command in (sudoku, text, generate, infill, score, info, convert, train, train_head, evaluate, tune):
        command.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `prism` with `argv` (default: the process's own arguments).

    Returns:
        Exit status: 0 done, 1 not solved, 2 bad input (one line on stderr), 130 interrupted.
    """
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next, and wants no other answer
        import argcomplete

        argcomplete.autocomplete(parser)
    args = parser.parse_args(argv)
    if "run" not in args:
        parser.print_help()
        return 0
    if args.quiet:
        silence()
    try:
        if args.run is not train.run:  # that is another process
            hide_loading_bars()
        return int(args.run(args))
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
