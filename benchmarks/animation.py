"""The moving picture of the README: one real run of the bundled Sudoku model, chosen since wrong digits are taken back.

Usage: python -m benchmarks.animation   (seconds; writes docs/figures/animation.svg)
"""

from __future__ import annotations

import torch

import prism_pipelines
from benchmarks.shared import ROOT
from prism_pipelines import PrismPipeline, PrismScheduler, sudoku

CLUES, PUZZLES, CHOSEN, STEPS, REMASKED = 32, 24, 10, 24, 6


def main() -> None:
    """Make the run, say what it shows, and write the picture."""
    pipe = PrismPipeline.from_pretrained(prism_pipelines.bundled("sudoku"))
    pipe.scheduler = PrismScheduler(order="random", temperature=1.0, num_remask=REMASKED)
    puzzle = sudoku.make_puzzles(PUZZLES, CLUES, seed=7)[0][CHOSEN]
    run = {"infill": torch.as_tensor(sudoku.to_ids(puzzle))[None], "num_inference_steps": STEPS}
    generator = torch.Generator().manual_seed(CHOSEN)
    out = pipe(**run, generator=generator, return_trace=True, return_quality=True)
    before, wrong = out.trace.start[0], 0
    for step in out.trace:
        wrong += int((before != out.sequences[0])[step.remasked[0]].sum())
        before = step.sample[0]
    solved = bool(sudoku.is_solved(out.sequences.numpy(), puzzle[None])[0])
    print(f"solved: {solved}; {out.nfe} forward passes; digits that were taken back and not written again: {wrong}")
    out.trace.to_svg(ROOT / "docs" / "figures" / "animation.svg", columns=9)


if __name__ == "__main__":
    main()
