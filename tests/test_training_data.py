"""Rows of text, answers and chats as training examples: what is masked, what is packed, what is refused."""

import itertools
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from prism_pipelines.sampling.rows import RowEncoder, encode_rows, pad_batch
from prism_pipelines.training.data import read_rows, split_examples

WORDS = ["<pad>", "<mask>", "<eos>", "<unk>", *"abcdefgh"]
EOS, MASK = 2, 1
ROWS = [{"text": "a b c"}, {"text": " "}, {"text": "d e"}, {"text": "f g h a"}]


@pytest.fixture
def tokenizer():
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", mask_token="<mask>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.fixture
def encoder(tokenizer):
    return RowEncoder(tokenizer, MASK, 4, len(WORDS))


def words(example, trainable=True):
    return [WORDS[i] for i in example["input_ids"][example["trainable_mask"] == trainable]]


def test_packed_blocks_are_the_texts_end_to_end(encoder):
    stream = ["a", "b", "c", "<eos>", "d", "e", "<eos>", "f", "g", "h", "a", "<eos>"]
    blocks = list(encode_rows(ROWS, encoder))
    assert [word for block in blocks for word in words(block)] == stream
    assert all(len(block["input_ids"]) == 4 and block["trainable_mask"].all() for block in blocks)
    assert words(next(encode_rows(ROWS[2:3], encoder))) == ["d", "e", "<eos>"]  # all there is, though not a whole block


def test_the_answer_and_its_end_are_masked_and_the_prompt_never(encoder):
    (example,) = encode_rows([{"prompt": "a b", "completion": "c"}], encoder)
    assert words(example) == ["c", "<eos>"] and words(example, False) == ["a", "b"]


def test_of_a_chat_the_last_message_is_the_answer(tokenizer):
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": word} for role, word in zip(roles, "abcd", strict=True)]
    (example,) = encode_rows([{"messages": messages}], RowEncoder(tokenizer, MASK, 16, len(WORDS)))
    assert words(example) == ["d", "<eos>"] and words(example, False) == ["a", "b", "<eos>", "c"]


def test_a_prompt_is_tokenized_as_the_pipeline_does_opened_once_and_not_closed(tokenizer):
    tokenizer.cls_token, tokenizer.sep_token, tokenizer.eos_token = "g", "h", None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="g $A h", special_tokens=[("g", 10), ("h", 11)]
    )
    encoder = RowEncoder(tokenizer, MASK, 16, len(WORDS), use_chat_template=False)
    for prompt, given in (("a b", ["g", "a", "b"]), ("g a", ["g", "a"]), ("", ["g"])):
        (example,) = encode_rows([{"prompt": prompt, "completion": "c"}], encoder)
        assert words(example, False) == given and words(example) == ["c"]
    tokenizer.chat_template = "g {% for m in messages %}{{ m['content'] }} {% endfor %}"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (example,) = encode_rows([{"messages": chat}], RowEncoder(tokenizer, MASK, 16, len(WORDS)))
    assert words(example, False) == ["g", "a"] and words(example) == ["b"]


