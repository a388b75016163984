"""LoRA adapters in files: read and checked before anything is allocated, and written as PEFT writes them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.checks import non_finite
from ..models.convert_mdlm import LAYER_NAMES, fold_lora
from ..models.families import recipe_of
from ..models.spec import MDMSpec
from ..schedulers.validation import is_number
from .files import fetch_file, inside, read_json, tensor_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT puts it before the names of the base model
NOTHING: tuple[object, ...] = ("none", None, False, [], {})
# Fields of an adapter's config that make it more than LoRA, and why it cannot be loaded then.
MORE_THAN_LORA = {
    "bias": "it trains biases of the base model",
    "modules_to_save": "it replaces whole layers of the base model, such as embeddings with rows for new tokens",
    "trainable_token_indices": "it replaces rows of the embeddings, for new tokens",
    "target_parameters": "it changes parameters that are no layers",
}
LORA_MATRIX = re.compile(r"\.lora_[AB]\.")
LARGEST_ALPHA = 1e6  # above it, float16 overflows for any weights
PLAIN_INIT = (True, False, None, "gaussian", "orthogonal")  # all others change the base's weights
MERGE = (
    "Merge it into its base with PEFT (PeftModel.from_pretrained(base, adapter).merge_and_unload()), save that, and "
    "load the folder as a model."
)


class AdapterFiles(NamedTuple):
    """An adapter that was read: PEFT's config, and the weights under the model's own names."""

    config: Any
    weights: dict[str, Tensor]


def read_adapter(
    path: str, subfolder: str, hub_kwargs: dict[str, Any], model: Any, spec: MDMSpec | None = None
) -> AdapterFiles:
    """The LoRA adapter of a folder or repository, fitted to the names of a model.

    Sizes are compared with the header of the file before any weight is read and any layer is made.

    Args:
        path, subfolder: folder or Hub id, and the folder in it, of adapter_config.json and adapter_model.safetensors.
        hub_kwargs: revision, cache_dir, token, local_files_only.
        model: transformers model that will take it.
        spec: its `MDMSpec`, whose recipe renames the layers of adapters that were made with the authors' code; or None.
    Raises:
        OSError: there are no safetensors weights.
        ValueError: the adapter is not LoRA, or more than LoRA; its weights do not fit the model or its config; or a
            weight is NaN or inf.
    """
    file = fetch_file(path, inside(subfolder, WEIGHTS), hub_kwargs)
    if file is None:
        raise OSError(f"The adapter of {path!r} has no {inside(subfolder, WEIGHTS)}.")
    config_dict = read_json(path, inside(subfolder, CONFIG), hub_kwargs) or {}
    check_kind(config_dict, path)
    shapes = tensor_shapes(file)
    if other := sorted(name for name in shapes if ".lora_" not in name):
        raise ValueError(
            f"The adapter of {path!r} holds {other[:3]}, which are not LoRA: "
            f"{MORE_THAN_LORA['modules_to_save']}. {MERGE}"
        )
    names = {name: native_names(name, spec) for name in shapes}
    check_fit(path, config_dict, {new: shapes[old] for old, news in names.items() for new in news}, model, spec)
    weights = load_file(file)
    if recipe_of(spec).fold_time:
        authors = {name: name.removeprefix(PREFIX) for name in names if names[name] != [name.removeprefix(PREFIX)]}
        weights |= {name: fold_lora(plain, weights[name], model) for name, plain in authors.items()}
    if whole := [key for key, value in weights.items() if not value.is_floating_point()]:
        raise ValueError(f"The adapter of {path!r} is not LoRA: {whole[0]} is {weights[whole[0]].dtype}, not a float.")
    if bad := non_finite(weights.items()):
        raise ValueError(f"A weight of the adapter of {path!r} holds NaN or inf: {bad}. Load another adapter.")
    fitted: dict[str, Tensor] = {}
    for old, news in names.items():
        parts = split_rows(weights[old], news, model) if len(news) > 1 else [weights[old]]
        fitted |= {PREFIX + new: part for new, part in zip(news, parts, strict=True)}
    renamed = any([module_of(new) for new in news] != [module_of(old)] for old, news in names.items())
    return AdapterFiles(peft_config(config_dict, names if renamed else None), fitted)


def check_kind(config_dict: dict[str, Any], path: str) -> None:
    """Raise a ValueError, with the reason, if an adapter's config is not LoRA. DoRA and rsLoRA count as LoRA."""
    kind = config_dict.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"The adapter of {path!r} is a {kind}; LoRA (and DoRA) adapters are supported.")
    for name, reason in MORE_THAN_LORA.items():
        if config_dict.get(name, "none") not in NOTHING:
            raise ValueError(f"The adapter of {path!r} has {name}={config_dict[name]!r}: {reason}. {MERGE}")
    init = config_dict.get("init_lora_weights", True)
    if init not in PLAIN_INIT:
        raise ValueError(
            f"The adapter of {path!r} has init_lora_weights={init!r}: its training changed the weights of the base. "
            "Save it as plain LoRA (PEFT: save_pretrained(path_initial_model_for_weight_conversion=...))."
        )


