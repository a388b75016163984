"""The cache: exact where it must be, the known approximation elsewhere; and rows that are done cost nothing."""

import pytest
import torch
from family_twins import BLOCK_CAUSAL, CHECKPOINTS, EOS, EVERY, LENGTH, MASK, PAD, H, checkpoint, greedy, load, some_ids
from transformers import DynamicCache

from prism_pipelines import FAMILIES, MDLMScheduler, PrismScheduler, QualityHead, SelfConfidenceScheduler
from prism_pipelines.sampling.kv_cache import Selection

CACHED = [family for family in CHECKPOINTS if FAMILIES[family].mask_format == "additive"]
BIDIRECTIONAL = [family for family in CACHED if family not in BLOCK_CAUSAL]
MODES = ("prefix", "block")
PATHS = ("sdar", "Fast_dLLM_Qwen", "llada2_moe")  # blocks of 4; of 8 and shifted; of 32 with experts


def ragged_prompts(lengths=(9, 4, 6)):
    """Prompts of different length, padded on the left: (ids, attention mask)."""
    ids, width = some_ids(len(lengths), max(lengths), seed=5), max(lengths)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length], mask[row, : width - length] = PAD, 0
    return ids.masked_fill(ids == MASK, 8), mask


def seeds(rows):
    return [torch.Generator().manual_seed(i) for i in range(rows)]


def widths(pipe):
    """What the model is asked for in each forward: (rows, columns)."""
    seen = []
    pipe.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def random_head(pipe, scale=3.0):
    torch.manual_seed(3)
    head = QualityHead(H, "mlp")
    with torch.no_grad():
        head.out.weight.mul_(scale)
    pipe.load_quality_head(head)
    return pipe


