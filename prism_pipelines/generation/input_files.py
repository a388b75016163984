"""Lines of the files that users bring."""

from __future__ import annotations

import json
from pathlib import Path


def read_lines(path: Path, endings: tuple[str, ...], content: str) -> list[str]:
    """Lines of a text file, without the blank ones at its end.

    Args:
        path: of the file.
        endings: of file names that are read.
        content: what the file holds, for errors.
    Raises:
        ValueError: another ending, or not UTF-8.
        OSError: the file cannot be read.
    """
    if path.suffix.lower() not in endings:
        known = " or ".join([", ".join(endings[:-1]), endings[-1]])
        raise ValueError(f"A file of {content} must end in {known}, got {str(path)!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of {content} {str(path)!r}.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]  # not splitlines(): JSON strings may hold U+2028
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_json_lines(path: Path, lines: list[str]) -> list[tuple[int, object]]:
    """Number, from 1, and content of each line that is not blank.

    Raises:
        ValueError: a line that is no JSON.
    """
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from None
    return rows
