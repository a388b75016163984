"""Each baseline against its paper: exact transition probabilities, plain-Python references, hand-worked examples."""

import json
import math
import warnings
from fractions import Fraction

import pytest
import torch
from test_schedulers import LazyTable

from prism_pipelines import PrismPipeline, bundled
from prism_pipelines.schedulers import (
    MDLMScheduler,
    P2Scheduler,
    PrismScheduler,
    ReMDMScheduler,
    SelfConfidenceScheduler,
    StridedSweepScheduler,
    TokenCriticScheduler,
    TokenToMaskScheduler,
)

V, MASK = 4, 3  # tokens 0, 1, 2 and the mask
P = [0.6, 0.3, 0.1]


def logits_of(p, rows, length):
    """Logits (B, L, V) of a model that says p everywhere."""
    return torch.tensor([*p, 0.0]).log().expand(rows, length, V)


def run(scheduler, logits, sample, num_steps, generator=None, quality=None):
    """Every step as (sample before, output); `logits` and `quality` hold one tensor per timestep, or are one."""
    scheduler.set_timesteps(num_steps)
    trace = []
    for t in range(len(scheduler.timesteps)):
        now = logits[t] if isinstance(logits, list) else logits
        q = quality[t] if isinstance(quality, list) else quality
        step = scheduler.step(now, t, sample, quality=q, mask_token_id=MASK, generator=generator)
        trace.append((sample, step))
        sample = step.prev_sample
    return trace


def random_table(steps, rows, length, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, length, V, generator=g) * 2 for _ in range(steps)]


def probability(logits, row, position, token):
    """The model's probability of a token, the mask aside, in Python."""
    weights = [math.exp(x) for x in logits[row, position, :MASK].tolist()]
    return weights[token] / sum(weights)


def all_masks(rows, length):
    return torch.full((rows, length), MASK)


# --- ReMDM ------------------------------------------------------------------------------------------------------------

MARGINAL_KEEPING = [
    {"strategy": "cap", "eta": 0.2},
    {"strategy": "cap", "eta": 1.0},
    {"strategy": "cap", "eta": 0.0},
    {"strategy": "rescale", "eta": 0.3},
    {"strategy": "rescale", "eta": 1.0},
    {"strategy": "loop", "eta": 0.05},
    {"strategy": "loop", "eta": 1.0, "loop_start": 0.3, "loop_end": 0.7, "loop_alpha": 0.6},
]
FINE, COARSE = 2000, 20  # P holds multiples of 1 / COARSE


def transitions(scheduler, t, monkeypatch):
    """P(next | now) for one token as {now: {next: probability}}, by stepping through a grid of all random numbers."""
    fine = (torch.arange(FINE) + 0.5) / FINE
    coarse = (torch.arange(COARSE) + 0.5) / COARSE
    u_fill, u_token = (u.reshape(-1, 1) for u in torch.meshgrid(fine, coarse, indexing="ij"))
    grid = torch.stack([u_fill, u_token, u_fill])  # a token is either filled or remasked: both may use the same
    monkeypatch.setattr("prism_pipelines.schedulers.step.uniform_at", lambda positions, draws, generator: grid)
    table = {}
    for now in range(V):
        sample = torch.full((FINE * COARSE, 1), now)
        after = scheduler.step(logits_of(P, FINE * COARSE, 1), t, sample, mask_token_id=MASK).prev_sample
        table[now] = {x: (after == x).double().mean().item() for x in range(V)}
    return table


@pytest.mark.parametrize("config", MARGINAL_KEEPING, ids=str)
@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_remdm_keeps_the_marginals_whatever_sigma(config, num_steps, monkeypatch):
    """With the exact model of one token, P(token is x after step i) = alpha_s p(x), summed over the whole chain."""
    scheduler = ReMDMScheduler(**config)
    scheduler.set_timesteps(num_steps)
    state = {**dict.fromkeys(range(V), 0.0), MASK: 1.0}
    for t in range(num_steps):
        table = transitions(scheduler, t, monkeypatch)
        state = {x: sum(state[now] * table[now][x] for now in range(V)) for x in range(V)}
        alpha_s = scheduler.alpha(t + 1)
        for x in range(MASK):
            assert abs(state[x] - alpha_s * P[x]) < 2e-3
    assert alpha_s == 1.0 and state[MASK] == 0.0


