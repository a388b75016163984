"""Backbones out of folders and repositories of the Hub, and what is refused because it would not work."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from ..models.checks import check_rope
from ..models.convert_mdlm import load_mdlm
from ..models.families import FAMILIES, MDMSpec, as_spec, family_of, refuse_family, resolve_spec
from .adapter_files import CONFIG
from .files import absence, fetch_file, inside, out_of_reach, reachable, read_json
from .saved_model import load_adapters, note_origin, read_index
from .sizes import check_sizes, file_shapes, model_config, weight_files

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt")
UNSAFE_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def spec_of_index(index: dict, path: str) -> dict:
    """The `mdm_spec` that a saved `PrismPipeline` has in its model_index.json.

    Raises:
        ValueError: there is none: another pipeline of diffusers was saved there.
    """
    if "mdm_spec" not in index:
        raise ValueError(
            f"{path!r} holds a saved {index.get('_class_name', 'nothing')}, not a saved PrismPipeline. Load it by its "
            "own class, and go on with PrismPipeline.from_pipe; or name the folder of its model."
        )
    return index["mdm_spec"]


def load_plain(
    path: str,
    subfolder: str,
    dtype: torch.dtype,
    trust_remote_code: bool,
    hub_kwargs: dict,
    *,
    mdm_spec: MDMSpec | dict | None = None,
    mask_token_id: int | None = None,
    tokenizer=None,
    device_map=None,
    quantization_config=None,
    options: dict | None = None,
) -> dict:
    """Model, tokenizer (None if there is none) and `MDMSpec` dict of a plain transformers repository.

    Args:
        path: folder or Hub id; its weights are safetensors.
        subfolder: inside it, or "".
        dtype: of the model, a torch.dtype, its name, or "auto" for that of the checkpoint (an MDLM: float32).
        trust_remote_code: run model code of the repository where no native class serves.
        hub_kwargs: revision, cache_dir, token, local_files_only.
        mdm_spec, mask_token_id: as `resolve_spec`.
        tokenizer: to be used in place of the repository's; None to load that.
        device_map, quantization_config: as transformers' `from_pretrained`.
        options: attn_implementation, max_memory, offload_folder of transformers' `from_pretrained`; None as if absent.
    Returns:
        dict with "model", "tokenizer" and "mdm_spec".
    Raises:
        OSError: not found, or no safetensors weights.
        ValueError: the family or its mask token is not known, remote code is needed, or weights are missing.
    """
    config_dict = read_json(path, inside(subfolder, "config.json"), hub_kwargs)
    if config_dict is None:
        given = {
            "mdm_spec": mdm_spec,
            "mask_token_id": mask_token_id,
            "tokenizer": tokenizer,
            "device_map": device_map,
            "quantization_config": quantization_config,
            "options": options,
        }
        return load_adapted(path, subfolder, hub_kwargs, (dtype, trust_remote_code), given)
    refuse_pickles(path, subfolder, hub_kwargs)
    if not mdm_spec:
        refuse_family(config_dict.get("model_type"), path)
    refuse_variants(path, config_dict, None if mdm_spec else family_of(SimpleNamespace(**config_dict), path))
    if dtype != "auto":
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f'`torch_dtype` must be a floating-point dtype, its name, or "auto", got {dtype!r}.')
    if tokenizer is None:
        tokenizer = load_tokenizer(path, subfolder, config_dict, trust_remote_code, hub_kwargs)
    row = as_spec(mdm_spec) or family_of(SimpleNamespace(**config_dict), path)
    if row is not None and row.vocab_key:
        rows = (rows_of(key, path, subfolder, hub_kwargs) for key in (row.vocab_key, "lm_head.weight"))
        config_dict["vocab_size"] = next(filter(None, rows), config_dict["vocab_size"])
    spec = resolve_spec(
        SimpleNamespace(**config_dict), tokenizer, mdm_spec=mdm_spec, mask_token_id=mask_token_id, name=path
    )
    placement = {"device_map": device_map, "quantization_config": quantization_config, **(options or {})}
    placement = {name: value for name, value in placement.items() if value is not None}
    refuse_attention(placement.get("attn_implementation"), spec)
    model = load_backbone(path, subfolder, config_dict, spec, dtype, trust_remote_code, hub_kwargs, placement)
    index = read_index(path, subfolder, hub_kwargs)
    if index is not None:
        load_adapters(model, path, subfolder, hub_kwargs, index, spec)
    elif not subfolder or (subfolder == "model" and read_json(path, "model_index.json", hub_kwargs) is not None):
        commit = None if Path(path).is_dir() else getattr(model.config, "_commit_hash", None)
        note_origin(model, path, commit or hub_kwargs.get("revision"))
    return {"model": model, "tokenizer": tokenizer, "mdm_spec": spec.to_dict()}


def load_adapted(path: str, subfolder: str, hub_kwargs: dict, how: tuple, given: dict) -> dict:
    """`load_plain` of a folder that holds adapters alone: their base model, with them in it.

    So a pipeline with adapters is saved (see `saved_model.py`); one of PEFT itself is called "prism".

    Args:
        path, subfolder, where: as `load_plain`.
        how: (dtype, trust_remote_code) of `load_plain`, and `given` its other arguments by name.
    Raises:
        OSError: no adapter either, or its base is not found.
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
    revision = adapter.get("revision") if adapter else index.get("base_revision")
    base_where = reachable(base, hub_kwargs | {"revision": revision})
    saved_pipeline = read_json(base, "model_index.json", base_where) is not None
    loaded = load_plain(
        base,
        "model" if saved_pipeline else "",
        *how,
        base_where,
        **given,
    )
    in_pipeline = inside("tokenizer", TOKENIZER_FILES[0])
    if saved_pipeline and loaded["tokenizer"] is None and fetch_file(base, in_pipeline, base_where):
        loaded["tokenizer"] = AutoTokenizer.from_pretrained(base, subfolder="tokenizer", **base_where)
    load_adapters(loaded["model"], path, subfolder, hub_kwargs, index, as_spec(loaded["mdm_spec"]))
    return loaded


