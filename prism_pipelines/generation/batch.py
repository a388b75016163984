"""Generation for thousands of prompts: a file in, a file out, in input order, resumable, on one process or several.

What a run writes, and why a kill neither loses nor doubles a prompt, stands in `output_files.py`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from .output_files import check_run, lock, merge, part_files, part_writer, read_parts, run_file, run_settings

WRITTEN = ("text", "nfe", "ended", "error")  # keys that the output adds to a row
LOG_SECONDS = 30


# --- prompts ----------------------------------------------------------------------------------------------------------


def read_prompts(path) -> list[dict]:
    """Rows of a file of prompts: .jsonl, one object a line (blank lines are no rows), or .txt, one prompt a line.

    Raises:
        ValueError, TypeError: another ending, not UTF-8, a line that is no JSON, or what `check_rows` refuses.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"A file of prompts must end in .jsonl or .txt, got {str(path)!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of prompts {str(path)!r}.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from None
    lines = text.split("\n")  # not splitlines(): JSON strings may hold U+2028
    while lines and not lines[-1].strip():
        lines.pop()
    if path.suffix == ".txt":
        rows = [line.rstrip("\r") for line in lines]
    else:
        rows = []
        numbers = [number for number, line in enumerate(lines, 1) if line.strip()]  # a blank line is no row
        for number in numbers:
            try:
                rows.append(json.loads(lines[number - 1]))
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from None
        return check_rows(rows, lambda i: f"{path}, line {numbers[i]}")
    return check_rows(rows, lambda i: f"{path}, line {i + 1}")


def check_rows(rows, place=lambda i: f"row {i}") -> list[dict]:
    """Rows as dicts with exactly one of "prompt" and "messages", and an "id" that no other has.

    Args:
        rows: strings, or dicts with "prompt": str or "messages": [{"role", "content"}, ...]; an "id" (str or int) is
            optional and defaults to the row's number, from 0. Other keys are kept.
        place: what row i is called in errors.
    Raises:
        ValueError: none, an empty prompt, an id given twice, or a key that the output writes; with the place.
        TypeError: something that is no row.
    """
    checked, seen = [], {}
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