def test_remdm_sigma_is_that_of_the_paper(monkeypatch):
    """T = 4, step 2: alpha_t = 1/2, alpha_s = 3/4, so sigma is at most (1 - 3/4) / (1/2) = 1/2."""
    for config, sigma in [
        ({"strategy": "cap", "eta": 0.2}, 0.2),
        ({"strategy": "cap", "eta": 0.9}, 0.5),
        ({"strategy": "rescale", "eta": 0.2}, 0.1),
        ({"strategy": "rescale", "eta": 1.0}, 0.5),
    ]:
        scheduler = ReMDMScheduler(**config)
        scheduler.set_timesteps(4)
        table = transitions(scheduler, 2, monkeypatch)
        assert abs(table[0][MASK] - sigma) < 1e-3
        # a mask is filled with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)
        assert abs(1 - table[MASK][MASK] - (0.75 - (1 - sigma) * 0.5) / 0.5) < 1e-3


def test_remdm_without_sigma_is_ancestral_sampling(monkeypatch):
    scheduler = ReMDMScheduler(eta=0.0)
    scheduler.set_timesteps(5)
    for t in range(5):
        table = transitions(scheduler, t, monkeypatch)
        assert all(table[x][x] == 1.0 for x in range(MASK))
        assert abs(1 - table[MASK][MASK] - 1 / (5 - t)) < 1e-3
    assert not scheduler.can_remask


def test_remdm_eta_none_is_the_default():
    """PRISM's config says None where n is a number, and goes over to ReMDM."""
    one, two = (
        run(ReMDMScheduler(eta=eta), logits_of(P, 1, 400), all_masks(1, 400), 6, torch.Generator().manual_seed(0))
        for eta in (None, 0.04)
    )
    assert all(torch.equal(a.prev_sample, b.prev_sample) for (_, a), (_, b) in zip(one, two, strict=True))
    assert ReMDMScheduler(eta=None).can_remask and sum(int(step.remasked.sum()) for _, step in one) > 0


def test_remdm_loop_rises_holds_its_level_and_rises_again(monkeypatch):
    scheduler = ReMDMScheduler(strategy="loop", eta=0.05)
    scheduler.set_timesteps(20)
    want = [0.9 * i / 9 for i in range(9)] + [0.9] * 11 + [1.0]  # 0.45 * 20 = 9 and 0.95 * 20 = 19
    assert [scheduler.alpha(i) for i in range(21)] == pytest.approx(want)
    remasks = [transitions(scheduler, t, monkeypatch)[0][MASK] for t in range(20)]
    assert remasks == pytest.approx([0.0] * 9 + [0.05] * 10 + [0.0], abs=1e-3)


@pytest.mark.parametrize("config", [c for c in MARGINAL_KEEPING if c["eta"]], ids=str)
def test_remdm_visible_share_follows_alpha_in_a_run(config):
    scheduler = ReMDMScheduler(**config)
    trace = run(scheduler, logits_of(P, 500, 20), all_masks(500, 20), 8, torch.Generator().manual_seed(0))
    for t, (_, step) in enumerate(trace):
        alpha = scheduler.alpha(t + 1)
        shown = (step.prev_sample != MASK).double().mean()
        assert abs(shown - alpha) <= 5 * math.sqrt(alpha * (1 - alpha) / 1e4)
    final = trace[-1][1].prev_sample
    for x in range(MASK):
        assert abs((final == x).double().mean() - P[x]) < 5 * math.sqrt(P[x] * (1 - P[x]) / 1e4)


def test_remdm_conf_remasks_by_the_confidence_at_which_a_token_was_drawn():
    """T = 3, step 1: sigma_max = min(1, (1 - 2/3) / (1/3)) = 1, shared by softmax(-confidence)."""
    rows = 30000
    logits = torch.stack([logits_of([0.9, 0.05, 0.05], rows, 1)[:, 0], logits_of([0.4, 0.3, 0.3], rows, 1)[:, 0]], 1)
    later = logits.flip(1)  # what the model says afterwards must not count
    (_, first), (before, second), _ = run(
        ReMDMScheduler(strategy="conf", temperature=0),
        [logits, later, later],
        all_masks(rows, 2),
        3,
        torch.Generator().manual_seed(0),
    )
    assert abs(first.unmasked.double().mean() - 1 / 3) < 0.01
    both = (before != MASK).all(-1)
    weight = [math.exp(-0.9), math.exp(-0.4)]
    want = torch.tensor(weight, dtype=torch.float64) / sum(weight)
    got = second.remasked[both].double().mean(0)
    assert ((got - want).abs() < 5 * (want * (1 - want) / int(both.sum())).sqrt()).all()
    alone = (before != MASK).sum(-1) == 1
    assert second.remasked[alone].any(-1).all()  # a softmax over one token is 1
    # masks have sigma 0 and are filled with (2/3 - 1/3) / (1 - 1/3) = 1/2
    masks = before == MASK
    assert abs(second.unmasked[masks].double().mean() - 0.5) < 0.01


