"""Many prompts: killed and resumed, one process or two, any batch: the same file. And what bad input says."""

import json
import re
import subprocess
import time
from itertools import product

import pytest
import torch
from filelock import FileLock
from forked import launched
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prism_pipelines import MDLMScheduler, MDMSpec, PrismPipeline, PrismScheduler, QualityHead, TokenToMaskScheduler
from prism_pipelines.cli.generate import command
from prism_pipelines.cli.main import main
from prism_pipelines.generation.batch import generate_many, prompt_texts, read_prompts
from prism_pipelines.generation.output_files import read_parts, run_file
from prism_pipelines.generation.running import plan_batches
from prism_pipelines.schedulers.by_name import change_scheduler

WORDS = [f"w{i}" for i in range(26)]
PROMPTS = [" ".join(WORDS[(i * 7 + j) % 26] for j in range(1 + i * 5 % 11)) for i in range(24)]
PROMPTS_AS_ROWS = [{"id": f"p{i}", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}w0"


def tokenizer(**more):
    vocab = {word: i for i, word in enumerate(["[PAD]", "[EOS]", *WORDS, "[MASK]", "[UNK]"])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **(names | more))


def pipeline(scheduler=None, head=True, **more):
    """A bidirectional Llama as LLaDA is, all of it random, with words as tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    spec = MDMSpec(28, mask_format="additive", extra_inputs=("position_ids",))
    quality_head = QualityHead(32, "mlp") if head else None
    scheduler = scheduler or (PrismScheduler(num_remask=2) if head else MDLMScheduler())
    pipe = PrismPipeline(model, tokenizer(**more), quality_head, scheduler, mdm_spec=spec)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline and its prompts, with ids, and a key of the user's own."""
    folder = tmp_path_factory.mktemp("many")
    pipeline().save_pretrained(folder / "model")
    rows = [{"id": f"p{i}", "prompt": prompt, "own": [i]} for i, prompt in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(folder, out, *more):
    settings = ["--gen-length=8", "--num-inference-steps=16", "--batch-size=2", "--seed=3", "--device=cpu"]
    return [str(folder / "model"), f"--prompts={folder / 'prompts.jsonl'}", f"--out={out}", *settings, *more]


@pytest.fixture(scope="module")
def whole(folder):
    """The output of an uninterrupted run in one process."""
    assert main(["generate", *flags(folder, folder / "whole.jsonl")]) == 0
    return (folder / "whole.jsonl").read_text()


# --- the laws ---------------------------------------------------------------------------------------------------------


def test_the_output_has_every_prompt_in_order_with_its_own_keys(folder, whole):
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(24)]
    assert [row["prompt"] for row in rows] == PROMPTS and [row["own"] for row in rows] == [[i] for i in range(24)]
    assert {row["nfe"] for row in rows} == {16}
    assert len({row["text"] for row in rows}) > 12
    assert list(folder.glob("whole.jsonl.part-*")) == []


def test_two_processes_write_the_same_file_as_one(folder, whole, tmp_path):
    ended = [process.wait(400) for process in launched(main, ["generate", *flags(folder, tmp_path / "out.jsonl")])]
    assert [status for status, _ in ended] == [0, 0], ended
    assert [re.search(r"generated (\d+) prompts", told)[1] for _, told in ended] == ["12", "12"]
    assert (tmp_path / "out.jsonl").read_text() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.run.json"}


def test_two_processes_killed_and_resumed_by_one_lose_and_double_nothing(folder, whole, tmp_path):
    out = tmp_path / "out.jsonl"
    both = launched(main, ["generate", *flags(folder, out)])
    deadline = time.monotonic() + 400
    while len(read_parts(out)) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    for process in both:
        process.kill()
    done = read_parts(out)
    assert 4 <= len(done) < 24 and not out.exists()
    assert main(["generate", *flags(folder, out)]) == 0
    assert out.read_text() == whole


def test_a_kill_at_any_byte_of_a_part_file_gives_the_same_file(whole, tmp_path):
    pipe, rows = pipeline(), [json.loads(line) for line in whole.splitlines()]
    settings = {"gen_length": 8, "num_inference_steps": 4, "batch_size": 2, "seed": 3}
    prompts = [{"id": row["id"], "prompt": row["prompt"]} for row in rows[:6]]
    generate_many(pipe, prompts, tmp_path / "whole.jsonl", **settings)
    whole = (tmp_path / "whole.jsonl").read_text()
    record = run_file(tmp_path / "whole.jsonl").read_text()
    lines = []
    for batch in plan_batches([len(row["prompt"].split()) for row in prompts], 2):
        found = [json.loads(whole.splitlines()[i]) for i in batch]
        result = [
            {"row": i} | {k: row[k] for k in ("text", "nfe", "ended")} for i, row in zip(batch, found, strict=True)
        ]
        lines.append(json.dumps(result) + "\n")
    content = "".join(lines)
    first = len(lines[0])
    cuts = [0, 1, first - 1, first, first + 1, first + len(lines[1]) // 2, len(content) - 1, len(content)]
    for number, length in enumerate(cuts):
        out = tmp_path / f"cut{number}.jsonl"
        run_file(out).write_text(record)
        (tmp_path / f"{out.name}.part-00000.jsonl").write_text(content[:length])
        told = generate_many(pipe, prompts, out, **settings)
        assert out.read_text() == whole
        assert told["generated"] == 6 - 2 * content[:length].count("\n")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_does_not_change_a_row(temperature, tmp_path):
    pipe, found = pipeline(), []
    settings = {"gen_length": 8, "num_inference_steps": 4, "temperature": temperature}
    for batch_size in (1, 4, 24):
        out = tmp_path / f"{batch_size}.jsonl"
        generate_many(pipe, PROMPTS, out, **settings, batch_size=batch_size)
        found.append(out.read_text())
    assert found[0] == found[1] == found[2]
    rows = [json.loads(line) for line in found[0].splitlines()]
    generators = [torch.Generator().manual_seed(i) for i in (0, 5)]  # seed 0: row i has the seed i
    direct = pipe([PROMPTS[0], PROMPTS[5]], generator=generators, **settings)
    assert [rows[0]["text"], rows[5]["text"]] == direct.texts


@pytest.mark.parametrize("closing", [False, True])
def test_rows_of_a_block_causal_model_do_not_change_each_other(closing, tmp_path):
    """Also where the tokenizer closes a text by a token, which the pipeline leaves out."""
    pipe, found = pipeline(), []
    if closing:
        closer = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
        pipe.tokenizer.backend_tokenizer.post_processor = closer
    pipe.register_to_config(mdm_spec=pipe.config.mdm_spec | {"attention": "block_causal", "block_length": 4})
    for batch_size in (1, 6):
        out = tmp_path / f"{batch_size}.jsonl"
        generate_many(pipe, PROMPTS, out, gen_length=6, num_inference_steps=5, temperature=0.0, batch_size=batch_size)
        found.append(out.read_text())
    assert found[0] == found[1]


@pytest.mark.parametrize("cache", ["none", "block"])
def test_under_a_threshold_the_batch_changes_neither_a_row_nor_its_forwards(cache, tmp_path):
    pipe, found = pipeline(scheduler=PrismScheduler(order="confidence", quality_threshold=0.5)), []
    settings = {"gen_length": 8, "block_length": 4, "num_inference_steps": 10, "threshold": 0.2, "cache": cache}
    for batch_size in (1, 5):
        out = tmp_path / f"{batch_size}.jsonl"
        generate_many(pipe, PROMPTS[:10], out, **settings, batch_size=batch_size)
        found.append(out.read_text())
    assert found[0] == found[1]
    assert len({json.loads(line)["nfe"] for line in found[0].splitlines()}) > 1


def test_ended_says_whether_an_end_token_was_written(tmp_path):
    pipe = pipeline(head=False)
    generate_many(pipe, PROMPTS, tmp_path / "out.jsonl", gen_length=20, num_inference_steps=2, batch_size=24)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["ended"] == (len(row["text"].split()) < 20)
    assert {row["ended"] for row in rows} == {True, False}
    told = generate_many(pipe, PROMPTS, tmp_path / "out.jsonl", gen_length=20, num_inference_steps=2)
    assert told["generated"] == 0  # it was complete
    assert told["not_ended"] == sum(not row["ended"] for row in rows)


def test_prompts_and_messages_go_through_the_chat_template(tmp_path):
    pipe = pipeline(chat_template=CHAT)
    rows = [{"prompt": "w3 w4"}, {"messages": [{"role": "user", "content": "w3 w4"}]}]
    settings = {"gen_length": 6, "temperature": 0.0, "num_inference_steps": 3}
    generate_many(pipe, rows, tmp_path / "a.jsonl", **settings)
    a = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert a == pipe(["w3 w4"] * 2, generator=[torch.Generator().manual_seed(i) for i in (0, 1)], **settings).texts
    generate_many(pipe, rows[:1], tmp_path / "b.jsonl", **settings, use_chat_template=False)
    b = json.loads((tmp_path / "b.jsonl").read_text())["text"]
    plain = pipe("w3 w4", generator=[torch.Generator().manual_seed(0)], use_chat_template=False, **settings)
    assert b == plain.texts[0] != a[0]


@pytest.mark.parametrize("lengths", list(product([1, 2, 5], repeat=4)))
def test_batches_hold_every_row_once_and_no_shorter_row_before_a_longer_one(lengths):
    groups = [0, 1, 0, 1]
    for size, grouped in product((1, 2, 3), (None, groups)):
        batches = plan_batches(list(lengths), size, grouped)
        assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3]
        assert all(0 < len(batch) <= size for batch in batches)
        for group in (0, 1) if grouped else (None,):
            mine = [batch for batch in batches if group is None or groups[batch[0]] == group]
            assert group is None or all(groups[i] == group for batch in mine for i in batch)
            flat = [lengths[i] for batch in mine for i in batch]
            assert flat == sorted(flat, reverse=True)
            assert all(len(batch) == size for batch in mine[:-1])


def test_without_a_pad_token_only_prompts_of_one_length_share_a_batch(tmp_path):
    pipe = pipeline(pad_token=None)
    generate_many(pipe, PROMPTS, tmp_path / "a.jsonl", gen_length=4, num_inference_steps=2, temperature=0.0)
    generate_many(
        pipe, PROMPTS, tmp_path / "b.jsonl", gen_length=4, num_inference_steps=2, temperature=0.0, batch_size=1
    )
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_the_command_for_several_processes(monkeypatch, folder, tmp_path):
    started = []
    monkeypatch.setattr(
        subprocess, "run", lambda words, check: started.append(words) or subprocess.CompletedProcess(words, 0)
    )
    assert main(["generate", *flags(folder, tmp_path / "o.jsonl", "--eos-early-stop", "--num_processes=2")]) == 0
    words = started[0]
    assert words[1:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    assert {"--eos-early-stop", "--gen-length=8", "--num-inference-steps=16"} <= set(words)
    assert not any("num_processes" in word for word in words)
    assert command(["m"], 4, cpu=False)[:5] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "4"]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ('{"prompt": "a"}\n\n{"prompt": \n', "line 3 is not JSON"),
        ('{"prompt": "a"}\n \n{"prompt": ""}\n', "line 3: the prompt is empty"),
        ('{"prompt": "a"}\n{"prompt": "  "}\n', "line 2: the prompt is empty"),
        ('{"prompt": 3}\n', "line 1: the prompt must be a string, got 3"),
        ('{"text": "a"}\n', """line 1 must have one of "prompt" and "messages", its keys are ['text']"""),
        ('{"prompt": "a", "nfe": 1}\n', "line 1 has the key 'nfe', which the output writes"),
        ('{"prompt": "a", "id": 7}\n{"prompt": "b", "id": 7}\n', "line 2 has the id 7 of"),
        ('{"prompt": "a", "id": true}\n', "line 1: an id is a string or an integer, got True"),
        ('{"messages": []}\n', 'line 1: "messages" must be a list'),
        ('{"messages": [{"role": "user", "content": ""}]}\n', "line 1: the last message is empty"),
        ("[1]\n", "line 1: a row is"),
        ("", "There are no prompts"),
    ],
)
def test_a_bad_file_of_prompts_is_refused_with_its_line(lines, says, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(lines)
    with pytest.raises((ValueError, TypeError), match=re.escape(says)):
        read_prompts(tmp_path / "p.jsonl")
    assert main(["generate", "nowhere", f"--prompts={tmp_path / 'p.jsonl'}", f"--out={tmp_path / 'o.jsonl'}"]) == 2
    assert says.replace("\n", " ") in capsys.readouterr().err


def test_files_of_text_are_read_a_line_a_prompt(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\r\ntwo \u2028 words\n\n".encode())
    assert read_prompts(path) == [{"id": 0, "prompt": "one"}, {"id": 1, "prompt": "two \u2028 words"}]
    path.write_text("one\n\ntwo\n")
    with pytest.raises(ValueError, match="line 2: the prompt is empty"):
        read_prompts(path)
    with pytest.raises(FileNotFoundError, match=r"no file of prompts .*nowhere\.txt"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"must end in \.jsonl or \.txt"):
        read_prompts(tmp_path / "p.csv")


def test_a_prompt_that_is_too_long_is_an_error_or_recorded(tmp_path):
    pipe, out = pipeline(), tmp_path / "out.jsonl"
    rows = ["w1", {"id": "long", "prompt": "w2 " * 60}, "w3"]
    with pytest.raises(ValueError, match=r"id 'long' is too long: 60 tokens and 8 to generate, the model takes 64"):
        generate_many(pipe, rows, out, gen_length=8)
    assert list(tmp_path.iterdir()) == []
    told = generate_many(pipe, rows, out, gen_length=8, too_long="skip", num_inference_steps=2)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] is None for row in found] == [False, True, False]
    assert found[1]["error"].startswith("too long: 60 tokens") and "error" not in found[0]
    assert (told["skipped"], told["generated"]) == (1, 2)


