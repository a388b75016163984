"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]], right: int = 0) -> str:
    """A Markdown table, without a line end after its last row.

    Args:
        header: headings of the columns.
        rows: cells of each row, as many as columns.
        right: how many of the last columns are aligned on the right.
    """
    rule = ["---"] * (len(header) - right) + ["---:"] * right
    lines = [header, rule, *rows]
    return "\n".join("|" + "".join(f" {cell} |" if cell != "" else " |" for cell in line) for line in lines)
