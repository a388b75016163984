"""The comparison that a saved text model brings along: arms with their chosen settings, held-out texts, known words."""

from __future__ import annotations

from pathlib import Path

from .compare import read_comparison
from .text import read_texts, text_task

# Settings that nobody tuned, for a model without arms.json.
ARMS = [
    {"name": "MDLM", "scheduler": "MDLMScheduler", "order": "random"},
    {"name": "ReMDM-cap", "scheduler": "ReMDMScheduler", "strategy": "cap", "eta": 0.03},
    {"name": "self-confidence", "scheduler": "SelfConfidenceScheduler", "order": "random", "eta": 0.03},
    {"name": "PRISM", "scheduler": "PrismScheduler", "order": "random", "eta": 0.03},
]


def text_plan(folder) -> dict:
    """Arms, forwards, seeds and the like of a text model: those of its `arms.json`, or `ARMS` at 16, 32, 64 forwards.

    Returns:
        keyword arguments of `run_comparison`.
    Raises:
        ValueError: a broken `arms.json`.
    """
    path = Path(folder) / "arms.json"
    if path.exists():
        return read_comparison(path)
    common = {"temperature": 1.0, "quality": "ngram_js", "reference": "MDLM", "higher_is_better": False}
    return {"arms": [dict(arm) for arm in ARMS], "forwards": [16, 32, 64], "seeds": [0, 1, 2, 3, 4], **common}


def task_of_folder(folder, reference=None, **settings):
    """`text_task` with the held-out texts and the known words of a saved text model.

    Args:
        folder: of the model.
        reference: file of held-out texts in place of its `heldout.jsonl`.
        settings: `num_samples`, `gen_length`, `judge`, `batch_size` of `text_task`.
    Raises:
        ValueError: there are no held-out texts.
    """
    words = _files(folder, reference)[1]
    vocabulary = words.read_text(encoding="utf-8").split() if words.exists() else None
    return text_task(held_out(folder, reference), vocabulary=vocabulary, **settings)


def held_out(folder, reference=None) -> list[str]:
    """The held-out texts that `task_of_folder` compares with; arguments and errors as there."""
    path = _files(folder, reference)[0]
    if reference is None and not path.exists():
        raise ValueError(f"{folder} has no heldout.jsonl to compare with: pass --reference FILE with held-out texts.")
    return read_texts(path)


def folder_contents(folder, reference=None) -> list[bytes]:
    """What `task_of_folder` reads from the same files, for `fingerprint`; b"" for a file that is not there."""
    return [path.read_bytes() if path.exists() else b"" for path in _files(folder, reference)]


def _files(folder, reference) -> tuple[Path, Path]:
    """Files of held-out texts and of known words."""
    return Path(folder) / "heldout.jsonl" if reference is None else Path(reference), Path(folder) / "words.txt"
