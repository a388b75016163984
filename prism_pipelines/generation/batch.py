"""Generation for thousands of prompts: a file in, a file out, in input order, resumable, on one process or several.

`running.py` says how the work is shared and resumed, `output_files.py` what a run writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .input_files import read_json_lines, read_lines
from .output_files import run_settings
from .running import check_counts, plan_batches, run_batches

if TYPE_CHECKING:
    from torch import Generator

    from ..models.protocols import Tokenizer
    from ..pipeline_prism import PrismPipeline

WRITTEN = ("text", "nfe", "ended", "error")  # keys that the output adds to a row


# --- prompts ----------------------------------------------------------------------------------------------------------


def read_prompts(path: str | Path) -> list[dict]:
    """Rows of a file of prompts: .jsonl with an object per line (blank lines do not count), or .txt, a prompt per line.

    Raises:
        ValueError, TypeError: another ending, not UTF-8, a line that is no JSON, or rows that `check_rows` refuses.
        OSError: the file cannot be read.
    """
    path = Path(path)
    lines = read_lines(path, (".jsonl", ".txt"), "prompts")
    if path.suffix == ".txt":
        return check_rows(lines, lambda i: f"{path}, line {i + 1}")
    numbered = read_json_lines(path, lines)
    return check_rows([row for _, row in numbered], lambda i: f"{path}, line {numbered[i][0]}")


def check_rows(rows: Iterable, place: Callable[[int], str] = lambda i: f"row {i}") -> list[dict]:
    """Rows as dicts with exactly one of "prompt" and "messages", and a unique "id".

    Args:
        rows: strings, or dicts with "prompt": str or "messages": [{"role", "content"}, ...]; an "id" (str or int) is
            optional and defaults to the row's number, from 0. Other keys are kept.
        place: gives the name of row i in errors.
    Raises:
        ValueError: no rows, an empty prompt, an id given twice, or a key that the output writes; names the row.
        TypeError: an item is neither a string nor such a dict.
    """
    checked: list[dict] = []
    seen: dict[str | int, int] = {}
    for i, row in enumerate(rows):
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise TypeError(f'{place(i)}: a row is {{"prompt": text}} or {{"messages": [...]}}, got {row!r:.80}.')
        if ("prompt" in row) == ("messages" in row):
            raise ValueError(f'{place(i)} must have one of "prompt" and "messages", its keys are {sorted(row)}.')
        if clash := sorted(set(WRITTEN) & set(row)):
            raise ValueError(f"{place(i)} has the key {clash[0]!r}, which the output writes; rename it.")
        if "prompt" in row:
            _check_text(row["prompt"], f"{place(i)}: the prompt")
        else:
            _check_messages(row["messages"], place(i))
        name = row.get("id", i)
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise TypeError(f"{place(i)}: an id is a string or an integer, got {name!r:.80}.")
        if name in seen:
            raise ValueError(f"{place(i)} has the id {name!r} of {place(seen[name])}.")
        seen[name] = i
        checked.append({"id": name} | row)
    if not checked:
        raise ValueError("There are no prompts.")
    return checked


def _check_text(text: object, place: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{place} must be a string, got {text!r:.80}.")
    if not text.strip():
        raise ValueError(f"{place} is empty.")


def _check_messages(messages: object, place: str) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise TypeError(f'{place}: "messages" must be a list of {{"role", "content"}}, got {messages!r:.80}.')
    for one in messages:
        if not isinstance(one.get("role"), str) or "content" not in one:
            raise TypeError(f'{place}: a message is {{"role": ..., "content": ...}}, got {one!r:.80}.')
    _check_text(messages[-1]["content"], f"{place}: the last message")


def prompt_texts(
    rows: list[dict],
    tokenizer: Tokenizer,
    use_chat_template: bool = True,
    template_kwargs: dict | None = None,
    continue_final_message: bool = False,
) -> list[str]:
    """The text that is continued for each row: in the tokenizer's chat template if it has one, as in the pipeline.

    Raises:
        ValueError: messages or `template_kwargs` without a chat template; or, with `continue_final_message`, a row
            whose last message is not the assistant's.
    """
    from ..sampling.encoding import chat_texts, has_chat_template

    template = has_chat_template(tokenizer)
    if template_kwargs and not (template and use_chat_template):
        raise ValueError("`chat_template_kwargs` is given, and no chat template is used.")
    texts: list[str] = []
    for row in rows:
        if "messages" in row and not template:
            raise ValueError(f'Row {row["id"]!r} has "messages", and the tokenizer has no chat template: use "prompt".')
        chat = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        if "messages" in row or (template and use_chat_template):
            try:
                texts += chat_texts(chat, None, tokenizer, template_kwargs, continue_final_message)
            except ValueError as error:
                raise ValueError(f"Row {row['id']!r}: {error}") from None
        elif continue_final_message:
            raise ValueError(f'`continue_final_message` goes with "messages"; row {row["id"]!r} has a "prompt".')
        else:
            texts.append(row["prompt"])
    return texts


def batch_groups(pipe: PrismPipeline, lengths: list[int], gen_length: int, block_length: int | None) -> list[int]:
    """A group for each row: rows of one group may share a batch without changing each other's result.

    The steps of a block-causal model are spread over the blocks of the row with most blocks, so rows with different
    numbers of blocks are in different groups.
    """
    spec = pipe.spec
    if spec.attention != "block_causal":
        return [0] * len(lengths)
    return [num_blocks(length, gen_length, block_length or spec.block_length or 1) for length in lengths]


def num_blocks(length: int, gen_length: int, block_length: int) -> int:
    """In how many blocks of a block-causal model the `gen_length` tokens after a prompt of `length` tokens lie."""
    return (length + gen_length - 1) // block_length - length // block_length + 1


def check_steps(
    pipe: PrismPipeline,
    names: list[str],
    lengths: list[int],
    gen_length: int,
    block_length: int | None,
    steps: int | None,
) -> None:
    """Raise a ValueError if the tokens after a prompt lie in more blocks of a block-causal model than there are steps.

    Args:
        names: names of the prompts, for the error.
        lengths: number of tokens of each prompt.
        gen_length, block_length: as in the pipeline's call.
        steps: `num_inference_steps`; None needs no check.
    """
    spec = pipe.spec
    if steps is None or spec.attention != "block_causal":
        return
    for name, length in zip(names, lengths, strict=True):
        needed = num_blocks(length, gen_length, block_length or spec.block_length or 1)
        if needed > steps:
            raise ValueError(
                f"{steps} steps are too few: {name} has {length} tokens, and the {gen_length} after it touch {needed} "
                f"blocks, each of which needs one. Pass at least {needed}."
            )


# --- generation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """The rows to continue, their texts and numbers of tokens; and for skipped rows, row number -> reason."""

    rows: list[dict]
    texts: list[str]
    lengths: list[int]
    skipped: dict[int, str]


def generate_many(
    pipe: PrismPipeline,
    prompts: str | Path | list | tuple,
    out: str | Path,
    *,
    gen_length: int,
    block_length: int | None = None,
    num_inference_steps: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    cfg_scale: float | None = None,
    stop: str | list[str] | None = None,
    eos_early_stop: bool = False,
    threshold: float | None = None,
    cache: str = "none",
    cache_refresh_interval: int | None = None,
    use_chat_template: bool = True,
    chat_template_kwargs: dict | None = None,
    continue_final_message: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    max_prompts: int | None = None,
    too_long: str = "error",
    progress: bool = True,
) -> dict:
    """Continue every prompt of a file and write a JSON line for each, in input order. Called again, it is resumed.

    Row i has its own generator, seeded by `seed` and i. The output does not depend on the number of processes. Another
    `batch_size` changes a row only by the rounding of sums. In a process group (torch.distributed) each process takes
    its share; all must pass the same arguments.

    Args:
        pipe: a `PrismPipeline` with a tokenizer, on its device.
        prompts: path of a .jsonl or .txt file, or a list of rows; see `read_prompts` and `check_rows`.
        out: path of the output, a .jsonl file: the input rows with "text", "nfe" (forward passes) and "ended" (false
            if no end token or stop string was written in `gen_length` tokens, null if the model has no end token).
        gen_length, ..., continue_final_message: arguments of the pipeline.
        batch_size: prompts in a forward pass.
        seed: of all rows, at least 0.
        max_prompts: continue only the first `max_prompts` prompts; None for all.
        too_long: for a prompt that does not fit with `gen_length` tokens after it: "error" raises, "skip" writes a row
            with "text": null and an "error".
        progress: draw a bar on stderr, in the first process.
    Returns:
        {"prompts", "skipped", "not_ended", "generated", "seconds", "prompts_per_second", "tokens_per_second"}. The last
        four are about this call and process. The first three are None while other processes are still running.
    Raises:
        ValueError, TypeError: bad input, an output of another run, or out of memory.
        OSError: no such file or folder.
    """
    call: dict = {"gen_length": gen_length, "block_length": block_length, "num_inference_steps": num_inference_steps}
    call |= {"temperature": temperature, "top_p": top_p, "cfg_scale": cfg_scale, "stop": stop}
    call |= {"eos_early_stop": eos_early_stop, "threshold": threshold}
    call |= {"cache": cache, "cache_refresh_interval": cache_refresh_interval}
    _check_arguments(pipe, batch_size, seed, max_prompts, too_long)
    rows = (check_rows(prompts) if isinstance(prompts, (list, tuple)) else read_prompts(prompts))[:max_prompts]
    texts = prompt_texts(rows, pipe.tokenizer, use_chat_template, chat_template_kwargs, continue_final_message)
    work = _prepared(pipe, rows, texts, call, too_long)
    settings = call | {"seed": seed, "use_chat_template": use_chat_template, "too_long": too_long}
    settings |= {"chat_template_kwargs": chat_template_kwargs, "continue_final_message": continue_final_message}
    return _run(pipe, work, Path(out), call, settings, batch_size, progress)


def _check_arguments(pipe: PrismPipeline, batch_size: int, seed: int, max_prompts: int | None, too_long: str) -> None:
    """Raise a ValueError for an argument of `generate_many` that cannot be used."""
    from ..schedulers.validation import is_int, require  # loads torch, which `prism --help` does without

    check_counts(batch_size, seed)
    if max_prompts is not None:
        require(is_int(max_prompts, 1), "max_prompts", max_prompts, "an integer of at least 1")
    require(too_long in ("error", "skip"), "too_long", too_long, '"error" or "skip"')
    if pipe.tokenizer is None:
        raise ValueError("The pipeline has no tokenizer, so it cannot read prompts. Load it with tokenizer=.")


def _prepared(pipe: PrismPipeline, rows: list[dict], texts: list[str], call: dict, too_long: str) -> Prompts:
    """The prompts with their numbers of tokens; refuses those that cannot be continued."""
    from ..sampling.encoding import prompt_ids

    lengths = [len(ids) for ids in prompt_ids(texts, pipe.tokenizer)]
    skipped = _too_long(pipe, rows, lengths, call["gen_length"], too_long)
    names = [f"the prompt with id {row['id']!r}" for row in rows]
    check_steps(pipe, names, lengths, call["gen_length"], call["block_length"], call["num_inference_steps"])
    return Prompts(rows, texts, lengths, skipped)


def _run(
    pipe: PrismPipeline, work: Prompts, out: Path, call: dict, settings: dict, batch_size: int, progress: bool
) -> dict:
    """Generate what is not done yet; what `generate_many` returns."""
    from ..schedulers.token_sampling import seeded_generators

    def fill(batch: list[int]) -> list[tuple[dict, int]]:
        return _generate(pipe, [work.texts[i] for i in batch], seeded_generators(settings["seed"], batch), call)

    def lines(done: dict[int, dict]) -> Iterator[str]:
        for i, row in enumerate(work.rows):
            blank = {"text": None, "nfe": 0, "ended": None, "error": work.skipped.get(i)}
            yield json.dumps(row | (blank if i in work.skipped else done[i])) + "\n"

    groups = batch_groups(pipe, work.lengths, call["gen_length"], call["block_length"])
    batches = plan_batches(work.lengths, batch_size, groups)
    batches = [[i for i in batch if i not in work.skipped] for batch in batches]
    settings = run_settings(pipe, work.rows, settings)
    told = run_batches(out, settings, batches, work.lengths, fill, lines, "prompts", progress)
    counts: dict[str, int | None] = {"prompts": None, "skipped": None, "not_ended": None}
    if told.pop("complete"):
        results = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        not_ended = sum(row["ended"] is False for row in results)
        counts = {"prompts": len(results), "skipped": len(work.skipped), "not_ended": not_ended}
    seconds, tokens = told["seconds"], told.pop("tokens")
    rates = {"prompts_per_second": told["generated"] / seconds, "tokens_per_second": tokens / seconds}
    return counts | told | rates


def _too_long(
    pipe: PrismPipeline, rows: list[dict], lengths: list[int], gen_length: int, too_long: str
) -> dict[int, str]:
    """Why rows do not fit into the model, by number.

    Raises:
        ValueError: a row without tokens, or one that does not fit, unless `too_long` is "skip".
    """
    from ..models.checks import max_length

    limit, closing = max_length(pipe.model.config), len(pipe.text_frame.closing)
    skipped: dict[int, str] = {}
    for i, length in enumerate(lengths):
        if not length:
            raise ValueError(f"The prompt with id {rows[i]['id']!r} has no tokens.")
        if limit is not None and length + gen_length + closing > limit:
            why = f"too long: {length + closing} tokens and {gen_length} to generate, the model takes {limit}"
            if too_long == "error":
                raise ValueError(
                    f"The prompt with id {rows[i]['id']!r} is {why}. Shorten it, lower gen_length, or pass "
                    'too_long="skip" (--too-long skip) to record it in the output without a text.'
                )
            skipped[i] = why
    return skipped


def _generate(pipe: PrismPipeline, texts: list[str], generators: list[Generator], call: dict) -> list[tuple[dict, int]]:
    """For each text its result, and how many tokens it has before its end token."""
    from ..sampling.stopping import end_tokens, finished_rows, generated_prefix, stop_strings

    out: Any = pipe(texts, generator=generators, use_chat_template=False, **call)
    ends = end_tokens(None, pipe.tokenizer, pipe.model, pipe.spec)
    end = out.sequences.shape[1] - len(pipe.text_frame.closing)
    new, stops = out.sequences[:, end - call["gen_length"] : end].cpu(), stop_strings(call["stop"])
    done = finished_rows(new, new == new, pipe.mask_token_id, ends, stops, pipe.tokenizer).tolist()
    results = []
    for text, nfe, row, ended in zip(out.texts, out.nfe_per_row, new, done, strict=True):
        prefix, _ = generated_prefix(row, row == row, pipe.mask_token_id, ends)
        if not ended and len(prefix) < len(row):
            raise ValueError("Masks are left in a generation, so its text would be cut off.")
        results.append(({"text": text, "nfe": nfe, "ended": ended if ends else None}, len(prefix)))
    return results
