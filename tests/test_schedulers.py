"""The laws of every scheduler, on ragged batches and hostile models, and each rule against plain Python."""

import doctest
import inspect
import itertools
import json
import math
import warnings
from dataclasses import dataclass, field, replace
from fractions import Fraction

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_pipelines import schedulers
from prism_pipelines.schedulers import (
    DrawConfidenceScheduler,
    JudgeAndRepairScheduler,
    MDLMScheduler,
    P2Scheduler,
    PrismScheduler,
    PromptConfidenceScheduler,
    ReMDMScheduler,
    SelfConfidenceScheduler,
    StridedSweepScheduler,
    TokenCriticScheduler,
    TokenToMaskScheduler,
)
from prism_pipelines.schedulers.context import RunContext
from prism_pipelines.schedulers.mixin import MDMSchedulerMixin
from prism_pipelines.schedulers.token_sampling import sample_tokens
from prism_pipelines.schedulers.validation import own_fields

VOCAB, MASK = 5, 3
# Exact counts and rows of logits are tested here for these. ReMDM's counts are random by design, Token-Critic's
# hold at its full steps, and what P2, token-to-mask and the sweep remask depends on the logits: see
# tests/test_baselines.py.
BY_CONTEXT = (PromptConfidenceScheduler, DrawConfidenceScheduler)
REMASKERS = (PrismScheduler, SelfConfidenceScheduler, *BY_CONTEXT)
COUNTED = (MDLMScheduler, *REMASKERS)
KINDS = tuple(getattr(schedulers, name) for name in schedulers.__all__ if name.endswith("Scheduler"))
BASELINES = {
    ReMDMScheduler: [
        {"strategy": "cap", "eta": 0.3},
        {"strategy": "cap", "eta": 0.0},
        {"strategy": "rescale", "eta": 1.0},
        {"strategy": "conf"},
        {"strategy": "loop", "eta": 0.1},
    ],
    TokenCriticScheduler: [{}, {"noise": 2.0}],
    P2Scheduler: [{}, {"remask_strength": 0.0}, {"remask_strength": 3.0}],
    TokenToMaskScheduler: [{}, {"remask_threshold": 1.0, "max_remask_ratio": 1.0, "max_remask_per_position": 1}],
    StridedSweepScheduler: [{}, {"redraw_threshold": 1.0, "stride": 2}, {"redraw_threshold": 0.0}, {"fill_share": 0.1}],
    JudgeAndRepairScheduler: [
        {},
        {"doubt_threshold": 0.4, "tokens_per_step": 2},
        {"doubt_threshold": 1.0, "price": 0.001, "tokens_per_step": 1},
        {"repair_temperature": 0.0, "price": 3.0},
    ],
}
ORDERS = ["random", "confidence", "margin", "entropy", "left_to_right"]
POSITION_ORDERS = ["random", "left_to_right"]  # need no logits to choose positions
LOOP = {"loop_steps": 3, "loop_num_remask": 2}
REMASKING = [
    {},
    {"num_remask": 0},
    {"num_remask": 3},
    {"num_remask": 100},
    {"num_remask": 2, "remask_start": 0.3, "remask_end": 0.8},
    {"eta": 0.5},
    {"eta": 1.0},
    {"eta": 0.5, "eta_schedule": "inverse", "eta_reference_steps": 3},
    {"num_remask": 1, **LOOP, "loop_at": 0.6},
    {"num_remask": 0, **LOOP},
    {"num_remask": 2, "loop_steps": 1, "loop_num_remask": 50, "loop_at": 0.01},
    {"eta": 0.4, **LOOP, "loop_at": 0.5, "remask_start": 0.5},
]
BY_THRESHOLD = [{"quality_threshold": 0.5}, {"quality_threshold": 1.0, "max_share": 0.6, "num_remask": 2}]
SAMPLING = [{}, {"temperature": 0}, {"temperature": 0.3, "top_k": 2}, {"temperature": 2.0, "top_p": 0.7}]
MODELS = ["random", "all on the mask", "extreme", "ties", "one possible"]
laws = settings(max_examples=60, deadline=None, derandomize=True)


def hostile_logits(model, shape, generator):
    """Logits (B, L, V) of a model that is not kind to its sampler."""
    logits = torch.randn(*shape, VOCAB, generator=generator)
    if model == "all on the mask":
        logits[..., MASK] = 1e4
    if model == "extreme":
        logits = logits.sign() * 1e4
    if model == "ties":
        logits = torch.zeros_like(logits)
    if model == "one possible":
        token = (MASK + torch.randint(1, VOCAB, (*shape, 1), generator=generator)) % VOCAB  # any but the mask
        logits = torch.full_like(logits, -torch.inf).scatter(-1, token, 0.0)
        logits[..., MASK] = 5.0
    return logits


class LazyTable:
    """Logits that are only there where they are asked for, and count how many that were."""

    def __init__(self, dense):
        self.dense, self.rows = dense, 0

    def __getitem__(self, positions):
        self.rows += int(positions.sum())
        return self.dense[positions]


def context_of(sample, generation_mask, quality, now=0):
    """A run context that holds `quality` as the probability of every visible generated token, NaN where it is NaN."""
    unknown = torch.full(sample.shape, torch.nan)
    logprob = quality.log().where(generation_mask & (sample != MASK), unknown)
    count = torch.zeros_like(sample)
    return RunContext(generation_mask, now, count - 1, count, logprob, logprob, unknown, unknown)


@dataclass
class Case:
    """A batch to generate, the scheduler to do it with, and what model and head say at each timestep."""

    scheduler: object
    sample: torch.Tensor
    generation_mask: torch.Tensor
    num_steps: int
    logits: list = field(default_factory=list)  # (B, L, V) per timestep
    quality: list = field(default_factory=list)  # (B, L) per timestep

    def context(self, t, sample):
        """What the pipeline passes beside, if the scheduler asks for it."""
        if not getattr(self.scheduler, "reads_context", ()):
            return {}
        return {"context": context_of(sample, self.generation_mask, self.quality[t], int(t))}

    def run(self, generator=None, lazy=False):
        """Every step as (timestep, sample before, output, rows of logits asked for)."""
        self.scheduler.set_timesteps(self.num_steps)
        sample, trace = self.sample, []
        for t in self.scheduler.timesteps:
            output = LazyTable(self.logits[t])
            step = self.scheduler.step(
                output if lazy else self.logits[t],
                t,
                sample,
                quality=self.quality[t],
                generation_mask=self.generation_mask,
                mask_token_id=MASK,
                generator=generator,
                **self.context(t, sample),
            )
            trace.append((int(t), sample, step, output.rows))
            sample = step.prev_sample
        return trace


