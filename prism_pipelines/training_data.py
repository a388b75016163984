"""Training examples: what index i of a data set is, and how a batch is made of them."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from .sudoku import CELLS, complete_grids, dig_puzzles, shuffle_symmetries

HELD_OUT_SEED = 999_983  # base grids for evaluation come from this seed, training uses the run's own


class SudokuGrids(Dataset):
    """Complete Sudoku grids: `num_base` generated ones, each example a random symmetric image of one of them.

    A share of the examples are puzzles: their clues are a prompt that is never masked, so every masked cell has one
    right answer. Example i depends on (seed, i) alone, so a resumed run sees exactly what the uninterrupted one would.

    Args:
        num_examples: length of an epoch.
        seed: makes the base grids, the puzzles and the images.
        num_base: base grids that are generated (2 ms each).
        puzzle_share: share of the examples that are puzzles, in [0, 1]; base puzzles take 10 ms each.
        puzzle_clues: lowest and highest number of clues of a puzzle.
    """

    def __init__(self, num_examples, seed, num_base=20_000, puzzle_share=0.0, puzzle_clues=(23, 34)):
        self.num_examples, self.seed, self.puzzle_share = num_examples, seed, puzzle_share
        self.base = complete_grids(min(num_base, num_examples), seed)
        # A fraction of the grids is enough for puzzles: their symmetric images are as many again as of any grid.
        chosen = self.base[: len(self.base) // 4 + 1] if puzzle_share else self.base[:0]
        self.puzzles = dig_puzzles(chosen, puzzle_clues, seed)

    def __len__(self):
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, index))
        is_puzzle = rng.random() < self.puzzle_share
        place, image = index % len(self.puzzles if is_puzzle else self.base), int(rng.integers(2**62))
        # The same image of grid and puzzle: both are made by generators of one seed.
        grid = shuffle_symmetries(self.base[[place]], np.random.default_rng(image))[0]
        trainable = np.ones(CELLS, dtype=bool)
        if is_puzzle:
            trainable = shuffle_symmetries(self.puzzles[[place]], np.random.default_rng(image))[0] == 0
        return {"input_ids": torch.from_numpy(grid.astype(np.int64)), "trainable_mask": torch.from_numpy(trainable)}
