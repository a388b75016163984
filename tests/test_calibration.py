"""Calibration with planted errors, against a world small enough to enumerate."""

import itertools
import json
import types

import numpy as np
import pytest
import torch

from prism_pipelines.evaluation import calibration_measures, evaluate_calibration, fit_temperature, risk_coverage

# A skewed distribution over three bits; id 2 is the mask.
COUNTS = dict(zip(itertools.product([0, 1], repeat=3), [5, 1, 1, 2, 1, 3, 2, 1], strict=True))
WORLD = {x: count / 16 for x, count in COUNTS.items()}
MASK = 2


def probability(state):
    return sum(p for x, p in WORLD.items() if all(s in (MASK, v) for s, v in zip(state, x, strict=True)))


def posterior(state, i, value):
    """p(x_i = value | the visible tokens of `state` other than i)."""
    hidden = (*state[:i], MASK, *state[i + 1 :])
    return probability((*state[:i], value, *state[i + 1 :])) / probability(hidden)


class ExactDenoiser:
    """The ideal model: hidden states are the ids, logits the logarithms of the posterior."""

    def __init__(self):
        self.forwards = 0

    def hidden(self, ids, attention_mask=None):
        self.forwards += 1
        return ids

    def logits(self, hidden, positions):
        rows = [
            [posterior(tuple(hidden[b].tolist()), i, v) for v in (0, 1)] + [0.0]
            for b, i in positions.nonzero().tolist()
        ]
        return torch.tensor(rows, dtype=torch.float64).log()


def exact_head(hidden, attention_mask=None):
    """Logits of g*(y)_i; 0 at masks."""
    table = [[0.5 if v == MASK else posterior(tuple(row), i, v) for i, v in enumerate(row)] for row in hidden.tolist()]
    return torch.tensor(table, dtype=torch.float64).logit()


def exact(ids, revealed):
    return torch.tensor([posterior(tuple(ids[b].tolist()), i, int(ids[b, i])) for b, i in revealed.nonzero().tolist()])


def pipeline(head=exact_head):
    return types.SimpleNamespace(denoiser=ExactDenoiser(), quality_head=head, mask_token_id=MASK)


def draws_of_the_world(n, seed=0):
    outcomes, weights = list(WORLD), torch.tensor(list(WORLD.values()))
    picks = torch.multinomial(weights, n, replacement=True, generator=torch.Generator().manual_seed(seed))
    return torch.tensor([outcomes[i] for i in picks.tolist()])


def enumerated(ratio):
    """(E[Brier], AUROC) of g* with k = 1: every clean x, mask pattern, revealed position and drawn token."""
    cases, brier, mass = [], 0.0, 0.0
    for x, p in WORLD.items():
        for pattern in itertools.product([False, True], repeat=3):
            masked = [i for i in range(3) if pattern[i]]
            weight = p * ratio ** len(masked) * (1 - ratio) ** (3 - len(masked))
            z = tuple(MASK if pattern[i] else x[i] for i in range(3))
            for i in masked:
                for value in (0, 1):
                    g = posterior(z, i, value)
                    chance = weight / len(masked) * g
                    cases.append((chance, g, value == x[i]))
                    brier, mass = brier + chance * (g - (value == x[i])) ** 2, mass + chance
    right = [(c, g) for c, g, ok in cases if ok]
    wrong = [(c, g) for c, g, ok in cases if not ok]
    ordered = sum(c * d * ((g < h) + (abs(g - h) < 1e-9) / 2) for c, g in wrong for d, h in right)
    return brier / mass, ordered / (sum(c for c, _ in wrong) * sum(d for d, _ in right))


def test_the_exact_head_on_an_enumerable_world_scores_as_enumeration_says():
    found = evaluate_calibration(
        pipeline(), draws_of_the_world(2500), mask_ratios=(0.3, 0.8), exact=exact, resamples=0, batch_size=500
    )
    for entry in found["by_ratio"]:
        brier, auroc = enumerated(entry["mask_ratio"])
        # About 1,600 and 2,500 tokens: one sigma is below 0.006 for Brier and 0.012 for AUROC.
        assert entry["head"]["brier"] == pytest.approx(brier, abs=0.02)
        assert entry["head"]["auroc"] == pytest.approx(auroc, abs=0.04)
        assert entry["head"]["ece"] < 0.05 and entry["head"]["gap"] < 1e-6
        # With k = 1 the probability at drawing is g* itself, and this ideal model does not look at the token.
        assert entry["drawn"]["gap"] < 1e-6 and entry["visible"]["gap"] < 1e-6
    assert found["pooled"]["head"]["n"] == sum(entry["head"]["n"] for entry in found["by_ratio"])


def test_a_head_that_knows_nothing_is_found_out():
    found = evaluate_calibration(
        pipeline(lambda hidden, mask=None: torch.full(hidden.shape, 2.0)), draws_of_the_world(800), exact=exact
    )
    head, drawn = found["pooled"]["head"], found["pooled"]["drawn"]
    assert head["auroc"] == 0.5 and head["auroc_interval"] == [0.5, 0.5]
    assert head["ece"] == pytest.approx(abs(torch.sigmoid(torch.tensor(2.0)).item() - (1 - head["wrong"])), abs=1e-6)
    assert head["ece"] > drawn["ece"] and head["brier"] > drawn["brier"]
    low, high = drawn["auroc_interval"]
    assert 0.5 < low < drawn["auroc"] < high