def make_case(scheduler, lengths, num_steps, model="random", seed=0, width=None):
    """Rows with prompts, masks in the prompt, padding, and `lengths` generated tokens at scattered places."""
    g = torch.Generator().manual_seed(seed)
    width = max(lengths, default=0) + 2 if width is None else width
    shape = (len(lengths), width)
    generation_mask = torch.rand(shape, generator=g).argsort(-1) < torch.tensor(lengths).view(-1, 1)
    sample = torch.randint(0, VOCAB, shape, generator=g).masked_fill(generation_mask, MASK)
    steps = num_steps + scheduler.config.get("loop_steps", 0)
    logits = [hostile_logits(model, shape, g) for _ in range(steps)]
    quality = [torch.randint(0, 4, shape, generator=g) / 3 for _ in range(steps)]  # many ties
    for q in quality:
        q[torch.rand(shape, generator=g) < 0.1] = torch.nan
    return Case(scheduler, sample, generation_mask, num_steps, logits, quality)


def least_steps(kind):
    """The fewest steps of a run: judge and repair fills in one and judges in another."""
    return 2 if kind is JudgeAndRepairScheduler else 1


def takes(kind, name):
    """Does a scheduler have the config field `name`?"""
    return name in inspect.signature(kind).parameters


@st.composite
def cases(draw, kinds=KINDS):
    kind = draw(st.sampled_from(kinds))
    config = dict(order=draw(st.sampled_from(ORDERS)), **draw(st.sampled_from(SAMPLING)))
    config = {name: value for name, value in config.items() if takes(kind, name)}
    if kind in REMASKERS:
        config |= draw(st.sampled_from(REMASKING if kinds == COUNTED else REMASKING + BY_THRESHOLD))
    if kind is SelfConfidenceScheduler:
        config["history"] = draw(st.sampled_from([1, 1, 2, None]))
    config |= draw(st.sampled_from(BASELINES.get(kind, [{}])))
    lengths = draw(st.lists(st.integers(0, 9), max_size=4))
    return make_case(
        kind(**config),
        lengths,
        draw(st.integers(least_steps(kind), 12)),
        draw(st.sampled_from(MODELS)),
        draw(st.integers(0, 999)),
    )


# --- laws of every scheduler ------------------------------------------------------------------------------------------


@laws
@given(cases())
def test_a_step_fills_masks_and_remasks_visible_tokens_and_changes_nothing_else(case):
    for _, before, step, _ in case.run():
        masked = before == MASK
        assert not (step.unmasked & ~(case.generation_mask & masked)).any()
        assert not (step.remasked & ~(case.generation_mask & ~masked)).any()  # so never what was just filled
        after = before.clone()
        after[step.unmasked] = step.sampled_tokens
        after[step.remasked] = MASK
        if step.restored is not None:  # finished rows go back to what they were
            assert not (step.restored & ~(case.generation_mask & ~masked & step.finished[:, None])).any()
            after[step.restored] = step.prev_sample[step.restored]
        assert torch.equal(step.prev_sample, after) and step.prev_sample.dtype == before.dtype
        assert torch.equal(after[~case.generation_mask], case.sample[~case.generation_mask])


@laws
@given(cases())
def test_no_mask_is_left_at_the_end_and_the_paid_steps_are_those_announced(case):
    trace = case.run()
    assert len(trace) == case.num_steps + case.scheduler.config.get("loop_steps", 0)
    assert [t for t, *_ in trace] == list(range(len(trace)))
    final = trace[-1][2].prev_sample
    assert not (case.generation_mask & (final == MASK)).any()


@laws
@given(cases())
def test_only_tokens_that_the_model_allows_are_written_and_their_probability_is_its_own(case):
    for t, _, step, _ in case.run():
        logits = case.logits[t][step.unmasked].double().clone()
        logits[:, MASK] = -torch.inf
        want = logits.softmax(-1).gather(-1, step.sampled_tokens[:, None])[:, 0]
        assert (step.sampled_tokens != MASK).all()
        assert (want > 0).all()
        torch.testing.assert_close(step.sampled_probs.double(), want, rtol=1e-5, atol=0)


def schedule(config, total, num_steps):
    """What docs/schedulers.md says of each forward: (level, step of the schedule or None in the loop, random n)."""
    loops = config.get("loop_steps", 0)
    at = Fraction(str(config.get("loop_at", 1.0)))
    entry = next(i for i in range(num_steps) if Fraction(i + 1, num_steps) >= at) if loops else None
    rows = []
    for i in range(num_steps):
        level = math.ceil(Fraction(total * (i + 1), num_steps))
        rows.append((level, i, config["loop_num_remask"] if i == entry else 0))
        if i == entry:
            rows += [(level, None, config["loop_num_remask"] if k < loops - 1 else 0) for k in range(loops)]
    return rows


def in_window(config, i, num_steps):
    return i is not None and config.get("remask_start", 0) <= i / num_steps < config.get("remask_end", 1)


@laws
@given(cases(COUNTED))
def test_visible_and_remasked_counts_are_exactly_on_schedule_in_every_row(case):
    config = case.scheduler.config
    trace = case.run()
    for b, total in enumerate(case.generation_mask.sum(-1).tolist()):
        shown = 0
        for (_, _, step, _), (level, i, at_random) in zip(trace, schedule(config, total, case.num_steps), strict=True):
            remasked = int(step.remasked[b].sum())
            if isinstance(case.scheduler, MDLMScheduler) or not in_window(config, i, case.num_steps):
                by_quality = 0
            elif config.eta is None:
                n = 1 if config.num_remask is None else config.num_remask
                by_quality = min(n, shown, total - level)
            else:
                by_quality = max(0, remasked - at_random)
                assert by_quality <= min(shown, total - level)
            at_random = min(at_random, shown - by_quality)
            if config.get("eta") is None:
                assert remasked == by_quality + at_random
            shown = int((case.generation_mask & (step.prev_sample != MASK))[b].sum())
            assert level - shown == at_random if config.get("eta") is None else 0 <= level - shown <= remasked