def module_of(name: str) -> str:
    """Name of the layer that a LoRA weight belongs to, without PEFT's prefix."""
    return name.removeprefix(PREFIX).split(".lora_")[0]


def native_names(name: str, spec: MDMSpec | None) -> list[str]:
    """Names that an adapter's weight has in a model; several if the authors' layer is cut into several layers here.

    Adapters made with the authors' own code have the layer names of that code (LLaDA: attn_out, ff_proj).
    """
    plain = name.removeprefix(PREFIX)
    recipe = recipe_of(spec)
    for pattern, replacement in (LAYER_NAMES if recipe.fold_time else recipe.key_mapping or {}).items():
        plain = re.sub(pattern, replacement, plain)
    module, _, rest = plain.partition(".lora_")
    for whole, parts in (recipe.split_weights or {}).items():
        end = whole.removesuffix(".weight")
        if module.endswith(end):
            start = module.removesuffix(end)
            return [f"{start}{part.removesuffix('.weight')}.lora_{rest}" for part in parts]
    if rest == "magnitude_vector":  # DoRA: PEFT saves the weight of this module under the module's own name
        rest = "magnitude_vector.weight"
    return [f"{module}.lora_{rest}"] if rest else [plain]


def split_rows(value: Tensor, names: list[str], model: Any) -> list[Tensor]:
    """The parts of a LoRA weight whose layer is cut by rows: B and magnitudes are cut too, and A is the same in all."""
    if ".lora_A." in names[0]:
        return [value.clone() for _ in names]
    layers = [layer_of(model, name) for name in names]
    return list(value.split([output_size(layer) for layer in layers if layer is not None]))


def layer_of(model: Any, name: str) -> nn.Module | None:
    """The layer of a model that a LoRA weight belongs to, below PEFT's wrapper; None if there is none."""
    try:
        layer = model.get_submodule(module_of(name))
    except AttributeError:
        return None
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def output_size(layer: Any) -> int:
    """Output features of a linear layer. transformers' Conv1D keeps its weight transposed."""
    return getattr(layer, "out_features", None) or layer.weight.shape[1]


def input_size(layer: Any) -> int:
    """Input features of a linear layer."""
    return getattr(layer, "in_features", None) or layer.weight.shape[0]


