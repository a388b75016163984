"""Canvases: the ids that go into the model, and which positions are generated."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..models.protocols import Tokenizer
from .encoding import NO_FRAME, Frame, as_texts, prompt_ids, whole_ids

DEFAULT_STEPS = 64


@dataclass(frozen=True)
class Canvas:
    """A batch ready for sampling.

    Args:
        sample: int64 (B, L); the mask token where tokens will be generated, and wherever the prompt itself has one.
        generated: true where tokens are generated, bool (B, L). All other positions never change.
        attention_mask: 1 for tokens and 0 for padding, (B, L); None without padding.
        whole: decode whole rows (infilling) rather than the generated part.
        texts: the texts to infill; None for ids, and for everything but infilling.
    """

    sample: Tensor
    generated: Tensor
    attention_mask: Tensor | None
    whole: bool
    texts: tuple[str, ...] | None = None

    def to(self, device: torch.device | str) -> Canvas:
        """The same canvas on another device."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return replace(self, sample=self.sample.to(device), generated=self.generated.to(device), attention_mask=mask)


def canvas_of(
    given: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    mask_token_id: int,
    attention_mask: Any,
    num_samples: int,
    gen_length: int | None,
    frame: Frame = NO_FRAME,
) -> Canvas:
    """The canvas of a call of the pipeline.

    Args:
        given: {"prompt", "input_ids", "infill"}; at most one is not None. Without any, the rows hold only masks.
        num_samples: copies of each row, next to each other.
        tokenizer, mask_token_id, attention_mask, gen_length, frame: as `canvas_of_prompt`.
    Raises:
        ValueError: more than one of `given`, or arguments that exclude each other.
    """
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"Pass one of `prompt`, `messages`, `input_ids` and `infill`, got {named}.")
    source = given[named[0]] if named else ""
    if attention_mask is not None and as_texts(source):
        raise ValueError("`attention_mask` only applies to ids; the pipeline pads texts itself.")
    if not named:
        return canvas_of_nothing(num_samples, gen_length, mask_token_id, frame)
    if named == ["infill"]:
        if gen_length is not None:
            raise ValueError("`gen_length` has no effect with `infill`, which generates its mask tokens. Drop one.")
        canvas = canvas_of_infill(source, tokenizer, mask_token_id, attention_mask)
    else:
        canvas = canvas_of_prompt(source, tokenizer, mask_token_id, gen_length, attention_mask, frame)
    return canvas if num_samples == 1 else repeat_rows(canvas, num_samples)


def canvas_of_nothing(num_samples: int, gen_length: int | None, mask_token_id: int, frame: Frame = NO_FRAME) -> Canvas:
    """`num_samples` rows of `gen_length` masks between the special tokens of `frame`, which are given.

    Raises:
        ValueError: no `gen_length`.
    """
    if gen_length is None:
        raise ValueError("`gen_length` is required without `prompt` or `infill`: the length of each sample.")
    row = torch.tensor([*frame.opening, *[mask_token_id] * gen_length, *frame.closing])
    offset = torch.arange(len(row)) - len(frame.opening)
    generated = (offset >= 0) & (offset < gen_length)
    return Canvas(row.repeat(num_samples, 1), generated.repeat(num_samples, 1), None, whole=False)


def canvas_of_prompt(
    source: Any,
    tokenizer: Tokenizer | None,
    mask_token_id: int,
    gen_length: int | None,
    attention_mask: Any = None,
    frame: Frame = NO_FRAME,
) -> Canvas:
    """Prompts, padded on the left to one length, followed by `gen_length` masks.

    Padding elsewhere in given ids is moved to the left, so that the new tokens follow the last token of the prompt.

    Args:
        source: a text, texts, or ids (B, P). A text may be empty.
        tokenizer: required for texts.
        mask_token_id: written where tokens are generated. Mask tokens of the prompt itself are kept.
        gen_length: the number of tokens to generate, at least 1.
        attention_mask: (B, P) for ids, or None.
        frame: its closing tokens follow the masks of a text; nothing is put around ids.
    Raises:
        ValueError, TypeError: as `read_ids`; or no `gen_length`.
    """
    if gen_length is None:
        raise ValueError("`gen_length` is required with `prompt`: the number of tokens to generate.")
    ids, mask = read_ids("prompt", source, tokenizer, attention_mask, side="left")
    if mask is not None:
        order = mask.argsort(dim=1, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    end = torch.tensor(frame.closing if as_texts(source) else (), dtype=torch.long).repeat(len(ids), 1)
    tail = torch.cat([torch.full((len(ids), gen_length), mask_token_id), end], dim=1)
    offset = torch.arange(ids.shape[1] + tail.shape[1]).repeat(len(ids), 1) - ids.shape[1]
    generated = (offset >= 0) & (offset < gen_length)
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(tail)], dim=1)
    return Canvas(torch.cat([ids, tail], dim=1), generated, mask, whole=False)


