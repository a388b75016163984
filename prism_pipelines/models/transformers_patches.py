"""All changes that this package makes inside transformers and inside its models.

Read in transformers 5.23 and peft 0.21. Each function names the private interface that it touches;
docs/private_interfaces.md lists them all, and tests/test_private_interfaces.py looks for each in the installed version.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import Tensor, nn

from .spec import CheckpointRecipe

# --- attention --------------------------------------------------------------------------------------------------------


@contextmanager
def not_causal(config: Any) -> Iterator[None]:
    """Within `with`, transformers builds no causal mask for a config (`config.is_causal`). None changes nothing."""
    if config is None:
        yield
        return
    before = vars(config).get("is_causal")
    config.is_causal = False
    try:
        yield
    finally:
        del config.is_causal  # or it would be saved with the model
        if before is not None:
            config.is_causal = before


# --- names of weights -------------------------------------------------------------------------------------------------


def with_split_weights(native: Any, split_weights: dict[str, list[str]]) -> Any:
    """A subclass of a native class for which transformers cuts weights as `CheckpointRecipe.split_weights` says.

    transformers keeps such rules in a table by the name of the class (`register_checkpoint_conversion_mapping`).

    Raises:
        ImportError: this transformers cannot cut a weight into unequal parts; 5.20 is the first that can.
    """
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import WeightConverter

    try:
        from transformers.core_model_loading import Split
    except ImportError as error:
        raise ImportError(
            f"{native.__name__} is loaded from weights that were saved as one, and transformers "
            f"{transformers.__version__} cannot cut them. Install transformers>=5.20."
        ) from error
    name = f"Split{native.__name__}"
    rules = get_checkpoint_conversion_mapping(native.config_class.model_type) or []
    rules += [WeightConverter(whole, parts, [Split(dim=0)]) for whole, parts in split_weights.items()]
    register_checkpoint_conversion_mapping(name, rules, overwrite=True)
    return type(name, (native,), {"__module__": __name__})


def save_under_native_names(model: Any, native: Any, recipe: CheckpointRecipe) -> None:
    """Let a model that was read by `recipe` be saved under the names of its native class, as it will be read again.

    Otherwise transformers renames its weights back to the names of the checkpoint (`_weight_conversions`).
    """
    model.__class__ = native
    if recipe.key_mapping:
        ours = {*recipe.key_mapping, *(recipe.split_weights or ())}
        kept = [rule for rule in model._weight_conversions if not ours.intersection(rule.source_patterns)]
        model._weight_conversions = kept


def save_adapters_without_embeddings(model: Any) -> None:
    """Let PEFT save adapters without embeddings, if the config of the base checkpoint is not the native one.

    transformers' `get_adapter_state_dict` reads the base's config to compare vocabularies. For these models it cannot
    read the config, or finds another vocabulary there. Then it would save the embeddings too.
    """
    model.get_adapter_state_dict = functools.partial(_adapter_state_dict, model)


def _adapter_state_dict(
    model: Any, adapter_name: str | None = None, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    name = adapter_name or model.active_adapters()[0]
    return get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=name, save_embedding_layers=False)


# --- adapters ---------------------------------------------------------------------------------------------------------


def tuned_layers(model: nn.Module) -> list[Any]:
    """Layers of a model that PEFT has wrapped (`BaseTunerLayer`)."""
    if sys.modules.get("peft") is None:  # it is an extra; where nothing has imported it, nothing is wrapped
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def has_adapters(model: Any) -> bool:
    """Does the model's flag `_hf_peft_config_loaded` say that adapters are loaded?"""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def mark_adapters_loaded(model: Any, configs: dict[str, Any]) -> None:
    """Set what transformers' `load_adapter` sets, so that transformers can switch, save and drop the adapters.

    Args:
        configs: name of the adapter -> its PEFT config.
    """
    model._hf_peft_config_loaded, model.peft_config = True, configs


def remember_before_adapters(model: Any) -> None:
    """Record how a model without adapters is saved and which weights train; see `restore_before_adapters`."""
    if "_before_adapters" not in vars(model) and not tuned_layers(model):
        trainable = {key for key, value in model.named_parameters() if value.requires_grad}
        model._before_adapters = (getattr(model, "_weight_conversions", None), trainable)


def restore_before_adapters(model: Any) -> None:
    """Unwrap all layers of a model from which the last adapter was deleted.

    transformers leaves PEFT's wrappers in place, and with them other names of the weights. Weights that were saved
    under these names would not be found again.
    """
    tuned = set(tuned_layers(model))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in tuned:
                setattr(parent, name, child.get_base_layer())
    conversions, trainable = vars(model).pop("_before_adapters", (None, ()))
    model._weight_conversions = conversions  # None: transformers finds them again
    for key, value in model.named_parameters():
        value.requires_grad_(key in trainable)


@contextmanager
def saved_without_adapters(model: Any) -> Iterator[None]:
    """Within `with`, transformers saves a model as if it had no adapters."""
    kept = {name: getattr(model, name, None) for name in ("_hf_peft_config_loaded", "_weight_conversions")}
    model._hf_peft_config_loaded = False
    model._weight_conversions = vars(model).get("_before_adapters", (None,))[0]
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(model, name, value)


@contextmanager
def without_load_report() -> Iterator[None]:
    """Within `with`, transformers prints no loading report, which wrongly calls other adapters newly initialized."""
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("integrations.peft", "utils.loading_report")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
