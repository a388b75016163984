"""Checkpoints that survive a kill at any moment: written elsewhere, checked by a manifest, renamed into place."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from transformers import TrainingArguments

from ..atomic_files import write_atomically

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WEIGHTS = "trainable.safetensors"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal_checkpoint(folder: Path, target: Path) -> None:
    """Turns a finished folder into a checkpoint: syncs its files, writes a manifest of their hashes, and renames it.

    Args:
        folder: the folder that was written; it is renamed to `target`.
        target: final name of the checkpoint; replaced if it exists.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in files:
        _sync(path)
    hashes = {str(path.relative_to(folder)): _sha256(path) for path in files}
    write_atomically(folder / MANIFEST, json.dumps(hashes, indent=2) + "\n")
    _sync(folder)
    if target.exists():
        os.rename(target, folder.parent / "replaced")  # a rename, so that at no moment both are gone for long
    os.rename(folder, target)
    _sync(target.parent)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has a manifest and every file in it has the hash it was written with."""
    try:
        hashes = json.loads((checkpoint / MANIFEST).read_text())
        return all(_sha256(checkpoint / name) == value for name, value in hashes.items())
    except (OSError, ValueError):
        return False


def folder_of(args: TrainingArguments) -> Path:
    """The folder of a run, `--output-dir`."""
    return Path(args.output_dir or "")


def checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """The checkpoints in the folder of a run by their step, whole or not."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return {int(match[1]): path for match, path in matches if match}


def drop_later(output_dir: str | Path, step: int) -> None:
    """Deletes the checkpoints after `step`, the step that a run is resumed from.

    Otherwise, after an interruption, `latest` would take one of these, and the Trainer would delete newer ones first.
    """
    for later, path in sorted(checkpoints(output_dir).items()):
        if later > step:
            print(f"Deleting {path}: the run is resumed from step {step}.", flush=True)
            shutil.rmtree(path)


def latest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint of a run, or None; damaged ones are passed over with a warning.

    Args:
        output_dir: folder of the run, holding `checkpoint-<step>` folders.
    """
    found = checkpoints(output_dir)
    for step in sorted(found, reverse=True):
        if is_whole(found[step]):
            return str(found[step])
        logger.warning("%s is damaged or incomplete and is passed over; trying the one before it.", found[step])
    return None
