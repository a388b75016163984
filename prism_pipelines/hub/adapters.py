"""LoRA adapters in a model: put in, switched, taken out so that the model is as before."""

from __future__ import annotations

import warnings
from pathlib import Path

from ..models.checks import non_finite
from .files import fetch_file, inside, read_json

# Fields of an adapter's config by which it is more than LoRA.
MORE_THAN_LORA = ("bias", "modules_to_save", "trainable_token_indices", "use_dora")
NOTHING = ("none", None, False, [], {})


def adapter_names(model) -> list[str]:
    """Names of the PEFT adapters in a model."""
    return sorted(model.peft_config) if getattr(model, "_hf_peft_config_loaded", False) else []


def load_adapter(model, path: str, name: str, where: dict, subfolder: str = "") -> None:
    """Put the LoRA adapter of a folder or repository into a model, as transformers' `load_adapter`; or change nothing.

    Raises:
        OSError: its weights are not safetensors.
        ValueError: it is more than LoRA, or its weights are not those that its config speaks of in this model.
    """
    if fetch_file(path, inside(subfolder, "adapter_model.safetensors"), where) is None:
        raise OSError(f"The adapter of {path!r} has no {inside(subfolder, 'adapter_model.safetensors')}.")
    config = read_json(path, inside(subfolder, "adapter_config.json"), where)
    if more := [f"{key}={config[key]!r}" for key in MORE_THAN_LORA if config.get(key, "none") not in NOTHING]:
        raise ValueError(
            f"The adapter of {path!r} has {', '.join(more)}. What that changes cannot be switched off or taken out "
            "again, so only plain LoRA is supported."
        )
    if "_before_adapters" not in vars(model) and _tuned_layer(model) is None:
        trainable = {key for key, value in model.named_parameters() if value.requires_grad}
        model._before_adapters = (getattr(model, "_weight_conversions", None), trainable)
    keys = {key: value for key, value in where.items() if value is not None}
    local = Path(path).is_dir()
    # transformers 5.17 (5.23 no longer) looks for a local adapter in the folder alone, whatever the subfolder.
    folder = str(Path(path, subfolder)) if local else path
    keys |= {"subfolder": subfolder} if subfolder and not local else {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what is wanted
            info = model.load_adapter(folder, adapter_name=name, adapter_kwargs=keys)
        # transformers also names those of the adapters that were there before.
        lost = [key for key in info.missing_keys if f".{name}." in key] + list(info.unexpected_keys)
        if lost:
            raise ValueError(
                f"The adapter of {path!r} does not fit {type(model).__name__}: {len(lost)} weights are missing or have "
                f"no place, such as {sorted(lost)[:3]}."
            )
        own = ((key, value) for key, value in model.named_parameters() if f".{name}." in key)
        if bad := non_finite(own):
            raise ValueError(f"A weight of the adapter of {path!r} holds NaN or inf: {bad}. Load another adapter.")
    except BaseException:
        drop_adapter(model, name)
        raise
    model.eval()


def adapter_subfolder(path: str, where: dict) -> str | None:
    """Where the LoRA adapter of a head lies: "" in the head's own repository, "model" in a saved pipeline; or None."""
    places = ("", "model")
    return next((p for p in places if read_json(path, inside(p, "adapter_config.json"), where) is not None), None)


def _tuned_layer(model):
    """A layer of a model that PEFT has wrapped, or None."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)


def active_adapter(model) -> str | None:
    """Name of the adapter that takes part in a forward; None if there is none, or all are switched off."""
    layer = _tuned_layer(model)
    return None if layer is None or layer.disable_adapters else next(iter(layer.active_adapters), None)


def refuse_taken(model, name: str) -> None:
    """Raise a ValueError if there is an adapter of that name: a head that is loaded now was not trained on it."""
    if name in adapter_names(model):
        raise ValueError(
            f"The model has an adapter called {name!r} already, perhaps of another pipeline that shares the model. "
            "Remove it first: pipe.unload_quality_head(), or disable_prism(pipe), there; or pass another `name`."
        )


def use_adapter(model, name: str | None) -> None:
    """Make the adapter of that name the active one; none if there is no such adapter."""
    if name in adapter_names(model):
        model.enable_adapters()
        model.set_adapter(name)
    elif adapter_names(model):
        model.disable_adapters()


def drop_adapter(model, name: str) -> None:
    """Remove the adapter of that name, if there is one; after the last, the model is as if there had been none.

    transformers leaves PEFT's wrappers in place, and the names that weights have under them: saved like that, no weight
    would be found again.
    """
    if name not in (getattr(model, "peft_config", None) or {}):
        return
    model._hf_peft_config_loaded = True  # not yet, where loading failed halfway
    model.delete_adapter(name)
    if adapter_names(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, child_name, child.get_base_layer())
    conversions, trainable = vars(model).pop("_before_adapters", (None, ()))
    model._weight_conversions = conversions  # None: transformers finds them again
    for key, value in model.named_parameters():
        value.requires_grad_(key in trainable)