def test_an_output_of_another_run_is_not_touched(tmp_path):
    pipe, out = pipeline(), tmp_path / "out.jsonl"
    settings = {"gen_length": 4, "num_inference_steps": 2}
    out.write_text("mine\n")
    with pytest.raises(ValueError, match=r"out\.jsonl exists and is not of a run of this command"):
        generate_many(pipe, ["w1"], out, **settings)
    assert out.read_text() == "mine\n"
    out.unlink()
    generate_many(pipe, ["w1"], out, **settings)
    before = out.read_text()
    others = {
        "seed": (["w1"], {"seed": 1}),
        "temperature was None and is 0": (["w1"], {"temperature": 0.5}),
        "prompts_sha256": (["w2"], {}),
    }
    for says, (rows, changed) in others.items():
        with pytest.raises(ValueError, match=f"belongs to another run: .*{says}"):
            generate_many(pipe, rows, out, **(settings | changed))
    with torch.no_grad():
        pipe.model.model.norm.weight += 1e-3  # trained on
    with pytest.raises(ValueError, match="another run: model was"):
        generate_many(pipe, ["w1"], out, **settings)
    pipe = pipeline(scheduler=PrismScheduler(num_remask=1))
    with pytest.raises(ValueError, match="another run: scheduler was"):
        generate_many(pipe, ["w1"], out, **settings)
    assert out.read_text() == before