def load_tokenizer(path: str, subfolder: str, config_dict: dict, trust_remote_code: bool, hub_kwargs: dict):
    """The tokenizer of a repository, by a class of transformers where its family has one; None if it has none.

    A family may name another repository that has it; if that is out of reach there is none, with a warning.
    """
    row = family_of(SimpleNamespace(**config_dict), path)
    if not any(fetch_file(path, inside(subfolder, name), hub_kwargs) for name in TOKENIZER_FILES):
        if row is None or row.tokenizer_repo is None:
            return None
        try:
            elsewhere = hub_kwargs | {"revision": None}
            if Path(path).is_dir():  # loading a folder downloads nothing
                elsewhere["local_files_only"] = True
            return AutoTokenizer.from_pretrained(row.tokenizer_repo, **elsewhere)
        except OSError:
            warnings.warn(
                f"{path!r} has no tokenizer, and that of {row.tokenizer_repo!r} cannot be had: ids go in and come out. "
                "Pass tokenizer= for text.",
                stacklevel=4,
            )
            return None
    if row is not None and row.tokenizer_class and not trust_remote_code:
        return getattr(transformers, row.tokenizer_class).from_pretrained(path, subfolder=subfolder, **hub_kwargs)
    options = {"subfolder": subfolder, "trust_remote_code": trust_remote_code, **hub_kwargs}
    if config_dict.get("model_type") not in transformers.CONFIG_MAPPING and not trust_remote_code:
        # transformers would read it just so, and warn of a model of another type, which no tokenizer cares for.
        options["config"] = transformers.PreTrainedConfig.from_dict(config_dict | {"_name_or_path": path})
    return AutoTokenizer.from_pretrained(path, **options)


