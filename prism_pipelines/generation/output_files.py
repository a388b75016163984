"""The files of a run of many prompts: its settings, the finished batches of each process, and the output.

`OUT.part-00000.jsonl` and so on hold the finished batches of each process, one per line. A line counts when its newline
is on disk. So a kill costs at most one batch of each process, and no prompt is lost or doubled. `OUT.run.json` says to
which run the parts belong. The process that finds everything done writes OUT and removes the parts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from ..atomic_files import atomic_file

if TYPE_CHECKING:
    from ..pipeline_prism import PrismPipeline

Lines = Callable[[dict[int, dict]], Iterable[str]]  # results by row number -> the parts of the output, in order
PATIENCE = 1.0  # seconds that a lock may be held by a process that only looks whether it is free


def run_file(out: Path) -> Path:
    """Path of the file with the settings of the run that writes `out`."""
    return out.with_name(out.name + ".run.json")


def part_files(out: Path) -> list[Path]:
    """Part files of `out`, by number."""
    return sorted(out.parent.glob(f"{_literal(out.name)}.part-*.jsonl"))


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def check_run(out: Path, settings: dict) -> bool:
    """Is `out` already complete? Refuses files of another run.

    Args:
        out: the output file.
        settings: the settings of this run, from `run_settings`.
    Raises:
        ValueError: there is an output, or a part of one, from other settings or from another program.
        OSError: the folder is missing.
    """
    if not out.parent.is_dir():
        raise FileNotFoundError(f"The folder of the output does not exist: {str(out.parent)!r}.")
    record, parts = run_file(out), part_files(out)
    fresh = f"Pass another --out, or delete {out.name}, {record.name} and {out.name}.part-*.jsonl to start again."
    if not record.exists():
        if out.exists() or parts:
            raise ValueError(f"{out if out.exists() else parts[0]} exists and is not of a run of this command. {fresh}")
        return False
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{record} is not a record of a run. {fresh}") from None
    if known != settings and not out.exists() and not read_parts(out):
        return False  # that run was refused, or killed, before its first batch
    if known != settings:
        names = [name for name in settings | known if settings.get(name) != known.get(name)]
        told = "; ".join(f"{name} was {known.get(name)!r:.60} and is {settings.get(name)!r:.60}" for name in names)
        raise ValueError(f"{out} belongs to another run: {told}. {fresh}")
    return out.exists()


def run_settings(pipe: PrismPipeline, rows: list[dict], generation: dict) -> dict:
    """All that the output depends on: digests of rows, tokenizer, model and head, the scheduler, and the settings."""
    # With torch, which `prism --help` does without.
    from ..hub.fingerprints import module_digest
    from ..schedulers.validation import own_fields

    settings = {"prompts": len(rows), "prompts_sha256": _sha256(json.dumps(rows).encode())} | generation
    scheduler = own_fields(pipe.scheduler)
    settings["scheduler"] = f"{type(pipe.scheduler).__name__} {json.dumps(scheduler, sort_keys=True, default=str)}"
    settings["mdm_spec"] = _sha256(json.dumps(pipe.config.mdm_spec, sort_keys=True, default=str).encode())
    words = pipe.tokenizer
    written_with = [words.chat_template, words.special_tokens_map, sorted(words.get_vocab().items())]
    settings["tokenizer"] = _sha256(json.dumps(written_with, default=str).encode())
    for name in ("model", "quality_head"):
        module = getattr(pipe, name)
        settings[name] = None if module is None else module_digest(module)
    return json.loads(json.dumps(settings))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read_parts(out: Path) -> dict[int, dict]:
    """Finished rows: row number -> result. A last line without a newline is half written, and does not count.

    Raises:
        ValueError: a whole line that is no batch.
    """
    done: dict[int, dict] = {}
    for path in part_files(out):
        *lines, _ = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                batch = {row.pop("row"): row for row in json.loads(line)}
            except (ValueError, KeyError, AttributeError, TypeError):
                raise ValueError(f"{path}, line {number} is damaged; delete that file to redo its share.") from None
            done |= {row: result for row, result in batch.items() if row not in done}
    return done


def part_lock(path: Path) -> FileLock:
    """The lock that the process holds that writes a part file."""
    return FileLock(f"{path}.lock")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a part file.

    Raises:
        ValueError: another process holds it.
    """
    try:
        with part_lock(path).acquire(timeout=PATIENCE):
            yield
    except Timeout:
        raise ValueError(f"Another process is writing {path}: is the run still going?") from None


@contextmanager
def part_writer(path: Path) -> Iterator[Callable[[list[dict]], None]]:
    """A function that appends a batch to a part file; when it returns, the batch is on the disk.

    Raises:
        ValueError: another process is writing the file.
    """
    with locked(path), path.open("ab") as file:
        with path.open("rb") as whole:
            file.truncate(whole.read().rfind(b"\n") + 1)

        def write(batch: list[dict]) -> None:
            file.write(json.dumps(batch).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        yield write


def merge(out: Path, total: int, lines: Lines) -> bool:
    """Write `out` if every row is done, and remove the parts and the locks.

    Args:
        out: the output file.
        total: rows that must be done.
        lines: makes the output.
    Returns:
        whether `out` is complete; False if rows are still to do.
    """
    if out.exists() and not part_files(out):
        return True
    with part_lock(run_file(out)):  # two processes may find at once that all is done
        if not out.exists():
            done = read_parts(out)
            if len(done) < total:
                return False
            with atomic_file(out) as file:
                file.writelines(lines(done))
        for path in [*part_files(out), *out.parent.glob(f"{_literal(out.name)}.*.lock")]:
            path.unlink(missing_ok=True)
    return True