def test_a_part_file_in_use_or_damaged_is_refused(tmp_path):
    pipe, out, settings = pipeline(), tmp_path / "out.jsonl", {"gen_length": 4, "num_inference_steps": 2}
    generate_many(pipe, ["w1"], out, **settings)
    out.unlink()
    part = tmp_path / "out.jsonl.part-00000.jsonl"
    part.touch()
    with FileLock(f"{part}.lock"), pytest.raises(ValueError, match="Another process is writing"):
        generate_many(pipe, ["w1"], out, **settings)
    part.write_text('[{"row": 0}]\n{"row"\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        generate_many(pipe, ["w1"], out, **settings)


def test_a_run_that_was_refused_before_its_first_batch_is_in_nobodys_way(folder, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    assert main(["generate", *flags(folder, out, "--block-length=1", "--num-inference-steps=2")]) == 2
    assert "8 blocks of 1 tokens" in capsys.readouterr().err
    assert main(["generate", *flags(folder, out, "--max-prompts=2", "--cache=prefix")]) == 0
    assert len(out.read_text().splitlines()) == 2
    assert json.loads(run_file(out).read_text())["cache"] == "prefix"


def test_a_log_gets_lines_with_the_rate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prism_pipelines.generation.running.LOG_SECONDS", 0)
    generate_many(pipeline(), PROMPTS[:4], tmp_path / "o.jsonl", gen_length=4, num_inference_steps=2, batch_size=2)
    told = capsys.readouterr().err.strip().splitlines()
    assert [re.sub(r"[\d,]+ tokens/s", "R", line) for line in told] == ["prompts: 2 of 4, R", "prompts: 4 of 4, R"]


def test_padding_that_ends_texts_may_be_written():
    pipe = pipeline(scheduler=MDLMScheduler(order="left_to_right"), head=False)
    with torch.no_grad():
        pipe.model.lm_head.weight.zero_()  # every token is as likely as any other
    generators = [torch.Generator().manual_seed(i) for i in range(40)]
    settings = {"num_samples": 40, "gen_length": 20, "generator": generators, "suppress_tokens": [2, 29]}
    out = pipe(**settings)
    assert (out.sequences == 0).any() and (out.sequences == 1).any() and not (out.sequences == 28).any()
    first = [next((i for i, token in enumerate(row) if token < 2), 20) for row in out.sequences.tolist()]
    assert [len(text.split()) for text in out.texts] == first
    early = pipe(**settings, block_length=5, num_inference_steps=20, eos_early_stop=True)
    ended = (early.sequences < 2).any(1)
    assert (early.sequences[ended][:, -1] == 1).any()  # the rest is filled with the tokenizer's end token
    only = pipe(**settings, eos_token_id=1)
    assert not (only.sequences == 0).any()


def test_another_template_or_tokenizer_is_another_run(tmp_path):
    asked = {"gen_length": 4, "num_inference_steps": 2, "batch_size": 2, "progress": False}
    pipe = pipeline(chat_template=CHAT)
    generate_many(pipe, PROMPTS_AS_ROWS[:4], tmp_path / "o.jsonl", **asked)
    pipe.tokenizer.chat_template = CHAT + " w1"
    with pytest.raises(ValueError, match="another run: tokenizer was"):
        generate_many(pipe, PROMPTS_AS_ROWS[:4], tmp_path / "o.jsonl", **asked)
    with pytest.raises(ValueError, match=r"another run: .*chat_template_kwargs was None"):
        generate_many(pipe, PROMPTS_AS_ROWS[:4], tmp_path / "o.jsonl", chat_template_kwargs={"a": 1}, **asked)


def test_a_template_is_given_its_arguments(tmp_path):
    pipe = pipeline(chat_template=CHAT + "{% if think %} w5{% else %} w6{% endif %}")
    asked = {"gen_length": 4, "num_inference_steps": 2}
    for think, token in ((True, 7), (False, 8)):
        out = pipe("w1", chat_template_kwargs={"think": think}, **asked)
        assert out.sequences[0, -5] == token
        row = [{"id": "a", "prompt": "w1"}]
        assert prompt_texts(row, pipe.tokenizer, True, {"think": think}) == [f"w1 w0 w{token - 2}"]
    with pytest.raises(ValueError, match="no chat template is used"):
        pipe("w1", use_chat_template=False, chat_template_kwargs={"think": True}, **asked)


def test_too_few_steps_for_the_blocks_of_a_prompt_are_told_before_anything_is_written(tmp_path):
    pipe = pipeline(head=False)
    pipe.register_to_config(mdm_spec={**pipe.config.mdm_spec, "attention": "block_causal", "block_length": 4})
    rows = [{"id": f"p{n}", "prompt": " ".join(["w1"] * n)} for n in (8, 4, 7)]
    with pytest.raises(ValueError, match=r"2 steps are too few: the prompt with id 'p7' has 7 tokens.* touch 3 blocks"):
        generate_many(pipe, rows, tmp_path / "o.jsonl", gen_length=8, num_inference_steps=2, batch_size=1)
    assert not list(tmp_path.iterdir())


def test_another_rule_takes_over_only_what_means_the_same_there():
    pipe = pipeline(scheduler=PrismScheduler(order="confidence", temperature=0.5, eta=0.1, threshold=0.8))
    pipe.scheduler = change_scheduler(pipe.scheduler, "TokenToMaskScheduler")
    assert pipe.scheduler.config.remask_threshold == TokenToMaskScheduler().config.remask_threshold
    assert pipe.scheduler.config.temperature == 0.5
    pipe.scheduler = PrismScheduler(eta=0.1, order="confidence")
    pipe.scheduler = change_scheduler(pipe.scheduler, fields='{"num_remask": 2}')
    assert (pipe.scheduler.config.num_remask, pipe.scheduler.config.eta) == (2, None)
    assert pipe.scheduler.config.order == "confidence"
    pipe.scheduler = change_scheduler(pipe.scheduler, "self-confidence", {"eta": 0.3})
    assert (pipe.scheduler.config.num_remask, pipe.scheduler.config.eta) == (None, 0.3)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--scheduler-config=[1]", "must be an object"),
        ("--scheduler-config={", "are not JSON"),
        ('--scheduler-config={"remask": 1}', "PrismScheduler has no field 'remask'"),
        ("--out=nowhere/out.jsonl", "folder of the output does not exist: 'nowhere'"),
        ("--threshold=1.5", "`threshold` must be a number in (0, 1], got 1.5"),
        ("--cache-refresh-interval=2", "`cache_refresh_interval` has no effect"),
        ("--gen-length=0", "`gen_length` must be an integer of at least 1"),
    ],
)
def test_bad_flags_are_refused_in_one_line(folder, tmp_path, capsys, more, says):
    assert main(["generate", *flags(folder, tmp_path / "o.jsonl", more)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert says in told[-1]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--scheduler=PrismSchedulerOutput", "No scheduler is called 'PrismSchedulerOutput'"),
        ("--scheduler=Nothing", "No scheduler is called 'Nothing'"),
        ("--batch-size=0", "--batch-size: must be a whole number of at least 1, got '0'"),
        ("--num-processes=0", "--num-processes: must be a whole number of at least 1, got '0'"),
        ("--dtype=int8", "--dtype: invalid choice: 'int8'"),
    ],
)
def test_flags_that_no_run_takes_are_refused_in_one_line(folder, tmp_path, capsys, more, says):
    with pytest.raises(SystemExit) as left:
        main(["generate", *flags(folder, tmp_path / "o.jsonl", more)])
    told = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(told) == 1 and says in told[0]