def load_backbone(
    path: str,
    subfolder: str,
    config_dict: dict,
    spec: MDMSpec,
    dtype: torch.dtype,
    trust_remote_code: bool,
    hub_kwargs: dict,
    placement: dict,
):
    """The model of a checkpoint, by the native class of its spec, else by the class that its config names.

    Args:
        config_dict: the checkpoint's config.json.
        placement: device_map, quantization_config and the like, for transformers' `from_pretrained`.
        others: as `load_plain`.
    Raises:
        OSError: not found, or no safetensors weights.
        ValueError: weights are missing or left over; remote code is needed and not allowed.
    """
    if not spec.tested:
        warnings.warn(
            f"{path!r}: no test compares this family ({config_dict.get('model_type')}) with a reference. Run "
            "`prism info` on it first, and compare its output with the authors' own.",
            stacklevel=2,
        )
    options = {"subfolder": subfolder, "dtype": dtype, "use_safetensors": True, **hub_kwargs, **placement}
    if spec.native_class is None:
        model = remote_class(config_dict, path, trust_remote_code).from_pretrained(
            path, trust_remote_code=trust_remote_code, **options
        )
        check_rope(model, path)
        return model
    native = getattr(transformers, spec.native_class, None)
    if getattr(native, "config_class", None) is None:
        raise ValueError(f"`native_class` {spec.native_class!r} is no model class of transformers, with a config.")
    if spec.config_mapping and config_dict.get("quantization_config"):
        raise ValueError(
            f"The weights of {path!r} are quantized under the names of its own code, which are not those of "
            f"{spec.native_class}. Load the unquantized checkpoint, and pass quantization_config= to quantize it here."
        )
    files = weight_files(path, subfolder, hub_kwargs)
    shapes = file_shapes(files)
    config = model_config(
        lambda: native_config(native, config_dict, spec), native, config_dict, shapes, path, spec.config_mapping
    )
    config.name_or_path = path
    if spec.fold_time:
        config.intermediate_size = 4 * config.hidden_size  # MDLM's config has no word for it
    check_sizes(native, config, config_dict, shapes, path)
    if spec.fold_time:
        if placement:
            names = ", ".join(f"`{name}`" for name in placement)
            raise ValueError(f"{names} is not supported for MDLM (170M parameters); use pipe.to().")
        try:
            return load_mdlm(files, config, torch.float32 if dtype == "auto" else dtype)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"The weights of {path!r} do not fit the MDLM of its config.json: {error}") from error
    options |= {"config": config, "key_mapping": spec.key_mapping, "output_loading_info": True}
    reader = with_split_weights(native, spec.split_weights) if spec.split_weights else native
    try:
        model, info = reader.from_pretrained(path, ignore_mismatched_sizes=True, **options)  # refused below, by name
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):  # cut in parts (`split_weights`) that do not add up
            raise
        raise ValueError(
            f"The weights of {path!r} do not fit {spec.native_class}, with the sizes that its config.json says."
        ) from error
    model.__class__ = native
    wrong = {name: sorted(info[name])[:3] for name in ("missing_keys", "mismatched_keys") if info[name]}
    if wrong:
        raise ValueError(f"The weights of {path!r} do not fit {spec.native_class}: {wrong}.")
    warn_of_leftovers(path, spec, info["unexpected_keys"])
    if config_dict.get("model_type") != native.config_class.model_type or spec.vocab_key:
        model.get_adapter_state_dict = functools.partial(adapter_weights, model)
    if spec.key_mapping:
        # transformers would rename the weights back when it saves them; ours are read again as the native class.
        ours = {*spec.key_mapping, *(spec.split_weights or ())}
        kept = [rule for rule in model._weight_conversions if not ours.intersection(rule.source_patterns)]
        model._weight_conversions = kept
    check_rope(model, path)
    return model


def refuse_attention(attn_implementation: str | None, spec: MDMSpec) -> None:
    """Raise a ValueError for kernels that read no additive mask: flash attention would see the tokens before only."""
    if attn_implementation not in (None, "sdpa", "eager") and spec.mask_format == "additive":
        raise ValueError(
            f"`attn_implementation` is {attn_implementation!r}, which takes no additive mask, and this model needs one "
            'to see in both directions. Use "sdpa" (it runs flash kernels where all tokens are seen) or "eager".'
        )


