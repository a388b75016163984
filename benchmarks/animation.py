"""The moving picture of the README: one real run of judge and repair on the bundled Sudoku model, chosen for a repair.

Usage: python -m benchmarks.animation   (seconds; writes docs/figures/animation.svg)
"""

from __future__ import annotations

import torch

from benchmarks.shared import ROOT
from prism_pipelines import PrismPipeline, bundled, sudoku

CLUES, PUZZLES, CHOSEN, STEPS = 25, 24, 8, 60


def main() -> None:
    """Make the run, say what it shows, and write the picture."""
    pipe = PrismPipeline.from_pretrained(bundled("sudoku"), quality_head=bundled("sudoku-head"))
    puzzle = sudoku.make_puzzles(PUZZLES, CLUES, seed=7)[0][CHOSEN]
    run = {"infill": torch.as_tensor(sudoku.to_ids(puzzle))[None], "num_inference_steps": STEPS}
    generator = torch.Generator().manual_seed(CHOSEN)
    out = pipe(**run, generator=generator, return_trace=True)
    before, wrong = out.trace.start[0], 0
    for step in out.trace:
        wrong += int((before != out.sequences[0])[step.remasked[0]].sum())
        before = step.sample[0]
    solved = bool(sudoku.is_solved(out.sequences.numpy(), puzzle[None])[0])
    print(f"solved: {solved}; {out.nfe} forward passes; P(all right) {float(out.confidence[0]):.2f}")
    print(f"wrong digits taken back: {wrong}")
    out.trace.to_svg(ROOT / "docs" / "figures" / "animation.svg", columns=9)


if __name__ == "__main__":
    main()
