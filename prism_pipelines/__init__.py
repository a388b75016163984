"""Self-correcting inference for masked diffusion models. Public names load on first use, so the import is quick."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "PrismPipeline": "pipeline_prism",
    "PrismPipelineOutput": "pipeline_output",
    "PrismScheduler": "schedulers",
    "PrismSchedulerOutput": "schedulers",
    "MDLMScheduler": "schedulers",
    "ReMDMScheduler": "schedulers",
    "TokenCriticScheduler": "schedulers",
    "SelfConfidenceScheduler": "schedulers",
    "TokenToMaskScheduler": "schedulers",
    "P2Scheduler": "schedulers",
    "PromptConfidenceScheduler": "schedulers",
    "DrawConfidenceScheduler": "schedulers",
    "StridedSweepScheduler": "schedulers",
    "JudgeAndRepairScheduler": "schedulers",
    "QualityHead": "models.quality_head",
    "MDMSpec": "models.spec",
    "CheckpointRecipe": "models.spec",
    "FAMILIES": "models.families",
    "resolve_spec": "models.families",
    "convert_checkpoint": "hub.convert",
    "enable_prism": "integrations.llada2",
    "disable_prism": "integrations.llada2",
}
# Classes that a saved pipeline may name; diffusers loads only what stands in its own table of libraries.
_COMPONENTS = [name for name in _HOME if name.endswith("Scheduler") or name == "QualityHead"]
__all__ = ["__version__", "bundled", *_HOME]


def _register_with_diffusers() -> None:
    from diffusers.pipelines import pipeline_loading_utils as table

    methods = {name: ["save_pretrained", "from_pretrained"] for name in _COMPONENTS}
    table.LOADABLE_CLASSES.setdefault(__name__, methods)
    table.ALL_IMPORTABLE_CLASSES.update(methods)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register_with_diffusers()
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def bundled(name: str) -> str:
    """The path of a pipeline ("sudoku"), or of a head for one ("sudoku-head"), that comes with the package.

    Pass the path of a pipeline to `PrismPipeline.from_pretrained`, and the path of a head as its `quality_head`.

    Raises:
        ValueError: the package has nothing of that name.
    """
    folder = Path(__file__).parent / "bundled"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("quality_head/*.json")))
    if name not in names:
        raise ValueError(f"No bundled pipeline is called {name!r}; there are: {', '.join(names) or 'none'}.")
    return str(folder / name)


# Importing diffusers takes seconds, so it is not imported for this alone; each of our names registers too.
if "diffusers" in sys.modules:
    _register_with_diffusers()
