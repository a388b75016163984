"""Our schedulers inside diffusers' unmodified `LLaDA2Pipeline`."""

import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from test_pipeline import twin

import prism_pipelines
from prism_pipelines import (
    MDLMScheduler,
    P2Scheduler,
    PrismPipeline,
    PrismScheduler,
    QualityHead,
    SelfConfidenceScheduler,
    TokenCriticScheduler,
    disable_prism,
    enable_prism,
)
from prism_pipelines.hub.heads import load_scheduler
from prism_pipelines.sudoku import MASK_ID, sudoku_tokenizer

KINDS = [MDLMScheduler, SelfConfidenceScheduler, PrismScheduler]


def llada2(scheduler=None):
    """diffusers' own pipeline around a tiny bidirectional model, with its forwards counted."""
    pipe = LLaDA2Pipeline(twin("bert"), scheduler or BlockRefinementScheduler(block_length=8), sudoku_tokenizer())
    pipe.set_progress_bar_config(disable=True)
    pipe.forwards = []
    pipe.model.register_forward_hook(lambda module, args, out: pipe.forwards.append(args[0].clone()))
    return pipe


def head(seed=0):
    torch.manual_seed(seed)
    made = QualityHead(32, "mlp")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made


PROMPT = torch.tensor([[2, 3, 4, 5, 6], [7, 8, 9, 2, 3]])
CALL = {"gen_length": 16, "block_length": 8, "output_type": "seq", "temperature": 1.0}


def run(pipe, steps=4, **call):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quality=None.*")
        call = {"input_ids": PROMPT, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(1)} | call
        return pipe(**(CALL | call))


