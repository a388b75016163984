"""Laws that every tested row of FAMILIES keeps, and the traps that single families set, on family_twins.py."""

import math
import shutil

import pytest
import torch
from family_twins import (
    BAD,
    BLOCK_CAUSAL,
    CHECKPOINTS,
    EOS,
    EVERY,
    LENGTH,
    MASK,
    PAD,
    SHIFTED,
    SOME,
    H,
    V,
    aligned,
    assert_close,
    checkpoint,
    greedy,
    load,
    reference,
    seen_by_blocks,
    some_ids,
)

from prism_pipelines import FAMILIES, MDLMScheduler, PrismPipeline, PrismScheduler, QualityHead
from prism_pipelines.sudoku import sudoku_tokenizer

# --- every family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_a_row_of_a_batch_is_as_it_is_alone(family):
    pipe, ids = load(checkpoint(family)), some_ids()
    alone = torch.cat([aligned(pipe, row[None]) for row in ids])
    assert_close(aligned(pipe, ids), alone)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_padding_changes_nothing(family, side):
    pipe, ids = load(checkpoint(family)), some_ids()
    lengths = [LENGTH, 23, 5]
    # The padding token is one that is no padding elsewhere: what is padding, the mask says.
    padded, attention_mask = torch.full_like(ids, 9), torch.zeros_like(ids)
    where = [slice(LENGTH - n, LENGTH) if side == "left" else slice(0, n) for n in lengths]
    for row, n in enumerate(lengths):
        padded[row, where[row]], attention_mask[row, where[row]] = ids[row, :n], 1
    ours = aligned(pipe, padded, attention_mask)
    for row, n in enumerate(lengths):
        got = ours[row : row + 1, where[row]]
        alone = aligned(pipe, ids[row : row + 1, :n])
        assert_close(got, alone)


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_eager_and_sdpa_attention_agree(family):
    pipe, ids = load(checkpoint(family)), some_ids()
    if not pipe.model._supports_sdpa:
        pytest.skip("has eager attention alone")
    attention_mask = torch.ones_like(ids)
    attention_mask[1, :9] = 0
    logits = {}
    for kind in ("eager", "sdpa"):
        pipe.model.set_attn_implementation(kind)
        assert pipe.model.config._attn_implementation == kind
        logits[kind] = aligned(pipe, ids, attention_mask)[attention_mask.bool()]
    assert_close(logits["eager"], logits["sdpa"])


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_bfloat16_is_the_same_model_and_fills_every_mask(family):
    pipe, ids = load(checkpoint(family), torch_dtype=torch.bfloat16), some_ids()
    assert {p.dtype for p in pipe.model.parameters()} == {torch.bfloat16}
    exact, rough = load(checkpoint(family)), aligned(pipe, ids)
    theirs = aligned(exact, ids)
    assert rough.dtype == torch.bfloat16
    assert_close(rough, theirs, atol=0.15 * float(theirs[..., :MASK].abs().max()))
    assert (rough[..., :MASK] - theirs[..., :MASK]).std() < 0.05 * theirs[..., :MASK].std()
    out = pipe(input_ids=torch.full((2, 1), 9), gen_length=9, num_inference_steps=4)
    assert MASK not in out.sequences


