"""What a folder or Hub id holds: a saved pipeline, a model, or a quality head that names its base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import backbones, heads
from .files import inside, reachable, read_json


@dataclass(frozen=True)
class Source:
    """Where the parts of a pipeline come from.

    Args:
        path, subfolder: folder or Hub id of the model, and the place of the model in it.
        hub_kwargs: revision, cache_dir, token, local_files_only of the model.
        index: model_index.json of a saved pipeline; None for a plain model.
        mdm_spec: the one that was passed, or saved with the pipeline or the head; None if there is none.
        quality_head: head to attach, or folder or Hub id of one; None for that of the saved pipeline, if any.
        head_kwargs: `hub_kwargs` of the head.
    """

    path: str
    subfolder: str
    hub_kwargs: dict
    index: dict | None
    mdm_spec: Any
    quality_head: Any
    head_kwargs: dict

    @property
    def has_saved_head(self) -> bool:
        """Does the saved pipeline hold a quality head of its own?"""
        return self.index is not None and all(self.index.get("quality_head") or [None])


def resolve_source(
    path: str, subfolder: str, hub_kwargs: dict, quality_head: Any = None, mdm_spec: Any = None
) -> Source:
    """Find out what `path` holds; the repository of a head alone leads to its base model.

    Args:
        path, subfolder: folder or Hub id, and a folder in it.
        hub_kwargs: revision, cache_dir, token, local_files_only.
        quality_head: head that the caller passed, or None.
        mdm_spec: spec that the caller passed, or None.
    Raises:
        ValueError: `path` is a head that names no base model, or is a head and `quality_head` names another.
    """
    hub_kwargs = reachable(path, hub_kwargs)
    index = read_json(path, "model_index.json", hub_kwargs)
    head_config = None
    if index is None and read_json(path, inside(subfolder, "config.json"), hub_kwargs) is None:
        head_config = heads.head_config(path, hub_kwargs)
    if head_config is not None:
        base = head_config.get("base_model")
        if not base or not isinstance(base, str):
            raise ValueError(f"The head of {path!r} does not name its base model; load that, with quality_head=.")
        if quality_head is not None:
            raise ValueError(f"{path!r} is itself a head; `quality_head` goes with a base model.")
        quality_head, head_kwargs = path, hub_kwargs
        path, hub_kwargs = base, reachable(base, hub_kwargs | {"revision": head_config.get("base_revision")})
        index = read_json(path, "model_index.json", hub_kwargs)
        mdm_spec = mdm_spec or head_config.get("mdm_spec")
    else:
        head_kwargs = hub_kwargs | {"revision": None}
        if isinstance(quality_head, (str, Path)):
            head_kwargs = reachable(str(quality_head), head_kwargs)
    if index is not None:
        subfolder, mdm_spec = "model", mdm_spec or backbones.spec_of_index(index, path)
    return Source(path, subfolder, hub_kwargs, index, mdm_spec, quality_head, head_kwargs)
