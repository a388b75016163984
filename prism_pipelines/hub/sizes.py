"""Compares the sizes in a checkpoint's config.json with its tensors, before memory is taken for them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from ..schedulers.validation import is_int
from .files import fetch_file, inside, read_json, tensor_shapes

COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks|h)\.(\d+)\.")
# A model may have more numbers than its files: packed weights (up to eight in one), or weights made when it is loaded.
PACKED, SPARE = 8, 2**20

Shapes = dict[str, tuple[int, ...]]


def weight_files(path: str, subfolder: str, hub_kwargs: dict[str, Any]) -> list[str]:
    """Local paths of a checkpoint's safetensors files.

    Raises:
        OSError: a part is missing.
        ValueError: the index of the parts is damaged.
    """
    index_name = inside(subfolder, "model.safetensors.index.json")
    index = read_json(path, index_name, hub_kwargs)
    names = ["model.safetensors"] if index is None else parts_of(index, f"{index_name} of {path!r}")
    files = {name: fetch_file(path, inside(subfolder, name), hub_kwargs) for name in names}
    if lost := [name for name, file in files.items() if file is None]:
        raise OSError(f"{path!r} lacks {inside(subfolder, lost[0])}, a part of its weights. Download it again.")
    return [file for file in files.values() if file is not None]


def parts_of(index: dict[str, Any], owner: str) -> list[str]:
    """Names of the files that the index of a checkpoint in parts lists.

    Raises:
        ValueError: it lists none, or something that is not the name of a file in the same folder.
    """
    names = index.get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names or any("/" in name or "\\" in name for name in names):
        raise ValueError(f"{owner} is damaged: its weight_map must give the file of each weight. Download it again.")
    return names


def file_shapes(files: list[str]) -> Shapes:
    """Shape of each tensor of some safetensors files, from their headers alone."""
    return {name: shape for file in files for name, shape in tensor_shapes(file).items()}


def model_config(
    make: Callable[[], Any],
    native: Any,
    config_dict: dict[str, Any],
    shapes: Shapes,
    owner: str,
    names: dict[str, str] | None = None,
) -> Any:
    """The config that `make()` builds from a config.json.

    Args:
        make: function without arguments.
        native: class of transformers that it is for.
        config_dict: the config.json.
        shapes: as `check_sizes`.
        owner: the checkpoint, for the errors.
        names: of fields in the config -> what config.json calls them, where it has other names.
    Raises:
        ValueError: transformers cannot build the config, or it has another number of layers than the files.
    """
    names = {**native.config_class.attribute_map, **(names or {})}
    # This check comes first: some configs make a list of their layers, which takes gigabytes if their number is wrong.
    check_layers(
        native,
        config_dict.get(names.get("num_hidden_layers", ""), config_dict.get("num_hidden_layers")),
        config_dict,
        shapes,
        owner,
    )
    try:
        config = make()
    except Exception as error:  # transformers raises a dozen classes, which depend on field and release
        raise wrong(owner, error) from error
    for name in COUNTS:
        value = getattr(config, name, None)
        if value is not None and not is_int(value, 1):
            name = names[name] if names.get(name) in config_dict else name
            raise ValueError(
                f"config.json of {owner!r} has {name}={value!r}, which must be an integer of at least 1. Look for the "
                "config.json that belongs to these weights."
            )
    return config


def check_layers(native: Any, layers: object, config_dict: dict[str, Any], shapes: Shapes, owner: str) -> None:
    """Raise a ValueError if a config has another number of layers than the files.

    With fewer, weights would be left out silently. A model with far more takes hours and gigabytes to make.
    """
    numbered = [int(found[1]) for name in shapes if (found := LAYER.search(name))]
    held = max(numbered, default=-1) + 1
    extra = config_dict.get("num_nextn_predict_layers")  # layers that predict several tokens at once; may be left out
    least = held - (extra if isinstance(extra, int) and is_int(extra, 0) else 0)
    if isinstance(layers, int) and is_int(layers, 1) and not least <= layers <= (held or len(shapes)):
        raise ValueError(
            f"The weights of {owner!r} do not fit {native.__name__}: its config.json says {layers} layers, and the "
            f"files hold {held}. Look for the config.json that belongs to them."
        )


def wrong(owner: str, error: Exception) -> ValueError:
    """The error for a config.json that transformers cannot build, with its message in one line."""
    return ValueError(f"config.json of {owner!r} has values that make no model: {' '.join(str(error).split())[:300]}")


def check_sizes(native: Any, config: Any, config_dict: dict[str, Any], shapes: Shapes, owner: str) -> None:
    """Raise a ValueError if the model of a config has other sizes than the tensors in the files.

    The model is built on the meta device, which takes no memory.

    Args:
        native: class of transformers.
        config: its config.
        config_dict: the config.json that it was built from.
        shapes: shape of each tensor in the files by its name; the names may be others than the model's.
        owner: the checkpoint, for the error.
    """
    check_layers(native, getattr(config, "num_hidden_layers", None), config_dict, shapes, owner)
    try:
        with torch.device("meta"):
            model = native(config)
    except Exception as error:  # as in `model_config`: a size of 0, or one that no tensor can have
        raise wrong(owner, error) from error
    needed = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
    held = sum(torch.Size(shape).numel() for shape in shapes.values())
    if needed > PACKED * held + SPARE:
        sizes = ", ".join(f"{name}={getattr(config, name)}" for name in COUNTS if hasattr(config, name))
        raise ValueError(
            f"config.json of {owner!r} describes a model of {needed:,} numbers ({sizes}), and its weight files hold "
            f"{held:,}. Look for the config.json that belongs to these weights."
        )
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    unlike = sorted(name for name, shape in shapes.items() if expected.get(name, shape) != shape)
    if unlike and not config_dict.get("quantization_config"):  # quantized weights are packed in shapes of their own
        name = unlike[0]
        raise ValueError(
            f"The weights of {owner!r} do not fit {native.__name__}: {name} is {shapes[name]}, and its config.json "
            f"says {expected[name]} ({len(unlike)} differ). Look for the config.json that belongs to them."
        )