def canvas_of_infill(
    source: Any,
    tokenizer: Tokenizer | None,
    mask_token_id: int,
    attention_mask: Any = None,
    needs_mask: bool = True,
) -> Canvas:
    """Texts or ids whose mask tokens will be filled; padding is at the ends of a row.

    Args:
        source: a text, texts, or ids (B, L).
        tokenizer, mask_token_id, attention_mask: as `canvas_of_prompt`.
        needs_mask: a row without a mask token is an error.
    Raises:
        ValueError, TypeError: as `read_ids`; or a row without a mask token.
    """
    name = "infill" if needs_mask else "texts"
    ids, mask = read_ids(name, source, tokenizer, attention_mask, side="right")
    if mask is not None and (mask.diff(dim=1).abs().sum(dim=1) > 1 + (mask[:, 0] == 0).long()).any():
        raise ValueError(f"`attention_mask` has a gap inside a row of `{name}`. Put padding at the ends of a row.")
    generated = ids == mask_token_id
    if mask is not None:
        generated = generated & mask.bool()
    empty = (~generated.any(-1)).nonzero().flatten().tolist()
    if needs_mask and empty:
        shown = f" ({tokenizer.mask_token!r})" if tokenizer is not None and tokenizer.mask_token else ""
        raise ValueError(f"`infill` row {empty[0]} holds no mask token{shown}, id {mask_token_id}: nothing to fill.")
    texts = as_texts(source)
    return Canvas(ids, generated, mask, whole=True, texts=None if texts is None else tuple(texts))


def read_ids(
    name: str, source: Any, tokenizer: Tokenizer | None, attention_mask: Any, side: str
) -> tuple[Tensor, Tensor | None]:
    """Texts or ids as ids, int64 (B, L), and their attention mask; None without padding.

    Args:
        name: the argument's name in errors.
        source: a text, a list of texts, ids as a tensor (L,) or (B, L), or as nested lists.
        tokenizer: required for texts.
        attention_mask: (B, L) or None; for ids only.
        side: the side on which texts of different length are padded, "left" or "right".
    Raises:
        ValueError: nothing given, rows of ids of different length, a wrong mask, or no tokenizer.
        TypeError: neither texts nor integer ids.
    """
    texts = as_texts(source)
    if texts == []:
        raise ValueError(f"`{name}` is empty; pass at least one text or row of ids.")
    if texts is None:
        return checked_ids(name, source, attention_mask)
    if tokenizer is None:
        raise ValueError(f"`{name}` is text, but the pipeline has no tokenizer. Pass ids, or load a tokenizer.")
    warn_of_unknown(name, texts, tokenizer)
    rows = prompt_ids(texts, tokenizer) if side == "left" else [whole_ids(text, tokenizer) for text in texts]
    if side == "right" and not any(rows):
        raise ValueError(f"`{name}` is empty: no text has a token.")
    if len({len(row) for row in rows}) == 1:
        return torch.tensor(rows, dtype=torch.long), None
    return pad_rows(rows, tokenizer, side)


def checked_ids(name: str, source: Any, attention_mask: Any) -> tuple[Tensor, Tensor | None]:
    """Given ids as int64 (B, L), and their attention mask; arguments and errors as `read_ids`."""
    try:
        ids = torch.as_tensor(source)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TypeError(f"`{name}` must be text, texts, or integer ids in rows of one length: {error}") from None
    ids = (ids[None] if ids.ndim == 1 else ids).cpu()  # the canvas is made on the CPU, then moved as a whole
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"`{name}` must be text or integer ids, got {ids.dtype}.")
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"`{name}` must be ids of shape (B, L) with at least one token, got {tuple(ids.shape)}.")
    if attention_mask is not None:
        attention_mask = torch.as_tensor(attention_mask).cpu()
        attention_mask = attention_mask[None] if attention_mask.ndim == 1 else attention_mask
        if attention_mask.shape != ids.shape:
            shapes = f"{tuple(attention_mask.shape)} and {tuple(ids.shape)}"
            raise ValueError(f"`attention_mask` must have the shape of the ids, got {shapes}.")
        if not ((attention_mask == 0) | (attention_mask == 1)).all():
            raise ValueError("`attention_mask` must hold only 1 for tokens and 0 for padding.")
        attention_mask = attention_mask.long()
        attention_mask = None if attention_mask.all() else attention_mask
    return ids.long(), attention_mask


