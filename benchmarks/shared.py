"""What several benchmarks need: a hash of what is measured, and where the numbers come from."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent


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