def with_split_weights(native, split_weights: dict[str, list[str]]):
    """The native class under a name of its own, for which transformers cuts weights as `MDMSpec.split_weights` says.

    Raises:
        ImportError: this transformers cannot cut a weight into unequal parts.
    """
    try:
        from transformers.core_model_loading import Split
    except ImportError as error:
        raise ImportError(
            f"{native.__name__} is loaded from weights that were saved as one, and transformers "
            f"{transformers.__version__} cannot cut them. Install a newer one (5.23 is tested)."
        ) from error
    name = f"Split{native.__name__}"
    rules = get_checkpoint_conversion_mapping(native.config_class.model_type) or []
    rules += [WeightConverter(whole, parts, [Split(dim=0)]) for whole, parts in split_weights.items()]
    register_checkpoint_conversion_mapping(name, rules, overwrite=True)
    return type(name, (native,), {"__module__": __name__})


def warn_of_leftovers(path: str, spec: MDMSpec, names) -> None:
    """Warn if a checkpoint has weights that its native class has no place for; encoders lose their pooler as usual."""
    left = sorted(name for name in names if not name.endswith(("inv_freq", "attn.bias")))  # buffers of old releases
    if left and spec.mask_format == "additive":
        warnings.warn(
            f"{len(left)} weights of {path!r} are not used by {spec.native_class}, such as {left[:3]}: it may be "
            "another architecture. Run `prism info` on it, and compare its output with the authors' own.",
            stacklevel=4,
        )


def adapter_weights(model, adapter_name: str | None = None, state_dict: dict | None = None) -> dict:
    """As transformers' `get_adapter_state_dict`, which reads the base's config as a native one to compare vocabularies.

    That config is not a native one here, so reading it fails, or finds another vocabulary and saves the embeddings too.
    """
    from peft import get_peft_model_state_dict

    name = adapter_name or model.active_adapters()[0]
    return get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=name, save_embedding_layers=False)


def native_config(native, config_dict: dict, spec: MDMSpec):
    """Config of the native class from the checkpoint's own, see `MDMSpec.config_mapping`."""
    if config_dict.get("model_type") == native.config_class.model_type:
        return native.config_class.from_dict(config_dict)
    skipped = ("model_type", "auto_map", "architectures", "transformers_version")
    alias, sizes = native.config_class.attribute_map, ("hidden_size", "num_hidden_layers", "vocab_size")
    missing = [name for name in sizes if name not in config_dict and alias.get(name) not in config_dict]
    if missing and not spec.config_mapping:  # the native defaults are billions of parameters
        raise ValueError(
            f"{spec.native_class} needs {missing}, which the config of this {config_dict.get('model_type')!r} lacks. "
            "Say what they are called there in MDMSpec(config_mapping=...)."
        )
    mapping = spec.config_mapping or {name: name for name in config_dict if name not in skipped}
    values = {ours: config_dict[theirs] for ours, theirs in mapping.items() if theirs in config_dict}
    # A field that is absent or null may be there under the native name (LLaDA: embedding_size, else vocab_size).
    values |= {
        ours: config_dict[ours] for ours in mapping if values.get(ours) is None and config_dict.get(ours) is not None
    }
    if spec.config_mapping:  # the native defaults are ids of another tokenizer (GPT-NeoX ends a text with id 2)
        values = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | values
    return native.config_class(**values, **(spec.config_values or {}))