def test_a_row_too_long_is_an_error_or_dropped(tokenizer):
    rows = [{"prompt": "a b c", "completion": "d"}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(ValueError, match="Row 0 of the data set has 5 tokens, and --max-length is 4"):
        list(encode_rows(rows, RowEncoder(tokenizer, MASK, 4, len(WORDS))))
    (kept,) = encode_rows(rows, RowEncoder(tokenizer, MASK, 4, len(WORDS), "drop"))
    assert words(kept) == ["b", "<eos>"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "completion": ""}, "no trainable token: its answer is empty"),
        ({"text": "a <mask> b"}, "holds the mask token"),
        ({"prompt": "a <mask>", "completion": "b"}, "holds the mask token"),
        ({"question": "a", "answer": "b"}, r"has the columns \['answer', 'question'\]"),
        ({"prompt": "a", "completion": None}, "its answer is no text but None"),
        ({"text": 3}, "its text is no text but 3"),
        ({"messages": [{"role": "user", "content": "a"}]}, "must end with a message of the assistant"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(encoder, row, said):
    with pytest.raises(ValueError, match=said):
        list(encode_rows([row], encoder))


def test_ids_that_the_model_does_not_know_are_refused(tokenizer):
    with pytest.raises(ValueError, match="gives id 11; the model knows ids up to 9"):
        list(encode_rows([{"text": "h"}], RowEncoder(tokenizer, MASK, 4, 10)))


def test_a_token_that_the_model_never_writes_is_not_learned_but_may_stand_in_a_prompt(tokenizer):
    encoder = RowEncoder(tokenizer, MASK, 8, len(WORDS), suppress_tokens=(0,))
    with pytest.raises(ValueError, match=r"holds '<pad>' .id 0. where it is to be learned"):
        list(encode_rows([{"prompt": "a", "completion": "b <pad>"}], encoder))
    assert len(list(encode_rows([{"prompt": "<pad> a", "completion": "b"}], encoder))) == 1


def test_chats_that_are_no_lists_or_that_the_template_refuses_are_named(tokenizer):
    encoder = RowEncoder(tokenizer, MASK, 8, len(WORDS))
    with pytest.raises(ValueError, match=r"Row 0 .*must be a list of role and content"):
        list(encode_rows([{"messages": "user: hello"}], encoder))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"Row 0 .*refuses it: roles must alternate"):
        roles = [{"role": role, "content": "a"} for role in ("user", "assistant")]
        list(encode_rows([{"messages": roles}], encoder))
    with pytest.raises(ValueError, match=r"Row 0 .*refuses it: Cannot apply"):
        list(encode_rows([{"messages": roles[1:]}], encoder))


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv"])
def test_local_files_are_read_alike_streamed_or_not(tmp_path, encoder, ending):
    lines = ["a b c d e f g h"] * 6
    content = {
        "txt": "\n".join(lines),
        "jsonl": "\n".join(json.dumps({"text": line}) for line in lines),
        "csv": "\n".join(["text", *lines]),
    }[ending]
    (tmp_path / f"data.{ending}").write_text(content + "\n")
    for place in (tmp_path, tmp_path / f"data.{ending}"):
        whole, streamed = (read_rows(str(place), streaming=way) for way in (False, True))
        train, held = split_examples(whole, encoder, 1)
        train_2, held_2 = split_examples(streamed, encoder, 1, streaming=True)
        streamed = list(itertools.islice(train_2, 2 * len(train)))  # a second pass is as the first, and follows it
        for one, other in ((train + train, streamed), (held, held_2)):
            assert [e["input_ids"].tolist() for e in one] == [e["input_ids"].tolist() for e in other]
    assert len(held) == 1 and len(train) == 12


def test_a_model_that_cannot_read_masks_alone_keeps_a_token_of_every_example(tokenizer):
    """ESM with token_dropout divides by the share of tokens that are no masks."""
    encoder = RowEncoder(tokenizer, MASK, 4, len(WORDS), supports_all_masked_input=False)
    for example in (*encode_rows(ROWS, encoder), *encode_rows([{"prompt": "a", "completion": "b"}], encoder)):
        assert example["trainable_mask"].tolist() == [False] + [True] * (len(example["input_ids"]) - 1)
    with pytest.raises(ValueError, match="Row 0 of the data set has an empty prompt"):
        list(encode_rows([{"prompt": "", "completion": "b"}], encoder))


def test_no_data_is_refused(tmp_path, encoder):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_rows(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="none of its rows gives an example"):
        split_examples([{"text": " "}], encoder, 1)
    with pytest.raises(ValueError, match="is empty after"):
        list(split_examples([{"text": "a"}], encoder, 1, streaming=True)[0])
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="must be one kind of"):
        read_rows(str(tmp_path / "picture.png"))


def test_padding_is_neither_seen_nor_trained():
    examples = [
        {"input_ids": torch.tensor([5, 6, 7]), "trainable_mask": torch.tensor([False, True, True])},
        {"input_ids": torch.tensor([8]), "trainable_mask": torch.tensor([True])},
    ]
    batch = pad_batch(examples, 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["trainable_mask"].tolist() == [[False, True, True], [True, False, False]]
    assert "attention_mask" not in pad_batch(examples[:1], 0)
