"""The `model/` of a saved pipeline: its adapters, and either its weights or the name of the base model that has them.

A base model is named if the weights in use are still the ones that were loaded from it. Otherwise all weights are
saved. A single adapter of a named base lies at the root of the folder, where transformers and PEFT look for it.
Otherwise adapters lie in `adapters/<name>/`. `adapters.json` says what they are called and which are active.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from ..models.spec import MDMSpec
from ..models.transformers_patches import saved_without_adapters
from .adapter_files import CONFIG, WEIGHTS, without_lora, write_adapter
from .adapters import active_adapters, fused_adapters, load_adapter, use_adapters
from .files import inside, read_json
from .fingerprints import portable_fingerprint, signs_differ, signs_fingerprint, weights_fingerprint

INDEX = "adapters.json"


class Origin(NamedTuple):
    """Where a model was loaded from, and the fingerprint of its weights then."""

    base: str
    revision: str | None
    fingerprint: str


def note_origin(model: Any, base: str, revision: str | None) -> None:
    """Store on a model that was just loaded where it came from."""
    model._origin = Origin(base, revision, weights_fingerprint(model))


def origin_in_use(model: Any) -> Origin | None:
    """The origin of a model whose weights have not changed since it was loaded; else None."""
    origin = getattr(model, "_origin", None)
    return origin if origin is not None and weights_fingerprint(model) == origin.fingerprint else None


def save_model(model: Any, folder: Path, names: dict[str, str]) -> bool:
    """Write a model that has adapters. Returns True if its weights were written, and False if a base was named.

    Weights that adapters are fused into are written as they are, and then no adapters are written.

    Args:
        model: transformers model.
        folder: where to write; made if missing.
        names: name of an adapter to write -> its name in the folder.
    Raises:
        ValueError: an adapter is offloaded; or a base would be named in a folder that holds a whole model.
    Warns:
        UserWarning: the weights are not those of the base that was loaded, so all of them are saved.
    """
    fused = fused_adapters(model)
    names = {} if fused else names
    origin = origin_in_use(model) if names else None
    if origin is not None:
        refuse_stale(folder, "model*.safetensors*", "a whole model", "adapter")
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    if origin is None:
        if names:
            base = getattr(model, "_origin", None)
            what = f"The weights are not those of {base.base!r} any more" if base else "It is not known what was loaded"
            warnings.warn(f"{what}: the model is saved whole, with its adapters next to it.", stacklevel=4)
        with saved_without_adapters(model):
            type(model).save_pretrained(model, folder, state_dict=without_lora(model), safe_serialization=True)
    at_root = origin is not None and len(names) == 1
    places = {called: "" if at_root else f"adapters/{called}" for called in names.values()}
    base, revision = (origin.base, origin.revision) if origin else (None, None)
    for name, called in names.items():
        write_adapter(model, name, folder / places[called], base, revision)
    index: dict[str, Any] = {
        "adapters": places,
        "active": [names[name] for name in active_adapters(model) if name in names],
    }
    if origin is not None:
        index |= {"base_model": base, "base_revision": revision, "base_fingerprint": portable_fingerprint(model)}
        index["base_signs"] = signs_fingerprint(model)
    if names:
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return origin is None


def refuse_stale(folder: Path, pattern: str, saved: str, here: str) -> None:
    """Raise a ValueError if a folder holds files of an earlier save that would be loaded together with the new ones."""
    if stale := sorted(folder.glob(pattern)):
        raise ValueError(
            f"{folder} holds {stale[0].name}, {saved} saved before. It would be loaded again, together with this "
            f"pipeline's {here}. Save to another folder."
        )


def clear(folder: Path) -> None:
    """Delete the adapters of an earlier save, so that they are not loaded again."""
    for name in (CONFIG, WEIGHTS, INDEX):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "adapters", ignore_errors=True)


def read_index(path: str, subfolder: str, hub_kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The content of a saved model's `adapters.json`; None without that file.

    Raises:
        ValueError: the file does not have the form that `save_model` writes.
    """
    index = read_json(path, inside(subfolder, INDEX), hub_kwargs)
    if index is None:
        return None
    places, active = index.get("adapters"), index.get("active")
    valid = isinstance(places, dict) and isinstance(active, list) and set(map(str, active)) <= set(places)
    if not valid or not all(re.fullmatch(r"|adapters/[\w-]+", str(place)) for place in index["adapters"].values()):
        raise ValueError(f"{inside(subfolder, INDEX)} of {path!r} is damaged: it names adapters and their folders.")
    return index


def load_adapters(
    model: Any,
    path: str,
    subfolder: str,
    hub_kwargs: dict[str, Any],
    index: dict[str, Any] | None,
    spec: MDMSpec | None,
) -> None:
    """Add the adapters of a saved model to it, and activate those that were active when it was saved.

    With an index of None, the only adapter lies at the root, and is called "prism".

    Warns:
        UserWarning: the base model is not the one that the adapters were saved with.
    """
    index = index or {"adapters": {"prism": ""}, "active": ["prism"]}
    expected, found = index.get("base_fingerprint"), None
    if expected:
        found = portable_fingerprint(model)
    signs = None if found else index.get("base_signs")
    other = found != expected if found else signs and signs_differ(signs, signs_fingerprint(model) or "")
    if other:
        warnings.warn(
            f"{path!r} was saved with other weights of its base model {index.get('base_model')!r} than those that were "
            "loaded now (their fingerprints differ). It will not give the same results.",
            stacklevel=4,
        )
    for name, place in index["adapters"].items():
        load_adapter(model, path, name, hub_kwargs, inside(subfolder, place) if place else subfolder, spec)
    use_adapters(model, index["active"])
