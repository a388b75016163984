"""What is built of the repository: a wheel from the tree and one from the sdist, run from another folder, offline."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def ran(*words, cwd, **environment):
    done = subprocess.run(
        words, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the tracked files, and what `python -m build` makes there: an sdist, and a wheel from that sdist."""
    folder = tmp_path_factory.mktemp("built")
    files = ran("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file() and name.split("/")[0] not in ("docs", "tests", "benchmarks", "examples"):
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    ran(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), cwd=folder / "tree")
    return folder


def test_the_sdist_holds_the_sources_and_the_weights(built):
    (path,) = (built / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "schedulers/__init__.py", "prism_pipelines/sampling/trace.html"} <= names
    assert "prism_pipelines/bundled/text/model/model.safetensors" in names


def test_a_wheel_runs_both_demos_from_another_folder_without_a_network(built, tmp_path):
    (path,) = (built / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "site")
    assert (tmp_path / "site/prism_pipelines/py.typed").is_file()  # so that type checkers read the annotations
    offline = {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    where = ran(
        sys.executable, "-c", "import prism_pipelines; print(prism_pipelines.__file__)", cwd=tmp_path, **offline
    )
    assert Path(where.strip()).is_relative_to(tmp_path)
    command = [sys.executable, "-m", "prism_pipelines"]
    assert json.loads(ran(*command, "sudoku", "--json", cwd=tmp_path, **offline))["verdict"] == "solved"
    flags = ["--num-inference-steps", "4", "--gen-length", "16", "--json"]
    (text,) = json.loads(ran(*command, "text", *flags, cwd=tmp_path, **offline))["texts"]
    assert len(text) >= 8
