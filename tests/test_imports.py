"""The layers of the package: imports run downwards only, and `schedulers` stands alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# module -> what it may import of ours. A new module must be entered here: that is the moment to think about its place.
ALLOWED = {
    "schedulers": {"schedulers"},
    "families": set(),
    "sudoku": set(),
    "plots": set(),
    "muon": set(),
    "checkpointing": set(),
    "training_data": {"canvas", "sudoku"},
    "denoiser": {"families", "schedulers"},
    "quality_head": {"schedulers"},
    "losses": {"denoiser", "quality_head", "schedulers"},
    "mdlm": set(),
    "stopping": {"canvas", "families"},
    "repo_files": set(),
    "adapters": {"repo_files"},
    "checks": {"denoiser"},
    "hub": {"adapters", "checks", "families", "mdlm", "repo_files"},
    "heads": {"adapters", "quality_head", "repo_files", "schedulers"},
    "dropin": {"adapters", "heads", "quality_head", "schedulers"},
    "head_repo": {"adapters", "checks", "heads", "repo_files", "schedulers"},
    "trace": set(),
    "canvas": set(),
    "cache": {"denoiser", "families"},
    "precision": set(),
    "recorder": {"denoiser", "schedulers"},
    "sampling": {"cache", "canvas", "denoiser", "families", "precision", "recorder", "schedulers", "stopping"},
    "pipeline_output": {"trace"},
    "pipeline_prism": {
        "adapters",
        "cache",
        "canvas",
        "checks",
        "denoiser",
        "families",
        "head_repo",
        "heads",
        "hub",
        "pipeline_output",
        "quality_head",
        "recorder",
        "repo_files",
        "sampling",
        "schedulers",
        "stopping",
        "trace",
    },
    "training_arguments": {"precision"},
    "training_setup": {
        "checkpointing",
        "checks",
        "denoiser",
        "families",
        "hub",
        "losses",
        "pipeline_prism",
        "quality_head",
        "repo_files",
        "run_files",
        "schedulers",
        "stopping",
        "sudoku",
        "training_data",
    },
    "training_callbacks": {
        "checkpointing",
        "checks",
        "evaluation",
        "losses",
        "pipeline_prism",
        "plots",
        "schedulers",
        "sudoku",
        "trace",
        "training_data",
    },
    "trainer": {"checkpointing"},
    "training": {
        "checkpointing",
        "head_repo",
        "muon",
        "pipeline_prism",
        "repo_files",
        "trainer",
        "training_arguments",
        "training_callbacks",
        "training_setup",
    },
    "evaluation": {"evaluation", "plots", "schedulers", "sudoku"},
    "live_view": set(),
    "cli_arguments": {"schedulers"},
    "sudoku_view": {"live_view", "sudoku"},
    "cli_sudoku": {"cli_arguments", "evaluation", "pipeline_prism", "schedulers", "sudoku", "sudoku_view", "trace"},
    "text_view": {"live_view"},
    "cli_text": {"checks", "cli_arguments", "evaluation", "pipeline_prism", "schedulers", "text_view", "trace"},
    "probes": {"checks", "denoiser", "families"},
    "cli_info": {"families", "pipeline_prism", "probes"},
    "cli_train": set(),
    "cli_eval": {
        "cli_arguments",
        "cli_text",
        "evaluation",
        "generate_many",
        "pipeline_prism",
        "schedulers",
        "sudoku",
    },
    "run_files": {"schedulers"},
    "generate_many": {"canvas", "checks", "pipeline_prism", "run_files", "schedulers", "stopping"},
    "cli_generate": {"generate_many"},
    "lm_eval_model": {"canvas", "checks", "generate_many", "pipeline_prism"},
    "cli": {"cli_eval", "cli_generate", "cli_info", "cli_sudoku", "cli_text", "cli_train"},
    "__main__": {"cli"},
    "__init__": {"denoiser", "dropin", "families", "pipeline_prism", "quality_head", "schedulers"},
}


def our_files():
    files = [*(ROOT / "prism_pipelines").rglob("*.py"), *(ROOT / "schedulers").rglob("*.py")]
    return [path for path in files if "__pycache__" not in path.parts]


def place(path):
    """(module name in ALLOWED, package of the file as imported)"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "schedulers":
        return "schedulers", ("prism_pipelines", "schedulers")
    return parts[1], ("prism_pipelines", *parts[1:-1])


def imported(path):
    """Top-level module names of ours that a file imports, and the outside packages."""
    _, package = place(path)
    ours, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import x` imports the module x; `from .x import name` imports x
            names = [f"{stem}.{a.name}" for a in node.names] if node.level and not node.module else [stem]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "prism_pipelines":
                ours.add(parts[1] if len(parts) > 1 else "__init__")
            else:
                outside.add(parts[0])
    return ours, outside


@pytest.mark.parametrize("path", our_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    name, _ = place(path)
    assert name in ALLOWED, f"{name} has no place in the layers: enter it in ALLOWED"
    ours, outside = imported(path)
    # our own version and names at top level are public, and safe: they load lazily
    too_high = {module for module in ours - ALLOWED[name] - {"__init__"} if module in ALLOWED}
    assert not too_high, f"{path.name} imports {sorted(too_high)}"
    assert "schedulers" not in outside, "a bare `import schedulers` makes a second copy of every class"


def test_schedulers_need_neither_transformers_nor_peft_nor_accelerate():
    for path in our_files():
        if place(path)[0] == "schedulers":
            assert not imported(path)[1] & {"transformers", "peft", "accelerate"}, path.name


def test_every_entry_of_the_table_exists():
    assert set(ALLOWED) == {place(path)[0] for path in our_files()}
