"""One road from texts, chats and rows to ids: what is given of a training row is what the pipeline writes after."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from test_generate_many import CHAT, WORDS
from test_generate_many import pipeline as language_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from prism_pipelines import MDLMScheduler, PrismPipeline, QualityHead
from prism_pipelines.cli.main import main
from prism_pipelines.hub.model_card import usage
from prism_pipelines.sampling.encoding import text_frame
from prism_pipelines.sampling.rows import RowEncoder, encode_rows, examples_line
from prism_pipelines.training.arguments import RunArguments, check_run, parse_arguments
from prism_pipelines.training.callbacks import HeadProgress
from prism_pipelines.training.run import given_ids
from prism_pipelines.training.setup import load_examples

CLS, SEP, MASK, PAD = 26, 27, 28, 29
# The roles are special tokens; an answer ends with [EOS], and a thought is dropped once another turn follows.
ROLES = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}[EOS] {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% if fast %}w25 {% endif %}{% endif %}"
)
FORGETFUL = ROLES.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] != 'assistant' else 'w9' }}")
# As Qwen3's: an argument puts the same words after the role, whether the answer is there or not.
THINKING = ROLES.replace("] {{ m", "] {% if fast and loop.last and m['role'] == 'assistant' %}w25 {% endif %}{{ m")


def encoder_model(**more):
    """A random BERT with words as tokens, whose tokenizer writes [CLS] ... [SEP]."""
    vocab = {word: i for i, word in enumerate([*WORDS, "[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]"])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "mask", "pad", "unk")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **(names | more))
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=64)).eval()
    pipe = PrismPipeline(model, tokenizer, QualityHead(16), MDLMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def chat_model(template=ROLES):
    """The bidirectional Llama, with roles as special tokens and a token that opens every text."""
    pipe = language_model(head=False, chat_template=template)
    pipe.model.resize_token_embeddings(40)
    pipe.tokenizer.add_special_tokens({"additional_special_tokens": ["[user]", "[assistant]", "[system]"]})
    opened = processors.TemplateProcessing(single="w24 $A", special_tokens=[("w24", 26)])
    pipe.tokenizer.backend_tokenizer.post_processor = opened
    pipe.tokenizer.bos_token = "w24"
    return pipe


def rows_of(pipe, **more):
    settings = {"frame": pipe.text_frame} | more
    return RowEncoder(pipe.tokenizer, pipe.mask_token_id, 40, pipe.model.config.vocab_size, **settings)


def words(pipe, ids):
    return " ".join(pipe.tokenizer.convert_ids_to_tokens(ids.tolist()))


def chat(*contents, first=("system",)):
    roles = [*first, *["user", "assistant"] * 9]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


CHATS = chat("w1", "w2 w3", "w4", "w5", "w6 w7")
PAIR = {"prompt": "w1 w2", "completion": "w3 w4 w5"}
KINDS = {  # model, settings of the encoder, row, arguments of the pipeline
    "encoder: text": (encoder_model, {}, {"text": "w1 w2 w3"}, {}),
    "encoder: an empty prompt": (encoder_model, {}, {"prompt": "", "completion": "w1 w2"}, {"prompt": ""}),
    "encoder: prompt": (encoder_model, {}, PAIR, {"prompt": "w1 w2"}),
    "language model: text": (
        chat_model, {"packing": False}, {"text": "w1"}, {"prompt": "", "use_chat_template": False}
    ),
    "prompt by the template": (chat_model, {}, PAIR, {"prompt": "w1 w2"}),
    "prompt without it": (
        chat_model, {"use_chat_template": False}, PAIR, {"prompt": "w1 w2", "use_chat_template": False}
    ),
    "prompt, arguments of the template": (
        lambda: chat_model(THINKING),
        {"template_kwargs": {"fast": True}}, PAIR, {"prompt": "w1 w2", "chat_template_kwargs": {"fast": True}},
    ),
    "chat": (chat_model, {}, {"messages": CHATS}, {"messages": CHATS[:-1]}),
    "chat, a template that forgets": (
        lambda: chat_model(FORGETFUL), {}, {"messages": CHATS}, {"messages": CHATS[:-1]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_given_part_of_a_training_row_is_what_the_pipeline_writes_after(kind):
    make, settings, row, call = KINDS[kind]
    pipe = make()
    (example,) = encode_rows([row], rows_of(pipe, **settings))
    ids, learned = example["input_ids"], example["trainable_mask"]
    written = pipe(**call, gen_length=int(learned.sum()), num_inference_steps=1).sequences[0]
    assert written.shape == ids.shape
    assert torch.equal(written[~learned], ids[~learned]) and (~learned).any()
    assert MASK not in ids


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "prompt" in kind or "chat" in kind])
def test_an_answer_is_learned_with_the_end_of_a_language_model_and_without_that_of_an_encoder(kind):
    make, settings, row, _ = KINDS[kind]
    pipe = make()
    (example,) = encode_rows([row], rows_of(pipe, **settings))
    learned = words(pipe, example["input_ids"][example["trainable_mask"]])
    answer = row["completion"] if "completion" in row else row["messages"][-1]["content"]
    assert learned == (answer if "encoder" in kind else f"{answer} [EOS]")


def test_all_turns_are_learned_and_nothing_else_differs_from_the_last_turn_alone():
    pipe = chat_model()
    (last,) = encode_rows([{"messages": CHATS}], rows_of(pipe))
    (every,) = encode_rows([{"messages": CHATS}], rows_of(pipe, train_on="all_turns"))
    assert torch.equal(last["input_ids"], every["input_ids"])
    assert words(pipe, last["input_ids"][last["trainable_mask"]]) == "w6 w7 [EOS]"
    assert words(pipe, every["input_ids"][every["trainable_mask"]]) == "w4 [EOS] w6 w7 [EOS]"


def test_turns_that_the_template_writes_differently_later_are_refused_by_name():
    pipe = chat_model(FORGETFUL)
    with pytest.raises(ValueError, match=r"Row 0 .*writes earlier turns differently .*--train-on last_turn"):
        list(encode_rows([{"messages": CHATS}], rows_of(pipe, train_on="all_turns")))
    (example,) = encode_rows([{"messages": CHATS[1:3]}], rows_of(chat_model()))
    assert words(pipe, example["input_ids"][example["trainable_mask"]]) == "w4 [EOS]"


def test_an_answer_that_was_begun_goes_on_in_the_pipeline_and_in_prism_generate(tmp_path):
    pipe = chat_model()
    begun = chat("w1", "w2", "w3 w4")
    out = pipe(messages=begun, continue_final_message=True, gen_length=2, num_inference_steps=2)
    assert words(pipe, out.sequences[0, :-2]) == "w24 [system] w1 [user] w2 [assistant] w3 w4"
    with pytest.raises(ValueError, match="needs a last message of the assistant"):
        pipe(messages=begun[:-1], continue_final_message=True, gen_length=2)
    with pytest.raises(ValueError, match="goes with `messages`"):
        pipe("w1", continue_final_message=True, use_chat_template=False, gen_length=2)
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": begun}) + "\n")
    flags = [str(tmp_path / "model"), f"--prompts={tmp_path / 'p.jsonl'}", f"--out={tmp_path / 'o.jsonl'}"]
    flags += ["--gen-length=2", "--num-inference-steps=2", "--device=cpu", "--temperature=0"]
    assert main(["generate", *flags, "--continue-final-message"]) == 0
    pipe.scheduler = MDLMScheduler(temperature=0.0)
    generator = [torch.Generator().manual_seed(0)]
    call = {"messages": begun, "gen_length": 2, "num_inference_steps": 2, "generator": generator}
    expected = pipe(**call, continue_final_message=True).texts
    assert [json.loads(line)["text"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == expected


def test_the_frame_follows_from_the_tokenizer_and_the_mask_that_the_model_takes():
    assert encoder_model().text_frame == ((CLS,), (SEP,))
    assert encoder_model(chat_template=CHAT).text_frame == ((), ())
    assert chat_model().text_frame == ((), ()) and text_frame(None, chat_model().spec) == ((), ())


def test_an_encoder_writes_between_its_special_tokens_as_many_tokens_as_are_asked_for():
    pipe = encoder_model()
    for call, start in (({"num_samples": 2}, [CLS]), ({"prompt": ["w1", "w2"]}, None)):
        out = pipe(**call, gen_length=5, num_inference_steps=2)
        assert (out.sequences[:, -1] == SEP).all() and (out.sequences[:, 0] == CLS).all()
        assert out.sequences.shape[1] == 5 + 2 + (start is None)
    ragged = pipe(["w1", "w2 w3"], gen_length=3, num_inference_steps=1).sequences
    assert ragged[0, :3].tolist() == [PAD, CLS, 1] and (ragged[:, -1] == SEP).all()
    ids = pipe(input_ids=[[CLS, 1]], gen_length=3, num_inference_steps=1).sequences
    assert ids.shape == (1, 5)  # ids are taken as they are
    _, scored, _ = pipe.score("w1 w2")
    assert scored.tolist() == [[CLS, 1, 2, SEP]]


def test_texts_are_sequences_of_their_own_for_encoders_and_packed_for_language_models():
    rows = [{"text": "w1 w2"}, {"text": ""}, {"text": "w3"}]
    pipe = encoder_model()
    examples = list(encode_rows(rows, rows_of(pipe)))
    assert [words(pipe, e["input_ids"]) for e in examples] == ["[CLS] w1 w2 [SEP]", "[CLS] w3 [SEP]"]
    assert [e["trainable_mask"].tolist() for e in examples] == [[False, True, True, False], [False, True, False]]
    (packed,) = encode_rows(rows, rows_of(pipe, packing=True))
    assert words(pipe, packed["input_ids"]) == "w1 w2 [SEP] w3 [SEP]"
    (packed,) = encode_rows(rows, rows_of(chat_model()))
    assert words(chat_model(), packed["input_ids"]) == "w1 w2 [EOS] w3 [EOS]"


def test_tokens_that_are_never_written_stay_in_a_text_and_are_not_learned():
    pipe = encoder_model()
    (example,) = encode_rows([{"text": "w1 w7 w2"}], rows_of(pipe, suppress_tokens=(7,)))
    assert example["trainable_mask"].tolist() == [False, True, False, True, False]


def test_a_text_too_long_is_refused_or_dropped_and_never_cut():
    pipe = encoder_model()
    long = {"text": "w1 " * 39}  # 41 tokens with its special ones
    with pytest.raises(ValueError, match=r"Row 0 .*has 41 tokens, and --max-length is 40.*--packing true"):
        list(encode_rows([long], rows_of(pipe)))
    assert len(list(encode_rows([long, {"text": "w1"}], rows_of(pipe, too_long="drop")))) == 1


@pytest.mark.parametrize(
    ("make", "row", "said"),
    [
        (encoder_model, {"text": "w1 w2"}, "1 examples of text rows, one sequence a row between [CLS] and [SEP]"),
        (encoder_model, {"text": "w1 w2"}, "⟦[CLS]⟧w1 w2⟦[SEP]⟧"),
        (chat_model, {"text": "w1 w2"}, "packed end to end into 40 tokens"),
        (chat_model, PAIR, "of prompt rows, by the chat template"),
    ],
)
def test_a_line_says_how_rows_became_examples(make, row, said):
    pipe = make()
    encoder = rows_of(pipe)
    assert said in examples_line([row], encoder, list(encode_rows([row], encoder)))


def test_the_default_of_max_length_is_what_the_model_takes_and_is_said(tmp_path, caplog):
    pipe = encoder_model()
    (tmp_path / "data.txt").write_text("w1 w2\nw3\n" * 9)
    args = SimpleNamespace(process_index=0, max_steps=1, seed=0)
    for given, expected in (({}, 64), ({"max_length": 32}, 32)):
        run = RunArguments(objective="mdm", dataset=str(tmp_path / "data.txt"), **given)
        check_run(run)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            train, held_out, _ = load_examples(run, args, pipe.model, pipe.tokenizer, pipe.spec)
        assert run.max_length == expected and len(train) + len(held_out) == 18
        assert ("--max-length is 64 tokens, the smaller of 512 and 64" in caplog.text) == (not given)
        assert "one sequence a row between [CLS] and [SEP]" in caplog.text
    run = RunArguments(objective="mdm", dataset=str(tmp_path / "data.txt"), max_length=128)
    with pytest.raises(ValueError, match="`--max-length` is 128, and the model takes 64"):
        load_examples(run, args, pipe.model, pipe.tokenizer, pipe.spec)


@pytest.mark.parametrize("flag", ["packing", "no_chat_template", "train_on", "chat_template_kwargs"])
def test_flags_of_text_are_refused_on_sudoku(flag):
    value = {"packing": True, "no_chat_template": True, "train_on": "all_turns", "chat_template_kwargs": "{}"}[flag]
    with pytest.raises(ValueError, match=f"`--{flag.replace('_', '-')}` goes with a data set of text"):
        check_run(RunArguments(objective="mdm", dataset="sudoku", **{flag: value}))


def test_a_card_calls_the_pipeline_as_the_rows_were_written():
    pipe = chat_model()
    assert "use_chat_template" not in usage(pipe, None, {})
    assert '"Write a haiku.", use_chat_template=False, gen_length' in usage(
        pipe, None, {"call": {"use_chat_template": False}}
    )


def test_calibration_reads_the_texts_of_an_encoder_one_by_one(tmp_path, capsys):
    encoder_model().save_pretrained(tmp_path / "model")
    texts = ["w1 w2 w3 w4", "w5 w6", "w7 " * 60]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["eval", "calibration", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "t.jsonl"), "--json"]
    assert main([*flags, "--max-length", "16"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["sequences"] == 2  # the third is too long, and is not cut
    assert "one sequence a row between [CLS] and [SEP]" in said.err
    assert main([*flags, "--max-length", "16", "--packing", "true"]) == 0
    assert json.loads(capsys.readouterr().out)["sequences"] == 4
    assert main([*flags, "--max-length", "3"]) == 2
    assert "no text of at most --max-length 3 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("progress", [True, False])
def test_the_second_evaluation_of_the_trainer_shows_how_far_it_is(progress, capsys):
    class Objective:
        training, denoiser = True, SimpleNamespace(suppressed=torch.zeros(3), vocab_size=3)

        def eval(self):
            pass

        def train(self, mode):
            pass

        def __call__(self, input_ids, generator, part, num_log_probs):
            found = {"quality": torch.tensor([0.1, -0.2]), "right": torch.tensor([True, False])}
            return found | {"loss_mdm": torch.tensor(1.0), "log_probs": torch.zeros(1, 3)}

    batches = [{"input_ids": torch.zeros(1, 2, dtype=torch.long)}] * 4
    entry = HeadProgress(Objective(), batches, print, progress).measure()
    assert entry["eval_loss_mdm"] == 1.0
    assert ("head on held-out examples" in capsys.readouterr().err) == progress


def test_samples_at_an_evaluation_stand_between_what_is_given():
    pipe = encoder_model()
    (example,) = encode_rows([{"text": "w1 w2 w3"}], rows_of(pipe))
    assert [ids.tolist() for ids in given_ids(example)] == [[CLS], [SEP]]
    (example,) = encode_rows([{"messages": CHATS}], rows_of(chat_model(), train_on="all_turns"))
    before, after = given_ids(example)
    assert words(chat_model(), before).endswith("w5 [assistant]") and not len(after)


def test_the_flags_of_text_are_read_from_the_command_line(tmp_path):
    words = ["--objective=mdm", "--dataset=d.txt", f"--output-dir={tmp_path}", "--use-cpu"]
    run, _ = parse_arguments(words)
    assert (run.packing, run.max_length, run.no_chat_template, run.train_on) == (None, None, False, "last_turn")
    run, _ = parse_arguments([*words, "--packing", "false", "--no-chat-template", "--train-on", "all_turns"])
    assert (run.packing, run.no_chat_template, run.train_on) == (False, True, "all_turns")
    assert parse_arguments([*words, "--packing=true"])[0].packing is True
    with pytest.raises(ValueError, match="`--train-on` must be one of last_turn, all_turns"):
        parse_arguments([*words, "--train-on=first_turn"])
