"""The documented commands: the quickstart from text to generation, the Sudoku heads side by side, the cost tables."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import run

from benchmarks import sudoku_heads, training, training_memory
from prism_pipelines import PrismPipeline
from prism_pipelines.training.run import parse_arguments

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_quickstart_trains_pushes_and_generates(tmp_path):
    """As documented, but for fewer steps: three processes, and a Hub between them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k != "HF_ENDPOINT"}
    environment |= {"PYTHON": sys.executable, "PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    few = ["--max-steps", "3", "--eval-steps", "3", "--num-eval-examples", "8"]
    done = subprocess.run(
        ["bash", str(ROOT / "examples/quickstart_head/train_head.sh"), str(tmp_path), *few],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"with the head: \d+ of \d+ sentences are true", done.stdout)
    card = (tmp_path / "head" / "README.md").read_text()
    assert "me/counting-mdm" in card and "eval_ece" in card and "--rank 8" in card and str(tmp_path) not in card
    assert (tmp_path / "head" / "calibration.png").is_file()
    log = [json.loads(line) for line in (tmp_path / "head" / "training_log.jsonl").read_text().splitlines()]
    assert any("eval_posterior_drift" in entry for entry in log)


def test_heads_of_the_side_by_side_train_what_they_say():
    """The flags of heads.sh, with prism.args before them, as the command reads them."""
    lines = (ROOT / "examples/sudoku/heads.sh").read_text().splitlines()
    calls = [shlex.split(line.replace('"$@"', ""))[1:] for line in lines if re.match("train [a-z]", line)]
    trained = {}
    for way, *flags in calls:
        words = ["--args-file", str(ROOT / "examples/sudoku/prism.args"), "--base-model", "x/y", "--output-dir", "z"]
        run_args, _ = parse_arguments([*words, *flags, "--use-cpu"])
        trained[way] = (run_args.full, run_args.freeze_backbone, run_args.optimizer)
        assert run_args.num_revealed == 16 and run_args.lambda_mdm == 5
    assert trained == {
        "full": (True, False, "muon"),
        "lora": (False, False, "adamw"),
        "frozen": (False, True, "adamw"),
    }


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("examples/*/*.args")), ids=lambda file: f"{file.parent.name}-{file.stem}"
)
def test_every_file_of_flags_is_one_that_a_run_takes_as_it_stands(file):
    """A flag on the command line hides what the file says of it, so a quick recipe alone does not read the file."""
    words = ["--args-file", str(file), "--output-dir", "z", "--dataset", "sudoku", "--use-cpu", "true"]
    words += [] if "--model-type" in file.read_text() else ["--base-model", "x/y"]
    _, args = parse_arguments(words)
    assert (args.lr_scheduler_type == "warmup_stable_decay") == bool(args.lr_scheduler_kwargs)
    assert args.max_steps > 0


def stages_of(tmp_path: Path, recipe: str, *flags: str, cuda: bool) -> list[tuple]:
    """The trainings that train.sh starts, as the command reads their flags; nothing is trained.

    The script's python says whether there is a GPU and that bfloat16 is slow, and its accelerate writes its flags down.
    """
    commands, log = tmp_path / "bin", tmp_path / "log"
    commands.mkdir()
    log.touch()
    cases = f"*cuda*) exit {int(not cuda)} ;; *precision*) exit 1 ;;"
    (commands / "python").write_text(f'#!/bin/sh\ncase "$*" in {cases} esac\n')
    (commands / "accelerate").write_text(
        f"#!{sys.executable}\nimport json, sys\nopen({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
    )
    for file in commands.iterdir():
        file.chmod(0o755)
    environment = os.environ | {"BIN": str(commands), "RUNS": str(tmp_path / "runs")}
    script = ["bash", str(ROOT / "examples" / recipe / "train.sh"), *flags]
    subprocess.run(script, env=environment, check=True, timeout=60)
    stages = []
    for words in map(json.loads, log.read_text().splitlines()):
        words = words[words.index("prism_pipelines.training") + 1 :]
        file = words.index("--args-file") + 1
        words[file] = str(ROOT / words[file])
        stages.append(parse_arguments([word.replace(str(tmp_path / "runs") + "/", "x/") for word in words]))
    return stages


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize(("recipe", "stages"), [("sudoku", 4), ("text", 2), ("code", 2)])
def test_the_recipes_start_trainings_that_a_run_takes(tmp_path, recipe, stages, cuda):
    found = stages_of(tmp_path, recipe, cuda=cuda)
    assert len(found) == stages
    for _, args in found:
        decay = (args.lr_scheduler_kwargs or {}).get("num_decay_steps", 0)
        assert args.warmup_steps + decay <= args.max_steps and args.resume_from_checkpoint == "latest"
        assert args.bf16 == cuda
        if cuda:
            assert args.per_device_train_batch_size == {"sudoku": 512, "text": 128, "code": 256}[recipe]


