"""How often Sudoku is solved, with intervals and paired comparisons, and how well a quality head knows its errors.

A solver is any callable from puzzles (N, 81) to grids (N, 81); `pipeline_solver` makes one of a pipeline.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..sudoku import CELLS, MASK_ID, format_grid, is_solved, to_ids
from .statistics import calibration_measures, wilson_interval


@dataclass(frozen=True)
class SudokuScore:
    """The result of `evaluate_sudoku`.

    Args:
        grids: the solver's answers, int64 of shape (N, 81).
        solved: valid grid with every clue kept, bool of shape (N,).
        altered: a clue was changed, bool of shape (N,); always False for a sound solver.
    """

    grids: np.ndarray
    solved: np.ndarray
    altered: np.ndarray

    @property
    def success(self) -> float:
        """Share solved."""
        return float(self.solved.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the share solved."""
        return wilson_interval(int(self.solved.sum()), len(self.solved))


def evaluate_sudoku(
    solve: Callable[[np.ndarray], ArrayLike],
    puzzles: ArrayLike,
    *,
    batch_size: int = 32,
    on_batch: Callable[[int, int], None] | None = None,
) -> SudokuScore:
    """Run a solver over puzzles and check every answer exactly.

    Args:
        solve: callable from int64 puzzles (n, 81), 0 for a blank, to grids (n, 81).
        puzzles: integers of shape (N, 81), N >= 1.
        batch_size: puzzles per call of `solve`.
        on_batch: called as `on_batch(done, total)` after each batch; for progress bars.
    Returns:
        A `SudokuScore` over all N puzzles.
    Raises:
        ValueError: no puzzles, a wrong shape, a batch size below 1, or a solver that returns another shape.
    """
    puzzles = np.asarray(puzzles, dtype=np.int64)
    if puzzles.ndim != 2 or puzzles.shape[1] != CELLS or not len(puzzles):
        raise ValueError(f"`puzzles` must have shape (N, {CELLS}) with N >= 1, got {puzzles.shape}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    answers = []
    for start in range(0, len(puzzles), batch_size):
        batch = puzzles[start : start + batch_size]
        answer = np.asarray(solve(batch))
        if answer.shape != batch.shape:
            raise ValueError(f"`solve` must return grids of shape {batch.shape}, got {answer.shape}.")
        answers.append(answer)
        if on_batch is not None:
            on_batch(start + len(batch), len(puzzles))
    grids = np.concatenate(answers)
    altered = np.any((puzzles > 0) & (grids != puzzles), axis=-1)
    return SudokuScore(grids, is_solved(grids, puzzles), altered)


def row_generators(puzzles: Iterable[np.ndarray], seed: int) -> list[torch.Generator]:
    """One CPU generator per puzzle, seeded by its clues and `seed`, so that its run does not depend on the batch."""
    # torch's CPU generator reads only the low 32 bits of its seed, so both must be hashed into them.
    keys = [zlib.crc32(f"{seed} {format_grid(puzzle)}".encode()) for puzzle in puzzles]
    return [torch.Generator().manual_seed(key) for key in keys]


def pipeline_solver(
    pipe: Any,
    num_inference_steps: int,
    seed: int = 0,
    on_output: Callable[[Any], None] | None = None,
    return_quality: bool = False,
) -> Callable[[np.ndarray], np.ndarray]:
    """A pipeline with its present scheduler as a solver for `evaluate_sudoku`.

    Args:
        pipe: a `PrismPipeline` whose ids are those of `sudoku_tokenizer`.
        num_inference_steps: forward passes per run.
        seed: at least 0; a puzzle's result depends on the puzzle and this seed alone.
        on_output: called with the `PrismPipelineOutput` of each batch, which holds more than the grids; or None.
        return_quality: as in the pipeline's call: costs a forward pass, and gives a calibrated head's confidence.
    Returns:
        callable from puzzles (n, 81) to grids (n, 81).
    """

    def solve(puzzles: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(to_ids(puzzles))
        generators = row_generators(puzzles, seed)
        with warnings.catch_warnings():
            # Rules are compared at equal forwards, also where one of them has nothing to do in some.
            warnings.filterwarnings("ignore", message=".* steps will write nothing")
            out = pipe(
                infill=ids,
                num_inference_steps=num_inference_steps,
                generator=generators,
                output_type="seq",
                return_quality=return_quality,
            )
        if on_output is not None:
            on_output(out)
        return out.sequences.cpu().numpy()

    return solve


def head_calibration(
    pipe: Any, puzzles: ArrayLike, solutions: ArrayLike, *, num_revealed: int = 4, seed: int = 0, batch_size: int = 32
) -> dict:
    """Calibration of a pipeline's quality on grids that it partially filled itself.

    The pipeline runs on the puzzles with its present scheduler, writing `num_revealed` cells per forward pass. Set
    `MDLMScheduler(order="random")` at temperature 1 for the states of the training loss. After every pass each cell
    written so far is scored; it is right if it equals the unique solution. The states after the first pass are those of
    the fine-tuning loss (k cells revealed in a clean grid). Later states hold earlier errors. Over easy and hard
    puzzles together, AUROC also rewards telling easy from hard, which remasking does not need: read it by clues.

    Args:
        pipe: a `PrismPipeline` with a quality head.
        puzzles, solutions: integers of shape (N, 81); each puzzle with a unique solution and at least one blank.
        num_revealed: k, cells written per forward pass.
        seed: of the sampling.
        batch_size: puzzles per batch; puzzles of a batch have the same number of blanks.
    Returns:
        {"revealed": calibration after the first pass, "filled": calibration over all states but the complete grid,
        "by_clues": {number of clues: {"revealed", "filled"}}}.
    Raises:
        ValueError: no puzzle has more than `num_revealed` blanks.
    """
    puzzles, solutions = np.asarray(puzzles, dtype=np.int64), np.asarray(solutions, dtype=np.int64)
    blanks = (puzzles == 0).sum(axis=1)
    states: dict[int, list] = {}
    for number in np.unique(blanks):
        rows, steps = np.flatnonzero(blanks == number), math.ceil(int(number) / num_revealed)
        found = states[81 - int(number)] = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            found += _scored_states(pipe, puzzles[batch], solutions[batch], steps, seed)
    states = {clues: found for clues, found in states.items() if found}
    if not states:
        raise ValueError(f"No puzzle has more than `num_revealed` = {num_revealed} blanks, so no partial grid arises.")

    def pooled(chosen: list[tuple]) -> dict:
        return calibration_measures(np.concatenate([s[1] for s in chosen]), np.concatenate([s[2] for s in chosen]))

    def both(chosen: list[tuple]) -> dict:
        return {"revealed": pooled([s for s in chosen if s[0] == 0]), "filled": pooled(chosen)}

    everything = [state for found in states.values() for state in found]
    return {**both(everything), "by_clues": {clues: both(found) for clues, found in states.items()}}


def _scored_states(
    pipe: Any, puzzles: np.ndarray, solutions: np.ndarray, steps: int, seed: int
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(step, quality of written cells, whether they are right) after every forward but the last of one run."""
    found = []
    blank, truth = torch.from_numpy(puzzles == 0), torch.from_numpy(solutions)

    def score(pipe: Any, i: int, t: Any, state: dict) -> dict:
        if i < steps - 1:
            ids = state["sample"]
            quality = pipe.score(input_ids=ids)[0].cpu()
            ids = ids.cpu()
            written = blank & (ids != MASK_ID)
            found.append((i, quality[written].numpy(), (ids == truth)[written].numpy()))
        return {}

    pipe(
        infill=torch.from_numpy(to_ids(puzzles)),
        num_inference_steps=steps,
        generator=row_generators(puzzles, seed),
        output_type="seq",
        callback_on_step_end=score,
    )
    return found
