"""The files of a run of many prompts: its settings, what each process has finished, and the output made of that.

`OUT.part-00000.jsonl` and so on hold what each process has finished, one line a batch. A line counts once its newline
is on disk: a kill costs at most a batch for each process and can neither lose nor double a prompt. `OUT.run.json` says
which run they belong to. Whichever process finds everything done writes OUT and removes the parts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

from ..hub.files import module_digest


def run_file(out: Path) -> Path:
    """Where the settings of the run that writes `out` stand."""
    return out.with_name(out.name + ".run.json")


def part_files(out: Path) -> list[Path]:
    """Part files of `out`, by number."""
    return sorted(out.parent.glob(f"{_literal(out.name)}.part-*.jsonl"))


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def check_run(out: Path, settings: dict) -> bool:
    """Whether `out` is already complete; refuses files of another run.

    Args:
        out: the output file.
        settings: of this run, as `run_settings` gives them.
    Raises:
        ValueError: there is an output, or a beginning of one, made by other settings or by something else.
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


def run_settings(pipe, rows: list[dict], generation: dict) -> dict:
    """What decides the output: the rows, the settings, and digests of tokenizer, model, head and scheduler."""
    from ..schedulers.validation import own_fields  # with torch, which the rest of this file does without

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
    """What is done: row number -> its result. A last line without its newline is half written: not done.

    Raises:
        ValueError: a whole line that is no batch.
    """
    done = {}
    for path in part_files(out):
        *lines, _ = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                batch = {row.pop("row"): row for row in json.loads(line)}
            except (ValueError, KeyError, AttributeError, TypeError):
                raise ValueError(f"{path}, line {number} is damaged; delete that file to redo its share.") from None
            done |= {row: result for row, result in batch.items() if row not in done}
    return done


@contextmanager
def part_writer(path: Path):
    """A function that appends a batch to a part file; when it returns the batch is on the disk.

    Raises:
        ValueError: another process is writing the file.
    """
    with path.open("ab") as file:
        if not lock(file, exclusive=True):
            raise ValueError(f"Another process is writing {path}: is the run still going?")
        with path.open("rb") as whole:
            file.truncate(whole.read().rfind(b"\n") + 1)

        def write(batch: list[dict]) -> None:
            file.write(json.dumps(batch).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        yield write


def lock(file, exclusive: bool, wait: bool = False) -> bool:
    """Whether the file could be locked until it is closed. Where the system has no flock, nothing is locked."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def merge(out: Path, total: int, lines: Callable[[dict[int, dict]], Iterable[str]]) -> bool:
    """Write `out` if every row is done, and remove the parts.

    Args:
        total: rows that must be done.
        lines: from the results by row number the parts of the output, in order.
    Returns:
        whether `out` is complete; False if rows are still to do.
    """
    with run_file(out).open("rb") as turn:
        lock(turn, exclusive=True, wait=True)  # two processes may find at once that all is done
        if not out.exists():
            done = read_parts(out)
            if len(done) < total:
                return False
            beside = out.with_name(out.name + ".tmp")
            with beside.open("w", encoding="utf-8", newline="") as file:
                file.writelines(lines(done))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, out)
        for path in part_files(out):
            path.unlink()
    return True