@pytest.mark.parametrize("recipe", ["sudoku", "text"])
def test_the_quick_recipes_are_short(tmp_path, recipe):
    for run_args, args in stages_of(tmp_path, recipe, "--quick", cuda=False):
        assert 0 < args.max_steps <= 380 and run_args.sample_puzzles == 0
        if (recipe, run_args.objective) == ("text", "prism"):  # finish.py reports the losses of this stage
            assert args.eval_strategy == "steps" and args.eval_steps <= args.max_steps


@pytest.mark.slow
def test_growing_repeats_the_middle_layers_and_saves_a_pipeline_that_trains_on(tmp_path):
    layers = "--config-overrides=hidden_size=32,num_hidden_layers=8,num_attention_heads=2,intermediate_size=64"
    run(tmp_path / "mdm", "--objective=mdm", "--max-steps=1", layers)
    script = ["examples/sudoku/grow.py", str(tmp_path / "mdm"), str(tmp_path / "grown")]
    subprocess.run([sys.executable, *script], cwd=ROOT, check=True, timeout=280)
    encoders = [
        PrismPipeline.from_pretrained(tmp_path / name).model.roberta_prelayernorm.encoder.layer
        for name in ("mdm", "grown")
    ]
    assert [len(encoder) for encoder in encoders] == [8, 16]
    for new, old in enumerate([0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]):
        one, other = encoders[1][new].state_dict(), encoders[0][old].state_dict()
        assert all(torch.equal(value, other[name]) for name, value in one.items()), new
    run(tmp_path / "on", "--objective=mdm", "--max-steps=1", f"--base-model={tmp_path / 'grown'}")


def test_the_side_by_side_measures_each_arm_once(tmp_path, capsys):
    run(tmp_path / "mdm", "--objective=mdm", "--max-steps=1")
    ways = {"full": ("--full",), "lora": ("--rank=2",), "frozen": ("--freeze-backbone",)}
    for way, flags in ways.items():
        folder = tmp_path / f"sudoku-heads-{way}"
        run(folder, "--objective=prism", f"--base-model={tmp_path / 'mdm'}", "--max-steps=1", *flags)
    out = tmp_path / "heads.json"
    words = [str(tmp_path / "mdm"), "--runs", str(tmp_path), "--num-puzzles", "2", "--clues", "60", "--out", str(out)]
    assert sudoku_heads.main([*words, "--forwards", "4", "--seeds", "2"]) == 0
    result = json.loads(out.read_text())
    assert [row["arm"] for row in result["rows"]] == ["mdm", "full", "lora", "frozen"]
    assert all(row["of"] == 4 for row in result["rows"])
    cells = (tmp_path / "sudoku-heads.jsonl").read_text()
    assert sudoku_heads.main([*words, "--forwards", "4", "--seeds", "2"]) == 0
    assert (tmp_path / "sudoku-heads.jsonl").read_text() == cells and len(cells.splitlines()) == 8


def test_the_share_of_the_gain_is_its_formula():
    solved = {"mdm": 10, "full": 30, "lora": 28, "frozen": 20}
    cells = [{"arm": arm, "forwards": 16, "seed": 0, "solved": n} for arm, n in solved.items()]
    shares = {row["arm"]: row["share_of_gain"] for row in sudoku_heads.table(cells, 50)}
    assert shares == pytest.approx({"mdm": 0.0, "full": 1.0, "lora": 0.9, "frozen": 0.5})


@pytest.mark.parametrize(
    ("rank", "checkpointing"),
    [(16, False), pytest.param(16, True, marks=pytest.mark.slow), pytest.param(None, False, marks=pytest.mark.slow)],
)
def test_the_memory_computed_from_shapes_is_what_a_model_takes(rank, checkpointing):
    row = training_memory.check(rank, checkpointing)
    assert row["counted"] / 1.25 < row["estimate"] < row["counted"] * 1.25


def test_parameters_are_counted_as_a_model_has_them():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 50}
    model = training_memory.llama(sizes | {"num_attention_heads": 4, "num_key_value_heads": 2}, "cpu")
    m = {"hidden": 64, "layers": 2, "inner": 96, "key_value": 32, "vocab": 50, "tied": False}
    assert training_memory.parameters(m, 3)["base"] == sum(p.numel() for p in model.parameters())
    objective = training_memory.prism(model, rank=3)
    found = {name: p.numel() for name, p in objective.named_parameters() if p.requires_grad and "lora" in name}
    assert training_memory.parameters(m, 3)["adapter"] == sum(found.values())
    head = sum(p.numel() for p in objective.quality_head.parameters())
    assert training_memory.parameters(m, 3)["head"] == head


def test_peak_memory_counts_what_is_alive_together():
    model = torch.nn.Linear(10, 10, bias=False)  # 400 bytes
    with training.PeakMemory(model) as memory:
        a = torch.zeros(100)  # 400
        b = torch.zeros(50)  # 200
        del a
        c = torch.zeros(25)  # 100: less than what was alive before
        model.weight.t()  # a view takes nothing
    assert memory.peak == 1000 and memory.now == 700
    del b, c
