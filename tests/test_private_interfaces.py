"""docs/private_interfaces.md names the private interfaces of other libraries that the code touches, and all exist."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "private_interfaces.md").read_text()
INTERFACES = re.findall(r"^\| `([a-z_]+\.[\w.]+)` \|", PAGE, re.MULTILINE)
# Of Python itself, and of objects that one of our own files defines in a string.
OF_PYTHON = {"_exit", "_replace", "_ActionsContainer", "_base_executable", "_asdict", "_ask", "_number", "_map"}


def resolve(name):
    """The object of a dotted name; for an attribute of instances, what stands before it and speaks of it."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for i, part in enumerate(parts[count:], count + 1):
            if i == len(parts) and not hasattr(found, part) and (inspect.isclass(found) or inspect.ismodule(found)):
                kinds = found.__mro__[:-1] if inspect.isclass(found) else [found]
                sources = "".join(inspect.getsource(inspect.getmodule(kind)) for kind in kinds)
                assert re.search(rf"[.\"]{part}\b", sources), f"{name}: {kinds} do not speak of {part}"
                return found
            found = getattr(found, part)
        return found
    pytest.fail(f"{name} cannot be imported")


@pytest.mark.parametrize("name", INTERFACES)
def test_an_interface_of_the_page_exists_in_the_installed_version(name):
    library = name.split(".")[0]
    pytest.importorskip(library)
    resolve(name)


def test_an_interface_that_is_gone_is_noticed():
    for name in ("torch.nn.Module._no_such_hook", "transformers.PreTrainedModel._no_such_rules", "peft._no_such"):
        with pytest.raises(AssertionError, match="_no_such"):
            resolve(name)


def test_the_versions_of_the_page_are_those_that_the_tests_run_with():
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {name.replace("-", "_"): version for name, version in pinned.items()}
    read_in = dict(re.findall(r"^## (\w+) ([\d.]+)$", PAGE, re.MULTILINE))
    assert set(read_in) == {name.split(".")[0] for name in INTERFACES}
    for library, version in read_in.items():
        assert pinned[library] == version, f"{library}: read the rows again in {pinned[library]}, then change the page"


def code():
    """Trees of all files of the package."""
    files = [*(ROOT / "prism_pipelines").rglob("*.py"), *(ROOT / "schedulers").rglob("*.py")]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in files}


def is_private(name):
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name.isidentifier()


def own_names(trees):
    """Names that the package itself defines: functions, classes, variables, and attributes of `self`."""
    own = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        stored = isinstance(getattr(node, "ctx", None), ast.Store)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif stored and isinstance(node, ast.Name):
            own.add(node.id)
        elif stored and isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls", "pipe"):
            own.add(node.attr)
    return own


def private_uses(trees):
    """(file, name) of each private attribute that is read or set, by name or by getattr and hasattr."""
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                yield file, node.attr
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
                if node.func.id in ("getattr", "hasattr") and isinstance(node.args[1], ast.Constant):
                    yield file, node.args[1].value
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield from ((file, alias.name) for alias in node.names)


def test_every_private_name_that_the_code_touches_is_on_the_page():
    trees = code()
    known = own_names(trees) | OF_PYTHON | set(re.findall(r"\w+", PAGE))
    missing = sorted({(name, file) for file, name in private_uses(trees) if is_private(name) and name not in known})
    assert not missing, f"docs/private_interfaces.md lacks {missing}"


def test_transformers_is_changed_in_one_file_alone():
    """No other file sets the private attributes of transformers, or imports the modules that load weights."""
    page = re.findall(r"^\| `transformers\.\S*?(\w+)` \| models/transformers_patches\.py", PAGE, re.MULTILINE)
    assert "_weight_conversions" in page
    for file, tree in code().items():
        if file.endswith("transformers_patches.py"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                assert node.attr not in page, f"{file} sets {node.attr}"
            if isinstance(node, ast.ImportFrom) and not node.level:
                loads = ("transformers.conversion_mapping", "transformers.core_model_loading")
                assert node.module not in loads, f"{file} imports {node.module}"
