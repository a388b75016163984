"""Draw every picture of the docs again: plots from the committed JSON in docs/figures, nothing else.

Usage: python -m benchmarks.figures   (`make figures`; seconds)
"""

from __future__ import annotations

import json

from benchmarks import concepts, proteins, sudoku, text
from benchmarks.results import TEXT
from benchmarks.shared import ROOT
from benchmarks.text_results import merged

FIGURES = ROOT / "docs" / "figures"


def table(name: str) -> dict:
    """A committed table."""
    return json.loads((FIGURES / f"{name}.json").read_text())


def main() -> None:
    """Draw them all."""
    sudoku.draw_success(table("sudoku"), FIGURES / "sudoku.png")
    sudoku.draw_calibration(table("sudoku_1000"), FIGURES / "sudoku_1000_calibration.png")
    text.draw(merged({name: table(name) for name in TEXT}), FIGURES / "text.png")
    proteins.draw(table("proteins"), FIGURES / "proteins.png")
    concepts.draw()


if __name__ == "__main__":
    main()
