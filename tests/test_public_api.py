"""What `import prism_pipelines` gives."""

import subprocess
import sys

import pytest

import prism_pipelines


def test_every_public_name_loads_and_is_listed():
    for name in prism_pipelines.__all__:
        assert getattr(prism_pipelines, name) is not None and name in dir(prism_pipelines)
    with pytest.raises(AttributeError, match="no_such_name"):
        prism_pipelines.no_such_name  # noqa: B018


def test_importing_the_package_is_quick_because_it_imports_no_torch():
    code = "import sys, prism_pipelines; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("first", ["import diffusers, prism_pipelines", "from prism_pipelines import PrismScheduler"])
def test_diffusers_knows_our_classes(first):
    code = f"{first}\nfrom diffusers.pipelines import pipeline_loading_utils as t\n"
    code += "print(sorted(t.LOADABLE_CLASSES['prism_pipelines']), 'QualityHead' in t.ALL_IMPORTABLE_CLASSES)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PrismScheduler" in ran.stdout and ran.stdout.strip().endswith("True")


def test_bundled_names_what_there_is():
    with pytest.raises(ValueError, match=r"No bundled pipeline is called .chess.; there are: .*sudoku"):
        prism_pipelines.bundled("chess")
