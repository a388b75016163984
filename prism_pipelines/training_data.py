"""Training examples: what index i of a data set is, and how a batch is made of them."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from .sudoku import complete_grids, shuffle_symmetries

HELD_OUT_SEED = 999_983  # base grids for evaluation come from this seed, training uses the run's own


class SudokuGrids(Dataset):
    """Complete Sudoku grids: `num_base` generated ones, each example a random symmetric image of one of them.

    Example i depends on (seed, i) alone, so a resumed run sees exactly what the uninterrupted one would.

    Args:
        num_examples: length of an epoch.
        seed: makes the base grids and the images.
        num_base: base grids that are generated (2 ms each).
    """

    def __init__(self, num_examples: int, seed: int, num_base: int = 20_000):
        self.num_examples, self.seed = num_examples, seed
        self.base = complete_grids(min(num_base, num_examples), seed)

    def __len__(self):
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, index))
        grid = shuffle_symmetries(self.base[[index % len(self.base)]], rng)[0]
        return {"input_ids": torch.from_numpy(grid.astype(np.int64))}