def check_fit(
    path: str, config_dict: dict[str, Any], shapes: dict[str, tuple[int, ...]], model: Any, spec: MDMSpec | None
) -> None:
    """Raise a ValueError if the weights in a file do not fit its config, or the layers of a model."""
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config_dict.get(name) or {}, dict):
            raise ValueError(
                f"The adapter of {path!r} has {name}={config_dict[name]!r:.80}, which must be a JSON object."
            )
    for alpha in (config_dict.get("lora_alpha", 8), *(config_dict.get("alpha_pattern") or {}).values()):
        if not is_number(alpha, -LARGEST_ALPHA, LARGEST_ALPHA):
            raise ValueError(
                f"The adapter of {path!r} has lora_alpha {alpha!r}, and what it adds would be NaN or inf. Load another "
                "adapter."
            )
    ranks = {config_dict.get("r"), *(config_dict.get("rank_pattern") or {}).values()}
    if not all(isinstance(r, int) and not isinstance(r, bool) and r > 0 for r in ranks):
        raise ValueError(
            f"The adapter of {path!r} has rank {config_dict.get('r')!r}; a rank is an integer of at least 1."
        )
    if flat := [name for name, shape in shapes.items() if LORA_MATRIX.search(name) and len(shape) < 2]:
        raise ValueError(
            f"The adapter of {path!r} is damaged: {flat[0]} is not a matrix, its shape is {shapes[flat[0]]}."
        )
    found = {shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    if found != ranks and shapes:
        raise ValueError(
            f"The adapter of {path!r} says rank {sorted(ranks)} in {CONFIG}, and its weights have {sorted(found)}."
        )
    wrong = []
    for name, shape in shapes.items():
        layer = layer_of(model, name)
        if layer is None:
            wrong.append(f"{name} (no such layer)")
        elif not isinstance(getattr(layer, "weight", None), Tensor):
            continue
        elif ".lora_A." in name and shape[1] != input_size(layer):
            wrong.append(f"{name} (takes {shape[1]} numbers, the layer {input_size(layer)})")
        elif ".lora_B." in name and not is_cut(name, spec) and shape[0] != output_size(layer):
            wrong.append(f"{name} (gives {shape[0]} numbers, the layer {output_size(layer)})")
    if wrong or not shapes:
        raise ValueError(
            f"The adapter of {path!r} does not fit {type(model).__name__}: {len(wrong)} weights have no place, "
            f"such as {wrong[:3]}."
        )


def is_cut(name: str, spec: MDMSpec | None) -> bool:
    """Does the weight `name` belong to a layer that `CheckpointRecipe.split_weights` cuts out of another layer?"""
    parts = [part.removesuffix(".weight") for names in (recipe_of(spec).split_weights or {}).values() for part in names]
    return module_of(name).endswith(tuple(parts)) if parts else False


def peft_config(config_dict: dict[str, Any], names: dict[str, list[str]] | None) -> Any:
    """PEFT's config from a JSON one.

    Args:
        config_dict: the content of adapter_config.json.
        names: name of a weight in the file -> its names in the model, by which layers are renamed; or None.
    Raises:
        ValueError: PEFT refuses the config.
    """
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    config_dict = dict(config_dict)
    mapped: dict[str, Any]
    if names is not None:
        layers = {module_of(old): sorted({module_of(new) for new in news}) for old, news in names.items()}
        config_dict["target_modules"] = sorted({new for news in layers.values() for new in news})
        config_dict |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        for field in ("rank_pattern", "alpha_pattern"):
            patterns, mapped = config_dict.get(field) or {}, {}
            for old, news in layers.items():
                key = get_pattern_key(list(patterns), old)
                mapped |= {new: patterns[key] for new in news if key in patterns}
            config_dict[field] = mapped
    try:
        config = LoraConfig.from_peft_type(**config_dict)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG} is not a LoRA config: {error}") from error
    config.inference_mode = True
    return config


def write_adapter(model: Any, name: str, folder: Path, base_model: str | None, base_revision: str | None) -> None:
    """Write one adapter of a model as PEFT does, whether it is active or not.

    Args:
        base_model, base_revision: written into its config; None for a base in the same folder.
    Raises:
        ValueError: the adapter is offloaded.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    weights = {PREFIX + key: value.detach().cpu().contiguous() for key, value in weights.items()}
    if lost := [key for key, value in weights.items() if value.is_meta]:
        raise ValueError(f"The adapter {name!r} is offloaded ({lost[0]}), so it cannot be saved. Load without offload.")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[name])
    config.base_model_name_or_path, config.revision, config.inference_mode = base_model, base_revision, True
    config.save_pretrained(folder)


def without_lora(model: Any) -> dict[str, Tensor]:
    """The state dict of a model without its adapters, under the names of a model without adapters.

    Fused adapters stay in the weights.
    """
    state = {}
    for key, value in model.state_dict().items():
        if not re.search(r"\.lora_", key):
            state[key.replace(".base_layer.", ".")] = value
    return state
