"""The model of a checkpoint: by the class its config names, as a native class, or with the diffusion time folded."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig

from ..models.checks import check_rope
from ..models.convert_mdlm import load_mdlm
from ..models.spec import CheckpointRecipe, MDMSpec
from ..models.transformers_patches import (
    save_adapters_without_embeddings,
    save_under_native_names,
    with_split_weights,
)
from .sizes import check_sizes, file_shapes, model_config, weight_files


class Checkpoint(NamedTuple):
    """Where a checkpoint lies, and its config.json.

    Args:
        path: folder or Hub id.
        subfolder: inside it, or "".
        config_dict: its config.json.
        hub_kwargs: revision, cache_dir, token, local_files_only.
    """

    path: str
    subfolder: str
    config_dict: dict[str, Any]
    hub_kwargs: dict[str, Any]


def load_backbone(
    checkpoint: Checkpoint,
    recipe: CheckpointRecipe,
    spec: MDMSpec,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    placement: dict[str, Any],
) -> Any:
    """The model of a checkpoint, read by one of the three loaders below.

    Args:
        recipe: how the checkpoint is read; `native_class` and `fold_time` choose the loader.
        spec: facts about the model.
        dtype: of the model; "auto" for the dtype of the checkpoint.
        trust_remote_code: run model code of the repository where the recipe names no native class.
        placement: device_map, quantization_config, attn_implementation and the like, for transformers'
            `from_pretrained`; without those that are None.
    Raises:
        OSError: not found, or no safetensors weights.
        ValueError: weights are missing or do not fit, or remote code is needed and not allowed.
    """
    if not recipe.tested:
        warnings.warn(
            f"{checkpoint.path!r}: no test compares this family ({checkpoint.config_dict.get('model_type')}) with a "
            "reference. Run `prism info` on it first, and compare its output with the authors' own.",
            stacklevel=5,
        )
    if recipe.native_class is None:
        model = load_by_config(checkpoint, dtype, trust_remote_code, placement)
    elif recipe.fold_time:
        model = load_folded(checkpoint, recipe, dtype, placement)
    else:
        model = load_native(checkpoint, recipe, spec, dtype, placement)
    check_rope(model, checkpoint.path)
    return model


def load_by_config(
    checkpoint: Checkpoint, dtype: torch.dtype | str, trust_remote_code: bool, placement: dict[str, Any]
) -> Any:
    """A model by the class that its config names: a masked language model of transformers, or remote code."""
    return remote_class(checkpoint.config_dict, checkpoint.path, trust_remote_code).from_pretrained(
        checkpoint.path, trust_remote_code=trust_remote_code, **load_options(checkpoint, dtype, placement)
    )


def load_folded(
    checkpoint: Checkpoint, recipe: CheckpointRecipe, dtype: torch.dtype | str, placement: dict[str, Any]
) -> Any:
    """An MDLM or BD3-LM as a GPT-NeoX with the diffusion time folded into its weights."""
    native = native_class_of(recipe)
    files, config = checked_config(checkpoint, native, recipe)
    if placement:
        names = ", ".join(f"`{name}`" for name in placement)
        raise ValueError(f"{names} is not supported for MDLM (170M parameters); use pipe.to().")
    try:
        return load_mdlm(files, config, torch.float32 if isinstance(dtype, str) else dtype)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"The weights of {checkpoint.path!r} do not fit the MDLM of its config.json: {error}"
        ) from error


def load_native(
    checkpoint: Checkpoint,
    recipe: CheckpointRecipe,
    spec: MDMSpec,
    dtype: torch.dtype | str,
    placement: dict[str, Any],
) -> Any:
    """A model as a native class of transformers, with the checkpoint's weights renamed as the recipe says."""
    path, config_dict, native = checkpoint.path, checkpoint.config_dict, native_class_of(recipe)
    if recipe.config_mapping and config_dict.get("quantization_config"):
        raise ValueError(
            f"The weights of {path!r} are quantized under the names of its own code, which {recipe.native_class} does "
            "not have. Load the unquantized checkpoint, and pass quantization_config= to quantize it here."
        )
    _, config = checked_config(checkpoint, native, recipe)
    reader = with_split_weights(native, recipe.split_weights) if recipe.split_weights else native
    try:
        model, info = reader.from_pretrained(
            path,
            config=config,
            key_mapping=recipe.key_mapping,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **load_options(checkpoint, dtype, placement),
        )
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):  # the parts of a cut weight do not add up
            raise
        raise ValueError(
            f"The weights of {path!r} do not fit {recipe.native_class} with the sizes in its config.json."
        ) from error
    wrong = {name: sorted(info[name])[:3] for name in ("missing_keys", "mismatched_keys") if info[name]}
    if wrong:
        if info["unexpected_keys"]:  # a name that `key_mapping` misses stands here, after its renaming
            wrong["unused_keys"] = sorted(info["unexpected_keys"])[:3]
        raise ValueError(f"The weights of {path!r} do not fit {recipe.native_class}: {wrong}.")
    # Buffers of old releases and the pooler of an encoder are unused without harm, so no warning names them.
    left = sorted(name for name in info["unexpected_keys"] if not name.endswith(("inv_freq", "attn.bias")))
    if left and spec.mask_format == "additive":
        warnings.warn(
            f"{len(left)} weights of {path!r} are not used by {recipe.native_class}, such as {left[:3]}: it may be "
            "another architecture. Run `prism info` on it, and compare its output with the authors' own.",
            stacklevel=6,
        )
    save_under_native_names(model, native, recipe)
    if config_dict.get("model_type") != native.config_class.model_type or recipe.vocab_key:
        save_adapters_without_embeddings(model)
    return model


