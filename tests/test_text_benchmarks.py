"""The arms of benchmarks/text.py and benchmarks/ablations.py, and where finished work is kept."""

import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import ablations, sudoku, text, text_results
from prism_pipelines import bundled
from prism_pipelines.evaluation import make_scheduler, text_plan
from prism_pipelines.training.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent


def data_folder(folder: Path, text: str = "a") -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("train", "heldout"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"title": "t", "text": text}) + "\n")
    return folder


@pytest.mark.parametrize("window", [{}, {"remask_start": 0.5}, {"remask_end": 0.5}])
def test_every_sampling_ablation_is_an_arm_whatever_the_shipped_window(window):
    shipped = next(arm for arm in text_plan(bundled("text"))["arms"] if arm["name"] == "PRISM")
    shipped = {name: value for name, value in shipped.items() if not name.startswith("remask_")} | window
    for name, fields in ablations.SAMPLING.items():
        config = make_scheduler({**shipped, **fields, "name": name}, 1.0).config
        ends = {"whole run": (0, 1), "first half": (0, 0.5), "second half": (0.5, 1)}.get(name)
        assert ends is None or (config.remask_start, config.remask_end) == ends


def test_a_fine_tune_of_other_steps_weights_or_data_has_a_folder_of_its_own(tmp_path):
    data = data_folder(tmp_path / "data")
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"one")

    def folder(name="k 1", steps=100):
        return ablations.run_folder(tmp_path, name, ablations.TRAINING[name], base, data, steps)

    seen = [folder(), folder("recipe (k 16, lambda 1, block)"), folder(steps=200)]
    assert folder() == seen[0] and seen[1].name.startswith("recipe-k-16-lambda-1-block_100_")
    data_folder(data, "b")
    seen.append(folder())
    (base / "model.safetensors").write_bytes(b"two")
    seen.append(folder())
    assert len(set(seen)) == 5


def test_every_fine_tune_of_the_ablations_is_a_run_that_differs_in_what_it_says():
    recipe = ["--args-file", str(ROOT / "examples/text/prism.args"), "--dataset", "x.jsonl", "--base-model", "x/y"]
    recipe += ["--output-dir", "z", "--bf16", "false"]
    runs = {name: parse_arguments([*recipe, *flags])[0] for name, flags in ablations.TRAINING.items()}
    assert [(run.num_revealed, run.lambda_mdm, run.head, run.full) for run in runs.values()] == [
        (16, 1, "block", True),
        (1, 1, "block", True),
        (4, 1, "block", True),
        (16, 0, "block", True),
        (16, 5, "block", True),
        (16, 1, "linear", True),
        (16, 1, "mlp", True),
        (16, 1, "block", False),
    ]
    assert [name for name, run in runs.items() if run.freeze_backbone] == ["head alone"]


def test_the_frozen_head_runs_at_the_settings_of_prism(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "load", lambda folder, dtype, device: None)
    monkeypatch.setattr(text, "pipeline_fingerprint", lambda pipe: "0")
    shipped = text_plan(bundled("text"))["arms"]
    folders = {"base": None, "critic": None, "frozen": tmp_path}
    (arm,), models = text.extra_arms(folders, "float32", "cpu", "To be", 1, shipped, tmp_path)
    prism = next(arm for arm in shipped if arm["name"] == "PRISM")
    assert arm == {**prism, "name": "PRISM, head alone", "model": next(iter(models))}


def test_a_table_of_more_forwards_may_lack_arms_and_must_not_have_others():
    figures = ROOT / "docs" / "figures"
    first, second = (json.loads((figures / name).read_text()) for name in ("text.json", "text_64.json"))
    kept = ["MDLM", "PRISM"]
    part = second | {"arms": [arm for arm in second["arms"] if arm["name"] in kept]}
    part |= {name: [row for row in second[name] if row["arm"] in kept] for name in ("rows", "pairs")}
    whole = text_results.merged({"text": first, "text_64": part})
    assert whole["commands"][1].startswith("`python -m benchmarks.text --arms MDLM PRISM ")
    lines = {line.split(" | ")[0][2:]: line for line in text_results.grid(whole["rows"], "ngram_js").splitlines()}
    assert lines["P2"].endswith("| - |") and not lines["PRISM"].endswith("| - |")
    verdict = text_results.verdict(whole).splitlines()
    assert any(line.startswith("| P2 |") and line.endswith("| - |") for line in verdict)
    with pytest.raises(ValueError, match="differ in arms"):
        text_results.merged({"text": first, "other": part | {"arms": [{**part["arms"][0], "order": "confidence"}]}})


def test_the_commands_that_the_page_prints_are_commands():
    page = (ROOT / "docs" / "results.md").read_text() + (ROOT / "docs" / "text.md").read_text()
    found = re.findall(r"python -m benchmarks\.(text|sudoku)((?: [^`\n#]+)?)", page)
    assert {name for name, _ in found} == {"text", "sudoku"} and len(found) > 5
    for name, flags in found:
        {"text": text, "sudoku": sudoku}[name].parse_args(shlex.split(flags))  # exits if it is none
    names = [arm["name"] for arm in text_plan(bundled("text"))["arms"]]
    for name, flags in found:
        args = text.parse_args(shlex.split(flags)) if name == "text" else None
        own = {arm: flag for flag, arm in text.OWN_WEIGHTS.items()}
        for arm in (args.arms or ()) if args else ():
            assert arm in names or getattr(args, own[arm]) is not None


def test_a_table_of_sudoku_does_not_take_the_place_of_another():
    for flags in (["--forwards", "16"], ["--arms", "PRISM"], ["--quick", "--forwards", "8", "--table", "x.json"]):
        with pytest.raises(SystemExit):
            sudoku.parse_args(flags)
    assert sudoku.parse_args(["--forwards", "16", "--table", "x.json"]).forwards == [16]
