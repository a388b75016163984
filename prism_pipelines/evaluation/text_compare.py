"""The comparison whose files are in the folder of a saved text model: arms, held-out texts, known words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .arms import TEXT_ARMS, read_comparison
from .text import read_texts, text_task


def text_plan(folder: str | Path) -> dict:
    """Arms, forwards and seeds for a text model: from its `arms.json`, else `TEXT_ARMS` with 16, 32, 64 passes.

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
    """The held-out texts that `task_of_folder` compares with. Arguments and errors are those of that function."""
    path = _files(folder, reference)[0]
    if reference is None and not path.exists():
        raise ValueError(f"{folder} has no heldout.jsonl to compare with: pass --reference FILE with held-out texts.")
    return read_texts(path)


def folder_contents(folder: str | Path, reference: str | Path | None = None) -> list[bytes]:
    """The contents of the files that `task_of_folder` reads, for `pipeline_fingerprint`; b"" for a missing file."""
    return [path.read_bytes() if path.exists() else b"" for path in _files(folder, reference)]


def _files(folder: str | Path, reference: str | Path | None) -> tuple[Path, Path]:
    """Files of held-out texts and of known words."""
    return Path(folder) / "heldout.jsonl" if reference is None else Path(reference), Path(folder) / "words.txt"
