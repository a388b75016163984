"""The package alone, without its extras, loads a model with a head and runs it."""

import sys

import pytest
import torch

from prism_pipelines import PrismPipeline, bundled, sudoku


@pytest.mark.parametrize("extra", ["peft", "accelerate", "datasets", "matplotlib", "scipy", "optuna"])
def test_a_head_is_loaded_and_judges_without(extra, monkeypatch):
    monkeypatch.setitem(sys.modules, extra, None)  # an import of it fails from here on
    monkeypatch.setattr("diffusers.utils.import_utils._peft_available", extra != "peft")  # what diffusers found before
    pipe = PrismPipeline.from_pretrained(bundled("sudoku"), quality_head=bundled("sudoku-head"))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    out = pipe(infill=sudoku.DEMO_PUZZLE, num_inference_steps=4, generator=generator)
    assert out.confidence is not None and len(out.texts[0]) == sudoku.CELLS