@pytest.mark.parametrize("steps", [1, 3, 8, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_is_left_and_the_prompt_stays(kind, steps):
    options = {} if kind is MDLMScheduler else {"num_remask": 100}
    pipe = llada2(kind(block_length=8, **options))
    if kind is PrismScheduler:
        enable_prism(pipe, head())
    seen = []
    out = run(
        pipe,
        steps,
        callback_on_step_end=lambda p, i, t, k: seen.append(k["block_x"].clone()) or {},
        callback_on_step_end_tensor_inputs=["block_x"],
    )
    assert out.sequences.shape == (2, 16)
    assert not (out.sequences == MASK_ID).any()
    assert all(torch.equal(x[:, :5], PROMPT) for x in seen)
    # 5 prompt tokens and 16 more are three blocks of 8. Beyond as many steps as a block has tokens some are not needed.
    assert len(pipe.forwards) == 3 * steps if steps <= 3 else len(pipe.forwards) <= 3 * steps


def test_by_constructor_and_by_from_config_are_the_same():
    config = BlockRefinementScheduler(block_length=8).config
    made = PrismScheduler.from_config(config)
    assert made.config.block_length == 8
    assert not made.config.use_threshold
    first, second = llada2(PrismScheduler(block_length=8)), llada2()
    second.scheduler = PrismScheduler.from_config(second.scheduler.config)
    for pipe in (first, second):
        enable_prism(pipe, head())
    assert torch.equal(run(first, block_length=None).sequences, run(second, block_length=None).sequences)


@pytest.mark.parametrize("architecture", ["mlp", "block"])
def test_the_delivered_quality_is_that_of_our_own_pipeline(architecture):
    torch.manual_seed(3)
    judge = QualityHead(32, architecture)
    pipe, ours = llada2(PrismScheduler(num_remask=2)), PrismPipeline(twin("bert"), sudoku_tokenizer(), judge)
    enable_prism(pipe, judge)
    step, pairs = pipe.scheduler.step, []

    def spy(**arguments):
        delivered = pipe.scheduler.inbox.quality[:, -arguments["sample"].shape[1] :].clone()
        output = step(**arguments)
        pairs.append((arguments["sample"].clone(), delivered, output))
        return output

    pipe.scheduler.step = spy
    run(pipe, 4, gen_length=11)  # with the prompt exactly two blocks, so that no tail is hidden from the model
    for ids, (sample, delivered, _) in zip(pipe.forwards, pairs, strict=True):
        visible = sample != MASK_ID
        expected = ours.score(input_ids=ids)[0][:, -8:]
        torch.testing.assert_close(delivered[visible], expected[visible], rtol=1e-5, atol=1e-5)
    remasking = 0
    for place, (sample, quality, output) in enumerate(pairs):
        prompt = torch.zeros(2, 8, dtype=torch.bool)
        prompt[:, :5] = place < 4  # the prompt stands in the first block, which takes the first four steps
        for row in range(2):
            gone = output.editing_transfer_index[row]
            stay = (sample[row] != MASK_ID) & ~gone & ~prompt[row]
            assert not (gone & prompt[row]).any()
            remasking += int(gone.any())
            if gone.any() and stay.any():
                assert quality[row][gone].max() <= quality[row][stay].min()
    assert remasking


def test_a_block_of_prompt_and_tail_keeps_to_the_schedule():
    pipe, written = llada2(MDLMScheduler(order="confidence", block_length=8)), []
    run(
        pipe,
        4,
        gen_length=3,
        callback_on_step_end=lambda p, i, t, k: written.append(k["transfer_index"].sum(-1).tolist()) or {},
        callback_on_step_end_tensor_inputs=["transfer_index"],
    )
    assert written == [[1, 1], [1, 1], [1, 1]]  # three tokens, due after ceil(3 i / 4): 1, 2, 3


def test_the_pipelines_threshold_counts_only_with_use_threshold():
    fixed = llada2(PrismScheduler(order="confidence", num_remask=0))
    run(fixed, 8, threshold=1e-6, gen_length=11)
    adaptive = llada2(PrismScheduler(order="confidence", num_remask=0, use_threshold=True))
    run(adaptive, 8, threshold=1e-6, gen_length=11)
    strict = llada2(PrismScheduler(order="confidence", num_remask=0, use_threshold=True))
    run(strict, 8, threshold=1.0, gen_length=11)
    # Every token is surer than 1e-6: one forward a block, and one that finds nothing to do. None is surer than 1: a
    # token a forward, of 3 and 8; the schedule spreads the 3 over its 8 steps and has written them after 6.
    assert (len(fixed.forwards), len(strict.forwards)) == (6 + 8, 3 + 8)
    assert len(adaptive.forwards) <= 4
    with pytest.raises(ValueError, match="order"):
        PrismScheduler(use_threshold=True)
    with pytest.raises(ValueError, match="threshold"):
        PrismScheduler(order="confidence", use_threshold=True, threshold=-0.5)


def test_an_end_token_ends_a_row_without_masks_in_its_last_block():
    def prefer_the_end(module, args, out):
        out.logits[..., 3] += 100

    pipe = llada2(PrismScheduler(num_remask=0))
    pipe.model.register_forward_hook(prefer_the_end)
    out = run(pipe, 4, eos_early_stop=True, eos_token_id=3, gen_length=27, input_ids=torch.tensor([[2, 4, 5, 6, 7]]))
    assert (out.sequences[0, :3] == 3).all()
    assert (out.sequences[0, 3:] == MASK_ID).all()  # blocks that the pipeline never began
    assert len(pipe.forwards) <= 4


def test_without_a_head_it_warns_and_remasks_nothing_or_remasks_training_free():
    remasked = []
    watch = {
        "callback_on_step_end": lambda p, i, t, k: remasked.append(int(k["editing_transfer_index"].sum())) or {},
        "callback_on_step_end_tensor_inputs": ["editing_transfer_index"],
    }
    with pytest.warns(UserWarning, match="SelfConfidenceScheduler"):
        llada2(PrismScheduler(num_remask=2))(**CALL, input_ids=PROMPT, num_inference_steps=4, **watch)
    assert sum(remasked) == 0
    run(llada2(SelfConfidenceScheduler(num_remask=2)), 4, **watch)
    assert sum(remasked) > 0


def test_enable_with_a_repository_and_disable_leave_the_pipeline_as_it_was(tmp_path):
    pipe = llada2()
    before, text = pipe.scheduler, run(pipe).sequences
    plain = pipe.model(PROMPT).logits
    repo = tmp_path / "head"
    torch.manual_seed(5)
    from peft import LoraConfig, get_peft_model

    get_peft_model(twin("bert"), LoraConfig(r=4, target_modules=["query"], init_lora_weights=False)).save_pretrained(
        repo
    )
    head().save_pretrained(repo / "quality_head")
    PrismScheduler(num_remask=3).save_pretrained(repo / "scheduler")
    enable_prism(pipe, str(repo))
    assert pipe.scheduler.config.num_remask == 3
    assert not torch.allclose(pipe.model(PROMPT).logits, plain, atol=1e-3)
    enable_prism(pipe, str(repo))  # again: replaces, does not pile up
    assert len(pipe._prism.handles) == 2
    disable_prism(pipe)
    disable_prism(pipe)
    assert pipe.scheduler is before
    assert torch.equal(pipe.model(PROMPT).logits, plain)
    assert torch.equal(run(pipe).sequences, text)
    assert not pipe.model.get_output_embeddings()._forward_pre_hooks


def test_wrong_heads_and_pipelines_are_refused():
    with pytest.raises(ValueError, match="hidden size"):
        enable_prism(llada2(), QualityHead(16))
    with pytest.raises(TypeError, match="get_output_embeddings"):
        enable_prism(object(), head())
    pipe = llada2()
    with pytest.raises(OSError):
        enable_prism(pipe, "/nowhere/head")
    assert isinstance(pipe.scheduler, BlockRefinementScheduler)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_is_saved_and_loaded_with_our_scheduler_inside(kind, tmp_path):
    pipe = llada2(kind(order="confidence", block_length=8))
    pipe.save_pretrained(tmp_path)
    assert f'"prism_pipelines",\n    "{kind.__name__}"' in (tmp_path / "model_index.json").read_text()
    assert prism_pipelines.__version__  # diffusers finds our classes once the package is imported
    # diffusers 0.42 loads no optional component of this pipeline, whatever its scheduler; so the tokenizer is passed.
    back = LLaDA2Pipeline.from_pretrained(tmp_path, tokenizer=pipe.tokenizer)
    back.set_progress_bar_config(disable=True)
    assert type(back.scheduler) is kind
    assert back.scheduler.config.block_length == 8
    assert torch.equal(run(back, temperature=0.0).sequences, run(pipe, temperature=0.0).sequences)


def test_text_tuples_single_prompts_and_seeds():
    pipe = llada2(PrismScheduler(num_remask=1, block_length=8))
    enable_prism(pipe, head())
    out = run(pipe, prompt="5342", use_chat_template=False, input_ids=None, output_type="text")
    assert len(out.texts) == 1
    assert 0 < len(out.texts[0]) <= 16
    sequences, texts = run(pipe, return_dict=False)
    assert texts is None
    assert torch.equal(sequences, run(pipe).sequences)
    assert not torch.equal(sequences, run(pipe, generator=torch.Generator().manual_seed(2)).sequences)
    greedy = [run(pipe, sampling_method="greedy", generator=torch.Generator().manual_seed(s)).sequences for s in (1, 1)]
    assert torch.equal(*greedy)
    with pytest.raises(ValueError, match="sampling_method"):
        pipe.scheduler.set_timesteps(2)
        pipe.scheduler.step(
            torch.zeros(1, 2, 16), 0, torch.full((1, 2), MASK_ID), mask_token_id=MASK_ID, sampling_method="x"
        )
    with pytest.raises(ValueError, match="prompt_mask"):
        pipe.scheduler.step(
            torch.zeros(1, 2, 16), 0, torch.full((1, 2), MASK_ID), mask_token_id=MASK_ID, prompt_mask=torch.zeros(3)
        )


def test_from_pipe_shares_the_parts_and_generates_as_a_pipeline_made_of_them(tmp_path):
    pipe = LLaDA2Pipeline(twin("bert"), BlockRefinementScheduler(block_length=8), sudoku_tokenizer())
    judge = head()
    ours = PrismPipeline.from_pipe(pipe, quality_head=judge)
    assert ours.model is pipe.model and ours.tokenizer is pipe.tokenizer and isinstance(ours.scheduler, PrismScheduler)
    made = PrismPipeline(pipe.model, pipe.tokenizer, judge, PrismScheduler())
    call = {"input_ids": PROMPT, "gen_length": 8, "num_inference_steps": 4}
    given = [p(**call, generator=torch.Generator().manual_seed(0)).sequences for p in (ours, made)]
    assert torch.equal(*given)
    assert isinstance(PrismPipeline.from_pipe(pipe).scheduler, MDLMScheduler)

    ours.scheduler = PrismScheduler(num_remask=3)
    again = PrismPipeline.from_pipe(ours)
    assert again.quality_head is judge and again.scheduler is ours.scheduler
    assert again.config.mdm_spec == ours.config.mdm_spec
    head(1).save_pretrained(tmp_path / "quality_head")
    assert PrismPipeline.from_pipe(ours, quality_head=tmp_path).scheduler is ours.scheduler
    PrismScheduler(num_remask=5).save_pretrained(tmp_path / "scheduler")
    assert PrismPipeline.from_pipe(ours, quality_head=tmp_path).scheduler.config.num_remask == 5
    chosen = SelfConfidenceScheduler()
    assert PrismPipeline.from_pipe(ours, quality_head=tmp_path, scheduler=chosen).scheduler is chosen


def test_from_pipe_refuses_what_from_pretrained_refuses():
    pipe = LLaDA2Pipeline(twin("bert"), BlockRefinementScheduler(block_length=8), sudoku_tokenizer())
    with pytest.raises(ValueError, match="must have a `model`"):
        PrismPipeline.from_pipe(object())
    with pytest.raises(TypeError, match=r"got \['torch_dtype'\]"):
        PrismPipeline.from_pipe(pipe, torch_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="made for hidden size 17"):
        PrismPipeline.from_pipe(pipe, quality_head=QualityHead(17))
    model = pipe.model
    model.config.is_decoder = True
    causal = type(model)(model.config).eval()
    with pytest.raises(ValueError, match="is causal"):
        PrismPipeline.from_pipe(SimpleNamespace(model=causal, tokenizer=pipe.tokenizer))


# --- a plain module with the interface that the pipeline calls --------------------------------------------------------

V, H, MASK, EOS = 32, 16, 31, 30
TENSORS = ["block_x", "transfer_index", "editing_transfer_index", "sampled_tokens", "sampled_probs", "active_block"]


class Tiny(torch.nn.Module):
    """ids, attention_mask and position_ids to logits, bidirectional; no config, no transformers."""

    dtype = torch.float32

    def __init__(self, eos_bias=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = torch.nn.Embedding(V, H), torch.nn.Embedding(128, H)
        self.mix, self.lm_head = torch.nn.Linear(H, H), torch.nn.Linear(H, V)
        with torch.no_grad():
            self.lm_head.weight.normal_()
            self.lm_head.bias[EOS] += eos_bias
            self.lm_head.bias[MASK] += 50  # a model that would write masks
        self.calls = 0

    @property
    def device(self):
        return self.lm_head.weight.device

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask, position_ids):
        self.calls += 1
        hidden = self.embed(input_ids) + self.place(position_ids)
        seen = attention_mask[..., None].float()
        mean = (hidden * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.lm_head(hidden + self.mix(mean).tanh()))


def tiny(scheduler, tokenizer=None, judge=None, **model):
    pipe = LLaDA2Pipeline(Tiny(**model), scheduler, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    if judge is not None:
        enable_prism(pipe, judge)
    return pipe


def tiny_head(seed=1, hidden_size=H):
    torch.manual_seed(seed)
    made = QualityHead(hidden_size)
    torch.nn.init.normal_(made.out.weight)
    return made


def watched(pipe, steps, **call):
    """The pipeline's output and what its callback saw after each step."""
    seen = []
    given = {
        "input_ids": torch.arange(10).view(2, 5),
        "gen_length": 19,
        "block_length": 8,
        "num_inference_steps": steps,
        "temperature": 1.0,
        "mask_token_id": MASK,
        "eos_early_stop": False,
        "output_type": "seq",
        "generator": torch.Generator().manual_seed(0),
        "callback_on_step_end": lambda p, i, t, k: seen.append({name: v.clone() for name, v in k.items()}) or {},
        "callback_on_step_end_tensor_inputs": TENSORS,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quality=None.*")
        return pipe(**(given | call)), seen


@pytest.mark.parametrize("prompt", [1, 5, 7, 8])
@pytest.mark.parametrize("steps", [4, 8, 12])
def test_the_loop_is_run_in_every_block_also_where_the_prompt_leaves_less_than_a_step_each(steps, prompt):
    pipe = tiny(PrismScheduler(num_remask=1, loop_steps=3, loop_num_remask=1), judge=tiny_head())
    out, _ = watched(pipe, steps, input_ids=torch.ones(1, prompt, dtype=torch.long))
    blocks = -(-(prompt + 19) // 8) - prompt // 8
    assert not (out.sequences == MASK).any()
    assert pipe.model.calls == blocks * (steps + 3)


@pytest.mark.parametrize("kind", [SelfConfidenceScheduler, PrismScheduler])
def test_a_remask_is_written_none_in_the_last_step_and_a_mask_in_the_prompt_stays(kind):
    prompt = torch.tensor([[1, MASK, 3, 4, 5], [MASK, 2, 3, 4, MASK]])
    pipe = tiny(kind(num_remask=4), judge=tiny_head() if kind is PrismScheduler else None)
    out, seen = watched(pipe, 5, input_ids=prompt)
    assert not (out.sequences == MASK).any()
    for now in seen:
        assert torch.equal(now["block_x"][:, :5], prompt)
        assert (now["block_x"][:, -8:][now["editing_transfer_index"]] == MASK).all()
    remasked = [int(now["editing_transfer_index"].sum()) for now in seen]
    # The first block has 3 tokens for its 5 steps and is full after 4; the others take all 5.
    assert len(remasked) == 14 and remasked[3] == remasked[8] == remasked[13] == 0
    assert sum(remasked) > 0


def test_a_history_starts_anew_where_the_pipeline_has_overwritten_a_token():
    """The pipeline's `sample` is a view of a canvas that it writes into."""
    outs = []
    for copies in (False, True):
        pipe = tiny(SelfConfidenceScheduler(num_remask=3, history=None))
        if copies:
            step = pipe.scheduler.step
            pipe.scheduler.step = lambda step=step, **k: step(**(k | {"sample": k["sample"].clone()}))
        outs.append(watched(pipe, 8)[0].sequences)
    assert torch.equal(*outs)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0, 2.0])
def test_with_use_threshold_a_step_writes_what_is_surer_than_it_or_what_is_due_or_one(threshold):
    pipe = tiny(PrismScheduler(order="confidence", num_remask=0, use_threshold=True))
    out, seen = watched(pipe, 4, threshold=threshold, input_ids=torch.ones(2, 8, dtype=torch.long), gen_length=8)
    assert not (out.sequences == MASK).any()
    for i, now in enumerate(seen):
        written, probs = now["transfer_index"], now["sampled_probs"]
        assert (written | ~now["active_block"]).sum(-1).ge(2 * (i + 1)).all()
        behind = 2 * (i + 1) - (~now["active_block"]).sum(-1)
        for row in range(2):
            sure = (probs[row][written[row]] > threshold).sum()
            least = min(1, int(now["active_block"][row].sum()))
            assert written[row].sum() == max(int(sure), int(behind[row]), least)
    assert pipe.model.calls == len(seen) == (1 if threshold == 0 else 4 if threshold >= 1 else len(seen))


@pytest.mark.parametrize("kind", KINDS)
def test_callbacks_get_tensors_of_the_shape_of_the_block(kind):
    pipe = tiny(kind(), judge=tiny_head() if kind is PrismScheduler else None)
    _, seen = watched(pipe, 4)
    for now in seen:
        assert all(now[name].shape == (2, 8) for name in TENSORS[1:])
        wrote = now["transfer_index"]
        assert torch.equal(now["block_x"][:, -8:][wrote], now["sampled_tokens"][wrote])
        assert (now["sampled_probs"][wrote] > 0).all() and (now["sampled_probs"][~wrote] == 0).all()
        assert not (wrote & ~now["active_block"]).any()


def test_what_is_cut_off_after_gen_length_is_not_remasked_in_the_place_of_text():
    for seed in range(4):
        pipe = tiny(PrismScheduler(num_remask=1), judge=tiny_head(seed))
        _, seen = watched(pipe, 8, input_ids=torch.ones(1, 8, dtype=torch.long), gen_length=3)
        for now in seen:
            text_was_visible = (~now["active_block"][:, :3]).any()
            assert not (now["editing_transfer_index"][:, 3:].any() and text_was_visible)


@pytest.mark.parametrize("order", ["confidence", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_enabled_a_scheduler_keeps_to_the_schedule_of_the_text_and_writes_nothing_beyond(kind, order):
    """The last block holds 3 tokens of text and 5 that the pipeline cuts off."""
    options = {} if kind is MDLMScheduler else {"num_remask": 1}
    pipe = tiny(kind(order=order, **options))
    enable_prism(pipe, tiny_head() if kind is PrismScheduler else None)
    assert type(pipe.scheduler) is kind
    out, seen = watched(pipe, 4, input_ids=torch.ones(1, 8, dtype=torch.long), gen_length=11)
    assert MASK not in out.sequences
    left = []
    for now in seen[4:]:  # four steps for the block before
        changed = now["transfer_index"] | now["editing_transfer_index"]
        assert not changed[:, 3:].any()
        left.append(int((now["block_x"][0, -8:-5] == MASK).sum()))
    assert left == [2, 1, 0]  # ceil(3 i / 4) of them are due after i steps, so the third fills the block
    disable_prism(pipe)
    assert pipe.scheduler.__class__ is kind and not pipe.model._forward_pre_hooks


def test_enabled_without_a_head_the_default_remasks_training_free():
    pipe = tiny(BlockRefinementScheduler(block_length=8))
    before = pipe.scheduler
    enable_prism(pipe, None)
    assert type(pipe.scheduler) is SelfConfidenceScheduler and pipe.scheduler.config.block_length == 8
    _, seen = watched(pipe, 6)
    assert sum(int(now["editing_transfer_index"].sum()) for now in seen) > 0
    disable_prism(pipe)
    assert pipe.scheduler is before


def test_a_head_that_looks_around_does_not_see_padding():
    torch.manual_seed(0)
    pipe = tiny(PrismScheduler(num_remask=1), judge=QualityHead(H, "block", num_attention_heads=2))
    pipe.scheduler.set_timesteps(2)
    delivered = []
    for padding in (1, 2):
        ids = torch.tensor([[padding, padding, 3, 4, 5, 6]])
        pipe.model(ids, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]), position_ids=torch.arange(6)[None])
        delivered.append(pipe.scheduler.inbox.quality)
    torch.testing.assert_close(delivered[0][:, 2:], delivered[1][:, 2:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eos_bias", [-50.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_an_end_token_ends_a_row_but_not_one_of_the_prompt(kind, seed, eos_bias):
    pipe = tiny(kind(), judge=tiny_head(seed) if kind is PrismScheduler else None, eos_bias=eos_bias)
    prompt = torch.tensor([[EOS, 2, 3, 4, 5], [1, 2, EOS, 4, 5]])  # chat templates end a turn with it
    call = {"eos_early_stop": True, "eos_token_id": EOS, "gen_length": 83, "input_ids": prompt}
    out, _ = watched(pipe, 8, generator=torch.Generator().manual_seed(seed), **call)
    for row in out.sequences.tolist():
        assert MASK not in (row[: row.index(EOS)] if EOS in row else row)
    assert (EOS in out.sequences) == (eos_bias > 0) == (pipe.model.calls < 83)


@pytest.mark.parametrize("num_remask", [0, 2])
def test_one_block_gives_the_tokens_of_our_own_pipeline(num_remask):
    """Prompt and generation are one block each, so both pipelines show the model the same canvas."""
    scheduler = PrismScheduler(order="confidence", num_remask=num_remask)
    prompt = torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9]])
    theirs, ours = llada2(scheduler), PrismPipeline(twin("bert"), sudoku_tokenizer(), head(), scheduler)
    for model in (theirs.model, ours.model):  # only ours knows which ids the tokenizer lacks
        model.get_output_embeddings().bias.data[len(sudoku_tokenizer()) :] = -1e4
    enable_prism(theirs, head())
    own = ours(input_ids=prompt, gen_length=8, num_inference_steps=6, temperature=0.0, output_type="seq")
    got = run(theirs, 6, input_ids=prompt, gen_length=8, temperature=0.0, eos_early_stop=False)
    assert torch.equal(got.sequences, own.sequences[:, 8:])


def test_the_score_is_delivered_under_a_peft_wrapper():
    from peft import LoraConfig, get_peft_model

    pipe = llada2(PrismScheduler(num_remask=2))
    wrapped = get_peft_model(pipe.model, LoraConfig(r=2, target_modules=["query"]))
    pipe.register_modules(model=wrapped)
    enable_prism(pipe, head())
    _, seen = watched(pipe, 6, input_ids=PROMPT, mask_token_id=MASK_ID)
    assert sum(int(now["editing_transfer_index"].sum()) for now in seen) > 0


def test_a_head_that_does_not_fit_leaves_the_one_in_use():
    pipe = tiny(PrismScheduler(num_remask=1), judge=tiny_head())
    with pytest.raises(ValueError, match="made for hidden size 17, and the output head of Tiny reads 16"):
        enable_prism(pipe, tiny_head(hidden_size=17))
    _, seen = watched(pipe, 8)
    assert any(now["editing_transfer_index"].any() for now in seen)


@pytest.mark.parametrize("kind", [P2Scheduler, TokenCriticScheduler])
def test_a_scheduler_that_does_not_run_there_is_refused_and_one_recommended_replaced(kind, tmp_path):
    pipe = tiny(BlockRefinementScheduler(block_length=8))
    before = pipe.scheduler
    with pytest.raises(TypeError, match=f"`scheduler` must be one of PrismScheduler, .* got {kind.__name__}"):
        enable_prism(pipe, tiny_head(), scheduler=kind())
    assert pipe.scheduler is before and not pipe.model._forward_pre_hooks
    tiny_head().save_pretrained(tmp_path / "quality_head")
    kind().save_pretrained(tmp_path / "scheduler")
    with pytest.warns(UserWarning, match=f"recommends {kind.__name__}, which does not run in LLaDA2Pipeline"):
        enable_prism(pipe, str(tmp_path))
    assert type(pipe.scheduler) is PrismScheduler and pipe.scheduler.config.block_length == 8
    assert not (watched(pipe, 4)[0].sequences == MASK).any()


@pytest.mark.parametrize("name", ["PrismSchedulerOutput", "arguments", "", None, ["P2Scheduler"]])
def test_a_recommendation_that_is_no_scheduler_is_refused(name, tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=r"known here: .*MDLMScheduler"):
        load_scheduler(str(tmp_path), {})


@pytest.mark.parametrize("kind", [SelfConfidenceScheduler, MDLMScheduler])
def test_a_scheduler_set_while_enabled_without_a_head_stays(kind):
    pipe = tiny(BlockRefinementScheduler(block_length=8))
    enable_prism(pipe, None)
    chosen = pipe.scheduler = kind.from_config(pipe.scheduler.config, order="confidence")
    disable_prism(pipe)
    assert pipe.scheduler is chosen


def test_no_prism_scheduler_is_left_without_its_head():
    pipe = tiny(BlockRefinementScheduler(block_length=8), judge=tiny_head())
    before = pipe._prism.scheduler
    pipe.scheduler = PrismScheduler.from_config(pipe.scheduler.config, num_remask=3)
    disable_prism(pipe)
    assert pipe.scheduler is before and type(before) is BlockRefinementScheduler


def test_minimal_topk_bounds_the_steps_of_a_run_as_the_pipeline_has_it():
    calls = []
    for minimal_topk in (1, 4):
        pipe = tiny(MDLMScheduler())
        watched(pipe, 8, input_ids=torch.ones(1, 8, dtype=torch.long), gen_length=16, minimal_topk=minimal_topk)
        calls.append(pipe.model.calls)
    assert calls == [2 * 8, 2 * 4]  # two blocks of at most gen_length // minimal_topk steps


def test_schedulers_may_be_swapped_while_prism_is_enabled():
    pipe = tiny(BlockRefinementScheduler(), judge=tiny_head())
    pipe.scheduler = PrismScheduler.from_config(pipe.scheduler.config, num_remask=3)
    _, seen = watched(pipe, 6)
    assert max(int(now["editing_transfer_index"].sum(-1).max()) for now in seen) > 1
    enable_prism(pipe, tiny_head(2))  # another head, and the scheduler in use is kept
    assert pipe.scheduler.config.num_remask == 3
    chosen = pipe.scheduler = SelfConfidenceScheduler.from_config(pipe.scheduler.config)
    assert not (watched(pipe, 6)[0].sequences == MASK).any()
    disable_prism(pipe)
    assert pipe.scheduler is chosen


def test_a_config_goes_to_diffusers_scheduler_and_back():
    ours = PrismScheduler.from_config(BlockRefinementScheduler(block_length=8, threshold=0.5).config)
    back = BlockRefinementScheduler.from_config(ours.config)
    assert (back.config.block_length, back.config.threshold) == (8, 0.5)


@pytest.mark.slow
def test_a_saved_pipeline_loads_in_another_process_also_if_we_are_imported_before_diffusers(tmp_path):
    llada2(PrismScheduler(order="margin", num_remask=3, block_length=8)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["prism_pipelines", "PrismScheduler"]
    code = "import prism_pipelines\nfrom diffusers import LLaDA2Pipeline\n"
    code += f"s = LLaDA2Pipeline.from_pretrained({str(tmp_path)!r}, tokenizer=None).scheduler\n"
    code += "print(type(s) is prism_pipelines.PrismScheduler, s.config.num_remask, s.config.order)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split()[-3:] == ["True", "3", "margin"]


# --- the cases of diffusers' own tests/pipelines/llada2/test_llada2.py, with our schedulers ---------------------------


class Decoder:
    """A tokenizer that only decodes."""

    eos_token_id, mask_token_id = None, MASK

    def batch_decode(self, sequences, skip_special_tokens):
        return [f"decoded_{len(sequence)}" for sequence in sequences]


# Top-k commits are forced there by a threshold above 1, and the deprecated `steps` has become `num_inference_steps`.
THEIRS = {
    "use_chat_template": False,
    "temperature": 0.0,
    "threshold": 2.0,
    "minimal_topk": 1,
    "callback_on_step_end": None,
    "generator": None,
}


def theirs(pipe, **call):
    ids = torch.tensor([[5, 6, 7, 8]])
    return watched(pipe, **({"steps": 8, "input_ids": ids, "gen_length": 16} | THEIRS | call))[0]


@pytest.mark.parametrize("kind", KINDS)
class TestCasesOfDiffusers:
    def test_a_batch_is_generated_in_full(self, kind):
        ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
        out = theirs(tiny(kind()), input_ids=ids, gen_length=24)
        assert out.sequences.shape == (2, 24) and not (out.sequences == MASK).any()

    def test_a_tuple_is_returned_on_request(self, kind):
        sequences, texts = theirs(tiny(kind()), return_dict=False)
        assert sequences.shape == (1, 16) and texts is None

    @pytest.mark.parametrize("output_type", ["seq", "text"])
    def test_there_are_no_texts_without_a_tokenizer(self, kind, output_type):
        out = theirs(tiny(kind()), output_type=output_type)
        assert out.sequences.shape == (1, 16) and out.texts is None

    def test_texts_are_decoded_and_the_mask_comes_from_the_tokenizer(self, kind):
        out = theirs(tiny(kind(), Decoder()), output_type="text", mask_token_id=None)
        assert out.texts == ["decoded_16"]

    def test_wrong_calls_are_refused(self, kind):
        for wrong in ({"output_type": "invalid"}, {"input_ids": None}, {"input_ids": None, "prompt": "hello"}):
            with pytest.raises(ValueError):
                theirs(tiny(kind()), **wrong)
        with pytest.raises(ValueError, match="not both"):
            theirs(
                tiny(kind(), Decoder()), input_ids=None, prompt="hello", messages=[{"role": "user", "content": "hi"}]
            )

    def test_one_dimensional_ids_are_a_batch_of_one(self, kind):
        flat = theirs(tiny(kind(order="confidence")), input_ids=torch.tensor([5, 6, 7, 8]))
        assert torch.equal(flat.sequences, theirs(tiny(kind(order="confidence"))).sequences)


def test_finished_rows_are_asked_of_the_class_as_in_diffusers():
    canvas, no = torch.tensor([[5, 9, 2, 7], [5, 2, 6, 7], [5, 6, 6, 6]]), torch.zeros(3, dtype=torch.bool)
    given = {
        "cur_x": canvas, "sampled_tokens": canvas[:, 2:], "final_transfer": canvas[:, 2:] > 0, "finished": no,
        "eos_token_id": 2, "mask_token_id": 9, "prompt_length": 2,
    }  # fmt: skip
    for kind in (PrismScheduler, SelfConfidenceScheduler, MDLMScheduler):
        assert kind.check_eos_finished(**given).tolist() == kind().check_eos_finished(**given).tolist()
        assert kind.check_eos_finished(**given).tolist() == [True, False, False]