def _check_text(text, place: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{place} must be a string, got {text!r:.80}.")
    if not text.strip():
        raise ValueError(f"{place} is empty.")


def _check_messages(messages, place: str) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise TypeError(f'{place}: "messages" must be a list of {{"role", "content"}}, got {messages!r:.80}.')
    for one in messages:
        if not isinstance(one.get("role"), str) or "content" not in one:
            raise TypeError(f'{place}: a message is {{"role": ..., "content": ...}}, got {one!r:.80}.')
    _check_text(messages[-1]["content"], f"{place}: the last message")


def prompt_texts(
    rows: list[dict],
    tokenizer,
    use_chat_template: bool = True,
    template_kwargs: dict | None = None,
    continue_final_message: bool = False,
) -> list[str]:
    """What is continued for each row: the tokenizer's chat template around it if there is one, as the pipeline does.

    Raises:
        ValueError: messages, and no chat template; `template_kwargs` for none; with `continue_final_message` a row
            whose last message is not the assistant's.
    """
    from ..sampling.encoding import chat_texts, has_chat_template

    template = has_chat_template(tokenizer)
    if template_kwargs and not (template and use_chat_template):
        raise ValueError("`chat_template_kwargs` is given, and no chat template is used.")
    texts = []
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


def plan_batches(lengths: list[int], batch_size: int, groups: list | None = None) -> list[list[int]]:
    """Rows of like length together, the longest first, so that little is padding and a lack of memory shows at once.

    Depends on its arguments alone, not on the number of processes.

    Args:
        lengths: tokens of each prompt.
        batch_size: rows of a batch, at least 1; the last batch of a group may have less.
        groups: rows of different groups never share a batch; None for one group.
    Returns:
        lists of row numbers; each row is in exactly one.
    """
    groups = [0] * len(lengths) if groups is None else groups
    batches, last = [], {}
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if len(last.get(groups[i], ())) in (0, batch_size):
            batches.append([])
            last[groups[i]] = batches[-1]
        last[groups[i]].append(i)
    return batches


def batch_groups(pipe, lengths: list[int], gen_length: int, block_length: int | None) -> list[int]:
    """Which rows may share a batch without one changing what another gets.

    The steps of a block-causal model are spread over the blocks of the row that has most, so rows with another number
    of blocks go elsewhere.
    """
    spec = pipe.spec
    if spec.attention != "block_causal":
        return [0] * len(lengths)
    return [num_blocks(length, gen_length, block_length or spec.block_length) for length in lengths]


def num_blocks(length: int, gen_length: int, block_length: int) -> int:
    """Blocks of a block-causal model that the tokens after a prompt of that length touch."""
    return (length + gen_length - 1) // block_length - length // block_length + 1


def check_steps(pipe, names: list[str], lengths: list[int], gen_length: int, block_length, steps: int | None) -> None:
    """Raise a ValueError if a prompt's tokens touch more blocks of a block-causal model than there are steps.

    Args:
        names: of the prompts, for the error.
        lengths: tokens of each.
        gen_length, block_length: as the pipeline's.
        steps: `num_inference_steps`; None needs no check.
    """
    spec = pipe.spec
    if steps is None or spec.attention != "block_causal":
        return
    for name, length in zip(names, lengths, strict=True):
        needed = num_blocks(length, gen_length, block_length or spec.block_length)
        if needed > steps:
            raise ValueError(
                f"{steps} steps are too few: {name} has {length} tokens, and the {gen_length} after it touch {needed} "
                f"blocks, each of which needs one. Pass at least {needed}."
            )


# --- generation -------------------------------------------------------------------------------------------------------


def generate_many(
    pipe,
    prompts,
    out,
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
    """Continue every prompt of a file and write a JSON line for each, in input order. Called again, it goes on.

    Row i is drawn with its own generator, seeded by `seed` and i, and batches do not depend on the number of processes,
    so neither does the output. Another `batch_size` changes a row only by the rounding of sums. In a process group
    (torch.distributed) each process takes its share; all must pass the same arguments.

    Args:
        pipe: a `PrismPipeline` with a tokenizer, on its device.
        prompts: path of a .jsonl or .txt file, or a list of rows; see `read_prompts` and `check_rows`.
        out: path of the output, a .jsonl file. A row of it is the input row with "text", "nfe" (forward passes) and
            "ended": false if no end token or stop string was written in `gen_length` tokens, null if the model has no
            end token.
        gen_length, block_length, num_inference_steps, temperature, top_p, cfg_scale, stop: of the pipeline.
        eos_early_stop, threshold, cache, cache_refresh_interval: of the pipeline.
        use_chat_template, chat_template_kwargs, continue_final_message: of the pipeline.
        batch_size: prompts a forward.
        seed: of all rows, not negative.
        max_prompts: only that many, from the first.
        too_long: what to do with a prompt that does not fit into the model with `gen_length` tokens after it: "error",
            or "skip": its row then has "text": null and an "error".
        progress: draw a bar on stderr, in the first process.
    Returns:
        {"prompts", "skipped", "not_ended", "generated", "seconds", "prompts_per_second", "tokens_per_second"}. The last
        four are of this call and process, tokens those before the end token; the first three are None while other
        processes are still at work.
    Raises:
        ValueError, TypeError: bad input, an output of another run, or out of memory.
        OSError: no such file or folder.
    """
    import torch

    from ..sampling.encoding import prompt_ids

    out, rank, num_processes = Path(out), *_place()
    for name, value, least in (("batch_size", batch_size, 1), ("max_prompts", max_prompts, 1), ("seed", seed, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
    if too_long not in ("error", "skip"):
        raise ValueError(f'`too_long` must be "error" or "skip", got {too_long!r}.')
    if pipe.tokenizer is None:
        raise ValueError("The pipeline has no tokenizer, so it cannot read prompts. Load it with tokenizer=.")
    rows = check_rows(prompts) if isinstance(prompts, (list, tuple)) else read_prompts(prompts)
    rows = rows[:max_prompts]
    texts = prompt_texts(rows, pipe.tokenizer, use_chat_template, chat_template_kwargs, continue_final_message)
    lengths = [len(ids) for ids in prompt_ids(texts, pipe.tokenizer)]
    skipped = _too_long(pipe, rows, lengths, gen_length, too_long)
    names = [f"the prompt with id {row['id']!r}" for row in rows]
    check_steps(pipe, names, lengths, gen_length, block_length, num_inference_steps)

    call = {
        "gen_length": gen_length,
        "block_length": block_length,
        "num_inference_steps": num_inference_steps,
        "temperature": temperature,
        "top_p": top_p,
        "cfg_scale": cfg_scale,
        "stop": stop,
        "eos_early_stop": eos_early_stop,
        "threshold": threshold,
        "cache": cache,
        "cache_refresh_interval": cache_refresh_interval,
    }
    generation = call | {"seed": seed, "use_chat_template": use_chat_template, "too_long": too_long}
    generation["chat_template_kwargs"] = chat_template_kwargs
    generation["continue_final_message"] = continue_final_message
    settings = run_settings(pipe, rows, generation)
    todo, complete = [], check_run(out, settings)
    if not complete:
        for path in part_files(out):
            with path.open("rb") as file:
                if not lock(file, exclusive=False):
                    raise ValueError(f"Another process is writing {path}: is the run still going?")
        done = read_parts(out)
        for batch in plan_batches(lengths, batch_size, batch_groups(pipe, lengths, gen_length, block_length)):
            batch = [i for i in batch if i not in done and i not in skipped]
            todo += [batch] if batch else []
    _wait()  # nobody writes before everybody has read, so that the shares fit together
    if rank == 0 and not complete:
        beside = run_file(out).with_suffix(".tmp")
        beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, run_file(out))
    _wait()

    start, generated, tokens = time.perf_counter(), 0, 0
    share = todo[rank::num_processes]
    title = "prompts" if num_processes == 1 else f"prompts of process 1 of {num_processes}"
    with _bar(title, sum(map(len, share)), progress and rank == 0) as advance:
        if share:
            with part_writer(out.with_name(f"{out.name}.part-{rank:05d}.jsonl")) as write:
                for batch in share:
                    generators = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**32) for i in batch]
                    try:
                        results = _generate(pipe, [texts[i] for i in batch], generators, call)
                    except torch.OutOfMemoryError as error:
                        raise ValueError(
                            f"Out of memory with {len(batch)} prompts of up to {lengths[batch[0]]} tokens. Lower "
                            f"`batch_size` ({batch_size}) and start again: what is done is kept. "
                            f"{error.__cause__ or error}"
                        ) from None
                    tokens += sum(count for _, count in results)
                    write([{"row": i} | result for i, (result, _) in zip(batch, results, strict=True)])
                    generated += len(batch)
                    advance(len(batch), tokens)
    seconds = time.perf_counter() - start
    merged = merge(out, rows, skipped) or {"prompts": None, "skipped": None, "not_ended": None}
    return merged | {
        "generated": generated,
        "seconds": seconds,
        "prompts_per_second": generated / seconds,
        "tokens_per_second": tokens / seconds,
    }


def _too_long(pipe, rows, lengths, gen_length, too_long) -> dict[int, str]:
    from ..models.checks import max_length

    limit, skipped, closing = max_length(pipe.model.config), {}, len(pipe.text_frame.closing)
    for i, length in enumerate(lengths):
        if not length:
            raise ValueError(f"The prompt with id {rows[i]['id']!r} has no tokens.")
        if limit is not None and length + gen_length + closing > limit:
            why = f"too long: {length + closing} tokens and {gen_length} to generate, the model takes {limit}"
            if too_long == "error":
                raise ValueError(
                    f"The prompt with id {rows[i]['id']!r} is {why}. Shorten it, lower gen_length, or pass "
                    'too_long="skip" (--too_long skip) to record it in the output without a text.'
                )
            skipped[i] = why
    return skipped


def _generate(pipe, texts: list[str], generators: list, call: dict) -> list[tuple[dict, int]]:
    """For each text its result, and how many tokens it has before its end token."""
    from ..sampling.stopping import end_tokens, finished_rows, generated_prefix, stop_strings

    out = pipe(texts, generator=generators, use_chat_template=False, **call)
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


def _place() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _wait() -> None:
    """Until every process is here."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


@contextmanager
def _bar(title: str, total: int, shown: bool):
    """A bar over prompts with the rate and the time left; yields what reports (prompts just done, tokens so far)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    lines = shown and not console.is_terminal  # a log gets a line now and then in place of a bar
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not shown or not console.is_terminal
    ) as bar:
        line, start = bar.add_task(title, total=total, rate=""), time.perf_counter()
        done, told = 0, start

        def report(count, tokens):
            nonlocal done, told
            now = time.perf_counter()
            done, rate = done + count, f"{tokens / (now - start):,.0f} tokens/s"
            bar.update(line, advance=count, rate=rate)
            if lines and now - told >= LOG_SECONDS:
                told = now
                print(f"{title}: {done} of {total}, {rate}", file=sys.stderr, flush=True)

        yield report
