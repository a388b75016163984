"""Success rates, intervals, paired ratios and calibration against enumeration and counting pairs."""

import itertools
import json
import math
import types

import numpy as np
import pytest
import torch

from benchmarks import sudoku as benchmark
from prism_pipelines import PrismScheduler, bundled, sudoku
from prism_pipelines.evaluation import (
    calibration_measures,
    evaluate_sudoku,
    head_calibration,
    paired_failure_ratio,
    pipeline_solver,
    wilson_interval,
)


@pytest.fixture(scope="module")
def puzzles():
    return sudoku.make_puzzles(10, clues=36, seed=5)


def exact(puzzles):
    return np.stack([sudoku.solve(puzzle) for puzzle in puzzles])


class OraclePipeline:
    """Stands in for a pipeline: fills blanks in order with the solution, wrongly at `wrong_cells`.

    Its quality is 0.9 for right cells and 0.2 for wrong ones, so calibration must come out as computed by hand.
    """

    def __init__(self, wrong_cells=()):
        self.wrong_cells, self.runs = set(wrong_cells), []

    def answer(self, puzzles):
        grids = exact(puzzles)
        for cell in self.wrong_cells:
            grids[:, cell] = np.where(puzzles[:, cell] == 0, grids[:, cell] % 9 + 1, grids[:, cell])
        return grids

    def __call__(
        self, *, infill, num_inference_steps, generator, output_type, callback_on_step_end=None, return_quality=False
    ):
        assert output_type == "seq"
        puzzles = np.where(infill.numpy() == sudoku.MASK_ID, 0, infill.numpy())
        self.runs.append([torch.rand(1, generator=one).item() for one in generator])
        self.truth, full = exact(puzzles), torch.from_numpy(self.answer(puzzles))
        sample = infill.clone()
        for i in range(num_inference_steps):
            order = (infill == sudoku.MASK_ID).cumsum(-1)
            shown = (order.amax(-1) * (i + 1)).float().div(num_inference_steps).ceil()
            sample = torch.where((infill == sudoku.MASK_ID) & (order > shown[:, None]), infill, full)
            if callback_on_step_end:
                callback_on_step_end(self, i, i, {"sample": sample, "quality": None, "remasked": None})
        return types.SimpleNamespace(sequences=sample)

    def score(self, *, input_ids):
        right = input_ids == torch.from_numpy(self.truth)
        return torch.where(right, 0.9, 0.2), input_ids, None


def test_a_perfect_solver_scores_one_and_a_blank_one_zero(puzzles):
    given, solutions = puzzles
    score = evaluate_sudoku(exact, given, batch_size=4)
    assert score.success == 1.0 and score.solved.all() and np.array_equal(score.grids, solutions)
    assert score.interval == wilson_interval(10, 10)
    assert evaluate_sudoku(lambda batch: batch, given).success == 0.0


def test_a_solver_that_alters_clues_has_solved_nothing(puzzles):
    given, solutions = puzzles
    other = np.roll(solutions, 1, axis=0)  # ten perfect grids, none of them an answer
    score = evaluate_sudoku(lambda batch: other, given)
    assert not score.solved.any() and score.altered.all()


def test_batches_cover_every_puzzle_once_and_in_order(puzzles):
    seen, reports = [], []

    def solve(batch):
        seen.extend(map(sudoku.format_grid, batch))
        return batch

    evaluate_sudoku(solve, puzzles[0], batch_size=3, on_batch=lambda *report: reports.append(report))
    assert seen == [sudoku.format_grid(puzzle) for puzzle in puzzles[0]]
    assert reports == [(3, 10), (6, 10), (9, 10), (10, 10)]


@pytest.mark.parametrize(
    ("solve", "given", "batch_size", "names"),
    [
        (exact, np.zeros((0, 81)), 4, r"\(0, 81\)"),
        (exact, np.zeros((2, 80)), 4, r"\(2, 80\)"),
        (exact, np.zeros((2, 81)), 0, "batch_size.*0"),
        (lambda batch: batch[:, :9], np.zeros((2, 81)), 4, r"solve.*\(2, 81\).*\(2, 9\)"),
    ],
)
def test_wrong_input_to_the_evaluation_is_named(solve, given, batch_size, names):
    with pytest.raises(ValueError, match=names):
        evaluate_sudoku(solve, given, batch_size=batch_size)