@laws
@given(cases(COUNTED))
def test_lazy_logits_give_the_same_and_are_asked_for_only_where_needed(case):
    dense = case.run(torch.Generator().manual_seed(1))
    lazy = case.run(torch.Generator().manual_seed(1), lazy=True)
    config, own = case.scheduler.config, isinstance(case.scheduler, SelfConfidenceScheduler)
    places = schedule(config, 0, case.num_steps)
    for (_, _, one, _), (_, before, two, rows), (_, i, _) in zip(dense, lazy, places, strict=True):
        assert torch.equal(one.prev_sample, two.prev_sample)
        masks = int((case.generation_mask & (before == MASK)).sum())
        needed = int(two.unmasked.sum()) if config.order in POSITION_ORDERS else masks
        judges = own and config.num_remask != 0 and in_window(config, i, case.num_steps) and i < case.num_steps - 1
        judges |= own and config.history != 1  # a history is kept in every step
        assert rows == needed + (int(case.generation_mask.sum()) - masks if judges else 0)


@laws
@given(cases())
def test_the_same_generator_gives_the_same_tokens(case):
    one = case.run(torch.Generator().manual_seed(5))
    two = case.run(torch.Generator().manual_seed(5))
    assert all(torch.equal(x[2].prev_sample, y[2].prev_sample) for x, y in zip(one, two, strict=True))


@laws
@given(cases(), st.integers(0, 3), st.integers(0, 3))
def test_with_a_generator_per_row_a_row_does_not_depend_on_neighbours_or_padding(case, left, right):
    def pad(x, value):
        return torch.cat([x.new_full((len(x), left), value), x, x.new_full((len(x), right), value)], 1)

    def pad_logits(x):
        return torch.cat([torch.ones(len(x), left, VOCAB), x, torch.ones(len(x), right, VOCAB)], 1)

    rows = len(case.sample)
    batch = replace(
        case,
        sample=pad(case.sample, 0),
        generation_mask=pad(case.generation_mask, False),
        logits=[pad_logits(x) for x in case.logits],
        quality=[pad(x, 0.5) for x in case.quality],
    ).run([torch.Generator().manual_seed(b) for b in range(rows)])
    width = case.sample.shape[1]
    for b in range(rows):
        alone = replace(
            case,
            sample=case.sample[b : b + 1],
            generation_mask=case.generation_mask[b : b + 1],
            logits=[x[b : b + 1] for x in case.logits],
            quality=[x[b : b + 1] for x in case.quality],
        ).run([torch.Generator().manual_seed(b)])
        for (_, _, one, _), (_, _, many, _) in zip(alone, batch, strict=True):
            assert torch.equal(one.prev_sample[0], many.prev_sample[b, left : left + width])


