"""Training examples: what index i of a data set is, and how a batch is made of them.

An example is a dict of tensors: `input_ids` (L,), and `trainable_mask` (L,), false where a token is given (a prompt)
and never masked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ..sampling.encoding import (
    NO_FRAME,
    TRAIN_ON,
    Frame,
    answer_spans,
    has_chat_template,
    prompt_ids,
    span_ids,
)
from ..sudoku import CELLS, SYMMETRY_NUMBERS, complete_grids, dig_puzzles, symmetry_images, uniform_of

HELD_OUT_SEED = 999_983  # base grids for evaluation come from this seed, training uses the run's own
READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
TOO_LONG = ("error", "drop")
EVAL_SHARE = 0.1  # held-out examples are at most this share of a data set without a split of its own


class SudokuGrids(Dataset):
    """Complete Sudoku grids: `num_base` generated ones, each example a random symmetric image of one of them.

    A share of the examples are puzzles: their clues are a prompt that is never masked, so every masked cell has one
    right answer. Example i depends on (seed, i) alone, so a resumed run sees exactly what the uninterrupted one would.

    Args:
        num_examples: length of an epoch.
        seed: makes the base grids, the puzzles and the images.
        num_base: base grids that are generated (2 ms each).
        puzzle_share: share of the examples that are puzzles, in [0, 1]; base puzzles take 10 ms each.
        puzzle_clues: lowest and highest number of clues of a puzzle.
    """

    def __init__(self, num_examples, seed, num_base=20_000, puzzle_share=0.0, puzzle_clues=(23, 34)):
        self.num_examples, self.seed, self.puzzle_share = num_examples, seed, puzzle_share
        self.base = complete_grids(min(num_base, num_examples), seed)
        # A fraction of the grids is enough for puzzles: their symmetric images are as many again as of any grid.
        chosen = self.base[: len(self.base) // 4 + 1] if puzzle_share else self.base[:0]
        self.puzzles = dig_puzzles(chosen, puzzle_clues, seed)

    def __len__(self):
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """Many at once, which is how a DataLoader asks: a batch takes little more time than an example."""
        indices = np.asarray(indices, dtype=np.int64)
        if wrong := indices[(indices < 0) | (indices >= self.num_examples)].tolist():
            raise IndexError(f"Example {wrong[0]} of {self.num_examples}.")
        u = uniform_of(self.seed, indices, 1 + SYMMETRY_NUMBERS)
        is_puzzle, u = u[:, 0] < self.puzzle_share, u[:, 1:]
        place = indices % np.where(is_puzzle, max(1, len(self.puzzles)), len(self.base))
        grids = symmetry_images(self.base[place], u)
        trainable = np.ones((len(grids), CELLS), dtype=bool)
        trainable[is_puzzle] = symmetry_images(self.puzzles[place[is_puzzle]], u[is_puzzle]) == 0
        ids, trainable = torch.from_numpy(grids.astype(np.int64)), torch.from_numpy(trainable)
        return [{"input_ids": i, "trainable_mask": t} for i, t in zip(ids, trainable, strict=True)]


# --- data sets of text ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowEncoder:
    """Turns a row of a data set into ids, and says what kind of rows these are.

    A row is one of, by its columns:
        {"messages": [{"role", "content"}, ...]}    a chat; the last message, the assistant's, is the answer
        {"prompt": str, "completion": str}          the completion is the answer
        {"text": str}                               trained everywhere

    What is given of a row is what the pipeline writes after when it generates: a prompt and its completion are a chat
    of two turns where the tokenizer has a chat template; an answer is tokenized apart from its prompt and closed by the
    end token of a language model; the special tokens around an encoder's text are given, and never trained.

    Args:
        tokenizer: transformers tokenizer.
        mask_token_id: must not occur in the data.
        max_length: most tokens of a row, and the length of a packed one.
        vocab_size: ids at and above it are unknown to the model.
        too_long: "error", or "drop" to leave out rows that are longer.
        suppressed: ids that the model is never to predict, such as padding. In a `text` they are given; an answer must
            not hold them.
        reads_only_masks: whether the model can read a row of masks alone; if not, an example without any given token
            keeps its first one, and an answer needs a prompt.
        frame: special tokens around every text of an encoder, see `encoding.text_frame`.
        packing: lay `text` rows end to end and cut them into `max_length`; None for language models only.
        use_chat_template: False writes prompt and completion as plain text.
        template_kwargs: for the chat template.
        train_on: "last_turn", or "all_turns" to learn every message of the assistant.
    Raises:
        ValueError: unknown `too_long` or `train_on`, `max_length` below 1, or from `answer` and `text` a row that
            cannot be used.
    """

    tokenizer: object
    mask_token_id: int
    max_length: int
    vocab_size: int
    too_long: str = "error"
    suppressed: tuple[int, ...] = ()
    reads_only_masks: bool = True
    frame: Frame = NO_FRAME
    packing: bool | None = None
    use_chat_template: bool = True
    template_kwargs: dict | None = None
    train_on: str = "last_turn"

    def __post_init__(self):
        for name, known in (("too_long", TOO_LONG), ("train_on", TRAIN_ON)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}, got {getattr(self, name)!r}.")
        if self.max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {self.max_length}.")
        if self.template_kwargs and not (self.use_chat_template and has_chat_template(self.tokenizer)):
            raise ValueError("`chat_template_kwargs` is given, and no chat template is used: leave it out.")

    @property
    def packs(self) -> bool:
        """Are `text` rows laid end to end?"""
        return not self.frame.closing if self.packing is None else self.packing

    def answer(self, row: dict, number: int) -> dict[str, torch.Tensor] | None:
        """The example of a row with an answer, or None if it is too long and such rows are dropped."""
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
        if learned[0] and not self.reads_only_masks:
            raise ValueError(
                f"Row {number} of the data set has an empty prompt, and this model (ESM, token_dropout) cannot read a "
                "row of masks alone. Give it a prompt, or pass the texts as `text`."
            )
        trained = {token for token, learn in zip(ids, learned, strict=True) if learn}
        if found := sorted(set(self.suppressed) & trained):
            raise ValueError(
                f"Row {number} of the data set holds {self.tokenizer.decode(found)!r} (id {found[0]}) where it is to "
                "be learned, and the model never writes that token. Remove it from the data."
            )
        self._check(ids, number)
        return self._fitting(ids, learned, number)

    def text(self, row: dict, number: int) -> dict[str, torch.Tensor] | None:
        """The example of a row of plain text, one sequence with its special tokens; None if empty or dropped."""
        content = self._content(row, number)
        if not content:
            return None
        if self.frame.closing:
            before, after, ends = list(self.frame.opening), list(self.frame.closing), []
        else:
            (before,), after, ends = prompt_ids([""], self.tokenizer), [], self._end()
        learned = [token not in self.suppressed for token in [*content, *ends]]
        return self._fitting(
            [*before, *content, *ends, *after], [False] * len(before) + learned + [False] * len(after), number
        )

    def packed_text(self, row: dict, number: int) -> list[int]:
        """Ids of a row of plain text, closed by the end token, to be packed; empty for an empty text."""
        content = self._content(row, number)
        return [*content, *(self._end() or self.frame.closing)] if content else []

    def block(self, ids: list[int]) -> dict[str, torch.Tensor]:
        """An example in which every token may be masked, or every token but the first."""
        learned = torch.tensor([token not in self.suppressed for token in ids])
        learned[0] &= self.reads_only_masks
        return {"input_ids": torch.tensor(ids), "trainable_mask": learned}

    def _fitting(self, ids: list[int], learned: list[bool], number: int) -> dict[str, torch.Tensor] | None:
        if len(ids) <= self.max_length:
            if all(learned) and not self.reads_only_masks:
                learned = [False, *learned[1:]]
            return {"input_ids": torch.tensor(ids), "trainable_mask": torch.tensor(learned)}
        if self.too_long == "drop":
            return None
        raise ValueError(
            f"Row {number} of the data set has {len(ids)} tokens, and --max_length is {self.max_length}. Raise it up "
            "to what the model takes, shorten the row, or pass --too_long drop; --packing true cuts rows of text."
        )

    def _plain(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        """Prompt and completion without a template."""
        (given,), answer = prompt_ids([prompt], self.tokenizer), self._bare(completion)
        if not answer:
            return given, [False] * len(given)
        after = list(
            self.frame.closing
        )  # an encoder's closing token is given: it writes as many tokens as are asked for
        if not after and (end := self.tokenizer.eos_token_id) is not None and answer[-1] != end:
            answer = [*answer, end]
        return [*given, *answer, *after], [False] * len(given) + [True] * len(answer) + [False] * len(after)

    def _chat(self, row: dict, number: int) -> list[dict] | None:
        """The chat of a row, or None for a prompt and a completion that are plain text."""
        if "messages" in row:
            if not has_chat_template(self.tokenizer):
                raise ValueError(
                    "The data set holds `messages`, and the tokenizer has no chat template to write them by."
                )
            if not self.use_chat_template:
                raise ValueError("`messages` need the chat template: leave out --no_chat_template.")
            return row["messages"]
        for name, value in (("prompt", row["prompt"]), ("answer", row["completion"])):
            if not isinstance(value, str):
                raise ValueError(f"Row {number} of the data set: its {name} is no text but {value!r}.")
        if not (self.use_chat_template and has_chat_template(self.tokenizer)):
            return None
        if not row["completion"]:
            raise ValueError(f"Row {number} of the data set has no trainable token: its answer is empty.")
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]

    def _content(self, row: dict, number: int) -> list[int]:
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


def read_rows(
    dataset: str,
    *,
    split: str = "train",
    name: str | None = None,
    revision=None,
    streaming: bool = False,
    flag: str = "--dataset",
):
    """Rows of a Hub data set, or of a local file or folder of txt, jsonl, json, csv or parquet files.

    Args:
        dataset: Hub id, file or folder. A line of a txt file is a row.
        split: of a Hub data set; local files are all of it.
        name, revision: configuration, and commit, of a Hub data set.
        streaming: read row by row, keeping nothing.
        flag: what errors call the data set.
    Returns:
        `datasets.Dataset`, or `IterableDataset` when streaming.
    Raises:
        ValueError: nothing readable there, or `datasets` cannot load it.
        ImportError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'`{flag}` needs the datasets library: pip install "prism-pipelines[train]".') from error
    path = Path(dataset)
    if not path.exists():
        try:
            return datasets.load_dataset(dataset, name, split=split, revision=revision, streaming=streaming)
        except Exception as error:  # a dozen kinds, of several libraries
            raise ValueError(
                f"`{flag}` {dataset!r} is no local file, and loading it from the Hub failed: {error}"
            ) from None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    readable = [file for file in files if file.suffix in READERS]
    kinds = {READERS[file.suffix] for file in readable}
    if len(kinds) != 1:
        found = f"{len(kinds)} kinds of files ({', '.join(sorted(kinds))})" if kinds else "no such file"
        raise ValueError(f"`{flag}` {dataset!r} must be one kind of {', '.join(READERS)} files; it has {found}.")
    if not any(file.stat().st_size for file in readable):
        raise ValueError(f"`{flag}` {dataset!r} is empty.")
    names = [str(file) for file in readable]
    try:
        return datasets.load_dataset(kinds.pop(), data_files=names, split="train", streaming=streaming)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise ValueError(f"`{flag}` {dataset!r} cannot be read: {error.__cause__ or error}") from None


