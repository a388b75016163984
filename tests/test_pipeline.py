"""The pipeline on tiny random twins of four families: against the model's own forward, and by laws."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
)

from prism_pipelines import (
    MDLMScheduler,
    MDMSpec,
    PrismPipeline,
    PrismScheduler,
    QualityHead,
    SelfConfidenceScheduler,
    resolve_spec,
)
from prism_pipelines.models.checks import max_length
from prism_pipelines.models.denoiser import LazyLogits, MaskedDenoiser
from prism_pipelines.sampling.canvas import split_blocks
from prism_pipelines.sudoku import HARD_PUZZLE, MASK_ID, sudoku_tokenizer

SHARED = {
    "vocab_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SHARED |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
TWINS = {
    "bert": (BertForMaskedLM, BertConfig(**SHARED, max_position_embeddings=96)),
    "roberta": (RobertaForMaskedLM, RobertaConfig(**SHARED, max_position_embeddings=97)),
    "roberta-prelayernorm": (
        RobertaPreLayerNormForMaskedLM,
        RobertaPreLayerNormConfig(**SHARED, max_position_embeddings=97),
    ),
    "modernbert": (
        ModernBertForMaskedLM,
        ModernBertConfig(**SHARED, max_position_embeddings=96, cls_token_id=None, sep_token_id=None),
    ),
}


def twin(family="roberta-prelayernorm"):
    """A tiny random model; every parameter is random, biases too, or a forgotten bias would not be seen."""
    torch.manual_seed(0)
    model_class, config = TWINS[family]
    model = model_class(copy.deepcopy(config)).eval()  # a test may write into it
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def pipeline(family="roberta-prelayernorm", head=True, **parts):
    torch.manual_seed(1)
    parts.setdefault("quality_head", QualityHead(32, "mlp") if head else None)
    pipe = PrismPipeline(twin(family), sudoku_tokenizer(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def forwards(monkeypatch):
    """Counts the forward passes of every model."""
    count = []
    original = RobertaPreLayerNormForMaskedLM.forward

    def forward(self, *args, **kwargs):
        count.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RobertaPreLayerNormForMaskedLM, "forward", forward)
    return count


# --- the denoiser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TWINS)
def test_lazy_logits_are_the_models_own_logits(family):
    model = twin(family)
    denoiser = MaskedDenoiser(
        model, resolve_spec(model.config, mask_token_id=MASK_ID), num_tokens=12, suppress_tokens=(0,)
    )
    ids = torch.randint(1, 11, (3, 9), generator=seeded())
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 6:] = 0
    with torch.no_grad():
        dense = model(input_ids=ids, attention_mask=attention_mask).logits
        hidden = denoiser.hidden(ids, attention_mask)
        positions = torch.rand(ids.shape, generator=seeded()) < 0.5
        rows = LazyLogits(denoiser, hidden)[positions]
    possible = [i for i in range(16) if i not in (0, MASK_ID) and i < 12]
    torch.testing.assert_close(rows[:, possible], dense[positions][:, possible], rtol=0, atol=1e-5)
    assert (rows[:, [i for i in range(16) if i not in possible]] == -torch.inf).all()


def test_a_shift_moves_logits_and_not_hidden_states():
    model = twin()
    ids = torch.randint(1, 10, (2, 7), generator=seeded())
    plain = MaskedDenoiser(model, MDMSpec(MASK_ID))
    shifted = MaskedDenoiser(model, MDMSpec(MASK_ID, logit_shift=1))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        hidden = plain.hidden(ids)
        assert torch.equal(hidden, shifted.hidden(ids))
        before = plain.logits(hidden, everywhere).view(2, 7, -1)
        after = shifted.logits(hidden, everywhere).view(2, 7, -1)
    for i in range(7):
        torch.testing.assert_close(after[:, i], before[:, max(i - 1, 0)])


def test_the_output_head_runs_at_no_row_of_the_forward_and_only_at_rows_asked_for(monkeypatch):
    pipe = pipeline(scheduler=PrismScheduler(num_remask=2))
    rows = []
    pipe.model.get_output_embeddings().register_forward_hook(lambda m, a, out: rows.append(out.shape[:-1].numel()))
    written = []
    pipe(
        infill="1" + "." * 20,
        num_inference_steps=5,
        callback_on_step_end=lambda p, i, t, s: written.append(int(s["unmasked"].sum())),
    )
    assert rows == [n for count in written for n in (0, count)]


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TWINS)
@pytest.mark.parametrize(
    "scheduler", [PrismScheduler(num_remask=3), MDLMScheduler(order="confidence"), SelfConfidenceScheduler()]
)
def test_givens_stay_and_no_mask_is_left(family, scheduler):
    out = pipeline(family, scheduler=scheduler)(infill=[HARD_PUZZLE, "." * 80 + "7"], num_inference_steps=9)
    for text, puzzle in zip(out.texts, [HARD_PUZZLE, "." * 80 + "7"], strict=True):
        assert len(text) == 81 and set(text) <= set("123456789")
        assert all(a == b for a, b in zip(text, puzzle, strict=True) if b != ".")


def test_nfe_is_the_number_of_forwards(forwards):
    pipe = pipeline(scheduler=PrismScheduler(num_remask=2, loop_steps=3, loop_num_remask=1))
    out = pipe(gen_length=12, num_samples=2, num_inference_steps=6, return_quality=True)
    assert out.nfe == len(forwards) == 6 + 3 + 1 and out.nfe_per_row == [10, 10]


def test_a_scheduler_does_not_run_by_the_fields_that_it_keeps_of_another(forwards):
    looped = PrismScheduler(order="confidence", loop_steps=3, loop_num_remask=1, use_threshold=True, threshold=1e-6)
    pipe = pipeline(scheduler=MDLMScheduler.from_config(looped.config))
    assert pipe(gen_length=12, num_inference_steps=6).nfe == len(forwards) == 1
    pipe.scheduler = MDLMScheduler.from_config(PrismScheduler(order="confidence", quality_threshold=0.9).config)
    forwards.clear()
    assert pipe(gen_length=12, num_inference_steps=12, threshold=1e-6).nfe == len(forwards) == 1


def test_a_threshold_saves_forwards_and_loses_nothing(forwards):
    pipe = pipeline()
    settings = {"gen_length": 12, "num_inference_steps": 12, "generator": seeded(), "output_type": "seq"}
    kinds = {"order": "confidence", "temperature": 0.0, "num_remask": 0}
    pipe.scheduler = PrismScheduler(**kinds)
    exact = pipe(**settings)
    assert exact.nfe == 12
    pipe.scheduler = PrismScheduler(**kinds, use_threshold=True, threshold=1.0)
    assert torch.equal(pipe(**settings).sequences, exact.sequences)  # nothing is surer than 1: the schedule alone
    forwards.clear()
    pipe.scheduler = PrismScheduler(**kinds, use_threshold=True, threshold=1e-6)
    out = pipe(**settings, block_length=4)
    assert out.nfe == len(forwards) == 3  # all tokens are surer than that: one forward for each block
    assert out.nfe_per_row == [3]
    assert not (out.sequences == MASK_ID).any()


def test_more_steps_than_masks_is_legal(forwards):
    out = pipeline()(infill="12..", num_inference_steps=10)
    assert out.nfe == len(forwards) == 10 and MASK_ID not in out.sequences


@pytest.mark.parametrize(("scheduler", "warns"), [(MDLMScheduler(), True), (SelfConfidenceScheduler(), False)])
def test_steps_that_can_do_nothing_are_told(scheduler, warns):
    pipe = pipeline(scheduler=scheduler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe(infill="12..", num_inference_steps=10)
        pipe(infill="12..", num_inference_steps=2)
    told = [str(one.message) for one in caught if "write nothing" in str(one.message)]
    assert told == (["8 of 10 steps will write nothing: there are fewer tokens to generate, and MDLMScheduler remasks "
                     "none. Lower `num_inference_steps`."] if warns else [])  # fmt: skip


def test_the_same_generator_gives_the_same_tokens_and_another_does_not():
    pipe = pipeline()
    a, b, c = (pipe(gen_length=40, num_inference_steps=8, generator=seeded(s)).texts for s in (0, 0, 1))
    assert a == b != c


def test_with_a_generator_for_each_row_a_row_does_not_depend_on_its_neighbours():
    pipe = pipeline(scheduler=PrismScheduler(num_remask=2))
    texts = ["1......", "......22......", ".3."]
    together = pipe(infill=texts, num_inference_steps=4, generator=[seeded(i) for i in range(3)]).texts
    alone = [pipe(infill=t, num_inference_steps=4, generator=[seeded(i)]).texts[0] for i, t in enumerate(texts)]
    assert together == alone


def test_prompts_of_different_length_continue_as_they_do_alone():
    pipe = pipeline("modernbert")  # relative positions: padding on the left must not shift anything
    prompts = ["123", "45678"]
    together = pipe(prompts, gen_length=6, num_inference_steps=3, generator=[seeded(0), seeded(1)]).texts
    alone = [
        pipe(p, gen_length=6, num_inference_steps=3, generator=[seeded(i)]).texts[0] for i, p in enumerate(prompts)
    ]
    assert together == alone and all(len(text) == 6 for text in together)


def test_a_mask_token_in_a_prompt_is_kept():
    out = pipeline()("1.2", gen_length=4, num_inference_steps=2)
    assert out.sequences[0, :3].tolist() == [1, MASK_ID, 2] and MASK_ID not in out.sequences[0, 3:]


def test_num_samples_repeats_rows():
    out = pipeline()(["12", "34"], gen_length=3, num_samples=2, num_inference_steps=1)
    assert out.sequences[:, :2].tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


def test_blocks_are_written_from_left_to_right_and_share_the_steps():
    generated = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0]], dtype=torch.bool)
    blocks = split_blocks(generated, 2, 7)
    assert [steps for _, steps in blocks] == [3, 2, 2]
    assert [b.int().tolist() for b, _ in blocks] == [
        [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]],
        [[0, 0, 0, 1, 1, 0], [0] * 6],
        [[0, 0, 0, 0, 0, 1], [0] * 6],
    ]
    assert [steps for _, steps in split_blocks(generated, 2, None)] == [2, 2, 1]  # one for each token
    seen = []
    pipe = pipeline()
    out = pipe(
        gen_length=5,
        block_length=2,
        num_inference_steps=7,
        callback_on_step_end=lambda p, i, t, s: seen.append(s["unmasked"][0].nonzero().flatten().tolist()),
    )
    assert out.nfe == 7 and MASK_ID not in out.sequences
    assert {i for step in seen[:3] for i in step} == {0, 1} and {i for step in seen[5:] for i in step} == {4}


def test_blocks_with_nothing_to_write_take_no_steps():
    generated = torch.zeros(2, 16, dtype=torch.bool)
    generated[0, [0, 13]] = generated[1, 4:9] = True
    positions = torch.arange(16).expand(2, 16)
    blocks = split_blocks(generated, 4, 2, positions)
    assert [steps for _, steps in blocks] == [1, 1]
    assert [[row.nonzero().flatten().tolist() for row in block] for block, _ in blocks] == [
        [[0], [4, 5, 6, 7]],
        [[13], [8]],
    ]
    assert [steps for _, steps in split_blocks(generated, 4, None, positions)] == [4, 1]


def test_quality_is_the_heads_probability_and_one_outside_the_generated_part():
    pipe = pipeline()
    out = pipe(infill="12....", num_inference_steps=2, return_quality=True)
    with torch.no_grad():
        hidden = pipe.denoiser.hidden(out.sequences)
        expected = pipe.quality_head(hidden).sigmoid()
    assert out.quality.dtype == torch.float32 and (out.quality[0, :2] == 1).all()
    torch.testing.assert_close(out.quality[0, 2:], expected[0, 2:])
    quality, ids, tokens = pipe.score(out.texts)
    torch.testing.assert_close(quality, expected)
    assert torch.equal(ids, out.sequences) and tokens == [list(out.texts[0])]


def test_the_trace_records_every_step():
    out = pipeline(scheduler=PrismScheduler(num_remask=2))(gen_length=20, num_inference_steps=5, return_trace=True)
    assert len(out.trace) == 5 and torch.equal(out.trace[-1].sample, out.sequences)
    sample = torch.full((1, 20), MASK_ID)
    for step in out.trace:
        assert (sample[step.unmasked] == MASK_ID).all() and (step.sample[step.unmasked] != MASK_ID).all()
        assert (sample[step.remasked] != MASK_ID).all() and (step.sample[step.remasked] == MASK_ID).all()
        sample = step.sample


def test_a_callback_may_change_the_sample_and_gets_what_it_asks_for():
    def callback(pipe, i, t, tensors):
        assert set(tensors) == {"sample"}
        return {"sample": tensors["sample"].masked_fill(tensors["sample"] != MASK_ID, 5)}

    out = pipeline()(
        gen_length=6, num_inference_steps=3, callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["sample"],
    )  # fmt: skip
    assert out.sequences.tolist() == [[5] * 6]


def test_sampling_arguments_override_the_scheduler():
    pipe = pipeline(scheduler=MDLMScheduler(temperature=1.0))
    greedy = [pipe(gen_length=30, num_inference_steps=1, temperature=0, generator=seeded(s)).texts for s in (0, 1)]
    assert greedy[0] == greedy[1]
    one = [pipe(gen_length=30, num_inference_steps=1, top_k=1, generator=seeded(s)).texts for s in (0, 1)]
    assert one == greedy


def test_ids_in_and_ids_out_without_a_tokenizer():
    pipe = PrismPipeline(twin(), mdm_spec=MDMSpec(MASK_ID))
    out = pipe(infill=torch.tensor([[1, MASK_ID, 3]]), num_inference_steps=1)
    assert out.texts is None and out.sequences[0, [0, 2]].tolist() == [1, 3]
    assert isinstance(pipe.scheduler, MDLMScheduler)
    fields = pipe(gen_length=3, num_inference_steps=1, return_dict=False, output_type="seq")
    sequences, texts, quality, nfe, nfe_per_row, trace, confidence, accepted, probs = fields  # None too, in its place
    assert texts is quality is trace is confidence is accepted is probs is None and nfe == 1 and nfe_per_row == [1]
    assert sequences.shape == (1, 3)


def test_bfloat16_leaves_the_head_in_float32():
    pipe = pipeline().to(torch.bfloat16)
    out = pipe(infill=HARD_PUZZLE, num_inference_steps=4, return_quality=True)
    assert pipe.model.dtype == torch.bfloat16 and out.quality.dtype == torch.float32
    assert {p.dtype for p in pipe.quality_head.parameters()} == {torch.float32}


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "`gen_length` is required"),
        ({"prompt": "1"}, "`gen_length` is required"),
        ({"prompt": "1", "infill": "."}, "Pass one of"),
        ({"infill": "123"}, "`infill` row 0 holds no mask token"),
        ({"infill": [".", "123"]}, "`infill` row 1 holds no mask token"),
        ({"infill": []}, "`infill` is empty"),
        ({"infill": ".", "gen_length": 3}, "`gen_length` has no effect"),
        ({"infill": "." * 97}, "The canvas has 97 tokens, and the model takes 96"),
        ({"infill": torch.tensor([[MASK_ID, 16]])}, "id 16; the model knows ids from 0 to 15"),
        ({"infill": torch.tensor([[MASK_ID, -1]])}, "id -1"),
        ({"infill": torch.tensor([[1.0]])}, "got torch.float32"),
        ({"infill": [[MASK_ID, 1], [MASK_ID]]}, "rows of one length"),
        ({"infill": torch.ones(1, 2, 3, dtype=torch.long)}, r"got \(1, 2, 3\)"),
        ({"infill": ".", "attention_mask": torch.ones(1, 1)}, "`attention_mask` only applies to ids"),
        (
            {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3), "gen_length": 1},
            "shape of the ids",
        ),
        ({"messages": [{"role": "user", "content": "hi"}], "gen_length": 1}, "chat template"),
        ({"gen_length": 0}, "`gen_length` must be an integer of at least 1, got 0"),
        ({"gen_length": 3, "num_samples": 0}, "`num_samples`"),
        ({"gen_length": 3, "num_inference_steps": 0}, "`num_inference_steps`"),
        ({"gen_length": 3, "num_inference_steps": 2.5}, "`num_inference_steps`"),
        ({"gen_length": 9, "block_length": 2, "num_inference_steps": 4}, "5 blocks of 2 tokens"),
        ({"gen_length": 3, "temperature": -1.0}, "`temperature`"),
        ({"gen_length": 3, "top_p": 0.0}, "`top_p`"),
        ({"gen_length": 3, "top_k": 0}, "`top_k`"),
        ({"gen_length": 3, "output_type": "pil"}, "`output_type`"),
        ({"gen_length": 3, "num_samples": 2, "generator": [torch.Generator()]}, "list of 1, but there are 2 rows"),
        ({"gen_length": 3, "callback_on_step_end_tensor_inputs": ["latents"]}, "latents"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        pipeline()(**call)


def test_remasking_by_quality_without_a_head_says_what_to_pass():
    pipe = pipeline(head=False, scheduler=PrismScheduler())
    with pytest.raises(ValueError, match="SelfConfidenceScheduler"):
        pipe(gen_length=3)
    with pytest.raises(ValueError, match="load_quality_head"):
        pipe.score(["123"])
    with pytest.raises(ValueError, match="quality head"):
        pipeline(head=False)(gen_length=3, return_quality=True)


def test_a_head_of_another_size_is_refused():
    with pytest.raises(ValueError, match="hidden size 48, and RobertaPreLayerNormForMaskedLM has 32"):
        pipeline(quality_head=QualityHead(48))


def test_unknown_models_need_a_mask_id():
    config = BertConfig(**SHARED)
    config.model_type = "novel"
    with pytest.raises(ValueError, match="No mask token is known for 'novel'"):
        resolve_spec(config, None, name="novel")
    assert resolve_spec(config, mask_token_id=3).mask_token_id == 3
    with pytest.raises(ValueError, match="outside its vocabulary of 16"):
        resolve_spec(config, mask_token_id=16)


# --- saving and loading -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    pipe = pipeline(scheduler=PrismScheduler(num_remask=3, order="confidence"))
    pipe.save_pretrained(tmp_path / "pipe")
    return pipe, tmp_path / "pipe"


def test_a_saved_pipeline_comes_back_the_same(saved):
    pipe, folder = saved
    again = PrismPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    assert again.config.mdm_spec == pipe.config.mdm_spec and again.scheduler.config.num_remask == 3
    call = {"infill": HARD_PUZZLE, "num_inference_steps": 7}
    assert again(**call, generator=seeded()).texts == pipe(**call, generator=seeded()).texts


@pytest.mark.slow
def test_a_saved_pipeline_loads_in_a_fresh_process_and_names_no_local_path(saved, tmp_path):
    _, folder = saved
    code = "import sys; from prism_pipelines import PrismPipeline; p = PrismPipeline.from_pretrained(sys.argv[1]);"
    code += "print(type(p.scheduler).__name__, type(p.quality_head).__name__)"
    moved = folder.rename(tmp_path / "moved")
    ran = subprocess.run([sys.executable, "-c", code, str(moved)], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["PrismScheduler", "QualityHead"]
    index = (moved / "model_index.json").read_text()
    assert '"prism_pipelines"' in index and "scheduling_prism" not in index
    for path in moved.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name
    assert not list(moved.rglob("*.bin")) and len(list(moved.rglob("*.safetensors"))) == 2


def test_a_plain_model_repository_loads_with_and_without_a_head(saved, tmp_path):
    pipe, folder = saved
    plain = tmp_path / "plain"
    pipe.model.save_pretrained(plain)
    pipe.tokenizer.save_pretrained(plain)
    assert isinstance(PrismPipeline.from_pretrained(plain).scheduler, MDLMScheduler)
    with_head = PrismPipeline.from_pretrained(plain, quality_head=str(folder), torch_dtype=torch.bfloat16)
    assert isinstance(with_head.scheduler, PrismScheduler) and with_head.model.dtype == torch.bfloat16
    for name, value in pipe.quality_head.state_dict().items():
        assert torch.equal(value, with_head.quality_head.state_dict()[name])
    with pytest.warns(UserWarning, match="goes on with MDLMScheduler"):
        with_head.unload_quality_head()
    with_head.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_head(gen_length=3, num_inference_steps=2)


def test_a_causal_model_is_refused(tmp_path):
    from prism_pipelines.models.checks import check_attention

    config = BertConfig(**SHARED, is_decoder=True)
    causal = MaskedDenoiser(BertLMHeadModel(config).eval(), MDMSpec(MASK_ID))
    with pytest.raises(ValueError, match="'my/model' is causal"):
        check_attention(causal, "my/model")
    for family in TWINS:
        check_attention(MaskedDenoiser(twin(family), MDMSpec(MASK_ID)), family)


@pytest.mark.parametrize("family", TWINS)
def test_the_length_limit_is_the_longest_input_the_model_takes(family):
    model = twin(family)
    limit = max_length(model.config)
    assert limit == 96
    model(input_ids=torch.ones(1, limit, dtype=torch.long))
    if family != "modernbert":  # rotary positions go on
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.ones(1, limit + 1, dtype=torch.long))
