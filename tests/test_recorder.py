"""What a run knows of its tokens, against a replay that runs the whole model and sorts nothing out by batch."""

import math
from dataclasses import replace

import accelerate
import pytest
import torch
from family_twins import (
    BLOCK_CAUSAL,
    CHECKPOINTS,
    EOS,
    LENGTH,
    MASK,
    PAD,
    SHIFTED,
    H,
    aligned,
    checkpoint,
    load,
    some_ids,
)
from torch import nn

from prism_pipelines import MDLMScheduler, PrismPipeline, PrismScheduler, QualityHead, SelfConfidenceScheduler, bundled
from prism_pipelines.models.denoiser import MaskedDenoiser, soft_cap
from prism_pipelines.sampling.canvas import canvas_of_infill, given_positions
from prism_pipelines.sampling.recorder import RunRecorder
from prism_pipelines.schedulers.context import INPUTS, context_features, forget, num_features

LOGS = ("draw_logprob", "prompt_logprob", "first_max", "first_entropy", "own_logprob", "own_mean", "own_min")
FAMILIES = ("llada", "Dream", "sdar", "Fast_dLLM_Qwen", "mdlm", "bert", "gpt2:diffugpt")


class Watching(SelfConfidenceScheduler):
    """`SelfConfidenceScheduler` that reads all and keeps what it was given."""

    reads_context = tuple(INPUTS)
    passes = []  # noqa: RUF012

    def step(self, model_output, timestep, sample, *, context, **given):
        output = super().step(model_output, timestep, sample, **given)
        Watching.passes.append((sample, given["generation_mask"], context, output))  # a run has a copy of its own
        return output


def context_head(architecture="block_mlp", reads=tuple(INPUTS)):
    torch.manual_seed(4)
    head = QualityHead(H, architecture, context=reads)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head


def prompts(lengths=(6, 3, 5)):
    ids, width = some_ids(len(lengths), max(lengths), seed=5), max(lengths)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length], mask[row, : width - length] = PAD, 0
    return {"input_ids": ids.masked_fill(ids == MASK, 8), "attention_mask": mask}


def seeds(rows, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(rows)]


def watched(pipe, **call):
    pipe.scheduler, Watching.passes = Watching(num_remask=2), []
    out = pipe(**{"gen_length": 10, "num_inference_steps": 8, "generator": seeds(3), "output_type": "seq"} | call)
    return Watching.passes, out


def replay(pipe, passes, attention_mask, cfg_scale=0.0, generated=None):
    """Each pass's context, recomputed for one row and position at a time, as lists of dicts."""
    rows, length = passes[0][0].shape
    generated = torch.stack([gm for _, gm, _, _ in passes]).any(0) if generated is None else generated
    now = [-1] * rows
    first, drawn, own, remasks, expected = {}, {}, {}, {}, []
    before = None  # what the step before gave
    for sample, gm, _, output in passes:
        logits = aligned(pipe, sample, attention_mask)
        logp = logits.log_softmax(-1)
        drawing = logits
        if cfg_scale:
            free = aligned(pipe, torch.where(generated, sample, MASK), attention_mask)
            drawing = (free + (cfg_scale + 1) * (logits - free)).masked_fill(logits.isneginf(), -math.inf)
        drawing = drawing.log_softmax(-1)
        facts = {}
        for b in range(rows):
            now[b] += bool(gm[b].any())
            for i in range(length):
                token, at = int(sample[b, i]), (b, i)
                if before is not None and token != int(before[b, i]):
                    drawn.pop(at, None), own.pop(at, None)  # somebody else wrote here
                if gm[b, i] and token == MASK and at not in first:
                    first[at] = logp[b, i]
                if gm[b, i] and token != MASK:
                    own.setdefault(at, []).append(float(logp[b, i, token]))
                visible = token != MASK and bool(generated[b, i])
                facts[at] = {
                    "written_at": drawn[at][0] if at in drawn else -1,
                    "draw_logprob": drawn[at][1] if at in drawn else math.nan,
                    "num_remasked": remasks.get(at, 0),
                    "prompt_logprob": float(first[at][token]) if visible and at in first else math.nan,
                    "first_max": float(first[at].max()) if at in first else math.nan,
                    "first_entropy": float(-(first[at].exp() * first[at]).nan_to_num(0).sum())
                    if at in first
                    else math.nan,
                    "own_logprob": own[at][-1] if at in own else math.nan,
                    "own_mean": sum(own[at]) / len(own[at]) if at in own else math.nan,
                    "own_min": min(own[at]) if at in own else math.nan,
                }
                new = int(output.prev_sample[b, i])
                if new != token and new == MASK:
                    remasks[at] = remasks.get(at, 0) + 1
                    drawn.pop(at, None), own.pop(at, None)
                elif new != token:
                    drawn[at] = (now[b], float(drawing[b, i, new]))
        expected.append((list(now), facts))
        before = output.prev_sample
    return expected


