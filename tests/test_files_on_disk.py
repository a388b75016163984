"""What an older version left on a user's disk still loads and resumes, with equal results (tests/fixtures).

`fixtures/make_fixtures.py` says what the files are and how they were made. The names in them are relative, so these
tests work in that folder or in a copy of it.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fixtures.make_fixtures import generated, letters_e
from safetensors.torch import load_file

from prism_pipelines import PrismPipeline, schedulers
from prism_pipelines.evaluation import run_comparison
from prism_pipelines.training.run import main

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())


def assert_same_generation(found, expected):
    """Equal tokens and settings, and qualities equal up to rounding."""
    found, expected = dict(found), dict(expected)
    ours, theirs = found.pop("quality"), expected.pop("quality")
    fields, saved = found.pop("fields"), expected.pop("fields")
    assert found == expected
    assert {name: fields[name] for name in saved} == saved  # a later version may have fields besides
    if theirs is None:
        assert ours is None
    else:
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("folder", EXPECTED["generated"])
def test_a_saved_pipeline_and_a_saved_head_write_and_judge_as_when_they_were_saved(folder, monkeypatch):
    monkeypatch.chdir(FIXTURES)  # the head names its base as "base"
    assert_same_generation(generated(folder), EXPECTED["generated"][folder])


def test_a_saved_head_on_its_base_is_the_head_loaded_alone(monkeypatch):
    monkeypatch.chdir(FIXTURES)
    expected = EXPECTED["generated"]["head"]
    pipe, ids = PrismPipeline.from_pretrained("base", quality_head="head"), torch.tensor(expected["input_ids"])
    torch.testing.assert_close(pipe.score(input_ids=ids)[0], torch.tensor(expected["quality"]), rtol=0, atol=1e-5)
    bare = PrismPipeline.from_pretrained("base", quality_head=pipe.quality_head)  # without the adapter
    assert (bare.score(input_ids=ids)[0] - torch.tensor(expected["quality"])).abs().max() > 1e-3


@pytest.mark.parametrize("name", EXPECTED["runs"])
def test_a_training_run_goes_on_from_its_checkpoint_to_the_same_end(name, tmp_path, monkeypatch):
    """Equal losses and equal weights; the files of the result have the names that they had."""
    for part in (name, "base", "tokenizer"):
        shutil.copytree(FIXTURES / part, tmp_path / part)
    shutil.copy(FIXTURES / "texts.jsonl", tmp_path)
    expected, run = EXPECTED["runs"][name], tmp_path / name
    sealed = (run / "checkpoint-3" / "manifest.json").stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert main([*expected["flags"], "--resume-from-checkpoint=latest"]) == 0
    # A run that began again would have ended the same, and would have written this checkpoint anew.
    assert (run / "checkpoint-3" / "manifest.json").stat().st_mtime_ns == sealed

    log = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    steps, losses = zip(*[(entry["step"], entry["loss"]) for entry in log if "loss" in entry], strict=True)
    assert list(steps) == [step for step, _ in expected["losses"]]
    assert losses == pytest.approx([loss for _, loss in expected["losses"]], rel=0, abs=1e-5)

    result = FIXTURES / expected["result"]
    files = {str(path.relative_to(result)) for path in result.rglob("*") if path.is_file()}
    assert sorted(file for file in files if not (run / file).is_file()) == []
    weights = [file for file in files if file.endswith(".safetensors")]
    assert weights
    for file in weights:
        torch.testing.assert_close(load_file(run / file), load_file(result / file), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", json.loads((FIXTURES / "schedulers.json").read_text())["cases"], ids=str)
def test_a_scheduler_saved_with_former_field_names_writes_what_it_wrote(case, tmp_path):
    """Also one of a user's subclass, `Mine`."""
    table = json.loads((FIXTURES / "schedulers.json").read_text())
    logits, quality = torch.tensor(table["logits"]), torch.tensor(table["quality"])
    name = case["config"]["_class_name"]
    kind = getattr(schedulers, name) if name != "Mine" else type("Mine", (schedulers.P2Scheduler,), {})
    (tmp_path / "scheduler_config.json").write_text(json.dumps(case["config"]))
    scheduler, generator = kind.from_pretrained(tmp_path), torch.Generator().manual_seed(1)
    scheduler.set_timesteps(len(logits))
    mask = logits.shape[-1] - 1
    sample = torch.full(logits.shape[1:3], mask)
    for t, tokens in enumerate(case["tokens"]):
        step = scheduler.step(logits[t], t, sample, quality=quality[t], mask_token_id=mask, generator=generator)
        sample = step.prev_sample
        assert sample.tolist() == tokens


def never(pipe, steps, seed):
    pytest.fail("A finished cell was computed again.")


def compared(folder, task):
    """A function that runs the comparison of the fixtures in a folder, to which their cells are copied."""
    shutil.copytree(FIXTURES / "comparison", folder, dirs_exist_ok=True)
    pipe = PrismPipeline.from_pretrained(FIXTURES / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return lambda: run_comparison(pipe, task, out_dir=folder, progress=False, **EXPECTED["comparison"]["plan"])


def assert_same_table(folder, result):
    expected = EXPECTED["comparison"]
    for name in ("rows", "pairs"):
        for ours, theirs in zip(result[name], expected["result"][name], strict=True):
            assert ours.keys() == theirs.keys()
            for field, value in theirs.items():
                assert ours[field] == (value if isinstance(value, str) else pytest.approx(value, rel=0, abs=1e-9))
    assert (folder / "comparison.md").read_text() == expected["table"]


def test_a_comparison_goes_on_from_its_cells_and_computes_none_again(tmp_path):
    pytest.importorskip("matplotlib")
    run = compared(tmp_path, never)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert_same_table(tmp_path, run())
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == before


def test_cells_that_are_gone_are_made_again_with_equal_metrics(tmp_path):
    pytest.importorskip("matplotlib")
    run = compared(tmp_path, letters_e)
    gone = sorted((tmp_path / "cells").glob("*_T4_s1_*"))
    assert len(gone) == len(EXPECTED["comparison"]["plan"]["arms"])
    for path in gone:
        path.unlink()
    assert_same_table(tmp_path, run())
    for path in gone:
        ours = json.loads(path.read_text())
        theirs = json.loads((FIXTURES / "comparison" / "cells" / path.name).read_text())
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}
