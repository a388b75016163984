"""What the pipeline makes of odd and wrong input: prompts, padding, end tokens, callbacks, generators, specs."""

import dataclasses
import json

import pytest
import torch
from family_twins import EVERY, MASK, PAD, H, aligned, checkpoint, greedy, load
from safetensors.torch import save_file
from test_generate_many import CHAT, pipeline
from tokenizers.processors import TemplateProcessing

from prism_pipelines import CheckpointRecipe, MDLMScheduler, MDMSpec, PrismPipeline, PrismScheduler, QualityHead
from prism_pipelines.sampling.canvas import canvas_of_prompt
from prism_pipelines.sampling.encoding import prompt_ids

CALL = {"gen_length": 6, "num_inference_steps": 4, "output_type": "seq"}
EOS, MASK_WORD, UNKNOWN = 1, 28, 29  # of the pipeline of words
CHAT_OF_ONE = [{"role": "user", "content": "w1"}]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def words(**parts):
    return pipeline(**parts)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"generator": 0}, "`generator` must be a torch.Generator"),
        ({"generator": [seeded(), "1"]}, "`generator` must be a torch.Generator"),
        ({"generator": [seeded(), None]}, "`generator` must be a torch.Generator"),
        ({"cfg_scale": float("inf")}, "`cfg_scale` must be"),
        ({"cfg_scale": "2"}, "`cfg_scale` must be"),
        ({"stop": 3}, "`stop` must be"),
        ({"stop": ["a", ""]}, "`stop` must be"),
        ({"eos_token_id": 10**6, "eos_early_stop": True}, "`eos_token_id` must be a token id below 30"),
        ({"eos_token_id": MASK_WORD, "stop": "w1"}, "not the mask, got 28"),
        ({"suppress_tokens": 30}, "`suppress_tokens` must be a token id below 30"),
        ({"suppress_tokens": "w1"}, "`suppress_tokens` must be a token id below 30"),
        ({"eos_token_id": torch.tensor(1)}, "`eos_token_id` must be a token id"),
        ({"callback_on_step_end": lambda *given: 5}, "must return a dict or None, got int"),
        ({"callback_on_step_end": lambda p, i, t, k: {"sample": k["sample"].float()}}, "int64, got torch.float32"),
        ({"callback_on_step_end": lambda p, i, t, k: {"sample": k["sample"].tolist()}}, "int64, got list"),
        ({"callback_on_step_end": lambda p, i, t, k: {"sample": k["sample"][:, :3]}}, r"shape \(2, 7\)"),
        ({"callback_on_step_end": lambda p, i, t, k: {"sample": k["sample"] + 99}}, "ids from 0 to 29"),
        ({"attention_mask": torch.ones(2, 1)}, "`attention_mask` only applies to ids"),
        ({"prompt": None, "input_ids": [[3, 4]], "attention_mask": [[5, 1]]}, "must hold only 1 for tokens and 0"),
        ({"prompt": None, "input_ids": torch.tensor(3)}, r"got \(\)"),
        ({"prompt": None, "input_ids": torch.zeros(1, 0).long()}, "at least one token"),
        ({"prompt": "w1", "messages": CHAT_OF_ONE}, "either `prompt` or `messages`"),
        ({"prompt": {"w1": 1}}, "`prompt` must be text, texts, or integer ids"),
        ({"prompt": None, "messages": []}, "`messages` must be a chat"),
        ({"prompt": None, "messages": [[]]}, "`messages` must be a chat"),
        ({"prompt": None, "messages": "hello"}, "`messages` must be a chat"),
        ({"prompt": None, "messages": [{"content": "w1"}]}, "`messages` must be a chat"),
        ({"prompt": " ".join(["w1"] * 70)}, "The canvas has 7. tokens, and the model takes 64"),
    ],
)
def test_a_wrong_argument_is_named_before_any_forward(call, says):
    pipe = words()
    pipe.tokenizer.chat_template = CHAT if "messages" in call else None
    forwards = []
    pipe.model.register_forward_hook(lambda module, args, out: forwards.append(1))
    with pytest.raises((ValueError, TypeError), match=says):
        pipe(**(CALL | {"prompt": ["w1", "w2"]} | call))
    assert not forwards or "callback_on_step_end" in call


