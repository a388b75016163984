"""The rooms of the package and the walls between them: imports run downwards only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# room -> what it knows, and the rooms that it may import from. The order is the order of the floors, from the ground.
ROOMS = {
    "schedulers": ("decoding rules as pure functions of one step", set()),
    "sudoku": ("puzzles, their solver and their tokens", set()),
    "atomic_files": ("files that are written whole or not at all", set()),
    "models": ("what a masked diffusion model is", {"schedulers"}),
    "sampling": ("how a canvas is filled", {"schedulers", "models"}),
    "hub": ("how models and heads come from disk and go there", {"schedulers", "models", "atomic_files"}),
    "evaluation": ("measures of what any callable wrote", {"schedulers", "sudoku", "atomic_files"}),
    "pipeline": ("PrismPipeline and what it returns", {"schedulers", "models", "sampling", "hub"}),
    "training": (
        "objectives and training runs",
        {"schedulers", "sudoku", "atomic_files", "models", "sampling", "hub", "evaluation", "pipeline"},
    ),
    "generation": (
        "many prompts from a file to a file",
        {"schedulers", "atomic_files", "models", "sampling", "hub", "pipeline"},
    ),
    "integrations": (
        "the package inside other libraries",
        {"schedulers", "models", "sampling", "hub", "pipeline", "generation"},
    ),
    "cli": (
        "the command `prism`",
        {
            "schedulers",
            "sudoku",
            "atomic_files",
            "models",
            "sampling",
            "hub",
            "evaluation",
            "pipeline",
            "training",
            "generation",
            "integrations",
        },
    ),
}
# Walls that must stand however the table grows: (room, room that it never reads, where such code belongs instead).
NEVERS = [
    ("models", "hub", "reading files belongs in hub/, which makes models from them"),
    ("models", "sampling", "what a run knows is passed to a model as tensors; recording it belongs in sampling/"),
    ("hub", "sampling", "what both need is a fact about models, and belongs in models/"),
    ("sampling", "hub", "what both need is a fact about models, and belongs in models/"),
    ("evaluation", "pipeline", "evaluation takes pipelines and callables as arguments"),
    ("training", "generation", "what both need about files belongs in hub/files.py"),
]
# Files at the top of the package that belong to a room of several files.
TOP_FILES = {f"pipeline_{name}": "pipeline" for name in ("prism", "heads", "checks", "output")} | {"sudoku": "sudoku"}
FACES = {"__init__", "__main__"}  # public names, loaded lazily, and `python -m prism_pipelines`


def our_files():
    files = [*(ROOT / "prism_pipelines").rglob("*.py"), *(ROOT / "schedulers").rglob("*.py")]
    return [path for path in files if "__pycache__" not in path.parts]


def room_of(parts):
    """The room of a module of ours, given as parts below `prism_pipelines`; None for the package's own face."""
    if not parts or parts[0] in FACES:
        return None
    return TOP_FILES.get(parts[0], parts[0])


def module_parts(path):
    """A file's module as parts below `prism_pipelines`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts if parts[0] == "schedulers" else parts[1:]


def imported(path):
    """Modules of ours that a file imports, as parts below `prism_pipelines`; and the outside packages."""
    package = module_parts(path)[:-1]
    ours, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("prism_pipelines", *package[: len(package) - node.level + 1]) if node.level else ()
            stem = (*base, *(node.module.split(".") if node.module else ()))
            # `from . import x` may import the module x; `from .x import name` imports x
            names = [(*stem, alias.name) for alias in node.names] if node.level and not node.module else [stem]
        else:
            continue
        for name in names:
            if name[0] == "prism_pipelines":
                ours.add(name[1:])
            else:
                outside.add(name[0])
    return ours, outside


def wrong_imports(path):
    """Sentences that say which walls a file breaks."""
    room = room_of(module_parts(path))
    if room is None:
        return []
    about, allowed = ROOMS[room]
    sentences = []
    for parts in imported(path)[0]:
        other = room_of(parts)
        if other not in ROOMS:  # a public name of the package's face, such as `bundled`
            continue
        if other == room or other in allowed:
            continue
        never = next((why for here, there, why in NEVERS if (here, there) == (room, other)), None)
        where = never or f"{other}/ stands on a floor above; move the code there, or what it needs down"
        sentences.append(f"{path.relative_to(ROOT)} imports {'.'.join(parts)}, but {room}/ ({about}) may not: {where}.")
    return sentences


@pytest.mark.parametrize("path", our_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    room = room_of(module_parts(path))
    assert room is None or room in ROOMS, f"{path.relative_to(ROOT)} is in no room: put it into one of {list(ROOMS)}"
    assert not wrong_imports(path), "\n".join(wrong_imports(path))
    assert "schedulers" not in imported(path)[1], "a bare `import schedulers` makes a second copy of every class"


def test_a_wrong_import_is_named_with_the_wall_it_breaks(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for folder in ("prism_pipelines/models", "prism_pipelines/training", "schedulers"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "prism_pipelines/models/bad.py").write_text("from ..hub.files import read_json\nfrom .. import cli\n")
    (tmp_path / "prism_pipelines/training/bad.py").write_text("def f():\n    from ..generation import batch\n")
    (tmp_path / "schedulers/bad.py").write_text("import prism_pipelines.models.families\n")
    below, above = sorted(wrong_imports(tmp_path / "prism_pipelines/models/bad.py"), key=lambda words: "cli" in words)
    assert "imports hub.files" in below and "reading files belongs in hub/" in below
    assert "imports cli" in above and "floor above" in above
    assert "hub/files.py" in wrong_imports(tmp_path / "prism_pipelines/training/bad.py")[0]
    assert "imports models.families" in wrong_imports(tmp_path / "schedulers/bad.py")[0]


def test_the_table_has_no_circle_and_keeps_the_nevers():
    floors = list(ROOMS)
    for room, (_, allowed) in ROOMS.items():
        assert all(floors.index(other) < floors.index(room) for other in allowed), room
    for room, other, _ in NEVERS:
        assert other not in ROOMS[room][1]


def test_every_room_has_files():
    assert {room_of(module_parts(path)) for path in our_files()} - {None} == set(ROOMS)


def test_schedulers_need_neither_transformers_nor_peft_nor_accelerate():
    for path in our_files():
        if room_of(module_parts(path)) == "schedulers":
            assert not imported(path)[1] & {"transformers", "peft", "accelerate"}, path.name


def test_no_folder_with_components_bears_a_name_that_diffusers_takes_for_a_library_of_its_own():
    from diffusers import pipelines

    rooms = {path.parent.name for path in our_files()} - {"prism_pipelines", "schedulers"}
    assert not {room for room in rooms if hasattr(pipelines, room)}
