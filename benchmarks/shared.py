"""What several benchmarks need: a hash of what is measured, models of random weights, and the form of a result."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class RandomLlama:
    """The sizes of a Llama of random weights."""

    hidden: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    tied: bool
    dtype: str

    def model(self, device: str, seed: int, **fields: Any) -> LlamaForCausalLM:
        """The model, made where it will be used; `fields` of its config besides."""
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            tie_word_embeddings=self.tied,
            max_position_embeddings=4096,
            **fields,
        )
        torch.manual_seed(seed)
        torch.set_default_dtype(getattr(torch, self.dtype))
        try:
            with torch.device(device):
                return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each run by name, `repeats` times in turn after one warm-up each."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    took = {name: [] for name in runs}
    for _ in range(1 + repeats):
        for name, run in runs.items():
            sync()
            start = time.perf_counter()
            run()
            sync()
            took[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in took.items()}


def files_fingerprint(model: Path, settings: dict) -> str:
    """Hash of the weights and scheduler configs in a folder, and of settings; a cell counts for the same hash only."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted([*model.rglob("*.safetensors"), *model.rglob("scheduler_config.json")]):
        if not path.relative_to(model).parts[0].startswith("checkpoint-"):  # a run's, which may be cleared away
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def disagreements(rows: list[dict], committed: list[dict], keys: tuple[str, ...]) -> list[str]:
    """Rows whose interval misses that of the committed row with the same `keys`; others are left out."""
    known, apart = {tuple(row[key] for key in keys): row for row in committed}, []
    for row in rows:
        place = tuple(row[key] for key in keys)
        other = known.get(place)
        if other and (row["low"] > other["high"] or row["high"] < other["low"]):
            found = "{low:.3f}-{high:.3f} here".format(**row) + ", {low:.3f}-{high:.3f} committed".format(**other)
            apart.append(f"{' '.join(map(str, place))}: {found}")
    return apart


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def origin(device: str = "cpu") -> dict:
    """Where these numbers come from: machine, versions and commit; `device` is where the models ran."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "versions": versions, "commit": commit}


def give(result: Any, path: str | Path | None = None) -> int:
    """Write a result as JSON to a file if one is named, and print it as the last line. Returns exit status 0."""
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(json.dumps(result))
    return 0
