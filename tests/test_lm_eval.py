"""lm-eval on a tiny pipeline: batches, stop strings, what is refused, and a whole run of a task."""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_generate_many import CHAT, PROMPTS, pipeline

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from tokenizers import processors

from prism_pipelines import MDLMScheduler
from prism_pipelines.integrations.lm_eval import PrismLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm") / "model"
    pipeline(chat_template=CHAT).save_pretrained(folder)
    return str(folder)


def requests(asked, prompts=PROMPTS):
    return [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, dict(asked)), idx=i)
        for i, prompt in enumerate(prompts)
    ]


def likelihood_requests(pairs, kind="loglikelihood"):
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]


def test_likelihoods_are_the_pipelines_in_any_batch(folder):
    pairs = [("w3 w4", " w5"), ("w3 w4 w9", " w6 w7 w8"), ("", "w2 w2"), ("w3", " w11 w12")]
    one, four = (PrismLM(folder, batch_size=size, num_samples=16, device="cpu") for size in (1, 4))
    found = one.loglikelihood(likelihood_requests(pairs), disable_tqdm=True)
    assert [pytest.approx(value, abs=1e-4) for value, _ in found] == [
        value for value, _ in four.loglikelihood(likelihood_requests(pairs), disable_tqdm=True)
    ]
    exact = one.pipe.log_likelihood("w5", prompt="w3 w4", method="pseudo")
    assert found[0][0] == pytest.approx(float(exact.log_likelihood), abs=1e-5)
    pseudo = PrismLM(folder, likelihood="pseudo", device="cpu").loglikelihood(likelihood_requests(pairs))
    whole = one.pipe.log_likelihood(" w6 w7 w8", prompt="w3 w4 w9", method="pseudo")
    assert pseudo[1][0] == pytest.approx(float(whole.log_likelihood), abs=1e-5)


def test_an_answer_is_greedy_if_the_model_writes_it_itself(folder):
    model = PrismLM(folder, num_samples=1, device="cpu")
    model.pipe.scheduler = MDLMScheduler(order="confidence", temperature=0.0)
    ids = model.pipe.tokenizer("w3 w4", return_tensors="pt").input_ids
    written = model.pipe(input_ids=ids, gen_length=1, num_inference_steps=1).sequences[0, -1]
    word = model.pipe.tokenizer.decode(int(written))
    pairs = [("w3 w4", f" {word}"), ("w3 w4", " w7" if word != "w7" else " w8")]
    assert [same for _, same in model.loglikelihood(likelihood_requests(pairs))] == [True, False]
    model.check_greedy = False
    assert not any(same for _, same in model.loglikelihood(likelihood_requests(pairs)))


def test_a_rolling_text_is_cut_where_the_model_ends(folder):
    model = PrismLM(folder, likelihood="pseudo", device="cpu")
    short, long = " ".join(["w3", "w4"] * 10), " ".join(["w3", "w4"] * 40)
    requests = likelihood_requests([(short,), (long,)], "loglikelihood_rolling")
    found = model.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found[0] == pytest.approx(float(model.pipe.log_likelihood(short, method="pseudo").log_likelihood), abs=1e-4)
    parts = [" ".join(["w3", "w4"] * 32), " ".join(["w3", "w4"] * 8)]
    expected = sum(float(model.pipe.log_likelihood(part, method="pseudo").log_likelihood) for part in parts)
    assert found[1] == pytest.approx(expected, abs=1e-3)


def test_a_batch_gives_the_answers_of_single_requests_in_their_order(folder):
    asked = {"until": ["w24"], "do_sample": False}
    one, eight = (PrismLM(folder, gen_length=8, batch_size=size, device="cpu") for size in (1, 8))
    answers = one.generate_until(requests(asked), disable_tqdm=True)
    assert eight.generate_until(requests(asked), disable_tqdm=True) == answers
    backwards = eight.generate_until(requests(asked, PROMPTS[::-1]), disable_tqdm=True)
    assert backwards[::-1] == answers
    assert len(set(answers)) > 12