@pytest.mark.parametrize("ids", [torch.tensor([[3, 4]]), [[3, 4]], [3, 4], ["w1", 3]])
def test_ids_are_not_put_into_a_chat_template(ids):
    pipe = words()
    pipe.tokenizer.chat_template = CHAT
    with pytest.raises(TypeError, match="Pass ids as `input_ids`"):
        pipe(ids, **CALL)


def test_a_causal_model_is_refused_by_the_constructor_too():
    model = words().model
    with pytest.raises(ValueError, match="'LlamaForCausalLM' is causal"):
        PrismPipeline(model, mdm_spec=MDMSpec(MASK_WORD))
    assert PrismPipeline(model, mdm_spec=words().config.mdm_spec).mask_token_id == MASK_WORD


def test_an_infill_with_a_gap_in_its_mask_and_an_empty_text_to_score():
    with pytest.raises(ValueError, match="has a gap inside a row of `infill`"):
        words()(infill=torch.tensor([[3, 0, MASK_WORD, 4]]), attention_mask=torch.tensor([[1, 0, 1, 1]]))
    ends = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
    ids = torch.where(ends == 1, MASK_WORD, 0)
    out = words()(infill=ids, attention_mask=ends, num_inference_steps=2, output_type="seq").sequences
    assert ((out != MASK_WORD) & (ends == 1)).sum() == ends.sum() and (out[ends == 0] == 0).all()
    with pytest.raises(ValueError, match="`texts` is empty"):
        words().score("")
    assert words().score(["", "w1"])[0][0].tolist() == [0.0]


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_an_empty_prompt_is_a_sample_from_nothing_also_beside_others():
    pipe = words()
    nothing = pipe(**CALL, generator=[seeded()]).sequences
    assert torch.equal(pipe("", **CALL, generator=[seeded()]).sequences, nothing)
    both = pipe(["", "w1 w2"], **CALL, generator=[seeded(), seeded(1)]).sequences
    assert torch.equal(both[:1, 2:], nothing)
    assert torch.equal(both[1:], pipe("w1 w2", **CALL, generator=[seeded(1)]).sequences)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_ids_of_any_integer_dtype(dtype):
    pipe, ids = words(), [[3, 4], [5, 6]]
    out = pipe(input_ids=torch.tensor(ids, dtype=dtype), **CALL, generator=seeded()).sequences
    assert torch.equal(out, pipe(input_ids=ids, **CALL, generator=seeded()).sequences) and out.dtype == torch.int64


@pytest.mark.parametrize("family", EVERY)
def test_wherever_a_prompt_is_padded_it_continues_as_it_does_alone(family):
    pipe = load(checkpoint(family), scheduler=greedy())
    call = {"gen_length": 4, "num_inference_steps": 8}
    ids = torch.tensor([[9, 20, 11, PAD, PAD], [PAD, PAD, 9, 20, 11], [9, PAD, 20, PAD, 11], [12, 13, 14, 15, 16]])
    shown = (ids != PAD).long()
    out = pipe(input_ids=ids, attention_mask=shown, **call).sequences
    alone = pipe(input_ids=torch.tensor([[9, 20, 11]]), **call).sequences
    for row in out[:3]:
        assert row[:5].tolist() == [PAD, PAD, 9, 20, 11] and torch.equal(row[2:], alone[0])
    assert torch.equal(out[3:], pipe(input_ids=ids[3:], **call).sequences)


