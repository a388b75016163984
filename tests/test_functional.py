"""The parts of schedulers and losses against slow references in plain Python."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch

from prism_pipelines import MDLMScheduler
from prism_pipelines.schedulers.functional import (
    binomial,
    choose,
    highest,
    lowest,
    mask_tokens,
    remdm_cap,
    uniform,
    uniform_at,
    unmask_probability,
    visible_target,
)
from prism_pipelines.schedulers.step import Step
from prism_pipelines.schedulers.token_sampling import (
    Sampling,
    order_score,
    probabilities,
    probability_at,
    sample_tokens,
)

INF = math.inf


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- which positions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", list(itertools.product([False, True], repeat=5)))
def test_lowest_and_highest_agree_with_sorting_in_python(allowed):
    score = [0.3, 0.1, 0.3, -INF, INF]  # one tie on purpose
    for function, sign in [(lowest, 1), (highest, -1)]:
        order = sorted((i for i in range(5) if allowed[i]), key=lambda i: (sign * score[i], i))
        for n in range(-1, 7):
            got = function(torch.tensor([score]), torch.tensor([allowed]), torch.tensor([n]))
            assert got[0].nonzero().flatten().tolist() == sorted(order[: max(n, 0)])


def test_each_row_gets_its_own_number():
    score = torch.rand(4, 6, generator=seeded())
    allowed = torch.tensor([[True] * 6, [True] * 6, [False] * 6, [True, False] * 3])
    assert lowest(score, allowed, torch.tensor([2, 0, 3, 9])).sum(-1).tolist() == [2, 0, 0, 3]
    assert lowest(score, allowed, 1).sum(-1).tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("function", [lowest, highest])
def test_nan_is_taken_last_and_the_number_taken_is_still_exact(function):
    score = torch.tensor([[math.nan, 5.0, math.nan, INF, -INF]])
    allowed = torch.tensor([[True, True, True, False, True]])
    assert function(score, allowed, 2)[0].tolist() == [False, True, False, False, True]
    assert function(score, allowed, 3)[0].tolist() == [True, True, False, False, True]
    assert function(score, allowed, 4)[0].tolist() == [True, True, True, False, True]


def chi_square(counts, expected):
    return sum((counts[key] - e) ** 2 / e for key, e in expected.items())


def test_choose_gives_every_set_of_n_equally_often():
    allowed = torch.tensor([[True, False, True, True, True]]).expand(12_000, 5)
    chosen = choose(allowed, 2, seeded())
    counts = Counter(tuple(row.nonzero().flatten().tolist()) for row in chosen)
    pairs = list(itertools.combinations([0, 2, 3, 4], 2))
    assert set(counts) == set(pairs)
    assert chi_square(counts, dict.fromkeys(pairs, 2000)) < 20.5  # 5 degrees of freedom, p = 0.001


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_uniform_is_what_the_generator_gives():
    assert torch.equal(uniform((3, 4), seeded(5), "cpu"), torch.rand(3, 4, generator=seeded(5)))
    torch.manual_seed(7)
    expected = torch.rand(3, 4)
    torch.manual_seed(7)
    assert torch.equal(uniform((3, 4)), expected)


def test_uniform_with_a_list_gives_each_row_its_own_stream():
    drawn = uniform((3, 4), [seeded(2), seeded(9), seeded(2)])
    assert torch.equal(drawn, torch.stack([torch.rand(4, generator=seeded(s)) for s in (2, 9, 2)]))
    assert uniform((0, 4), []).shape == (0, 4)


@pytest.mark.parametrize("draw", [lambda g: uniform((2, 4), g), lambda g: uniform_at(torch.ones(2, 4) > 0, 1, g)])
def test_a_list_of_generators_must_have_one_for_each_row(draw):
    with pytest.raises(ValueError, match=r"list of 3, but there are 2 rows"):
        draw([seeded()] * 3)
    with pytest.raises(TypeError, match=r"list of torch.Generator, got None in it"):
        draw([seeded(), None])

    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(ValueError, match=r"on one device, got \['cpu', 'cuda'\]"):
        draw([seeded(), Elsewhere()])


@pytest.mark.parametrize("left", [0, 3])
def test_uniform_at_does_not_depend_on_neighbours_or_padding(left):
    alone = torch.tensor([[True, False, True, True]])
    batch = torch.zeros(3, 9, dtype=torch.bool)
    batch[0] = True
    batch[1, left : left + 4] = alone[0]
    generators = [seeded(1), seeded(2), seeded(3)]
    mine = seeded(2)
    for _ in range(3):  # the streams stay together step after step
        single = uniform_at(alone, 2, [mine])[:, alone]
        assert torch.equal(uniform_at(batch, 2, generators)[:, 1][:, batch[1]], single)
    assert single.unique().numel() == 6


def test_binomial_has_the_binomial_distribution():
    trials = torch.tensor([[True, True, False, True, True]]).expand(10_000, 5)
    got = binomial(trials, torch.full((10_000,), 0.3), uniform((10_000, 5), seeded()))
    expected = {k: 10_000 * math.comb(4, k) * 0.3**k * 0.7 ** (4 - k) for k in range(5)}
    assert chi_square(Counter(got.tolist()), expected) < 18.5  # 4 degrees of freedom, p = 0.001


def test_binomial_of_a_certain_and_an_impossible_trial():
    trials = torch.tensor([[True, False, True]] * 2)
    u = torch.tensor([[0.0, 0.0, 1 - 2**-24]] * 2)
    assert binomial(trials, torch.tensor([0.0, 1.0]), u).tolist() == [0, 2]


# --- corruption -------------------------------------------------------------------------------------------------------


def test_mask_tokens_masks_where_its_uniform_numbers_are_below_the_rate():
    ids = torch.arange(20).view(4, 5)
    trainable = torch.tensor([[True, True, False, True, True]]).expand(4, 5)
    rate = torch.tensor([0.0, 0.3, 0.7, 1.0])
    z, masked = mask_tokens(ids, rate, 99, trainable, seeded(3))
    u = torch.rand(4, 5, generator=seeded(3))
    for b, i in itertools.product(range(4), range(5)):
        assert masked[b, i] == (i != 2 and u[b, i].item() < rate[b].item())
        assert z[b, i] == (99 if masked[b, i] else ids[b, i])
    assert masked[0].sum() == 0 and masked[3].sum() == 4
    assert masked[1:3].any() and not masked[1:3, [0, 1, 3, 4]].all()


# --- how many ---------------------------------------------------------------------------------------------------------


def test_visible_target_is_the_exact_ceiling():
    totals = [*range(12), 10**9 + 7]
    for num_steps in range(1, 15):
        for step in range(num_steps):
            want = [math.ceil(Fraction(m * (step + 1), num_steps)) for m in totals]
            assert visible_target(step, num_steps, torch.tensor(totals)).tolist() == want
        assert want == totals
        for step in (-1, num_steps):
            with pytest.raises(ValueError, match="`step` must be in"):
                visible_target(step, num_steps, torch.tensor(totals))


ALPHAS = [(0.0, 0.1), (0.0, 1.0), (0.2, 0.3), (0.5, 0.5), (0.5, 0.9), (0.7, 1.0), (0.95, 1.0)]


@pytest.mark.parametrize("alpha_t,alpha_s", ALPHAS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_remdm_keeps_the_marginal_of_masked_diffusion(alpha_t, alpha_s, eta):
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)  # p(x_0), an exact denoiser
    sigma = remdm_cap(alpha_t, alpha_s, eta)
    fill_probability = unmask_probability(alpha_t, alpha_s, sigma)
    assert 0 <= sigma <= eta and -1e-12 <= fill_probability <= 1 + 1e-12
    stay = alpha_t * p * (1 - sigma)
    fill = (1 - alpha_t) * fill_probability * p
    torch.testing.assert_close(stay + fill, alpha_s * p, rtol=0, atol=1e-12)


def test_remdm_cap_is_the_largest_rate_below_eta_that_can_be_refilled():
    for alpha_t, alpha_s in ALPHAS[2:]:
        sigma = remdm_cap(alpha_t, alpha_s, eta=1.0)
        assert sigma == 1 or unmask_probability(alpha_t, alpha_s, sigma) == pytest.approx(1)


def test_remdm_of_tensors_is_that_of_floats():
    alpha_t, alpha_s = torch.tensor(ALPHAS, dtype=torch.float64).T
    sigma = remdm_cap(alpha_t, alpha_s, 0.3)
    assert sigma.tolist() == pytest.approx([remdm_cap(t, s, 0.3) for t, s in ALPHAS])
    want = [unmask_probability(t, s, remdm_cap(t, s, 0.3)) for t, s in ALPHAS]
    assert unmask_probability(alpha_t, alpha_s, sigma).tolist() == pytest.approx(want)


# --- which tokens -----------------------------------------------------------------------------------------------------


def softmax(logits, temperature=1.0):
    top = max(logits)
    mass = [math.exp((x - top) / temperature) for x in logits]
    return [m / sum(mass) for m in mass]


def truncated(logits, temperature=1.0, top_p=None, top_k=None):
    """The distribution that sample_tokens promises, by sorting lists."""
    probs = softmax(logits, temperature)
    order = sorted(range(len(probs)), key=lambda v: (-probs[v], v))[: top_k or len(probs)]
    kept, held = [], 0.0
    for v in order:
        if top_p is None or not kept or held < top_p * sum(probs[w] for w in order):
            kept.append(v)
            held += probs[v]
    return [probs[v] / held if v in kept else 0.0 for v in range(len(probs))]


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 10**6},
    {"top_p": 1.0},
    {"top_p": 1e-50},
    {"top_p": 0.6},
    {"top_p": 0.9, "temperature": 2.0},
    {"top_p": 0.7, "top_k": 3},
]
LOGITS = {
    "one token": [2.0],
    "coin": [0.3, -0.4],
    "zeros between": [-INF, 1.0, -INF, 0.25, -1.0, -INF],
    "far apart": [1e4, 1e4 - 1.5, -1e4, 9e3, 1e4 - 0.5],
    "many": [3 * math.sin(v * v) for v in range(200)],
}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_evenly_spaced_numbers_draw_every_token_in_its_exact_share(logits, settings):
    count = 4000
    u = (torch.arange(count) + 0.5) / count
    tokens, probs = sample_tokens(torch.tensor([logits]).expand(count, -1), u=u, **settings)
    drawn = Counter(tokens.tolist())
    want = truncated(logits, **settings)
    for v, p in enumerate(want):
        assert abs(drawn[v] - count * p) <= 2.5  # inverse CDF: one interval per token, so off by its two ends
        assert p > 0 or drawn[v] == 0
    own = softmax(logits)
    torch.testing.assert_close(probs, torch.tensor([own[v] for v in tokens.tolist()]))


def test_a_token_without_probability_is_never_drawn_at_the_ends_of_the_interval():
    u = torch.tensor([0.0, 1e-45, 2.0**-24, 1 - 2.0**-24, 1.0])
    for pattern in itertools.product([-INF, 0.5], repeat=7):
        if all(x == -INF for x in pattern):
            continue
        for settings in ({}, {"top_p": 0.999}, {"top_k": 6}, {"temperature": 0}):
            tokens, probs = sample_tokens(torch.tensor([pattern]).expand(len(u), -1), u=u, **settings)
            assert all(pattern[v] > -INF for v in tokens.tolist()), (pattern, settings)
            assert (probs > 0).all()


def test_a_token_without_probability_is_never_drawn_however_the_device_rounds_its_sums(monkeypatch):
    """Parallel prefix sums on a GPU may step up, or down, where nothing is added."""
    exact = torch.Tensor.cumsum

    def rounded(x, dim):
        return exact(x, dim) + 1e-3 * torch.randn(x.shape, generator=jitter)

    jitter = seeded()
    monkeypatch.setattr(torch.Tensor, "cumsum", rounded)
    logits = torch.tensor([-INF, 0.0, -INF, -INF, 1.0, -INF, -INF, 0.5, -INF]).expand(5000, 9)
    tokens, _ = sample_tokens(logits, generator=seeded(1))
    assert tokens.unique().tolist() == [1, 4, 7]


def test_drawing_with_a_generator_follows_the_distribution():
    logits = [0.0, 1.0, -1.0, 0.5]
    tokens, _ = sample_tokens(torch.tensor([logits]).expand(20_000, -1), generator=seeded(4))
    expected = {v: 20_000 * p for v, p in enumerate(softmax(logits))}
    assert chi_square(Counter(tokens.tolist()), expected) < 16.3  # 3 degrees of freedom, p = 0.001
    again, _ = sample_tokens(torch.tensor([logits]).expand(20_000, -1), generator=seeded(4))
    assert torch.equal(tokens, again)


def test_a_large_vocabulary_keeps_its_tail():
    """Half of the mass lies on the first token, the rest on 120,000 others: in plain float32 sums it would blur."""
    logits = torch.full((1, 120_001), 0.0)
    logits[0, 0] = math.log(120_000)
    u = (torch.arange(64) + 0.5) / 64
    tokens, _ = sample_tokens(logits.expand(64, -1), u=u)
    assert (tokens[:32] == 0).all()
    want = 1 + (u[32:].double() - 0.5) * 2 * 120_000
    assert (tokens[32:] - want).abs().max() < 5  # 2e-5 of the mass


@pytest.mark.parametrize("temperature", [0, 1e-40, 1e-6, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_temperature_is_argmax_for_extreme_logits(temperature, dtype):
    logits = torch.tensor([[-1e4, 1e4, 0.0, -INF], [3.0, 1.0, -1e4, 2.0], [-1e4, -INF, -INF, -9e3]], dtype=dtype)
    tokens, probs = sample_tokens(logits, temperature, u=torch.tensor([0.999, 0.0, 0.5]))
    assert tokens.tolist() == [1, 0, 3]
    torch.testing.assert_close(probs, torch.tensor([1.0, 0.66524094, 1.0]))


def test_temperature_0_takes_the_first_of_equals():
    assert sample_tokens(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), 0)[0].tolist() == [1, 0]


def test_the_mask_token_is_not_drawn_whatever_the_model_says():
    logits = torch.tensor([[0.0, 1.0, 1e4, -1.0]]).expand(1000, 4)
    u = (torch.arange(1000) + 0.5) / 1000
    for settings in ({}, {"temperature": 0}, {"top_k": 1}, {"top_p": 0.5}):
        tokens, probs = sample_tokens(logits, u=u, mask_token_id=2, **settings)
        without = [0.0, 1.0, -INF, -1.0]
        want = truncated(without, **settings) if settings.get("temperature") != 0 else [0, 1, 0, 0]
        drawn = Counter(tokens.tolist())
        assert all(abs(drawn[v] - 1000 * p) <= 2.5 for v, p in enumerate(want)) and 2 not in drawn
        torch.testing.assert_close(probs, torch.tensor(softmax(without))[tokens])
    assert logits[0, 2] == 1e4  # the caller's tensor is left alone
    assert sample_tokens(logits[:1], 0, mask_token_id=4)[0].item() == 2  # a mask token without a logit forbids nothing


def test_a_row_depends_on_its_own_logits_and_number_alone():
    logits, u = torch.randn(6, 50, generator=seeded()), torch.rand(6, generator=seeded(1))
    for settings in SETTINGS:
        tokens, probs = sample_tokens(logits, u=u, **settings)
        for i in range(6):
            alone = sample_tokens(logits[i : i + 1], u=u[i : i + 1], **settings)
            assert alone[0].item() == tokens[i] and alone[1].item() == pytest.approx(probs[i].item(), rel=1e-6)


@pytest.mark.parametrize("row", [[-INF, -INF], [math.nan, 0.0], [INF, 0.0]])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_allow_no_token_are_an_error(row, temperature):
    with pytest.raises(RuntimeError, match="a NaN, \\+inf, or a row in which no token is possible"):
        sample_tokens(torch.tensor([[0.0, 1.0], row]), temperature)


def test_no_rows_give_no_tokens():
    for settings in SETTINGS:
        tokens, probs = sample_tokens(torch.zeros(0, 5), **settings)
        assert tokens.shape == probs.shape == (0,) and tokens.dtype == torch.int64


@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_order_scores_agree_with_python(logits):
    p = softmax(logits)
    best = [*sorted(p, reverse=True), 0.0]
    for token in range(len(p)):
        got = {
            order: order_score(probabilities(torch.tensor([logits])), torch.tensor([token]), order).item()
            for order in ("confidence", "margin", "entropy")
        }
        assert got["confidence"] == pytest.approx(p[token], rel=1e-5, abs=1e-7)
        assert got["margin"] == pytest.approx(best[0] - best[1], rel=1e-5, abs=1e-7)
        assert got["entropy"] == pytest.approx(sum(q * math.log(q) for q in p if q > 0), rel=1e-5, abs=1e-7)
        here = torch.tensor([[True]])
        stands = probability_at(torch.tensor([[logits]]), here, torch.tensor([[token]]), mask_token_id=len(p))
        assert stands.item() == got["confidence"]


def test_the_probability_of_a_forbidden_token_is_0():
    logits = torch.tensor([[[-INF, 0.0], [-INF, -INF], [0.0, 0.0]]])
    where = torch.tensor([[True, True, False]])
    assert probability_at(logits, where, torch.tensor([[0, 1, 1]]), 2).tolist() == [[0.0, 0.0, 0.0]]
    assert probability_at(logits, ~where, torch.tensor([[0, 1, 1]]), 0).tolist() == [[0.0, 0.0, 1.0]]


# --- filling masks ----------------------------------------------------------------------------------------------------


def reveal(logits, masked, n, order, sampling, mask_token_id, u_order, u_token):
    """`Step.reveal` of a step in which `masked` are the masks."""
    scheduler = MDLMScheduler(order=order)
    scheduler.set_timesteps(1)
    sample = torch.full(masked.shape, mask_token_id)
    return Step.of(scheduler, logits, 0, sample, masked, mask_token_id, *sampling, None).reveal(n, u_order, u_token)


@pytest.mark.parametrize("order", ["random", "confidence", "margin", "entropy", "left_to_right"])
def test_reveal_fills_the_masks_that_its_order_names(order):
    logits = torch.randn(3, 6, 5, generator=seeded())
    masked = torch.tensor([[True] * 6, [True, False, True, True, False, True], [False] * 6])
    n, u_order, u_token = [3, 2, 4], torch.rand(3, 6, generator=seeded(1)), torch.rand(3, 6, generator=seeded(2))
    unmasked, tokens, probs = reveal(logits, masked, torch.tensor(n), order, Sampling(), 4, u_order, u_token)
    want = []
    for b in range(3):
        candidates = {}
        for i in range(6):
            p = softmax([*logits[b, i, :4].tolist(), -INF])  # token 4 is the mask
            drawn = next(v for v in range(5) if sum(p[: v + 1]) > u_token[b, i])
            best = sorted(p, reverse=True)
            score = {
                "random": u_order[b, i].item(),
                "left_to_right": i,
                "confidence": -p[drawn],
                "margin": best[1] - best[0],
                "entropy": -sum(q * math.log(q) for q in p if q > 0),
            }
            candidates[i] = (score[order], drawn, p[drawn])
        allowed = sorted((i for i in range(6) if masked[b, i]), key=lambda i: candidates[i][0])
        want += [(b, i, *candidates[i][1:]) for i in sorted(allowed[: n[b]])]
    assert unmasked.nonzero().tolist() == [[b, i] for b, i, _, _ in want]
    assert tokens.tolist() == [token for _, _, token, _ in want]
    assert probs.tolist() == pytest.approx([p for *_, p in want], rel=1e-4)
