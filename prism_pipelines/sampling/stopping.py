"""When a row is finished before its canvas is full, and what of it is text."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.families import MDMSpec
from .canvas import Canvas


def end_tokens(eos_token_id, tokenizer, model, spec: MDMSpec) -> tuple[int, ...]:
    """Ids that end a text: the given ones, else those of the tokenizer and of the model's generation config.

    The padding token is one of them, the last, but for encoders: language models turned MDM learn to fill the place
    after an answer with it (dllm trains on "padded <eos_token>", which is another token than Qwen's <|im_end|>).

    Args:
        eos_token_id: int, several, or None.
        tokenizer: or None.
        model: says how many ids there are.
        spec: of the model; its mask token never ends a text.
    Raises:
        ValueError: something that is no token id, or not one that can end a text.
    """
    vocab_size, mask_token_id = model.config.vocab_size, spec.mask_token_id
    if eos_token_id is None:
        found = [getattr(tokenizer, "eos_token_id", None)]
        listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        found += listed if isinstance(listed, list) else [listed]
        found += [getattr(tokenizer, "pad_token_id", None)] if spec.mask_format != "padding" else []
        known = [token for token in found if token is not None and token < vocab_size and token != mask_token_id]
        return tuple(dict.fromkeys(known))
    ids = token_ids("eos_token_id", eos_token_id, vocab_size)
    if not ids or mask_token_id in ids:
        raise ValueError(f"`eos_token_id` must name at least one token, and not the mask, got {eos_token_id!r}.")
    return ids


def never_written(tokenizer, ends: tuple[int, ...]) -> tuple[int, ...]:
    """Ids that are never predicted, beside the mask: padding, unless it ends a text."""
    pad = None if tokenizer is None else tokenizer.pad_token_id
    return () if pad is None or pad in ends else (pad,)


def token_ids(name: str, given: int | list[int] | None, vocab_size: int) -> tuple[int, ...]:
    """An argument that is a token id or several, as a tuple; () for None.

    Args:
        name: of the argument, for the error.
        given: its value.
        vocab_size: ids are below it.
    Raises:
        ValueError: something that is no token id of the model.
    """
    ids = () if given is None else tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(f"`{name}` must be a token id below {vocab_size} or a list of them, got {given!r:.80}.")
    return ids


def stop_strings(stop) -> tuple[str, ...]:
    """`stop` as a tuple of strings.

    Raises:
        ValueError: something else, or an empty string.
    """
    strings = () if stop is None else tuple(stop) if isinstance(stop, (list, tuple)) else (stop,)
    if any(not isinstance(text, str) or not text for text in strings):
        raise ValueError(f"`stop` must be a non-empty string or a list of them, got {stop!r}.")
    return strings


def generated_prefix(row: Tensor, generated: Tensor, mask_token_id: int, ends: tuple[int, ...]) -> tuple[Tensor, bool]:
    """Generated tokens of one row up to its first mask or end token, and whether it was an end token.

    Args:
        row: int64 (L,).
        generated: bool (L,).
        mask_token_id: where what is decided ends.
        ends: ids of end tokens.
    """
    tokens = row[generated]
    closed = tokens == mask_token_id
    ended = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device))
    first = (closed | ended).nonzero().flatten()
    if not len(first):
        return tokens, False
    return tokens[: first[0]], bool(ended[first[0]])


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first of `stops`, and whether there was one."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def finished_rows(
    sample: Tensor, generated: Tensor, mask_token_id: int, ends: tuple[int, ...], stops: tuple[str, ...], tokenizer
) -> Tensor:
    """Rows that hold an end token or a stop string with no mask before it, bool (B,)."""
    done = []
    for row, mask in zip(sample, generated, strict=True):
        tokens, ended = generated_prefix(row, mask, mask_token_id, ends)
        done.append(ended or (bool(stops) and cut(tokenizer.decode(tokens, skip_special_tokens=True), stops)[1]))
    return torch.tensor(done, device=sample.device)


def decode(
    sample: Tensor, canvas: Canvas, tokenizer, mask_token_id: int, ends: tuple[int, ...], stops: tuple[str, ...]
) -> list[str]:
    """The text of each row: the whole row of an infilling, else what was generated before an end token or string.

    Args:
        sample: the filled canvas, int64 (B, L).
        canvas: it came from.
        tokenizer, mask_token_id: of the model.
        ends, stops: as `finished_rows`.
    """
    if canvas.whole:
        kept = torch.ones_like(canvas.generated) if canvas.attention_mask is None else canvas.attention_mask.bool()
        rows = [row[mask] for row, mask in zip(sample, kept, strict=True)]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)
    rows = [
        generated_prefix(row, mask, mask_token_id, ends)[0] for row, mask in zip(sample, canvas.generated, strict=True)
    ]
    return [cut(text, stops)[0] for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
