"""Sanity checks on a loaded model: maximum length, rotary frequencies, NaN and inf, direction of attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .denoiser import MaskedDenoiser


def max_length(config: Any) -> int | None:
    """The most tokens a model takes, or None if its config does not say.

    RoBERTa-like models and ESM count positions from pad_token_id + 1, so they take fewer tokens than they have position
    embeddings.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and ("roberta" in config.model_type or config.model_type == "esm"):
        limit -= (config.pad_token_id or 0) + 1
    return limit


def check_rope(model: nn.Module, name: str) -> None:
    """Raise a ValueError if the frequencies of a rotary embedding are not initialised.

    Some remote code leaves them uninitialised under transformers 5. The model then writes garbage without an error.
    """
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("inv_freq") and buffer.numel():
            values = buffer.float()
            valid = values.isfinite().all() and (values > 0).all() and (values <= 1.0001).all()
            if not valid or (values.diff() > 0).any():
                raise ValueError(
                    f"The rotary frequencies of {name!r} ({buffer_name}) are not initialised: its code does not fit "
                    f"transformers {transformers.__version__}."
                )


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first of some (name, tensor) that holds NaN or inf, as "name (NaN)"; None if all numbers are finite."""
    for name, value in tensors:
        if value.is_meta or value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            continue  # offloaded, or quantized
        if not value.isfinite().all():
            return f"{name} ({'NaN' if value.isnan().any() else 'inf'})"
    return None


@torch.no_grad()
def refuse_nan(denoiser: MaskedDenoiser, ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """Raise a ValueError if the model gives NaN or inf for some ids (B, L). The error names the tensor of origin."""
    hidden = denoiser.hidden(ids, attention_mask)
    whole = bool(hidden.isfinite().all())
    if whole and not any_nan(denoiser.logits(row[None], torch.ones_like(row[None, :, 0]).bool()) for row in hidden):
        return
    model = denoiser.model
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    tensors = (*model.named_parameters(), *model.named_buffers())
    if bad := non_finite(tensors):
        raise ValueError(
            f"A weight of {name!r} holds NaN or inf: {bad}. The file is damaged, or was saved by a training run that "
            "diverged. Load another checkpoint."
        )
    place = "the output head" if whole else first_overflow(denoiser, ids, attention_mask)
    where = f" from {place} on" if place else ""
    raise ValueError(
        f"{name!r} gives NaN or inf{where}, and its weights are finite: numbers overflow {model.dtype}. Load it with "
        "torch_dtype=torch.bfloat16 or torch.float32."
    )


def any_nan(logits: Iterable[Tensor]) -> bool:
    """Does any of some tensors of logits hold NaN or +inf? -inf is legal: suppressed ids have it."""
    return any(bool((values.isnan() | values.isposinf()).any()) for values in logits)


def first_overflow(denoiser: MaskedDenoiser, ids: Tensor, attention_mask: Tensor | None) -> str | None:
    """Name of the first module whose output is not finite."""
    found: list[str] = []

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if not found and isinstance(tensor, Tensor) and not tensor.isfinite().all():
            found.append(names[module])

    names = {module: place for place, module in denoiser.model.named_modules()}
    handles = [module.register_forward_hook(look) for module in names]
    try:
        denoiser.hidden(ids, attention_mask)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@torch.no_grad()
def sees_ahead(denoiser: MaskedDenoiser, length: int = 4, noise: float = 0.0) -> bool:
    """Does the last of `length` tokens change the first position by more than `noise`?

    Two sequences that differ in their last token alone are compared at the hidden state of their first position. The
    change is its largest entry, relative to the largest entry of the state. Each sequence has a forward pass of its
    own, because rows of one batch differ by rounding.
    """
    device = denoiser.suppressed.device
    allowed = (~denoiser.suppressed).nonzero().flatten()
    first, other = int(allowed[0]), int(allowed[-1])
    ids = torch.full((2, length), first, device=device)
    ids[:, :-1:2] = denoiser.spec.mask_token_id
    ids[1, -1] = other
    one, two = (denoiser.hidden(row[None])[0, 0].float() for row in ids)
    if not (one.isfinite().all() and two.isfinite().all()):
        for row in ids:  # NaN equals nothing, so it would look like a causal model
            refuse_nan(denoiser, row[None])
    return bool((one - two).abs().max() > noise * one.abs().max())


def is_causal_class(model: nn.Module) -> bool:
    """Is the model of a transformers class that is causal unless a mask or the config says otherwise?"""
    kind = type(model)
    return kind.__module__.startswith("transformers.") and kind.__name__.endswith(("ForCausalLM", "LMHeadModel"))


def check_attention(denoiser: MaskedDenoiser, name: str) -> None:
    """Raise a ValueError if a model's attention is not the one in its spec.

    A bidirectional model must see later tokens everywhere. A block-causal model must see them within a block only.
    """
    block = denoiser.spec.block_length if denoiser.spec.attention == "block_causal" else None
    if block != 1 and not sees_ahead(denoiser, min(4, block or 4)):
        raise ValueError(
            f"{name!r} is causal: its first position does not change with its last token, so it cannot fill masks from "
            "both sides. Load a bidirectional model."
        )
    # A mixture of experts sorts tokens by expert, so its rounding depends on tokens that it does not see.
    if block is not None and sees_ahead(denoiser, block + 1, noise=0.01):
        raise ValueError(f"{name!r} is declared block-causal, but its first block sees the second.")
