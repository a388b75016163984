"""What commands print besides their results: no bars of loading, and with --quiet nothing."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from family_twins import MASK, H, checkpoint
from safetensors.torch import load_file, save_file

from prism_pipelines.cli.main import main

pytestmark = pytest.mark.slow


def prism(*words):
    ran = subprocess.run([sys.executable, "-m", "prism_pipelines", *words], capture_output=True, text=True)
    return ran.returncode, ran.stdout, ran.stderr


def test_training_names_no_defaults_of_accelerate():
    status, _, errors = prism("train", "--", "--objective", "prism", "--dataset", "missing", "--output-dir", "x")
    assert status == 1 and "had defaults used instead" not in errors


def test_quiet_leaves_results_and_errors_alone_and_silences_warnings(tmp_path, capsys):
    folder = tmp_path / "warns"  # a weight without a place, which is a warning wherever the test runs
    shutil.copytree(checkpoint("sdar"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"mask_token_id": MASK}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors") | {"model.layers.0.extra.weight": torch.ones(H)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    status, printed, errors = prism("info", str(folder))
    assert status == 0 and "attention" in printed and "UserWarning" in errors and "extra.weight" in errors
    assert "%|" not in errors and "it/s" not in errors  # no bars of loading
    status, printed, errors = prism("--quiet", "info", str(folder))
    assert status == 0 and "attention" in printed and errors == ""
    assert main(["-q", "info", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("prism: error:") and "has no config.json" in errors