def test_a_scheduler_can_be_chosen_and_its_fields_set(folder, tmp_path):
    out = tmp_path / "o.jsonl"
    chosen = ["--scheduler=SelfConfidenceScheduler", '--scheduler-config={"num_remask": 1}', "--max-prompts=2"]
    assert main(["generate", *flags(folder, out, *chosen)]) == 0
    scheduler = json.loads(run_file(out).read_text())["scheduler"]
    assert scheduler.startswith("SelfConfidenceScheduler") and '"num_remask": 1' in scheduler
    assert len(out.read_text().splitlines()) == 2


def test_out_of_memory_names_the_setting_and_keeps_what_is_done(tmp_path, monkeypatch):
    pipe, settings = pipeline(), {"gen_length": 4, "num_inference_steps": 2, "batch_size": 8}
    call = PrismPipeline.__call__

    def small(self, texts, **more):
        if len(texts) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, texts, **more)

    monkeypatch.setattr(PrismPipeline, "__call__", small)
    with pytest.raises(ValueError, match=r"Out of memory with 8 prompts of up to 11 tokens\. Lower `batch_size` \(8\)"):
        generate_many(pipe, PROMPTS, tmp_path / "o.jsonl", **settings)
    assert generate_many(pipe, PROMPTS, tmp_path / "o.jsonl", **(settings | {"batch_size": 4}))["generated"] == 24