def test_remdm_conf_does_not_touch_tokens_it_did_not_write():
    sample = all_masks(200, 6)
    sample[:, :2] = 1
    for before, step in run(ReMDMScheduler(strategy="conf"), logits_of(P, 200, 6), sample, 5):
        assert not step.remasked[:, :2].any()
        assert (step.prev_sample[:, :2] == 1).all() and before.shape == sample.shape


def test_remdm_conf_leaves_alone_what_somebody_else_put_in_the_place_of_its_token():
    scheduler = ReMDMScheduler(strategy="conf")
    scheduler.set_timesteps(2)
    given = {"mask_token_id": MASK, "generator": torch.Generator().manual_seed(0)}
    written = scheduler.step(logits_of(P, 400, 1), 0, all_masks(400, 1), **given).prev_sample
    changed = torch.where(written == MASK, MASK, (written + 1) % MASK)
    scheduler.timesteps = torch.arange(4)  # go on in a schedule in which sigma is not 0 yet
    scheduler.num_inference_steps = 4
    assert (written != MASK).sum() > 100
    assert scheduler.step(logits_of(P, 400, 1), 1, changed, **given).remasked.sum() == 0


# --- Token-Critic -----------------------------------------------------------------------------------------------------


def critic_actions(num_steps):
    scheduler = TokenCriticScheduler()
    scheduler.set_timesteps(num_steps)
    return [scheduler.place_in_schedule(t) for t in range(num_steps)]


def test_token_critic_pairs_its_forwards():
    assert critic_actions(1) == [(0, 1, "draw")]
    assert critic_actions(2) == [(0, 2, "reveal"), (1, 2, "draw")]
    assert critic_actions(5) == [(0, 3, "draw"), (0, 3, "judge"), (1, 3, "draw"), (1, 3, "judge"), (2, 3, "draw")]
    assert critic_actions(4) == [(0, 3, "reveal"), (1, 3, "draw"), (1, 3, "judge"), (2, 3, "draw")]


@pytest.mark.parametrize("num_steps", range(1, 10))
@pytest.mark.parametrize("length", [0, 1, 5, 12])
def test_token_critic_keeps_the_best_of_all_and_is_on_schedule_at_full_steps(num_steps, length):
    table = random_table(num_steps, 3, length)
    g = torch.Generator().manual_seed(1)
    quality = [torch.rand(3, length, generator=g) for _ in range(num_steps)]
    trace = run(TokenCriticScheduler(), table, all_masks(3, length), num_steps, g, quality)
    for (before, step), q, (k, full, action) in zip(trace, quality, critic_actions(num_steps), strict=True):
        target = math.ceil(Fraction(length * (k + 1), full))
        for b in range(3):
            if action == "draw":
                assert torch.equal(step.unmasked[b], before[b] == MASK) and not step.remasked[b].any()
            elif action == "judge":
                assert (before[b] != MASK).all() and not step.unmasked[b].any()
                worst = sorted(range(length), key=lambda i, b=b, q=q: q[b, i].item())[: length - target]
                assert step.remasked[b].nonzero().flatten().tolist() == sorted(worst)
            if action != "draw" or k == full - 1:
                assert int((step.prev_sample[b] != MASK).sum()) == target


def test_token_critic_may_drop_a_token_that_it_kept_before():
    """T = 5, six tokens, levels 2, 4, 6. The critic first likes 0 and 1, then everything else better."""
    likes = torch.tensor([[0.9, 0.8, 0.5, 0.4, 0.3, 0.2]])
    quality = [likes, likes, likes, 1 - likes, likes]
    steps = [step for _, step in run(TokenCriticScheduler(), logits_of(P, 1, 6), all_masks(1, 6), 5, None, quality)]
    shown = [(step.prev_sample != MASK)[0].nonzero().flatten().tolist() for step in steps]
    assert shown == [[*range(6)], [0, 1], [*range(6)], [2, 3, 4, 5], [*range(6)]]


