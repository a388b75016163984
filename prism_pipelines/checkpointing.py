"""Checkpoints that survive a kill at any moment: written beside, checked by a manifest, renamed into place."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WEIGHTS = "trainable.safetensors"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal_checkpoint(folder: Path, target: Path) -> None:
    """Makes a finished folder a checkpoint: files to disk, then a manifest of their hashes, then the rename.

    Args:
        folder: what was written; gone afterwards.
        target: final name of the checkpoint; replaced if it exists.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in files:
        _sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({str(p.relative_to(folder)): _sha256(p) for p in files}, indent=2) + "\n")
    _sync(manifest)
    _sync(folder)
    if target.exists():
        shutil.rmtree(target)
    os.rename(folder, target)
    _sync(target.parent)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has a manifest and every file in it has the hash it was written with."""
    try:
        hashes = json.loads((checkpoint / MANIFEST).read_text())
        return all(_sha256(checkpoint / name) == value for name, value in hashes.items())
    except (OSError, ValueError):
        return False


def latest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint of a run, or None; damaged ones are passed over with a warning.

    Args:
        output_dir: folder of the run, holding `checkpoint-<step>` folders.
    """
    found = {
        int(m[1]): p for p in Path(output_dir).glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    }
    for step in sorted(found, reverse=True):
        if is_whole(found[step]):
            return str(found[step])
        logger.warning("%s is damaged or incomplete and is passed over; trying the one before it.", found[step])
    return None


class CheckpointedTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints hold the trainable tensors only and appear at once or not at all."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # named_parameters gives a tied weight once, where a plain state_dict would be refused by safetensors.
        tensors = {name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}
        os.makedirs(output_dir or self.args.output_dir, exist_ok=True)
        save_file(tensors, Path(output_dir or self.args.output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        wanted = {name: p for name, p in (model or self.model).named_parameters() if p.requires_grad}
        if saved.keys() != wanted.keys():
            odd = sorted(saved.keys() ^ wanted.keys())
            raise ValueError(
                f"`resume_from_checkpoint` {resume_from_checkpoint!r} was written by a run with other trainable "
                f"tensors; {len(odd)} differ, such as {odd[0]!r}. Resume with the flags of that run."
            )
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(saved[name])

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = Path(self.args.output_dir)
        partial = run_dir / "partial"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        # Everything the Trainer writes goes below args.output_dir, so that is what moves for the time of writing.
        self.args.output_dir = str(partial)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(run_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            seal_checkpoint(partial / name, run_dir / name)
            shutil.rmtree(partial)
            rotate_checkpoints(output_dir=str(run_dir), save_total_limit=self.args.save_total_limit)
