"""What commands print besides their results: no bars of loading, and with --quiet nothing."""

import subprocess
import sys

from prism_pipelines import bundled


def prism(*words):
    ran = subprocess.run([sys.executable, "-m", "prism_pipelines", *words], capture_output=True, text=True)
    return ran.returncode, ran.stdout, ran.stderr


def test_loading_a_model_prints_no_bars():
    status, printed, errors = prism("info", bundled("sudoku"))
    assert status == 0 and "attention" in printed and errors == ""


def test_training_names_no_defaults_of_accelerate():
    status, _, errors = prism("train", "--", "--objective", "prism", "--dataset", "missing", "--output_dir", "x")
    assert status == 1 and "had defaults used instead" not in errors


def test_quiet_leaves_results_and_errors_alone(tmp_path):
    status, printed, errors = prism("--quiet", "info", bundled("sudoku"))
    assert status == 0 and "attention" in printed and errors == ""
    status, _, errors = prism("-q", "info", str(tmp_path))
    assert status == 2 and errors.startswith("prism: error:") and "has no config.json" in errors
