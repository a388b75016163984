"""When a row is finished before its canvas is full, and what of it is text."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from ..models.families import MDMSpec
from ..schedulers.validation import is_int
from .canvas import Canvas
from .encoding import has_chat_template, whole_ids


@dataclass(frozen=True)
class Endings:
    """What ends a text in one call of the pipeline.

    Args:
        tokens: ids that end a text.
        stops: strings that end a text.
        finishing: those of `tokens` that finish a row, which then leaves the batch.
        fill: end token that the rest of a finished row is filled with; None if no row is finished early.
        written: end tokens, and special tokens of stop strings, that sampling may write.
    """

    tokens: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    finishing: tuple[int, ...] = ()
    fill: int | None = None
    written: tuple[int, ...] = ()


def endings_of(
    eos_token_id: int | list[int] | None,
    eos_early_stop: bool,
    stop: str | list[str] | None,
    tokenizer: Any,
    model: Any,
    spec: MDMSpec,
) -> Endings:
    """The `Endings` for the arguments of a call.

    Args:
        eos_token_id, tokenizer, model, spec: as `end_tokens`.
        eos_early_stop: end tokens finish a row too; stop strings always do.
        stop: a string or a list of strings.
    Raises:
        ValueError: as `end_tokens` and `stop_strings`; or no end token is known to fill a finished row with.
    """
    ends, stops = end_tokens(eos_token_id, tokenizer, model, spec), stop_strings(stop)
    if stops and tokenizer is None:
        raise ValueError("`stop` needs a tokenizer, and this pipeline has none: pass `eos_token_id`.")
    if eos_early_stop and not ends:
        raise ValueError("`eos_early_stop` needs an end token, and none is known: pass `eos_token_id`.")
    closing, marks = special_stops(stops, tokenizer, spec.mask_token_id)
    tokens = (*ends, *closing)
    if stops and not tokens:
        raise ValueError("`stop` needs a tokenizer, and an end token to fill the rest with: pass `eos_token_id`.")
    return Endings(
        tokens,
        stops,
        finishing=tokens if eos_early_stop else closing,
        fill=tokens[0] if eos_early_stop or stops else None,
        written=(*written_ends(eos_token_id, tokenizer, spec, ends), *marks),
    )


def end_tokens(eos_token_id: int | list[int] | None, tokenizer: Any, model: Any, spec: MDMSpec) -> tuple[int, ...]:
    """Ids that end a text: the given ones, else those of the tokenizer and of the model's generation config.

    Without `eos_token_id`, two more ids end a text. One is the token that the chat template writes after an answer
    (LLaDA's <|eot_id|>, which no config names). The other is the padding token, last in the result, except for
    encoders: language models that became MDMs learn to fill the place after an answer with it (dllm trains on "padded
    <eos_token>", which is another token than Qwen's <|im_end|>).

    Args:
        eos_token_id: an id, a list of ids, or None.
        tokenizer: of the model, or None.
        model: its config says how many ids there are.
        spec: of the model; the mask token never ends a text.
    Raises:
        ValueError: `eos_token_id` is no id of the model, is the mask token, or is an empty list.
    """
    vocab_size, mask_token_id = model.config.vocab_size, spec.mask_token_id
    if eos_token_id is None:
        found = [getattr(tokenizer, "eos_token_id", None)]
        listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        found += listed if isinstance(listed, list) else [listed]
        found.append(turn_end(tokenizer))
        found += [getattr(tokenizer, "pad_token_id", None)] if spec.mask_format != "padding" else []
        known = [token for token in found if token is not None and token < vocab_size and token != mask_token_id]
        return tuple(dict.fromkeys(known))
    ids = token_ids("eos_token_id", eos_token_id, vocab_size)
    if not ids or mask_token_id in ids:
        raise ValueError(f"`eos_token_id` must name at least one token, and not the mask, got {eos_token_id!r}.")
    return ids


# Reserved tokens of vocabularies: [unused7] of BERT, <|reserved_token_7|> of LLaDA, <null_1> of ESM.
RESERVED = re.compile(r"[\[<]\|?(unused|reserved|extra_id|null)[\w ]*\|?[\]>]", re.IGNORECASE)
ANSWER = "\N{SNOWMAN}"


def default_suppress_tokens(tokenizer: Any, ends: tuple[int, ...]) -> tuple[int, ...]:
    """Ids that are never predicted, besides the mask: padding, unless it is also an end token."""
    pad = None if tokenizer is None else tokenizer.pad_token_id
    return () if pad is None or pad in ends else (pad,)


def turn_end(tokenizer: Any) -> int | None:
    """Id of the special token that the chat template writes after an answer; None if there is none."""
    if not has_chat_template(tokenizer):
        return None
    try:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, TypeError, ValueError):  # a template for chats of another form
        return None
    _, answer, rest = text.rpartition(ANSWER)
    after = tokenizer(rest.lstrip(), add_special_tokens=False).input_ids[:1] if answer else []
    return after[0] if after and after[0] in special_ids(tokenizer) else None


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that the tokenizer marks as special: the named ones, and added tokens such as markers of a chat."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {token for token, form in added.items() if form.special}


@functools.lru_cache(maxsize=8)
def reserved_ids(tokenizer: Any, size: int) -> frozenset[int]:
    """Ids of reserved tokens, such as [unused7]. `size`: len(tokenizer), so that a grown vocabulary is read again."""
    return frozenset(token for text, token in tokenizer.get_vocab().items() if RESERVED.fullmatch(text))


def no_content(tokenizer: Any, spec: MDMSpec, ends: tuple[int, ...]) -> tuple[int, ...]:
    """Ids that sampling does not write, unless the call allows them: tokens that are no content of a text.

    These are the tokenizer's special tokens (without `ends`), its reserved tokens, and those in `MDMSpec.no_content`.

    Args:
        tokenizer: of the model. With None, only the ids in `MDMSpec.no_content` count.
        spec: of the model.
        ends: end tokens that sampling may write, see `written_ends`.
    """
    named = {token for token in spec.no_content if isinstance(token, int)}
    if tokenizer is None:
        return tuple(sorted(named - set(ends)))
    vocabulary = tokenizer.get_vocab() if spec.no_content else {}
    named |= {vocabulary[token] for token in spec.no_content if token in vocabulary}
    return tuple(sorted((special_ids(tokenizer) | reserved_ids(tokenizer, len(tokenizer)) | named) - set(ends)))


def written_ends(
    eos_token_id: int | list[int] | None, tokenizer: Any, spec: MDMSpec, ends: tuple[int, ...]
) -> tuple[int, ...]:
    """Which of the end tokens `ends` sampling may write: all, except the closing token of an encoder.

    An encoder's tokenizer puts that token after each text (</s> of RoBERTa, <eos> of ESM), so it is given. It may be
    written if `eos_token_id` was passed, or if the encoder has a chat template (ModernBERT-chat): such a model was
    trained to end its answers.
    """
    if tokenizer is None or spec.mask_format != "padding" or eos_token_id is not None or has_chat_template(tokenizer):
        return ends
    return tuple(sorted(set(ends) - set(tokenizer("").input_ids)))


def token_ids(name: str, given: int | list[int] | None, vocab_size: int) -> tuple[int, ...]:
    """Token ids that were passed as one id, a list, or None, as a tuple.

    Args:
        name: of the argument, for the error.
        given: value of the argument.
        vocab_size: number of ids of the model.
    Raises:
        ValueError: not an id in [0, vocab_size).
    """
    ids = () if given is None else tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if not all(is_int(token, 0, vocab_size - 1) for token in ids):
        raise ValueError(f"`{name}` must be a token id below {vocab_size} or a list of them, got {given!r:.80}.")
    return ids


def refuse_allowed(allowed: tuple[int, ...], suppressed: tuple[int, ...], mask_token_id: int) -> None:
    """Raise a ValueError if `allow_tokens` names the mask, or an id that `suppress_tokens` names too."""
    if mask_token_id in allowed:
        raise ValueError(f"`allow_tokens` names the mask token, {mask_token_id}, which is never written.")
    if both := sorted(set(allowed) & set(suppressed)):
        raise ValueError(f"`allow_tokens` and `suppress_tokens` both name {both}: drop them from one of the two.")


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """`stop`, a string, a list of strings or None, as a tuple.

    Raises:
        ValueError: another type, or an empty string.
    """
    strings = () if stop is None else tuple(stop) if isinstance(stop, (list, tuple)) else (stop,)
    if any(not isinstance(text, str) or not text for text in strings):
        raise ValueError(f"`stop` must be a non-empty string or a list of them, got {stop!r}.")
    return strings


def special_stops(
    stops: tuple[str, ...], tokenizer: Any, mask_token_id: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Special tokens in stop strings: those that are a whole stop string, and all that occur in some stop string.

    The former end a row as end tokens do. Sampling must be allowed to write the latter, or such a stop string would
    never occur.
    """
    if not stops:
        return (), ()
    ids = sorted(special_ids(tokenizer) - {mask_token_id})
    texts = dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
    held = tuple(token for token, text in texts.items() if text and any(text in stop for stop in stops))
    return tuple(token for token in held if texts[token] in stops), held


def generated_prefix(row: Tensor, generated: Tensor, mask_token_id: int, ends: tuple[int, ...]) -> tuple[Tensor, bool]:
    """Generated tokens of one row up to its first mask or end token, and whether it was an end token.

    Args:
        row: int64 (L,).
        generated: bool (L,).
        mask_token_id: id of the mask. Tokens after the first mask are not counted, since earlier ones may change.
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


def text_before(tokens: Tensor, stops: tuple[str, ...], tokenizer: Any) -> tuple[str, bool]:
    """The text of tokens before the first of `stops`, without special tokens, and whether there was a stop string.

    A stop string with a special token in it is looked for in the text that shows special tokens.
    """
    plain = tokenizer.decode(tokens, skip_special_tokens=True)
    shown = tokenizer.decode(tokens, skip_special_tokens=False) if stops else plain
    marked = tuple(stop for stop in stops if stop in shown and stop not in plain)
    if not marked:
        return cut(plain, stops)
    before, _ = cut(shown, marked)
    lengths = [len(tokenizer.decode(tokens[:n], skip_special_tokens=False)) for n in range(len(tokens) + 1)]
    kept = max(n for n, length in enumerate(lengths) if length <= len(before))
    begun = shown[lengths[kept] : len(before)]  # the first part of a token in which the stop string begins
    return cut(tokenizer.decode(tokens[:kept], skip_special_tokens=True) + begun, stops)[0], True


def finished_rows(
    sample: Tensor, generated: Tensor, mask_token_id: int, ends: tuple[int, ...], stops: tuple[str, ...], tokenizer: Any
) -> Tensor:
    """Rows that hold an end token or a stop string with no mask before it, bool (B,)."""
    done = []
    for row, mask in zip(sample, generated, strict=True):
        tokens, ended = generated_prefix(row, mask, mask_token_id, ends)
        done.append(ended or (bool(stops) and text_before(tokens, stops, tokenizer)[1]))
    return torch.tensor(done, device=sample.device)


def decode(sample: Tensor, canvas: Canvas, tokenizer: Any, mask_token_id: int, endings: Endings) -> list[str]:
    """The text of each row: for infilling the whole row, else what was generated before an end token or stop string.

    Args:
        sample: the filled canvas, int64 (B, L).
        canvas: the canvas that was filled.
        tokenizer, mask_token_id: of the model.
        endings: tokens and strings that end a text, and are not part of it.
    """
    if canvas.whole:
        kept = torch.ones_like(canvas.generated) if canvas.attention_mask is None else canvas.attention_mask.bool()
        rows = [row[mask] for row, mask in zip(sample, kept, strict=True)]
        given = canvas.texts or [None] * len(rows)
        return [
            infilled_text(text, row.tolist(), tokenizer, mask_token_id) for text, row in zip(given, rows, strict=True)
        ]
    rows = [
        generated_prefix(row, mask, mask_token_id, endings.tokens)[0]
        for row, mask in zip(sample, canvas.generated, strict=True)
    ]
    return [text_before(row, endings.stops, tokenizer)[0] for row in rows]


def infilled_text(given: str | None, ids: list[int], tokenizer: Any, mask_token_id: int) -> str:
    """The text of a filled row. Given characters are copied, and only the filled tokens are decoded.

    Args:
        given: the text with mask tokens; None if the canvas came from ids: then the whole row is decoded.
        ids: the row with its fills, without padding.
        tokenizer, mask_token_id: of the model.
    """
    if given is None:
        return tokenizer.decode(ids, skip_special_tokens=True)
    mask = tokenizer.convert_ids_to_tokens(mask_token_id)
    parts = [] if mask is None else given.split(mask)
    places = [i for i, t in enumerate(whole_ids(given, tokenizer)) if t == mask_token_id]
    if len(parts) != len(places) + 1:  # the text writes masks in another way, so their places in it are not known
        return tokenizer.decode(ids, skip_special_tokens=True)
    special, text, first = special_ids(tokenizer), parts[0], 0
    while first < len(places):
        last = first + 1  # masks with nothing between them are decoded together: they may share a character
        while last < len(places) and parts[last] == "":
            last += 1
        fill = [ids[place] for place in places[first:last] if ids[place] not in special]
        before = ids[places[first] - 1] if places[first] and ids[places[first] - 1] not in special else None
        text += fill_text(fill, before, text, tokenizer) + parts[last]
        first = last
    return text


def fill_text(fill: list[int], before: int | None, text: str, tokenizer: Any) -> str:
    """The characters that some filled tokens add to a text.

    A tokenizer that does not keep spaces decodes two whole words with a space between them. That space is dropped if
    the text ends with one already, or if the tokens can be read back without it (residues of a protein).

    Args:
        fill: ids of the filled tokens, all of one gap.
        before: id of the token before the gap, or None.
        text: the text before the gap.
        tokenizer: of the model.
    """

    def read(piece: str) -> list[int]:
        return tokenizer(piece, add_special_tokens=False).input_ids

    context = [] if before is None else [before]
    start = tokenizer.decode(context, skip_special_tokens=True)
    whole = tokenizer.decode(context + fill, skip_special_tokens=True)
    piece = whole[len(start) :] if whole.startswith(start) else tokenizer.decode(fill, skip_special_tokens=True)
    if tokenizer.decode(read("a  b")) == "a  b":
        return piece
    apart = not text or text[-1].isspace()
    glued = piece.replace(" ", "")
    if read(glued if apart else start + glued) == (fill if apart else context + fill):
        return glued
    return piece.lstrip(" ") if apart else piece
