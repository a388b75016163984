"""Batches of the rows of a file, filled one after the other by one process or several; a killed run goes on.

What a run writes, and why a kill neither loses nor doubles a row, stands in `output_files.py`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

from .output_files import check_run, lock, merge, part_files, part_writer, read_parts, run_file

LOG_SECONDS = 30


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


def run_batches(
    out: Path,
    settings: dict,
    batches: list[list[int]],
    lengths: list[int],
    fill: Callable[[list[int]], list[tuple[dict, int]]],
    lines: Callable[[dict[int, dict]], Iterable[str]],
    unit: str,
    progress: bool,
) -> dict:
    """Fill every batch that is not done yet, keep what is done on the disk, and write the output when all is.

    In a process group (torch.distributed) each process takes its share; all must pass the same arguments.

    Args:
        out: path of the output.
        settings: what decides it; a run with others is refused, see `check_run`.
        batches: of `plan_batches`, without the rows that are not to be filled.
        lengths: tokens of each row, for the error of a batch that is too large.
        fill: gives for each row of a batch its result, a dict that is JSON, and how many tokens were written.
        lines: from the results by row number the parts of the output, in order.
        unit: what a row is called, in the plural.
        progress: draw a bar on stderr, in the first process.
    Returns:
        {"generated", "seconds", "tokens"} of this call and process; {"complete"}: whether the output is written.
    Raises:
        ValueError: an output of another run, one that is being written, or out of memory.
        OSError: the folder is missing.
    """
    import torch

    rank, num_processes = _place()
    todo, complete = [], check_run(out, settings)
    if not complete:
        for path in part_files(out):
            with path.open("rb") as file:
                if not lock(file, exclusive=False):
                    raise ValueError(f"Another process is writing {path}: is the run still going?")
        done = read_parts(out)
        for batch in batches:
            batch = [i for i in batch if i not in done]
            todo += [batch] if batch else []
    _wait()  # nobody writes before everybody has read, so that the shares fit together
    if rank == 0 and not complete:
        beside = run_file(out).with_suffix(".tmp")
        beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, run_file(out))
    _wait()

    start, generated, tokens = time.perf_counter(), 0, 0
    share = todo[rank::num_processes]
    title = unit if num_processes == 1 else f"{unit} of process 1 of {num_processes}"
    with _bar(title, sum(map(len, share)), progress and rank == 0) as advance:
        if share:
            with part_writer(out.with_name(f"{out.name}.part-{rank:05d}.jsonl")) as write:
                for batch in share:
                    try:
                        results = fill(batch)
                    except torch.OutOfMemoryError as error:
                        most = max(lengths[i] for i in batch)
                        raise ValueError(
                            f"Out of memory with {len(batch)} {unit} of up to {most} tokens. Lower `batch_size` "
                            f"({max(map(len, batches))}) and start again: what is done is kept. "
                            f"{error.__cause__ or error}"
                        ) from None
                    tokens += sum(count for _, count in results)
                    write([{"row": i} | result for i, (result, _) in zip(batch, results, strict=True)])
                    generated += len(batch)
                    advance(len(batch), tokens)
    seconds = time.perf_counter() - start
    written = merge(out, sum(map(len, batches)), lines)
    return {"generated": generated, "seconds": seconds, "tokens": tokens, "complete": written}


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
