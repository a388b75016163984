"""Loads model, tokenizer and `MDMSpec` from a folder or the Hub, and refuses checkpoints that would not work."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from ..models.families import FAMILIES, as_spec, family_of, recipe_of, refuse_family, resolve_spec
from ..models.spec import CheckpointRecipe, MDMSpec
from .adapter_files import CONFIG
from .files import absence, fetch_file, inside, out_of_reach, reachable, read_json
from .loaders import Checkpoint, load_backbone
from .saved_model import load_adapters, note_origin, read_index
from .sizes import file_shapes, weight_files

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt")
UNSAFE_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def spec_of_index(index: dict[str, Any], path: str) -> dict[str, Any]:
    """The `mdm_spec` in the model_index.json of a saved `PrismPipeline`.

    Raises:
        ValueError: it is missing, so another pipeline of diffusers was saved there.
    """
    if "mdm_spec" not in index:
        raise ValueError(
            f"{path!r} holds a saved {index.get('_class_name', 'nothing')}, not a saved PrismPipeline. Load it by its "
            "own class, then call PrismPipeline.from_pipe; or pass the folder of its model."
        )
    return index["mdm_spec"]


def load_plain(
    path: str,
    subfolder: str,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    hub_kwargs: dict[str, Any],
    *,
    mdm_spec: MDMSpec | Mapping[str, Any] | None = None,
    mask_token_id: int | None = None,
    tokenizer: Any = None,
    device_map: Any = None,
    quantization_config: Any = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Model, tokenizer (None if there is none) and `MDMSpec` dict of a plain transformers repository.

    Args:
        path: folder or Hub id; its weights are safetensors.
        subfolder: inside it, or "".
        dtype: of the model, a torch.dtype or its name; "auto" for the dtype of the checkpoint (of an MDLM, float32).
        trust_remote_code: run model code of the repository where there is no native class.
        hub_kwargs: revision, cache_dir, token, local_files_only.
        mdm_spec, mask_token_id: as `resolve_spec`.
        tokenizer: used instead of the repository's tokenizer; None loads that.
        device_map, quantization_config: as in transformers' `from_pretrained`.
        options: attn_implementation, max_memory, offload_folder of transformers' `from_pretrained`. None is the same as
            absent.
    Returns:
        dict with "model", "tokenizer" and "mdm_spec".
    Raises:
        OSError: not found, or no safetensors weights.
        ValueError: the family or its mask token is not known, remote code is needed, or weights are missing.
    """
    placement = {"device_map": device_map, "quantization_config": quantization_config, **(options or {})}
    given = {"mdm_spec": as_spec(mdm_spec), "mask_token_id": mask_token_id, "tokenizer": tokenizer}
    placement = {name: value for name, value in placement.items() if value is not None}
    config_dict = read_json(path, inside(subfolder, "config.json"), hub_kwargs)
    if config_dict is None:
        return load_adapted(path, subfolder, hub_kwargs, dtype, trust_remote_code, given, placement)
    return load_whole(Checkpoint(path, subfolder, config_dict, hub_kwargs), dtype, trust_remote_code, given, placement)


def load_whole(
    checkpoint: Checkpoint,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    given: dict[str, Any],
    placement: dict[str, Any],
) -> dict[str, Any]:
    """`load_plain` of a checkpoint with weights.

    Args:
        dtype, trust_remote_code: as `load_plain`.
        given: "mdm_spec" (`MDMSpec` or None), "mask_token_id" and "tokenizer" of the caller.
        placement: as `load_backbone`.
    """
    path, subfolder, config_dict, hub_kwargs = checkpoint
    refuse_pickles(path, subfolder, hub_kwargs)
    named, row = given["mdm_spec"], family_of(SimpleNamespace(**config_dict), path)
    if named is None:
        refuse_family(config_dict.get("model_type"), path)
        refuse_variants(path, config_dict, row)
    dtype = as_dtype(dtype)
    tokenizer = given["tokenizer"]
    if tokenizer is None:
        tokenizer = load_tokenizer(path, subfolder, config_dict, trust_remote_code, hub_kwargs)
    recipe = recipe_for(named, row, config_dict)
    if recipe.vocab_key:
        rows = (rows_of(key, path, subfolder, hub_kwargs) for key in (recipe.vocab_key, "lm_head.weight"))
        config_dict["vocab_size"] = next(filter(None, rows), config_dict["vocab_size"])
    config = SimpleNamespace(**config_dict)
    mask_field = (recipe.config_mapping or {}).get("mask_token_id")
    if mask_field in config_dict:
        config.mask_token_id = config_dict[mask_field]
    spec = resolve_spec(config, tokenizer, mdm_spec=named, mask_token_id=given["mask_token_id"], name=path)
    refuse_attention(placement.get("attn_implementation"), spec)
    model = load_backbone(checkpoint, recipe, spec, dtype, trust_remote_code, placement)
    index = read_index(path, subfolder, hub_kwargs)
    if index is not None:
        load_adapters(model, path, subfolder, hub_kwargs, index, spec)
    elif subfolder == "model" and read_json(path, "model_index.json", hub_kwargs) is not None:
        note_origin(model, path, revision_of(model, checkpoint))
    elif not subfolder and recipe == recipe_for(named and dataclasses.replace(named, recipe=None), row, config_dict):
        # The base is named only if it can be loaded again by its path, without the caller's recipe.
        note_origin(model, path, revision_of(model, checkpoint))
    return {"model": model, "tokenizer": tokenizer, "mdm_spec": spec.to_dict()}