def test_token_critic_noise_fades_and_can_overrule_a_small_difference():
    quality = torch.tensor([[0.50, 0.51]]).expand(2000, 2)
    dropped = {}
    for noise in (0.0, 0.5):
        g = torch.Generator().manual_seed(0)
        trace = run(TokenCriticScheduler(noise=noise), logits_of(P, 2000, 2), all_masks(2000, 2), 3, g, quality)
        dropped[noise] = trace[1][1].remasked[:, 0].double().mean().item()
    # at level 1 of 2 the noise is 0.25 (u - 1/2): the difference of two such exceeds 0.01 with P = (1 - 0.04)^2 / 2
    assert dropped[0.0] == 1.0 and abs(dropped[0.5] - (1 - 0.96**2 / 2)) < 5 * math.sqrt(0.25 / 2000)


def test_token_critic_without_quality_warns_once_and_masks_nothing():
    scheduler = TokenCriticScheduler()
    with pytest.warns(UserWarning, match="quality=None") as caught:
        trace = run(scheduler, logits_of(P, 1, 6), all_masks(1, 6), 7)
    assert len(caught) == 1 and not any(step.remasked.any() for _, step in trace)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(scheduler, logits_of(P, 1, 6), all_masks(1, 6), 7)
    with pytest.raises(ValueError, match="`quality` must be floats of shape"):
        scheduler.step(logits_of(P, 1, 6), 0, all_masks(1, 6), quality=torch.ones(1, 5), mask_token_id=MASK)


# --- P2 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("num_steps", [1, 3, 8, 15])
def test_p2_ranks_all_positions_as_the_reference_does(eta, num_steps):
    table = random_table(num_steps, 4, 9, seed=num_steps)
    trace = run(P2Scheduler(remask_strength=eta, temperature=0), table, all_masks(4, 9), num_steps)
    rows = all_masks(4, 9).tolist()
    remasked = 0
    for t, ((_, step), logits) in enumerate(zip(trace, table, strict=True)):
        hide = 9 - math.ceil(Fraction(9 * (t + 1), num_steps))
        for b, row in enumerate(rows):
            new = [max(range(MASK), key=lambda v, b=b, i=i, x=logits: x[b, i, v].item()) for i in range(9)]
            token = [new[i] if row[i] == MASK else row[i] for i in range(9)]
            log_p = [math.log(probability(logits, b, i, token[i])) for i in range(9)]
            rank = [log_p[i] * (1 if row[i] == MASK else eta) for i in range(9)]
            hidden = sorted(range(9), key=lambda i, rank=rank: rank[i])[:hide]
            remasked += sum(row[i] != MASK for i in hidden)
            rows[b] = [MASK if i in hidden else token[i] for i in range(9)]
        assert step.prev_sample.tolist() == rows
    assert (remasked > 0) == (eta > 0 and num_steps > 2)


def test_p2_at_eta_zero_is_confidence_order_without_remasking():
    table = random_table(6, 3, 10)
    one = run(P2Scheduler(remask_strength=0.0, temperature=0), table, all_masks(3, 10), 6)
    two = run(MDLMScheduler(order="confidence", temperature=0), table, all_masks(3, 10), 6)
    assert all(torch.equal(a.prev_sample, b.prev_sample) for (_, a), (_, b) in zip(one, two, strict=True))
    assert not P2Scheduler(remask_strength=0.0).can_remask and P2Scheduler().can_remask


def test_p2_gives_an_old_tokens_place_to_a_surer_new_one():
    """T = 4, four positions. At step 1 two are visible: the old token at 0.3 loses to new ones at 0.9 and 0.5."""
    logits = torch.full((1, 4, V), -torch.inf)
    for i, p in enumerate([0.3, 0.9, 0.5, 0.4]):
        logits[0, i, :2] = torch.tensor([p, 1 - p]).log()
    logits[0, 2:, 2], logits[0, 2:, 1] = logits[0, 2:, 1], -torch.inf
    sample = torch.tensor([[0, MASK, MASK, MASK]])
    scheduler = P2Scheduler(top_k=1)
    scheduler.set_timesteps(4)
    step = scheduler.step(logits, 1, sample, mask_token_id=MASK)
    assert step.remasked.tolist() == [[True, False, False, False]]
    assert step.unmasked.sum() == 2 and step.prev_sample[0, 1] == 0


