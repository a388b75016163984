"""Outputs of `infill_many` and `score_many`: JSON lines, CSV, or FASTA, by the ending of the name.

Each row of the input is written unchanged, with the columns below added, and with `sample` if a row has several. In
CSV, lists are joined by spaces. FASTA has the filled or scored sequence, under its header with the numbers.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from .sequences import FASTA

FILLED = ("sample", "filled", "confidence", "mean_quality", "quality", "nfe", "error")
SCORED = (
    "mean_quality", "mean_log_quality", "lowest_quality", "lowest_token", "tokens", "quality", "nfe", "error",
)  # fmt: skip
OUTPUTS = (".jsonl", ".csv", *FASTA)


def check_out(out: str | Path) -> None:
    """Raise a ValueError if no output of that name can be written."""
    if Path(out).suffix.lower() not in OUTPUTS:
        raise ValueError(f"The output must end in .jsonl, .csv or .fasta, got {str(out)!r}.")


def check_columns(rows: list[dict], written: tuple[str, ...]) -> None:
    """Raise a ValueError if the input has a column that the output writes."""
    for row in rows:
        if clash := sorted(set(written) & set(row["record"])):
            raise ValueError(f"Line {row['line']} has the column {clash[0]!r}, which the output writes; rename it.")


def written_lines(
    ending: str, rows: list[dict], read: list[dict], columns: tuple[str, ...], done: dict[int, dict]
) -> Iterator[str]:
    """Parts of the output, in order.

    Args:
        ending: ending of the output's name.
        rows: rows from `read_sequences`.
        read: the same rows as the model reads them, from `prepared`.
        columns: columns that are added to the record, `FILLED` or `SCORED`.
        done: results by row number.
    """
    several = any(len(result["samples"]) > 1 for result in done.values())
    columns = tuple(name for name in columns if name != "sample" or several)
    names = list(dict.fromkeys(["id", *(key for row in rows for key in row["record"]), *columns]))
    if ending == ".csv":
        yield csv_line(names)
    for i, (row, seen) in enumerate(zip(rows, read, strict=True)):
        results = results_of(seen, columns, done.get(i))
        for k, result in enumerate(results):
            result = ({"sample": k} if len(results) > 1 else {}) | result | {"error": seen.get("error")}
            record = {"id": row["id"]} | row["record"] | {name: result.get(name) for name in columns}
            if ending == ".jsonl":
                yield json.dumps(record) + "\n"
            elif ending == ".csv":
                yield csv_line([cell(record.get(name)) for name in names])
            else:
                yield fasta_record(row, result)


def results_of(seen: dict, columns: tuple[str, ...], done: dict | None) -> list[dict]:
    """Results of a row: from the model; the text itself if nothing was masked; else only an nfe of 0."""
    if done is not None:
        return done["samples"]
    if "unmasked" in seen and "filled" in columns:
        return [{"filled": seen["text"], "quality": [], "nfe": 0}]
    return [{"nfe": 0}]


def cell(value: object) -> str:
    """A value as CSV has it."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join("" if one is None else str(one).strip() for one in value)
    return value if isinstance(value, str) else json.dumps(value)


def csv_line(cells: list[str]) -> str:
    """A line of CSV."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def fasta_record(row: dict, result: dict) -> str:
    """A FASTA record: a header followed by the numbers, and the sequence on one line."""
    header = row["record"].get("header") or str(row["id"])
    shown = ("sample", "confidence", "mean_quality", "lowest_quality", "lowest_token", "error")
    notes = [f"{name}={json.dumps(result[name])}" for name in shown if result.get(name) is not None]
    return f">{' '.join([header, *notes])}\n{result.get('filled') or row['text'] or ''}\n"
