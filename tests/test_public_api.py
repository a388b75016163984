"""What `import prism_pipelines` gives."""

import subprocess
import sys
from pathlib import Path

import pytest

import prism_pipelines
from prism_pipelines import PrismPipeline, bundled, schedulers


def test_every_public_name_loads_and_is_listed():
    for name in prism_pipelines.__all__:
        assert getattr(prism_pipelines, name) is not None and name in dir(prism_pipelines)
    with pytest.raises(AttributeError, match="no_such_name"):
        prism_pipelines.no_such_name  # noqa: B018


def test_importing_the_package_is_quick_because_it_imports_no_torch():
    code = "import sys, prism_pipelines; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import diffusers, prism_pipelines", "from prism_pipelines import PrismScheduler"])
def test_diffusers_knows_our_classes(first):
    code = f"{first}\nfrom diffusers.pipelines import pipeline_loading_utils as t\n"
    code += "print(sorted(t.LOADABLE_CLASSES['prism_pipelines']), 'QualityHead' in t.ALL_IMPORTABLE_CLASSES)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PrismScheduler" in ran.stdout and ran.stdout.strip().endswith("True")


@pytest.mark.parametrize("name", [name for name in schedulers.__all__ if name.endswith("Scheduler")])
def test_a_pipeline_is_saved_and_loaded_with_every_scheduler(name, tmp_path):
    pipe = PrismPipeline.from_pretrained(bundled("sudoku"))
    pipe.scheduler = getattr(prism_pipelines, name)(temperature=0.25)
    pipe.save_pretrained(tmp_path)
    loaded = PrismPipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is type(pipe.scheduler) and loaded.config.temperature == 0.25


def test_bundled_names_what_there_is():
    with pytest.raises(ValueError, match=r"No bundled pipeline is called .chess.; there are: .*sudoku"):
        prism_pipelines.bundled("chess")


def test_the_wheel_holds_every_module_and_the_bundled_pipeline():
    """The packages and data files of pyproject.toml cover everything that is tracked below the package."""
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).resolve().parent.parent
    setup = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent for p in [*root.glob("prism_pipelines/**/*.py"), *root.glob("schedulers/**/*.py")]}
    names = {".".join(p.relative_to(root).parts) for p in folders}
    assert {name.replace("schedulers", "prism_pipelines.schedulers") for name in names} == set(setup["packages"])
    base = root / "prism_pipelines"
    patterns = [(root / name.replace(".", "/"), one) for name, many in setup["package-data"].items() for one in many]
    data = {p for folder, pattern in patterns for p in folder.glob(pattern) if p.is_file()}
    others = {p for p in base.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert others == data and base / "bundled/sudoku/model/model.safetensors" in data
    assert base / "bundled/text/model/model.safetensors" in data
    for folder in (base / "bundled").iterdir():
        assert sum(p.stat().st_size for p in data if p.suffix == ".safetensors" and folder in p.parents) <= 16e6
