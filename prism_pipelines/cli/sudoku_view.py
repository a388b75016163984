"""A Sudoku run in the terminal: every cell's state told by a colour and, for those who see no colours, by a mark."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ..sudoku import MASK_ID
from .live_view import printable, token_kinds

# kind: (mark before the digit, style, words of the legend); a blank or remasked cell shows its mark in place of a digit
KINDS = {
    "given": (" ", "bold", "given"),
    "kept": ("·", "cyan", "written"),
    "written": ("+", "bold green", "new"),
    "doubtful": ("?", "yellow", "low quality"),
    "remasked": ("×", "bold white on red", "remasked"),
    "blank": ("_", "dim", "blank"),
    "conflict": ("!", "bold red", "conflict"),
}


def cell_kinds(given, before, after, quality=None, remasked=None) -> list[str]:
    """The kind of each cell after one step.

    Args:
        given: whether a cell is a clue, 81 bools.
        before, after: token ids of the 81 cells around the step.
        quality: of the tokens in `before`, 81 floats, or None; those kept below `live_view.LOW_QUALITY` are doubtful.
        remasked: whether the step masked a cell again, 81 bools, or None.
    Returns:
        81 keys of `KINDS`.
    """
    kinds = token_kinds(before, after, [not clue for clue in given], MASK_ID, quality, remasked)
    return ["blank" if kind == "mask" else kind for kind in kinds]


def board(ids, kinds: list[str]) -> Text:
    """The grid as 11 lines of text with a mark and a colour for every cell.

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
            text.append(f" {mark} " if kinds[i] in ("blank", "remasked") else f"{mark}{int(ids[i])} ", style=style)
        text.append("\n")
    return text


def legend(kinds) -> Text:
    """One line that names the marks of these keys of `KINDS`, each in its colour."""
    text = Text("legend: ")
    for mark, style, words in (KINDS[kind] for kind in KINDS if kind in kinds):
        text.append(f"{mark.strip()}5" if words not in ("blank", "remasked") else mark, style=style)
        text.append(f" {words}  ")
    return text


class SudokuView:
    """A live view of one puzzle's run; `step` is the pipeline's `callback_on_step_end`.

    Args:
        console: rich console of a terminal.
        puzzle: int64 (81,), 0 for a blank.
        delay: seconds to hold each frame, >= 0.
    """

    def __init__(self, console: Console, puzzle, delay: float = 0.08):
        self.console, self.delay = console, delay
        self.given = [digit > 0 for digit in puzzle]
        self.ids = [int(digit) or MASK_ID for digit in puzzle]
        self.blanks, self.remasked_so_far = self.given.count(False), 0
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> SudokuView:
        self.live.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.live.__exit__(*error)

    def step(self, pipe, i: int, t, state: dict) -> dict:
        """Show row 0 of the sample after step `i`; `state` holds "sample", "quality" and "remasked"."""
        after = state["sample"][0].tolist()
        quality = None if state.get("quality") is None else state["quality"][0].tolist()
        remasked = None if state.get("remasked") is None else state["remasked"][0].tolist()
        kinds = cell_kinds(self.given, self.ids, after, quality, remasked)
        now = kinds.count("remasked")
        self.remasked_so_far += now
        shown = self.blanks - after.count(MASK_ID)
        counter = Text(
            f"step {i + 1}/{len(pipe.scheduler.timesteps)}   {shown}/{self.blanks} written   "
            f"{now} remasked now, {self.remasked_so_far} so far"
        )
        parts = [counter, board(after, kinds), legend(set(KINDS) - {"conflict"})]
        self.live.update(Group(*(printable(self.console, part) for part in parts)), refresh=True)
        self.ids = after
        time.sleep(self.delay)
        return {}
