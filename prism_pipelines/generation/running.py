"""Batches of the rows of a file, filled one after the other by one process or several; a killed run is resumed.

`output_files.py` says what a run writes, and why a kill neither loses nor doubles a row.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..atomic_files import write_atomically
from .output_files import Lines, check_run, locked, merge, part_files, part_writer, read_parts, run_file

Fill = Callable[[list[int]], list[tuple[dict, int]]]  # rows -> of each its result, which is JSON, and tokens written
LOG_SECONDS = 30


def check_counts(batch_size: int, seed: int) -> None:
    """Raise a ValueError for a batch size or a seed that no run can use."""
    from ..schedulers.validation import is_int, require  # loads torch, which `prism --help` does without

    require(is_int(batch_size, 1), "batch_size", batch_size, "an integer of at least 1")
    if not is_int(seed, 0, sys.maxsize):  # larger than a count may be
        raise ValueError(f"`seed` must be an integer of at least 0, got {seed!r}.")


def plan_batches(lengths: list[int], batch_size: int, groups: list | None = None) -> list[list[int]]:
    """Batches of rows of similar length, the longest first: little padding, and too little memory shows at once.

    The batches do not depend on the number of processes.

    Args:
        lengths: tokens of each prompt.
        batch_size: rows of a batch, at least 1; the last batch of a group may have fewer.
        groups: group of each row; rows of different groups never share a batch. None for one group.
    Returns:
        lists of row numbers; each row is in exactly one.
    """
    groups = [0] * len(lengths) if groups is None else groups
    batches: list[list[int]] = []
    last: dict[object, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if len(last.get(groups[i], ())) in (0, batch_size):
            batches.append([])
            last[groups[i]] = batches[-1]
        last[groups[i]].append(i)
    return batches


def run_batches(
    out: Path,
    settings: dict,
    batches: list[list[int]],
    lengths: list[int],
    fill: Fill,
    lines: Lines,
    unit: str,
    progress: bool,
) -> dict:
    """Fill every batch that is not done yet, store finished batches on disk, and write the output when all are done.

    In a process group (torch.distributed) each process takes its share; all must pass the same arguments.

    Args:
        out: path of the output.
        settings: all that the output depends on; files of other settings are refused, see `check_run`.
        batches: from `plan_batches`, without the rows that are not filled.
        lengths: tokens of each row, for the error if a batch does not fit into memory.
        fill: callable that fills a batch.
        lines: callable from results by row number to the parts of the output.
        unit: name of the rows, in the plural, for the bar.
        progress: draw a bar on stderr, in the first process.
    Returns:
        {"generated", "seconds", "tokens"} of this call and process, and "complete": is the output written?
    Raises:
        ValueError: an output of another run, one that is being written, or out of memory.
        OSError: the folder is missing.
    """
    rank, num_processes = _place()
    complete = check_run(out, settings)
    todo = [] if complete else left_to_do(out, batches)
    _wait()  # no process writes before all have read, so that their shares fit together
    if rank == 0 and not complete:
        write_atomically(run_file(out), json.dumps(settings, indent=1) + "\n")
    _wait()

    start, share, tokens = time.perf_counter(), todo[rank::num_processes], 0
    title = unit if num_processes == 1 else f"{unit} of process 1 of {num_processes}"
    with contextlib.ExitStack() as open_files:
        advance = open_files.enter_context(_bar(title, sum(map(len, share)), progress and rank == 0))
        if share:
            write = open_files.enter_context(part_writer(out.with_name(f"{out.name}.part-{rank:05d}.jsonl")))
        for batch in share:
            results = _filled(fill, batch, lengths, unit, max(map(len, batches)))
            tokens += sum(count for _, count in results)
            write([{"row": i} | result for i, (result, _) in zip(batch, results, strict=True)])
            advance(len(batch), tokens)
    seconds = time.perf_counter() - start
    written = merge(out, sum(map(len, batches)), lines)
    return {"generated": sum(map(len, share)), "seconds": seconds, "tokens": tokens, "complete": written}


def left_to_do(out: Path, batches: list[list[int]]) -> list[list[int]]:
    """The batches without the rows that are finished in part files.

    Raises:
        ValueError: a part file that another process is writing, or a damaged one.
    """
    for path in part_files(out):
        with locked(path):
            pass
    done = read_parts(out)
    left = [[i for i in batch if i not in done] for batch in batches]
    return [batch for batch in left if batch]


def _filled(fill: Fill, batch: list[int], lengths: list[int], unit: str, batch_size: int) -> list[tuple[dict, int]]:
    """What `fill` gives for a batch, or a ValueError that says how to need less memory."""
    import torch

    try:
        return fill(batch)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"Out of memory with {len(batch)} {unit} of up to {max(lengths[i] for i in batch)} tokens. Lower "
            f"`batch_size` ({batch_size}) and start again: what is done is kept. {error.__cause__ or error}"
        ) from None


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
def _bar(title: str, total: int, shown: bool) -> Iterator[Callable[[int, int], None]]:
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

        def report(count: int, tokens: int) -> None:
            nonlocal done, told
            now = time.perf_counter()
            done, rate = done + count, f"{tokens / (now - start):,.0f} tokens/s"
            bar.update(line, advance=count, rate=rate)
            if lines and now - told >= LOG_SECONDS:
                told = now
                print(f"{title}: {done} of {total}, {rate}", file=sys.stderr, flush=True)

        yield report