def test_answers_end_before_the_first_stop_string_and_are_those_without_it_cut(folder):
    model = PrismLM(folder, gen_length=8, block_length=8, batch_size=8, device="cpu")
    whole = model.generate_until(requests({"do_sample": False}), disable_tqdm=True)
    cut = model.generate_until(requests({"until": ["w24", "w10", ""]}), disable_tqdm=True)
    assert cut == [min(text.split("w24")[0], text.split("w10")[0], key=len) for text in whole]
    assert cut != whole


def test_requests_of_different_settings_do_not_share_a_batch(folder):
    model = PrismLM(folder, batch_size=24, device="cpu")
    short, long = {"max_gen_toks": 4}, {"max_gen_toks": 12, "until": "w24"}
    mixed = requests(short, PROMPTS[:6]) + requests(long, PROMPTS[6:12])
    together = model.generate_until(mixed[::2] + mixed[1::2], disable_tqdm=True)
    apart = [model.generate_until([request], disable_tqdm=True)[0] for request in mixed]
    assert together == apart[::2] + apart[1::2]
    assert all(len(text.split()) <= 4 for text in apart[:6])
    assert max(len(text.split()) for text in apart[6:]) > 4


def test_repeats_of_a_prompt_get_answers_of_their_own_and_do_not_move_the_others(folder):
    asked = {"do_sample": True, "temperature": 1.0}
    model = PrismLM(folder, gen_length=8, batch_size=4, device="cpu")
    once = model.generate_until(requests(asked, PROMPTS[:2]), disable_tqdm=True)
    thrice = model.generate_until(requests(asked, [PROMPTS[0]] * 3 + [PROMPTS[1]]), disable_tqdm=True)
    assert [thrice[0], thrice[3]] == once
    assert len(set(thrice[:3])) == 3


def test_a_tokenizer_without_an_end_token_is_told_one(tmp_path):
    pipe = pipeline(eos_token=None)
    pipe.tokenizer.pad_token = None
    pipe.model.generation_config.eos_token_id = pipe.model.config.eos_token_id = None
    pipe.save_pretrained(tmp_path)
    asked = requests({"until": ["w24"]}, PROMPTS[:2])
    with pytest.raises(ValueError, match="pass `eos_token_id`"):
        PrismLM(str(tmp_path), gen_length=4, device="cpu").generate_until(asked, disable_tqdm=True)
    answers = PrismLM(str(tmp_path), gen_length=4, eos_token_id=1, device="cpu").generate_until(
        asked, disable_tqdm=True
    )
    assert len(answers) == 2


def test_prompts_are_measured_as_the_pipeline_reads_them(tmp_path):
    pipe = pipeline()
    pipe.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A [EOS]", special_tokens=[("[EOS]", 1)]
    )
    pipe.save_pretrained(tmp_path)
    model = PrismLM(str(tmp_path), gen_length=8, device="cpu")
    assert model.pipe.tokenizer("w1").input_ids[-1] == 1
    assert len(model.generate_until(requests({}, [" ".join(["w1"] * 56)]), disable_tqdm=True)) == 1


def test_temperature_is_the_tasks_unless_given(folder):
    model = PrismLM(folder, gen_length=4, device="cpu")
    assert model._call({"do_sample": False, "temperature": 0.7})["temperature"] == 0.0
    assert model._call({"do_sample": True, "temperature": 0.7})["temperature"] == 0.7
    assert model._call({})["temperature"] == 0.0
    assert PrismLM(folder, temperature=0.5, device="cpu")._call({"temperature": 0.7})["temperature"] == 0.5


def test_refusals(folder):
    model = PrismLM(folder, gen_length=8, device="cpu")
    with pytest.raises(ValueError, match=r"The canvas has 70 tokens, and the model takes 64 at most"):
        model.loglikelihood(likelihood_requests([("w1 " * 60, "w2 " * 10)]), disable_tqdm=True)
    with pytest.raises(ValueError, match="`likelihood` must be one of"):
        PrismLM(folder, likelihood="exact")
    with pytest.raises(ValueError, match="`num_samples` must be an integer of at least 1, got 0"):
        PrismLM(folder, num_samples=0)
    with pytest.raises(ValueError, match=r"A prompt has 60 tokens and 8 are to be generated; the model takes 64"):
        model.generate_until(requests({}, ["w1 " * 60]), disable_tqdm=True)
    with pytest.raises(ValueError, match="asks for 'num_beams'"):
        model.generate_until(requests({"num_beams": 2}), disable_tqdm=True)
    assert model._call({"num_beams": 1}) == model._call({})
    with pytest.raises(ValueError, match="empty prompt"):
        model.generate_until(requests({}, [""]), disable_tqdm=True)
    with pytest.raises(ValueError, match="`num_inference_steps` must be an integer of at least 1, got 0"):
        PrismLM(folder, num_inference_steps=0)
    with pytest.raises(ValueError, match="`batch_size` must be an integer of at least 1, got 'auto'"):
        PrismLM(folder, batch_size="auto")


