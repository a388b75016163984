"""What must hold of a loaded model, whatever its code and its config say."""

from __future__ import annotations

import torch
import transformers

from .denoiser import MaskedDenoiser


def max_length(config) -> int | None:
    """The most tokens a model takes, or None if its config does not say.

    RoBERTa-like models and ESM count positions from pad_token_id + 1, so they take fewer than they have embeddings.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and ("roberta" in config.model_type or config.model_type == "esm"):
        limit -= (config.pad_token_id or 0) + 1
    return limit


def check_rope(model, name: str) -> None:
    """Raise a ValueError if a rotary embedding's frequencies are not those of its config.

    Some remote code leaves them uninitialised under transformers 5, and the model then writes garbage in silence.
    """
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("inv_freq") and buffer.numel():
            values = buffer.float()
            sane = values.isfinite().all() and (values > 0).all() and (values <= 1.0001).all()
            if not sane or (values.diff() > 0).any():
                raise ValueError(
                    f"The rotary frequencies of {name!r} ({buffer_name}) are not initialised: its code does not fit "
                    f"transformers {transformers.__version__}."
                )


@torch.no_grad()
def sees_ahead(denoiser: MaskedDenoiser, length: int = 4, noise: float = 0.0) -> bool:
    """Does the last token influence the first position, among `length` tokens, by more than `noise`?

    Two sequences that differ in their last token alone are compared at the hidden state of their first position, by its
    largest change relative to its largest entry. Each has a forward of its own: rows of a batch differ by rounding.
    """
    device = denoiser.forbidden.device
    allowed = (~denoiser.forbidden).nonzero().flatten()
    first, other = int(allowed[0]), int(allowed[-1])
    ids = torch.full((2, length), first, device=device)
    ids[:, :-1:2] = denoiser.spec.mask_token_id
    ids[1, -1] = other
    one, two = (denoiser.hidden(row[None])[0, 0].float() for row in ids)
    return bool((one - two).abs().max() > noise * one.abs().max())


def is_causal_class(model) -> bool:
    """Is it a class of transformers that is causal unless its mask or its config says otherwise?"""
    kind = type(model)
    return kind.__module__.startswith("transformers.") and kind.__name__.endswith(("ForCausalLM", "LMHeadModel"))


def check_attention(denoiser: MaskedDenoiser, name: str) -> None:
    """Raise a ValueError if a model's attention is not what its spec says.

    Within a block, or for a bidirectional model anywhere, later tokens must be seen; beyond the block they must not.
    """
    block = denoiser.spec.block_length if denoiser.spec.attention == "block_causal" else None
    if block != 1 and not sees_ahead(denoiser, min(4, block or 4)):
        raise ValueError(
            f"{name!r} is causal: its first position does not change with its last token, so it cannot fill masks from "
            "both sides. Load a bidirectional model."
        )
    # A mixture of experts sorts its tokens by expert, so its rounding depends on tokens that are not seen.
    if block is not None and sees_ahead(denoiser, block + 1, noise=0.01):
        raise ValueError(f"{name!r} is declared block-causal, but its first block sees the second.")
