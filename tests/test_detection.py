"""Measures of what a score finds on a half-written canvas, against counting by hand."""

import itertools

import numpy as np
import pytest

from prism_pipelines.evaluation.detection import (
    JudgedRow,
    auroc,
    best_free,
    detection_measures,
    detection_table,
    overlap,
    rank_correlation,
    soft_ece,
)


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    for right in itertools.product([False, True], repeat=5):
        score = [0.3, 0.1, 0.3, 0.0, 0.9]
        pairs = [
            (a, b) for a, x in zip(score, right, strict=True) if x for b, y in zip(score, right, strict=True) if not y
        ]
        found = auroc(score, right)
        if not pairs:
            assert np.isnan(found)
        else:
            assert found == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))


def test_overlap_counts_the_least_likely_tokens_among_the_lowest():
    truth = np.arange(10) / 10
    assert overlap(truth, truth, 3) == 3
    assert overlap(-truth, truth, 3) == 0
    assert overlap([0, 9, 8, 1, 2, 7, 7, 7, 7, 7], truth, 3) == 1  # 0, 3 and 4 against 0, 1 and 2


def test_rank_correlation_is_that_of_ranks_with_ties_shared():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2], [5, 7, 9]) == pytest.approx(np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1])
    assert np.isnan(rank_correlation([1, 1], [1, 2]))


def test_soft_ece_is_the_gap_between_claim_and_probability_in_each_bin():
    assert soft_ece(np.array([0.2, 0.2]), np.array([0.1, 0.3])) == pytest.approx(0)
    assert soft_ece(np.array([0.9, 0.9, 0.1, 0.1]), np.array([0.5, 0.5, 0.1, 0.1])) == pytest.approx(0.2)


def row(head, prompt, right, fill=1.0):
    scores = {"head": np.array(head), "prompt": np.array(prompt)}
    return JudgedRow(scores, np.array(right), fill, np.ones(len(right), dtype=int))


def test_a_score_that_tells_hard_rows_from_easy_ones_finds_nothing_within_a_row():
    rows = [row([0.1, 0.1], [0.2, 0.3], [False, True]), row([0.9, 0.9], [0.5, 0.6], [True, True])]
    found = detection_measures(rows)
    assert found["head"]["within"] == 0.5 and found["head"]["pooled"] > 0.5 and found["head"]["row"] == 1.0
    assert found["prompt"]["within"] == 1.0
    assert best_free(found, "within") == "prompt"
    assert found["head"]["ece"] == pytest.approx((2 * 0.4 + 2 * 0.1) / 4)
    assert "| 0.500 |" in detection_table(found)


def test_labels_that_are_probabilities_are_measured_by_the_lowest_tokens():
    truth = np.linspace(0.05, 0.95, 16)
    found = detection_measures([row(truth, truth[::-1], truth)])
    assert found["head"] == {"overlap": 8.0, "rank": pytest.approx(1), "ece": pytest.approx(0)}
    assert found["prompt"]["overlap"] == 0.0 and found["prompt"]["rank"] == pytest.approx(-1)
    assert detection_measures([row([0.1], [0.1], [0.5])])["head"]["overlap"] is None  # too few tokens for a lowest 8


def test_without_rows_nothing_is_found():
    assert detection_measures([]) == {}