def test_the_registry_and_the_argument_string_of_lm_eval_make_the_model(folder):
    text = f"pretrained={folder},gen_length=6,num_inference_steps=3,scheduler=SelfConfidenceScheduler,dtype=bfloat16"
    model = get_model("prism").create_from_arg_string(text, {"batch_size": 4, "max_batch_size": None, "device": "cpu"})
    assert isinstance(model, PrismLM) and (model.gen_length, model.num_inference_steps, model.batch_size) == (6, 3, 4)
    assert type(model.pipe.scheduler).__name__ == "SelfConfidenceScheduler"
    assert model.pipe.model.dtype == torch.bfloat16
    assert model.apply_chat_template([{"role": "user", "content": "w3"}]) == "w3 w0"


@pytest.mark.slow
def test_a_generation_and_a_likelihood_task_run_from_the_command_line(folder, tmp_path):
    rows = [{"question": prompt, "answer": "w1", "choices": ["w5", "w6 w7"], "label": 1} for prompt in PROMPTS[:5]]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs:\n  until: ['w24']\n  do_sample: false\nmetric_list:\n  - metric: exact_match\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f"task: choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: label\n"
        "doc_to_choice: '{{choices}}'\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    words = [sys.executable, "-m", "prism_pipelines.integrations.lm_eval", "run", "--model", "prism"]
    words += ["--tasks", "tiny,choice", "--include_path", str(tmp_path)]
    words += ["--model_args", f"pretrained={folder},gen_length=6,num_samples=8"]
    words += ["--batch_size", "4", "--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(words, env=os.environ | offline, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert found["n-samples"]["tiny"]["effective"] == 5
    assert found["n-samples"]["choice"]["effective"] == 5 and 0 <= found["results"]["choice"]["acc,none"] <= 1
    read = next((tmp_path / "out").rglob("samples_choice*.jsonl")).read_text().splitlines()
    choice = {sample["doc_id"]: sample["resps"] for sample in map(json.loads, read)}
    model = PrismLM(folder, gen_length=6, num_samples=8, batch_size=4, device="cpu")
    pairs = [(prompt, f" {answer}") for prompt in PROMPTS[:5] for answer in ("w5", "w6 w7")]
    values = [value for value, _ in model.loglikelihood(likelihood_requests(pairs), disable_tqdm=True)]
    got = [float(choice[i][side][0][0]) for i in range(5) for side in (0, 1)]
    assert got == [pytest.approx(value, abs=1e-4) for value in values]
    read = next((tmp_path / "out").rglob("samples_tiny*.jsonl")).read_text().splitlines()
    samples = [json.loads(line) for line in read]
    expected = model.generate_until(requests({"until": ["w24"]}, PROMPTS[:5]), disable_tqdm=True)
    by_id = {sample["doc_id"]: sample["resps"][0][0] for sample in samples}
    assert [by_id[i] for i in range(5)] == expected


def test_the_gpu_that_lm_eval_asks_for_by_default_gives_way_to_the_cpu_where_there_is_none(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="There is no GPU for device='cuda:0', lm-eval's default: the CPU is used"):
        model = PrismLM(folder, gen_length=4, device="cuda:0")
    assert model.pipe.device.type == "cpu"


def test_an_answer_that_was_begun_goes_on(folder):
    model = PrismLM(folder, gen_length=4, device="cpu")
    chat = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4 w5"}]
    assert model.apply_chat_template(chat, add_generation_prompt=False) == "w3 w4 w5"