def greedy_by_hand(family, folder, ids):
    """One token a forward, the most confident first; nothing but the reference's logits and Python."""
    ids = ids.clone()
    while (ids == MASK).any():
        masked = (ids[0] == MASK).nonzero().flatten().tolist()
        block = CHECKPOINTS[family][1]
        if block:
            masked = [i for i in masked if i // block == masked[0] // block]
        p = reference(family, folder, ids)[0, :, :MASK].double().softmax(-1)
        i = max(masked, key=lambda i: float(p[i].max()))
        ids[0, i] = int(p[i].argmax())
    return ids


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_greedy_tokens_are_those_of_the_reference_alone_and_in_a_batch(family):
    pipe = load(checkpoint(family), scheduler=greedy())
    lengths, new = (5, 3), 4
    prompts = torch.randint(8, MASK, (2, 5), generator=torch.Generator().manual_seed(3))
    singles = []
    for row, n in enumerate(lengths):
        canvas = torch.cat([prompts[row, :n], torch.full((new,), MASK)])[None]
        expected = greedy_by_hand(family, checkpoint(family), canvas)
        # At least a step per token in each block, so one token a step, whatever the blocks are.
        alone = pipe(input_ids=prompts[row : row + 1, :n], gen_length=new, num_inference_steps=2 * new)
        assert torch.equal(alone.sequences, expected)
        singles.append(expected[0, n:])
    padded = prompts.clone()
    padded[1] = torch.cat([torch.full((2,), PAD), prompts[1, :3]])
    mask = torch.ones_like(padded)
    mask[1, :2] = 0
    call = {"input_ids": padded, "attention_mask": mask, "gen_length": new, "num_inference_steps": 2 * new}
    for kind in ("eager", "sdpa"):
        pipe.model.set_attn_implementation(kind)
        assert torch.equal(pipe(**call).sequences[:, 5:], torch.stack(singles))


# --- the head reads the right token -----------------------------------------------------------------------------------


def head_that_dislikes(pipe, token, other):
    """A linear head made by least squares on rows of `other`, `token` and masks: low where a row holds `token`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((400, 12), other)
    ids[torch.rand(ids.shape, generator=generator) < 0.2] = token
    ids[200:300][torch.rand(100, 12, generator=generator) < 0.5] = MASK
    ids[300:][torch.arange(12) >= torch.randint(1, 13, (100, 1), generator=generator)] = MASK
    head = QualityHead(H, "linear")
    with torch.no_grad():
        hidden = head.norm(pipe.denoiser.hidden(ids).float()).flatten(0, 1)
        rows = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1)
        wanted = torch.where(ids.flatten() == token, -4.0, 4.0)[:, None]
        solution = torch.linalg.lstsq(rows, wanted).solution[:, 0]
        head.out.weight.copy_(solution[None, :-1])
        head.out.bias.copy_(solution[-1:])
    return head


@pytest.mark.parametrize("family", EVERY)
def test_a_planted_wrong_token_is_the_one_that_scores_low_and_is_remasked(family):
    pipe, good, length = load(checkpoint(family)), 20, 12
    pipe.load_quality_head(head_that_dislikes(pipe, BAD, good))
    for place in range(length):
        ids = torch.full((1, length), good)
        ids[0, place] = BAD
        quality, _, _ = pipe.score(input_ids=ids)
        assert int(quality[0].argmin()) == place
    pipe.scheduler = PrismScheduler(num_remask=1, order="left_to_right")
    planted, remasked = [], []

    def plant(pipe, step, timestep, tensors):
        remasked.append(tensors["remasked"][0].nonzero().flatten().tolist())
        sample = tensors["sample"].clone()
        visible = (sample[0] != MASK) & tensors["generation_mask"][0]
        sample[0, visible] = good
        planted.append(int(visible.nonzero()[step % int(visible.sum())]))
        sample[0, planted[-1]] = BAD
        return {"sample": sample}

    prompt = torch.full((1, 1), good)
    pipe(input_ids=prompt, gen_length=length, num_inference_steps=length, callback_on_step_end=plant)
    found = [(places[0], where) for where, places in zip(planted, remasked[1:], strict=False) if places]
    assert len(found) >= length // 4 and all(place == where for place, where in found)


# --- what is special to one family ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SHIFTED)
def test_a_shifted_model_predicts_token_i_at_i_minus_1(family):
    """By construction: without attention and networks, and with an untied head that maps token v to v + 1."""
    pipe = load(checkpoint(family))
    with torch.no_grad():
        for name, parameter in pipe.model.named_parameters():
            if "proj" in name or "wpe" in name:
                parameter.zero_()
        basis = torch.zeros(V, H)
        basis[range(8, 8 + 24), range(24)] = 1.0
        pipe.model.get_input_embeddings().weight.copy_(basis)
        pipe.model.get_output_embeddings().weight = torch.nn.Parameter(basis.roll(1, dims=0))
        norm = next(m for name, m in pipe.model.named_modules() if name.split(".")[1:] in (["norm"], ["ln_f"]))
        norm.weight.fill_(1.0)
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()
    assert aligned(pipe, torch.tensor([[9, 12, MASK]]))[0, 1:].argmax(-1).tolist() == [10, 13]
    pipe.scheduler = greedy(order="left_to_right")
    out = pipe(input_ids=torch.tensor([[9, 12]]), gen_length=5, num_inference_steps=5).sequences
    assert out.tolist() == [[9, 12, 13, 14, 15, 16, 17]]


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_a_block_is_the_same_with_or_without_those_after_it(family):
    pipe, ids = load(checkpoint(family)), some_ids()
    block, whole = CHECKPOINTS[family][1], aligned(load(checkpoint(family)), ids)
    for end in range(block, LENGTH, block):
        assert_close(whole[:, :end], aligned(pipe, ids[:, :end]))
    changed = ids.clone()
    changed[:, block - 1] = 10
    assert (aligned(pipe, changed)[:, 0, :MASK] - whole[:, 0, :MASK]).abs().max() > 1e-4  # both ways inside a block


# --- traps of other implementations -----------------------------------------------------------------------------------


def change_logits(pipe, change):
    """Run `change` on what the output head gives."""
    pipe.model.get_output_embeddings().register_forward_hook(lambda module, args, out: change(out))


def favour(token):
    """Puts all mass on one token."""
    return lambda logits: logits.index_fill(-1, torch.tensor([token]), 1e4)


def count_forwards(pipe):
    calls = []
    pipe.model.register_forward_hook(lambda module, args, out: calls.append(1))
    return calls


@pytest.mark.parametrize("family", SOME)
def test_a_model_that_wants_only_the_mask_token_never_gives_it(family):
    pipe = load(checkpoint(family))
    change_logits(pipe, favour(MASK))
    for scheduler in (MDLMScheduler(), greedy(), greedy(order="margin")):
        pipe.scheduler = scheduler
        out = pipe(gen_length=8, num_samples=3, num_inference_steps=3)
        assert ((out.sequences >= 0) & (out.sequences < MASK)).all() and out.nfe >= 3


@pytest.mark.parametrize("family", ["llada", "Dream", "bert"])
def test_a_mask_token_in_a_prompt_is_kept_and_does_not_move_the_blocks(family):
    pipe = load(checkpoint(family))
    prompt = torch.tensor([[9, MASK, MASK, 10, MASK]])
    written = []
    out = pipe(
        input_ids=prompt, gen_length=6, block_length=2, num_inference_steps=6,
        callback_on_step_end=lambda p, i, t, s: written.append(s["unmasked"][0].nonzero().flatten().tolist()),
    )  # fmt: skip
    assert torch.equal(out.sequences[:, :5], prompt) and MASK not in out.sequences[:, 5:]
    assert [sorted(written[i] + written[i + 1]) for i in (0, 2, 4)] == [[5, 6], [7, 8], [9, 10]]


@pytest.mark.parametrize("family", SOME)
def test_a_remask_budget_above_the_steps_of_a_block_leaves_no_mask_and_nfe_is_exact(family):
    pipe = load(checkpoint(family), quality_head=QualityHead(H), scheduler=PrismScheduler(num_remask=100))
    calls = count_forwards(pipe)
    out = pipe(gen_length=12, block_length=4, num_samples=2, num_inference_steps=8)  # 3 blocks: 3, 3 and 2 steps
    assert MASK not in out.sequences
    assert out.nfe == len(calls) == 8 and out.nfe_per_row == [8, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SOME)
def test_extreme_logits_give_the_largest_at_any_temperature(family, dtype):
    pipe = load(checkpoint(family), torch_dtype=dtype)
    change_logits(pipe, lambda logits: logits * 1e30)
    ids = some_ids(2, 6)
    best = aligned(pipe, ids)[..., :MASK].argmax(-1)
    for temperature in (0.0, 1.0):
        pipe.scheduler = MDLMScheduler(temperature=temperature)
        out = pipe(infill=ids, num_inference_steps=1, block_length=6 if CHECKPOINTS[family][1] is None else 8)
        if CHECKPOINTS[family][1] is None:
            assert torch.equal(out.sequences, torch.where(ids == MASK, best, ids))
        assert ((out.sequences >= 0) & (out.sequences < MASK)).all()


@pytest.mark.parametrize("family", ["llada", "Dream", "bert"])
def test_every_row_has_its_own_count_of_masks(family):
    pipe, steps = load(checkpoint(family)), 4
    totals = [1, 5, 11]
    ids = torch.full((3, 12), 9)
    for row, total in enumerate(totals):
        ids[row, 1 : 1 + total] = MASK
    left = []
    pipe(
        infill=ids, num_inference_steps=steps,
        callback_on_step_end=lambda p, i, t, s: left.append((s["sample"] == MASK).sum(-1).tolist()),
    )  # fmt: skip
    assert left == [[m - math.ceil(m * (i + 1) / steps) for m in totals] for i in range(steps)]


@pytest.mark.parametrize("family", SOME)
def test_an_early_end_leaves_no_mask_and_saves_forwards(family):
    pipe = load(checkpoint(family), scheduler=greedy(order="left_to_right"))
    calls = count_forwards(pipe)

    def end_row_0(pipe, step, timestep, tensors):
        sample = tensors["sample"].clone()
        sample[0, 4] = torch.where(sample[0, 4] == MASK, sample[0, 4], EOS)
        sample[1, sample[1] == EOS] = 9
        return {"sample": sample}

    prompt = torch.full((2, 4), 9)
    call = {"gen_length": 12, "block_length": 4, "num_inference_steps": 7, "eos_token_id": EOS}
    out = pipe(input_ids=prompt, eos_early_stop=True, callback_on_step_end=end_row_0, **call)
    assert MASK not in out.sequences and (out.sequences[0, 8:] == EOS).all() and EOS not in out.sequences[1]
    assert out.nfe == len(calls) == 7 and out.nfe_per_row == [3, 7]
    calls.clear()
    out = pipe(input_ids=prompt[:1], eos_early_stop=True, callback_on_step_end=lambda p, i, t, s: (
        {"sample": s["sample"].index_fill(1, torch.tensor([4]), EOS)}), **call)  # fmt: skip
    assert out.nfe == len(calls) == 3 and MASK not in out.sequences


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_the_attention_mask_has_the_form_the_model_takes(family):
    pipe, got = load(checkpoint(family)), {}
    pipe.model.register_forward_pre_hook(lambda module, args, kwargs: got.update(kwargs), with_kwargs=True)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    aligned(pipe, some_ids(2, 7), padding)
    mask = got["attention_mask"]
    if FAMILIES[family].mask_format == "padding":
        assert torch.equal(mask, padding)
        return
    seen = seen_by_blocks(5, CHECKPOINTS[family][1] or 5)
    assert mask.dtype == torch.float32 and mask.shape == (2, 1, 7, 7) and not got["use_cache"]
    assert torch.equal(mask[0, 0, 2:, 2:] == 0, seen)
    assert (mask[0, 0, 2:, :2] < -1e30).all() and mask.isfinite().all()


def test_a_tokenizer_beside_a_config_that_transformers_does_not_know_is_no_cause_for_alarm(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("transformers.configuration_utils.logger.warning", lambda text, *_: said.append(text))
    folder = str(shutil.copytree(checkpoint("llada"), tmp_path / "llada"))
    sudoku_tokenizer().save_pretrained(folder)
    pipe = PrismPipeline.from_pretrained(folder, mask_token_id=MASK)
    assert pipe.tokenizer("12").input_ids == sudoku_tokenizer()("12").input_ids and not said
