"""The page of a trace: the data that `trace.html` draws, and texts made safe and of known width for it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.protocols import Tokenizer
from ..schedulers.validation import is_int
from .token_states import DARK_SCALE, HATCH, INK, LOW_QUALITY, SCALE, STATES
from .trace import Trace

# Code of an unknown quality or probability; 0 to 254 stand for 0 to 1.
UNKNOWN = 255
# Characters that are invisible, or would move the text around them.
PICTURES = {"\n": "↵", "\r": "↵", "\t": "⇥"}
# States of the legend, and whether their mark stands under a token; a kept token has its quality there.
MARKED = {"given": False, "mask": False, "written": True, "remasked": True, "set": True}


def trace_page(trace: Trace, *, title: str, columns: int | None, rows: Sequence[int] | None) -> str:
    """The page as a string; see `Trace.to_html`."""
    if not trace:
        raise ValueError("The trace has no steps: nothing was generated.")
    if columns is not None and not is_int(columns, 1):
        raise ValueError(f"`columns` must be None or an integer of at least 1, got {columns!r}.")
    batch = range(len(trace.start))
    rows = list(batch) if rows is None else list(rows)
    if not rows or any(row not in batch for row in rows):
        raise ValueError(f"`rows` must be rows of the batch, from 0 to {len(batch) - 1}, got {rows}.")
    vocabulary = _Vocabulary(trace.tokenizer)
    data = {
        "rows": [_row(trace, row, vocabulary, apart=trace.prompted and columns is None) for row in rows],
        "columns": columns,
        "scheduler": trace.scheduler,
        "states": {s: {"mark": STATES[s].mark * marked, "words": STATES[s].words} for s, marked in MARKED.items()},
        "low": LOW_QUALITY,
        "measure": "quality" if any(step.quality is not None for step in trace) else "probability",
        "words": vocabulary.words,
        "widths": [display_width(word) for word in vocabulary.words],
        "breaks": vocabulary.breaks,
    }
    # No "<" in the script block: "</script>" would end the block, and "<!--<script" would hide its end.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = Path(__file__).with_name("trace.html").read_text(encoding="utf-8")
    script = page.split("<script>", 1)[1].split("</script>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # These two separators are escaped, as old browsers read them as line ends.
    parts = {"@DATA@": text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"), "@TITLE@": html.escape(title)}
    parts |= {"@SCRIPT@": f"sha256-{digest}", "@INK@": INK, "@HATCH@": HATCH}
    parts |= {"@SCALE@": _css(SCALE), "@DARK_SCALE@": _css(DARK_SCALE)}
    return re.sub("|".join(parts), lambda found: parts[found[0]], page)  # in one pass, as a part may hold a name


def _css(colours: Sequence[str]) -> str:
    """Colours as the variables --q0, --q1, ... of a style sheet."""
    return "; ".join(f"--q{n}: {colour}" for n, colour in enumerate(colours))


class _Vocabulary:
    """The distinct tokens of a page: their texts, and which of them hold a line break."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.words: list[str] = []
        self.breaks: list[int] = []
        self._index: dict[int, int] = {}

    def __getitem__(self, token: int) -> int:
        """Index of the token's text in `words`."""
        if token not in self._index:
            raw = str(token)
            if self.tokenizer is not None:
                raw = self.tokenizer.decode([token]) or str(self.tokenizer.convert_ids_to_tokens(token))
            self._index[token] = len(self.words)
            if "\n" in raw:
                self.breaks.append(len(self.words))
            self.words.append(visible_text(raw))
        return self._index[token]