@pytest.mark.parametrize("kind", KINDS)
def test_other_generators_give_other_tokens_and_other_positions(kind):
    case = make_case(
        kind(**({"order": "random", "temperature": 1.0} if kind is JudgeAndRepairScheduler else {})), [40], 4
    )
    one, two = (case.run(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert not torch.equal(one[0][2].unmasked, two[0][2].unmasked)
    assert not torch.equal(one[-1][2].prev_sample, two[-1][2].prev_sample)


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize("order", ORDERS)
def test_tokens_that_are_there_from_the_start_are_counted_and_may_be_remasked(kind, order):
    """A canvas that is ahead of the schedule waits for it; rows that are finished stay finished unless remasked."""
    case = make_case(kind(order=order), [8, 8, 8], 4, seed=3)
    case.generation_mask[:] = False
    case.generation_mask[:, :8] = True
    case.sample[0, :8] = torch.tensor([0, 1, 2, MASK, 4, 0, 1, MASK])
    case.sample[1, :8] = 1
    case.sample[2, :8] = MASK
    n = int(case.scheduler.can_remask)
    shown = [(step.prev_sample[:, :8] != MASK).sum(-1).tolist() for _, _, step, _ in case.run()]
    assert shown == [[6 - n, 8 - n, 2], [6 - 2 * n, 8 - 2 * n, 4], [6, 8 - 2 * n, 6], [8, 8, 8]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths,width", [([], 0), ([], 5), ([0, 0], 0), ([0, 0], 4)])
def test_nothing_to_generate_is_no_error(kind, lengths, width):
    for order in ORDERS if takes(kind, "order") else [None]:
        case = make_case(kind(order=order) if order else kind(), lengths, 3, width=width)
        for generator in (None, [torch.Generator() for _ in lengths]):
            assert torch.equal(case.run(generator)[-1][2].prev_sample, case.sample)


def test_without_a_generation_mask_everything_is_generated():
    scheduler = MDLMScheduler(mask_token_id=MASK, order="left_to_right")
    scheduler.set_timesteps(2)
    step = scheduler.step(torch.zeros(1, 4, VOCAB), 0, torch.tensor([[MASK, 1, MASK, MASK]]))
    assert step.unmasked.tolist() == [[True, False, False, False]]  # 2 of 4 are due, 1 is there


# --- each rule against plain Python -----------------------------------------------------------------------------------


def greedy_reference(case, n):
    """PRISM at temperature 0 with fixed n, one row and one position at a time. Yields the samples after each step."""
    rows = case.sample.tolist()
    for t in range(case.num_steps):
        for b, row in enumerate(rows):
            places = [i for i in range(len(row)) if case.generation_mask[b, i]]
            masks = [i for i in places if row[i] == MASK]
            visible = [i for i in places if row[i] != MASK]
            target = math.ceil(Fraction(len(places) * (t + 1), case.num_steps))

            def badness(i, b=b, t=t):
                q = case.quality[t][b, i].item()
                return (math.inf if math.isnan(q) else q, i)

            drop = sorted(visible, key=badness)[: min(n, len(places) - target)]

            def eagerness(i, b=b, t=t):
                logits = case.logits[t][b, i].tolist()
                logits[MASK] = -math.inf
                p = [math.exp(x - max(logits)) for x in logits]
                p = sorted((x / sum(p) for x in p), reverse=True)
                entropy = -sum(x * math.log(x) for x in p if x > 0)
                value = {"confidence": p[0], "margin": p[0] - p[1], "entropy": -entropy, "left_to_right": 0}
                return (-round(value[case.scheduler.config.order], 5), i)

            for i in sorted(masks, key=eagerness)[: target - len(visible) + len(drop)]:
                logits = case.logits[t][b, i].tolist()
                row[i] = max((v for v in range(VOCAB) if v != MASK), key=lambda v: (logits[v], -v))
            for i in drop:
                row[i] = MASK
        yield rows


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("num_steps", [1, 3, 7, 13])
def test_a_greedy_run_is_that_of_the_reference(order, n, num_steps):
    case = make_case(PrismScheduler(order=order, num_remask=n, temperature=0), [9, 4, 0, 1], num_steps, seed=num_steps)
    for (_, _, step, _), want in zip(case.run(), greedy_reference(case, n), strict=True):
        assert step.prev_sample.tolist() == want


def test_prism_without_remasking_is_mdlm():
    for order in ORDERS[1:]:
        case = make_case(PrismScheduler(order=order, num_remask=0, temperature=0), [9, 4, 0, 1], 5)
        plain = replace(case, scheduler=MDLMScheduler(order=order, temperature=0))
        for (_, _, one, _), (_, _, two, _) in zip(case.run(), plain.run(), strict=True):
            assert torch.equal(one.prev_sample, two.prev_sample)


@pytest.mark.parametrize("remasking", REMASKING, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_self_confidence_is_prism_with_the_models_own_probability_as_quality(remasking, model):
    """Step by step from the same sample, since quality depends on what is visible."""
    prism, own = PrismScheduler(**remasking), SelfConfidenceScheduler(**remasking)
    case = make_case(own, [9, 4, 0, 1], 5, model, seed=8)
    prism.set_timesteps(5)
    for t, before, _, _ in case.run(torch.Generator().manual_seed(1)):
        one, two = (torch.Generator().manual_seed(t) for _ in range(2))
        logits = case.logits[t].double().clone()
        logits[..., MASK] = -torch.inf  # as in a pipeline's logits, where no mask is ever predicted
        probs = logits.softmax(-1).gather(-1, before[..., None])[..., 0].float()
        given = {"generation_mask": case.generation_mask, "mask_token_id": MASK}
        want = prism.step(case.logits[t], t, before, quality=probs, generator=one, **given)
        got = own.step(case.logits[t], t, before, generator=two, **given)
        assert torch.equal(got.prev_sample, want.prev_sample)


def test_self_confidence_remasks_a_forbidden_token_first_and_a_sure_one_last():
    scheduler = SelfConfidenceScheduler(num_remask=1)
    scheduler.set_timesteps(4)
    sample = torch.tensor([[0, 1, MASK, MASK, MASK]])
    logits = torch.zeros(1, 5, VOCAB)
    logits[0, 0] = torch.tensor([-5.0, 0, 0, 0, 0])
    logits[0, 1, 1] = -torch.inf
    assert scheduler.step(logits, 1, sample, mask_token_id=MASK).remasked.nonzero().tolist() == [[0, 1]]
    logits[0, 1, 1] = 9.0
    assert scheduler.step(logits, 1, sample, mask_token_id=MASK).remasked.nonzero().tolist() == [[0, 0]]


def test_self_confidence_judges_at_temperature_1_whatever_it_samples_at():
    """At temperature 2 one rival at 0.55 would weigh less than three at 1/6, and the other token would go."""
    logits = torch.full((1, 4, VOCAB), -torch.inf)
    logits[0, 0] = torch.tensor([0.5, 1 / 6, 1 / 6, 0.0, 1 / 6]).log()
    logits[0, 1] = torch.tensor([0.45, 0.55, 0.0, 0.0, 0.0]).log()
    logits[0, 2:] = 0.0
    scheduler = SelfConfidenceScheduler(num_remask=1, temperature=2.0)
    scheduler.set_timesteps(3)
    sample = torch.tensor([[0, 0, MASK, MASK]])
    assert scheduler.step(logits, 1, sample, mask_token_id=MASK).remasked.nonzero().tolist() == [[0, 1]]


def remask_counts(scheduler, total, num_steps, rows, seed=0):
    """Remasked tokens of each row at each step, (steps, rows)."""
    case = make_case(scheduler, [total] * rows, num_steps, width=total, seed=seed)
    return torch.stack([step.remasked.sum(-1) for _, _, step, _ in case.run(torch.Generator().manual_seed(seed))])


def expected_remasks(total, num_steps, eta):
    """E[min(Binomial(shown, sigma), total - target)] of each step, by summing over all outcomes."""
    means = []
    for i in range(num_steps):
        shown, target = (math.ceil(Fraction(total * j, num_steps)) for j in (i, i + 1))
        sigma = min(eta, (total - target) / shown) if shown else 0
        pmf = [math.comb(shown, k) * sigma**k * (1 - sigma) ** (shown - k) for k in range(shown + 1)]
        means.append(sum(p * min(k, total - target) for k, p in enumerate(pmf)))
    return means


@pytest.mark.parametrize("schedule_kind", ["constant", "inverse"])
@pytest.mark.parametrize("num_steps", [5, 20])
def test_binomial_remasking_has_the_exact_mean_in_every_step(schedule_kind, num_steps):
    scheduler = PrismScheduler(eta=0.2, eta_schedule=schedule_kind, eta_reference_steps=10)
    counts = remask_counts(scheduler, 20, num_steps, rows=1500).double()
    eta = 0.2 if schedule_kind == "constant" else min(1, 0.2 * 10 / num_steps)
    for got, want in zip(counts, expected_remasks(20, num_steps, eta), strict=True):
        assert abs(got.mean() - want) <= 4.5 * got.std() / 1500**0.5 + 1e-9
    assert counts.std() > 0


def test_inverse_eta_keeps_the_remaskings_per_token_level_and_constant_eta_does_not():
    totals = {}
    for kind, steps in itertools.product(["constant", "inverse"], [16, 64]):
        scheduler = PrismScheduler(eta=0.1, eta_schedule=kind, eta_reference_steps=16)
        totals[kind, steps] = remask_counts(scheduler, 64, steps, rows=30).sum(0).double().mean() / 64
    assert totals["constant", 64] / totals["constant", 16] > 3
    assert 0.8 < totals["inverse", 64] / totals["inverse", 16] < 1.25
    assert totals["inverse", 16] == totals["constant", 16]


@pytest.mark.parametrize("start,end,steps", [(0.5, 1.0, 10), (0.0, 0.3, 10), (0.7, 0.8, 10), (0.55, 0.56, 100)])
def test_staged_remasking_keeps_to_its_window(start, end, steps):
    scheduler = PrismScheduler(num_remask=1, remask_start=start, remask_end=end)
    counts = remask_counts(scheduler, 2 * steps, steps, rows=1)[:, 0].tolist()
    first, last = Fraction(str(start)), Fraction(str(end))
    assert counts == [int(first <= Fraction(i, steps) < last and 0 < i < steps - 1) for i in range(steps)]


# --- loop refinement --------------------------------------------------------------------------------------------------


LOOP_ENTRIES = [(1.0, 10, 9), (0.5, 10, 4), (0.51, 10, 5), (0.7, 10, 6), (0.2, 10, 1), (0.55, 100, 54)]


@pytest.mark.parametrize("loop_at,num_steps,entry", LOOP_ENTRIES)
def test_the_loop_stays_n_below_the_level_it_entered_at_and_then_goes_on(loop_at, num_steps, entry):
    scheduler = PrismScheduler(num_remask=0, loop_steps=4, loop_num_remask=3, loop_at=loop_at)
    case = make_case(scheduler, [3 * num_steps], num_steps)
    trace = case.run()
    shown = [int((case.generation_mask & (step.prev_sample != MASK)).sum()) for *_, step, _ in trace]
    steps = [3 * (i + 1) for i in range(num_steps)]
    level = steps[entry]
    assert shown == [*steps[:entry], *[level - 3] * 4, level, *steps[entry + 1 :]]
    remasked = [int(step.remasked.sum()) for *_, step, _ in trace]
    assert remasked == [0] * entry + [3, 3, 3, 3, 0] + [0] * (num_steps - 1 - entry)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_the_loop_holds_its_level_whatever_the_threshold(threshold):
    """All tokens are surer than 0, so without a loop the first step would write them all."""
    loop = {"loop_steps": 3, "loop_num_remask": 2, "loop_at": 0.5}
    scheduler = PrismScheduler(order="confidence", num_remask=0, use_threshold=True, threshold=threshold, **loop)
    case = make_case(scheduler, [20], 2, "ties", width=20)
    shown = [int((step.prev_sample != MASK).sum()) for *_, step, _ in case.run()]
    assert shown == [10, 8, 8, 10, 20]


def test_a_loop_over_a_full_canvas_refills_what_it_remasked_and_remasks_others():
    """At the end of the schedule a plain clamp n <= M - target would let the loop do nothing."""
    case = make_case(PrismScheduler(num_remask=0, loop_steps=5, loop_num_remask=4), [12], 3, width=12)
    loop = [step for *_, step, _ in case.run()][2:]
    for before, after in itertools.pairwise(loop):
        assert torch.equal(before.remasked, after.unmasked)
        assert not (after.remasked & after.unmasked).any()
    assert [int(step.remasked.sum()) for step in loop] == [4] * 5 + [0]


def test_the_step_that_enters_the_loop_also_remasks_by_quality():
    scheduler = PrismScheduler(num_remask=2, loop_steps=2, loop_num_remask=3, loop_at=0.5)
    case = make_case(scheduler, [20], 10, width=20)
    trace = case.run()
    assert [int(step.remasked.sum()) for *_, step, _ in trace][3:8] == [2, 2 + 3, 3, 0, 2]
    entry = trace[4]
    visible = (entry[1] != MASK)[0]
    quality = case.quality[4][0].nan_to_num(9)
    worst = sorted(visible.nonzero().flatten().tolist(), key=lambda i: (quality[i].item(), i))[:2]
    assert entry[2].remasked[0, worst].all()


def test_the_loop_remasks_every_token_equally_often():
    scheduler = PrismScheduler(num_remask=0, loop_steps=1, loop_num_remask=2, order="left_to_right")
    case = make_case(scheduler, [6] * 3000, 2, width=6)
    entry = case.run(torch.Generator().manual_seed(0))[1][2]
    counts = entry.remasked.sum(0)  # of the 3 tokens visible before, 2 go
    assert counts[3:].sum() == 0
    assert ((counts[:3] - 2000).abs() < 5 * (3000 * 2 / 9) ** 0.5).all()


# --- quality ----------------------------------------------------------------------------------------------------------


def test_without_quality_nothing_is_remasked_and_one_warning_says_so():
    scheduler = PrismScheduler(num_remask=2, **LOOP)
    case = make_case(scheduler, [9, 5], 4)
    case.quality = [None] * 7
    with pytest.warns(UserWarning, match="quality=None") as caught:
        trace = case.run()
    assert len(caught) == 1
    assert not any(step.remasked.any() for *_, step, _ in trace)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.run()


def test_a_pure_loop_needs_no_quality():
    scheduler = PrismScheduler(num_remask=0, **LOOP)
    case = make_case(scheduler, [9], 4)
    case.quality = [None] * 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(int(step.remasked.sum()) for *_, step, _ in case.run()) == 6


@pytest.mark.parametrize(
    "config,can_remask,needs_quality",
    [
        ({}, True, True),
        ({"num_remask": 0}, False, False),
        ({"num_remask": 4}, True, True),
        ({"eta": 0.0}, False, False),
        ({"eta": 0.1}, True, True),
        ({"num_remask": 0, **LOOP}, True, False),
        ({"eta": 0.1, **LOOP}, True, True),
    ],
)
def test_schedulers_say_whether_they_remask_and_what_they_need(config, can_remask, needs_quality):
    prism, own = PrismScheduler(**config), SelfConfidenceScheduler(**config)
    assert (prism.can_remask, prism.needs_quality) == (can_remask, needs_quality)
    assert (own.can_remask, own.needs_quality) == (can_remask, False)
    assert (MDLMScheduler().can_remask, MDLMScheduler().needs_quality) == (False, False)
    for kind in BY_CONTEXT:
        assert (kind(**config).can_remask, kind(**config).needs_quality) == (can_remask, False)


@pytest.mark.parametrize("kind", BY_CONTEXT)
@pytest.mark.parametrize("remasking", REMASKING + BY_THRESHOLD, ids=str)
def test_a_score_of_the_context_is_prism_with_it_as_quality(kind, remasking):
    """Step by step from the same sample, with unknown scores among them."""
    prism, case = PrismScheduler(**remasking), make_case(kind(**remasking), [9, 4, 0, 1], 5, seed=8)
    prism.set_timesteps(5)
    for t, before, got, _ in case.run(torch.Generator().manual_seed(1)):
        one, two = (torch.Generator().manual_seed(t) for _ in range(2))
        given = {"generation_mask": case.generation_mask, "mask_token_id": MASK}
        quality = case.quality[t].log().exp()
        want = prism.step(case.logits[t], t, before, quality=quality, generator=one, **given)
        got = case.scheduler.step(case.logits[t], t, before, generator=two, **case.context(t, before), **given)
        assert torch.equal(got.prev_sample, want.prev_sample)


@pytest.mark.parametrize(
    "kind,field", [(PromptConfidenceScheduler, "prompt_logprob"), (DrawConfidenceScheduler, "draw_logprob")]
)
def test_each_rule_reads_its_own_field_of_the_context_and_names_it_where_it_is_missing(kind, field):
    scheduler = kind(num_remask=1)
    scheduler.set_timesteps(4)
    sample = torch.tensor([[0, 1, MASK, MASK, MASK]])
    context = context_of(sample, torch.ones_like(sample, dtype=torch.bool), torch.full((1, 5), 0.5))
    context = replace(context, **{field: torch.tensor([[-1.0, -2.0, *[torch.nan] * 3]])})
    step = scheduler.step(torch.zeros(1, 5, VOCAB), 1, sample, mask_token_id=MASK, context=context)
    assert step.remasked.nonzero().tolist() == [[0, 1]]
    with pytest.raises(ValueError, match=rf"{kind.__name__} needs `context`, a RunContext with `{field}`"):
        scheduler.step(torch.zeros(1, 5, VOCAB), 1, sample, mask_token_id=MASK)


@pytest.mark.parametrize("share,want", [(1.0, 10), (0.25, 2), (0.3, 3), (0.01, 1)])
def test_below_the_bar_at_most_a_share_of_the_visible_and_at_least_one_is_remasked(share, want):
    scheduler = PrismScheduler(quality_threshold=0.5, max_share=share, order="left_to_right")
    scheduler.set_timesteps(4)
    sample = torch.tensor([[0] * 10 + [MASK] * 10])
    quality = torch.linspace(0.0, 0.49, 20)[None]
    step = scheduler.step(torch.zeros(1, 20, VOCAB), 1, sample, quality=quality, mask_token_id=MASK)
    assert step.remasked.nonzero()[:, 1].tolist() == list(range(want))
    sure = scheduler.step(torch.zeros(1, 20, VOCAB), 1, sample, quality=quality + 0.5, mask_token_id=MASK)
    assert not sure.remasked.any()


def test_a_config_saved_with_the_old_name_of_the_bar_means_the_same():
    made = PrismScheduler.from_config({"_class_name": "PrismScheduler", "accept_quality": 0.4, "num_remask": 3})
    assert (made.config.quality_threshold, made.config.max_share, made.config.num_remask) == (0.4, 1.0, 3)
    none = PrismScheduler.from_config({"_class_name": "PrismScheduler", "accept_quality": None, "num_remask": 3})
    assert own_fields(none) == own_fields(PrismScheduler(num_remask=3))


# --- examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documented", [*KINDS, sample_tokens])
def test_the_example_of_a_docstring_gives_what_it_says(documented):
    names = {**vars(schedulers), "torch": torch, "RunContext": RunContext, "sample_tokens": sample_tokens}
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(documented), names, documented.__name__, None, 0)
    assert 3 <= len(example.examples) <= 5
    said = []
    failed, _ = doctest.DocTestRunner().run(example, out=said.append)
    assert not failed, "".join(said)


# --- arguments --------------------------------------------------------------------------------------------------------

WRONG_SAMPLING = [
    ("order", "best"),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", 0),
    ("top_k", 2.0),
    ("mask_token_id", -1),
    ("mask_token_id", True),
]
WRONG_REMASKING = [
    ("num_remask", -1),
    ("num_remask", 1.5),
    ("num_remask", True),
    ("eta", -0.1),
    ("eta", 1.5),
    ("eta", math.nan),
    ("eta_schedule", "linear"),
    ("eta_reference_steps", 0),
    ("remask_start", -0.1),
    ("remask_start", "half"),
    ("remask_end", 0.0),
    ("remask_end", 1.1),
    ("loop_steps", -1),
    ("loop_num_remask", -1),
    ("loop_at", 0),
    ("loop_at", 1.2),
    ("quality_threshold", 0),
    ("quality_threshold", 1.5),
    ("quality_threshold", "high"),
    ("max_share", 0),
    ("max_share", 1.5),
]


@pytest.mark.parametrize("name,value", WRONG_SAMPLING + WRONG_REMASKING)
def test_a_wrong_config_is_refused_by_name_and_value(name, value):
    kinds = REMASKERS
    for kind in [k for k in KINDS if takes(k, name)] if (name, value) in WRONG_SAMPLING else kinds:
        with pytest.raises(ValueError) as error:
            kind(**{name: value})
        assert f"`{name}` must be " in str(error.value) and f"got {value!r}" in str(error.value)


@pytest.mark.parametrize(
    "config,message",
    [
        ({"num_remask": 0, "eta": 0.0}, "`num_remask` and `eta` exclude each other"),
        ({"eta_schedule": "inverse", "eta_reference_steps": 3}, "`eta` must be"),
        ({"eta": 0.1, "eta_schedule": "inverse"}, "`eta_reference_steps` must be"),
        ({"loop_steps": 2}, "`loop_num_remask` must be an integer of at least 1"),
        ({"remask_start": 0.5, "remask_end": 0.5}, "`remask_end` must be"),
        ({"quality_threshold": 0.5, "eta": 0.1}, "`quality_threshold` is 0.5"),
        ({"quality_threshold": 0.5, "num_remask": 0}, "`quality_threshold` is 0.5"),
    ],
)
@pytest.mark.parametrize("kind", REMASKERS)
def test_fields_that_contradict_each_other_are_refused(kind, config, message):
    with pytest.raises(ValueError, match=message):
        kind(**config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments", [(0,), (-1,), (2.0,), (True,), (4, None, 0), (4, None, 2.5)])
def test_set_timesteps_wants_positive_integers(kind, arguments):
    with pytest.raises(ValueError, match=r"must be (None or )?an integer (of at least|from) 1"):
        kind().set_timesteps(*arguments)


def test_a_new_run_starts_over():
    scheduler = PrismScheduler(**LOOP)
    for steps in (5, 2):
        scheduler.set_timesteps(steps, device="cpu", block_length=32)
        assert scheduler.num_inference_steps == steps
        assert scheduler.timesteps.tolist() == list(range(steps + 3))


def context_for(kind):
    """The keyword argument `context` of a step on (2, 6) masks, for a scheduler that reads one."""
    sample = torch.full((2, 6), MASK)
    context = context_of(sample, torch.ones_like(sample, dtype=torch.bool), torch.rand(2, 6))
    return {"context": context} if getattr(kind, "reads_context", ()) else {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change,message",
    [
        ({"timestep": 4}, "`timestep` must be one of `timesteps`, which are 0 to 3, got 4"),
        ({"timestep": -1}, "`timestep`"),
        ({"sample": torch.zeros(6, dtype=torch.int64)}, r"`sample` must be token ids of shape \(B, L\)"),
        ({"sample": torch.zeros(2, 6)}, "`sample` must be token ids"),
        ({"model_output": torch.zeros(2, 5, VOCAB)}, r"`model_output` must be logits"),
        ({"model_output": torch.zeros(12, VOCAB)}, r"`model_output` must be logits"),
        ({"generation_mask": torch.ones(2, 6)}, r"`generation_mask` must be torch.bool \(2, 6\)"),
        ({"generation_mask": torch.ones(1, 6, dtype=torch.bool)}, r"`generation_mask` must be"),
        ({"mask_token_id": None}, "`mask_token_id` must be a token id"),
        ({"mask_token_id": "[MASK]"}, "`mask_token_id` must be a token id"),
        ({"temperature": -1}, "`temperature` must be"),
        ({"top_p": 0.0}, "`top_p` must be"),
        ({"top_k": 0}, "`top_k` must be"),
        ({"generator": [torch.Generator()] * 3}, "`generator` is a list of 3, but there are 2 rows"),
    ],
)
def test_step_refuses_wrong_arguments_by_name(kind, change, message):
    scheduler = kind()
    scheduler.set_timesteps(4)
    call = {"model_output": torch.zeros(2, 6, VOCAB), "timestep": 1, "sample": torch.full((2, 6), MASK)}
    call |= {"mask_token_id": MASK, "quality": torch.rand(2, 6), **context_for(kind), **change}
    with pytest.raises(ValueError, match=message):
        scheduler.step(**call)


@pytest.mark.parametrize("quality", [torch.rand(2, 5), torch.rand(2, 6, 1), torch.ones(2, 6, dtype=torch.int64)])
def test_quality_must_be_floats_of_the_shape_of_the_sample(quality):
    scheduler = PrismScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`quality` must be floats of shape"):
        scheduler.step(torch.zeros(2, 6, VOCAB), 1, torch.full((2, 6), MASK), quality=quality)


@pytest.mark.parametrize("kind", KINDS)
def test_step_before_set_timesteps_says_what_to_call(kind):
    with pytest.raises(ValueError, match="call `set_timesteps"):
        kind().step(torch.zeros(1, 2, VOCAB), 0, torch.full((1, 2), MASK), mask_token_id=MASK)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_step_go_before_the_config(kind):
    logits = torch.tensor([0.0, 1.0, 2.0, 0.0, 0.0]).expand(1, 300, VOCAB)
    fields = {"num_remask": 0} if takes(kind, "num_remask") else {}
    scheduler = kind(temperature=1.0, mask_token_id=4, **fields)
    scheduler.set_timesteps(least_steps(kind))
    sample = torch.full((1, 300), MASK)
    given = {"mask_token_id": MASK, "generator": torch.Generator().manual_seed(0)}
    given |= {"quality": torch.ones(1, 300)}
    assert scheduler.step(logits, 0, sample, **given).sampled_tokens.unique().tolist() == [0, 1, 2, 4]
    assert scheduler.step(logits, 0, sample, top_k=2, **given).sampled_tokens.unique().tolist() == [1, 2]
    assert scheduler.step(logits, 0, sample, top_p=0.01, **given).sampled_tokens.unique().tolist() == [2]
    assert scheduler.step(logits, 0, sample, temperature=0, **given).sampled_tokens.unique().tolist() == [2]


@pytest.mark.parametrize("kind", KINDS)
def test_return_dict_false_gives_the_fields_in_order(kind):
    scheduler = kind(mask_token_id=MASK, temperature=0)
    scheduler.set_timesteps(2)
    call = (torch.zeros(2, 6, VOCAB), torch.tensor(0), torch.full((2, 6), MASK))
    one, two = (torch.Generator().manual_seed(0) for _ in range(2))
    given = {"quality": torch.rand(2, 6), **context_for(kind)}
    output = scheduler.step(*call, **given, generator=one)
    fields = scheduler.step(*call, **given, generator=two, return_dict=False)
    names = ["prev_sample", "unmasked", "remasked", "sampled_tokens", "sampled_probs"]
    names += ["finished", "accepted", "restored", "judged"] if kind is JudgeAndRepairScheduler else []
    assert list(output.keys()) == names and isinstance(fields, tuple)
    for name, value in zip(names, fields, strict=True):
        torch.testing.assert_close(output[name], value, rtol=0, atol=0, equal_nan=True)


# --- diffusers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remasking", REMASKING, ids=str)
def test_a_config_survives_saving_and_the_switch_between_schedulers(remasking, tmp_path):
    scheduler = PrismScheduler(order="margin", temperature=0.5, top_p=0.9, mask_token_id=7, **remasking)
    scheduler.save_pretrained(tmp_path)
    json.loads((tmp_path / "scheduler_config.json").read_text())
    loaded = PrismScheduler.from_pretrained(tmp_path)
    own = SelfConfidenceScheduler.from_config(scheduler.config)
    changed = PrismScheduler.from_config(own.config, order="random")
    plain = MDLMScheduler.from_config(scheduler.config)
    for key, value in scheduler.config.items():
        if not key.startswith("_"):
            assert loaded.config[key] == own.config[key] == value
            assert changed.config[key] == ("random" if key == "order" else value)
            assert plain.config.get(key, value) == value


def test_what_another_class_had_is_kept_in_silence_and_is_no_field(monkeypatch):
    said = []
    monkeypatch.setattr("diffusers.configuration_utils.logger.warning", said.append)
    scheduler = PrismScheduler(eta=0.3, remask_start=0.5, loop_steps=2, loop_num_remask=3)
    plain = MDLMScheduler.from_config(MDLMScheduler.from_config(scheduler.config).config)
    assert own_fields(plain) == own_fields(MDLMScheduler())
    assert own_fields(PrismScheduler.from_config(plain.config)) == own_fields(scheduler)
    assert not said
    MDLMScheduler.from_config({**plain.config, "num_remsk": 2})
    assert "num_remsk" in said[0]


SETTINGS = [(kind, fields) for kind in KINDS for fields in BASELINES.get(kind, [{}, {"order": "margin", "top_p": 0.8}])]
SETTINGS += [(kind, fields) for kind in REMASKERS for fields in REMASKING + BY_THRESHOLD]


@pytest.mark.parametrize("between", KINDS)
def test_from_a_to_b_to_a_gives_the_config_of_a_back_in_silence(between, monkeypatch, tmp_path):
    """For all pairs of rules: a field has one meaning, so b takes those that it has and keeps the others."""
    said = []
    monkeypatch.setattr("diffusers.configuration_utils.logger.warning", said.append)
    for number, (kind, fields) in enumerate(SETTINGS):
        there = between.from_config(kind(**fields).config)
        if number % 10 == 0:  # also over the disk
            there.save_pretrained(tmp_path)
            assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == between.__name__
            there = between.from_pretrained(tmp_path)
        back = kind.from_config(there.config)
        assert own_fields(back) == own_fields(kind(**fields)), (kind, fields)
    assert not said


@pytest.mark.parametrize("kind", KINDS)
def test_a_subclass_of_a_users_takes_and_gives_what_its_rule_does(kind, tmp_path):
    subclass = type("Mine", (kind,), {})
    made = subclass(temperature=0.5)
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "Mine"
    for config in (made.config, saved, saved | {"_class_name": "NotHere"}):
        assert own_fields(kind.from_config(config)) == own_fields(subclass.from_config(config)) == own_fields(made)


def test_a_threshold_of_diffusers_is_that_of_prism_and_of_no_other_rule():
    from diffusers import BlockRefinementScheduler

    theirs = dict(BlockRefinementScheduler(threshold=0.8).config) | {"_class_name": "BlockRefinementScheduler"}
    assert own_fields(TokenToMaskScheduler.from_config(theirs)) == own_fields(TokenToMaskScheduler())
    assert PrismScheduler.from_config(theirs).config.threshold == 0.8


def test_a_new_rule_is_known_to_the_others_by_being_written(monkeypatch):
    class New(MDMSchedulerMixin):
        @register_to_config
        def __init__(self, strength: float = 3.0, temperature: float = 1.0):
            pass

    said = []
    monkeypatch.setattr("diffusers.configuration_utils.logger.warning", said.append)
    for kind in KINDS:
        there = kind.from_config(New(strength=0.5, temperature=0.25).config)
        assert there.config.temperature == 0.25 and New.from_config(there.config).config.strength == 0.5
    assert not said and New in PrismScheduler().compatibles


AMOUNTS = [{"eta": 0.1}, {"num_remask": 0}, {"num_remask": 2}, {"quality_threshold": 0.5}]


@pytest.mark.parametrize("first,second", list(itertools.permutations(AMOUNTS, 2)), ids=str)
def test_from_every_amount_of_remasking_one_can_go_to_every_other_and_back(first, second):
    there = PrismScheduler.from_config(PrismScheduler(**first).config, **second)
    back = PrismScheduler.from_config(there.config, **first)
    assert there.config.items() >= second.items() and back.config.items() >= first.items()


@pytest.mark.parametrize("kind", REMASKERS)
def test_an_amount_given_takes_the_place_of_the_other_in_the_config(kind):
    by_eta = PrismScheduler(eta=0.3, eta_schedule="inverse", eta_reference_steps=64, temperature=0.5)
    by_number = kind.from_config(by_eta.config, num_remask=4)
    assert by_number.config.num_remask == 4 and by_number.config.eta is None and by_number.config.temperature == 0.5
    again = kind.from_config(by_number.config, eta=0.2)
    assert again.config.eta == 0.2 and again.config.num_remask is None
    with pytest.raises(ValueError, match="exclude each other"):
        kind.from_config(by_eta.config, num_remask=4, eta=0.2)


def test_the_config_of_diffusers_block_refinement_scheduler_is_accepted():
    from diffusers import BlockRefinementScheduler

    scheduler = PrismScheduler.from_config(BlockRefinementScheduler(block_length=8).config)
    assert scheduler.can_remask and scheduler.order == 1
