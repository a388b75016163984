"""Training examples, data sets of them, and how rows are split into training and held-out examples.

An example is a dict of tensors: `input_ids` (L,), and `trainable_mask` (L,), false where a token is given (a prompt)
and never masked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ..sampling.rows import RowEncoder, encode_rows, written_by_the_model
from ..sudoku import CELLS, SYMMETRY_NUMBERS, complete_grids, dig_puzzles, symmetry_images, uniform_of

HELD_OUT_SEED = 999_983  # base grids for evaluation come from this seed, training uses the run's own
READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
EVAL_SHARE = 0.1  # held-out examples are at most this share of a data set without a split of its own


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

    def __init__(
        self,
        num_examples: int,
        seed: int,
        num_base: int = 20_000,
        puzzle_share: float = 0.0,
        puzzle_clues: tuple[int, int] = (23, 34),
    ) -> None:
        self.num_examples, self.seed, self.puzzle_share = num_examples, seed, puzzle_share
        self.base = complete_grids(min(num_base, num_examples), seed)
        # A fraction of the grids is enough for puzzles: their symmetric images are as many again as of any grid.
        chosen = self.base[: len(self.base) // 4 + 1] if puzzle_share else self.base[:0]
        self.puzzles = dig_puzzles(chosen, puzzle_clues, seed)

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """Many at once, which is how a DataLoader asks: a batch takes little more time than an example."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wrong := wanted[(wanted < 0) | (wanted >= self.num_examples)].tolist():
            raise IndexError(f"Example {wrong[0]} of {self.num_examples}.")
        u = uniform_of(self.seed, wanted, 1 + SYMMETRY_NUMBERS)
        is_puzzle, u = u[:, 0] < self.puzzle_share, u[:, 1:]
        place = wanted % np.where(is_puzzle, max(1, len(self.puzzles)), len(self.base))
        grids = symmetry_images(self.base[place], u)
        trainable = np.ones((len(grids), CELLS), dtype=bool)
        trainable[is_puzzle] = symmetry_images(self.puzzles[place[is_puzzle]], u[is_puzzle]) == 0
        pairs = zip(torch.from_numpy(grids.astype(np.int64)), torch.from_numpy(trainable), strict=True)
        return [{"input_ids": ids, "trainable_mask": learned} for ids, learned in pairs]


class BlankCanvases(Dataset):
    """Rows of masks, for training without data: the model writes its own texts.

    Args:
        num_examples: length of an epoch.
        lengths: fewest and most tokens of a row, `opening` and `closing` included. The length of a row is uniform, and
            depends on (seed, index) alone.
        seed: of the lengths.
        mask_token_id: id of the mask.
        opening, closing: ids of the special tokens at the ends of each row.
    Raises:
        ValueError: the shortest row has no token to write.
    """

    def __init__(
        self,
        num_examples: int,
        lengths: tuple[int, int],
        seed: int,
        mask_token_id: int,
        opening: Sequence[int] = (),
        closing: Sequence[int] = (),
    ) -> None:
        self.num_examples, self.lengths, self.seed = num_examples, lengths, seed
        self.mask_token_id, self.opening, self.closing = mask_token_id, opening, closing
        ends = len(opening) + len(closing)
        if lengths[0] <= ends:
            raise ValueError(f"`--max-length` {lengths[1]} leaves no token to write besides {ends} special ones.")

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_examples:
            raise IndexError(f"Example {index} of {self.num_examples}.")
        low, high = self.lengths
        length = low + int(uniform_of(self.seed, np.array([index]), 1)[0, 0] * (high - low + 1))
        count = length - len(self.opening) - len(self.closing)
        return written_by_the_model(self.opening, count, self.closing, self.mask_token_id)


# --- data sets of text ------------------------------------------------------------------------------------------------


