"""Loads quality heads and their schedulers, and checks that a head was made for a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from ..models.checks import non_finite
from ..models.quality_head import QualityHead
from ..schedulers import PrismScheduler
from ..schedulers.by_name import SCHEDULERS
from ..schedulers.protocol import Scheduler
from .adapters import adapter_names
from .files import absence, fetch_file, is_hub_id, read_json, tensor_shapes
from .fingerprints import embedding_fingerprint, portable_fingerprint, signs_differ, signs_fingerprint


def head_config(path: str, hub_kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Config of the quality head of a folder or repository, or None if it has none."""
    return read_json(path, "quality_head/config.json", hub_kwargs)


def head_place(quality_head: object) -> str | None:
    """The folder or Hub id of a head, as a string; None if `quality_head` is a `QualityHead` already.

    Raises:
        TypeError: `quality_head` is neither a head, a string nor a path.
    """
    if isinstance(quality_head, QualityHead):
        return None
    if not isinstance(quality_head, (str, Path)):
        got = type(quality_head).__name__
        raise TypeError(f"`quality_head` must be a QualityHead, or a folder or Hub id that has one, got {got}.")
    return str(quality_head)


def load_head(path: str, hub_kwargs: dict[str, Any]) -> QualityHead:
    """The quality head of a folder or repository, from its `quality_head/`.

    Raises:
        OSError: there is no head, or its weights are not safetensors.
        ValueError: its config is wrong, or its weights do not fit its config.
    """
    config = head_config(path, hub_kwargs)
    if config is None:
        raise OSError(f"No quality head: {absence(path, 'quality_head/config.json', hub_kwargs)}.")
    name = f"quality_head/{SAFETENSORS_WEIGHTS_NAME}"
    file = fetch_file(path, name, hub_kwargs)
    if file is None:
        raise OSError(f"The quality head of {path!r} has no {name}; heads are read from safetensors only.")
    owner = f"The quality head of {path!r}"
    found = tensor_shapes(file)
    with torch.device("meta"):  # takes no memory, whatever sizes the config asks for
        expected = {key: tuple(value.shape) for key, value in make_head(config, owner).state_dict().items()}
    if found != expected:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise ValueError(
            f"{owner} does not fit its config.json: {wrong[0]} is {found.get(wrong[0], 'missing')}, and should be "
            f"{expected.get(wrong[0], 'absent')}."
        )
    head, weights = make_head(config, owner), load_file(file)
    if whole := [key for key, value in weights.items() if not value.is_floating_point()]:
        raise ValueError(f"{owner} does not fit its config.json: {whole[0]} is {weights[whole[0]].dtype}, not a float.")
    head.load_state_dict(weights)
    head.register_to_config(_name_or_path=path)
    return head.eval()


def make_head(config: dict[str, Any], owner: str) -> QualityHead:
    """A head with the config of a file, and random weights.

    Raises:
        ValueError: not the config of a `QualityHead`, or sizes that no memory can hold.
    """
    for name in ("base_model", "base_revision", "base_fingerprint", "weights_fingerprint", "signs_fingerprint"):
        if not isinstance(config.get(name), (str, type(None))):
            raise ValueError(f"{owner} has a wrong config.json: {name} must be a string, got {config[name]!r:.80}.")
    try:
        return QualityHead.from_config({name: value for name, value in config.items() if name != "_name_or_path"})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{owner} has a wrong config.json: {str(error).splitlines()[0]}") from error


def load_scheduler(path: str, hub_kwargs: dict[str, Any]) -> Any:
    """The recommended scheduler of a head's repository, or None if it has none.

    Raises:
        ValueError: it is not a scheduler of this package.
    """
    config = read_json(path, "scheduler/scheduler_config.json", hub_kwargs)
    if config is None:
        return None
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ValueError(f"{path!r} recommends the scheduler {name!r}; known here: {', '.join(SCHEDULERS)}.")
    return SCHEDULERS[name].from_config(config)


def scheduler_for(quality_head: QualityHead | str | Path, current: Any, hub_kwargs: dict[str, Any]) -> Any:
    """The scheduler recommended with a head. Without one, `current` if that reads a quality, else `PrismScheduler()`.

    Args:
        quality_head: a folder or Hub id; or a `QualityHead`, which recommends no scheduler.
        current: the scheduler in use.
        hub_kwargs: revision, cache_dir, token, local_files_only.
    """
    recommended = None if isinstance(quality_head, QualityHead) else load_scheduler(str(quality_head), hub_kwargs)
    return recommended or (current if current.needs_quality else PrismScheduler())


