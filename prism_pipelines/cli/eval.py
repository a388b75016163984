"""`prism eval ...`: measure a model. Each evaluation is a file of its own."""

from __future__ import annotations

from . import eval_calibration, eval_code, eval_compare, eval_sudoku, eval_text
from .arguments import Commands, Parser, page


def add_parser(commands: Commands) -> None:
    """Add the subcommand `eval` to the subparsers of `prism`."""
    parser = commands.add_parser(
        "eval",
        usage="%(prog)s EVALUATION [FLAGS]",
        help="measure a model: sudoku, text, calibration, code, compare",
        formatter_class=page,
        epilog="Of each evaluation: prism eval EVALUATION --help",
    )
    kinds = parser.add_subparsers(
        prog="prism eval", title="evaluations", metavar="EVALUATION", required=True, parser_class=Parser
    )
    for kind in (eval_sudoku, eval_text, eval_calibration, eval_code, eval_compare):
        kind.add_parser(kinds)