def pad_rows(rows: list[list[int]], tokenizer: Tokenizer, side: str) -> tuple[Tensor, Tensor]:
    """Rows of ids, padded on one side to (B, L), and their attention mask. Any token can pad: the mask hides it."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
    pad, length = next(token for token in known if token is not None), max(map(len, rows))
    ids, mask = torch.full((len(rows), length), pad), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(length - len(row), length) if side == "left" else slice(len(row))
        ids[i, columns], mask[i, columns] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def unknown_pieces(text: str, tokenizer: Tokenizer) -> list[str]:
    """Parts of a text that the tokenizer reads as its unknown token, in order. An <unk> in the text does not count."""
    if tokenizer.is_fast:
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(read.input_ids, read.offset_mapping, strict=True)
        pieces = [text[start:end] for token, (start, end) in spans if token == tokenizer.unk_token_id]
    else:
        pieces = tokenizer.tokenize(text)
        ids = tokenizer.convert_tokens_to_ids(pieces)
        pieces = [piece for piece, token in zip(pieces, ids, strict=True) if token == tokenizer.unk_token_id]
    return [piece for piece in pieces if piece.strip() != tokenizer.unk_token]


def warn_of_unknown(name: str, texts: list[str], tokenizer: Tokenizer) -> None:
    """Warn of parts of some texts that the tokenizer does not know, with the name of the argument."""
    if getattr(tokenizer, "unk_token_id", None) is None:
        return
    found = dict.fromkeys(piece for text in texts for piece in unknown_pieces(text, tokenizer))
    if found:
        shown = ", ".join(f"{piece!r:.40}" for piece in list(found)[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        warnings.warn(
            f"`{name}` holds {shown}{more}, unknown to the tokenizer: the model reads {tokenizer.unk_token!r} there. "
            "Check the case, spaces and alphabet of the text.",
            stacklevel=6,
        )


def given_positions(given: Any, texts: Any, canvas: Canvas, tokenizer: Tokenizer | None) -> Tensor:
    """Which tokens of some texts were given, bool (B, L).

    Args:
        given: the beginning of each text, a string or a list of strings; or bool (B, L), as a tensor or nested lists.
        texts: the texts of the canvas, required if `given` is strings.
        canvas: of the texts, as `canvas_of_infill` makes it.
        tokenizer: required if `given` is strings.
    Raises:
        ValueError: strings without texts, not one for each, or one that does not begin its text; or another shape.
        TypeError: neither strings nor bool.
    """
    if beginnings := as_texts(given):
        texts = as_texts(texts)
        if texts is None or tokenizer is None:
            raise ValueError("`given` is text, which needs `texts`. With ids pass a bool tensor of their shape.")
        if len(beginnings) != len(texts):
            raise ValueError(f"`given` must hold one beginning for each of {len(texts)} texts, got {len(beginnings)}.")
        for beginning, text in zip(beginnings, texts, strict=True):
            if not text.startswith(beginning):
                raise ValueError(f"`given` must be the beginning of its text, got {beginning!r:.60} for {text!r:.60}.")
        positions = torch.zeros_like(canvas.sample, dtype=torch.bool)
        rows = zip(prompt_ids(beginnings, tokenizer), canvas.sample.tolist(), strict=True)
        for row, (some, ids) in enumerate(rows):  # the last token of a beginning may span the text after it
            same = next((i for i, (one, other) in enumerate(zip(some, ids, strict=False)) if one != other), len(some))
            positions[row, :same] = True
        return positions
    try:
        positions = torch.as_tensor(given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TypeError(f"`given` must be the beginning of each text, or bool of shape (B, L): {error}") from None
    if positions.dtype != torch.bool:
        raise TypeError(f"`given` must be the beginning of each text, or bool of shape (B, L), got {positions.dtype}.")
    positions = positions[None] if positions.ndim == 1 else positions
    if positions.shape != canvas.sample.shape:
        shapes = f"{tuple(positions.shape)} and {tuple(canvas.sample.shape)}"
        raise ValueError(f"`given` must have the shape of the ids, got {shapes}.")
    return positions.to(canvas.sample.device)


def repeat_rows(canvas: Canvas, times: int) -> Canvas:
    """A canvas with each row `times` times, copies next to each other."""
    mask = None if canvas.attention_mask is None else canvas.attention_mask.repeat_interleave(times, 0)
    return replace(
        canvas,
        sample=canvas.sample.repeat_interleave(times, 0),
        generated=canvas.generated.repeat_interleave(times, 0),
        attention_mask=mask,
        texts=None if canvas.texts is None else tuple(text for text in canvas.texts for _ in range(times)),
    )


def changed_sample(returned: Any, shown: Tensor, sample: Tensor, vocab_size: int) -> Tensor:
    """The canvas after a callback: its "sample", or the copy it was given; `sample` itself if nothing changed.

    Args:
        returned: the callback's return value.
        shown: the copy of `sample` that the callback was given and may have changed in place.
        sample: the canvas before the callback, int64 (B, L).
        vocab_size: the number of ids that the model knows.
    Raises:
        TypeError: neither a dict nor None was returned, or "sample" is no int64 tensor.
        ValueError: "sample" has another shape, or holds an id that the model does not know.
    """
    if returned is not None and not isinstance(returned, dict):
        raise TypeError(f"`callback_on_step_end` must return a dict or None, got {type(returned).__name__}.")
    new = (returned or {}).get("sample", shown)
    if not isinstance(new, Tensor) or new.dtype != torch.int64:
        got = new.dtype if isinstance(new, Tensor) else type(new).__name__
        raise TypeError(f'`callback_on_step_end` must return "sample" as a tensor of int64, got {got}.')
    if new.shape != sample.shape or new.min() < 0 or new.max() >= vocab_size:
        raise ValueError(
            f'`callback_on_step_end` must return "sample" of shape {tuple(sample.shape)} with ids from 0 to '
            f"{vocab_size - 1}, got shape {tuple(new.shape)} and ids from {int(new.min())} to {int(new.max())}."
        )
    new = new.to(sample.device)
    return sample if torch.equal(new, sample) else new


def split_blocks(
    generated: Tensor, block_length: int | None, num_steps: int | None, positions: Tensor | None = None
) -> list[tuple[Tensor, int]]:
    """Blocks of generated positions, left to right, and the number of steps for each.

    Block b of a row holds the generated positions number b * block_length to (b + 1) * block_length - 1 of that row,
    wherever they are. With `positions`, blocks begin at multiples of block_length in the row. Then the first block may
    be short, and blocks with nothing to generate do not count.
    A given number of steps is spread evenly over the blocks; the first blocks get the remainder. So the steps of a row
    do not depend on how another row is cut into blocks. The default number is spread in proportion to the tokens.

    Args:
        generated: bool (B, L).
        block_length: positions of one block, at least 1; None for one block.
        num_steps: steps of the whole run. None for one per token of the longest row, at most 64 and at least one a
            block.
        positions: position of each token in its row, int64 (B, L), for aligned blocks; None to count generated tokens.
    Returns:
        list of (bool (B, L), int).
    Raises:
        ValueError: fewer steps than blocks.
    """
    longest = int(generated.sum(-1).max())
    if block_length is None:
        return [(generated, num_steps or max(1, min(longest, DEFAULT_STEPS)))]
    cell = (generated.cumsum(-1) - 1 if positions is None else positions) // block_length
    reached = cell.masked_fill(~generated, -1).cummax(-1).values
    before = torch.nn.functional.pad(reached, (1, 0), value=-1)[:, :-1]
    block = (generated & (cell > before)).cumsum(-1) - 1
    blocks = [generated & (block == b) for b in range(max(1, int(block.max()) + 1))]
    count, even = len(blocks), num_steps is not None
    num_steps = num_steps or max(count, min(longest, DEFAULT_STEPS))
    if num_steps < count:
        raise ValueError(
            f"`num_inference_steps` is {num_steps}, but each of the {count} blocks of {block_length} tokens needs a "
            f"step. Pass at least {count} steps or a larger `block_length`."
        )
    sizes = [1 if even else max(1, int(one.sum(-1).max())) for one in blocks]
    return list(zip(blocks, spread_steps(num_steps, sizes), strict=True))


def spread_steps(num_steps: int, sizes: list[int]) -> list[int]:
    """Steps for blocks of these sizes: one each, and the rest in proportion to their size minus one.

    50 steps over blocks of 32 and 18 tokens are 32 and 18; 7 steps over three equal blocks are 3, 2 and 2.
    """
    rest = num_steps - len(sizes)
    more = [size - 1 for size in sizes] if max(sizes) > 1 else [1] * len(sizes)
    steps = [1 + rest * size // sum(more) for size in more]
    shares = [rest * size % sum(more) for size in more]
    for b in sorted(range(len(sizes)), key=lambda b: (-shares[b], b))[: num_steps - sum(steps)]:
        steps[b] += 1
    return steps
