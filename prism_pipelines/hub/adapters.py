"""LoRA adapters in a model: added, switched, fused into the weights, and removed so that the model is as before.

The user's adapters work together with the quality head's adapter: the outputs of all active ones are added.
"""

from __future__ import annotations

import warnings
from typing import Any

from ..models.spec import MDMSpec
from ..models.transformers_patches import (
    has_adapters,
    mark_adapters_loaded,
    remember_before_adapters,
    restore_before_adapters,
    tuned_layers,
    without_load_report,
)
from .adapter_files import CONFIG, read_adapter
from .files import inside, read_json


def adapter_names(model: Any) -> list[str]:
    """Names of the PEFT adapters in a model."""
    return sorted(model.peft_config) if has_adapters(model) else []


def load_adapter(
    model: Any, path: str, name: str, hub_kwargs: dict[str, Any], subfolder: str = "", spec: MDMSpec | None = None
) -> None:
    """Add the LoRA adapter of a folder or repository to a model, inactive. If it fails, nothing is changed.

    Args:
        model: transformers model.
        path, subfolder, hub_kwargs, spec: as `read_adapter`.
        name: of the adapter in the model; letters, digits, "_" and "-".
    Raises:
        OSError, ValueError: as `read_adapter`; or adapters are fused into the weights, or PEFT refuses this one.
    """
    check_name(name)
    refuse_fused(model)
    files = read_adapter(path, subfolder, hub_kwargs, model, spec)
    active = active_adapters(model)
    remember_before_adapters(model)
    try:
        with warnings.catch_warnings(), without_load_report():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are intended
            info = model.load_adapter(peft_config=files.config, adapter_state_dict=files.weights, adapter_name=name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # PEFT does not check all fields of a config
        drop_adapter(model, name)
        raise ValueError(f"The adapter of {path!r} has a wrong {CONFIG}: PEFT says {error!s:.200}") from error
    except BaseException:
        drop_adapter(model, name)
        raise
    # transformers also names the missing weights of adapters that were there before.
    lost = [key for key in info.missing_keys if f".{name}." in key] + list(info.unexpected_keys)
    if lost:
        drop_adapter(model, name)
        raise ValueError(
            f"The adapter of {path!r} does not fit {type(model).__name__}: {len(lost)} weights are missing or have no "
            f"place, such as {sorted(lost)[:3]}."
        )
    model.eval()
    use_adapters(model, active)


def check_name(name: str) -> None:
    """Raise a ValueError for a name that cannot be part of the names of weights and folders."""
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise ValueError(f"An adapter's name must consist of letters, digits, '_' and '-', got {name!r}.")


def adapter_subfolder(path: str, hub_kwargs: dict[str, Any]) -> str | None:
    """Subfolder of a head's LoRA adapter: "" in the head's own repository, "model" in a saved pipeline; or None."""
    return next((p for p in ("", "model") if read_json(path, inside(p, CONFIG), hub_kwargs) is not None), None)


def active_adapters(model: Any) -> list[str]:
    """Names of the adapters that take part in a forward pass, in order; none if all are switched off."""
    layers = [layer for layer in tuned_layers(model) if not layer.disable_adapters]
    names = [name for layer in layers for name in (layer.merged_adapters or layer.active_adapters)]
    return [name for name in dict.fromkeys(names) if name in adapter_names(model)]


def refuse_taken(model: Any, name: str) -> None:
    """Raise a ValueError if the model has an adapter `name` already, since a new head was not trained with that."""
    if name in adapter_names(model):
        raise ValueError(
            f"The model has an adapter called {name!r} already, perhaps from another pipeline that shares the model. "
            "Remove it there with pipe.unload_quality_head() or disable_prism(pipe); or pass another `name`."
        )


def use_adapters(model: Any, names: list[str]) -> None:
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


def drop_adapter(model: Any, name: str) -> None:
    """Remove the adapter `name`, if there is one. After the last one, the model is as before any adapter.

    Adapters that were fused stay in the weights.
    """
    if name not in (getattr(model, "peft_config", None) or {}):
        return
    fused, rest = fused_adapters(model), [other for other in active_adapters(model) if other != name]
    mark_adapters_loaded(model, model.peft_config)  # not yet so, where loading failed halfway
    model.delete_adapter(name)
    if adapter_names(model):
        if not fused:
            use_adapters(model, rest)  # PEFT has made one of the others active
        return
    restore_before_adapters(model)


# --- fused ------------------------------------------------------------------------------------------------------------


def fused_adapters(model: Any) -> list[str]:
    """Names of the adapters that are added to the weights of their layers."""
    return list(dict.fromkeys(name for layer in tuned_layers(model) for name in layer.merged_adapters))


def refuse_fused(model: Any) -> None:
    """Raise a ValueError if adapters are fused: PEFT would run the fused weights, whichever adapter is active."""
    if fused := fused_adapters(model):
        raise ValueError(
            f"The adapters {fused} are fused into the weights. Call pipe.unfuse_lora() before adapters are loaded or "
            "switched, or pipe.unload_lora_weights() to keep the fused weights for good."
        )


def fuse(model: Any, names: list[str] | None, scale: float, safe: bool) -> None:
    """Add active adapters to the weights of their layers, as diffusers' `fuse_lora`.

    Raises:
        ValueError: none is active; `names` are not the active adapters; some are fused already; or, with `safe`, a
            weight would be NaN or inf.
    """
    refuse_fused(model)
    active = active_adapters(model)
    wanted = active if names is None else names
    if not active or sorted(wanted) != sorted(active):
        raise ValueError(
            f"The active adapters are fused all together: active {active}, asked for {wanted}. Once some are fused, "
            "others have no effect."
        )
    for layer in tuned_layers(model):
        if scale != 1.0:
            layer.scale_layer(scale)
        layer.merge(safe_merge=safe, adapter_names=wanted)


def unfuse(model: Any) -> None:
    """Take fused adapters out of the weights of their layers again, up to rounding.

    Raises:
        ValueError: none is fused.
    """
    if not fused_adapters(model):
        raise ValueError("No adapter is fused into the weights.")
    for layer in tuned_layers(model):
        if layer.merged_adapters:
            layer.unmerge()
            layer.unscale_layer()


def model_of(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, with its adapters under their names; other models unchanged.

    Raises:
        ValueError: an adapter is not LoRA, or more than LoRA.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    from .adapter_files import check_kind

    for name, config in model.peft_config.items():
        check_name(name)
        values = config.to_dict()
        check_kind(values | {"peft_type": config.peft_type.value}, f"the PeftModel ({name})")
    base = model.get_base_model()
    mark_adapters_loaded(base, model.peft_config)
    return base