@pytest.mark.parametrize("family", EVERY)
def test_samples_of_one_prompt_are_rows_next_to_each_other_and_reproducible(family):
    pipe = load(checkpoint(family), scheduler=MDLMScheduler())
    call = {"gen_length": 4, "num_inference_steps": 4, "num_samples": 2}
    ids = torch.tensor([[9, 20], [11, 12]])
    out = pipe(input_ids=ids, **call, generator=[seeded(i) for i in range(4)]).sequences
    assert out[:, :2].tolist() == [[9, 20], [9, 20], [11, 12], [11, 12]]
    for i, row in enumerate(out):
        one = pipe(input_ids=ids[i // 2], **(call | {"num_samples": 1}), generator=[seeded(i)]).sequences
        assert torch.equal(one[0], row)


def with_ends(pipe, first=None, last=None):
    """The pipeline with a tokenizer that puts `first` before and `last` after every text."""
    names = [name for name in (first, last) if name]
    single = " ".join([name for name in (first, "$A", last) if name])
    ids = [(name, pipe.tokenizer.convert_tokens_to_ids(name)) for name in names]
    pipe.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    return pipe


def test_steps_without_end_are_refused_before_a_forward():
    pipe = words()
    with pytest.raises(ValueError, match=r"num_inference_steps` must be an integer from 1 to 1,000,000.*1000000000"):
        pipe(gen_length=4, num_inference_steps=10**9)
    with pytest.raises(ValueError, match="num_inference_steps"):
        MDLMScheduler().set_timesteps(10**9)


def test_a_prompt_is_not_closed_by_its_tokenizer_and_opened_once():
    pipe = words()
    plain = pipe.tokenizer
    assert prompt_ids(["w1 w2", ""], plain) == [[3, 4], []]
    closing = with_ends(words(), last="[EOS]").tokenizer
    assert prompt_ids(["w1 w2", "w1 [EOS]", ""], closing) == [[3, 4], [3, EOS], []]
    opening = with_ends(words(bos_token="[EOS]"), first="[EOS]").tokenizer  # as GPT-2, one token for both
    assert prompt_ids(["w1", ""], opening) == [[EOS, 3], [EOS]]
    both = with_ends(words(bos_token="w0"), first="w0", last="[EOS]").tokenizer
    assert prompt_ids(["w1 w2", "w0 w1", "w1 [EOS]", ""], both) == [[2, 3, 4], [2, 3], [2, 3, EOS], [2]]
    out = with_ends(words(bos_token="w0"), first="w0", last="[EOS]")("w1", **CALL).sequences
    assert out[0, :2].tolist() == [2, 3] and out.shape == (1, 8)
    _, ids, _ = with_ends(words(bos_token="w0"), first="w0", last="[EOS]").score("w1")
    assert ids.tolist() == [[2, 3, EOS]]  # what is judged is a whole text


def test_a_mask_word_in_a_prompt_or_a_chat_stays_and_only_new_tokens_are_counted():
    pipe = words()
    out = pipe(["w1 [MASK] w2", "w3"], **CALL, return_trace=True)
    assert out.sequences[0, :3].tolist() == [3, MASK_WORD, 4]
    assert (out.sequences[:, 3:] != MASK_WORD).all()
    assert all(not step.unmasked[:, :3].any() for step in out.trace)


# --- end tokens and stop strings --------------------------------------------------------------------------------------


def test_an_end_token_of_the_generation_config_that_the_model_does_not_know_is_no_end():
    pipe = words()
    pipe.model.generation_config.eos_token_id = [EOS, 126081, MASK_WORD]
    pipe.scheduler = MDLMScheduler(order="left_to_right")
    out = pipe(["w1"], **CALL, stop="w", block_length=2).sequences  # every word stops it, after the first block
    assert (out[0, 3:] == EOS).all() and out.max() < 30


def test_suppressed_tokens_are_never_written_even_if_they_are_the_likeliest():
    pipe = words()
    wanted = torch.zeros(30).index_fill(0, torch.tensor([EOS, 7]), 50.0)  # the model wants nothing else
    pipe.model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits + wanted)
    free = pipe(["w1"], **CALL).sequences[0, -CALL["gen_length"] :]
    assert set(free.tolist()) <= {EOS, 7}
    for given, left in (([EOS, 7], set()), (EOS, {7})):
        kept = set(pipe(["w1"], **CALL, suppress_tokens=given).sequences[0, -CALL["gen_length"] :].tolist())
        assert kept == left if left else not kept & {EOS, 7}


# --- specs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"mask_token_id": 40}, "outside its vocabulary of 40"),
        ({"mask_token_id": "39"}, "`mask_token_id` must be a token id"),
        ({"mask_token_id": True}, "`mask_token_id` must be a token id"),
        ({"mask_token_id": MASK, "shift": 1}, r"unknown fields \['shift'\]"),
        ({"attention": "bidirectional"}, "needs `mask_token_id`"),
        ({"mask_token_id": MASK, "logit_shift": 2}, "`logit_shift` must be 0 or 1"),
        ({"mask_token_id": MASK, "attention": "full"}, "`attention` must be one of"),
        ({"mask_token_id": MASK, "mask_format": "4d"}, "`mask_format` must be one of"),
        ({"mask_token_id": MASK, "extra_inputs": ["token_type_ids"]}, "`extra_inputs` may hold"),
        ({"mask_token_id": MASK, "block_length": 4}, "`block_length` goes with"),
        ({"mask_token_id": MASK, "native_class": "NoSuchModel"}, "NoSuchModel"),
        ({"mask_token_id": MASK, "native_class": "AutoModel"}, "AutoModel"),
        ({"mask_token_id": MASK, "native_class": "Qwen3ForCausalLM", "output_head": "no.head"}, "no.head"),
    ],
)
def test_a_wrong_spec_is_refused_when_it_is_passed(wrong, says):
    with pytest.raises(ValueError, match=says):
        PrismPipeline.from_pretrained(checkpoint("sdar"), mdm_spec=wrong)


