"""A run in the terminal: a colour for the state of every token, and a mark for those who see no colours."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from ..pipeline_prism import PrismPipeline

LOW_QUALITY = 0.5
# kind: (mark, style, words of the legend). Of a grid, the mark stands before the digit.
KINDS = {
    "given": (" ", "bold", "given"),
    "kept": ("·", "cyan", "written"),
    "written": ("+", "bold green", "new"),
    "doubtful": ("?", "yellow", "low quality"),
    "remasked": ("×", "bold white on red", "remasked"),
    "mask": ("_", "dim", "blank"),
    "conflict": ("!", "bold red", "conflict"),
}
ALONE = ("remasked", "mask")  # kinds that show their mark in place of a token
_ASCII = str.maketrans("·×│─┼", "~x|-+")


def token_kinds(
    before: Sequence[int],
    after: Sequence[int],
    generated: Sequence[bool],
    mask_token_id: int,
    quality: Sequence[float] | None = None,
    remasked: Sequence[bool] | None = None,
) -> list[str]:
    """The kind of each token after one step.

    Args:
        before, after: L token ids around the step.
        generated: whether each is generated; the others are given.
        mask_token_id: as the pipeline's.
        quality: of the tokens in `before`, or None; those kept below `LOW_QUALITY` are doubtful.
        remasked: whether the step masked each token again, or None.
    Returns:
        L keys of `KINDS`; never "conflict".
    """
    kinds = []
    for i, token in enumerate(after):
        if not generated[i]:
            kinds.append("given")
        elif remasked is not None and remasked[i]:
            kinds.append("remasked")
        elif token == mask_token_id:
            kinds.append("mask")
        elif before[i] == mask_token_id:
            kinds.append("written")
        else:
            kinds.append("doubtful" if quality is not None and quality[i] < LOW_QUALITY else "kept")
    return kinds


def board(ids: Sequence[int], kinds: list[str]) -> Text:
    """A Sudoku grid as 11 lines, with a mark and a colour for every cell.

    Args:
        ids: token ids of the 81 cells; blanks may be 0 or the mask id.
        kinds: 81 keys of `KINDS`.
    """
    text = Text()
    for row in range(9):
        if row in (3, 6):
            text.append("─────────┼─────────┼─────────\n", style="dim")
        for column in range(9):
            i = row * 9 + column
            mark, style, _ = KINDS[kinds[i]]
            if column in (3, 6):
                text.append("│", style="dim")
            text.append(f" {mark} " if kinds[i] in ALONE else f"{mark}{int(ids[i])} ", style=style)
        text.append("\n")
    return text


def page(tokens: list[str], kinds: list[str]) -> Text:
    """Tokens of a text in a row, each in its colour, kept ones in none. A line break in a token stays one."""
    text = Text()
    for token, kind in zip(tokens, kinds, strict=True):
        mark, style, _ = KINDS[kind]
        text.append(mark if kind in ALONE else token, style="" if kind == "kept" else style)
    return text


def legend(kinds: Collection[str]) -> Text:
    """One line that names these keys of `KINDS`, each in its colour."""
    text = Text("legend: ")
    for mark, style, words in (KINDS[kind] for kind in KINDS if kind in kinds):
        text.append(mark, style=style)
        text.append(f" {words}  ")
    return text


def printable(console: Console, text: Text) -> Text:
    """`text`, with plain ASCII marks and lines where the terminal cannot show others."""
    if not console.options.ascii_only:
        return text
    plain = Text(text.plain.translate(_ASCII))
    plain.spans = text.spans  # one character became one character, so the colours still fit
    return plain


class LiveView:
    """A live view of the first row of a run; `step` is the pipeline's `callback_on_step_end`.

    Args:
        console: rich console of a terminal.
        draw: (ids, kinds) -> Text; L token ids, and their keys of `KINDS`.
        unit: what a token is called, such as "cells".
        delay: seconds to hold each frame, >= 0.
    """

    def __init__(
        self, console: Console, draw: Callable[[list[int], list[str]], Text], unit: str = "tokens", delay: float = 0.05
    ):
        self.console, self.draw, self.unit, self.delay = console, draw, unit, delay
        self.ids: list[int] | None = None
        self.remasked_so_far, self.judged = 0, False
        self.live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")

    def __enter__(self) -> LiveView:
        self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)

    def step(self, pipe: PrismPipeline, i: int, t: Any, state: dict[str, Any]) -> dict[str, Any]:
        """Show row 0 of the sample after step `i`; `state` holds what the pipeline gives its callback."""
        after, generated = state["sample"][0].tolist(), state["generation_mask"][0].tolist()
        blank = [pipe.mask_token_id if free else token for free, token in zip(generated, after, strict=True)]
        before = self.ids or blank
        quality = None if state.get("quality") is None else state["quality"][0].tolist()
        kinds = token_kinds(before, after, generated, pipe.mask_token_id, quality, state["remasked"][0].tolist())
        now, total = kinds.count("remasked"), sum(generated)
        self.remasked_so_far += now
        shown = total - kinds.count("mask") - now
        head = f"step {i + 1}/{len(pipe.scheduler.timesteps)}   {shown}/{total} {self.unit}   "
        counter = Text(
            f"{head}{now} remasked now, {self.remasked_so_far} so far   {self._phase(pipe, before)}".rstrip()
        )
        parts = [counter, self.draw(after, kinds), legend(set(KINDS) - {"conflict"})]
        self.live.update(Group(*(printable(self.console, part) for part in parts)), refresh=True)
        self.ids = after
        time.sleep(self.delay)
        return {}

    def _phase(self, pipe: PrismPipeline, before: list[int]) -> str:
        """What the step did: filled masks, judged a full canvas, or refilled what a judgement had masked."""
        full = pipe.mask_token_id not in before
        self.judged = self.judged or full
        return "judging" if full else "repairing" if self.judged else "filling"