def check_scheduler(scheduler: Scheduler) -> None:
    """Raise a TypeError for anything but a scheduler of this package."""
    if not hasattr(scheduler, "needs_quality"):
        raise TypeError(f"`scheduler` must be one of {', '.join(SCHEDULERS)}; got {type(scheduler).__name__}.")


def check_adapter(name: str | None, with_adapter: set[str], model: Any) -> None:
    """Raise a ValueError if the head `name` came with an adapter that is no longer in the model."""
    if name in with_adapter and name not in adapter_names(model):
        raise ValueError(
            f"The adapter of the quality head {name!r} is no longer in the model: another pipeline that shares it has "
            "unloaded it. Load the head again."
        )


def fingerprints(model: Any) -> dict[str, str | None]:
    """Fingerprints of a model, for the config of its head; None for each that cannot be compared later."""
    return {
        "base_fingerprint": embedding_fingerprint(model),
        "weights_fingerprint": portable_fingerprint(model),
        "signs_fingerprint": signs_fingerprint(model),
    }


def check_head(quality_head: QualityHead | None, model: Any, revision: str | None = None) -> None:
    """Check that a head was made for this model.

    Raises:
        ValueError: the head was made for another hidden size, for other token embeddings, or (if these cannot be
            compared) for another repository of the Hub; or it holds NaN or inf.
        TypeError: not a `QualityHead`.
    Warns:
        UserWarning: the head was made for another revision or for other weights, or the model's dtype makes a
            comparison impossible.
    """
    if quality_head is None:
        return
    if not isinstance(quality_head, QualityHead):
        raise TypeError(f"`quality_head` must be a QualityHead, got {type(quality_head).__name__}.")
    if bad := non_finite(quality_head.state_dict().items()):
        raise ValueError(
            f"A weight of `quality_head` holds NaN or inf: {bad}. It would remask at random. Load another head, or "
            "train it again with a lower --learning-rate."
        )
    about = quality_head.config
    made_for, has = about.hidden_size, model.config.hidden_size
    base, here = about.base_model, getattr(model.config, "_name_or_path", "")
    if made_for != has:
        raise ValueError(
            f"`quality_head` was made for hidden size {made_for}{f' ({base})' if base else ''}, and "
            f"{type(model).__name__} has {has}. Load the head of this model."
        )
    differs = other_embeddings(about, model)
    # A tuned backbone is pushed with its head under a new name. The embeddings then show that the two belong together.
    if differs is None and is_hub_id(base) and is_hub_id(here) and base != here:
        made_for = f"`quality_head` was made for {base!r}, and the model is {here!r}"
        if about.base_fingerprint:
            warnings.warn(f"{made_for}; in {model.dtype} the two cannot be compared.", stacklevel=3)
            return
        raise ValueError(
            f"{made_for}. Load the head of this model, or that model; a head judges the hidden states of its own "
            "backbone only."
        )
    if about.base_revision and revision and about.base_revision != revision:
        warnings.warn(
            f"The quality head was made for revision {about.base_revision!r}, and the model has revision {revision!r}.",
            stacklevel=3,
        )
        return
    if differs:
        raise ValueError(
            f"`quality_head` was made for another model of the same size ({base}): the token embeddings differ. Load "
            "the head of this model; a head judges the hidden states of its own backbone only."
        )
    if other_weights(about, model):
        warnings.warn(
            f"The quality head was made for other weights of {base or 'its base model'} (the fingerprints differ): the "
            "model was trained further, or edited. The head may be wrong about it. Check it with "
            "`prism eval calibration`, or train a head for this model.",
            stacklevel=3,
        )


def other_embeddings(config: Any, model: Any) -> bool | None:
    """Does a model have other token embeddings than the one a head was made with? None if they cannot be compared."""
    if config.base_fingerprint and (here := embedding_fingerprint(model)):
        return here != config.base_fingerprint
    if config.signs_fingerprint and (here := signs_fingerprint(model)):
        return signs_differ(config.signs_fingerprint.split("-")[0], here)
    return None


def other_weights(config: Any, model: Any) -> bool:
    """Is a model known to have other weights than the one a head was made with? In float16 their signs are compared."""
    if config.weights_fingerprint and (here := portable_fingerprint(model)):
        return here != config.weights_fingerprint
    here = signs_fingerprint(model) if config.signs_fingerprint else None
    return here is not None and signs_differ(config.signs_fingerprint, here)