def test_a_spec_that_does_not_say_how_the_config_names_its_sizes():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM needs \['hidden_size', 'num_hidden_layers'\]"):
        spec = MDMSpec(MASK, recipe=CheckpointRecipe("LlamaForCausalLM"))
        PrismPipeline.from_pretrained(checkpoint("llada"), mdm_spec=spec)


def test_a_spec_that_is_no_spec():
    with pytest.raises(TypeError, match="`mdm_spec` must be an MDMSpec or its dict, got str"):
        PrismPipeline.from_pretrained(checkpoint("llada"), mdm_spec="llada")


def test_the_users_spec_overrides_each_fact_that_is_detected():
    row = load(checkpoint("Dream")).denoiser.spec
    pipe = load(checkpoint("Dream"), mdm_spec=dataclasses.replace(row, logit_shift=0, mask_token_id=38))
    assert (pipe.denoiser.spec.logit_shift, pipe.mask_token_id) == (
        0,
        MASK,
    )  # `load` passes mask_token_id, which is first
    head = QualityHead(H)
    pipe = PrismPipeline.from_pretrained(checkpoint("Dream"), mdm_spec=row.to_dict(), quality_head=head)
    assert pipe.denoiser.spec == row and isinstance(pipe.scheduler, PrismScheduler)


# --- code of the repository -------------------------------------------------------------------------------------------

REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class NovelConfig(PretrainedConfig):
    model_type = "novel"

    def __init__(self, vocab_size=40, hidden_size=32, **more):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**more)


class NovelModel(PreTrainedModel):
    config_class = NovelConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        hidden = self.embed(input_ids)
        return MaskedLMOutput(logits=self.head(hidden + hidden.mean(1, keepdim=True)))
"""


def test_code_of_a_repository_runs_with_leave_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "novel"
    folder.mkdir()
    (folder / "modeling_novel.py").write_text(REMOTE)
    names = {"AutoConfig": "modeling_novel.NovelConfig", "AutoModelForMaskedLM": "modeling_novel.NovelModel"}
    config = {"model_type": "novel", "auto_map": names, "vocab_size": 40, "hidden_size": H}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"embed.weight": (40, H), "head.weight": (40, H), "head.bias": (40,)}
    weights = {name: torch.randn(shape, generator=seeded()) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="Read that code, then pass trust_remote_code=True"):
        PrismPipeline.from_pretrained(folder, mask_token_id=MASK)
    pipe = PrismPipeline.from_pretrained(folder, mask_token_id=MASK, trust_remote_code=True)
    ids = torch.tensor([[9, MASK, 12]])
    hidden = weights["embed.weight"][ids]
    expected = (hidden + hidden.mean(1, keepdim=True)) @ weights["head.weight"].T + weights["head.bias"]
    torch.testing.assert_close(aligned(pipe, ids)[..., :MASK], expected[..., :MASK])
    assert MASK not in pipe(gen_length=5, num_inference_steps=2).sequences


def test_ids_may_be_on_any_device_and_masks_as_flat_as_ids():
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert canvas_of_prompt(ids, None, 28, 4, torch.ones(2, 3)).sample.shape == (2, 7)
    assert canvas_of_prompt([3, 4, 5], None, 28, 4, [1, 1, 1]).sample.tolist() == [[3, 4, 5, 28, 28, 28, 28]]
    with pytest.raises(NotImplementedError, match="meta"):  # it is asked to come to the CPU, and has nothing to bring
        canvas_of_prompt(ids.to("meta"), None, 28, 4)


def test_guidance_of_a_model_that_reads_no_row_of_masks_is_refused():
    pipe = load(checkpoint("esm"))
    ids = torch.tensor([[3, 4, MASK, 5]])
    with pytest.raises(ValueError, match=r"`cfg_scale` is 1\.0, and guidance compares with a row of masks"):
        pipe(infill=ids, cfg_scale=1.0, num_inference_steps=1)
