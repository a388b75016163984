"""Fingerprints of models: is a model the one that a head or an adapter was made for? They do not prevent forgery.

`embedding_fingerprint` distinguishes models of one architecture, and LoRA training keeps it. `weights_fingerprint`
changes with any training. `portable_fingerprint` is the same, or None if another machine might find another one.
`signs_fingerprint` replaces both in float16. `module_digest` compares a module with itself on one machine.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 1024  # how many numbers of each weight are read, about


def digest(*parts: bytes) -> str:
    """16 hexadecimal digits of a hash."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def tensor_bytes(value: Tensor) -> bytes:
    """The bytes of a tensor. Floating-point numbers become bfloat16, so that float32 and bfloat16 give the same."""
    value = value.detach()
    value = value.to("cpu", torch.bfloat16) if value.is_floating_point() else value.cpu()
    return value.contiguous().view(torch.uint8).numpy().tobytes()


def is_comparable(weight: Tensor) -> bool:
    """Does a weight have the same fingerprint on every machine? Not if it is float16, quantized or offloaded."""
    return weight.dtype in (torch.float32, torch.bfloat16) and not weight.is_meta


def embedding_fingerprint(model: Any) -> str | None:
    """Hash of the first 64 rows of the token embeddings, the same in float32 and bfloat16; None in other dtypes.

    LoRA does not change this hash. Full training may leave it unchanged too.
    """
    weight = model.get_input_embeddings().weight
    return digest(tensor_bytes(weight[:64])) if is_comparable(weight) else None


def sampled(value: Tensor) -> Tensor:
    """`SAMPLE` numbers of a weight, evenly spaced."""
    numbers = value.detach().reshape(-1)
    # An odd distance: with an even one, all numbers read from a matrix could lie in one column.
    return numbers[:: max(1, numbers.numel() // SAMPLE) | 1]


def weights_fingerprint(model: nn.Module) -> str:
    """Hash over all weights of a model without its adapters: their shapes, and a sample of the numbers of each.

    About `SAMPLE` numbers of each weight are read, evenly spaced, so the cost hardly grows with the model. A change of
    a few numbers may not be noticed. Names do not count, because they differ between releases of transformers. Weights
    count as they are, with fused adapters in them.
    """
    marks = []
    for name, value in model.named_parameters():  # a weight that is used twice comes once
        if ".lora_" not in name:
            numbers = b"" if value.is_meta else tensor_bytes(sampled(value))
            marks.append(digest(repr(tuple(value.shape)).encode(), numbers))
    return digest("".join(sorted(marks)).encode())


def portable_fingerprint(model: nn.Module) -> str | None:
    """`weights_fingerprint` if it is the same on every machine, else None.

    It is None in float16 and for quantized or offloaded weights. It is None for MDLM too: its weights are computed
    when the model is loaded, with rounding that depends on the machine.
    """
    comparable = all(is_comparable(value) for value in model.parameters())
    return weights_fingerprint(model) if comparable and has_own_weights(model) else None


def has_own_weights(model: nn.Module) -> bool:
    """Are the weights those of a checkpoint, neither quantized nor computed when the model was loaded?"""
    return getattr(model, "hf_quantizer", None) is None and not getattr(model, "_computed_weights", False)


def signs_fingerprint(model: Any) -> str | None:
    """Two hashes over the signs of weights, as "first-second": the same in float32, bfloat16 and float16.

    The first hash reads the first 64 rows of the token embeddings. The second reads the numbers of all weights that
    `weights_fingerprint` reads. It is missing ("first-") if any weight is quantized, offloaded or computed. The result
    is None if the embeddings are quantized or offloaded.
    """
    embeddings = model.get_input_embeddings().weight
    if not has_signs(embeddings):
        return None
    weights = [value for name, value in model.named_parameters() if ".lora_" not in name]
    whole = has_own_weights(model) and all(has_signs(value) for value in weights)
    marks = sorted(sign_digest(sampled(value)) for value in weights) if whole else []
    return f"{sign_digest(embeddings[:64])}-{digest(''.join(marks).encode()) if whole else ''}"


def has_signs(weight: Tensor) -> bool:
    """Does a weight have the signs of its checkpoint? Not if it is quantized or offloaded."""
    return weight.dtype in (torch.float32, torch.bfloat16, torch.float16) and not weight.is_meta


def sign_digest(numbers: Tensor) -> str:
    """Hash of the signs of numbers. In float16 a very small number becomes a zero, which keeps its sign."""
    return digest(tensor_bytes(torch.signbit(numbers)))


def signs_differ(one: str, other: str) -> bool:
    """Are two results of `signs_fingerprint` of different weights? A hash that one of them lacks is not compared."""
    return any(a and b and a != b for a, b in zip(one.split("-"), other.split("-"), strict=False))


def module_digest(module: nn.Module) -> str:
    """Hash of the first 64 numbers of each tensor. It changes with training and with the dtype."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta":
            found.update(bytes(tensor.flatten()[:64].cpu().contiguous().view(torch.uint8).numpy()))
    return found.hexdigest()[:16]
