"""What a text of the pipeline may hold: content, what was given as it was given, and nothing after a stop string."""

import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from family_twins import checkpoint, load
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import BertProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EsmConfig,
    EsmForMaskedLM,
    EsmTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from prism_pipelines import MDLMScheduler, PrismPipeline, PrismScheduler, QualityHead, resolve_spec
from prism_pipelines.models.denoiser import GuidedLogits
from prism_pipelines.sampling.encoding import whole_ids
from prism_pipelines.sampling.stopping import (
    end_tokens,
    generated_prefix,
    infilled_text,
    no_content,
    special_ids,
    text_before,
    turn_end,
    written_ends,
)

RESIDUES = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
ESM = ["<cls>", "<pad>", "<eos>", "<unk>", *RESIDUES, "<null_1>", "<mask>"]
NAMED = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]"]
WORDS = [*NAMED, "the", "cat", "play", "##ing", "##s", "sat", ".", "on", "mat", "hello", "world"]


def esm(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(ESM))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, position_embedding_type="rotary", token_dropout=True, **sizes
    )
    pipe = PrismPipeline(EsmForMaskedLM(config).eval(), EsmTokenizer(str(tmp_path / "vocab.txt")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bert_tokenizer():
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **{f"{name}_token": text for name, text in names.items()})


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    pipe = PrismPipeline(BertForMaskedLM(BertConfig(vocab_size=len(WORDS), **sizes)).eval(), bert_tokenizer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


CHAT = (
    "{% for m in messages %}<|start|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)
BYTES = ["<pad>", "<eos>", "<|start|>", "<|end|>", "<mask>", "<|reserved_token_3|>", *sorted(
    pre_tokenizers.ByteLevel.alphabet()
)]  # fmt: skip


def byte_tokenizer(**more):
    made = Tokenizer(models.BPE({text: i for i, text in enumerate(BYTES)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    given = {"pad_token": "<pad>", "eos_token": "<eos>", "mask_token": "<mask>", "chat_template": CHAT} | more
    extra = [text for text in ("<|start|>", "<|end|>") if text not in given.values()]
    return PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=extra, **given)


def chat_model(**more):
    """A LLaDA with the bytes of texts as tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(BYTES), **sizes)).eval()
    model.generation_config.eos_token_id = None
    spec = resolve_spec(
        load(checkpoint("llada")).model.config, mdm_spec=load(checkpoint("llada")).spec, mask_token_id=4
    )
    pipe = PrismPipeline(model, byte_tokenizer(**more), mdm_spec=spec)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- tokens that are no content ---------------------------------------------------------------------------------------


def test_a_random_esm_writes_the_twenty_residues_alone(tmp_path):
    pipe, inside = esm(tmp_path), "<cls>" + "<mask>" * 30 + "<eos>"
    generators = [torch.Generator().manual_seed(i) for i in range(20)]
    out = pipe(infill=inside, num_samples=20, num_inference_steps=10, generator=generators)
    for text in out.texts:
        assert text.startswith("<cls>") and text.endswith("<eos>")
        protein = text[len("<cls>") : -len("<eos>")]
        assert len(protein) == 30 and set(protein) <= set("ACDEFGHIKLMNPQRSTVWY")
    written = set(out.sequences[:, 1:-1].flatten().tolist())
    allowed = pipe(infill=inside, num_samples=20, num_inference_steps=10, allow_tokens=[ESM.index("X"), 2])
    assert {ESM.index("X"), 2} <= set(allowed.sequences[:, 1:-1].flatten().tolist()) - written


def test_special_and_reserved_tokens_are_written_only_where_they_end_a_text():
    pipe = chat_model()
    special = {BYTES[i] for i in special_ids(pipe.tokenizer)}
    assert special == {"<pad>", "<eos>", "<|start|>", "<|end|>", "<mask>"} and turn_end(pipe.tokenizer) == 3
    ends = end_tokens(None, pipe.tokenizer, pipe.model, pipe.spec)
    assert [BYTES[i] for i in ends] == ["<eos>", "<|end|>", "<pad>"]
    never = {BYTES[i] for i in no_content(pipe.tokenizer, pipe.spec, ends)}
    assert never == {"<|start|>", "<mask>", "<|reserved_token_3|>"}
    out = pipe(gen_length=200, num_samples=8, num_inference_steps=20, output_type="seq").sequences
    assert {1, 3} <= set(out.flatten().tolist()) and not {2, 4, 5} & set(out.flatten().tolist())
    out = pipe(gen_length=200, num_samples=8, num_inference_steps=20, output_type="seq", allow_tokens=2).sequences
    assert 2 in out


def test_an_encoder_does_not_close_its_text_unless_it_is_told_to():
    pipe = bert()
    out = pipe("the cat", gen_length=40, num_samples=8, num_inference_steps=8).sequences[:, 3:43]
    assert not {0, 1, 2, 3, 4, WORDS.index("[unused0]")} & set(out.flatten().tolist())
    out = pipe("the cat", gen_length=40, num_samples=8, num_inference_steps=8, eos_token_id=3).sequences[:, 3:43]
    assert 3 in out and 2 not in out
    roberta = bert()
    roberta.tokenizer.eos_token = "[SEP]"  # RoBERTa's </s> is its eos token and frames each text
    assert (
        written_ends(None, roberta.tokenizer, roberta.spec, (3,))
        == ()
        != written_ends(3, roberta.tokenizer, roberta.spec, (3,))
    )


@pytest.mark.parametrize("text", ["MKTV", "<cls>MKTV", "MKTV<eos>", "<cls>MKTV<eos>", "", "<eos>"])
def test_a_text_is_framed_once_also_where_it_says_its_frame(text, tmp_path):
    tokenizer = esm(tmp_path).tokenizer
    bare = text.removeprefix("<cls>").removesuffix("<eos>")
    assert whole_ids(text, tokenizer) == [0, *(ESM.index(residue) for residue in bare), 2]


def test_what_is_allowed_and_forbidden_at_once_is_an_error():
    pipe = bert()
    with pytest.raises(ValueError, match="`allow_tokens` and `suppress_tokens` both name"):
        pipe("the", gen_length=2, allow_tokens=[1], suppress_tokens=[1])
    with pytest.raises(ValueError, match="`allow_tokens` names the mask token"):
        pipe("the", gen_length=2, allow_tokens=4)
    with pytest.raises(ValueError, match="`allow_tokens` must be a token id below"):
        pipe("the", gen_length=2, allow_tokens="X")


def test_unknown_characters_of_an_input_are_named(tmp_path):
    with pytest.warns(UserWarning, match="`infill` holds 'mktv', unknown to the tokenizer: .*'<unk>'"):
        esm(tmp_path)(infill="mktv<mask>", num_inference_steps=1)
    with pytest.warns(UserWarning, match="`prompt` holds '☃', 'Dog', unknown"):
        bert()("The ☃ Dog", gen_length=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bert()("The [UNK] cat", gen_length=2, num_inference_steps=2)  # the user's own
        esm(tmp_path)(infill="MKTV<mask>", num_inference_steps=1)


# --- stop strings -----------------------------------------------------------------------------------------------------


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    "stop,written,text,done",
    [
        ("<|start|>", "abc<|start|>def", "abc", True),
        ("c<|start|>", "abc<|start|>def", "ab", True),
        ("<|start|>d", "abc<|start|>def", "abc", True),
        (["x", "<|start|>d"], "abxc<|start|>def", "ab", True),
        ("<|start|>d", "abc<|start|>", "abc", False),
        ("ac", "a<|start|>c", "", True),  # special tokens are in no text
    ],
)
def test_a_stop_string_with_a_special_token_ends_the_text(stop, written, text, done):
    tokenizer = byte_tokenizer()
    stops = tuple(stop) if isinstance(stop, list) else (stop,)
    tokens = torch.tensor(ids_of(tokenizer, written))
    assert text_before(tokens, stops, tokenizer) == (text, done)


@pytest.mark.parametrize("stop", ["<|start|>", "c<|start|>"])
def test_a_special_token_as_a_stop_string_finishes_a_row(stop):
    pipe = chat_model()
    written = ids_of(pipe.tokenizer, "abc<|start|>def.")

    class Writes(MDLMScheduler):
        def step(self, model_output, t, sample, **kwargs):
            shown = model_output[kwargs["generation_mask"]]
            assert shown[:, 2].isfinite().all()  # it may be written
            step = super().step(model_output, t, sample, **kwargs)
            new = torch.where(kwargs["generation_mask"], torch.tensor(written), step.prev_sample)
            return type(step)(new, step.unmasked, step.remasked, step.sampled_tokens, step.sampled_probs)

    pipe.scheduler = Writes()
    out = pipe(gen_length=8, block_length=4, num_inference_steps=2, stop=stop)
    assert out.texts == ["abc" if stop == "<|start|>" else "ab"] and out.nfe == 1


# --- infilling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        "The  CAT\n[MASK] on the\tMAT.",
        " [MASK][MASK] [MASK]  world ",
        "play[MASK], [MASK]",
        "[MASK]\n[MASK]\n\nHello",
    ],
)
def test_what_was_given_to_infill_comes_back_character_by_character(given):
    pipe = bert()
    for seed in range(20):
        text = pipe(infill=given, num_inference_steps=2, generator=torch.Generator().manual_seed(seed)).texts[0]
        parts = [re.escape(part) for part in given.split("[MASK]")]
        assert re.fullmatch("(.*)".join(parts), text, re.DOTALL), text
        assert "[" not in text


@pytest.mark.parametrize(
    "given,fill,text",
    [
        ("The CAT [MASK] .", ["sat"], "The CAT sat ."),
        ("Play[MASK] on", ["##ing"], "Playing on"),
        ("Play[MASK][MASK] on", ["##ing", "world"], "Playing world on"),
        ("Hello [MASK]", ["##s"], "Hello s"),
        ("Hello[MASK]", ["."], "Hello."),
        ("[MASK]  [MASK]", ["hello", "world"], "hello  world"),
    ],
)
def test_fills_are_written_as_parts_of_the_text(given, fill, text):
    tokenizer, fills = bert_tokenizer(), iter(fill)
    ids = [WORDS.index(next(fills)) if token == 4 else token for token in tokenizer(given).input_ids]
    assert infilled_text(given, ids, tokenizer, 4) == text


def test_bytes_of_one_character_in_two_fills_are_one_character():
    tokenizer = byte_tokenizer()
    given, snow = "Ein  <mask><mask><mask>mann\n", ids_of(tokenizer, "☃")
    ids = ids_of(tokenizer, given)
    ids = [snow.pop(0) if token == 4 else token for token in ids]
    assert infilled_text(given, ids, tokenizer, 4) == "Ein  ☃mann\n"


# --- one row, and rows of different length ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [MDLMScheduler(order="confidence"), PrismScheduler(order="random", eta=0.3)])
def test_a_generator_and_a_list_of_it_give_one_row_the_same_text(scheduler):
    pipe = bert()
    if isinstance(scheduler, PrismScheduler):
        pipe.quality_head = QualityHead(16, "linear")
    pipe.scheduler = scheduler
    for seed in range(5):
        one, many = (torch.Generator().manual_seed(seed) for _ in range(2))
        call = {"gen_length": 9, "block_length": 4, "num_inference_steps": 6, "output_type": "seq"}
        a, b = pipe("the cat", generator=one, **call), pipe("the cat", generator=[many], **call)
        assert torch.equal(a.sequences, b.sequences)


def test_prompts_of_different_length_need_no_pad_token():
    pipe = chat_model(pad_token=None)
    assert pipe.tokenizer.pad_token_id is None
    texts = ["a", "a longer one"]

    def call(texts):
        generators = [torch.Generator().manual_seed(len(text)) for text in texts]
        return pipe(texts, use_chat_template=False, gen_length=6, num_inference_steps=3, generator=generators).texts

    assert call(texts) == call(texts[:1]) + call(texts[1:])


def test_guidance_is_its_formula():
    """u + (s + 1) (c - u), of LLaDA's appendix; a token that is -inf stays so."""
    c, u = torch.tensor([[1.0, 4.0, -torch.inf]]), torch.tensor([[0.5, 1.0, -torch.inf]])
    conditional = SimpleNamespace(shape=c.shape, device=c.device, mask_token_id=9, at=lambda *_: c)
    unconditional = SimpleNamespace(at=lambda *_: u)
    guided = GuidedLogits(conditional, unconditional, 2.0).at(torch.tensor([0]), torch.tensor([0]))
    assert guided.tolist() == [[0.5 + 3 * 0.5, 1.0 + 3 * 3.0, -math.inf]]


def test_what_is_decided_of_a_row_ends_at_its_first_mask_or_end_token():
    every, mask, end = torch.ones(5, dtype=torch.bool), 9, 7
    assert generated_prefix(torch.tensor([1, 2, 7, 3, 9]), every, mask, (end,))[1] is True
    tokens, ended = generated_prefix(torch.tensor([1, 9, 7, 3, 9]), every, mask, (end,))
    assert tokens.tolist() == [1] and not ended  # the end token behind a mask may still be in another place