# --- token-to-mask ----------------------------------------------------------------------------------------------------


def two_way(p):
    """Logits (1, L, V) under which token 0 has probability p[i] at position i."""
    return torch.tensor([[[x, 1 - x, 0.0, 0.0] for x in p]]).log()


def test_token_to_mask_takes_the_least_probable_below_the_threshold_up_to_a_quarter():
    logits = two_way([0.3, 0.1, 0.9, 0.2, 0.6, 0.7, 0.8, 0.95, *[0.5] * 8])
    sample = torch.tensor([[0] * 8 + [MASK] * 8])

    def remasked(**config):
        scheduler = TokenToMaskScheduler(**config)
        scheduler.set_timesteps(4)
        step = scheduler.step(logits, 2, sample, mask_token_id=MASK)
        assert int((step.prev_sample != MASK).sum()) == 12
        return step.remasked[0].nonzero().flatten().tolist()

    assert remasked() == [1, 3]  # three are below 0.5, a quarter of eight may go
    assert remasked(max_remask_ratio=0.5) == [0, 1, 3]
    assert remasked(remask_threshold=0.15) == [1]
    assert remasked(remask_threshold=0.0) == remasked(max_remask_ratio=0.0) == remasked(max_remask_per_position=0) == []
    assert remasked(max_remask_ratio=1.0, remask_threshold=1.0) == [
        0,
        1,
        3,
        4,
    ]  # more than 16 - 12 could not be refilled


@pytest.mark.parametrize("config", [{}, {"remask_threshold": 0.9, "max_remask_per_position": 2}], ids=str)
@pytest.mark.parametrize("num_steps", [1, 5, 20, 40])
def test_token_to_mask_keeps_its_bounds_and_the_schedule(config, num_steps):
    scheduler = TokenToMaskScheduler(**config)
    table = random_table(num_steps, 3, 16)
    times = torch.zeros(3, 16, dtype=torch.int64)
    for t, (before, step) in enumerate(run(scheduler, table, all_masks(3, 16), num_steps)):
        times += step.remasked
        for b, i in step.remasked.nonzero().tolist():
            assert probability(table[t], b, i, before[b, i].item()) < scheduler.config.remask_threshold
        assert (step.remasked.sum(-1) * 4 <= (before != MASK).sum(-1)).all()
        assert ((step.prev_sample != MASK).sum(-1) == math.ceil(Fraction(16 * (t + 1), num_steps))).all()
    assert times.max() <= scheduler.config.max_remask_per_position
    if num_steps == 40:
        assert times.max() == 2 if config else times.sum() > 0  # the lower cap is reached


@pytest.mark.parametrize("ratio", ["0.07", "0.21", "0.29", "0.57", "0.58", "0.999", "1.0"])
def test_token_to_mask_rounds_the_exact_share_down(ratio):
    """In float32, 0.21 of 300 is just below 63."""
    scheduler = TokenToMaskScheduler(remask_threshold=1.0, max_remask_ratio=float(ratio))
    scheduler.set_timesteps(3)
    shown = 100 * (torch.arange(10) + 1)
    sample = torch.where(torch.arange(3000) < shown[:, None], 0, MASK)
    step = scheduler.step(torch.zeros(10, 3000, MASK + 1), 0, sample, mask_token_id=MASK)
    assert step.remasked.sum(-1).tolist() == [math.floor(Fraction(ratio) * n) for n in shown.tolist()]


def test_token_to_mask_counts_anew_in_a_new_run():
    scheduler = TokenToMaskScheduler(remask_threshold=1.0, max_remask_per_position=1)
    table = random_table(20, 2, 12)
    one, two = (run(scheduler, table, all_masks(2, 12), 20, torch.Generator().manual_seed(0)) for _ in range(2))
    assert all(torch.equal(a.prev_sample, b.prev_sample) for (_, a), (_, b) in zip(one, two, strict=True))
    assert sum(step.remasked.int() for _, step in one).max() == 1


