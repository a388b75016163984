"""Rows of a data set as examples for training and calibration: ids, and which tokens are trained.

An example is a dict of tensors: `input_ids` (L,), and `trainable_mask` (L,), which is false where a token is given
(such as a prompt) and never masked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch

from ..models.protocols import Tokenizer
from .encoding import NO_FRAME, TRAIN_ON, Frame, answer_spans, chat_texts, has_chat_template, prompt_ids, span_ids

TOO_LONG = ("error", "drop")
Example = dict[str, torch.Tensor]


@dataclass(frozen=True)
class RowEncoder:
    """Turns rows of a data set into examples.

    The columns of a row decide its kind:
        {"messages": [{"role", "content"}, ...]}    a chat; the last message, the assistant's, is the answer
        {"prompt": str, "completion": str}          the completion is the answer
        {"text": str}                               trained everywhere

    The given part of a row is the same as in generation. With a chat template, a prompt and its completion are a chat
    of two turns. An answer is tokenized apart from its prompt, and a language model's end token closes it. The special
    tokens around an encoder's text are given, and never trained.

    Args:
        tokenizer: transformers tokenizer.
        mask_token_id: must not occur in the data.
        max_length: the largest number of tokens of a row, and the length of a packed one.
        vocab_size: the number of ids that the model knows.
        too_long: "error", or "drop" to leave out longer rows.
        suppress_tokens: ids that the model never predicts, such as padding. In a `text` they are given; an answer must
            not hold them.
        supports_all_masked_input: can the model read a row of masks alone? If not, the first token of an example
            without given tokens is given, and an answer needs a prompt.
        frame: special tokens around every text of an encoder, see `encoding.text_frame`.
        packing: join `text` rows end to end and cut them into `max_length` tokens; None for language models only.
        use_chat_template: False writes prompt and completion as plain text.
        template_kwargs: further arguments of the chat template.
        train_on: "last_turn", or "all_turns" to train on every message of the assistant.
        open_ended: replace every answer by masks up to `max_length`, so rows may be prompts alone.
    Raises:
        ValueError: unknown `too_long` or `train_on`, `max_length` below 1; or, from `answer` and `text`, an unusable
            row.
    """

    tokenizer: Tokenizer
    mask_token_id: int
    max_length: int
    vocab_size: int
    too_long: str = "error"
    suppress_tokens: tuple[int, ...] = ()
    supports_all_masked_input: bool = True
    frame: Frame = NO_FRAME
    packing: bool | None = None
    use_chat_template: bool = True
    template_kwargs: dict[str, Any] | None = None
    train_on: str = "last_turn"
    open_ended: bool = False

    def __post_init__(self) -> None:
        for name, known in (("too_long", TOO_LONG), ("train_on", TRAIN_ON)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}, got {getattr(self, name)!r}.")
        if self.max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {self.max_length}.")
        if self.template_kwargs and not (self.use_chat_template and has_chat_template(self.tokenizer)):
            raise ValueError("`chat_template_kwargs` is given, and no chat template is used: leave it out.")

    @property
    def packs(self) -> bool:
        """Are `text` rows joined end to end?"""
        return not self.frame.closing if self.packing is None else self.packing

    def answer(self, row: Mapping[str, Any], number: int) -> Example | None:
        """The example of a row with an answer; None if it is too long and dropped."""
        chat = self._chat(row, number)
        if chat is None:
            ids, learned = self._plain(row["prompt"], row["completion"])
        else:
            try:
                ids, learned = span_ids(
                    answer_spans(chat, self.tokenizer, self.template_kwargs, self.train_on), self.tokenizer
                )
            except ValueError as error:
                raise ValueError(f"Row {number} of the data set: {error}") from None
        if not any(learned):
            raise ValueError(f"Row {number} of the data set has no trainable token: its answer is empty.")
        if learned[0] and not self.supports_all_masked_input:
            raise ValueError(
                f"Row {number} of the data set has an empty prompt, and this model (ESM, token_dropout) cannot read a "
                "row of masks alone. Give it a prompt, or pass the texts as `text`."
            )
        trained = {token for token, learn in zip(ids, learned, strict=True) if learn}
        if found := sorted(set(self.suppress_tokens) & trained):
            raise ValueError(
                f"Row {number} of the data set holds {self.tokenizer.decode(found)!r} (id {found[0]}) where it is to "
                "be learned, and the model never writes that token. Remove it from the data."
            )
        self._check(ids, number)
        return self._fitting(ids, learned, number)

    def prompt(self, row: Mapping[str, Any], number: int) -> Example | None:
        """The example of a prompt alone, followed by masks up to `max_length`; None if too long and dropped."""
        chat, text = row.get("messages"), row.get("prompt")
        if chat and isinstance(chat, list) and chat[-1].get("role") == "assistant":
            chat = chat[:-1]
        if chat is not None or (self.use_chat_template and has_chat_template(self.tokenizer)):
            try:
                (text,) = chat_texts(chat, text, self.tokenizer, self.template_kwargs)
            except (TypeError, ValueError) as error:
                raise ValueError(f"Row {number} of the data set: {error}") from None
        if not isinstance(text, str):
            raise ValueError(f"Row {number} of the data set: its prompt is no text but {text!r}.")
        (given,) = prompt_ids([text], self.tokenizer)
        self._check(given, number)
        count = self.max_length - len(given) - len(self.frame.closing)
        if count < 1:
            if self.too_long == "drop":
                return None
            raise ValueError(
                f"Row {number} of the data set has a prompt of {len(given)} tokens, and --max-length is "
                f"{self.max_length}, which leaves no token to generate. Raise it, or pass --too-long drop."
            )
        return written_by_the_model(given, count, self.frame.closing, self.mask_token_id)

    def text(self, row: Mapping[str, Any], number: int) -> Example | None:
        """The example of a row of plain text, one sequence with its special tokens; None if empty or dropped."""
        content = self._content(row, number)
        if not content:
            return None
        before, after = list(self.frame.opening), list(self.frame.closing)
        if not after:
            (before,), content = prompt_ids([""], self.tokenizer), [*content, *self._end()]
        learned = [token not in self.suppress_tokens for token in content]
        learned = [False] * len(before) + learned + [False] * len(after)
        return self._fitting([*before, *content, *after], learned, number)

    def packed_text(self, row: Mapping[str, Any], number: int) -> list[int]:
        """Ids of a row of plain text for packing, closed by the end token; empty for an empty text."""
        content = self._content(row, number)
        return [*content, *(self._end() or self.frame.closing)] if content else []

    def block(self, ids: list[int]) -> Example:
        """An example of packed text. Every token is trained, except suppressed ones.

        The first token is given if the model cannot read a row of masks alone.
        """
        learned = torch.tensor([token not in self.suppress_tokens for token in ids])
        learned[0] &= self.supports_all_masked_input
        return {"input_ids": torch.tensor(ids), "trainable_mask": learned}

    def _fitting(self, ids: list[int], learned: list[bool], number: int) -> Example | None:
        """The example of ids that fit into `max_length`; else None, or an error."""
        if len(ids) <= self.max_length:
            if all(learned) and not self.supports_all_masked_input:
                learned = [False, *learned[1:]]
            return {"input_ids": torch.tensor(ids), "trainable_mask": torch.tensor(learned)}
        if self.too_long == "drop":
            return None
        raise ValueError(
            f"Row {number} of the data set has {len(ids)} tokens, and --max-length is {self.max_length}. Raise it up "
            "to what the model takes, shorten the row, or pass --too-long drop; --packing true cuts rows of text."
        )

    def _plain(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        """Prompt and completion without a template."""
        (given,), answer = prompt_ids([prompt], self.tokenizer), self._bare(completion)
        if not answer:
            return given, [False] * len(given)
        after = list(self.frame.closing)  # given: an encoder generates a fixed number of tokens
        if not after and (end := self.tokenizer.eos_token_id) is not None and answer[-1] != end:
            answer = [*answer, end]
        return [*given, *answer, *after], [False] * len(given) + [True] * len(answer) + [False] * len(after)

    def _chat(self, row: Mapping[str, Any], number: int) -> list[dict[str, str]] | None:
        """The chat of a row, or None for a prompt and a completion as plain text."""
        if "messages" in row:
            if not has_chat_template(self.tokenizer):
                raise ValueError(
                    "The data set holds `messages`, and the tokenizer has no chat template to write them by."
                )
            if not self.use_chat_template:
                raise ValueError("`messages` need the chat template: leave out --no-chat-template.")
            return row["messages"]
        for name, value in (("prompt", row["prompt"]), ("answer", row["completion"])):
            if not isinstance(value, str):
                raise ValueError(f"Row {number} of the data set: its {name} is no text but {value!r}.")
        if not (self.use_chat_template and has_chat_template(self.tokenizer)):
            return None
        if not row["completion"]:
            raise ValueError(f"Row {number} of the data set has no trainable token: its answer is empty.")
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]

    def _content(self, row: Mapping[str, Any], number: int) -> list[int]:
        if not isinstance(row["text"], str):
            raise ValueError(f"Row {number} of the data set: its text is no text but {row['text']!r}.")
        ids = self._bare(row["text"]) if row["text"].strip() else []
        self._check(ids, number)
        return ids

    def _bare(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _end(self) -> list[int]:
        ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        return next(([end] for end in ends if end is not None), [])

    def _check(self, ids: list[int], number: int) -> None:
        if self.mask_token_id in ids:
            raise ValueError(
                f"Row {number} of the data set holds the mask token (id {self.mask_token_id}) as text: no answer is "
                "known there. Remove it from the data."
            )
        if ids and max(ids) >= self.vocab_size:
            raise ValueError(f"Row {number} gives id {max(ids)}; the model knows ids up to {self.vocab_size - 1}.")


def encode_rows(rows: Iterable[Mapping[str, Any]], encoder: RowEncoder) -> Iterator[Example]:
    """Examples of rows: one for each answer and each text; or blocks of `max_length` tokens of packed text.

    Tokens after the last whole block are dropped, unless there is no whole block.

    Raises:
        ValueError: columns of no known kind, or as `RowEncoder`.
    """
    buffer: list[int] = []
    blocks = 0
    for number, row in enumerate(rows):
        if encoder.open_ended and row.keys() & {"prompt", "messages"}:
            if (example := encoder.prompt(row, number)) is not None:
                yield example
            continue
        kind = row_kind(row)
        if kind == "text" and encoder.packs:
            buffer += encoder.packed_text(row, number)
            while len(buffer) >= encoder.max_length:
                yield encoder.block(buffer[: encoder.max_length])
                del buffer[: encoder.max_length]
                blocks += 1
        else:
            example = encoder.text(row, number) if kind == "text" else encoder.answer(row, number)
            if example is not None and example["trainable_mask"].any():
                yield example
    if buffer and not blocks:
        yield encoder.block(buffer)


def written_by_the_model(before: Sequence[int], count: int, after: Sequence[int], mask_token_id: int) -> Example:
    """An example of `count` masks between given ids, which the model itself will fill."""
    ids = [*before, *[mask_token_id] * count, *after]
    offset = torch.arange(len(ids)) - len(before)
    return {"input_ids": torch.tensor(ids), "trainable_mask": (offset >= 0) & (offset < count)}


def row_kind(row: Mapping[str, Any]) -> str:
    """The kind of a row by its columns: "chat", "prompt" or "text".

    Raises:
        ValueError: none of these.
    """
    kinds = {"chat": {"messages"}, "prompt": {"prompt", "completion"}, "text": {"text"}}
    for kind, columns in kinds.items():
        if row.keys() >= columns:
            return kind
    raise ValueError(
        f"The data set has the columns {sorted(row)}. Rename them: text, or prompt and completion, or messages."
    )


def examples_line(rows: Iterable[Mapping[str, Any]], encoder: RowEncoder, examples: Iterable[Example]) -> str:
    """One line about how rows became examples, with the first example, its given tokens in brackets.

    Args:
        rows: the rows of the data set.
        encoder: the encoder that made the examples.
        examples: at least one; they are counted unless they are a stream.
    """
    first_row = next(iter(rows))
    open_ended = encoder.open_ended and first_row.keys() & {"prompt", "messages"}
    kind = "open" if open_ended else row_kind(first_row)
    first = next(iter(examples))
    uses_template = encoder.use_chat_template and has_chat_template(encoder.tokenizer)
    way = {
        "text": f"packed end to end into {encoder.max_length} tokens" if encoder.packs else "one sequence a row",
        "chat": f"by the chat template, trained on {encoder.train_on.replace('_', ' ')}",
        "prompt": "by the chat template" if uses_template else "as plain text",
        "open": "prompts that the model answers itself",
    }[kind]
    if kind == "text" and encoder.frame.closing and not encoder.packs:
        around = [encoder.tokenizer.decode(list(ids)) for ids in encoder.frame]
        way += f" between {around[0]} and {around[1]}"
    count = f"{len(examples)} examples" if isinstance(examples, Sized) else "rows"
    parts = []
    for learned, run in itertools.groupby(
        zip(first["input_ids"].tolist(), first["trainable_mask"].tolist(), strict=True), key=lambda pair: pair[1]
    ):
        text = encoder.tokenizer.decode([token for token, _ in run])
        parts.append(text if learned else f"⟦{text}⟧")
    shown = "".join(parts)
    shown = f"{shown[:150]} ... {shown[-100:]}" if len(shown) > 260 else shown
    return f"{count} of {kind} rows, {way}. The first, with what is given in ⟦⟧: {shown!r}"


def pad_batch(examples: Sequence[Example], pad_token_id: int) -> Example:
    """A batch of examples, padded on the right to the longest.

    Args:
        examples: at least one.
        pad_token_id: any id; `attention_mask` hides it.
    Returns:
        `input_ids` int64 and `trainable_mask` bool, (B, L); and `attention_mask`, int64 (B, L), if anything is padded.
    """
    ids = [example["input_ids"] for example in examples]
    masks = [example["trainable_mask"] for example in examples]
    batch = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "trainable_mask": torch.nn.utils.rnn.pad_sequence(masks, batch_first=True),
    }
    if len({len(row) for row in ids}) > 1:
        ones = [torch.ones_like(row) for row in ids]
        batch["attention_mask"] = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
    return batch
