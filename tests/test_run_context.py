import math

import pytest
import torch

from prism_pipelines.schedulers.context import (
    INPUTS,
    RunContext,
    context_features,
    forget,
    num_features,
)

MASK = 9
NAN = math.nan
# One row: a given token; one drawn in the last pass; one drawn before, after a remasking; a mask; one of a callback.
SAMPLE = torch.tensor([[4, 5, 6, MASK, 7]])


def context(**changes):
    fields = {
        "generated": torch.tensor([[False, True, True, True, True]]),
        "now": torch.tensor([5]),
        "written_at": torch.tensor([[-1, 4, 1, -1, -1]]),
        "num_remasked": torch.tensor([[0, 0, 2, 1, 0]]),
        "draw_logprob": torch.tensor([[NAN, -0.5, -3.0, NAN, NAN]]),
        "prompt_logprob": torch.tensor([[NAN, -1.0, -50.0, NAN, -2.0]]),
        "first_max": torch.tensor([[NAN, -0.5, -1.0, -0.1, -1.5]]),
        "first_entropy": torch.tensor([[NAN, 1.0, 2.0, 0.5, 3.0]]),
        "first_hidden": torch.ones(1, 5, 2),
        "token_rows": torch.ones(1, 5, 2),
        "own_logprob": torch.tensor([[NAN, -1.0, -2.0, NAN, -3.0]]),
        "own_mean": torch.tensor([[NAN, -1.0, -1.5, NAN, -3.0]]),
        "own_min": torch.tensor([[NAN, -1.0, -4.0, NAN, -3.0]]),
    }
    return RunContext(**{**fields, **changes})


def odds(logprob):
    """A tenth of the log-odds of a probability."""
    p = math.exp(logprob)
    return math.log(p / (1 - p)) / 10


EXPECTED = {
    "given": [[1], [0], [0], [0], [0]],
    "prompt": [
        [0, 0, 0, 0],
        [1, -0.05, -0.1, -0.1],
        [1, -0.1, -0.2, -2.0],
        [1, -0.01, -0.05, 0],
        [1, -0.15, -0.3, -0.2],
    ],
    "first_hidden": [[]] * 5,
    "token": [[]] * 5,
    "draw": [[0, 0], [1, -0.05], [1, -0.3], [0, 0], [0, 0]],
    "age": [[0, 0, 0], [1, 1, math.log(2) / 3], [1, 0, math.log(5) / 3], [0, 0, 0], [0, 0, 0]],
    "remasks": [[0], [0], [math.log(3)], [math.log(2)], [0]],
    "fill": [[0.25]] * 5,
    "own": [[0] * 4, [1, -0.1, -0.1, -0.1], [1, -0.2, -0.15, -0.4], [0] * 4, [1, -0.3, -0.3, -0.3]],
    "prompt_odds": [
        [0, 0, 0],
        [1, odds(-0.5), odds(-1.0)],
        [1, odds(-1.0), -2.0],
        [1, odds(-0.1), 0],
        [1, odds(-1.5), odds(-2.0)],
    ],
    "draw_odds": [[0, 0], [1, odds(-0.5)], [1, odds(-3.0)], [0, 0], [0, 0]],
    "own_odds": [[0, 0], [1, odds(-1.0)], [1, odds(-2.0)], [0, 0], [1, odds(-3.0)]],
}


@pytest.mark.parametrize("name", INPUTS)
def test_each_input_gives_its_channels(name):
    found = context_features(context(), SAMPLE, MASK, (name,))
    assert found.shape == (1, 5, num_features((name,))) and found.dtype == torch.float32
    torch.testing.assert_close(found[0], torch.tensor(EXPECTED[name], dtype=torch.float32))


def test_channels_stand_in_the_order_of_the_names():
    names = ("own", "given", "age", "prompt")
    apart = [context_features(context(), SAMPLE, MASK, (name,)) for name in names]
    torch.testing.assert_close(context_features(context(), SAMPLE, MASK, names), torch.cat(apart, -1))


def test_features_are_finite_whatever_is_unknown():
    nothing = {name: torch.full((1, 5), NAN) for name in ("draw_logprob", "prompt_logprob", "first_max")}
    bare = context(**nothing, own_logprob=None, own_mean=None, own_min=None, first_hidden=None)
    assert context_features(bare, SAMPLE, MASK, tuple(INPUTS)).isfinite().all()
    impossible = context(draw_logprob=torch.full((1, 5), -math.inf))
    assert context_features(impossible, SAMPLE, MASK, ("draw",)).isfinite().all()


def test_log_odds_tell_sure_tokens_apart_up_to_the_rounding_of_their_probabilities():
    sure = context(draw_logprob=torch.tensor([[1e-7, -1e-9, -1e-4, -1e-2, -math.inf]]))
    found = context_features(sure, SAMPLE, MASK, ("draw_odds",))[0, :, 1]
    assert found.tolist() == pytest.approx([1.2, 1.2, -math.log(1e-4) / 10, odds(-1e-2), -2.0], rel=1e-4)


def test_a_text_that_nobody_watched_has_all_channels_zero():
    assert not context_features(None, SAMPLE, MASK, tuple(INPUTS)).any()


def test_forgotten_rows_are_texts_that_nobody_watched_and_others_stay():
    both = RunContext(**{k: torch.cat([v, v]) for k, v in vars(context()).items()})
    full = torch.where(SAMPLE == MASK, 1, SAMPLE).expand(2, -1)  # a finished text
    names = tuple(name for name in INPUTS if not name.startswith("own"))
    forgotten = forget(both, torch.tensor([True, False]))
    found = context_features(forgotten, full, MASK, names)
    assert not found[0].any() and not forgotten.first_hidden[0].any() and forgotten.token_rows.all()
    torch.testing.assert_close(found[1], context_features(both, full, MASK, names)[1])
    own = context_features(forgotten, full, MASK, ("own",))[0]  # one look at the text still gives it
    assert own[1].tolist() == pytest.approx([1, -0.1, -0.1, -0.1])
    assert own[2].tolist() == pytest.approx([1, -0.2, -0.2, -0.2])
    assert context_features(forgotten, full, MASK, ("own_odds",))[0, 2].tolist() == pytest.approx([1, odds(-2.0)])