def encode_rows(rows: Iterable[dict], encoder: RowEncoder) -> Iterator[dict[str, torch.Tensor]]:
    """Examples of rows: one for each answer and each text; or blocks of `max_length` tokens of packed text.

    What is left after the last whole block is an example of its own if it is all there is, and else dropped.

    Raises:
        ValueError: columns of no known kind, or what `RowEncoder` raises.
    """
    buffer, blocks = [], 0
    for number, row in enumerate(rows):
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


def row_kind(row: dict) -> str:
    """Which kind of row it is, by its columns: "chat", "prompt" or "text".

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


def examples_line(rows, encoder: RowEncoder, examples) -> str:
    """One line that says how rows became examples, with the first example, its given tokens in brackets.

    Args:
        rows: as they were read.
        encoder: made the examples of them.
        examples: at least one; those of a stream are not counted.
    """
    kind, streamed = row_kind(next(iter(rows))), isinstance(examples, IterableDataset)
    first = next(iter(examples))
    plain = encoder.use_chat_template and has_chat_template(encoder.tokenizer)
    way = {
        "text": f"packed end to end into {encoder.max_length} tokens" if encoder.packs else "one sequence a row",
        "chat": f"by the chat template, trained on {encoder.train_on.replace('_', ' ')}",
        "prompt": "by the chat template" if plain else "as plain text",
    }[kind]
    if kind == "text" and encoder.frame.closing and not encoder.packs:
        around = [encoder.tokenizer.decode(list(ids)) for ids in encoder.frame]
        way += f" between {around[0]} and {around[1]}"
    count = "rows" if streamed else f"{len(examples)} examples"
    parts = []
    for learned, run in itertools.groupby(
        zip(first["input_ids"].tolist(), first["trainable_mask"].tolist(), strict=True), key=lambda pair: pair[1]
    ):
        text = encoder.tokenizer.decode([token for token, _ in run])
        parts.append(text if learned else f"⟦{text}⟧")
    shown = "".join(parts)
    shown = f"{shown[:150]} ... {shown[-100:]}" if len(shown) > 260 else shown
    return f"{count} of {kind} rows, {way}. The first, with what is given in ⟦⟧: {shown!r}"


class StreamedExamples(IterableDataset):
    """Examples made as they are read, pass after pass without an end.

    A data set that ended would have the Trainer begin an epoch that it cannot count, and a resumed run skip to the
    wrong place; so a run skips what it has read, over all passes, and reads on.

    Args:
        rows: what gives the rows anew each time it is iterated.
        encoder: makes examples of them.
        skip: examples left out at the beginning (they are held out).
    Raises:
        ValueError: on iteration, there is no example.
    """

    def __init__(self, rows: Iterable[dict], encoder: RowEncoder, skip: int):
        self.rows, self.encoder, self.skip = rows, encoder, skip

    def __iter__(self):
        while True:
            empty = True
            for example in itertools.islice(encode_rows(self.rows, self.encoder), self.skip, None):
                empty = False
                yield example
            if empty:
                raise ValueError(f"The data set is empty after the {self.skip} examples that are held out.")


def split_examples(rows, encoder: RowEncoder, num_eval: int, streaming: bool = False, eval_rows=None):
    """Training and held-out examples.

    Args:
        rows: of the training data; iterable.
        encoder: makes examples of them.
        num_eval: most held-out examples.
        streaming: hold out the first examples and read the others as training goes.
        eval_rows: rows of their own to hold out; None holds out the first `EVAL_SHARE` of `rows`, at least one.
    Returns:
        (training data set, held-out list); the list is empty if `num_eval` is 0 or there is one example only.
    Raises:
        ValueError: no example at all, or what `encode_rows` raises.
    """
    held_out = [] if eval_rows is None else list(itertools.islice(encode_rows(eval_rows, encoder), num_eval))
    if eval_rows is not None and not held_out and num_eval:
        raise ValueError("The held-out data set is empty: none of its rows gives an example.")
    if streaming:
        first = list(itertools.islice(encode_rows(rows, encoder), 0 if eval_rows is not None else num_eval))
        return StreamedExamples(rows, encoder, len(first)), held_out or first
    examples = list(encode_rows(rows, encoder))
    if not examples:
        dropped = " (rows longer than --max_length are dropped)" if encoder.too_long == "drop" else ""
        raise ValueError(f"`--dataset` is empty: none of its rows gives an example{dropped}.")
    if eval_rows is not None or len(examples) == 1:
        return examples, held_out
    count = min(num_eval, max(1, int(len(examples) * EVAL_SHARE)))
    return examples[count:], examples[:count]


def pad_batch(examples: list[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
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
