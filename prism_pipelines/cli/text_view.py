"""A text run in the terminal: every token's state told by a colour and, for those who see no colours, by a mark."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from .live_view import printable, token_kinds

# kind: (what stands before the token, style, words of the legend); masks and remasked tokens show the mark alone
KINDS = {
    "given": ("", "bold", "given"),
    "kept": ("", "", "written"),
    "written": ("+", "bold green", "new"),
    "doubtful": ("?", "yellow", "low quality"),
    "remasked": ("×", "bold white on red", "remasked"),
    "mask": ("_", "dim", "mask"),
}


def page(tokens: list[str], kinds: list[str]) -> Text:
    """The tokens in a row, each in its colour; masks as their mark. A line break in a token stays one."""
    text = Text()
    for token, kind in zip(tokens, kinds, strict=True):
        mark, style, _ = KINDS[kind]
        text.append(mark if kind in ("mask", "remasked") else token, style=style)
    return text


def legend(kinds) -> Text:
    """One line that names these keys of `KINDS`, each in its colour."""
    text = Text("legend: ")
    for mark, style, meaning in (KINDS[kind] for kind in KINDS if kind in kinds):
        text.append(f"{mark}{meaning}" if mark else meaning, style=style)
        text.append("  ")
    return text


class TextView:
    """A live view of the first row of a run; `step` is the pipeline's `callback_on_step_end`.

    Args:
        console: rich console of a terminal.
        tokenizer: turns one id into its text.
        delay: seconds to hold each frame, >= 0.
    """

    def __init__(self, console: Console, tokenizer, delay: float = 0.05):
        self.console, self.tokenizer, self.delay = console, tokenizer, delay
        self.ids: list[int] | None = None
        self.remasked_so_far = 0
        self.live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")

    def __enter__(self) -> TextView:
        self.live.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.live.__exit__(*error)

    def step(self, pipe, i: int, t, state: dict) -> dict:
        """Show row 0 of the sample after step `i`; `state` holds what the pipeline gives its callback."""
        after, generated = state["sample"][0].tolist(), state["generation_mask"][0].tolist()
        before = self.ids or [pipe.mask_token_id] * len(after)
        quality = None if state.get("quality") is None else state["quality"][0].tolist()
        kinds = token_kinds(before, after, generated, pipe.mask_token_id, quality, state["remasked"][0].tolist())
        now = kinds.count("remasked")
        self.remasked_so_far += now
        shown = sum(generated) - kinds.count("mask") - now
        head = f"step {i + 1}/{len(pipe.scheduler.timesteps)}   {shown}/{sum(generated)} tokens   "
        parts = [Text(f"{head}{now} remasked now, {self.remasked_so_far} so far")]
        parts += [page([self.tokenizer.decode([token]) for token in after], kinds), legend(KINDS)]
        self.live.update(Group(*(printable(self.console, part) for part in parts)), refresh=True)
        self.ids = after
        time.sleep(self.delay)
        return {}
