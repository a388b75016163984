"""Draw every picture of the docs again: plots from the committed JSON in docs/figures, nothing else.

Usage: python -m benchmarks.figures   (`make figures`; seconds)
"""

from __future__ import annotations

import json

from benchmarks import concepts, proteins, sudoku, text
from benchmarks.results import OURS, TEXT, solved_within
from benchmarks.shared import ROOT
from benchmarks.text_results import merged
from prism_pipelines.evaluation.plots import success_figure

FIGURES = ROOT / "docs" / "figures"


def table(name: str) -> dict:
    """A committed table."""
    return json.loads((FIGURES / f"{name}.json").read_text())


def draw_judging(judging: dict, path) -> None:
    """The README's plot: solved within so many forward passes, by judge and repair and by the other rules."""
    panels = {
        f"{clues} clues": {arm: [(passes, *point) for passes, point in points.items()] for arm, points in arms.items()}
        for clues, arms in sorted(solved_within(judging).items(), reverse=True)
    }
    shown = (OURS, "confidence order", "PRISM one-step", "self-confidence", "restarts")
    success_figure(panels, path, [arm for arm in shown if all(arm in arms for arms in panels.values())])


def main() -> None:
    """Draw them all."""
    sudoku.draw_success(table("sudoku"), FIGURES / "sudoku.png")
    sudoku.draw_calibration(table("sudoku_1000"), FIGURES / "sudoku_1000_calibration.png")
    text.draw(merged({name: table(name) for name in TEXT}), FIGURES / "text.png")
    proteins.draw(table("proteins"), FIGURES / "proteins.png")
    draw_judging(table("judging"), FIGURES / "judging.png")
    concepts.draw()


if __name__ == "__main__":
    main()
