"""`prism infill MODEL FILE --out FILE`: fill in what is masked in every sequence of a file."""

from __future__ import annotations

import argparse
import sys

from .arguments import COUNT, Commands, add_command, add_seed_flag, add_temperature_flags, values
from .loading import add_model_flags, leave_processes, load_pipeline
from .quiet import is_quiet


def add_parser(commands: Commands) -> None:
    """Add the subcommand `infill` to the subparsers of `prism`."""
    parser = add_command(
        commands,
        "infill",
        run,
        "MODEL FILE --out FILE [FLAGS]",
        help="fill in the masked parts of every sequence of a file (FASTA, CSV, JSONL, text)",
        description="Fill in what is masked in every sequence of a file, and write each with its quality, in input "
        "order. The same command again goes on after a kill.",
        examples="""
            prism infill MODEL chains.fasta --out filled.jsonl --mask X
            prism infill MODEL chains.csv --out filled.fasta --positions 97-110
            prism infill MODEL chains.jsonl --out best.jsonl --num-samples 8 --select confidence""",
    )
    add_file_flags(parser)
    what = parser.add_argument_group("what is filled")
    what.add_argument("--mask", metavar="CHARS", default="", help="characters that stand for one token each, such as X")
    what.add_argument("--positions", metavar="LIST", help="characters to fill in every row, such as 97-110,120")
    what.add_argument(
        "--positions-column", metavar="NAME", default="positions", help="column that says so by row (%(default)s)"
    )
    group = parser.add_argument_group("sampling")
    group.add_argument("--num-samples", metavar="N", type=COUNT, default=1, help="of each sequence (default: 1)")
    group.add_argument(
        "--select", choices=["confidence"], help="keep the surest of the samples; needs a calibrated head"
    )
    group.add_argument(
        "--num-inference-steps", metavar="N", type=COUNT, default=16, help="forward passes (default: 16)"
    )
    add_temperature_flags(group)
    add_seed_flag(group)
    add_model_flags(parser)


def add_file_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `prism infill` and `prism score` that say what is read and where it goes."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id: a pipeline, a model, or a head")
    parser.add_argument("file", metavar="FILE", help=".fasta, .csv, .tsv, .jsonl, or .txt with a text a line")
    parser.add_argument(
        "--out", metavar="FILE", required=True, help=".jsonl, .csv or .fasta; an unfinished one goes on"
    )
    parser.add_argument("--column", metavar="NAME", help="of the text (default: infill, sequence or text)")
    parser.add_argument("--drop", metavar="CHARS", default="", help="characters to leave out, such as '-*'")
    parser.add_argument("--invalid", choices=["error", "skip"], default="error", help="rows that cannot be used")
    parser.add_argument(
        "--batch-size", metavar="N", type=COUNT, default=8, help="sequences a forward pass (default: 8)"
    )


def run(args: argparse.Namespace) -> int:
    """Read, load, fill in, report. Returns the exit status."""
    from ..generation.infill import infill_many

    tell_duplicates(args)
    how = values(args, "num_samples", "select", "num_inference_steps", "temperature", "top_p", "batch_size", "seed")
    how |= values(args, "column", "positions", "positions_column", "drop", "invalid")
    pipe = load_pipeline(args)
    told = infill_many(pipe, args.file, args.out, marks=args.mask, progress=not is_quiet(), **how)
    report(args, told, "filled")
    return 0


def tell_duplicates(args: argparse.Namespace) -> None:
    """Read the file, so that a bad one is reported before minutes of loading, and name what stands there twice."""
    from ..generation.sequence_output import check_out
    from ..generation.sequences import duplicates, read_sequences

    check_out(args.out)
    told = duplicates(read_sequences(args.file, args.column))
    if told and not is_quiet():
        more = f"; and {len(told) - 5} more" if len(told) > 5 else ""
        print(f"prism: warning: {'; '.join(told[:5])}{more}. All of them are kept.", file=sys.stderr)


def report(args: argparse.Namespace, told: dict, verb: str) -> None:
    """What was done, on stderr; leave the other processes."""
    leave_processes()
    print(f"{verb} {told['generated']} sequences in {told['seconds']:.1f} s", file=sys.stderr)
    if told["complete"]:
        parts = [f"{told['rows']} rows"]
        parts += [f"{told['skipped']} skipped, with the reason"] if told["skipped"] else []
        parts += [f"{told['unmasked']} with nothing to fill"] if told.get("unmasked") else []
        print(f"{args.out}: {', '.join(parts)}", file=sys.stderr)