def test_a_blank_line_is_no_row(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n  \r\n{"prompt": "b"}\n')
    assert [(row["id"], row["prompt"]) for row in read_prompts(tmp_path / "p.jsonl")] == [(0, "a"), (1, "b")]


def test_stop_top_p_and_guidance_are_those_of_the_pipeline(folder, tmp_path):
    out = tmp_path / "o.jsonl"
    more = ["--top-p=0.7", "--cfg-scale=0.5", "--stop=w24", "--stop=w10", "--block-length=4", "--batch-size=1"]
    assert main(["generate", *flags(folder, out, *more), "--max-prompts=6"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    pipe = PrismPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    call = {"gen_length": 8, "num_inference_steps": 16, "block_length": 4, "top_p": 0.7, "cfg_scale": 0.5}
    for i, row in enumerate(rows):
        generator = [torch.Generator().manual_seed((3 * 1_000_003 + i) % 2**32)]
        alone = pipe(row["prompt"], **call, generator=generator).texts[0]
        assert row["text"] == min(alone.split("w24")[0], alone.split("w10")[0], key=len)
        assert row["ended"] or not {"w24", "w10"} & set(alone.split())
    assert any(row["ended"] for row in rows)


def test_flags_that_hold_several_values_or_an_object_reach_the_processes():
    from argparse import Namespace

    from prism_pipelines.cli.generate import flags_of

    words = flags_of(Namespace(model="m", stop=["a b", "c"], chat_template_kwargs={"fast": False}, seed=0))
    assert words == ["m", "--stop=a b", "--stop=c", '--chat-template-kwargs={"fast": false}', "--seed=0"]
