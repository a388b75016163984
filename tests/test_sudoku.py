"""Generator, solver, checker, symmetries, parser and tokenizer of Sudoku, against slow and obvious references."""

import itertools

import numpy as np
import pytest

from prism_pipelines import sudoku

# Three published puzzles with their published solutions.
KNOWN = {
    "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79": (
        "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
    ),
    "..3.2.6..9..3.5..1..18.64....81.29..7.......8..67.82....26.95..8..2.3..9..5.1.3..": (
        "483921657967345821251876493548132976729564138136798245372689514814253769695417382"
    ),
    sudoku.HARD_PUZZLE: "812753649943682175675491283154237896369845721287169534521974368438526917796318452",
}


def digits(text):
    return [0 if mark == "." else int(mark) for mark in text]


def peers(i):
    """The 20 cells that share a row, a column or a box with cell i, from the rules and nothing else."""
    row, column = divmod(i, 9)
    return {
        j
        for j in range(81)
        if j != i and (j // 9 == row or j % 9 == column or (j // 27, j % 9 // 3) == (row // 3, column // 3))
    }


PEERS = [peers(i) for i in range(81)]


def brute_force(cells):
    """All solutions by trying every digit at the first blank cell: no candidate sets, no clever order."""
    if 0 not in cells:
        return [cells]
    i = cells.index(0)
    seen = {cells[j] for j in PEERS[i]}
    tries = ([*cells[:i], digit, *cells[i + 1 :]] for digit in range(1, 10) if digit not in seen)
    return [solution for grid in tries for solution in brute_force(grid)]


def obeys_rules(cells):
    return all(cells[i] in range(1, 10) and all(cells[i] != cells[j] for j in PEERS[i]) for i in range(81))


@pytest.fixture(scope="module")
def puzzles_30():
    return sudoku.make_puzzles(12, clues=30, seed=7)


@pytest.mark.parametrize("puzzle", KNOWN)
def test_solver_finds_the_published_solution(puzzle):
    assert sudoku.format_grid(sudoku.solve(sudoku.parse_puzzle(puzzle))) == KNOWN[puzzle]
    assert sudoku.count_solutions(sudoku.parse_puzzle(puzzle)) == 1


@pytest.mark.parametrize("seed", range(20))
def test_solver_counts_as_brute_force_does(seed):
    """Blanking cells of a grid without asking for uniqueness gives puzzles with one, a few and many solutions."""
    rng = np.random.default_rng(seed)
    grid = sudoku.complete_grids(1, seed)[0].astype(np.int64)
    grid[rng.permutation(81)[: int(rng.integers(30, 49))]] = 0
    solutions = brute_force(grid.tolist())
    assert sudoku.count_solutions(grid, limit=10_000) == len(solutions)
    assert sudoku.count_solutions(grid, limit=2) == min(2, len(solutions))
    assert sudoku.solve(grid).tolist() in solutions


@pytest.mark.parametrize("seed", range(5))
def test_a_wrong_but_consistent_clue_leaves_what_brute_force_finds(seed):
    """Changing one clue to another digit that clashes with nothing often leaves no solution: the count must say so."""
    rng = np.random.default_rng(seed)
    puzzles, _ = sudoku.make_puzzles(1, clues=36, seed=seed)
    counts = []
    for i in rng.permutation(np.flatnonzero(puzzles[0]))[:8]:
        for digit in set(range(1, 10)) - {int(puzzles[0][j]) for j in PEERS[i]} - {int(puzzles[0][i])}:
            changed = puzzles[0].tolist()
            changed[i] = digit
            expected = len(brute_force(changed))
            counts.append(expected)
            assert sudoku.count_solutions(changed, limit=10_000) == expected
            assert (sudoku.solve(changed) is None) == (expected == 0)
    assert 0 in counts


def test_contradicting_clues_have_no_solution_and_are_all_listed():
    cells = [0] * 81
    cells[0] = cells[8] = cells[72] = 5  # a row pair and a column pair
    assert sudoku.conflicts(cells) == [(0, 8), (0, 72)]
    assert sudoku.count_solutions(cells) == 0 and sudoku.solve(cells) is None
    cells[10] = 5  # the box of cell 0, and nothing else
    assert sudoku.conflicts(cells) == [(0, 8), (0, 10), (0, 72)]


def test_generated_grids_obey_the_rules_and_repeat_with_their_seed():
    grids = sudoku.complete_grids(30, seed=3)
    assert grids.shape == (30, 81)
    assert all(obeys_rules(grid) for grid in grids.tolist())
    assert len({tuple(grid) for grid in grids.tolist()}) == 30
    assert np.array_equal(grids[:10], sudoku.complete_grids(10, seed=3))  # a longer run begins like a shorter one
    assert not np.array_equal(grids, sudoku.complete_grids(30, seed=4))


def test_puzzles_have_exactly_their_clues_and_only_their_solution(puzzles_30):
    puzzles, solutions = puzzles_30
    assert ((puzzles > 0).sum(axis=1) == 30).all()
    assert ((puzzles == 0) | (puzzles == solutions)).all()
    for puzzle, solution in zip(puzzles[:4].tolist(), solutions[:4].tolist(), strict=True):
        assert brute_force(puzzle) == [solution]
    again, _ = sudoku.make_puzzles(5, clues=30, seed=7)
    assert np.array_equal(again, puzzles[:5])  # a quick run uses the first puzzles of a long one
    assert not np.array_equal(again, sudoku.make_puzzles(5, clues=30, seed=8)[0])


def test_few_clues_can_be_asked_for():
    puzzles, solutions = sudoku.make_puzzles(3, clues=24, seed=0)
    assert ((puzzles > 0).sum(axis=1) == 24).all()
    assert [sudoku.count_solutions(puzzle) for puzzle in puzzles] == [1, 1, 1]
    assert sudoku.is_solved(solutions, puzzles).all()


@pytest.mark.parametrize("clues", [19, 82, -1])
def test_impossible_numbers_of_clues_are_refused(clues):
    with pytest.raises(ValueError, match=f"clues.*{clues}"):
        sudoku.make_puzzles(1, clues=clues, seed=0)


def test_checker_agrees_with_the_rules_cell_by_cell():
    """Every single-cell change of a valid grid breaks it, and the checker must see each of the 81 x 9 changes."""
    grid = sudoku.complete_grids(1, seed=0)[0].astype(np.int64)
    changed = np.tile(grid, (81 * 10, 1))
    for n, (i, digit) in enumerate(itertools.product(range(81), range(10))):
        changed[n, i] = digit
    assert sudoku.is_valid_grid(changed).tolist() == [obeys_rules(cells) for cells in changed.tolist()]
    assert sudoku.is_valid_grid(changed).sum() == 81  # only where the digit was already there
    assert bool(sudoku.is_valid_grid(grid)) is True


def test_columns_and_boxes_are_checked_too():
    shifted = np.array([(row + column) % 9 + 1 for row in range(9) for column in range(9)])  # Latin square, bad boxes
    assert not sudoku.is_valid_grid(shifted)
    same_rows = np.array([column + 1 for row in range(9) for column in range(9)])
    assert not sudoku.is_valid_grid(same_rows)


def test_solved_means_valid_and_clues_kept(puzzles_30):
    puzzles, solutions = puzzles_30
    assert sudoku.is_solved(solutions, puzzles).all()
    assert not sudoku.is_solved(puzzles, puzzles).any()
    # A perfect grid of another puzzle is valid, yet it altered the clues.
    other = np.roll(solutions, 1, axis=0)
    assert sudoku.is_valid_grid(other).all() and not sudoku.is_solved(other, puzzles).any()


def test_symmetries_keep_validity_clue_counts_and_uniqueness(puzzles_30):
    puzzles, solutions = puzzles_30
    rng = np.random.default_rng(0)
    images = sudoku.shuffle_symmetries(solutions, rng)
    assert images.shape == solutions.shape and images.dtype == solutions.dtype
    assert all(obeys_rules(grid) for grid in images.tolist())
    shuffled = sudoku.shuffle_symmetries(puzzles, np.random.default_rng(1))
    assert ((shuffled > 0).sum(axis=1) == 30).all()
    assert [sudoku.count_solutions(puzzle) for puzzle in shuffled] == [1] * len(puzzles)


def test_symmetries_differ_between_rows_and_reach_every_cell_and_digit():
    grid = np.zeros((2000, 81), dtype=np.int64)
    grid[:, 0] = 1
    images = sudoku.shuffle_symmetries(grid, np.random.default_rng(0))
    where, what = images.argmax(axis=1), images.max(axis=1)
    # 2000 draws over 81 cells and 9 digits: expected 24.7 and 222; these bounds are more than five sigma wide.
    assert np.bincount(where, minlength=81).min() > 3 and np.bincount(where, minlength=81).max() < 55
    assert np.bincount(what, minlength=10)[1:].min() > 145 and np.bincount(what, minlength=10)[1:].max() < 300


def test_uniform_numbers_are_those_of_splitmix64_at_any_place():
    # The first outputs for the seed 1234567, as in the authors' own test vectors (rosettacode.org, "Splitmix64").
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert (sudoku.uniform_of(1234567, [0], 5)[0] * 2**53).astype(int).tolist() == [x >> 11 for x in outputs]
    rows = (sudoku.uniform_of(1234567, [2, 0], 2) * 2**53).astype(int).tolist()
    assert rows[0][0] == outputs[4] >> 11 and rows[1] == [x >> 11 for x in outputs[:2]]


def test_parser_reads_every_blank_sign_and_ignores_white_space():
    text = next(iter(KNOWN))
    expected = digits(text)
    lines = "\n".join(text[i : i + 9] for i in range(0, 81, 9)) + "\n"
    for form in (text, text.replace(".", "0"), text.replace(".", "_"), lines, f"  {text}\t"):
        assert sudoku.parse_puzzle(form).tolist() == expected
    assert sudoku.format_grid(sudoku.parse_puzzle(text)) == text
    assert sudoku.parse_puzzle("." * 81).dtype == np.int64


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("." * 80, "80 cells"),
        ("." * 82, "82 cells"),
        ("", "0 cells"),
        ("." * 40 + "a" + "." * 40, "'a' at character 41"),
        ("." * 80 + "²", "'²' at character 81"),  # isdigit(), but no digit of ours
        ("." * 80 + "٣", "character 81"),
        ("5" + "." * 7 + "5" + "." * 72, "two 5s.*row 1 column 1.*row 1 column 9"),
        ("5" + "." * 71 + "5" + "." * 8, "two 5s.*row 1 column 1.*row 9 column 1"),
        ("5" + "." * 9 + "5" + "." * 70, "two 5s.*row 1 column 1.*row 2 column 2"),
    ],
)
def test_a_bad_puzzle_is_told_in_one_line(text, names):
    with pytest.raises(ValueError, match=names) as error:
        sudoku.parse_puzzle(text)
    assert "\n" not in str(error.value)


def test_tokenizer_and_bulk_ids_say_the_same(tmp_path, puzzles_30):
    tokenizer = sudoku.sudoku_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id, len(tokenizer)) == (
        sudoku.MASK_ID,
        sudoku.PAD_ID,
        sudoku.VOCAB_SIZE,
    )
    for puzzle, ids in zip(puzzles_30[0], sudoku.to_ids(puzzles_30[0]).tolist(), strict=True):
        text = sudoku.format_grid(puzzle)
        for form in (text, text.replace(".", "0"), text.replace(".", "_"), text[:40] + "\n " + text[40:]):
            assert tokenizer(form)["input_ids"] == loaded(form)["input_ids"] == ids
        assert tokenizer.decode(ids) == loaded.decode(ids) == text