def remote_class(config_dict: dict, path: str, trust_remote_code: bool):
    """The Auto class that loads a checkpoint without a native route.

    Raises:
        ValueError: it needs code of its own, which is not allowed; or it is not a masked language model.
    """
    for name in ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel"):
        if name in config_dict.get("auto_map", {}):
            if not trust_remote_code:
                raise ValueError(
                    f"{path!r} is loaded by code of its own repository (model_type {config_dict.get('model_type')!r}), "
                    "and no class of transformers serves. Read that code, then pass trust_remote_code=True."
                )
            return getattr(transformers, name)
    if (
        AutoConfig.for_model(config_dict.get("model_type")).__class__
        not in transformers.AutoModelForMaskedLM._model_mapping
    ):
        raise ValueError(
            f"{path!r} (model_type {config_dict.get('model_type')!r}) is no masked language model of transformers. "
            "If it is a masked diffusion model of a causal class, pass "
            'mdm_spec=MDMSpec(..., native_class="...ForCausalLM", mask_format="additive").'
        )
    return transformers.AutoModelForMaskedLM


def refuse_pickles(path: str, subfolder: str, hub_kwargs: dict) -> None:
    """Raise an OSError if the only weights are pickles, which run code when they are loaded."""
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
    lacks = (
        ""
        if any(fetch_file(path, inside(subfolder, name), hub_kwargs) for name in TOKENIZER_FILES)
        else (" It has no tokenizer either: add --vocab FILE or --tokenizer REPO.")
    )
    raise OSError(
        f"{missing}: only {found[0]}, a pickle, which can run code when loaded. Convert it: {command}.{lacks}"
    )


_LLADA2 = {
    "norm_head": (False,),
    "use_bias": (False,),
    "expert_capacity": (None,),  # LLaDA2.2 chooses experts for a block of tokens at once, the native class for each
}
# What a config of a key-mapped family must say, if it says anything: its native class does nothing else.
HARDCODED_CONFIG = {
    "llada": {
        "block_type": ("llama",),
        "layer_norm_type": ("rms",),
        "activation_type": ("silu",),
        "rope": (True,),
        "alibi": (False,),
        "attention_layer_norm": (False,),
        "input_emb_norm": (False,),
        "scale_logits": (False,),
    },
    "llada:moe": {
        "clip_qkv": (None,),
        "qk_layernorm": (True,),
        "partial_rotary_factor": (1,),
        "shared_expert_intermediate_size": (None,),
        "moe_router_enable_expert_bias": (False, None),
    },
    "illada": {
        "layer_norm_eps": (None,),  # it would have other norms
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
    },
    "llada2_moe": _LLADA2,
    "llada2_moe:llada2.2": _LLADA2,
    "Dream": {"block_size": (None,)},  # DreamReasoner shares its model_type: a copy under another name is one of these
    "mdlm": {"time_conditioning": (False, None)},
    "bd3lm": {"time_conditioning": (False, None), "causal": (False, None)},
}


def refuse_variants(path: str, config_dict: dict, row: MDMSpec | None) -> None:
    """Raise a ValueError for a checkpoint that shares the config of a family and is something else.

    Args:
        path: named in the error.
        config_dict: its config.json.
        row: of `FAMILIES`, as `family_of` finds it; None if the caller passes a spec of their own.
    """
    wrong = None
    key = next((key for key, known in FAMILIES.items() if known is row), None)
    for name, allowed in HARDCODED_CONFIG.get(key, {}).items():
        if name in config_dict and config_dict[name] not in allowed:
            wrong = (
                f"{name} {config_dict[name]!r}; {key!r} runs with {' or '.join(map(repr, allowed))}. Or pass `mdm_spec`"
            )
    if config_dict.get("dplm_type", "dplm_esm") != "dplm_esm":
        wrong = (
            f"dplm_type {config_dict['dplm_type']!r}: two modalities with a mask token each; "
            "only DPLM (dplm_esm) is supported"
        )
    if wrong:
        raise ValueError(f"{path!r} is no masked diffusion model that can be run here. Its config says {wrong}.")


def rows_of(key: str, path: str, subfolder: str, hub_kwargs: dict) -> int | None:
    """Rows of a weight of a safetensors checkpoint, read from its header; None if there is no such weight."""
    shape = file_shapes(weight_files(path, subfolder, hub_kwargs)).get(key)
    return shape[0] if shape else None
