"""Sudoku: seeded grids and puzzles, an exact solver, a checker and the tokenizer of the bundled model.

In bulk a grid is int64 of shape (81,), row by row, 0 for a blank cell. For people it is 81 characters, "." for a blank.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_ID, MASK_ID, VOCAB_SIZE, CELLS = 0, 10, 11, 81  # the digits 1-9 are their own token ids
# 25 clues, unique: what `prism sudoku` solves when it is given nothing
DEMO_PUZZLE = "..5......9......86.37.5..94.........4....71.81.3..67...2..8.97....9.1.....6.7...."
HARD_PUZZLE = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."

# Units 0-8 are rows, 9-17 columns, 18-26 boxes: the three units of each cell, and the (27, 9) cells of each unit
_UNITS_OF = [(i // 9, 9 + i % 9, 18 + i // 27 * 3 + i % 9 // 3) for i in range(CELLS)]
UNITS = np.array([[i for i in range(CELLS) if unit in _UNITS_OF[i]] for unit in range(27)])
_ALL = 0b111111111
_DIGITS = [[d + 1 for d in range(9) if bits >> d & 1] for bits in range(512)]  # digits of a candidate set
_COUNT = [len(digits) for digits in _DIGITS]


def _branch(blanks: list[int], free: list[int]) -> tuple[int, int]:
    """Where to go on: an index into `blanks` and the digits to try there, as a bit set; the empty set is a dead end.

    A cell with one candidate comes first, then a digit with one place in a unit, then the cell with fewest candidates.
    """
    candidates, where, fewest = [], 0, 10
    for k, i in enumerate(blanks):
        r, c, b = _UNITS_OF[i]
        bits = free[r] & free[c] & free[b]
        if _COUNT[bits] < fewest:
            where, fewest = k, _COUNT[bits]
            if fewest <= 1:
                return k, bits
        candidates.append(bits)
    once, twice = [0] * 27, [0] * 27  # digits with at least one and at least two places left in each unit
    for i, bits in zip(blanks, candidates, strict=True):
        for unit in _UNITS_OF[i]:
            twice[unit] |= once[unit] & bits
            once[unit] |= bits
    if any(need & ~have for need, have in zip(free, once, strict=True)):
        return 0, 0
    for k, (i, bits) in enumerate(zip(blanks, candidates, strict=True)):
        r, c, b = _UNITS_OF[i]
        only = bits & ((once[r] & ~twice[r]) | (once[c] & ~twice[c]) | (once[b] & ~twice[b]))
        if only:
            return k, only if _COUNT[only] == 1 else 0
    return where, candidates[where]


class _OutOfVisits(Exception):
    """The search was cut off."""


def _solutions(
    cells: list[int], limit: int, rng: random.Random | None = None, max_visits: int | None = None
) -> list[list[int]]:
    """Up to `limit` solutions of a grid without conflicts, depth-first; `rng` orders the digits that are tried.

    Raises:
        _OutOfVisits: more than `max_visits` partial grids.
    """
    grid, visits = list(cells), 0
    found: list[list[int]] = []
    free = [_ALL] * 27  # digits still to be placed in each unit, as bit sets

    def flip(i: int, digit: int) -> None:
        for unit in _UNITS_OF[i]:
            free[unit] ^= 1 << (digit - 1)

    def search() -> None:
        nonlocal visits
        visits += 1
        if max_visits is not None and visits > max_visits:
            raise _OutOfVisits
        if not blanks:
            found.append(list(grid))
            return
        where, bits = _branch(blanks, free)
        i = blanks[where]
        blanks[where] = blanks[-1]
        blanks.pop()
        digits = _DIGITS[bits]
        for digit in rng.sample(digits, len(digits)) if rng else digits:
            grid[i] = digit
            flip(i, digit)
            search()
            flip(i, digit)
            if len(found) >= limit:
                break
        blanks.append(i)
        blanks[where], blanks[-1] = blanks[-1], blanks[where]

    for i, digit in enumerate(grid):
        if digit:
            flip(i, digit)
    blanks = [i for i, digit in enumerate(grid) if not digit]
    search()
    return found


def conflicts(puzzle: Iterable[int]) -> list[tuple[int, int]]:
    """Pairs of cells (i, j), i < j, that hold the same digit in one row, column or box; empty for a consistent grid."""
    cells = [int(digit) for digit in puzzle]
    pairs: set[tuple[int, int]] = set()
    for unit in UNITS.tolist():
        for a, i in enumerate(unit):
            pairs.update((i, j) for j in unit[a + 1 :] if cells[i] and cells[i] == cells[j])
    return sorted(pairs)


def count_solutions(puzzle: Iterable[int], limit: int = 2, max_visits: int | None = None) -> int | None:
    """How many solutions a puzzle has, exactly, counting no further than `limit` (2 proves or refutes uniqueness).

    `max_visits` is the largest number of partial grids that the search looks at; the result is None if that was not
    enough. Most puzzles take thousands, but some, without a solution or with few clues, take millions.
    """
    cells = [int(digit) for digit in puzzle]
    try:
        return 0 if conflicts(cells) else len(_solutions(cells, limit, max_visits=max_visits))
    except _OutOfVisits:
        return None


def solve(puzzle: Iterable[int]) -> np.ndarray | None:
    """The first solution of a puzzle, int64 of shape (81,); None if there is none."""
    cells = [int(digit) for digit in puzzle]
    found = [] if conflicts(cells) else _solutions(cells, 1)
    return np.array(found[0], dtype=np.int64) if found else None


def is_valid_grid(grids: npt.ArrayLike) -> np.ndarray:
    """Whether each grid is complete and every row, column and box holds 1-9 once.

    Args:
        grids: integers of shape (N, 81) or (81,).
    Returns:
        bool of shape (N,) or ().
    """
    units = np.sort(np.asarray(grids)[..., UNITS], axis=-1)  # (..., 27, 9)
    return (units == np.arange(1, 10)).all(axis=(-2, -1))


def is_solved(grids: npt.ArrayLike, puzzles: npt.ArrayLike) -> np.ndarray:
    """Whether each grid is valid AND keeps every clue of its puzzle; shapes as `is_valid_grid`."""
    grids, puzzles = np.asarray(grids), np.asarray(puzzles)
    return is_valid_grid(grids) & ((puzzles == 0) | (grids == puzzles)).all(axis=-1)


def complete_grids(n: int, seed: int) -> np.ndarray:
    """`n` complete valid grids by randomised search from nothing, uint8 (n, 81); the same seed gives the same grids."""
    rng = random.Random(seed)
    return np.array([_solutions([0] * CELLS, 1, rng)[0] for _ in range(n)], dtype=np.uint8).reshape(n, CELLS)


SYMMETRY_NUMBERS = 34  # uniform numbers that choose one symmetry


def shuffle_symmetries(grids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random image of every grid under the symmetries of Sudoku, see `symmetry_images`.

    Args:
        grids: integers of shape (N, 81).
        rng: source of the randomness.
    Returns:
        A new array of the same shape and dtype.
    """
    return symmetry_images(grids, rng.random((len(grids), SYMMETRY_NUMBERS)))


