"""The states of a token after a step: one table of their marks, words and colours for terminal, page and picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class TokenState(NamedTuple):
    """How one state is shown: by a mark for those who see no colours, in words, and in colours.

    Args:
        mark: one character.
        words: what a legend calls it.
        style: in a terminal, as rich writes it.
        fill: background in a picture, where the token's quality does not give one.
    """

    mark: str
    words: str
    style: str
    fill: str = "#ffffff"


STATES = {
    "given": TokenState(" ", "given", "bold", "#eef1f4"),
    "kept": TokenState("·", "written", "cyan"),
    "written": TokenState("+", "just written", "bold green"),
    "doubtful": TokenState("?", "low quality", "yellow"),
    "remasked": TokenState("×", "remasked", "bold white on red", "#ffe2c2"),
    "mask": TokenState("_", "mask", "dim"),
    "set": TokenState("=", "restored, or set from outside", "magenta"),
    "conflict": TokenState("!", "conflict", "bold red"),  # two equal digits of a Sudoku
}
LOW_QUALITY = 0.5  # a token below it is doubtful
INK, HATCH = "#1b1f24", "#c3c9d0"
# Ten colours for quality from 0 to 1, on white and on black.
SCALE = ("#f28e2b", "#f5a04b", "#f7b36e", "#f9c795", "#fbdbbb", "#f1e7dc", "#e6edf3", "#d3e3f3", "#bdd7f1", "#a6caef")
DARK_SCALE = (
    *("#a84c00", "#934506", "#7d3d0d", "#653513", "#4f2e18"),
    *("#3a2d25", "#27303a", "#22394f", "#1c4366", "#164d7c"),
)


def token_states(
    before: Sequence[int],
    after: Sequence[int],
    generated: Sequence[bool],
    mask_token_id: int,
    quality: Sequence[float] | None = None,
    remasked: Sequence[bool] | None = None,
) -> list[str]:
    """The state of each token after one step.

    Args:
        before, after: L token ids around the step.
        generated: whether each is generated; the others are given.
        mask_token_id: as the pipeline's.
        quality: of the tokens in `before`, or None; those kept below `LOW_QUALITY` are doubtful.
        remasked: whether the step masked each token again, or None.
    Returns:
        L keys of `STATES`; never "set" or "conflict".
    """
    states = []
    for i, token in enumerate(after):
        if not generated[i]:
            states.append("given")
        elif remasked is not None and remasked[i]:
            states.append("remasked")
        elif token == mask_token_id:
            states.append("mask")
        elif before[i] == mask_token_id:
            states.append("written")
        else:
            states.append("doubtful" if quality is not None and quality[i] < LOW_QUALITY else "kept")
    return states


def quality_colour(value: float) -> str:
    """The colour of `SCALE` for a quality in [0, 1], and white for NaN."""
    return STATES["mask"].fill if value != value else SCALE[min(9, int(10 * value))]
