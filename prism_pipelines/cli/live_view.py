"""A run in the terminal: a colour for the state of every token, and a mark for those who see no colours."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ..sampling.token_states import STATES, token_states

if TYPE_CHECKING:
    from ..pipeline_prism import PrismPipeline

ALONE = ("remasked", "mask")  # states that show their mark in place of a token
_ASCII = str.maketrans("·×│─┼", "~x|-+")


def board(ids: Sequence[int], states: list[str]) -> Text:
    """A Sudoku grid as 11 lines, with a mark and a colour for every cell.

    Args:
        ids: token ids of the 81 cells; blanks may be 0 or the mask id.
        states: 81 keys of `STATES`.
    """
    text = Text()
    for row in range(9):
        if row in (3, 6):
            text.append("─────────┼─────────┼─────────\n", style="dim")
        for column in range(9):
            i = row * 9 + column
            state = STATES[states[i]]
            if column in (3, 6):
                text.append("│", style="dim")
            text.append(f" {state.mark} " if states[i] in ALONE else f"{state.mark}{int(ids[i])} ", style=state.style)
        text.append("\n")
    return text


def page(tokens: list[str], states: list[str]) -> Text:
    """Tokens of a text in a row, each in its colour, kept ones in none. A line break in a token stays one."""
    text = Text()
    for token, name in zip(tokens, states, strict=True):
        state = STATES[name]
        text.append(state.mark if name in ALONE else token, style="" if name == "kept" else state.style)
    return text


def legend(states: Collection[str]) -> Text:
    """One line that names these keys of `STATES`, each in its colour."""
    text = Text("legend: ")
    for state in (STATES[state] for state in STATES if state in states):
        text.append(state.mark, style=state.style)
        text.append(f" {state.words}  ")
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
        draw: (ids, states) -> Text; L token ids, and their keys of `STATES`.
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
        states = token_states(before, after, generated, pipe.mask_token_id, quality, state["remasked"][0].tolist())
        now, total = states.count("remasked"), sum(generated)
        self.remasked_so_far += now
        shown = total - states.count("mask") - now
        head = f"step {i + 1}/{len(pipe.scheduler.timesteps)}   {shown}/{total} {self.unit}   "
        counter = Text(
            f"{head}{now} remasked now, {self.remasked_so_far} so far   {self._phase(pipe, before)}".rstrip()
        )
        parts = [counter, self.draw(after, states), legend(set(STATES) - {"set", "conflict"})]
        self.live.update(Group(*(printable(self.console, part) for part in parts)), refresh=True)
        self.ids = after
        time.sleep(self.delay)
        return {}

    def _phase(self, pipe: PrismPipeline, before: list[int]) -> str:
        """What the step did: filled masks, judged a full canvas, or refilled what a judgement had masked."""
        full = pipe.mask_token_id not in before
        self.judged = self.judged or full
        return "judging" if full else "repairing" if self.judged else "filling"
