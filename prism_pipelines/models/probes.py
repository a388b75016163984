"""Does a loaded model behave as its `MDMSpec` says? Probes, each a small experiment with a verdict."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks
from .denoiser import MaskedDenoiser
from .families import FAMILIES
from .protocols import Backbone
from .spec import MDMSpec

# The shift is known if the losses of the two readings differ by at least this, in nats per token.
CLEAR_MARGIN = 0.2
TEXT = (
    "The quick brown fox jumps over the lazy dog. In the beginning the river was wide and slow, and the people who "
    "lived beside it built their houses of wood and stone. Every morning they walked to the market in the town, where "
    "they sold fish and bread, and every evening they came home again."
)


class Finding(NamedTuple):
    """The result of one probe: its name, "ok" | "wrong" | "unknown", and what was seen."""

    probe: str
    verdict: str
    seen: str


def run_probes(pipe: Any, text: str | None = None) -> list[Finding]:
    """All probes on the model of a `PrismPipeline`.

    Args:
        pipe: `PrismPipeline`.
        text: ordinary text for the shift probe; None for an English paragraph. Without a tokenizer it is not used.
    Returns:
        Findings in the order attention, tokenizer, mask token, rotary embedding, shift.
    """
    denoiser = pipe.denoiser
    ids = None
    if pipe.tokenizer is not None:
        ids = pipe.tokenizer(text or TEXT, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
        ids = ids[:, : checks.max_length(pipe.model.config)].to(pipe.device)
    return [
        probe_attention(denoiser),
        probe_tokenizer(pipe.tokenizer, pipe.model.config.vocab_size),
        probe_mask(pipe),
        probe_rope(pipe.model),
        probe_shift(denoiser, ids),
    ]


def probe_attention(denoiser: MaskedDenoiser) -> Finding:
    """Is the model bidirectional, or block-causal, as declared? Change a later token, look at position 0."""
    try:
        checks.check_attention(denoiser, "the model")
    except ValueError as error:
        return Finding("attention", "wrong", str(error))
    spec = denoiser.spec
    if spec.attention == "block_causal":
        seen = f"a block of {spec.block_length} sees itself to its end and nothing after it"
    else:
        seen = "position 0 changes with the last token"
    return Finding("attention", "ok", seen)


def probe_tokenizer(tokenizer: Any, rows: int) -> Finding:
    """Does the tokenizer have an id for each row of the embeddings, and read its own characters?

    Args:
        tokenizer: of the model, or None.
        rows: of the model's embeddings, V.
    """
    if tokenizer is None:
        return Finding("tokenizer", "unknown", "there is none: the pipeline takes and gives ids only")
    if wrong := wrong_size(len(tokenizer), rows):
        return Finding("tokenizer", "wrong", f"it {wrong}; convert its vocabulary: prism convert SRC DST --vocab FILE")
    seen = f"{len(tokenizer)} ids for {rows} rows"
    special = set(tokenizer.all_special_tokens)
    ordinary = sorted(token for token in tokenizer.get_vocab() if token not in special)
    if ordinary and all(len(token) == 1 for token in ordinary):
        text = "".join(token for token in ordinary if token.isalnum())[:8]
        if tokenizer.unk_token_id in tokenizer(text, add_special_tokens=False).input_ids:
            seen = f"its tokens are single characters, and it reads {text!r} as an unknown word"
            return Finding("tokenizer", "wrong", f"{seen}; build one: prism convert SRC DST --vocab vocab.txt")
    return Finding("tokenizer", "ok", seen)


def wrong_size(ids: int, rows: int | None) -> str | None:
    """Why a tokenizer with `ids` ids does not belong to a model with `rows` rows of embeddings; None if it may.

    A few rows more than ids are common: up to a tenth of the rows, or up to 127 if the rows are a multiple of 8.
    """
    if rows is None:
        return None
    if ids > rows:
        return f"has {ids} ids, and the model has rows for {rows}"
    rounded = rows % 8 == 0 and rows - ids < 128
    return None if rounded or ids >= 0.9 * rows else f"has {ids} ids only, and the model has rows for {rows}"


def probe_mask(pipe: Any) -> Finding:
    """Is the mask id a token of its own? It must be special or outside the tokenizer, and not pad, bos, eos or unk."""
    mask, tokenizer = pipe.mask_token_id, pipe.tokenizer
    if tokenizer is None:
        return Finding("mask token", "unknown", f"id {mask}; there is no tokenizer to ask")
    token = tokenizer.convert_ids_to_tokens(mask) if mask < len(tokenizer) else None
    if token is None:
        return Finding(
            "mask token", "ok", f"id {mask} lies beyond the tokenizer's {len(tokenizer)} ids: no text has it"
        )
    clash = [name for name in ("pad", "bos", "eos", "unk") if getattr(tokenizer, f"{name}_token_id") == mask]
    if clash:
        return Finding("mask token", "wrong", f"id {mask} ({token!r}) is also the {clash[0]} token")
    if mask in tokenizer.all_special_ids or mask in getattr(tokenizer, "added_tokens_decoder", {}):
        return Finding("mask token", "ok", f"id {mask} is {token!r}")
    seen = f"id {mask} is {token!r}, an ordinary token of the tokenizer"
    spec = pipe.spec
    if any(row.source == spec.source and row.mask_token_id == mask for row in FAMILIES.values()):
        return Finding("mask token", "ok", f"{seen}, which its authors took as the mask")
    return Finding("mask token", "wrong", seen)


def probe_rope(model: nn.Module) -> Finding:
    """Are the rotary frequencies initialised? Some remote code leaves them uninitialised."""
    count = sum(name.endswith("inv_freq") for name, _ in model.named_buffers())
    try:
        checks.check_rope(model, "the model")
    except ValueError as error:
        return Finding("rotary embedding", "wrong", str(error))
    return Finding("rotary embedding", "ok", f"{count} buffers decrease from 1" if count else "none in this model")


def probe_shift(denoiser: MaskedDenoiser, ids: Tensor | None) -> Finding:
    """Do the logits at i, or those at i - 1, predict token i? Mask every sixth token of a text, and read both ways.

    Args:
        denoiser: the model.
        ids: int64 (1, L) of ordinary text; None for none.
    """
    if ids is None or ids.shape[1] < 8:
        return Finding("logit shift", "unknown", "no text of at least 8 tokens to try it on")
    if denoiser.suppressed[ids].any() or len(ids.unique()) < 4:
        return Finding("logit shift", "unknown", "the tokenizer has no words for the text; pass another")
    losses = [
        masked_nll(denoiser.model, dataclasses.replace(denoiser.spec, logit_shift=shift), ids) for shift in (0, 1)
    ]
    seen = f"loss of hidden tokens {losses[0]:.2f} read at i, {losses[1]:.2f} read at i - 1 (nats)"
    if abs(losses[0] - losses[1]) < CLEAR_MARGIN:
        return Finding("logit shift", "unknown", f"{seen}: too close to tell")
    better = int(losses[1] < losses[0])
    return Finding("logit shift", "ok" if better == denoiser.spec.logit_shift else "wrong", seen)


@torch.no_grad()
def masked_nll(model: Backbone, spec: MDMSpec, ids: Tensor) -> float:
    """Mean negative log-likelihood, in nats, of the tokens of `ids` (1, L). Each but the first is masked once.

    Every sixth token is masked at a time, which takes six forward passes.
    """
    denoiser = MaskedDenoiser(model, spec)
    place, losses = torch.arange(ids.shape[1], device=ids.device), []
    for offset in range(6):
        hide = ((place % 6 == offset) & (place > 0))[None]
        noisy = ids.masked_fill(hide, spec.mask_token_id)
        logits = denoiser.logits(denoiser.hidden(noisy), hide).float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[hide], reduction="none"))
    return torch.cat(losses).mean().item()
