"""LoRA adapters in a model: put in, switched, fused into the weights, taken out so that the model is as before.

Those of the user stand side by side with that of the quality head: all that are active add what they have learned.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .adapter_files import CONFIG, read_adapter
from .files import inside, read_json


def adapter_names(model) -> list[str]:
    """Names of the PEFT adapters in a model."""
    return sorted(model.peft_config) if getattr(model, "_hf_peft_config_loaded", False) else []


def load_adapter(model, path: str, name: str, hub_kwargs: dict, subfolder: str = "", spec=None) -> None:
    """Put the LoRA adapter of a folder or repository into a model, or change nothing. Those in use stay so, it is not.

    Args:
        model: transformers model.
        path, subfolder, where, spec: as `read_adapter`.
        name: what it is called in the model; a letter or more, digits, "_" and "-".
    Raises:
        OSError, ValueError: as `read_adapter`; or adapters are fused into the weights, or PEFT refuses it.
    """
    check_name(name)
    refuse_fused(model)
    files = read_adapter(path, subfolder, hub_kwargs, model, spec)
    active = active_adapters(model)
    if "_before_adapters" not in vars(model) and _tuned_layer(model) is None:
        trainable = {key for key, value in model.named_parameters() if value.requires_grad}
        model._before_adapters = (getattr(model, "_weight_conversions", None), trainable)
    try:
        with warnings.catch_warnings(), without_load_report():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are what is wanted
            info = model.load_adapter(peft_config=files.config, adapter_state_dict=files.weights, adapter_name=name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of fields that PEFT takes as they come
        drop_adapter(model, name)
        raise ValueError(f"The adapter of {path!r} has a wrong {CONFIG}: PEFT says {error!s:.200}") from error
    except BaseException:
        drop_adapter(model, name)
        raise
    # transformers also names those of the adapters that were there before.
    lost = [key for key in info.missing_keys if f".{name}." in key] + list(info.unexpected_keys)
    if lost:
        drop_adapter(model, name)
        raise ValueError(
            f"The adapter of {path!r} does not fit {type(model).__name__}: {len(lost)} weights are missing or have no "
            f"place, such as {sorted(lost)[:3]}."
        )
    model.eval()
    use_adapters(model, active)


@contextmanager
def without_load_report() -> Iterator[None]:
    """While it lasts, transformers prints no report: it calls weights of other adapters newly initialized."""
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("integrations.peft", "utils.loading_report")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def check_name(name: str) -> None:
    """Raise a ValueError for a name that no adapter can have: it stands in the names of weights and of folders."""
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise ValueError(f"An adapter's name is made of letters, digits, '_' and '-', got {name!r}.")


def adapter_subfolder(path: str, hub_kwargs: dict) -> str | None:
    """Where the LoRA adapter of a head lies: "" in the head's own repository, "model" in a saved pipeline; or None."""
    places = ("", "model")
    return next((p for p in places if read_json(path, inside(p, CONFIG), hub_kwargs) is not None), None)


def _tuned_layers(model) -> list:
    """Layers of a model that PEFT has wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _tuned_layer(model):
    """A layer of a model that PEFT has wrapped, or None."""
    return next(iter(_tuned_layers(model)), None)


def active_adapters(model) -> list[str]:
    """Names of the adapters that take part in a forward, in order; none if all are switched off."""
    layers = [layer for layer in _tuned_layers(model) if not layer.disable_adapters]
    names = [name for layer in layers for name in (layer.merged_adapters or layer.active_adapters)]
    return [name for name in dict.fromkeys(names) if name in adapter_names(model)]


def refuse_taken(model, name: str) -> None:
    """Raise a ValueError if there is an adapter of that name: a head that is loaded now was not trained on it."""
    if name in adapter_names(model):
        raise ValueError(
            f"The model has an adapter called {name!r} already, perhaps of another pipeline that shares the model. "
            "Remove it first: pipe.unload_quality_head(), or disable_prism(pipe), there; or pass another `name`."
        )


def use_adapters(model, names: list[str]) -> None:
    """Make the adapters of these names the active ones, all others inactive."""
    held = adapter_names(model)
    names = [name for name in names if name in held]
    if names == active_adapters(model):
        return
    refuse_fused(model)
    if names:
        model.enable_adapters()
        model.set_adapter(names)
    elif held:
        model.disable_adapters()


def drop_adapter(model, name: str) -> None:
    """Remove the adapter of that name, if there is one; after the last, the model is as if there had been none.

    What was fused into the weights stays there. transformers leaves PEFT's wrappers in place, and the names that
    weights have under them: saved like that, no weight would be found again.
    """
    if name not in (getattr(model, "peft_config", None) or {}):
        return
    fused, rest = fused_adapters(model), [other for other in active_adapters(model) if other != name]
    model._hf_peft_config_loaded = True  # not yet, where loading failed halfway
    model.delete_adapter(name)
    if adapter_names(model):
        if not fused:
            use_adapters(model, rest)  # PEFT goes on with one that is left
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


# --- fused ------------------------------------------------------------------------------------------------------------


def fused_adapters(model) -> list[str]:
    """Names of the adapters that are added to the weights of their layers."""
    return list(dict.fromkeys(name for layer in _tuned_layers(model) for name in layer.merged_adapters))


def refuse_fused(model) -> None:
    """Raise a ValueError if adapters are fused: PEFT would then run the fused weights whatever is switched."""
    if fused := fused_adapters(model):
        raise ValueError(
            f"The adapters {fused} are fused into the weights. Call pipe.unfuse_lora() before adapters are loaded or "
            "switched, or pipe.unload_lora_weights() to keep the fused weights for good."
        )


def fuse(model, names: list[str] | None, scale: float, safe: bool) -> None:
    """Add active adapters to the weights of their layers, as diffusers' `fuse_lora`.

    Raises:
        ValueError: none is active; one that is not would be fused, or one that is would be left out; some are fused
            already; or, with `safe`, a weight would be NaN or inf.
    """
    refuse_fused(model)
    active = active_adapters(model)
    wanted = active if names is None else names
    if not active or sorted(wanted) != sorted(active):
        raise ValueError(
            f"The active adapters are fused all together: active {active}, asked for {wanted}. Once some are fused, "
            "others have no effect."
        )
    for layer in _tuned_layers(model):
        if scale != 1.0:
            layer.scale_layer(scale)
        layer.merge(safe_merge=safe, adapter_names=wanted)


def unfuse(model) -> None:
    """Take fused adapters out of the weights of their layers again, up to rounding.

    Raises:
        ValueError: none is fused.
    """
    if not fused_adapters(model):
        raise ValueError("No adapter is fused into the weights.")
    for layer in _tuned_layers(model):
        if layer.merged_adapters:
            layer.unmerge()
            layer.unscale_layer()


def model_of(model):
    """The transformers model of a `PeftModel`, with its adapters in it under their names; any other model as it is.

    Raises:
        ValueError: its adapter is not one of LoRA, or is more.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    from .adapter_files import check_kind

    for name, config in model.peft_config.items():
        check_name(name)
        values = config.to_dict()
        check_kind(values | {"peft_type": config.peft_type.value}, f"the PeftModel ({name})")
    base = model.get_base_model()
    # What transformers' load_adapter leaves: then it switches, saves and drops them as if it had loaded them.
    base._hf_peft_config_loaded, base.peft_config = True, model.peft_config
    return base
