"""Reads texts to fill in or to score from FASTA, CSV, TSV, JSON lines or plain text.

A row that cannot be used is named by its line. It stays a row: the output has it unchanged, with the reason.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .input_files import read_json_lines, read_lines

if TYPE_CHECKING:
    from ..models.protocols import Tokenizer

FASTA = (".fasta", ".fa", ".faa", ".fas")
TABLES = {".csv": ",", ".tsv": "\t"}
ENDINGS = (*FASTA, *TABLES, ".jsonl", ".txt")
COLUMNS = ("infill", "sequence", "text")  # where the text stands if the user names no column


def read_sequences(path: str | Path, column: str | None = None) -> list[dict]:
    """Rows of a file, each {"line", "id", "text", "record"}.

    "line" is the row's line in the file, from 1. "id" is its name, or else its number, from 0. "record" is what the
    output repeats: the columns of a table, the keys of a JSON object, or the header of FASTA. Names may be empty or
    occur twice. "text" is None for a row without text, and "error" then says why.

    Args:
        path: .fasta, .fa, .faa, .fas, .csv, .tsv, .jsonl (an object or a string per line), or .txt (a text per line).
        column: column of the text, in tables and objects; None for the first of "infill", "sequence" and "text".
    Raises:
        ValueError: another ending, not UTF-8, a line that is no JSON, no such column, or no row at all.
        OSError: the file cannot be read.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending in FASTA:
        rows = read_fasta(path)
    elif ending in TABLES:
        rows = read_table(path, column)
    else:
        lines = read_lines(path, ENDINGS, "sequences")
        if ending == ".jsonl":
            records = read_json_lines(path, lines)
            rows = [row_of(number, {"text": one} if isinstance(one, str) else one, column) for number, one in records]
        else:
            rows = [row_of(number, {"text": line}, "text") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no sequence.")
    if column is not None and not any(isinstance(row["record"], dict) and column in row["record"] for row in rows):
        known = sorted({str(key) for row in rows for key in row["record"]})
        raise ValueError(f"{path} has no column {column!r}; it has {', '.join(known) or 'none'}.")
    return [row | {"id": i if row["id"] in (None, "") else row["id"]} for i, row in enumerate(rows)]


def read_fasta(path: str | Path) -> list[dict]:
    """Rows of a FASTA file. The name is the first word of a header. A sequence may have many lines.

    Raises:
        ValueError: residues before the first header.
    """
    rows: list[dict] = []
    for number, line in enumerate(read_lines(Path(path), FASTA, "sequences"), 1):
        if line.startswith(">"):
            header = line[1:].strip()
            name = header.split(None, 1)[0] if header else None
            rows.append({"line": number, "id": name, "text": [], "record": {"header": header}})
        elif line.strip() and not line.startswith(";"):
            if not rows:
                raise ValueError(f"{path}, line {number}: residues before the first header, which begins with '>'.")
            rows[-1]["text"].append("".join(line.split()))
    for row in rows:
        row["text"] = row["record"]["sequence"] = "".join(row["text"])
        if not row["text"]:
            row |= {"text": None, "error": "no residues follow this header"}
    return rows


def read_table(path: Path, column: str | None) -> list[dict]:
    """Rows of a CSV or TSV file with a header line.

    Raises:
        ValueError: a quote that is never closed.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a chromosome is longer than csv's 128 KiB
    lines = read_lines(path, tuple(TABLES), "sequences")
    reader, rows = csv.DictReader((f"{line}\n" for line in lines), delimiter=TABLES[path.suffix.lower()]), []
    number = 2
    try:
        for record in reader:
            extra = record.pop(None, None)
            row = row_of(number, record, column)
            if extra is not None:
                row |= {"text": None, "error": f"{len(extra)} more cells than the header line has"}
            rows.append(row)
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}.") from None
    return rows


def row_of(number: int, record: object, column: str | None) -> dict:
    """A row from the columns of a line. If it has no text, "error" says why."""
    if not isinstance(record, dict):
        return {"line": number, "id": None, "text": None, "record": {}, "error": "neither an object nor a string"}
    name = column or next((name for name in COLUMNS if name in record), None)
    row = {"line": number, "id": record.get("id", record.get("name")), "text": record.get(name), "record": record}
    if not isinstance(row["id"], (str, int)) or isinstance(row["id"], bool):
        row["id"] = None
    if name is None or name not in record:
        row |= {"text": None, "error": f"no column {column or ' or '.join(map(repr, COLUMNS))}"}
    elif not isinstance(row["text"], str) or not row["text"].strip():
        row |= {"text": None, "error": f"no text in column {name!r}"}
    return row


def place_of(row: dict) -> str:
    """What a row is called in errors."""
    return f"line {row['line']} ({row['id']!r:.60})"


def duplicates(rows: list[dict]) -> list[str]:
    """One sentence for each name that occurs twice."""
    first: dict[str | int, int] = {}
    told: dict[str | int, str] = {}
    for row in rows:
        if row["id"] in first and row["id"] not in told:
            told[row["id"]] = f"line {row['line']}: the name {row['id']!r:.60} is that of line {first[row['id']]}, too"
        first.setdefault(row["id"], row["line"])
    return list(told.values())


# --- what the model reads ---------------------------------------------------------------------------------------------


def parse_spans(spans: object, length: int) -> list[tuple[int, int]]:
    """Spans of characters as (start, end), from 0 and without the end.

    Args:
        spans: such as "97-110,120" or [[97, 110], 120]; characters count from 1, and the end is included.
        length: number of characters of the text.
    Raises:
        ValueError: another form, or a character outside 1..length.
    """
    if isinstance(spans, bool) or not isinstance(spans, (str, int, list)):
        raise ValueError(f"positions are written as 97-110,120, got {spans!r:.60}")
    parts = (
        spans.replace(" ", "").split(",") if isinstance(spans, str) else [spans] if isinstance(spans, int) else spans
    )
    found = []
    for part in parts:
        pair = part.split("-") if isinstance(part, str) else part if isinstance(part, list) else [part]
        try:
            first, last = int(pair[0]), int(pair[-1])
        except (ValueError, TypeError, IndexError):
            raise ValueError(f"positions are written as 97-110,120, got {spans!r:.60}") from None
        if not (len(pair) <= 2 and 1 <= first <= last <= length):
            raise ValueError(f"positions {part!r} do not lie in 1 to {length}, the length of the text")
        found.append((first - 1, last))
    return found


def masked_text(text: str, tokenizer: Tokenizer, spans: object = None, marks: str = "", drop: str = "") -> str:
    """The text with the tokenizer's mask token for everything that is to be filled.

    Args:
        text: the text in the file.
        spans: characters to fill, see `parse_spans`. Each token with one of them becomes a mask.
        marks: each of these characters stands for one mask token.
        drop: characters that are left out.
    Raises:
        ValueError: spans that are not in the text.
    """
    mask, place = tokenizer.mask_token or "", 0
    pieces: list[str | None] = []
    chosen = parse_spans(spans, len(text)) if spans not in (None, "") else []
    for start, end in tokens_within(text, chosen, tokenizer):
        pieces += [text[place:start], None]
        place = end
    pieces.append(text[place:])
    table = str.maketrans(dict.fromkeys(drop, "") | dict.fromkeys(marks, mask))
    own = mask if mask and mask in text else None  # a mark or a character to drop may be part of the mask token's name
    return "".join(
        mask if piece is None else mask.join(part.translate(table) for part in (piece.split(own) if own else [piece]))
        for piece in pieces
    )


def tokens_within(text: str, spans: list[tuple[int, int]], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """(start, end) of each token that overlaps a span, in order. Without offsets, each character counts as a token."""
    if not spans:
        return []
    if tokenizer.is_fast:
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = [(start, end) for start, end in read.offset_mapping if end > start]
    else:
        offsets = [(i, i + 1) for i in range(len(text))]
    chosen = bytearray(len(text))
    for start, end in spans:
        chosen[start:end] = b"\1" * (end - start)
    return [(start, end) for start, end in offsets if any(chosen[start:end])]


def readable_text(text: str, tokenizer: Tokenizer) -> tuple[str, list[str]]:
    """The text in the case that the tokenizer knows, and the parts that are unknown to the tokenizer.

    Lower case, which marks repeats in FASTA, is read as upper case if the tokenizer knows only upper case.
    """
    from ..sampling.canvas import unknown_pieces

    if tokenizer.unk_token_id is None:
        return text, []
    unknown = unknown_pieces(text, tokenizer)
    own = tokenizer.mask_token or "\0"
    upper = own.join(part.upper() for part in text.split(own))
    if unknown and any(letter.islower() for piece in unknown for letter in piece):
        left = unknown_pieces(upper, tokenizer)
        if len(left) < len(unknown):
            return upper, left
    return text, unknown


def restored_case(filled: str, text: str, mask_token: str) -> str:
    """A filled text with the given letters in their original case, if each token is one letter."""
    letters = [letter for part in text.split(mask_token) for letter in (*part, None)][:-1]
    if len(letters) != len(filled):
        return filled
    pairs = zip(letters, filled, strict=True)
    return "".join(one if one is not None and one.upper() == other else other for one, other in pairs)
