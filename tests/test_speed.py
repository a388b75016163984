"""What makes sampling fast leaves its result as it was: chunks, lazy logits, no mask, compiled. Waits are counted."""

import itertools
import json
from collections import Counter

import pytest
import torch
from family_twins import CHECKPOINTS, MASK, checkpoint, load, some_ids
from test_functional import reveal
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import performance, sampling
from prism_pipelines import MDLMScheduler, PrismScheduler, QualityHead, SelfConfidenceScheduler
from prism_pipelines.models.denoiser import UNMASKED, LazyLogits, OutputHeadHook, not_causal
from prism_pipelines.schedulers import token_sampling
from prism_pipelines.schedulers.functional import ORDERS
from prism_pipelines.schedulers.token_sampling import (
    Sampling,
    first_largest,
    probabilities,
    sample_tokens,
    true_positions,
)

INF = float("inf")
FULL = [family for family, (_, block, _) in CHECKPOINTS.items() if not block]
SETTINGS = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.6, "top_k": 5}, {"top_p": 0.8}]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def logits_of(kind, rows, vocab, generator=None):
    """Random logits: flat, peaked, full of ties, with impossible tokens, or extreme."""
    logits = torch.randn(rows, vocab, generator=generator or seeded())
    return {
        "flat": logits,
        "peaked": logits * 8,
        "ties": logits.mul(2).round(),
        "bfloat16": (logits * 4).bfloat16(),
        "impossible": logits.masked_fill(torch.rand(logits.shape, generator=seeded(1)) < 0.5, -INF),
        "extreme": logits.clamp(-1, 1) * 1e4,
    }[kind]


KINDS = ("flat", "peaked", "ties", "bfloat16", "impossible", "extreme")

# --- the parts against the slow way -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 2, 3, 16, 17, 97, 1000])
def test_first_largest_is_argmax(kind, vocab):
    logits = logits_of(kind, 50, vocab)
    best = [row.index(max(row)) for row in logits.tolist()]
    assert first_largest(logits).tolist() == best
    assert first_largest(torch.full((2, vocab), -INF)).tolist() == [0, 0]


@pytest.mark.parametrize("vocab", [5, 5000, 126_464])
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_those_of_float64(kind, vocab):
    logits = logits_of(kind, 4, vocab)
    want = logits.double().softmax(-1)
    got = probabilities(logits).double()
    likely = want > 1e-6
    torch.testing.assert_close(got[likely], want[likely], rtol=3e-6, atol=0)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-40)  # exp(-80.0): the last digit of 80.0 counts 80 times


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_nucleus_found_among_the_first_is_that_of_the_whole_sorted_vocabulary(monkeypatch, kind, top_p, temperature):
    logits, u = logits_of(kind, 200, 203), torch.rand(200, generator=seeded(2))
    found = []
    for first in (4, 16, 50, 10**6):  # the last sorts everything
        monkeypatch.setattr(token_sampling, "NUCLEUS", first)
        found.append(sample_tokens(logits, temperature, top_p, u=u))
    for tokens, probs in found[:-1]:
        assert torch.equal(tokens, found[-1][0]) and torch.equal(probs, found[-1][1])