class Recorder:
    """Predicts token 1 everywhere, and keeps the ids it saw."""

    def __init__(self):
        self.seen = []

    def hidden(self, ids, attention_mask=None):
        self.seen.append(ids.clone())
        return ids

    def logits(self, hidden, positions):
        return torch.tensor([[0.0, 50.0, -torch.inf]]).expand(int(positions.sum()), 3)


def test_errors_are_planted_at_masks_only_and_k_a_row():
    clean = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]] * 6)
    trainable, attention = torch.ones_like(clean), torch.ones_like(clean)
    trainable[:, 0], attention[:, -1] = 0, 0
    denoiser = Recorder()
    pipe = types.SimpleNamespace(denoiser=denoiser, quality_head=None, mask_token_id=MASK)
    found = evaluate_calibration(
        pipe, clean, mask_ratios=(1.0,), num_revealed=3, trainable_mask=trainable, attention_mask=attention
    )
    z, y = denoiser.seen
    assert (z == MASK).sum(-1).tolist() == [8] * 6 and (z[:, 0] == 0).all() and (z[:, -1] == 1).all()
    assert (z != y).sum(-1).tolist() == [3] * 6 and (y[z != y] == 1).all() and (z[z != y] == MASK).all()
    assert len({tuple(row) for row in (z != y).tolist()}) > 1  # positions are drawn for each row
    wrong = (clean[z != y] == 0).float().mean().item()
    assert found["pooled"]["drawn"]["n"] == 18 and found["pooled"]["drawn"]["wrong"] == pytest.approx(wrong)
    assert "head" not in found["pooled"] and found["pooled"]["drawn"]["ece"] == pytest.approx(wrong, abs=1e-6)


def test_one_seed_gives_one_result_and_two_forwards_a_batch():
    pipe, reports = pipeline(), []
    run = {"mask_ratios": (0.5, 1.0), "batch_size": 20, "draws": 2, "resamples": 5}
    first = evaluate_calibration(pipe, draws_of_the_world(50), on_batch=lambda *r: reports.append(r), **run)
    assert reports == [(i, 12) for i in range(1, 13)]
    assert first == evaluate_calibration(pipe, draws_of_the_world(50), **run)
    assert first != evaluate_calibration(pipe, draws_of_the_world(50), seed=1, **run)


def test_results_are_written_as_table_figure_and_json(tmp_path):
    pytest.importorskip("matplotlib")
    found = evaluate_calibration(pipeline(), draws_of_the_world(60), out_dir=tmp_path, resamples=5)
    read = json.loads((tmp_path / "calibration.json").read_text())
    assert read["pooled"]["head"]["auroc"] == found["pooled"]["head"]["auroc"]
    table = (tmp_path / "calibration.md").read_text()
    assert f"{found['pooled']['head']['brier']:.4f}" in table and table.count("quality head") == 6
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert {path.suffix for path in tmp_path.glob("calibration.*")} == {".json", ".md", ".png", ".svg"}


@pytest.mark.parametrize(
    ("sequences", "settings", "names"),
    [
        (torch.zeros(0, 3), {}, r"`sequences`.*\(0, 3\)"),
        (torch.tensor([[0, MASK, 1]]), {}, "mask token"),
        (torch.zeros(2, 3), {"mask_ratios": (0.5, 1.5)}, "mask_ratios.*1.5"),
        (torch.zeros(2, 3), {"num_revealed": 0}, "num_revealed.*0"),
        (torch.zeros(2, 3), {"trainable_mask": torch.ones(2, 2)}, r"trainable_mask.*\(2, 2\)"),
        (torch.zeros(2, 3), {"trainable_mask": torch.zeros(2, 3)}, "No token was masked"),
        (torch.zeros(2, 3), {"temperature": -1.0}, "temperature"),
    ],
)
def test_wrong_input_is_named(sequences, settings, names):
    with pytest.raises(ValueError, match=names):
        evaluate_calibration(pipeline(), sequences, **settings)


def test_the_name_calibration_stays_the_function():
    assert calibration_measures([0.9, 0.1], [True, False])["auroc"] == 1.0


@pytest.mark.parametrize("true", [0.3, 1.0, 4.0])
def test_the_fitted_temperature_is_the_one_that_the_answers_were_drawn_at(true):
    rng = np.random.default_rng(0)
    logits = rng.normal(1, 3, 40_000)
    right = rng.random(40_000) < 1 / (1 + np.exp(-logits / true))
    quality = 1 / (1 + np.exp(-logits))
    found = fit_temperature(quality, right)
    assert abs(np.log(found / true)) < 0.06

    def loss(t):
        p = 1 / (1 + np.exp(-np.log(quality / (1 - quality)) / t))
        return -np.where(right, np.log(p), np.log1p(-p)).mean()

    assert loss(found) <= min(loss(found * 1.02), loss(found / 1.02))


@pytest.mark.parametrize(
    "quality,right,message",
    [
        ([0.5, 0.6], [True], "one shape"),
        ([0.5, 1.6], [True, False], r"in \[0, 1\]"),
        ([0.5, 0.6], [True, True], "right and wrong tokens, got 2 right of 2"),
    ],
)
def test_a_temperature_that_cannot_be_fitted_is_refused_by_name(quality, right, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(quality, right)


def test_risk_and_coverage_by_hand():
    found = risk_coverage([0.9, 0.2, 0.8, 0.5], [True, False, False, True])
    assert found["coverage"] == [0.25, 0.5, 0.75, 1.0]
    assert found["risk"] == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4]) and found["area"] == pytest.approx(4 / 12)
    with pytest.raises(ValueError, match="one shape"):
        risk_coverage([], [])
