"""`prism score MODEL FILE --out FILE [--html PAGE]`: the quality of every token of every sequence of a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Commands, add_command, values
from .infill import add_file_flags, report, tell_duplicates
from .loading import add_model_flags, load_pipeline
from .quiet import is_quiet


def add_parser(commands: Commands) -> None:
    """Add the subcommand `score` to the subparsers of `prism`."""
    parser = add_command(
        commands,
        "score",
        run,
        "MODEL FILE --out FILE [FLAGS]",
        help="the quality of every token of every sequence of a file",
        description="Say how likely every token of every sequence of a file is right, in input order. "
        "The same command again goes on after a kill.",
        examples="""
            prism score MODEL chains.fasta --out scores.jsonl --html scores.html
            prism score MODEL chains.csv --out scores.csv --by leave-one-out""",
    )
    add_file_flags(parser)
    parser.add_argument("--mask", metavar="CHARS", default="", help="characters that stand for an unknown token")
    parser.add_argument(
        "--by",
        metavar="SCORE",
        choices=["head", "own", "leave-one-out"],
        help="head: the quality head; own: the model's probability in the pass that sees the token; leave-one-out: "
        "without seeing it, a forward pass for each token (default: head if there is one, else own)",
    )
    parser.add_argument("--html", metavar="FILE", help="also a page with the tokens coloured; --out must be .jsonl")
    add_model_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Read, load, score, report. Returns the exit status."""
    from ..generation.infill import score_many
    from ..generation.quality_page import quality_page

    if args.html is not None and Path(args.out).suffix.lower() != ".jsonl":
        raise ValueError(f"--html is made of a .jsonl output, and --out is {args.out!r}.")
    tell_duplicates(args)
    pipe = load_pipeline(args)
    by = args.by or ("own" if pipe.quality_head is None else "head")
    how = values(args, "column", "drop", "batch_size", "invalid") | {"by": by.replace("-", "_"), "marks": args.mask}
    told = score_many(pipe, args.file, args.out, progress=not is_quiet(), **how)
    report(args, told, "scored")
    if args.html is not None and told["complete"]:
        page = quality_page(args.out, f"{Path(args.file).name}, scored by {by}")
        Path(args.html).write_text(page, encoding="utf-8")
    return 0
