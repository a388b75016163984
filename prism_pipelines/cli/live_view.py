"""What the live views of `prism sudoku` and `prism text` share: the kind of a token, and marks for plain terminals."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

LOW_QUALITY = 0.5
_ASCII = str.maketrans("·×│─┼", "~x|-+")


def token_kinds(before, after, generated, mask_token_id: int, quality=None, remasked=None) -> list[str]:
    """The kind of each token after one step.

    Args:
        before, after: L token ids around the step.
        generated: whether each is generated; the others are given.
        mask_token_id: as the pipeline's.
        quality: of the tokens in `before`, or None; those kept below `LOW_QUALITY` are doubtful.
        remasked: whether the step masked each token again, or None.
    Returns:
        L of "given", "kept", "written", "doubtful", "remasked" and "mask".
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


def printable(console: Console, text: Text) -> Text:
    """`text`, with plain ASCII marks and lines where the terminal cannot show others."""
    if not console.options.ascii_only:
        return text
    plain = Text(text.plain.translate(_ASCII))
    plain.spans = text.spans  # one character became one character, so the colours still fit
    return plain
