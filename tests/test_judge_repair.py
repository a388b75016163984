"""Judge and repair against its algorithm: one row at a time in plain Python, and what a user relies on."""

import math

import pytest
import torch

from prism_pipelines.schedulers import JudgeAndRepairScheduler
from prism_pipelines.schedulers.scheduling_judge_repair import WIDEN
from prism_pipelines.schedulers.token_sampling import Sampling, draw_at, true_positions

V, MASK = 12, 11


def run(scheduler, budget, lengths, judge, seed=0, given=None):
    """Every step as (sample before, quality, output) of rows of `lengths` masks; `judge` gives q from (t, sample)."""
    g = torch.Generator().manual_seed(seed)
    width = max(lengths)
    sample = torch.full((len(lengths), width), MASK)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    sample = sample.masked_fill(~mask, 0)
    table = torch.randn(budget, len(lengths), width, V, generator=g)
    scheduler.set_timesteps(budget)
    trace = []
    for t in range(budget):
        quality = judge(t, sample)
        step = scheduler.step(
            table[t], t, sample, quality=quality, generation_mask=mask, mask_token_id=MASK, generator=g
        )
        trace.append((sample, quality, step))
        sample = step.prev_sample
    return trace, mask


def noisy(seed, low=0.0):
    """A judge whose verdicts are random numbers, anew in every pass."""
    g = torch.Generator().manual_seed(seed)
    return lambda t, sample: low + (1 - low) * torch.rand(sample.shape, generator=g)


def reference(trace, mask, b, budget, bar, pace_wanted, price):
    """The algorithm box for one row: yields (what happens, number of masks after the pass) for every pass."""
    places = mask[b].nonzero().flatten().tolist()
    total = len(places)
    fill = min(math.ceil(total / pace_wanted), max(1, budget - 1))
    pace = math.ceil(total / fill)
    masks, steps, done, repairs, kept, promised, best = total, fill, 0, 0, 0.0, 0.0, -math.inf
    left_over, finished = total, False
    for t, (_, quality, _) in enumerate(trace):
        left = budget - 1 - t
        if finished:
            yield "finished", 0
        elif left_over:
            done += 1
            left_over = 0 if done >= steps or not left else masks - math.ceil(masks * done / steps)
            finished = not left
            yield "fill", left_over
        else:
            q = {i: quality[b, i].item() for i in places}
            if repairs:
                kept += min(1, max(0, sum(q.values()) - best) / promised)
            best = max(best, sum(q.values()))
            low = [i for i in places if q[i] < bar]
            accepted = sum(bar - q[i] for i in low) < price * (math.ceil(len(low) / pace) + 1)
            failed, shares = repairs - kept, (1 + kept) / (1 + repairs)
            high = 1 - (1 - bar) / (1 + failed)
            doubtful = sorted((i for i in places if q[i] < high), key=lambda i: (q[i], i))[: pace * max(left - 1, 0)]
            few = doubtful[: int(WIDEN**failed)]
            for chosen in (few, doubtful):  # all where the few do not pay
                gain, passes = sum(max(0, bar - q[i]) for i in chosen), math.ceil(len(chosen) / pace)
                pays = chosen and shares * gain >= price * (passes + 1)
                if pays:
                    break
            if accepted or not pays:
                finished = True
                yield ("accepted" if accepted else "given up"), 0
            else:
                promised, repairs = gain, repairs + 1
                masks, steps, done, left_over = len(chosen), passes, 0, len(chosen)
                yield "repair", left_over


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "budget,bar,pace,price", [(2, 0.9, 4, 0.05), (9, 0.9, 4, 0.05), (40, 0.5, 3, 0.3), (60, 1.0, 1, 2.0)]
)
def test_every_row_does_what_the_algorithm_box_says(seed, budget, bar, pace, price):
    fields = {"doubt_threshold": bar, "tokens_per_step": pace, "price": price}
    scheduler = JudgeAndRepairScheduler(order="margin", **fields)  # in which no token is written ahead of the schedule
    trace, mask = run(scheduler, budget, [9, 20, 1, 14], noisy(seed, low=0.3 * (seed % 3)), seed)
    seen = set()
    for b in range(4):
        for (sample, _, step), (what, masks) in zip(
            trace, reference(trace, mask, b, budget, bar, pace, price), strict=True
        ):
            seen.add(what)
            assert int((step.prev_sample[b] == MASK).sum()) == masks
            assert bool(step.finished[b]) == (what in ("accepted", "given up")) or what == "fill"
            assert bool(step.accepted[b]) == (what == "accepted")
            if what == "finished":
                assert torch.equal(step.prev_sample[b], sample[b])
    assert "fill" in seen and seen & {"accepted", "given up"}


@pytest.mark.parametrize("seed", range(6))
def test_a_row_that_is_given_up_ends_as_its_best_canvas_and_an_accepted_one_as_it_is(seed):
    trace, mask = run(JudgeAndRepairScheduler(), 30, [12, 20], noisy(seed), seed)
    for b in range(2):
        looks = [
            (float(q[b][mask[b]].sum()), sample[b], q[b]) for sample, q, _ in trace if not (sample[b] == MASK).any()
        ]
        for t, (sample, quality, step) in enumerate(trace):
            if step.finished[b]:
                before = [
                    look
                    for look in looks
                    if any(look[1] is s[b] or torch.equal(look[1], s[b]) for s, _, _ in trace[: t + 1])
                ]
                best = max(before, key=lambda look: look[0])
                want = sample[b] if step.accepted[b] else best[1]
                assert torch.equal(step.prev_sample[b], want)
                judged = quality[b] if step.accepted[b] else best[2]
                torch.testing.assert_close(step.judged[b][mask[b]], judged[mask[b]], rtol=0, atol=0)
                break
        else:
            raise AssertionError("the row never finished")


