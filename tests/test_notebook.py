"""The notebook runs from top to bottom, and is committed without outputs."""

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "quickstart.ipynb"


def test_no_outputs_are_committed():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)


def test_it_runs_from_top_to_bottom(monkeypatch, tmp_path):
    reason = 'needs the notebook extra: pip install "prism-pipelines[notebook]"'
    nbclient = pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    import nbformat

    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    said = "\n".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    assert "53 forward passes" in said and "PRISM: " in said and "lowest quality" in said
    assert sum("iframe" in str(out.get("data")) for cell in notebook.cells for out in cell.get("outputs", ())) == 2
