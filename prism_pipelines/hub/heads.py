"""Where quality heads come from, and whether one fits a model."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch

from .. import schedulers
from ..models.checks import non_finite
from ..models.quality_head import QualityHead
from .adapters import active_adapter, adapter_names
from .files import absence, is_hub_id, read_json

SCHEDULERS = [name for name in schedulers.__all__ if name.endswith("Scheduler")]


def head_config(path: str, where: dict) -> dict | None:
    """Config of the quality head of a folder or repository, or None if it has none."""
    return read_json(path, "quality_head/config.json", where)


def head_place(quality_head) -> str | None:
    """The folder or Hub id that a head is to be read from, or None if it is a head itself.

    Raises:
        TypeError: neither.
    """
    if isinstance(quality_head, QualityHead):
        return None
    if not isinstance(quality_head, (str, Path)):
        got = type(quality_head).__name__
        raise TypeError(f"`quality_head` must be a QualityHead, or a folder or Hub id that has one, got {got}.")
    return str(quality_head)


def load_head(path: str, where: dict) -> QualityHead:
    """The quality head of a folder or repository, from its `quality_head/`.

    Raises:
        OSError: there is none, or it is not safetensors.
    """
    if head_config(path, where) is None:
        raise OSError(f"No quality head: {absence(path, 'quality_head/config.json', where)}.")
    return QualityHead.from_pretrained(path, subfolder="quality_head", use_safetensors=True, **where)


def load_scheduler(path: str, where: dict):
    """The recommended scheduler of a head's repository, or None if it has none.

    Raises:
        ValueError: it names a class that is not ours.
    """
    config = read_json(path, "scheduler/scheduler_config.json", where)
    if config is None:
        return None
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise ValueError(f"{path!r} recommends the scheduler {name!r}; known here: {', '.join(SCHEDULERS)}.")
    return getattr(schedulers, name).from_config(config)


def scheduler_for(quality_head, has, where: dict):
    """The scheduler that is recommended with a head, else `has` if it reads a quality, else `PrismScheduler()`.

    Args:
        quality_head: a `QualityHead`, which recommends none, or a folder or Hub id.
        has: the scheduler there is.
        where: revision, cache_dir, token, local_files_only.
    """
    recommended = None if isinstance(quality_head, QualityHead) else load_scheduler(str(quality_head), where)
    return recommended or (has if has.needs_quality else schedulers.PrismScheduler())


def check_scheduler(scheduler) -> None:
    """Raise a TypeError for what is no scheduler of ours."""
    if not hasattr(scheduler, "needs_quality"):
        raise TypeError(f"`scheduler` must be one of {', '.join(SCHEDULERS)}; got {type(scheduler).__name__}.")


def check_adapter(name: str | None, with_adapter: set[str], model) -> None:
    """Raise a ValueError if the adapter that the head of that name came with is gone from the model."""
    if name in with_adapter and name not in adapter_names(model):
        raise ValueError(
            f"The adapter of the quality head {name!r} is no longer in the model: another pipeline that shares it has "
            "unloaded it. Load the head again."
        )


def check_saving(model, folder: Path, names) -> None:
    """Check that what transformers would save of a model is the model in use, and alone in its folder.

    Args:
        model: perhaps with adapters.
        folder: where it will be saved.
        names: of the heads of the pipeline.
    Raises:
        ValueError: there are adapters and all are off, so that one would be saved in place of the model; or the folder
            holds a whole model where an adapter is saved, or the reverse.
    """
    held, active = adapter_names(model), active_adapter(model)
    if held and active is None:
        drop = "pipe.unload_quality_head" if held[0] in names else "pipe.model.delete_adapter"
        raise ValueError(
            f"The quality head in use has no adapter, and the model holds {held}, switched off. Drop these first: "
            f"{drop}({held[0]!r})."
        )
    stale = sorted(folder.glob("model*.safetensors*" if active else "adapter_*"))
    if stale:
        kinds = ("a whole model", "adapter") if active else ("an adapter", "whole model")
        raise ValueError(
            f"{folder} holds {stale[0].name}, {kinds[0]} saved before; beside this pipeline's {kinds[1]} it would be "
            "loaded again. Save to another folder."
        )


def check_head(quality_head: QualityHead | None, model, revision: str | None = None) -> None:
    """Check that a head was made for this model.

    Raises:
        ValueError: it was made for another hidden size, or for another repository of the Hub; or holds NaN or inf.
        TypeError: it is no `QualityHead`.
    Warns:
        UserWarning: it was made for another revision, or the dtype of the model hides whether it was made for it.
    """
    if quality_head is None:
        return
    if not isinstance(quality_head, QualityHead):
        raise TypeError(f"`quality_head` must be a QualityHead, got {type(quality_head).__name__}.")
    if bad := non_finite(quality_head.state_dict().items()):
        raise ValueError(
            f"A weight of `quality_head` holds NaN or inf: {bad}. It would remask at random. Load another head, or "
            "train it again with a lower --learning_rate."
        )
    made_for, has = quality_head.config.hidden_size, model.config.hidden_size
    base, here = quality_head.config.base_model, getattr(model.config, "_name_or_path", "")
    if made_for != has:
        raise ValueError(
            f"`quality_head` was made for hidden size {made_for}{f' ({base})' if base else ''}, and "
            f"{type(model).__name__} has {has}. Load the head of this model."
        )
    trained_on, trained_with = quality_head.config.base_revision, quality_head.config.base_fingerprint
    has_fingerprint = fingerprint(model) if trained_with else None
    # A tuned backbone with its head is pushed under a name of its own; the embeddings tell that they belong together.
    if not has_fingerprint and is_hub_id(base) and is_hub_id(here) and base != here:
        made_for = f"`quality_head` was made for {base!r}, and the model is {here!r}"
        if trained_with:
            warnings.warn(f"{made_for}; in {model.dtype} it cannot be told whether they are the same.", stacklevel=3)
            return
        raise ValueError(
            f"{made_for}. Load the head of this model, or that model; a head judges the hidden states of its own "
            "backbone only."
        )
    revised = bool(trained_on and revision and trained_on != revision)
    if has_fingerprint and trained_with != has_fingerprint and not revised:
        raise ValueError(
            f"`quality_head` was made for another model of the same size ({base}): the token embeddings differ. Load "
            "the head of this model; a head judges the hidden states of its own backbone only."
        )
    if revised:
        warnings.warn(
            f"The quality head was made for revision {trained_on!r}, and the model is of {revision!r}.", stacklevel=3
        )


def fingerprint(model) -> str | None:
    """Hash of a few rows of the token embeddings, the same in float32 and bfloat16; None in other dtypes.

    It tells models of one architecture and size apart, and LoRA does not change it.
    """
    weight = model.get_input_embeddings().weight
    if weight.dtype not in (torch.float32, torch.bfloat16) or weight.is_meta:
        return None
    rows = weight[:64].detach().to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(rows.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
