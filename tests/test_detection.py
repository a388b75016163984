"""Measures of what a score finds on a half-written canvas, against counting by hand."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import tiny_pipeline
from torch.nn.functional import logsigmoid

from benchmarks import detection, head_ablation, judging_text
from benchmarks.detection import RANDOM, canvases, docs_tables, judged_rows, measures
from prism_pipelines import PrismPipeline, QualityHead, bundled
from prism_pipelines.evaluation.detection import (
    JudgedRow,
    best_free,
    detection_measures,
    detection_table,
    overlap,
)
from prism_pipelines.evaluation.statistics import (
    auroc,
    expected_calibration_error,
    rank_correlation,
    reliability,
)
from prism_pipelines.schedulers.context import first_channels, num_features

ROOT = Path(__file__).resolve().parent.parent


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    for right in itertools.product([False, True], repeat=5):
        score = [0.3, 0.1, 0.3, 0.0, 0.9]
        pairs = [
            (a, b) for a, x in zip(score, right, strict=True) if x for b, y in zip(score, right, strict=True) if not y
        ]
        found = auroc(score, right)
        if not pairs:
            assert found is None
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
    assert rank_correlation([1, 1], [1, 2]) is None


def test_calibration_error_is_the_gap_between_claim_and_probability_in_each_bin():
    assert expected_calibration_error(reliability([0.2, 0.2], [0.1, 0.3])) == pytest.approx(0)
    assert expected_calibration_error(reliability([0.9, 0.9, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1])) == pytest.approx(0.2)


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


def test_the_tables_of_the_docs_are_those_of_the_committed_figures():
    result = json.loads((ROOT / "docs" / "figures" / "detection.json").read_text())
    page = (ROOT / "docs" / "judging.md").read_text()
    assert docs_tables(result).strip() in page
    assert judging_text.docs_table(json.loads((ROOT / "docs" / "figures" / "judging_text.json").read_text())) in page
    for file, task in (("head_ablation", "text"), ("head_ablation_sudoku", "sudoku")):
        ablation = json.loads((ROOT / "docs" / "figures" / f"{file}.json").read_text())
        assert head_ablation.markdown(ablation["tasks"][task]["table"]) in page


def test_a_state_of_the_benchmark_is_judged_by_every_score():
    """On a tiny model: fills rise, ages fit, labels are the truth, and the free scores are probabilities."""
    pipe = tiny_pipeline()
    (kind, batch), *_ = canvases("sudoku", pipe, 3, 81)
    rows = list(judged_rows(pipe, {"one": pipe.quality_head}, "sudoku", kind, batch, RANDOM, 10))
    assert {row.fill for row in rows} > {1.0} and all(0 < row.fill <= 1 for row in rows)
    for row in rows:
        assert set(row.scores) == {"own", "prompt", "draw", "one"} and row.right.dtype == bool
        assert all(((v >= 0) & (v <= 1)).all() and len(v) == len(row.right) for v in row.scores.values())
        assert row.age.min() >= 1 and row.age.max() <= 10
    assert {"all", "full", "age 1"} <= set(measures(rows))


@pytest.mark.parametrize("name", ["sudoku", "text"])
def test_the_shipped_heads_that_know_the_run_are_calibrated_and_named_by_their_weights(name):
    pipe = PrismPipeline.from_pretrained(bundled(name), quality_head=bundled(f"{name}-head"))
    config = pipe.quality_head.config
    assert config.base_model is None and config.base_fingerprint and 0.3 < config.temperature < 3
    assert "given" in pipe.quality_head.reads_context
    with pytest.raises(ValueError):
        PrismPipeline.from_pretrained(
            bundled("text" if name == "sudoku" else "sudoku"), quality_head=bundled(f"{name}-head")
        )


def test_a_head_does_not_take_the_name_of_another_score():
    pipe = PrismPipeline.from_pretrained(bundled("text"))
    for words in ("own=x", f"{detection.ONE_STEP}=x"):
        with pytest.raises(SystemExit, match="is another score"):
            detection.heads_of(pipe, bundled("text"), [words])


def test_the_variants_of_a_head_differ_from_the_bundled_one_in_what_their_name_says():
    for task in ("sudoku", "text"):
        full, *others = head_ablation.variants(task).items()
        bundled_head = QualityHead.load_config(Path(bundled(task)).parent / f"{task}-head" / "quality_head")
        assert (list(full[1].context), full[1].architecture) == (bundled_head["context"], bundled_head["architecture"])
        for name, other in others:
            changed = {field for field, value in vars(other).items() if value != vars(full[1])[field]}
            assert len(changed) == 1 + ("no context (PRISM)" in name), name


def test_a_fit_on_labelled_states_learns_what_its_inputs_tell():
    torch.manual_seed(0)
    channels, shape = num_features(head_ablation.ALL), (64, 24)
    features = torch.zeros(*shape, channels)
    place = first_channels(head_ablation.ALL)["draw"]
    label = -4 * torch.rand(shape)
    features[..., place], features[..., place + 1] = 1.0, label / 10
    states = head_ablation.States(*[torch.zeros(*shape, 8)] * 3, features, label.exp().round(), label)
    found = {}
    for context in ((), ("draw",)):
        variant = head_ablation.Variant(context, "posterior", architecture="linear")
        head = head_ablation.fit(states, variant, "text", seed=0, steps=200)
        draw = features[..., place : place + 2] if context else None
        with torch.no_grad():
            found[context] = float((logsigmoid(head(states.hidden, None, draw)) - label).square().mean())
    assert found["draw",] < 0.2 * found[()]


def test_seeds_of_one_head_become_one_line():
    columns = {"a #0": {"fill 1": 3.0}, "a #1": {"fill 1": 5.0}, "own": {"fill 1": 2.0}}
    table = head_ablation.over_seeds(columns)
    assert table == {"a": {"fill 1": [3.0, 5.0]}, "own": {"fill 1": [2.0]}}
    assert "| a | 4.0 (3.0-5.0) |" in head_ablation.markdown(table) and "now (free) | 2.0 |" in head_ablation.markdown(
        table
    )