# --- the strided sweep ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps,stride", [(6, 2), (11, 3), (20, 8)])
def test_the_sweep_masks_every_s_th_token_and_gives_back_all_but_the_improbable(num_steps, stride):
    scheduler = StridedSweepScheduler(redraw_threshold=0.3, stride=stride)
    table, fill = random_table(num_steps, 3, 16), num_steps // 2
    trace = run(scheduler, table, all_masks(3, 16), num_steps, torch.Generator().manual_seed(0))
    redrawn = 0
    for t, (before, step) in enumerate(trace):
        if t < fill:
            assert ((before != MASK).sum(-1) == math.ceil(Fraction(16 * t, fill))).all()
        if fill - 1 <= t < num_steps - 1:
            for b in range(3):
                places = step.remasked[b].nonzero().flatten().tolist()
                assert len({i % stride for i in places}) <= 1
                if t >= fill:  # all of a residue class, which comes after that of the step before
                    assert len(places) == len(range(places[0] % stride, 16, stride))
                    last = trace[t - 1][1].remasked[b].nonzero().flatten().tolist()
                    assert not last or places[0] % stride == (last[0] + 1) % stride
        if t >= fill:
            assert torch.equal(step.unmasked, before == MASK)
            held = trace[t - 1][0]
            for b, i in step.unmasked.nonzero().tolist():
                if probability(table[t], b, i, held[b, i].item()) >= 0.3:
                    assert step.prev_sample[b, i] == held[b, i]
                else:
                    redrawn += int(step.prev_sample[b, i] != held[b, i])
    assert redrawn > 0 and not trace[-1][1].remasked.any()


def test_the_sweep_draws_what_somebody_else_masked():
    scheduler = StridedSweepScheduler(redraw_threshold=0.5, stride=2)
    trace = run(scheduler, logits_of(P, 1, 6), all_masks(1, 6), 4, torch.Generator().manual_seed(0))
    changed = trace[2][1].prev_sample.fill_(MASK)
    step = scheduler.step(logits_of(P, 1, 6), 3, changed, mask_token_id=MASK)
    assert step.unmasked.all() and not (step.prev_sample == MASK).any()


# --- the history of self-confidence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [1, 2, 3, None])
def test_history_averages_over_the_passes_since_the_token_was_written(history):
    table = random_table(12, 3, 8, seed=4)
    scheduler = SelfConfidenceScheduler(history=history, num_remask=2, order="left_to_right", temperature=0)
    trace = run(scheduler, table, all_masks(3, 8), 12)
    for t, (before, step) in enumerate(trace):
        for b in range(3):
            mean = {}
            for i in (before[b] != MASK).nonzero().flatten().tolist():
                stood = 1
                while stood <= t and trace[t - stood][0][b, i] == before[b, i]:
                    stood += 1
                passes = range(t - min(stood, history or 99) + 1, t + 1)
                values = [probability(table[s], b, i, before[b, i].item()) for s in passes]
                mean[i] = sum(values) / len(values)
            n = min(2, 8 - math.ceil(Fraction(8 * (t + 1), 12)))
            worst = sorted(mean, key=lambda i, mean=mean: mean[i])[:n]
            assert step.remasked[b].nonzero().flatten().tolist() == sorted(worst)


def test_a_history_of_all_passes_keeps_no_list_of_them():
    scheduler = SelfConfidenceScheduler(history=None)
    run(scheduler, random_table(12, 3, 8), all_masks(3, 8), 12)
    assert scheduler._memory.recent == []


def test_history_of_one_step_can_overrule_the_present_one():
    """Token 0: 0.9 then 0.3, mean 0.6. Token 1: 0.5 twice. Now 0 is worse, on average 1 is."""
    sample = torch.tensor([[0, 0, MASK, MASK, MASK, MASK]])
    before, now = (two_way([p, 0.5, *[0.5] * 4]) for p in (0.9, 0.3))
    for history, want in [(1, 0), (2, 1), (None, 1)]:
        scheduler = SelfConfidenceScheduler(history=history, num_remask=1, remask_start=0.5)
        scheduler.set_timesteps(4)
        scheduler.step(before, 1, sample, mask_token_id=MASK)
        step = scheduler.step(now, 2, sample, mask_token_id=MASK)
        assert step.remasked.nonzero().tolist() == [[0, want]]


# --- all of them ------------------------------------------------------------------------------------------------------