def assert_as_replayed(passes, expected, atol=2e-5):
    assert any(facts["num_remasked"] for _, places in expected for facts in places.values())
    for (_, gm, context, _), (now, places) in zip(passes, expected, strict=True):
        took_part = gm.any(-1)
        assert context.now[took_part].tolist() == [n for n, part in zip(now, took_part, strict=True) if part]
        for name in ("written_at", "num_remasked", *LOGS):
            found = getattr(context, name)[took_part].double()
            facts = [[places[b, i][name] for i in range(gm.shape[1])] for b in range(len(gm)) if took_part[b]]
            wanted = torch.tensor(facts, dtype=torch.float64)
            torch.testing.assert_close(
                found, wanted, rtol=0, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_recorded_is_what_a_replay_finds(family):
    pipe, given = load(checkpoint(family)), prompts()
    own_block = CHECKPOINTS[family][1]
    for block_length in (None, 4):
        blocks = {"block_length": None if own_block else block_length, "num_inference_steps": 24}
        passes, out = watched(pipe, **given, **blocks)
        canvas_mask = torch.cat([given["attention_mask"], torch.ones(3, 10, dtype=torch.long)], 1)
        assert_as_replayed(passes, replay(pipe, passes, canvas_mask))
        assert len(passes) == out.nfe


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_under_guidance_the_model_with_the_prompt_is_recorded(family):
    pipe, given = load(checkpoint(family)), prompts()
    passes, _ = watched(pipe, **given, cfg_scale=1.5)
    canvas_mask = torch.cat([given["attention_mask"], torch.ones(3, 10, dtype=torch.long)], 1)
    assert_as_replayed(passes, replay(pipe, passes, canvas_mask, cfg_scale=1.5), atol=1e-4)


@pytest.mark.parametrize("family", ["llada", "Dream", "sdar"])
def test_first_hidden_is_what_predicted_the_position_in_its_first_pass(family):
    pipe, shift = load(checkpoint(family)), int(family in SHIFTED)
    passes, _ = watched(pipe, **prompts((6, 6, 6)), block_length=4)
    seen = {}
    for sample, gm, context, _ in passes:
        hidden = pipe.denoiser.hidden(sample)
        for b, i in gm.nonzero().tolist():
            seen.setdefault((b, i), hidden[b, i - shift])
        for b in range(len(sample)):
            for i in range(sample.shape[1]):
                expected = seen.get((b, i), torch.zeros(H))
                torch.testing.assert_close(context.first_hidden[b, i], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", list(CHECKPOINTS))
def test_the_row_of_a_token_gives_its_logit_by_a_dot_product(family):
    denoiser, ids = load(checkpoint(family)).denoiser, some_ids(2, 7)
    ids[0, 3] = MASK
    rows, hidden = denoiser.token_rows(ids), denoiser.hidden(ids)
    assert rows.shape == hidden.shape and rows.dtype == hidden.dtype
    assert not rows[0, 3].any() and rows[ids != MASK].any(-1).all()
    found = (rows * hidden).sum(-1)[ids != MASK]
    hidden, tokens = hidden[ids != MASK], ids[ids != MASK]
    bias = denoiser.token_logits(torch.zeros_like(hidden), tokens)
    found = soft_cap(found + bias, denoiser.spec.logit_cap)
    torch.testing.assert_close(found, denoiser.token_logits(hidden, tokens), rtol=1e-4, atol=1e-5)


def test_rows_of_tokens_are_those_of_the_canvas_of_each_pass_and_recorded_only_if_asked():
    pipe = load(checkpoint("llada"))
    passes, _ = watched(pipe, **prompts())
    for sample, _, context, _ in passes:
        assert torch.equal(context.token_rows, pipe.denoiser.token_rows(sample))
    recorder = RunRecorder(pipe.denoiser, torch.ones(1, 4, dtype=torch.bool), ("age",))
    assert recorder.observe(some_ids(1, 4), torch.zeros(1, 4, H)).token_rows is None


def test_rows_of_a_quantized_output_head_are_refused_and_those_of_an_offloaded_one_loaded():
    denoiser, ids = load(checkpoint("llada")).denoiser, some_ids(2, 7)
    expected, head = denoiser.token_rows(ids), denoiser._output_head()
    accelerate.cpu_offload(denoiser.model, execution_device="cpu")
    assert head.weight.is_meta and torch.equal(denoiser.token_rows(ids), expected) and head.weight.is_meta
    accelerate.hooks.remove_hook_from_submodules(denoiser.model)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        head.weight = nn.Parameter(expected[0].to(dtype), requires_grad=False)
        with pytest.raises(ValueError, match=rf'reads "token".*quantized to {dtype}'):
            denoiser.token_rows(ids)


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_a_cache_changes_nothing_that_is_known_of_a_block_causal_model(family):
    pipe, given = load(checkpoint(family), quality_head=context_head("mlp")), prompts()
    length = CHECKPOINTS[family][1] + 7
    plain, out = watched(pipe, **given, gen_length=length, num_inference_steps=20)
    cached, cached_out = watched(pipe, **given, gen_length=length, num_inference_steps=20, cache="prefix")
    assert torch.equal(out.sequences, cached_out.sequences)
    for (_, _, one, _), (_, _, other, _) in zip(plain, cached, strict=True):
        for name in ("now", "written_at", "num_remasked", *LOGS, "first_hidden"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("family", ["llada", "Dream", "sdar", "bert"])
@pytest.mark.parametrize("architecture", ["mlp", "block_mlp"])
def test_a_head_with_context_judges_a_row_alone_as_in_its_batch(family, architecture):
    pipe, given = load(checkpoint(family), quality_head=context_head(architecture)), prompts()
    call = {"gen_length": 8, "num_inference_steps": 12, "output_type": "seq", "return_quality": True}
    call |= {"block_length": 4, "threshold": 0.05}  # rows leave their blocks at different times
    pipe.scheduler = PrismScheduler(num_remask=1, order="confidence")
    together = pipe(**given, **call, generator=seeds(3))
    for row in range(3):
        ids = given["input_ids"][row : row + 1, given["attention_mask"][row].bool()]
        alone = pipe(input_ids=ids, **call, generator=seeds(1, row))
        assert torch.equal(alone.sequences[0, -8:], together.sequences[row, -8:])
        torch.testing.assert_close(alone.quality[0, -8:], together.quality[row, -8:], rtol=0, atol=2e-5)
    assert len(set(together.nfe_per_row)) > 1 or family != "bert"


def test_a_callback_that_writes_is_noticed_and_what_it_wrote_was_drawn_by_nobody():
    pipe, given, wrote = load(checkpoint("llada")), prompts((5, 5, 5)), []

    def callback(_, step, timestep, tensors):
        sample = tensors["sample"].clone()
        if step == 3:
            visible = (tensors["generation_mask"] & (sample != MASK)).nonzero()
            for b, i in visible[:2].tolist():
                sample[b, i] = 8 + (int(sample[b, i]) == 8)
                wrote.append((b, i))
            b, i = (tensors["generation_mask"] & (sample == MASK)).nonzero()[0].tolist()
            sample[b, i] = 9
            wrote.append((b, i))
        return {"sample": sample}

    passes, _ = watched(pipe, input_ids=given["input_ids"], callback_on_step_end=callback)
    assert_as_replayed(passes, replay(pipe, passes, None))
    context = passes[4][2]
    for b, i in wrote:
        assert context.written_at[b, i] == -1 and context.draw_logprob[b, i].isnan()
        assert context.prompt_logprob[b, i] < 0  # the first pass has said something of every token


def test_the_end_tokens_that_fill_a_finished_row_were_drawn_by_nobody():
    pipe, recorded = load(checkpoint("llada"), quality_head=context_head("mlp")), []
    pipe.scheduler, observe = MDLMScheduler(), RunRecorder.observe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunRecorder, "observe", lambda *args: recorded.append(observe(*args)) or recorded[-1])

        def end_at_once(_, step, timestep, tensors):
            if step == 0:
                tensors["sample"][:, 5] = EOS
            return None

        out = pipe(
            input_ids=prompts((5, 5, 5))["input_ids"],
            gen_length=8,
            block_length=4,
            num_inference_steps=8,
            eos_token_id=EOS,
            eos_early_stop=True,
            return_quality=True,
            callback_on_step_end=end_at_once,
            output_type="seq",
        )
    assert (out.sequences[:, 9:] == EOS).all()
    assert (recorded[-1].written_at[:, 9:] == -1).all() and recorded[-1].draw_logprob[:, 9:].isnan().all()


# --- what it costs ----------------------------------------------------------------------------------------------------


def head_rows(pipe):
    """How many rows the output head is asked for at a time."""
    asked = []
    head = pipe.denoiser._output_head()
    head.register_forward_pre_hook(lambda module, args: asked.append(args[0].shape[:-1].numel()))
    return asked


def test_nothing_is_recorded_where_nobody_asks_and_a_head_without_context_is_as_before(monkeypatch):
    monkeypatch.setattr(RunRecorder, "__init__", lambda *args: pytest.fail("nobody reads it"))
    pipe = load(checkpoint("llada"), quality_head=QualityHead(H, "mlp"))
    pipe(gen_length=6, num_inference_steps=4, return_quality=True)


def test_the_output_head_runs_once_more_at_each_generated_position_and_no_further_forward_is_made(monkeypatch):
    rows, forwards = {}, {}
    for reads in ((), ("draw", "age", "given", "remasks", "fill"), ("first_hidden", "token"), ("prompt", "draw")):
        pipe = load(checkpoint("llada"), quality_head=context_head("mlp", reads))
        pipe.scheduler, asked = PrismScheduler(num_remask=1), head_rows(pipe)
        out = pipe(gen_length=9, num_samples=2, num_inference_steps=6, generator=seeds(2), output_type="seq")
        rows[reads], forwards[reads] = sum(asked), out.nfe
    assert set(forwards.values()) == {6}
    drawn = rows.pop(())
    assert rows.pop(("prompt", "draw")) - drawn == 2 * 9
    # What is drawn depends on the head, and each of these may draw another number of tokens: PrismScheduler's is fixed.
    assert set(rows.values()) == {drawn}


def test_logits_of_all_positions_are_never_made_at_once(monkeypatch):
    monkeypatch.setattr("prism_pipelines.schedulers.token_sampling.CHUNK", 3 * (MASK + 1))
    pipe = load(checkpoint("llada"), quality_head=context_head("mlp"))
    pipe.scheduler, asked = PrismScheduler(num_remask=1), head_rows(pipe)
    pipe(gen_length=16, num_samples=2, num_inference_steps=6, output_type="seq")
    assert max(asked) <= 3 * (MASK + 1) // pipe.denoiser.vocab_size + 1


@pytest.mark.parametrize("family", list(CHECKPOINTS))
def test_logits_of_one_token_are_those_of_the_output_head(family, monkeypatch):
    pipe = load(checkpoint(family))
    denoiser, ids = pipe.denoiser, some_ids(2, 7)
    rows = denoiser.hidden(ids).flatten(0, 1)
    tokens = torch.arange(len(rows)) * 5 % denoiser.vocab_size
    tokens[:2] = torch.tensor([MASK, 8])
    expected = denoiser.lm_head(rows)[torch.arange(len(rows)), tokens]
    torch.testing.assert_close(denoiser.token_logits(rows, tokens), expected, rtol=0, atol=1e-5)
    monkeypatch.setattr("prism_pipelines.schedulers.token_sampling.CHUNK", 2 * denoiser.vocab_size)
    other = nn.Sequential(denoiser._output_head())  # no plain linear map: it runs, some rows at a time
    monkeypatch.setattr(MaskedDenoiser, "_output_head", lambda self: other)
    torch.testing.assert_close(denoiser.token_logits(rows, tokens), expected, rtol=0, atol=1e-5)


# --- finished texts -----------------------------------------------------------------------------------------------


def test_a_text_is_scored_as_a_run_that_has_just_been_forgotten():
    """Of a run's last canvas `score` knows what `forget` leaves, and with `given` also what the first pass says."""
    head = context_head()
    pipe, given = load(checkpoint("llada"), quality_head=head), prompts()
    passes, out = watched(pipe, **given)
    mask = torch.cat([given["attention_mask"], torch.ones(3, 10, dtype=torch.long)], 1)
    hidden = pipe.denoiser.hidden(out.sequences, mask)
    generated = torch.zeros_like(mask, dtype=torch.bool)
    generated[:, -10:] = True
    logp = aligned(pipe, out.sequences, mask).log_softmax(-1).gather(-1, out.sequences[..., None])[..., 0]
    own = logp.where(generated, torch.nan)
    rows = pipe.denoiser.token_rows(out.sequences)
    run = replace(passes[-1][2], own_logprob=logp.where(mask.bool(), torch.nan), token_rows=rows)
    forgotten = forget(run, torch.ones(3, dtype=torch.bool))
    pads_right = torch.stack([row.roll(int(m.sum()) - len(m)) for row, m in zip(out.sequences, mask, strict=True)])
    right = torch.stack([row.roll(int(row.sum()) - len(row)) for row in mask])
    quality, _, _ = pipe.score(input_ids=pads_right, attention_mask=right)
    expected = head.quality(hidden, mask, **head.inputs(forgotten, out.sequences, MASK))
    for row in range(3):
        count = int(mask[row].sum())
        torch.testing.assert_close(quality[row, :count], expected[row, -count:], rtol=0, atol=2e-5)

    known = replace(
        forget(run, torch.ones(3, dtype=torch.bool)), generated=generated, own_logprob=own, own_mean=own, own_min=own
    )
    first = aligned(pipe, out.sequences.masked_fill(generated, MASK), mask).log_softmax(-1)
    at_token = first.gather(-1, out.sequences[..., None])[..., 0]
    known = replace(
        known,
        prompt_logprob=at_token.where(generated, torch.nan),
        first_max=first.amax(-1).where(generated, torch.nan),
        first_entropy=(-first.exp() * first).nan_to_num(0).sum(-1).where(generated, torch.nan),
        first_hidden=pipe.denoiser.hidden(out.sequences.masked_fill(generated, MASK), mask) * generated[..., None],
    )
    is_given = torch.stack([row.roll(int(m.sum()) - len(m)) for row, m in zip(~generated, mask, strict=True)])
    quality, _, _ = pipe.score(input_ids=pads_right, attention_mask=right, given=is_given)
    expected = head.quality(hidden, mask, **head.inputs(known, out.sequences, MASK))
    for row in range(3):
        count = int(mask[row].sum())
        torch.testing.assert_close(quality[row, :count], expected[row, -count:], rtol=0, atol=5e-5)


def test_score_makes_a_second_forward_only_for_a_head_that_reads_the_first():
    for reads, given, forwards in [
        (("prompt",), torch.zeros(1, 6, dtype=torch.bool), 2),
        (("prompt",), None, 1),
        (("given", "own"), torch.zeros(1, 6, dtype=torch.bool), 1),
    ]:
        pipe, made = load(checkpoint("llada"), quality_head=context_head("mlp", reads)), []
        pipe.model.register_forward_pre_hook(lambda *args, made=made: made.append(1))
        pipe.score(input_ids=some_ids(1, 6), given=given)
        assert len(made) == forwards


def test_given_may_be_the_beginning_of_each_text():
    pipe = PrismPipeline.from_pretrained(bundled("text"))
    texts = ["The cat sat.", "A dog ran."]
    canvas = canvas_of_infill(texts, pipe.tokenizer, pipe.mask_token_id, needs_mask=False)
    found = given_positions(["The cat", "A"], texts, canvas, pipe.tokenizer)
    bare = [len(pipe.tokenizer(one).input_ids) for one in ("The cat", "A")]
    assert found.sum(-1).tolist() == bare and found[0, : bare[0]].all()
    for given, error, message in [
        ("The cat", ValueError, "one beginning for each of 2 texts, got 1"),
        (["The cat", "Dog"], ValueError, "must be the beginning of its text, got 'Dog'"),
        (torch.ones(2, 3), TypeError, "got torch.float32"),
        (torch.ones(2, 3, dtype=torch.bool), ValueError, "must have the shape of the ids, got .2, 3."),
    ]:
        with pytest.raises(error, match=message):
            given_positions(given, texts, canvas, pipe.tokenizer)
    with pytest.raises(ValueError, match="is text, which needs `texts`"):
        given_positions("The", None, canvas, pipe.tokenizer)


# --- without a pipeline -----------------------------------------------------------------------------------------------


def test_a_pool_of_rows_that_begin_at_different_times_knows_what_each_run_alone_would_know():
    pipe = load(checkpoint("llada"))
    denoiser, length, steps = pipe.denoiser, LENGTH, 5
    generated = torch.ones(1, length, dtype=torch.bool)
    generated[0, :3] = False
    start = some_ids(1, length).masked_fill(generated, MASK).masked_fill(~generated, 8)

    def advance(recorder, scheduler, sample, step, row):
        context = recorder.observe(sample, denoiser.hidden(sample))
        given = {"generation_mask": recorder.generated, "mask_token_id": MASK, "generator": seeds(len(sample), row)}
        taken = scheduler.step(
            denoiser.logits(denoiser.hidden(sample), torch.ones_like(generated).expand_as(sample)).view(
                *sample.shape, -1
            ),
            step,
            sample,
            quality=torch.rand(sample.shape),
            **given,
        )
        recorder.after_step(taken)
        return context, taken.prev_sample

    def alone(row):
        torch.manual_seed(row)
        scheduler, sample, found = PrismScheduler(num_remask=1), start, []
        scheduler.set_timesteps(steps)
        recorder = RunRecorder(denoiser, generated, tuple(INPUTS))
        recorder.begin(generated)
        for step in range(steps):
            context, sample = advance(recorder, scheduler, sample, step, row)
            found.append(context)
        return found

    # In a pool of one row: a run, and after three of its steps another in its place.
    torch.manual_seed(0)
    scheduler, sample = PrismScheduler(num_remask=1), start
    scheduler.set_timesteps(steps)
    recorder = RunRecorder(denoiser, generated, tuple(INPUTS))
    recorder.begin(generated)
    for step in range(3):
        _, sample = advance(recorder, scheduler, sample, step, 0)
    recorder.restart(torch.tensor([True]), generated)
    recorder.begin(generated)
    torch.manual_seed(1)
    sample = start
    for step, expected in enumerate(alone(1)):
        if step == 0:
            torch.manual_seed(1)
        context, sample = advance(recorder, scheduler, sample, step, 1)
        for name in ("now", "written_at", "num_remasked", *LOGS, "first_hidden"):
            found = getattr(context, name)
            torch.testing.assert_close(found, getattr(expected, name), rtol=0, atol=1e-6, equal_nan=True)


def test_inputs_that_nobody_knows_are_named():
    pipe = load(checkpoint("llada"))
    with pytest.raises(ValueError, match="got colour"):
        RunRecorder(pipe.denoiser, torch.ones(1, 4, dtype=torch.bool), ("colour",))
    assert num_features(tuple(INPUTS)) == 23


def test_log_odds_alone_have_their_probabilities_recorded():
    pipe = load(checkpoint("llada"))
    generated, sample = torch.ones(1, 6, dtype=torch.bool), some_ids(1, 6, seed=5)
    sample = sample.masked_fill(sample == MASK, 8)
    sample[0, 0] = MASK
    recorder = RunRecorder(pipe.denoiser, generated, ("prompt_odds", "own_odds"))
    recorder.begin(generated)
    context = recorder.observe(sample, pipe.denoiser.hidden(sample))
    assert context.own_logprob[0, 1:].isfinite().all() and context.first_max[0, 0] < 0
    features = context_features(context, sample, MASK, ("own_odds",))[0, 1:, 1]
    torch.testing.assert_close(features, torch.logit(context.own_logprob[0, 1:].exp()) / 10)