def test_a_pass_also_writes_the_surest_tokens_that_are_worth_no_pass_of_their_own():
    price, ahead = 4.0, 0
    trace, mask = run(JudgeAndRepairScheduler(price=price), 40, [20, 14], noisy(0, low=0.2), seed=3)
    for sample, _, step in trace[:5]:
        masked = (sample == MASK) & mask
        assert (step.unmasked.sum(-1) >= masked.any(-1).int()).all()
        if not masked.any(-1).all():
            break
        probs = torch.zeros(mask.shape).masked_scatter(step.unmasked, step.sampled_probs)
        for row in range(2):
            wrong = sorted((1 - probs[row][step.unmasked[row]]).tolist())
            if len(wrong) > 4:  # more than the schedule asks for
                ahead += 1
                assert sum(wrong) <= price + 1e-5
    assert ahead
    sure = torch.full((1, 20, V), -9.0)
    sure[..., 5] = 9.0
    scheduler = JudgeAndRepairScheduler()
    scheduler.set_timesteps(30)
    step = scheduler.step(sure, 0, torch.full((1, 20), MASK), quality=torch.ones(1, 20), mask_token_id=MASK)
    assert (step.prev_sample == 5).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_pool_gives_the_passes_of_finished_rows_to_open_ones_and_none_beyond(seed):
    """Rows 0 to 2 are content with their first canvas, row 3 never is."""
    budget, factor, rows = 16, 5, 4
    bad = torch.arange(rows)[:, None] == 3
    g = torch.Generator().manual_seed(seed)

    def judge(t, sample):
        return torch.where(bad, 0.8 * torch.rand(sample.shape, generator=g), 0.999)

    used = {}
    for pool in (1, factor):
        scheduler = JudgeAndRepairScheduler(pool_factor=pool, price=1e-3)
        scheduler.set_timesteps(budget)
        assert len(scheduler.timesteps) == budget * pool
        sample, mask = torch.full((rows, 20), MASK), torch.ones(rows, 20, dtype=torch.bool)
        active, passes = torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.long)
        for t in scheduler.timesteps.tolist():
            logits = torch.randn(rows, 20, V, generator=g)
            work = mask & active[:, None]
            step = scheduler.step(
                logits, t, sample, quality=judge(t, sample), generation_mask=work, mask_token_id=MASK, generator=g
            )
            sample, passes = step.prev_sample, passes + active
            active = active & ~step.finished
            if not active.any():
                break
        assert not active.any() and not (sample == MASK).any()
        assert passes.sum() <= budget * rows and passes.max() <= budget * pool
        used[pool] = int(passes[3])
    assert used[1] <= budget < used[factor]


def test_a_sure_canvas_costs_its_filling_and_one_look():
    trace, _ = run(JudgeAndRepairScheduler(), 50, [20, 8], lambda t, sample: torch.full(sample.shape, 0.99))
    finished = torch.stack([step.finished for *_, step in trace])
    assert finished[:, 0].nonzero().flatten().tolist() == [5] and finished[:, 1].nonzero().flatten().tolist() == [2]
    assert torch.stack([step.accepted for *_, step in trace]).sum().item() == 2


def test_repairs_that_bring_nothing_end_before_the_budget_does():
    """A judge that is never content, as where nothing can be known."""
    trace, _ = run(JudgeAndRepairScheduler(), 1000, [20], lambda t, sample: torch.full(sample.shape, 0.5))
    finished = [t for t, (*_, step) in enumerate(trace) if step.finished[0]]
    assert len(finished) == 1 and finished[0] < 999
    assert not trace[finished[0]][2].accepted[0]


def test_the_penalty_keeps_from_drawing_the_rejected_token_and_leaves_probabilities_alone():
    logits = torch.zeros(1, 4000, V)
    positions = torch.ones(1, 4000, dtype=torch.bool)
    token, amount = torch.full((1, 4000), 3), torch.full((1, 4000), math.log(4))
    for sampling in [Sampling(), Sampling(top_k=11), Sampling(top_p=0.999)]:
        drawn, probs, _ = draw_at(
            logits,
            positions,
            true_positions(positions, 4000),
            sampling,
            MASK,
            torch.rand(1, 4000, generator=torch.Generator().manual_seed(0)),
            penalty=(token, amount),
        )
        share = (drawn == 3).float().mean().item()
        want = 0.25 / 10.25  # of 11 tokens one weighs a quarter
        assert abs(share - want) < 5 * math.sqrt(want / 4000)
        torch.testing.assert_close(probs, torch.full_like(probs, 1 / 11))


@pytest.mark.parametrize(
    "name,value",
    [
        ("doubt_threshold", 0),
        ("doubt_threshold", 1.1),
        ("tokens_per_step", 0),
        ("price", 0),
        ("pool_factor", 0),
        ("repair_temperature", -1),
    ],
)
def test_a_wrong_field_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError) as error:
        JudgeAndRepairScheduler(**{name: value})
    assert f"`{name}` must be " in str(error.value) and f"got {value!r}" in str(error.value)


def test_a_budget_below_one_fill_and_one_look_and_a_missing_quality_are_refused():
    scheduler = JudgeAndRepairScheduler()
    with pytest.raises(ValueError, match="`num_inference_steps` must be at least 2 for JudgeAndRepairScheduler"):
        scheduler.set_timesteps(1)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="`quality` must be the quality head's probabilities"):
        scheduler.step(torch.zeros(1, 4, V), 0, torch.full((1, 4), MASK), mask_token_id=MASK)