def test_a_pipeline_becomes_a_solver_whose_seeds_depend_on_puzzle_and_seed_alone(puzzles):
    pipe = OraclePipeline()
    assert evaluate_sudoku(pipeline_solver(pipe, 5, seed=1), puzzles[0]).success == 1.0
    whole = pipe.runs.pop()
    assert len(set(whole)) == 10
    pipeline_solver(pipe, 5, seed=1)(puzzles[0][6:8])
    assert pipe.runs.pop() == whole[6:8]
    pipeline_solver(pipe, 5, seed=2)(puzzles[0])
    assert not set(pipe.runs.pop()) & set(whole)


@pytest.mark.parametrize("n", [1, 2, 7, 40, 1000])
def test_wilson_bounds_are_the_shares_that_the_score_test_just_keeps(n):
    """The interval holds exactly the p0 with |p - p0| <= z sqrt(p0 (1 - p0) / n); at its ends equality holds."""
    z = 1.959964
    for successes in sorted({0, 1, n // 3, n - 1, n}):
        p = successes / n
        low, high = wilson_interval(successes, n)
        assert 0 <= low <= p <= high <= 1 and high - low > 0
        for bound in (low, high):
            if 0 < bound < 1:
                assert abs(p - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


def test_paired_ratio_agrees_with_enumerating_every_resample():
    """With N = 5 puzzles all 5^5 resamples can be listed; the percentile interval must be theirs."""
    ours, theirs = np.array([3, 0, 2, 1, 1]), np.array([5, 2, 1, 4, 2])  # failures of each puzzle in five seeds
    failed, other = (np.arange(5)[:, None] < counts for counts in (ours, theirs))
    draws = itertools.product(range(5), repeat=5)
    ratios = sorted(ours[list(draw)].sum() / theirs[list(draw)].sum() for draw in draws)
    found = paired_failure_ratio(failed, other, resamples=40_000)
    assert (found["failures"], found["failures_other"], found["ratio"]) == (7, 14, 0.5)
    # 40,000 draws place a 2.5 % quantile to +-0.0008 (one sigma); +-0.004 is allowed.
    for bound, share in ((found["low"], 0.025), (found["high"], 0.975)):
        assert ratios[int((share - 0.004) * len(ratios))] <= bound <= ratios[int((share + 0.004) * len(ratios))]
    assert 0 < found["low"] < 0.5 < found["high"]


def test_pairing_narrows_the_interval_and_equal_methods_give_exactly_one():
    failed = np.random.default_rng(0).random((2, 300)) < 0.3
    same = paired_failure_ratio(failed, failed)
    assert (same["ratio"], same["low"], same["high"]) == (1.0, 1.0, 1.0)
    shuffled = paired_failure_ratio(failed, failed[:, ::-1])
    assert shuffled["high"] - shuffled["low"] > 0.2


def test_ratio_without_failures_is_not_given_a_false_certainty():
    none, some = np.zeros((1, 50), dtype=bool), np.arange(50)[None] < 12
    assert paired_failure_ratio(none, some) == {
        "failures": 0,
        "failures_other": 12,
        "ratio": 0.0,
        "low": 0.0,
        "high": 0.25,
    }
    assert paired_failure_ratio(some, none)["ratio"] is None
    with pytest.raises(ValueError, match=r"\(1, 50\) and \(1, 49\)"):
        paired_failure_ratio(some, none[:, 1:])


def test_auroc_is_the_share_of_right_wrong_pairs_in_order():
    rng = np.random.default_rng(0)
    quality = rng.integers(0, 8, size=60) / 8  # many ties
    right = rng.random(60) < quality
    pairs = [(a < b) + 0.5 * (a == b) for a in quality[~right] for b in quality[right]]
    assert calibration_measures(quality, right)["auroc"] == pytest.approx(sum(pairs) / len(pairs))
    assert calibration_measures(quality, quality > 0.5)["auroc"] == 1.0
    assert calibration_measures(quality, quality < 0.5)["auroc"] == 0.0
    assert calibration_measures(quality, np.ones(60, dtype=bool))["auroc"] is None


def test_ece_and_brier_by_hand():
    quality = np.array([0.1, 0.1, 0.95, 0.95, 1.0])
    right = np.array([False, True, True, True, False])
    found = calibration_measures(quality, right, bins=10)
    # Bin 1: claimed 0.1, found 0.5. Bin 9 (1.0 belongs to it): claimed 0.9667, found 0.6667.
    assert found["ece"] == pytest.approx(2 / 5 * 0.4 + 3 / 5 * 0.3)
    assert found["brier"] == pytest.approx((0.01 + 0.81 + 0.0025 + 0.0025 + 1) / 5)
    assert found["wrong"] == pytest.approx(0.4)
    expected = [(0.1, 0.5, 2), (2.9 / 3, 2 / 3, 3)]
    assert [pytest.approx(point) for point in expected] == found["reliability"]


def test_probabilities_that_are_right_as_often_as_they_say_have_no_calibration_error():
    quality = np.random.default_rng(1).random(200_000)
    right = np.random.default_rng(2).random(200_000) < quality
    found = calibration_measures(quality, right)
    assert found["ece"] < 0.01  # standard error of a bin of 13,000 is below 0.0044
    assert found["brier"] == pytest.approx(1 / 6, abs=0.003)  # E[q (1 - q)], q uniform


@pytest.mark.parametrize(
    ("quality", "right"), [([1.2], [True]), ([float("nan")], [True]), ([], []), ([0.5], [True, False])]
)
def test_calibration_refuses_what_is_no_probability(quality, right):
    with pytest.raises(ValueError, match=r"quality|shape"):
        calibration_measures(quality, right)


def test_head_calibration_scores_the_cells_the_pipeline_wrote_and_no_clue(puzzles):
    given, solutions = puzzles
    wrong = [int(np.flatnonzero(given[0] == 0)[1])]  # blank in some puzzles, a clue in others
    found = head_calibration(OraclePipeline(wrong), given, solutions, num_revealed=9, batch_size=4)
    # 45 blanks, 9 a forward: 5 forwards, the last of which leaves a complete grid and is not scored.
    assert found["revealed"]["n"] == 10 * 9
    assert found["filled"]["n"] == 10 * (9 + 18 + 27 + 36)
    order = np.cumsum(given == 0, axis=1)[:, wrong[0]]
    hit = [order[i] for i in range(10) if given[i, wrong[0]] == 0]
    expected = sum(place <= shown for place in hit for shown in (9, 18, 27, 36)) / found["filled"]["n"]
    assert found["filled"]["wrong"] == pytest.approx(expected)
    assert found["filled"]["auroc"] == 1.0  # 0.2 for every wrong cell, 0.9 for every right one
    assert found["filled"]["ece"] == pytest.approx(0.2 * expected + 0.1 * (1 - expected))
    assert found["by_clues"] == {36: {name: found[name] for name in ("revealed", "filled")}}


def test_head_calibration_tells_puzzles_of_different_numbers_of_clues_apart(puzzles):
    given, solutions = puzzles
    easier = given.copy()
    easier[:, :9] = solutions[:, :9]
    twice = np.concatenate([given, easier]), np.concatenate([solutions, solutions])
    both = head_calibration(OraclePipeline(), *twice, num_revealed=9)
    alone = head_calibration(OraclePipeline(), given, solutions, num_revealed=9)
    assert both["by_clues"][36] == {name: alone[name] for name in ("revealed", "filled")}
    assert sum(found["filled"]["n"] for found in both["by_clues"].values()) == both["filled"]["n"]


def test_head_calibration_needs_a_partial_grid(puzzles):
    with pytest.raises(ValueError, match="num_revealed"):
        head_calibration(OraclePipeline(), *puzzles, num_revealed=45)


# --- the benchmark's own bookkeeping ----------------------------------------------------------------------------------


def test_the_cells_of_a_comparison_become_marks_by_arm_and_forwards(tmp_path):
    (tmp_path / "cells").mkdir()
    marks = {("PRISM", 0): [1, 1, 0], ("PRISM", 1): [0, 1, 1], ("MDLM", 0): [0, 0, 1], ("MDLM", 1): [1, 0, 0]}
    for n, ((arm, seed), solved) in enumerate(marks.items()):
        cell = {"arm": {"name": arm}, "forwards": 8, "seed": seed, "task": "mark", "metrics": {"solved": solved}}
        (tmp_path / "cells" / f"{n}.json").write_text(json.dumps(cell))
        (tmp_path / "cells" / f"other{n}.json").write_text(json.dumps(cell | {"task": "another model"}))
        old = cell | {"arm": {"name": arm, "num_remask": 4}, "metrics": {"solved": [0, 0, 0]}}
        (tmp_path / "cells" / f"{n}-old.json").write_text(json.dumps(old))
    more = {"arm": {"name": "PRISM"}, "forwards": 16, "seed": 0, "task": "mark", "metrics": {"solved": [1, 1, 1]}}
    (tmp_path / "cells" / "more.json").write_text(json.dumps(more))  # not asked for, and of one seed alone
    (tmp_path / "cells" / "0.json.17.partial").write_text("")  # of a run that was killed as it wrote
    found = benchmark.solved_arrays(tmp_path, "mark", [{"name": "PRISM"}, {"name": "MDLM"}], [8], [1, 0])
    assert {key: value.tolist() for key, value in found.items()} == {
        ("PRISM", 8): [[0, 1, 1], [1, 1, 0]],
        ("MDLM", 8): [[1, 0, 0], [0, 0, 1]],
    }


def test_noise_for_qualities_is_that_of_the_seed(puzzles):
    pipe, noise = benchmark.load(bundled("sudoku"), "cpu", "float32")
    assert noise.model is pipe.model
    task, runs = benchmark.task_of(puzzles[0][:4], 4), []
    noise.scheduler = PrismScheduler(num_remask=8)
    for seed in (3, 3, 4):
        task(noise, 6, seed)
        runs.append(torch.rand(3, generator=noise.quality_head.generator).tolist())  # where the noise has got to
    assert runs[0] == runs[1] != runs[2]


def test_the_table_pairs_every_arm_with_prism_on_the_same_puzzles():
    solved = {
        ("PRISM", 8): np.array([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=bool),
        ("MDLM", 8): np.array([[0, 1, 1, 0], [1, 0, 1, 1]], dtype=bool),
    }
    rows, pairs = benchmark.tabulate(solved, [{"name": "PRISM"}, {"name": "MDLM"}], [8], "30")
    assert [(row["arm"], row["solved"], row["n"], row["clues"]) for row in rows] == [
        ("PRISM", 7, 8, "30"),
        ("MDLM", 5, 8, "30"),
    ]
    assert [(pair["arm"], pair["failures"], pair["failures_other"]) for pair in pairs] == [("MDLM", 1, 3)]


def test_a_quick_run_is_told_where_it_leaves_the_committed_table():
    place = {"clues": "30", "forwards": 8, "arm": "prism"}
    table = [{**place, "low": 0.4, "high": 0.6}]
    assert benchmark.disagreements([{**place, "low": 0.55, "high": 0.9}], table, tuple(place)) == []
    (said,) = benchmark.disagreements([{**place, "low": 0.7, "high": 0.9}], table, tuple(place))
    assert benchmark.disagreements([{**place, "arm": "new", "low": 0.7, "high": 0.9}], table, tuple(place)) == []
    assert said.startswith("30 8 prism: 0.700-0.900 here") and "0.400-0.600 committed" in said


def test_a_small_benchmark_uses_the_first_puzzles_of_a_large_one():
    small, _ = benchmark.puzzles_of((30, 36), 5)
    large, _ = benchmark.puzzles_of((30, 36), 8)
    assert benchmark.spread(1000, 3) == [333, 333, 334] and benchmark.spread(5, 2) == [2, 3]
    assert {sudoku.format_grid(puzzle) for puzzle in small} <= {sudoku.format_grid(puzzle) for puzzle in large}
