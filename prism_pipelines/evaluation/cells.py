"""Cells of a comparison: one arm at one number of forward passes with one seed. Each finished cell is a file."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..atomic_files import write_atomically
from ..schedulers.validation import own_fields
from .arms import make_scheduler


@dataclass(frozen=True)
class Cells:
    """The cells of one task in one folder. Finished cells are read; others are run, and written when they are done.

    Args:
        folder: of the files.
        task: as in `run_comparison`.
        task_name: names the model, the data and the settings of the task. A finished cell is used only if the names
            are equal.
        models: pipelines by name, for the "model" of an arm; None is the name for arms without one. Their schedulers
            are put back after each cell.
        temperature: of all arms.
        quality: a metric that each cell must have; None for none.
    """

    folder: Path
    task: Any
    task_name: str
    models: Mapping[str | None, Any]
    temperature: float
    quality: str | None = None

    def path(self, arm: dict, steps: int, seed: int) -> Path:
        """The file of a cell. Its name is readable, and differs if anything differs that the result depends on."""
        settings = {key: value for key, value in arm.items() if key != "name"}
        content = json.dumps([settings, steps, seed, self.temperature, self.task_name], sort_keys=True)
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", arm["name"])
        return self.folder / f"{name}_T{steps}_s{seed}_{hashlib.sha256(content.encode()).hexdigest()[:12]}.json"

    def finished(self, arm: dict, steps: int, seed: int) -> dict | None:
        """A finished cell, or None; see `read_cell`."""
        return read_cell(self.path(arm, steps, seed))

    def get(self, arm: dict, steps: int, seed: int) -> dict:
        """A cell: read if it is finished, else run now."""
        return self.finished(arm, steps, seed) or self.run(arm, steps, seed)

    def run(self, arm: dict, steps: int, seed: int) -> dict:
        """Run the task with the scheduler of an arm, and write the cell.

        Args:
            arm: as `make_scheduler`.
            steps: forward passes, including those of a refinement loop.
            seed: of the task.
        Returns:
            {"arm", "forwards", "seed", "task", "metrics", "rows_read", "device", "seconds"}; "rows_read" is the sum of
            the batch sizes of all forward passes.
        Raises:
            ValueError: metrics that cannot be compared.
        """
        pipe = self.models[arm.get("model")]
        shipped, start = pipe.scheduler, time.perf_counter()
        pipe.scheduler = make_scheduler(arm, self.temperature)
        try:
            with _counted_rows(pipe) as read:
                metrics = self.task(pipe, steps - arm.get("loop_steps", 0), seed)
        finally:
            pipe.scheduler = shipped
        metrics = _checked_metrics(metrics, (arm["name"], steps, seed))
        check_quality(self.quality, metrics)
        cell = {"arm": arm, "forwards": steps, "seed": seed, "task": self.task_name, "metrics": metrics}
        cell |= {"rows_read": read[0], "device": _device_name(pipe), "seconds": time.perf_counter() - start}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path(arm, steps, seed), json.dumps(cell, allow_nan=False) + "\n")
        return cell


def read_cell(path: Path) -> dict | None:
    """A finished cell; None if it is not there.

    Raises:
        ValueError: the file is damaged, or of a version that counted something else.
    """
    if not path.exists():
        return None
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is a damaged cell: {error}. Remove it, and it is made again.") from error
    if "rows_read" not in cell:
        raise ValueError(f"{path} is a cell of an earlier version. Remove it, and it is made again.")
    return cell


def check_quality(quality: str | None, metrics: Collection[str]) -> None:
    """Raise a ValueError if `quality` is not None and not one of the metrics of a task."""
    if quality is not None and quality not in metrics:
        raise ValueError(f"`quality` must be a metric of the task, got {quality!r}; it has {list(metrics)}.")


def _checked_metrics(metrics: Any, key: tuple) -> dict:
    """Plain numbers and lists of a cell."""
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError(f"`task` must return a dict of metrics, got {metrics!r} for {key}.")
    plain = {}
    for name, value in metrics.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, Real) and math.isfinite(item) for item in items):
            raise ValueError(f"Metric {name!r} of {key} must be a finite number or a list of these, got {value!r}.")
        plain[name] = value
    if plain.get("nfe", key[1]) != key[1]:
        raise ValueError(f"Arm {key[0]!r} made {plain['nfe']} forwards where {key[1]} were wanted.")
    return plain


@contextmanager
def _counted_rows(pipe: Any) -> Iterator[list[int | None]]:
    """Counts rows that `pipe.model` reads while it is open; [None] if there is no such module.

    Rows and not calls: a comparison may be resumed with another batch size.
    """
    read: list[int | None] = [None]
    model: Any = getattr(pipe, "model", None)
    if not hasattr(model, "register_forward_pre_hook"):
        yield read
        return
    read[0] = 0

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        rows = next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        read[0] = (read[0] or 0) + rows

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield read
    finally:
        handle.remove()


def _device_name(pipe: Any) -> str:
    """What the pipeline's model runs on, such as "cpu" or "NVIDIA H100 80GB HBM3"."""
    device = torch.device(getattr(pipe, "device", "cpu"))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def pipeline_fingerprint(pipe: Any, *contents: bytes | str) -> str:
    """Hash of a pipeline (weights, head, configs, tokenizer), this package's version, and any other content.

    Put it into `task_name`, so that cells of another model, or of other held-out texts, are not used. The folder of a
    model does not change the hash.

    Args:
        pipe: a `PrismPipeline`.
        contents: of files and settings.
    Returns:
        12 hex digits.
    """
    digest = hashlib.sha256()
    for part in (pipe.model, pipe.quality_head):
        for name, tensor in ({} if part is None else part.state_dict()).items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
    rule = {"scheduler": type(pipe.scheduler).__name__, **own_fields(pipe.scheduler)}
    parts = [rule, dict(pipe.config.mdm_spec), _model_config(pipe.model), _tokenizer_fields(pipe.tokenizer)]
    for content in (json.dumps([*parts, __version__], sort_keys=True, default=str), *contents):
        data = content.encode() if isinstance(content, str) else content
        digest.update(b"%d\n" % len(data) + data)
    return digest.hexdigest()[:12]


def _model_config(model: Any) -> dict:
    fields = json.loads(model.config.to_json_string()) if hasattr(model, "config") else {}
    fields.pop("_name_or_path", None)
    return fields


def _tokenizer_fields(tokenizer: Any) -> list | None:
    if tokenizer is None:
        return None
    template = getattr(tokenizer, "chat_template", None)
    return [template, getattr(tokenizer, "special_tokens_map", None), tokenizer.get_vocab()]
