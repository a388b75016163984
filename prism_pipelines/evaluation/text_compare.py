"""The comparison that a saved text model brings along: arms with their chosen settings, held-out texts, known words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .arms import TEXT_ARMS, read_comparison
from .text import read_texts, text_task


def text_plan(folder: str | Path) -> dict:
    """Arms, forwards, seeds and more for a text model: those of its `arms.json`, or `TEXT_ARMS` at 16, 32, 64 forwards.

    Returns:
        keyword arguments of `run_comparison`.
    Raises:
        ValueError: a broken `arms.json`.
    """
    path = Path(folder) / "arms.json"
    if path.exists():
        return read_comparison(path)
    common: dict = {"temperature": 1.0, "quality": "ngram_js", "reference": "MDLM", "higher_is_better": False}
    return {"arms": [dict(arm) for arm in TEXT_ARMS], "forwards": [16, 32, 64], "seeds": [0, 1, 2, 3, 4], **common}


def task_of_folder(
    folder: str | Path,
    reference: str | Path | None = None,
    *,
    num_samples: int,
    gen_length: int,
    judge: Any = None,
    batch_size: int = 16,
) -> Any:
    """`text_task` with the held-out texts and the known words of a saved text model.

    Args:
        folder: of the model.
        reference: file of held-out texts in place of its `heldout.jsonl`.
        num_samples, gen_length, judge, batch_size: as `text_task`.
    Raises:
        ValueError: there are no held-out texts.
    """
    words = _files(folder, reference)[1]
    vocabulary = words.read_text(encoding="utf-8").split() if words.exists() else None
    return text_task(
        held_out(folder, reference),
        num_samples=num_samples,
        gen_length=gen_length,
        vocabulary=vocabulary,
        judge=judge,
        batch_size=batch_size,
    )


def held_out(folder: str | Path, reference: str | Path | None = None) -> list[str]:
    """The held-out texts that `task_of_folder` compares with; arguments and errors as there."""
    path = _files(folder, reference)[0]
    if reference is None and not path.exists():
        raise ValueError(f"{folder} has no heldout.jsonl to compare with: pass --reference FILE with held-out texts.")
    return read_texts(path)


def folder_contents(folder: str | Path, reference: str | Path | None = None) -> list[bytes]:
    """What `task_of_folder` reads from the same files, for `pipeline_fingerprint`; b"" for a file that is not there."""
    return [path.read_bytes() if path.exists() else b"" for path in _files(folder, reference)]


def _files(folder: str | Path, reference: str | Path | None) -> tuple[Path, Path]:
    """Files of held-out texts and of known words."""
    return Path(folder) / "heldout.jsonl" if reference is None else Path(reference), Path(folder) / "words.txt"
