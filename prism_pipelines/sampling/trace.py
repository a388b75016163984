"""What a run did, step by step, and one self-contained HTML page to step through it."""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

STATES = {  # state: (mark, words of the legend)
    "given": ("", "given"),
    "kept": ("", "written before"),
    "written": ("+", "just written"),
    "doubtful": ("?", "low quality"),
    "remasked": ("×", "remasked"),
    "mask": ("", "mask"),
}


@dataclass(frozen=True)
class TraceStep:
    """One step of a run, on the CPU.

    Args:
        sample: ids after the step, int64 (B, L).
        quality: P(token is right) of the tokens before the step, float32 (B, L), or None without a head.
        unmasked, remasked: what the step filled and took back, bool (B, L).
    """

    sample: Tensor
    quality: Tensor | None
    unmasked: Tensor
    remasked: Tensor

    @classmethod
    def of(cls, sample, quality, unmasked, remasked) -> TraceStep:
        """A step from tensors on any device."""
        return cls(sample.cpu(), None if quality is None else quality.float().cpu(), unmasked.cpu(), remasked.cpu())


def token_states(trace: list[TraceStep], row: int, mask_token_id: int, low_quality: float = 0.5) -> list[list[str]]:
    """The state of every token after every step, keys of `STATES`, for one row of a trace."""
    generated = sum(step.unmasked[row] for step in trace).bool().tolist()
    states = []
    for step in trace:
        ids, unmasked, remasked = (t[row].tolist() for t in (step.sample, step.unmasked, step.remasked))
        quality = [1.0] * len(ids) if step.quality is None else step.quality[row].tolist()
        states.append(
            [
                "given"
                if not generated[i]
                else "remasked"
                if remasked[i]
                else "mask"
                if ids[i] == mask_token_id
                else "written"
                if unmasked[i]
                else "doubtful"
                if quality[i] < low_quality
                else "kept"
                for i in range(len(ids))
            ]
        )
    return states


def trace_to_html(trace: list[TraceStep], tokenizer, *, row: int = 0, title: str = "PRISM", columns: int | None = None):
    """A page that steps through one row of a run: slider, arrow keys, colours and marks; no network, light and dark.

    Args:
        trace: `PrismPipelineOutput.trace`.
        tokenizer: turns ids into strings; its mask token is shown as a mask.
        row: which row of the batch.
        title: heading of the page; plain text.
        columns: lay tokens out as a grid of this width (9: a Sudoku, with box borders); None for running text.
    Returns:
        the page as a string.
    Raises:
        ValueError: an empty trace, or a row outside it.
    """
    if not trace:
        raise ValueError("`trace` is empty; call the pipeline with return_trace=True.")
    if not 0 <= row < len(trace[0].sample):
        raise ValueError(f"`row` must be in [0, {len(trace[0].sample)}), got {row}.")
    states = token_states(trace, row, tokenizer.mask_token_id)
    frames = []
    for step, kinds in zip(trace, states, strict=True):
        ids = step.sample[row].tolist()
        words = [
            tokenizer.decode([i]) if kind not in ("mask", "remasked") else ""
            for i, kind in zip(ids, kinds, strict=True)
        ]
        quality = None if step.quality is None else [round(q, 3) for q in step.quality[row].tolist()]
        frames.append({"words": words, "kinds": kinds, "quality": quality})
    # No "<" in the script block: "</script>" would end it, "<!--<script" would keep its end from being seen.
    data = json.dumps({"frames": frames, "states": STATES, "columns": columns}).replace("<", "\\u003c")
    page = Path(__file__).with_name("trace.html").read_text(encoding="utf-8")
    parts = {"@DATA@": data, "@TITLE@": html.escape(title)}
    return re.sub("@DATA@|@TITLE@", lambda found: parts[found[0]], page)  # in one pass: a part may hold such a word
