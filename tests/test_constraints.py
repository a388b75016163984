"""`logits_processor` and `return_probs`: against the model's own forward, and by laws."""

import pytest
import torch
from family_twins import EOS, MASK, PAD, aligned, checkpoint, greedy, load

from prism_pipelines import MDLMScheduler, ReMDMScheduler, SelfConfidenceScheduler

FEW = ("llada", "Dream", "sdar", "bert")
ALPHABET = [10, 11, 12, 13]


def only(tokens):
    allowed = torch.full((40,), -torch.inf)
    allowed[tokens] = 0.0
    return lambda positions, logits: logits + allowed.to(logits)


@pytest.mark.parametrize("scheduler", [MDLMScheduler(), SelfConfidenceScheduler(num_remask=2), ReMDMScheduler()])
@pytest.mark.parametrize("family", FEW)
def test_an_alphabet_is_kept(family, scheduler):
    pipe = load(checkpoint(family), scheduler=scheduler)
    cached = {"block_length": 4, "cache": "block"} if pipe.spec.mask_format == "additive" else {}
    for more in ({}, {"cfg_scale": 1.0}, {"block_length": 4}, cached):
        torch.manual_seed(0)
        out = pipe(
            input_ids=torch.full((2, 3), 20),
            gen_length=12,
            num_inference_steps=6,
            logits_processor=only(ALPHABET),
            **more,
        )
        assert set(out.sequences[:, 3:].flatten().tolist()) <= set(ALPHABET)


@pytest.mark.parametrize("family", FEW)
def test_a_processor_sees_the_logits_of_its_positions(family):
    pipe, seen = load(checkpoint(family), scheduler=greedy()), []

    def look(positions, logits):
        seen.append((positions, logits.clone()))
        return logits

    ids = torch.full((2, 9), 20)
    ids[0, [2, 5]], ids[1, [1, 2, 8]] = MASK, MASK
    with_hook = pipe(infill=ids, num_inference_steps=2, logits_processor=look)
    assert torch.equal(with_hook.sequences, pipe(infill=ids, num_inference_steps=2).sequences)
    assert len(seen) >= 2
    for positions, logits in seen:
        expected = aligned(pipe, positions.sample)[positions.row, positions.column]
        torch.testing.assert_close(logits[:, :MASK], expected[:, :MASK], rtol=0, atol=1e-5)


def test_a_rule_between_tokens_holds_at_a_token_a_step():
    pipe = load(checkpoint("llada"), scheduler=MDLMScheduler(order="confidence", temperature=1.0))

    def no_repeats(positions, logits):
        return logits.scatter(-1, positions.sample[positions.row], -torch.inf)

    torch.manual_seed(1)
    out = pipe(gen_length=20, num_samples=3, num_inference_steps=20, logits_processor=no_repeats)
    assert all(len(set(row)) == 20 for row in out.sequences.tolist())
    free = pipe(gen_length=20, num_samples=3, num_inference_steps=20)
    assert any(len(set(row)) < 20 for row in free.sequences.tolist())


def test_what_is_never_written_stays_so():
    pipe = load(checkpoint("llada"))

    def wants_the_mask(positions, logits):
        return logits.index_fill(-1, torch.tensor([MASK, 7]), 1e4)

    out = pipe(gen_length=8, num_inference_steps=4, suppress_tokens=[7], logits_processor=wants_the_mask)
    assert not {MASK, 7} & set(out.sequences.flatten().tolist())


def test_a_processor_that_cannot_be_used_is_named():
    pipe, call = load(checkpoint("llada"), scheduler=greedy()), {"gen_length": 4, "num_inference_steps": 2}
    for processor, kind, says in (
        (3, TypeError, "`logits_processor` must be callable or None, got int"),
        (lambda positions, logits: None, TypeError, "must return a float tensor, got NoneType"),
        (lambda positions, logits: logits.argmax(-1), TypeError, r"must return a float tensor, got torch\.int64"),
        (lambda positions, logits: logits[:, :3], ValueError, r"must return logits of shape \(4, 40\), got \(4, 3\)"),
        (lambda positions, logits: logits * torch.nan, ValueError, "gives NaN in row 0, position 0"),
        (only([MASK]), ValueError, "forbids every token in row 0, position 0"),
    ):
        with pytest.raises(kind, match=says):
            pipe(logits_processor=processor, **call)


@pytest.mark.parametrize("family", FEW)
def test_probs_are_those_of_the_pass_that_drew_each_token(family):
    pipe, steps = load(checkpoint(family), scheduler=MDLMScheduler(temperature=0.7)), []
    ids = torch.full((2, 8), 20)
    ids[:, 2:] = MASK
    torch.manual_seed(2)
    out = pipe(
        infill=ids, num_inference_steps=3, return_probs=True,
        callback_on_step_end=lambda p, i, t, s: steps.append((s["sample"].clone(), s["unmasked"])),
    )  # fmt: skip
    before = ids
    for sample, unmasked in steps:
        p = aligned(pipe, before).softmax(-1)
        for row, column in unmasked.nonzero().tolist():
            expected = float(p[row, column, sample[row, column]])
            assert float(out.probs[row, column]) == pytest.approx(expected, abs=1e-5)
        before = sample
    assert out.probs[:, :2].eq(1).all() and out.probs.isfinite().all()
    assert pipe(infill=ids, num_inference_steps=3).probs is None


def test_probs_are_unknown_for_tokens_that_were_not_drawn():
    pipe = load(checkpoint("llada"), scheduler=MDLMScheduler(order="left_to_right", temperature=0.0))

    def write(pipe, step, timestep, tensors):
        sample = tensors["sample"].clone()
        sample[0, 4], sample[1, sample[1] == EOS] = EOS, 9
        return {"sample": sample}

    call = {"gen_length": 8, "block_length": 4, "num_inference_steps": 8, "eos_token_id": EOS}
    prompt = torch.full((2, 4), 9)
    out = pipe(input_ids=prompt, eos_early_stop=True, return_probs=True, callback_on_step_end=write, **call)
    assert out.probs[0, 4].isnan() and out.probs[0, 8:].isnan().all() and (out.sequences[0, 8:] == EOS).all()
    assert out.probs[1].isfinite().all() and PAD not in out.sequences[1, 4:]


def test_probs_go_with_the_selected_rows_and_the_plain_tuple():
    pipe = load(checkpoint("llada"))
    out = pipe(gen_length=4, num_samples=3, num_inference_steps=2, return_probs=True, return_dict=False)
    assert out[-1].shape == (3, 4)