ARMS = {
    "mdlm": MDLMScheduler(),
    "prism": PrismScheduler(num_remask=2, loop_steps=2, loop_num_remask=3),
    "own": SelfConfidenceScheduler(num_remask=2),
    "own with history": SelfConfidenceScheduler(num_remask=2, history=None),
    **{strategy: ReMDMScheduler(strategy=strategy) for strategy in ("cap", "rescale", "conf", "loop")},
    "critic": TokenCriticScheduler(),
    "p2": P2Scheduler(),
    "token to mask": TokenToMaskScheduler(),
    "sweep": StridedSweepScheduler(redraw_threshold=0.5, stride=3),
}


@pytest.fixture(scope="module")
def pipe():
    pipe = PrismPipeline.from_pretrained(bundled("sudoku"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("arm", ARMS)
def test_nfe_is_the_number_of_forwards_of_the_backbone(arm, pipe):
    pipe.scheduler = ARMS[arm]
    count = []
    hook = pipe.model.base_model.register_forward_hook(lambda *_: count.append(1))
    try:
        for steps, block in [(1, None), (5, None), (6, None), (7, 27)]:
            count.clear()
            out = pipe(infill="." * 81, num_inference_steps=steps, block_length=block)
            loops = pipe.scheduler.config.get("loop_steps", 0) * (3 if block else 1)
            assert out.nfe == len(count) == steps + loops and out.nfe_per_row == [out.nfe]
            assert set(out.texts[0]) <= set("123456789")
    finally:
        hook.remove()


@pytest.mark.parametrize("arm", ARMS)
def test_a_baseline_survives_saving(arm, tmp_path):
    scheduler = ARMS[arm]
    scheduler.save_pretrained(tmp_path)
    json.loads((tmp_path / "scheduler_config.json").read_text())
    loaded = type(scheduler).from_pretrained(tmp_path)
    fields = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    assert fields == {name: loaded.config[name] for name in fields}


@pytest.mark.parametrize("arm", ARMS)
def test_lazy_logits_give_the_same_tokens_and_a_judging_half_step_reads_none(arm):
    table, quality = random_table(9, 2, 10), torch.rand(2, 10, generator=torch.Generator().manual_seed(2))
    tables = [LazyTable(x) for x in table]
    dense, lazy = (
        run(ARMS[arm], logits, all_masks(2, 10), 7, torch.Generator().manual_seed(1), quality)
        for logits in (table, tables)
    )
    assert all(torch.equal(a.prev_sample, b.prev_sample) for (_, a), (_, b) in zip(dense, lazy, strict=True))
    if arm == "p2":  # all positions compete, but in the last step nothing is remasked
        last = int((lazy[-1][0] == MASK).sum())
        assert [x.rows for x in tables[:7]] == [20] * 6 + [last]
    if arm == "critic":
        assert [x.rows for x in tables[1:7:2]] == [0, 0, 0]


@pytest.mark.parametrize(
    "kind,name,value",
    [
        (ReMDMScheduler, "strategy", "best"),
        (ReMDMScheduler, "eta", 1.5),
        (ReMDMScheduler, "loop_start", 0),
        (ReMDMScheduler, "loop_end", 0.3),
        (ReMDMScheduler, "loop_end", 1.0),
        (ReMDMScheduler, "loop_alpha", 1),
        (TokenCriticScheduler, "noise", -1),
        (P2Scheduler, "remask_strength", -0.5),
        (P2Scheduler, "remask_strength", math.inf),
        (TokenToMaskScheduler, "remask_threshold", 1.5),
        (TokenToMaskScheduler, "max_remask_per_position", 1.5),
        (TokenToMaskScheduler, "max_remask_per_position", -1),
        (TokenToMaskScheduler, "max_remask_ratio", "quarter"),
        (SelfConfidenceScheduler, "history", 0),
        (SelfConfidenceScheduler, "history", True),
        (StridedSweepScheduler, "redraw_threshold", 1.5),
        (StridedSweepScheduler, "stride", 1),
        (StridedSweepScheduler, "fill_share", 0),
    ],
)
def test_a_wrong_field_is_refused_by_name_and_value(kind, name, value):
    with pytest.raises(ValueError) as error:
        kind(**{name: value})
    assert f"`{name}` must be " in str(error.value) and f"got {value!r}" in str(error.value)


def test_only_schedulers_that_read_quality_ask_for_a_head():
    asks = {arm for arm, scheduler in ARMS.items() if scheduler.needs_quality}
    assert asks == {"prism", "critic"}
    assert {arm for arm, scheduler in ARMS.items() if not scheduler.can_remask} == {"mdlm"}
