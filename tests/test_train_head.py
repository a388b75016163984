"""`prism train-head`: from a model alone to a head that the pipeline loads and uses."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_cli import tiny_pipeline

from prism_pipelines import PrismPipeline, PrismScheduler
from prism_pipelines.cli.main import main
from prism_pipelines.cli.train_head import calibration_line
from prism_pipelines.training.held_out import HeadReport

FAST = ("--max-steps=3", "--batch-size=4", "--max-length=24")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved pipeline whose model is sure of some tokens and not of others."""
    folder = tmp_path_factory.mktemp("tiny")
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.model.get_output_embeddings().weight.mul_(40)
    pipe.save_pretrained(folder)
    return str(folder)


def test_one_command_makes_a_head_that_the_pipeline_uses(tmp_path, model, capsys):
    out = tmp_path / "head"
    status = main(["train-head", model, "--out", str(out), *FAST])
    shown = capsys.readouterr().out
    assert status in (0, 1) and "this head" in shown and "Calibration error 0." in shown
    assert ("not recommended" in shown) == (status == 1)
    pipe = PrismPipeline.from_pretrained(model, quality_head=str(out))
    reads = ("given", "token", "draw", "draw_odds", "age", "remasks", "fill", "own", "own_odds")
    assert pipe.quality_head.reads_context == reads
    assert isinstance(pipe.scheduler, PrismScheduler) and pipe.scheduler.config.quality_threshold == 0.02
    result = pipe(num_samples=2, gen_length=24, num_inference_steps=12, return_quality=True, output_type="seq")
    assert not (result.sequences == pipe.mask_token_id).any() and result.quality.isfinite().all()
    card = (out / "README.md").read_text()
    assert ("learned without data" in card and "The head" in card) or "This head is not recommended" in card
    before = load_file(out / "quality_head" / "diffusion_pytorch_model.safetensors")
    main(["train-head", model, "--out", str(out), *FAST])  # again: it is done, and stays as it is
    after = load_file(out / "quality_head" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_head_that_no_free_score_is_behind_is_not_recommended(tmp_path, model, capsys, monkeypatch):
    def behind(self, objective, batches):
        self.measure, self.label, self.temperature, self.rows = "overlap", "posterior", 1.25, []
        self.uncalibrated_ece = 0.3
        self.found = {"head": {"overlap": 3.0, "ece": 0.1}, "own": {"overlap": 3.5, "ece": 0.2}}

    monkeypatch.setattr(HeadReport, "__init__", behind)
    assert main(["train-head", model, "--out", str(tmp_path / "head"), *FAST]) == 1
    shown = capsys.readouterr()
    assert "Calibration error 0.300; 0.100 with the fitted temperature, 1.25." in shown.out
    assert "not recommended" in shown.out and "SelfConfidenceScheduler" in shown.out
    assert "not recommended" in shown.err
    assert "**This head is not recommended**" in (tmp_path / "head" / "README.md").read_text()


def test_what_is_unknown_of_the_calibration_is_said():
    report = SimpleNamespace(uncalibrated_ece=None, temperature=None, found={})
    assert calibration_line(report) == "Calibration error unknown: no held-out text had a token to judge."
    report.uncalibrated_ece = 0.25
    assert calibration_line(report) == "Calibration error 0.250. No temperature could be fitted."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such-folder-here/at-all"], "error"),
        (["{model}", "--max-length=999"], "--max-length is 999, and the model takes 82 tokens at most"),
        (["{model}", "--head=big"], "`architecture` must be one of"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path, model, capsys, words, message):
    words = [word.format(model=model) for word in words]
    assert main(["train-head", *words, "--out", str(tmp_path / "head")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("prism: error:") and message in error


def test_a_folder_of_something_else_is_left_alone(tmp_path, model, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["train-head", model, "--out", str(tmp_path), *FAST]) == 2
    assert "is not the folder of a training run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
