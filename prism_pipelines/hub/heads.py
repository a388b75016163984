"""Where quality heads come from, and whether one fits a model."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from ..models.checks import non_finite
from ..models.quality_head import QualityHead
from ..schedulers import PrismScheduler
from ..schedulers.by_name import SCHEDULERS
from .adapters import adapter_names
from .files import absence, fetch_file, is_hub_id, read_json, tensor_shapes
from .fingerprints import embedding_fingerprint, lasting_fingerprint, signs_differ, signs_fingerprint


def head_config(path: str, hub_kwargs: dict) -> dict | None:
    """Config of the quality head of a folder or repository, or None if it has none."""
    return read_json(path, "quality_head/config.json", hub_kwargs)


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


def load_head(path: str, hub_kwargs: dict) -> QualityHead:
    """The quality head of a folder or repository, from its `quality_head/`.

    Raises:
        OSError: there is none, or it is not safetensors.
        ValueError: its config is wrong, or its weights do not fit it.
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
    with torch.device("meta"):  # sizes without memory: those of a config are anybody's
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


def make_head(config: dict, owner: str) -> QualityHead:
    """A head with the config of a file, and weights by chance.

    Raises:
        ValueError: the config is not one of a `QualityHead`, or speaks of more than any memory holds.
    """
    for name in ("base_model", "base_revision", "base_fingerprint", "weights_fingerprint", "signs_fingerprint"):
        if not isinstance(config.get(name), (str, type(None))):
            raise ValueError(f"{owner} has a wrong config.json: {name} must be a string, got {config[name]!r:.80}.")
    try:
        return QualityHead.from_config({name: value for name, value in config.items() if name != "_name_or_path"})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{owner} has a wrong config.json: {str(error).splitlines()[0]}") from error


def load_scheduler(path: str, hub_kwargs: dict):
    """The recommended scheduler of a head's repository, or None if it has none.

    Raises:
        ValueError: it names a class that is not ours.
    """
    config = read_json(path, "scheduler/scheduler_config.json", hub_kwargs)
    if config is None:
        return None
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ValueError(f"{path!r} recommends the scheduler {name!r}; known here: {', '.join(SCHEDULERS)}.")
    return SCHEDULERS[name].from_config(config)


def scheduler_for(quality_head, has, hub_kwargs: dict):
    """The scheduler that is recommended with a head, else `has` if it reads a quality, else `PrismScheduler()`.

    Args:
        quality_head: a `QualityHead`, which recommends none, or a folder or Hub id.
        has: the scheduler there is.
        hub_kwargs: revision, cache_dir, token, local_files_only.
    """
    recommended = None if isinstance(quality_head, QualityHead) else load_scheduler(str(quality_head), hub_kwargs)
    return recommended or (has if has.needs_quality else PrismScheduler())


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


def fingerprints(model) -> dict:
    """What the config of a head says of the model that it was made for; None where that cannot be compared later."""
    return {
        "base_fingerprint": embedding_fingerprint(model),
        "weights_fingerprint": lasting_fingerprint(model),
        "signs_fingerprint": signs_fingerprint(model),
    }


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
            "train it again with a lower --learning-rate."
        )
    made_for, has = quality_head.config.hidden_size, model.config.hidden_size
    base, here = quality_head.config.base_model, getattr(model.config, "_name_or_path", "")
    if made_for != has:
        raise ValueError(
            f"`quality_head` was made for hidden size {made_for}{f' ({base})' if base else ''}, and "
            f"{type(model).__name__} has {has}. Load the head of this model."
        )
    trained_on, differs = quality_head.config.base_revision, other_embeddings(quality_head.config, model)
    # A tuned backbone with its head is pushed under a name of its own; the embeddings tell that they belong together.
    if differs is None and is_hub_id(base) and is_hub_id(here) and base != here:
        made_for = f"`quality_head` was made for {base!r}, and the model is {here!r}"
        if quality_head.config.base_fingerprint:
            warnings.warn(f"{made_for}; in {model.dtype} it cannot be told whether they are the same.", stacklevel=3)
            return
        raise ValueError(
            f"{made_for}. Load the head of this model, or that model; a head judges the hidden states of its own "
            "backbone only."
        )
    if trained_on and revision and trained_on != revision:
        warnings.warn(
            f"The quality head was made for revision {trained_on!r}, and the model is of {revision!r}.", stacklevel=3
        )
        return
    if differs:
        raise ValueError(
            f"`quality_head` was made for another model of the same size ({base}): the token embeddings differ. Load "
            "the head of this model; a head judges the hidden states of its own backbone only."
        )
    if other_weights(quality_head.config, model):
        warnings.warn(
            f"The quality head was made for other weights of {base or 'its base model'} (the fingerprints differ): the "
            "model was trained further, or edited. What the head says may be off; check it with "
            "`prism eval calibration`, or train a head for this model.",
            stacklevel=3,
        )


def other_embeddings(config, model) -> bool | None:
    """Are the token embeddings of a model others than those a head was made with? None if it cannot be told."""
    if config.base_fingerprint and (here := embedding_fingerprint(model)):
        return here != config.base_fingerprint
    if config.signs_fingerprint and (here := signs_fingerprint(model)):
        return signs_differ(config.signs_fingerprint.split("-")[0], here)
    return None


def other_weights(config, model) -> bool:
    """Are the weights of a model known to be others than those a head was made with? In float16 the signs tell."""
    if config.weights_fingerprint and (here := lasting_fingerprint(model)):
        return here != config.weights_fingerprint
    here = config.signs_fingerprint and signs_fingerprint(model)
    return bool(here) and signs_differ(config.signs_fingerprint, here)