# --- block-causal models: exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "scale"),
    [(family, "own") for family in BLOCK_CAUSAL]
    + [(family, scale) for family in PATHS for scale in ("half", "double")],
)
def test_a_cache_changes_no_token_of_a_block_causal_model(family, scale):
    own = CHECKPOINTS[family][1]
    block_length = {"half": own // 2, "own": None, "double": 2 * own}[scale]
    pipe, (ids, mask) = random_head(load(checkpoint(family))), ragged_prompts()
    gen = own + own // 2 + 3
    steps = 2 * (gen // (block_length or own) + 2)
    call = {"gen_length": gen, "block_length": block_length, "num_inference_steps": steps}
    for scheduler in (greedy(), PrismScheduler(num_remask=2), SelfConfidenceScheduler(num_remask=2)):
        pipe.scheduler = scheduler
        call |= {"input_ids": ids, "attention_mask": mask}
        plain = pipe(**call, generator=seeds(3))
        for cache, refresh in (("prefix", None), ("block", 2)):
            got = pipe(**call, generator=seeds(3), cache=cache, cache_refresh_interval=refresh)
            assert torch.equal(got.sequences, plain.sequences) and got.nfe_per_row == plain.nfe_per_row
        # Alone, without padding, in the same steps: the steps are spread over the blocks of the row that has most.
        row = max(range(3), key=lambda row: blocks_of_row(int(mask[row].sum()), gen, block_length or own))
        call |= {"input_ids": ids[row : row + 1, mask[row].bool()], "attention_mask": None}
        alone = pipe(**call, generator=seeds(3)[row : row + 1], cache="prefix")
        assert torch.equal(alone.sequences[0, -gen:], plain.sequences[row, -gen:])


def blocks_of_row(prompt, gen, block_length):
    return (prompt + gen - 1) // block_length - prompt // block_length


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_logits_and_quality_with_a_cache_are_those_without(family, monkeypatch):
    pipe, ids, runs, steps = random_head(load(checkpoint(family))), some_ids(3, LENGTH), [], 20
    for cache in ("none", "prefix"):
        pipe.scheduler, seen = PrismScheduler(num_remask=1, temperature=0.0), []
        step = PrismScheduler.step

        def watched(self, logits, t, sample, step=step, seen=seen, **more):
            where = more["generation_mask"]
            seen.append((logits[where][:, :MASK], more["quality"][where]))
            return step(self, logits, t, sample, **more)

        monkeypatch.setattr(PrismScheduler, "step", watched)  # a call has a copy of its scheduler
        pipe(infill=ids, num_inference_steps=steps, cache=cache, generator=seeds(3))
        monkeypatch.undo()
        runs.append(seen)
    assert len(runs[0]) == len(runs[1]) == steps
    for plain, cached in zip(*runs, strict=True):
        for theirs, ours in zip(plain, cached, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_a_forward_asks_for_the_block_and_what_was_finished_since(family):
    pipe, own, shift = load(checkpoint(family), scheduler=greedy()), CHECKPOINTS[family][1], CHECKPOINTS[family][2]
    seen = widths(pipe)
    pipe(input_ids=some_ids(2, own).clamp(max=MASK - 1), gen_length=2 * own, num_inference_steps=6, cache="prefix")
    step = own + shift  # a shifted model reads the row before the block too
    assert seen == [(2, 2 * own), (2, step), (2, step), (2, 2 * own + shift), (2, step), (2, step)]


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_guidance_early_ends_and_thresholds_are_exact_too(family):
    pipe, (ids, mask) = load(checkpoint(family)), ragged_prompts()
    call = {"input_ids": ids, "attention_mask": mask, "gen_length": 13, "num_inference_steps": 12, "eos_token_id": EOS}
    for scheduler, more in (
        (MDLMScheduler(), {"cfg_scale": 0.7}),
        (MDLMScheduler(), {"eos_early_stop": True, "top_k": 4}),
        (MDLMScheduler(order="confidence"), {"threshold": 0.2}),
        (MDLMScheduler(order="confidence"), {"threshold": 0.1, "eos_early_stop": True, "cfg_scale": 0.5}),
    ):
        pipe.scheduler = scheduler
        runs = [pipe(**call, **more, cache=cache, generator=seeds(3)) for cache in ("none", "prefix")]
        assert torch.equal(runs[0].sequences, runs[1].sequences)
        assert runs[0].nfe_per_row == runs[1].nfe_per_row


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_a_callback_that_rewrites_the_past_is_seen(family):
    """Tokens of a finished block are changed in the middle of a later one."""

    def meddle(pipe, step, timestep, tensors):
        if step == steps - 2:
            return {"sample": tensors["sample"].index_fill(1, torch.tensor([1, 3]), 10)}

    pipe, own = load(checkpoint(family)), CHECKPOINTS[family][1]
    ids, steps = some_ids(2, own).clamp(max=MASK - 1), 6
    call = {"input_ids": ids, "gen_length": 2 * own, "num_inference_steps": steps, "temperature": 0.0}
    runs = [pipe(**call, generator=seeds(2), callback_on_step_end=meddle, cache=c).sequences for c in ("none", "block")]
    assert torch.equal(*runs)
    assert not torch.equal(pipe(**call, generator=seeds(2)).sequences, runs[0])


@pytest.mark.parametrize("returned", ["the same tensor", "nothing"])
def test_a_callback_that_rewrites_the_past_in_place_is_seen_too(returned):
    """The next forward computes what it does after a callback that returned a new tensor."""

    def meddle(pipe, step, timestep, tensors):
        if step == steps - 2:
            sample = tensors["sample"].clone() if how == "a new tensor" else tensors["sample"]
            sample[:, [1, 3]] = 10
            return None if how == "nothing" else {"sample": sample}

    family, steps, found = BLOCK_CAUSAL[0], 6, []
    for how in ("a new tensor", returned):  # noqa: B007  `meddle` reads it
        pipe, own = load(checkpoint(family)), CHECKPOINTS[family][1]
        asked, ids = widths(pipe), some_ids(2, own).clamp(max=MASK - 1)
        call = {"gen_length": 2 * own, "num_inference_steps": steps, "temperature": 0.0, "cache": "block"}
        out = pipe(input_ids=ids, **call, generator=seeds(2), callback_on_step_end=meddle)
        found.append((out.sequences.tolist(), asked))
    assert found[0] == found[1]


# --- bidirectional models: the known approximation --------------------------------------------------------------------


@pytest.mark.parametrize("cache", MODES)
@pytest.mark.parametrize("family", [family for family in EVERY if family.values[0] in BIDIRECTIONAL])
def test_a_refresh_in_every_step_is_no_cache(family, cache):
    pipe, (ids, mask) = random_head(load(checkpoint(family))), ragged_prompts()
    prompts = {"input_ids": ids, "attention_mask": mask, "gen_length": 14}
    for scheduler in (MDLMScheduler(), PrismScheduler(num_remask=2)):
        pipe.scheduler = scheduler
        for call in (prompts, {"infill": some_ids(3, 20)}):
            call = call | {"block_length": 5, "num_inference_steps": 21}
            plain = pipe(**call, generator=seeds(3)).sequences
            got = pipe(**call, generator=seeds(3), cache=cache, cache_refresh_interval=1).sequences
            assert torch.equal(got, plain)


@pytest.mark.parametrize("cache", MODES)
@pytest.mark.parametrize("family", ["llada", "Dream", "mdlm"])
def test_with_one_layer_a_cache_is_exact(family, cache):
    """Keys and values of the first layer depend on their own token alone, and only the block's tokens change."""
    pipe, (ids, mask) = load(checkpoint(family)), ragged_prompts()
    layers = next(m for name, m in pipe.model.named_modules() if name.split(".")[-1] == "layers")
    del layers[1:]
    pipe.model.config.num_hidden_layers = 1
    prompts = {"input_ids": ids, "attention_mask": mask, "gen_length": 14}
    for call in (prompts, {"infill": some_ids(3, 20)}):
        call = call | {"block_length": 5, "num_inference_steps": 21}
        plain = pipe(**call, generator=seeds(3)).sequences
        for refresh in (None, 3):
            got = pipe(**call, generator=seeds(3), cache=cache, cache_refresh_interval=refresh).sequences
            assert torch.equal(got, plain)


@pytest.mark.parametrize("family", ["llada", "a2d-qwen3", "mdlm"])
def test_between_refreshes_keys_and_values_are_those_of_the_last_full_forward(family, monkeypatch):
    """Against transformers' own DynamicCache, filled by the full forward and cut off before the block."""
    pipe, prompt, gen = load(checkpoint(family), scheduler=greedy()), some_ids(2, 6).clamp(max=MASK - 1), 8
    steps, canvases = [], []
    step = MDLMScheduler.step

    def watched(self, logits, t, sample, **more):
        steps.append(logits[more["generation_mask"]][:, :MASK])
        canvases.append(sample)
        return step(self, logits, t, sample, **more)

    monkeypatch.setattr(MDLMScheduler, "step", watched)
    for cache in MODES:
        steps.clear(), canvases.clear()
        pipe(
            input_ids=prompt, gen_length=gen, block_length=4, num_inference_steps=8, cache=cache,
            cache_refresh_interval=2,
        )  # fmt: skip
        for i in (1, 3, 5, 7):  # steps 0, 2 of each block are full forwards
            start = 6 + 4 * (i // 4)
            end = 6 + 4 * (i // 4) + 4 if cache == "block" else 6 + gen
            dynamic, full = DynamicCache(config=pipe.model.config), torch.zeros(2, 1, 6 + gen, 6 + gen)
            with torch.no_grad():
                pipe.model(input_ids=canvases[i - 1], attention_mask=full, past_key_values=dynamic, use_cache=True)
                for layer in dynamic.layers:
                    kept = [*range(start), *range(end, 6 + gen)]
                    layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
                window = torch.arange(start, end)
                expected = pipe.model(
                    input_ids=canvases[i][:, window], position_ids=window.expand(2, -1), past_key_values=dynamic,
                    attention_mask=full[:, :, : len(window)], use_cache=True,
                ).logits[:, :4, :MASK].flatten(0, 1)  # fmt: skip
            torch.testing.assert_close(steps[i], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cache", MODES)
@pytest.mark.parametrize("family", ["llada", "Dream", "llama:diffullama", "gpt2:diffugpt"])
def test_a_row_with_a_cache_does_not_depend_on_its_neighbours(family, cache):
    pipe, (ids, mask) = load(checkpoint(family)), ragged_prompts()
    call = {"gen_length": 12, "block_length": 4, "num_inference_steps": 12, "cache": cache, "threshold": 0.15}
    pipe.scheduler = MDLMScheduler(order="confidence")
    together = pipe(input_ids=ids, attention_mask=mask, generator=seeds(3), **call)
    for row in range(3):
        alone = pipe(input_ids=ids[row : row + 1, mask[row].bool()], generator=seeds(3)[row : row + 1], **call)
        assert torch.equal(alone.sequences[0, -12:], together.sequences[row, -12:])
        assert alone.nfe == together.nfe_per_row[row]


def test_a_selection_names_the_wanted_columns_of_each_row():
    wanted = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 1, 0], [0] * 5], dtype=torch.bool)
    selection = Selection.of(wanted)
    assert selection.columns.tolist() == [[1, 2, 4], [3, 5, 5], [5, 5, 5]] and selection.reach == 5
    assert Selection.of(wanted[:, :4]).reach == 4 and Selection.of(wanted, 9).reach == 9


# --- thresholds, and rows that leave ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llada", "sdar", "Dream", "bert"])
def test_rows_that_are_done_leave_the_batch_and_nfe_per_row_is_what_they_took_part_in(family):
    pipe, ids = load(checkpoint(family), scheduler=MDLMScheduler(order="confidence")), some_ids(4, 24)
    seen = widths(pipe)
    call = {"block_length": 8, "num_inference_steps": 60, "threshold": 0.12}
    out = pipe(infill=ids, generator=seeds(4), **call)
    assert len(seen) == out.nfe and sum(rows for rows, _ in seen) == sum(out.nfe_per_row) < 4 * out.nfe
    for row in range(4):
        alone = pipe(infill=ids[row : row + 1], generator=seeds(4)[row : row + 1], **call)
        if blocks_in(ids[row], CHECKPOINTS[family][1]) == max(blocks_in(r, CHECKPOINTS[family][1]) for r in ids):
            assert torch.equal(alone.sequences, out.sequences[row : row + 1])
            assert alone.nfe == out.nfe_per_row[row]


def blocks_in(row, own):
    masks = (row == MASK).nonzero().flatten().tolist()
    return masks[-1] // 8 - masks[0] // 8 if own else (len(masks) - 1) // 8


@pytest.mark.parametrize("threshold", [1e-9, 0.13, 0.17, 1.0])
def test_a_step_writes_what_is_surer_than_the_threshold_and_at_least_one_token(threshold, monkeypatch):
    config = {"order": "confidence", "temperature": 0.0}
    pipe = load(checkpoint("llada"), scheduler=MDLMScheduler(**config, use_threshold=True, threshold=threshold))
    step, counts = MDLMScheduler.step, []

    def watched(self, logits, t, sample, **more):
        masked = more["generation_mask"] & (sample == MASK)
        out = step(self, logits, t, sample, **more)
        for row in range(len(sample)):
            if masked[row].any():
                only = torch.zeros_like(masked)
                only[row] = masked[row]
                best = logits[only].float().softmax(-1).amax(-1)
                counts.append((int(out.unmasked[row].sum()), max(1, int((best > threshold).sum()))))
        return out

    monkeypatch.setattr(MDLMScheduler, "step", watched)
    out = pipe(gen_length=16, num_samples=2, num_inference_steps=16)
    assert all(written == expected for written, expected in counts) and not (out.sequences == MASK).any()
    assert {1e-9: out.nfe == 1, 1.0: out.nfe == 16}.get(threshold, True)
    # The argument of a call is the config of a scheduler for that call.
    pipe.scheduler = MDLMScheduler(**config)
    by_call = pipe(gen_length=16, num_samples=2, num_inference_steps=16, threshold=threshold)
    assert torch.equal(by_call.sequences, out.sequences) and by_call.nfe == out.nfe
    assert not pipe.scheduler.config.use_threshold


class FixedHead(QualityHead):
    """The same quality for every token."""

    def forward(self, hidden, attention_mask=None):
        return torch.full(hidden.shape[:-1], self.logit)


@pytest.mark.parametrize("cache", ["none", "block"])
def test_a_full_block_is_looked_at_again_and_left_only_once_all_is_accepted(cache):
    pipe = load(checkpoint("llada"))
    head, seen = FixedHead(H), widths(pipe)
    pipe.load_quality_head(head)
    call = {"gen_length": 12, "block_length": 4, "num_inference_steps": 24, "threshold": 1e-9, "cache": cache}
    counts = {}
    for logit in (2.0, -2.0):
        head.logit = logit
        pipe.scheduler = PrismScheduler(order="confidence", temperature=0.0, quality_threshold=0.5, max_share=1.0)
        seen.clear()
        out = pipe(**call)
        assert out.nfe == len(seen) and MASK not in out.sequences
        counts[logit] = out.nfe
        pipe.scheduler = PrismScheduler(order="confidence", temperature=0.0, num_remask=0)
        assert pipe(**call).nfe == 3  # no second look
    # Good: one forward writes a block, one accepts it. Bad: as long as the schedule has room, tokens are taken back.
    assert counts[2.0] == 2 * 3 and counts[-2.0] == 24


@pytest.mark.parametrize("num_remask", [None, 1, 3])
def test_what_is_remasked_is_what_is_below_the_bar(num_remask):
    torch.manual_seed(0)
    scheduler = PrismScheduler(order="confidence", quality_threshold=0.4, max_share=1.0, num_remask=num_remask)
    scheduler.set_timesteps(8)
    for trial in range(40):
        sample = torch.randint(0, 5, (1, 12))
        sample[torch.rand(1, 12) < 0.4] = 5
        quality, t = torch.rand(1, 12), trial % 8
        out = scheduler.step(torch.randn(1, 12, 6), t, sample, quality=quality, mask_token_id=5)
        below = sorted((float(q), i) for i, q in enumerate(quality[0]) if sample[0, i] != 5 and q < 0.4)
        room = 12 - -(-12 * (t + 1) // 8)
        expected = [i for _, i in below[: min(room, num_remask or 12)]] if t < 7 else []
        assert out.remasked[0].nonzero().flatten().tolist() == sorted(expected)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "call", "says"),
    [
        ("bert", {"cache": "prefix"}, "`cache` is 'prefix', but BertForMaskedLM has no KV cache.*llada.*sdar"),
        ("esm", {"cache": "block"}, "`cache` is 'block', but EsmForMaskedLM"),
        ("llada", {"cache": "suffix"}, r"`cache` must be one of \('none', 'prefix', 'block'\), got 'suffix'"),
        ("llada", {"cache": None}, "`cache` must be one of"),
        ("llada", {"cache": "block", "cache_refresh_interval": 0}, "`cache_refresh_interval` must be None or an int"),
        ("llada", {"cache_refresh_interval": 2}, "`cache_refresh_interval` has no effect"),
        ("llada", {"threshold": 0.0}, r"`threshold` must be a number in \(0, 1\], got 0.0"),
        ("llada", {"threshold": 1.5}, r"`threshold` must be a number in \(0, 1\], got 1.5"),
        ("llada", {"threshold": True}, r"`threshold` must be a number in \(0, 1\], got True"),
        ("llada", {"threshold": float("nan")}, r"`threshold` must be a number in \(0, 1\], got nan"),
        ("llada", {"threshold": 0.9}, "writes in 'random' order.*MDLMScheduler.from_config"),
        ("sdar", {"block_length": 6}, "must be a multiple or a divisor of the model's block of 4 tokens, got 6"),
    ],
)
def test_what_cannot_be_had_is_refused(family, call, says):
    pipe = load(checkpoint(family))
    with pytest.raises(ValueError, match=says):
        pipe(input_ids=torch.full((1, 4), 9), gen_length=8, **call)


def test_a_scheduler_without_confidence_takes_no_threshold_and_a_wrong_one_in_its_config_is_refused():
    from prism_pipelines import ReMDMScheduler

    pipe = load(checkpoint("llada"), scheduler=ReMDMScheduler())
    with pytest.raises(ValueError, match=r"`threshold` is 0\.9, but ReMDMScheduler does not decode by confidence"):
        pipe(gen_length=4, threshold=0.9)
    pipe.scheduler = MDLMScheduler(order="confidence", use_threshold=True, threshold=1.5)
    with pytest.raises(ValueError, match=r"`threshold` must be a number in \(0, 1\], got 1.5"):
        pipe(gen_length=4)


@pytest.mark.parametrize(
    "fields",
    [{"quality_threshold": 0.0}, {"quality_threshold": 1.5}, {"quality_threshold": 0.5, "eta": 0.1},
     {"quality_threshold": 0.5, "num_remask": 0}],
)  # fmt: skip
def test_a_bar_outside_its_range_or_beside_another_rule_is_refused(fields):
    with pytest.raises(ValueError, match="`quality_threshold`"):
        PrismScheduler(**fields)


def test_a_head_that_attends_to_every_position_has_no_cache():
    pipe = load(checkpoint("llada"), quality_head=QualityHead(H, "block"))
    with pytest.raises(ValueError, match=r"\(architecture .block.\)"):
        pipe(gen_length=4, cache="prefix")
    pipe(gen_length=4, num_inference_steps=2)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")],
)
def test_out_of_memory_names_what_to_lower(error, monkeypatch):
    pipe = load(checkpoint("llada"))

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(pipe.model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"with 3 rows of 8 tokens.*`num_samples`.*`gen_length`"):
        pipe(gen_length=8, num_samples=3)
    monkeypatch.setattr(pipe.model, "forward", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe(gen_length=8)