# --- parts of the loaders ---------------------------------------------------------------------------------------------


def load_options(checkpoint: Checkpoint, dtype: torch.dtype | str, placement: dict[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained` that do not depend on the model."""
    options = {"subfolder": checkpoint.subfolder, "dtype": dtype, "use_safetensors": True}
    return options | checkpoint.hub_kwargs | placement


def native_class_of(recipe: CheckpointRecipe) -> Any:
    """The class of transformers that a recipe names.

    Raises:
        ValueError: transformers has no model class of that name.
    """
    native = getattr(transformers, recipe.native_class or "", None)
    if getattr(native, "config_class", None) is None:
        raise ValueError(f"`native_class` {recipe.native_class!r} is not a model class of transformers with a config.")
    return native


def checked_config(checkpoint: Checkpoint, native: Any, recipe: CheckpointRecipe) -> tuple[list[str], Any]:
    """Weight files of a checkpoint, and its native config. The sizes are checked before memory is allocated.

    Raises:
        OSError, ValueError: as `weight_files`, `model_config` and `check_sizes`.
    """
    path, config_dict = checkpoint.path, checkpoint.config_dict
    files = weight_files(path, checkpoint.subfolder, checkpoint.hub_kwargs)
    shapes = file_shapes(files)
    config = model_config(
        lambda: native_config(native, config_dict, recipe), native, config_dict, shapes, path, recipe.config_mapping
    )
    config.name_or_path = path
    if recipe.fold_time:
        config.intermediate_size = 4 * config.hidden_size  # MDLM's config has no field for it
    check_sizes(native, config, config_dict, shapes, path)
    return files, config


def native_config(native: Any, config_dict: dict[str, Any], recipe: CheckpointRecipe) -> Any:
    """Config of the native class from the checkpoint's own, see `CheckpointRecipe.config_mapping`."""
    if config_dict.get("model_type") == native.config_class.model_type:
        return native.config_class.from_dict(config_dict)
    skipped = ("model_type", "auto_map", "architectures", "transformers_version")
    alias, sizes = native.config_class.attribute_map, ("hidden_size", "num_hidden_layers", "vocab_size")
    missing = [name for name in sizes if name not in config_dict and alias.get(name) not in config_dict]
    if missing and not recipe.config_mapping:  # the native defaults are billions of parameters
        raise ValueError(
            f"{recipe.native_class} needs {missing}, which the config of this {config_dict.get('model_type')!r} lacks. "
            "Say what they are called there in CheckpointRecipe(config_mapping=...)."
        )
    mapping = recipe.config_mapping or {name: name for name in config_dict if name not in skipped}
    values = {ours: config_dict[theirs] for ours, theirs in mapping.items() if theirs in config_dict}
    # A field that is absent or null may be there under the native name (LLaDA: embedding_size, else vocab_size).
    values |= {
        ours: config_dict[ours] for ours in mapping if values.get(ours) is None and config_dict.get(ours) is not None
    }
    if recipe.config_mapping:  # the native defaults are ids of another tokenizer (GPT-NeoX ends a text with id 2)
        values = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | values
    return native.config_class(**values, **(recipe.config_values or {}))


def remote_class(config_dict: dict[str, Any], path: str, trust_remote_code: bool) -> Any:
    """The Auto class that loads a checkpoint without a native class.

    Raises:
        ValueError: it needs code of its own, which is not allowed; or it is not a masked language model.
    """
    model_type = config_dict.get("model_type")
    for name in ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel"):
        if name in config_dict.get("auto_map", {}):
            if not trust_remote_code:
                raise ValueError(
                    f"{path!r} (model_type {model_type!r}) needs the model code of its own repository: transformers "
                    "has no class for it. Read that code, then pass trust_remote_code=True."
                )
            return getattr(transformers, name)
    if type(AutoConfig.for_model(str(model_type))) not in transformers.AutoModelForMaskedLM._model_mapping:
        raise ValueError(
            f"{path!r} (model_type {model_type!r}) is not a masked language model of transformers. If it is a masked "
            'diffusion model of a causal class, pass mdm_spec=MDMSpec(..., mask_format="additive", '
            'recipe=CheckpointRecipe("...ForCausalLM")).'
        )
    return transformers.AutoModelForMaskedLM
