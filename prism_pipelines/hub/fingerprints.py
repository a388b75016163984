"""Fingerprints that tell whether a model is the one that something was made for. They are no proof against forgery."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

SAMPLE = 1024  # numbers that are read of each weight


def digest(*parts: bytes) -> str:
    """16 hexadecimal digits of a hash."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def raw_bytes(value: Tensor) -> bytes:
    """The numbers of a tensor; floating-point ones as bfloat16, so that float32 and bfloat16 give the same."""
    value = value.detach()
    value = value.to("cpu", torch.bfloat16) if value.is_floating_point() else value.cpu()
    return value.contiguous().view(torch.uint8).numpy().tobytes()


def embedding_fingerprint(model) -> str | None:
    """Hash of a few rows of the token embeddings, the same in float32 and bfloat16; None in other dtypes.

    It tells models of one architecture and size apart, and LoRA does not change it. Further training may not either.
    """
    weight = model.get_input_embeddings().weight
    return digest(raw_bytes(weight[:64])) if is_comparable(weight) else None


def is_comparable(weight: Tensor) -> bool:
    """Does a weight have the same fingerprint wherever its model is loaded? Not in float16, quantized or offloaded."""
    return weight.dtype in (torch.float32, torch.bfloat16) and not weight.is_meta


def weights_fingerprint(model) -> str:
    """Hash over all weights of a model without its adapters: their shapes, and a sample of the numbers of each.

    `SAMPLE` numbers of each weight are read, evenly spaced, so that it is quick for models of any size; a change of a
    few numbers may go unseen. Names do not count, for releases of transformers differ in them. Weights that adapters
    are fused into count as they are.
    """
    marks = []
    for name, value in model.named_parameters():  # a weight that is used twice comes once
        if ".lora_" not in name:
            numbers = value.detach().reshape(-1)
            # An odd distance, or all that is read of a matrix could be one of its columns.
            numbers = numbers[:: max(1, numbers.numel() // SAMPLE) | 1]
            marks.append(digest(repr(tuple(value.shape)).encode(), b"" if value.is_meta else raw_bytes(numbers)))
    return digest("".join(sorted(marks)).encode())


def lasting_fingerprint(model) -> str | None:
    """`weights_fingerprint` where it is the same wherever the model is loaded, else None.

    Not in float16, quantized or offloaded; nor for MDLM, whose weights are computed as it is loaded, with rounding that
    depends on the machine.
    """
    comparable = all(is_comparable(value) for value in model.parameters())
    return weights_fingerprint(model) if comparable and not getattr(model, "_computed_weights", False) else None