def test_draws_from_a_large_vocabulary_follow_their_probabilities_to_the_tail():
    """Zipf's law over 126,464 tokens about a logit of 1e4: tokens in bins of a rank that doubles."""
    vocab, draws = 126_464, 4000
    logits = 1e4 - torch.arange(1, vocab + 1).double().log()
    p = logits.float().double().softmax(-1)  # what float32 leaves of them near 1e4
    generator = seeded(3)
    tokens = torch.cat([sample_tokens(logits.float().expand(100, -1), generator=generator)[0] for _ in range(40)])
    edges = [0, *(2**k - 1 for k in range(1, 17)), vocab]
    counts = torch.histogram(tokens.double(), torch.tensor(edges).double() - 0.5).hist
    want = torch.stack([p[a:b].sum() for a, b in itertools.pairwise(edges)]) * draws
    assert want.min() > 5 and len(want) == 17
    assert ((counts - want) ** 2 / want).sum() < 39.3  # 16 degrees of freedom, p = 0.001


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_chunks_change_nothing(monkeypatch, order, settings):
    logits = torch.randn(3, 9, 30, generator=seeded())
    masked = torch.rand(3, 9, generator=seeded(1)) < 0.7
    sampling = Sampling(**settings)
    u = torch.rand(2, 3, 9, generator=seeded(2))
    found = []
    for chunk in (1, 30, 70, 10**9):  # one row at a time, one, two, all
        monkeypatch.setattr(token_sampling, "CHUNK", chunk)
        found.append(reveal(logits, masked, torch.tensor([2, 3, 9]), order, sampling, 29, *u))
    for other in found[:-1]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[-1], strict=True))


def test_temperature_0_writes_the_likeliest_tokens_at_the_surest_masks():
    logits = torch.randn(4, 8, 50, generator=seeded()) * 3
    masked = torch.rand(4, 8, generator=seeded(1)) < 0.8
    n, mask_id = torch.tensor([1, 2, 3, 20]), 7
    u = torch.rand(2, 4, 8, generator=seeded(2))
    unmasked, tokens, _ = reveal(logits, masked, n, "confidence", Sampling(0.0), mask_id, *u)
    want = []
    for b in range(4):
        rows = {}
        for i in masked[b].nonzero().flatten().tolist():
            row = logits[b, i].double()
            row[mask_id] = -INF
            rows[i] = (-row.softmax(-1).max().item(), i, row.argmax().item())
        want += [(b, i, token) for _, i, token in sorted(sorted(rows.values())[: n[b]], key=lambda found: found[1])]
    assert unmasked.nonzero().tolist() == [[b, i] for b, i, _ in want]
    assert tokens.tolist() == [token for *_, token in want]


def test_true_positions_are_those_of_nonzero():
    for mask in (torch.rand(4, 7, generator=seeded()) < 0.4, torch.zeros(0, 3) > 0, torch.rand(9) < 0.5):
        want = mask.nonzero(as_tuple=True)
        assert all(torch.equal(a, b) for a, b in zip(true_positions(mask, len(want[0])), want, strict=True))


# --- lazy and dense, in chunks ----------------------------------------------------------------------------------------


@torch.no_grad()
def both_ways(pipe, scheduler, ids):
    """The tokens of a whole run from lazy and from dense logits, and the most rows that the output head was given."""
    rows, found = [], []
    head = pipe.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: rows.append(out.shape[:-1].numel()))
    generated, denoiser = ids == MASK, pipe.denoiser
    for dense in (False, True):
        sample, generator = ids, seeded(5)
        scheduler.set_timesteps(6)
        for t in scheduler.timesteps:
            hidden = denoiser.hidden(sample)
            output = LazyLogits(denoiser, hidden)
            if dense:
                everywhere = torch.ones_like(generated)
                output = denoiser.logits(hidden, everywhere).view(*ids.shape, -1)
            quality = hidden.float().mean(-1)
            step = scheduler.step(
                output, t, sample, quality=quality, generation_mask=generated, mask_token_id=MASK, generator=generator
            )
            sample = step.prev_sample
        found.append(sample)
        if not dense:
            most = max(rows)
    hook.remove()
    return *found, most


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["llada", "Dream", "esm"])
def test_lazy_logits_in_chunks_write_the_tokens_of_dense_ones(monkeypatch, family, order, settings):
    pipe, ids = load(checkpoint(family)), some_ids()
    monkeypatch.setattr(token_sampling, "CHUNK", 7 * pipe.denoiser.vocab_size)
    lazy, dense, most = both_ways(pipe, PrismScheduler(order=order, num_remask=2, **settings), ids)
    assert torch.equal(lazy, dense) and not (lazy == MASK).any()
    assert most <= 7