def read_rows(
    dataset: str,
    *,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    flag: str = "--dataset",
) -> Any:
    """Rows of a Hub data set, or of a local file or folder of txt, jsonl, json, csv or parquet files.

    Args:
        dataset: Hub id, file or folder. A line of a txt file is a row.
        split: of a Hub data set; local files are read whole.
        name, revision: configuration, and commit, of a Hub data set.
        streaming: read row by row, without storing the rows.
        flag: name of the data set in errors.
    Returns:
        `datasets.Dataset`, or `IterableDataset` when streaming.
    Raises:
        ValueError: nothing readable there, or `datasets` cannot load it.
        ImportError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'`{flag}` needs the datasets library: pip install "prism-pipelines[train]".') from error
    path = Path(dataset)
    if not path.exists():
        try:
            return datasets.load_dataset(dataset, name, split=split, revision=revision, streaming=streaming)
        except Exception as error:  # a dozen kinds, of several libraries
            raise ValueError(
                f"`{flag}` {dataset!r} is no local file, and loading it from the Hub failed: {error}"
            ) from None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    readable = [file for file in files if file.suffix in READERS]
    kinds = {READERS[file.suffix] for file in readable}
    if len(kinds) != 1:
        found = f"{len(kinds)} kinds of files ({', '.join(sorted(kinds))})" if kinds else "no such file"
        raise ValueError(f"`{flag}` {dataset!r} must be one kind of {', '.join(READERS)} files; it has {found}.")
    if not any(file.stat().st_size for file in readable):
        raise ValueError(f"`{flag}` {dataset!r} is empty.")
    names = [str(file) for file in readable]
    try:
        return datasets.load_dataset(kinds.pop(), data_files=names, split="train", streaming=streaming)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise ValueError(f"`{flag}` {dataset!r} cannot be read: {error.__cause__ or error}") from None


class StreamedExamples(IterableDataset):
    """Examples made while rows are read. After the last row the data set begins again, without an end.

    If it ended, the Trainer would begin an epoch whose length it does not know, and a resumed run would skip to the
    wrong place. So all passes count as one stream, of which a resumed run skips the examples it has seen.

    Args:
        rows: iterable that gives the rows each time it is iterated.
        encoder: makes examples of rows.
        skip: number of examples left out at the beginning of each pass (they are held out).
    Raises:
        ValueError: while iterating, if there is no example.
    """

    def __init__(self, rows: Iterable[dict], encoder: RowEncoder, skip: int) -> None:
        self.rows, self.encoder, self.skip = rows, encoder, skip

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            empty = True
            for example in itertools.islice(encode_rows(self.rows, self.encoder), self.skip, None):
                empty = False
                yield example
            if empty:
                raise ValueError(f"The data set is empty after the {self.skip} examples that are held out.")


def split_examples(
    rows: Iterable[dict],
    encoder: RowEncoder,
    num_eval: int,
    streaming: bool = False,
    eval_rows: Iterable[dict] | None = None,
) -> tuple[Any, list]:
    """Training and held-out examples.

    Args:
        rows: of the training data; iterable.
        encoder: makes examples of rows.
        num_eval: the most held-out examples.
        streaming: hold out the first examples, and read the others during training.
        eval_rows: separate rows to hold out. None holds out the first `EVAL_SHARE` of `rows`, at least one example.
    Returns:
        (training data set, held-out list). The list is empty if `num_eval` is 0 or there is only one example.
    Raises:
        ValueError: no example at all, or what `encode_rows` raises.
    """
    held_out = [] if eval_rows is None else list(itertools.islice(encode_rows(eval_rows, encoder), num_eval))
    if eval_rows is not None and not held_out and num_eval:
        raise ValueError("The held-out data set is empty: none of its rows gives an example.")
    if streaming:
        first = list(itertools.islice(encode_rows(rows, encoder), 0 if eval_rows is not None else num_eval))
        return StreamedExamples(rows, encoder, len(first)), held_out or first
    examples = list(encode_rows(rows, encoder))
    if not examples:
        dropped = " (rows longer than --max-length are dropped)" if encoder.too_long == "drop" else ""
        raise ValueError(f"`--dataset` is empty: none of its rows gives an example{dropped}.")
    if eval_rows is not None or len(examples) == 1:
        return examples, held_out
    count = min(num_eval, max(1, int(len(examples) * EVAL_SHARE)))
    return examples[count:], examples[:count]
