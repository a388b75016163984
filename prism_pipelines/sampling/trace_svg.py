"""A trace as a moving picture: one SVG file without a script, which plays wherever pictures are shown."""

from __future__ import annotations

from xml.sax.saxutils import escape

import torch
from torch import Tensor

from ..schedulers.validation import is_int, is_number
from .token_states import HATCH, INK, STATES, quality_colour
from .trace import Trace
from .trace_page import display_width, visible_text

CELL, TOP = 34, 30


def trace_svg(trace: Trace, *, row: int, columns: int, seconds: float) -> str:
    """The picture as a string; see `Trace.to_svg`."""
    if not trace:
        raise ValueError("The trace has no steps: nothing was generated.")
    if row not in range(len(trace.start)):
        raise ValueError(f"`row` must be a row of the batch, from 0 to {len(trace.start) - 1}, got {row}.")
    if not is_int(columns, 1):
        raise ValueError(f"`columns` must be an integer of at least 1, got {columns!r}.")
    if not (is_number(seconds, 0) and seconds > 0):
        raise ValueError(f"`seconds` must be a number above 0, got {seconds!r}.")
    frames = _frames(trace, row)
    hold = 6  # the result is shown as long as this many steps
    times = [n / (len(frames) - 1 + hold) for n in range(len(frames))]
    length, lines = len(frames[0][0]), -(-len(frames[0][0]) // columns)
    width, height = columns * CELL + 4, lines * CELL + TOP + 4
    clock = f'dur="{seconds * (len(frames) - 1 + hold):g}s" repeatCount="indefinite" calcMode="discrete"'

    def moving(attribute: str, values: list[str]) -> str:
        """The animation of one attribute; empty if it never changes."""
        kept = [n for n in range(len(values)) if n == 0 or values[n] != values[n - 1]]
        if len(kept) == 1:
            return ""
        shown, at = ";".join(values[n] for n in kept), ";".join(f"{times[n]:.4f}" for n in kept)
        return f'<animate attributeName="{attribute}" values="{shown}" keyTimes="{at}" {clock}/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" text-anchor="middle" fill="{INK}">',
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
    ]
    for n, (_, _, caption) in enumerate(frames):
        visible = ["1" if k == n else "0" for k in range(len(frames))]
        parts.append(
            f'<text x="8" y="20" font-size="13" text-anchor="start" opacity="{visible[-1]}">{escape(caption)}'
            f"{moving('opacity', visible)}</text>"
        )
    for i in range(length):
        x, y = 2 + i % columns * CELL, TOP + i // columns * CELL
        colours, words = [frame[1][i] for frame in frames], [frame[0][i] for frame in frames]
        parts.append(
            f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" stroke="{HATCH}" fill="{colours[-1]}">'
            f"{moving('fill', colours)}</rect>"
        )
        bold = ' font-weight="bold"' if not trace.generated[row][i] else ""
        for word in dict.fromkeys(word for word in words if word):
            visible = ["1" if shown == word else "0" for shown in words]
            size = min(18, 1.5 * CELL / max(1, display_width(word)))
            parts.append(
                f'<text x="{x + CELL / 2:g}" y="{y + CELL * 0.68:g}" font-size="{size:g}"{bold} '
                f'opacity="{visible[-1]}">{escape(word)}{moving("opacity", visible)}</text>'
            )
    if columns == 9 and length == 81:
        lines_at = "".join(f"M{2 + 3 * k * CELL} {TOP}v{9 * CELL}M2 {TOP + 3 * k * CELL}h{9 * CELL}" for k in range(4))
        parts.append(f'<path d="{lines_at}" stroke="{INK}" stroke-width="2" fill="none"/>')
    return "".join([*parts, "</svg>\n"])


def _frames(trace: Trace, row: int) -> list[tuple[list[str], list[str], str]]:
    """(words, colours, caption) of the start, of every step, and of the result."""

    def words(ids: Tensor) -> list[str]:
        texts = {
            i: visible_text(str(i) if trace.tokenizer is None else trace.tokenizer.decode([i]))
            for i in set(ids.tolist())
        }
        return ["" if i == trace.mask_token_id else texts[i] for i in ids.tolist()]

    def colours(values: Tensor, remasked: Tensor) -> list[str]:
        """Colours of the qualities `values`, (L,); NaN is white."""
        rows = zip(generated.tolist(), remasked.tolist(), map(quality_colour, values.tolist()), strict=True)
        return [
            STATES["given"].fill if not g else STATES["remasked"].fill if lost else colour for g, lost, colour in rows
        ]

    generated, known = trace.generated[row], torch.full_like(trace.start[row], torch.nan, dtype=torch.float32)
    nothing = torch.zeros_like(generated)
    frames = [(words(trace.start[row]), colours(known, nothing), "start")]
    for step in trace:
        remasked, unmasked = step.remasked[row], step.unmasked[row]
        seen = step.drawn[row] if step.quality is None else step.quality[row]
        known = torch.where(unmasked, seen, known) if step.quality is None else seen
        masked = step.sample[row] == trace.mask_token_id
        fresh = masked | (unmasked & (step.quality is not None))
        said = step.verdicts[row]
        caption = f"pass {step.nfe_per_row[row]}: {int((generated & ~masked).sum())} of {int(generated.sum())}"
        taken = int(remasked.sum())
        caption += f", {said}" if said else f", {taken} remasked" if taken else ""
        frames.append((words(step.sample[row]), colours(known.masked_fill(fresh, torch.nan), remasked), caption))
    if trace.result is None:
        raise ValueError("The trace is not finished: call `finish` with the result of the run.")
    last = words(trace.result[row])
    if trace.quality is None:
        return [*frames, (last, frames[-1][1], frames[-1][2])]
    return [*frames, (last, colours(trace.quality[row], nothing), "result, with its quality")]