# --- no mask where all is seen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FULL)
def test_a_mask_of_zeros_is_left_out_and_nothing_changes(monkeypatch, family):
    pipe, ids, masks = load(checkpoint(family)), some_ids(), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args, attn_mask=None, is_causal=False, **more):
        masks.append((attn_mask is None, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    config = pipe.model.config.to_dict()
    with torch.no_grad():
        free = pipe.denoiser.hidden(ids)
        if pipe.denoiser.spec.mask_format == "additive":
            assert set(masks) == {(True, False)}  # no mask, not causal
            assert type(pipe.model).__name__ in UNMASKED
        monkeypatch.setattr(type(pipe.denoiser), "_sees_all_without_mask", lambda self: False)
        masked = pipe.denoiser.hidden(ids)
    torch.testing.assert_close(free, masked, rtol=0, atol=1e-5)
    assert pipe.model.config.to_dict() == config


def test_the_mask_stays_where_it_says_something_or_attention_is_written_out():
    ids, padded = some_ids(), torch.ones(3, 40, dtype=torch.long)
    padded[1, :5] = 0
    llada, sdar = load(checkpoint("llada")).denoiser, load(checkpoint("sdar")).denoiser
    assert "attention_mask" not in llada.inputs(ids) and llada.inputs(ids)["is_causal"] is False
    assert llada.inputs(ids, padded)["attention_mask"].shape == (3, 1, 40, 40)
    assert sdar.inputs(ids)["attention_mask"].shape == (3, 1, 40, 40)
    llada.model.set_attn_implementation("eager")
    assert llada.inputs(ids)["attention_mask"].shape == (3, 1, 40, 40)


def test_a_config_that_says_it_is_causal_says_so_again():
    config = load(checkpoint("llada")).model.config
    config.is_causal = True
    with pytest.raises(KeyError), not_causal(config):
        assert config.is_causal is False
        raise KeyError
    assert config.is_causal is True


# --- compiled ---------------------------------------------------------------------------------------------------------


def run(pipe, rows=2, **call):
    settings = {"gen_length": 16, "block_length": 8, "num_inference_steps": 16, "output_type": "seq"}
    prompt = torch.randint(8, MASK, (rows, 6), generator=seeded(1))
    return pipe(input_ids=prompt, generator=seeded(4), **(settings | call)).sequences


# Without a mask; with one; an encoder with a transform before its head.
@pytest.mark.parametrize(
    "family,backend",
    [
        pytest.param("llada", "aot_eager", marks=pytest.mark.slow),
        ("sdar", "eager"),
        pytest.param("bert", "eager", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_takes_one_graph_for_a_run_and_writes_the_same_tokens(family, backend):
    torch._dynamo.reset()
    pipe = load(checkpoint(family))
    pipe.quality_head, pipe.scheduler = QualityHead(32, "mlp"), PrismScheduler(order="confidence", num_remask=1)
    eager, shape = run(pipe), some_ids(2, 30)
    with torch.no_grad():
        plain = pipe.model(input_ids=shape).logits
    body, head = CompileCounterWithBackend(backend), CompileCounterWithBackend(backend)
    pipe.model.compile(backend=body, fullgraph=True)
    assert torch.equal(run(pipe), eager) and body.frame_count == 1
    assert torch.equal(run(pipe), eager) and body.frame_count == 1  # nor in the next run
    run(pipe, rows=3, num_inference_steps=3), run(pipe, rows=5, num_inference_steps=3)
    assert body.frame_count == 2  # another batch: one more, for all sizes
    with torch.no_grad():
        assert torch.equal(pipe.model(input_ids=shape).logits, plain)  # a call from outside gets its logits

    pipe.model.get_output_embeddings().compile(backend=head, dynamic=True)
    assert torch.equal(run(pipe), eager)
    before = head.frame_count
    run(pipe)
    assert head.frame_count == before <= 2  # a single row has a graph of its own


def test_the_hook_is_put_on_once_and_lets_other_calls_through():
    pipe, ids = load(checkpoint("llada")), some_ids()
    head = pipe.model.get_output_embeddings()
    with torch.no_grad():
        for _ in range(3):
            pipe.denoiser.hidden(ids)
        assert sum(isinstance(hook, OutputHeadHook) for hook in head._forward_pre_hooks.values()) == 1
        assert pipe.model(input_ids=ids).logits.shape == (3, 40, 40)
        bad = ids.clone().fill_(10**6)
        with pytest.raises(IndexError):
            pipe.denoiser.hidden(bad)
        assert pipe.model(input_ids=ids).logits.shape == (3, 40, 40)  # also after a failure
    assert OutputHeadHook.of(head).mine.caught is None


# --- waiting for the device -------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: reading a number, and results whose size depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        by_mask = name.startswith(("index", "_index_put")) and any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool
            for arg in args[1:]
            if isinstance(arg, (list, tuple))
            for part in arg
        )
        if name in self.NAMES or by_mask:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def waits_of(scheduler, ids, **sampling):
    """The most waits of a step of a run, made of LLaDA's twin."""
    pipe, generated, most = load(checkpoint("llada")), ids == MASK, 0
    pipe.scheduler, denoiser, sample = scheduler, pipe.denoiser, ids
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        with torch.no_grad(), Waits() as waits:
            hidden = denoiser.hidden(sample)
            sample = scheduler.step(
                LazyLogits(denoiser, hidden),
                t,
                sample,
                quality=hidden.mean(-1),
                generation_mask=generated,
                mask_token_id=MASK,
                generator=seeded(),
                **sampling,
            ).prev_sample
        most = max(most, waits.seen.total())
    return most


@pytest.mark.parametrize("sampling", SETTINGS[:3], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [MDLMScheduler, PrismScheduler])
def test_a_step_waits_for_the_device_once(kind, order, sampling):
    remasking = {"num_remask": 1} if kind is PrismScheduler else {}
    assert waits_of(kind(order=order, **remasking), some_ids(), **sampling) <= 1


def test_what_waits_more_often_and_how_often(monkeypatch):
    monkeypatch.setattr(token_sampling, "NUCLEUS", 8)
    assert waits_of(MDLMScheduler(order="confidence"), some_ids(), top_p=0.5) == 2
    assert waits_of(MDLMScheduler(order="confidence", use_threshold=True, threshold=0.1), some_ids()) == 2
    assert waits_of(SelfConfidenceScheduler(order="confidence", num_remask=1), some_ids()) > 1


def test_the_counter_counts():
    mask = torch.tensor([True, False])
    with Waits() as waits:
        mask.nonzero(), mask[mask], mask.any().item(), torch.zeros(2).masked_fill(mask, 1), bool(mask.all())
    assert waits.seen.total() == 4


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_the_benchmark_compares_with_bare_forwards(capsys, tmp_path):
    threads = torch.get_num_threads()
    try:
        sampling.main(["--shape=smoke", "--batch-size=2", "--arms=greedy", "--repeats=1", f"--out={tmp_path / 'x'}"])
    finally:
        torch.set_num_threads(threads)
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "x").read_text()) == table
    rows = {row["arm"]: row for row in table["rows"]}
    assert set(rows) == {"full", "block floor", "row floor"} | {
        f"{name}, greedy" for name in ("MDLM", "PRISM", "LLaDA2Pipeline")
    }
    for row in rows.values():
        assert row["by_full"] == pytest.approx(min(row["turns_s"]) / min(rows["full"]["turns_s"]))
        assert row["forwards_per_token"] == 0.5 and row["total_by_inside"] >= 1


def test_the_page_on_performance_is_what_the_tables_give():
    assert performance.main(["--check"]) == 0