def visible_text(text: str) -> str:
    """A text with every character visible: ↵ for a line break, ␀ to ␡ for control characters.

    Characters without width, and marks that change the direction of text, become ◌ or stand on one.
    """
    if text and not text.strip(" "):
        return "␣" * len(text)
    shown = []
    for character in text:
        kind = unicodedata.category(character)
        if character in PICTURES:
            shown.append(PICTURES[character])
        elif kind == "Cc":
            code = ord(character)
            shown.append(chr(0x2400 + code) if code < 32 else "␡" if code == 127 else "\ufffd")
        elif kind in ("Cf", "Zl", "Zp", "Cs", "Cn"):
            shown.append("◌")
        elif kind.startswith("M") and not shown:
            shown.append("◌" + character)
        else:
            shown.append(character)
    return "".join(shown)


def display_width(text: str) -> int:
    """Columns of a text in a monospaced font: 2 for a wide character, 0 for one that stands on another."""
    wide = {"W": 2, "F": 2}
    return sum(
        0 if unicodedata.category(c).startswith("M") else wide.get(unicodedata.east_asian_width(c), 1) for c in text
    )


def _codes(values: Tensor) -> str:
    """Floats in [0, 1] as base64 with a byte each; NaN is `UNKNOWN`."""
    codes = (values.clamp(0, 1) * 254).round().nan_to_num(UNKNOWN).to(torch.uint8)
    return base64.b64encode(bytes(codes.tolist())).decode()


def _row(trace: Trace, row: int, vocabulary: _Vocabulary, apart: bool) -> dict[str, Any]:
    """The data of one row; -1 is a mask, and positions are counted from the first that is shown.

    Args:
        apart: give a prompt as a text of its own.
    """
    if trace.result is None or trace.nfe_per_row is None:
        raise ValueError("The trace is not finished: call `finish` with the result of the run.")
    shown = torch.ones_like(trace.generated[row]) if trace.attention_mask is None else trace.attention_mask[row].bool()
    generated, prompt = trace.generated[row] & shown, None
    if apart and generated.any():
        before = torch.arange(len(shown)) < generated.int().argmax()
        if (before & shown).any():
            ids = trace.start[row][before & shown].tolist()
            prompt = " ".join(map(str, ids)) if trace.tokenizer is None else trace.tokenizer.decode(ids)
        shown = shown & ~before

    def words(ids: Tensor) -> list[int]:
        return [-1 if i == trace.mask_token_id else vocabulary[i] for i in ids[shown].tolist()]

    canvas = words(trace.start[row])
    start, steps = list(canvas), []
    for step in trace:
        after, unmasked, remasked = words(step.sample[row]), step.unmasked[row][shown], step.remasked[row][shown]
        record: dict[str, Any] = {
            "written": [[i, after[i]] for i in unmasked.nonzero().flatten().tolist()],
            "drawn": _codes(step.drawn[row][shown][unmasked]),
            "remasked": remasked.nonzero().flatten().tolist(),
            "forwards": step.nfe_per_row[row],
        }
        for i, word in record["written"]:
            canvas[i] = word
        for i in record["remasked"]:
            canvas[i] = -1
        # Neither drawn nor masked: restored from an earlier canvas, or changed by a callback.
        if others := [[i, word] for i, word in enumerate(after) if word != canvas[i]]:
            record["set"] = others
        if step.verdicts[row] is not None:
            record["verdict"] = step.verdicts[row]
        if step.quality is not None:
            record["quality"] = _codes(step.quality[row].masked_fill(~generated, torch.nan)[shown])
        canvas = after
        steps.append(record)
    result: dict[str, Any] = {"forwards": trace.nfe_per_row[row]}
    if others := [[i, word] for i, word in enumerate(words(trace.result[row])) if word != canvas[i]]:
        result["set"] = others
    if trace.quality is not None:
        result["quality"] = _codes(trace.quality[row].masked_fill(~generated, torch.nan)[shown])
    return {
        "number": row,
        "prompt": prompt,
        "given": [int(not g) for g in generated[shown].tolist()],
        "start": start,
        "steps": steps,
        "result": result if len(result) > 1 else None,
        "confidence": None if trace.confidence is None else trace.confidence[row],
        "accepted": None if trace.accepted is None else trace.accepted[row],
    }