def symmetry_images(grids: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The image of every grid under the symmetry that its numbers `u` choose. A unique solution stays unique.

    Relabels digits (blanks stay blank), permutes bands, stacks, the rows of a band and the columns of a stack, and
    transposes half of the grids: 9! * 6^8 * 2 images.

    Args:
        grids: integers of shape (N, 81).
        u: uniform numbers in [0, 1), (N, `SYMMETRY_NUMBERS`); sorting some of them gives a random permutation.
    Returns:
        A new array of the shape and dtype of `grids`.
    """
    n = len(grids)
    labels = np.zeros((n, 10), dtype=grids.dtype)
    labels[:, 1:] = u[:, :9].argsort(axis=1) + 1

    def lines(numbers: np.ndarray) -> np.ndarray:  # (n, 9): an order of the nine rows that keeps bands together
        bands, inside = numbers[:, :3].argsort(axis=1), numbers[:, 3:].reshape(n, 3, 3).argsort(axis=2)
        return (bands[:, :, None] * 3 + inside).reshape(n, 9)

    row, column = lines(u[:, 9:21]), lines(u[:, 21:33])
    cells = row[:, :, None] * 9 + column[:, None, :]  # (n, 9, 9)
    flip = u[:, 33] < 0.5
    cells[flip] = cells[flip].transpose(0, 2, 1)
    images = np.take_along_axis(grids, cells.reshape(n, CELLS), axis=1)
    return np.take_along_axis(labels, images.astype(np.int64), axis=1)


def uniform_of(seed: int, indices: npt.ArrayLike, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) for each index, which depend on the seed and the index: float64 (N, count).

    Number k of index i is output i * count + k of the generator SplitMix64 that starts at `seed` (Steele, Lea and
    Flood, OOPSLA 2014). It can be computed without the outputs before it, and for many indices at once.
    """
    place = np.asarray(indices, dtype=np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    with np.errstate(over="ignore"):  # all arithmetic is modulo 2^64
        x: np.ndarray = np.uint64(seed % 2**64) + (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def _dig(solution: list[int], clues: int, rng: random.Random) -> tuple[list[int], int]:
    """Blank cells of a grid in random order while the solution stays unique, down to `clues`; and the clues left."""
    puzzle, left = list(solution), CELLS
    for i in rng.sample(range(CELLS), CELLS):
        if left == clues:
            break
        digit, puzzle[i] = puzzle[i], 0
        if len(_solutions(puzzle, 2)) == 1:
            left -= 1
        else:
            puzzle[i] = digit
    return puzzle, left


def dig_puzzles(grids: np.ndarray, clues: tuple[int, int], seed: int) -> np.ndarray:
    """A puzzle with a unique solution from each complete grid.

    Args:
        grids: integers of shape (N, 81).
        clues: lowest and highest number of clues. The wanted number of each puzzle is random between them; a puzzle has
            more if blanking further cells would allow several solutions.
        seed: the same seed gives the same puzzles.
    Returns:
        uint8 of shape (N, 81); blanks are 0.
    """
    rng = random.Random(f"dig-{seed}")
    puzzles = [_dig(grid.tolist(), rng.randint(*clues), rng)[0] for grid in grids]
    return np.array(puzzles, dtype=np.uint8).reshape(len(grids), CELLS)


def make_puzzles(n: int, clues: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`n` puzzles of exactly `clues` clues, each with a unique solution (proved by the solver).

    Cells are blanked in random order, so the clues form no pattern. Grids that do not reach `clues` are dropped. 30
    clues are quick, 24 take about 0.03 s per puzzle, and below 22 the search may take very long.

    Args:
        n: number of puzzles.
        clues: 20 to 81.
        seed: the same seed gives the same puzzles.
    Returns:
        (puzzles, solutions), int64 of shape (n, 81) each; blanks are 0.
    Raises:
        ValueError: `clues` outside 20 to 81.
    """
    if not 20 <= clues <= CELLS:
        raise ValueError(f"`clues` must be between 20 and 81, got {clues}.")
    rng = random.Random(f"puzzles-{clues}-{seed}")
    puzzles: list[list[int]] = []
    solutions: list[list[int]] = []
    while len(puzzles) < n:
        solution = _solutions([0] * CELLS, 1, rng)[0]
        puzzle, left = _dig(solution, clues, rng)
        if left == clues:
            puzzles.append(puzzle)
            solutions.append(solution)
    shape = (n, CELLS)
    return np.array(puzzles, dtype=np.int64).reshape(shape), np.array(solutions, dtype=np.int64).reshape(shape)


def parse_puzzle(text: str) -> np.ndarray:
    """A puzzle from 81 characters: digits, and any of `.`, `0` or `_` for a blank; white space is ignored.

    Returns:
        int64 of shape (81,), 0 for a blank.
    Raises:
        ValueError: another length or character, or two clues that contradict each other; one line that says where.
    """
    marks = "".join(text.split())
    for place, mark in enumerate(marks):
        if mark not in "123456789.0_":
            raise ValueError(f"puzzle has {mark!r} at character {place + 1}; use the digits 1-9 and '.' for a blank")
    if len(marks) != CELLS:
        raise ValueError(f"puzzle has {len(marks)} cells; 81 are needed, row by row")
    puzzle = np.array([int(mark) if mark.isdigit() else 0 for mark in marks], dtype=np.int64)
    if clash := conflicts(puzzle):
        i, j = clash[0]
        raise ValueError(
            f"puzzle contradicts itself: two {puzzle[i]}s see each other at row {i // 9 + 1} column {i % 9 + 1} "
            f"and row {j // 9 + 1} column {j % 9 + 1}"
        )
    return puzzle


def format_grid(grid: Iterable[int]) -> str:
    """A grid as 81 characters, `.` for a blank; `parse_puzzle` reads it back."""
    return "".join(str(int(digit)) if digit else "." for digit in grid)


def to_ids(grids: npt.ArrayLike) -> np.ndarray:
    """Token ids of grids, int64 of the same shape: a blank becomes the mask token, a digit its own id."""
    grids = np.asarray(grids, dtype=np.int64)
    return np.where(grids == 0, MASK_ID, grids)


def sudoku_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the Sudoku model: one token a cell, "." is the mask token; "0" and "_" are read as "."."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"[PAD]": PAD_ID, **{str(digit): digit for digit in range(1, 10)}, ".": MASK_ID}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[PAD]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), ""), normalizers.Replace(Regex("[0_]"), ".")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", mask_token=".", model_max_length=CELLS, padding_side="right"
    )