def recipe_for(named: MDMSpec | None, row: MDMSpec | None, config_dict: dict[str, Any]) -> CheckpointRecipe:
    """The recipe of a checkpoint: from its caller, else from its family, else by the class that its config names.

    Args:
        named: spec of the caller or of a saved pipeline, or None.
        row: of the checkpoint in `FAMILIES`, or None.
        config_dict: config.json of the checkpoint.
    """
    if named is not None and (named.recipe is not None or named.family in FAMILIES):
        return recipe_of(named)
    if row is not None:
        return recipe_of(row)
    architecture = str(next(iter(config_dict.get("architectures") or ()), None))
    known = architecture.endswith(("ForMaskedLM", "ForCausalLM", "LMHeadModel")) and hasattr(transformers, architecture)
    if named is not None and known and not config_dict.get("auto_map"):
        return CheckpointRecipe(architecture)
    return CheckpointRecipe()


def revision_of(model: Any, checkpoint: Checkpoint) -> str | None:
    """The commit that a model of the Hub was loaded from, or else the revision that was asked for; None for folders."""
    commit = None if Path(checkpoint.path).is_dir() else getattr(model.config, "_commit_hash", None)
    return commit or checkpoint.hub_kwargs.get("revision")


def as_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A floating-point torch.dtype, from the dtype or its name; "auto" stays "auto".

    Raises:
        ValueError: not a floating-point dtype.
    """
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f'`torch_dtype` must be a floating-point dtype, its name, or "auto", got {dtype!r}.')
    return found


def load_adapted(
    path: str,
    subfolder: str,
    hub_kwargs: dict[str, Any],
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    given: dict[str, Any],
    placement: dict[str, Any],
) -> dict[str, Any]:
    """`load_plain` for a folder that holds only adapters: loads their base model, and the adapters into that.

    `saved_model.py` saves a pipeline with adapters in this form. An adapter that PEFT saved is called "prism" here.

    Args:
        path, subfolder, hub_kwargs, dtype, trust_remote_code: as `load_plain`.
        given, placement: as `load_whole`.
    Raises:
        OSError: there is no adapter either, or its base is not found.
        ValueError: the adapter names no base model.
    """
    adapter, index = read_json(path, inside(subfolder, CONFIG), hub_kwargs), read_index(path, subfolder, hub_kwargs)
    base = (adapter or {}).get("base_model_name_or_path") or (index or {}).get("base_model")
    if adapter is None and base is None:
        name = inside(subfolder, "config.json")
        what = "" if out_of_reach(path, name, hub_kwargs) else ": not a transformers model, nor a pipeline"
        raise OSError(f"{absence(path, name, hub_kwargs)}{what}.")
    if not isinstance(base, str) or base == path:
        raise ValueError(
            f"The adapter of {path!r} names the base model {base!r}. Load its base, and the adapter into it."
        )
    revision = adapter.get("revision") if adapter else (index or {}).get("base_revision")
    base_kwargs = reachable(base, hub_kwargs | {"revision": revision})
    saved_pipeline = read_json(base, "model_index.json", base_kwargs) is not None
    options = dict(placement)
    loaded = load_plain(
        base,
        "model" if saved_pipeline else "",
        dtype,
        trust_remote_code,
        base_kwargs,
        **given,
        device_map=options.pop("device_map", None),
        quantization_config=options.pop("quantization_config", None),
        options=options,
    )
    in_pipeline = inside("tokenizer", TOKENIZER_FILES[0])
    if saved_pipeline and loaded["tokenizer"] is None and fetch_file(base, in_pipeline, base_kwargs):
        loaded["tokenizer"] = AutoTokenizer.from_pretrained(base, subfolder="tokenizer", **base_kwargs)
    load_adapters(loaded["model"], path, subfolder, hub_kwargs, index, as_spec(loaded["mdm_spec"]))
    return loaded


def load_tokenizer(
    path: str, subfolder: str, config_dict: dict[str, Any], trust_remote_code: bool, hub_kwargs: dict[str, Any]
) -> Any:
    """The tokenizer of a repository, by a class of transformers if its family has one. None without a tokenizer.

    A family may name another repository that has the tokenizer. If that cannot be reached, the result is None.

    Warns:
        UserWarning: that other repository cannot be reached.
    """
    recipe = recipe_of(family_of(SimpleNamespace(**config_dict), path))
    if not any(fetch_file(path, inside(subfolder, name), hub_kwargs) for name in TOKENIZER_FILES):
        if recipe.tokenizer_repo is None:
            return None
        try:
            elsewhere = hub_kwargs | {"revision": None}
            if Path(path).is_dir():  # loading a folder downloads nothing
                elsewhere["local_files_only"] = True
            return AutoTokenizer.from_pretrained(recipe.tokenizer_repo, **elsewhere)
        except OSError:
            warnings.warn(
                f"{path!r} has no tokenizer, and the one of {recipe.tokenizer_repo!r} cannot be downloaded: the "
                "pipeline takes and gives ids only. Pass tokenizer= for text.",
                stacklevel=5,
            )
            return None
    if recipe.tokenizer_class and not trust_remote_code:
        return getattr(transformers, recipe.tokenizer_class).from_pretrained(path, subfolder=subfolder, **hub_kwargs)
    options = {"subfolder": subfolder, "trust_remote_code": trust_remote_code, **hub_kwargs}
    if config_dict.get("model_type") not in transformers.CONFIG_MAPPING and not trust_remote_code:
        # Without this, transformers warns of the unknown model type, which a tokenizer does not need.
        options["config"] = transformers.PreTrainedConfig.from_dict(config_dict | {"_name_or_path": path})
    return AutoTokenizer.from_pretrained(path, **options)


# --- refused ----------------------------------------------------------------------------------------------------------


def refuse_attention(attn_implementation: str | None, spec: MDMSpec) -> None:
    """Raise a ValueError for attention kernels that read no additive mask: with flash attention it would be causal."""
    if attn_implementation not in (None, "sdpa", "eager") and spec.mask_format == "additive":
        raise ValueError(
            f"`attn_implementation` is {attn_implementation!r}, which takes no additive mask, and this model needs one "
            'to see in both directions. Use "sdpa" (it runs flash kernels where all tokens are seen) or "eager".'
        )


def refuse_pickles(path: str, subfolder: str, hub_kwargs: dict[str, Any]) -> None:
    """Raise an OSError if the only weights are pickles, which can run code when they are loaded."""
    safe = ("model.safetensors.index.json", "model.safetensors")
    if any(fetch_file(path, inside(subfolder, name), hub_kwargs) for name in safe):
        return
    if out_of_reach(path, inside(subfolder, safe[1]), hub_kwargs):
        raise OSError(f"{absence(path, inside(subfolder, safe[1]), hub_kwargs)}.")
    found = [name for name in UNSAFE_WEIGHTS if fetch_file(path, inside(subfolder, name), hub_kwargs, download=False)]
    missing = f"{inside(subfolder, 'model.safetensors')} is missing in {path!r}"
    if not found:
        raise OSError(f"{missing}, and so is {UNSAFE_WEIGHTS[0]}: there are no weights.")
    command = f"prism convert {path} DST" + (f" --subfolder {subfolder}" if subfolder else "")
    has_tokenizer = any(fetch_file(path, inside(subfolder, name), hub_kwargs) for name in TOKENIZER_FILES)
    lacks = "" if has_tokenizer else " It has no tokenizer either: add --vocab FILE or --tokenizer REPO."
    raise OSError(
        f"{missing}: only {found[0]}, a pickle, which can run code when loaded. Convert it: {command}.{lacks}"
    )


def refuse_variants(path: str, config_dict: dict[str, Any], row: MDMSpec | None) -> None:
    """Raise a ValueError if a config has a value that its family cannot run, see `CheckpointRecipe.hardcoded_config`.

    Args:
        path: named in the error.
        config_dict: its config.json.
        row: of the checkpoint in `FAMILIES`, or None.
    """
    for name, allowed in (recipe_of(row).hardcoded_config or {}).items():
        if name in config_dict and config_dict[name] not in allowed:
            raise ValueError(
                f"{path!r} is not a masked diffusion model that this package can run. Its config says {name} "
                f"{config_dict[name]!r}; the family {row and row.family!r} runs with "
                f"{' or '.join(map(repr, allowed))}. Or pass `mdm_spec`."
            )


def rows_of(key: str, path: str, subfolder: str, hub_kwargs: dict[str, Any]) -> int | None:
    """Rows of a weight of a safetensors checkpoint, read from its header; None if there is no such weight."""
    shape = file_shapes(weight_files(path, subfolder, hub_kwargs)).get(key)
    return shape[0] if shape else None
