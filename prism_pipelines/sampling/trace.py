"""The trace of a run: a list of its steps, which can be written as a web page or as a moving picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TraceStep:
    """One step of a run, on the CPU.

    Args:
        sample: ids after the step, int64 (B, L).
        quality: P(token is right) of the tokens before the step, float32 (B, L); None without a head.
        unmasked, remasked: positions that the step filled, and masked again, bool (B, L).
        drawn: probability with which each filled token was drawn, float32 (B, L), NaN elsewhere.
        nfe_per_row: forward passes of each row so far, list of B ints.
        verdicts: the judgement of each row by a scheduler that judges whole canvases: "accepted", "repair",
            "given up", or None if the step judged nothing.
    """

    sample: Tensor
    quality: Tensor | None
    unmasked: Tensor
    remasked: Tensor
    drawn: Tensor
    nfe_per_row: list[int]
    verdicts: list[str | None]

    @classmethod
    def of(
        cls,
        step: Any,
        quality: Tensor | None,
        before: Tensor,
        work: Tensor,
        nfe_per_row: list[int],
        mask_token_id: int,
    ) -> TraceStep:
        """The record of a scheduler's step, on any device.

        Args:
            step: a `PrismSchedulerOutput`.
            quality: of the tokens before the step, or None.
            before: the canvas before the step, int64 (B, L).
            work: positions that the step could change, bool (B, L).
            nfe_per_row: forward passes of each row so far.
            mask_token_id: id of the mask.
        """
        drawn = torch.full(before.shape, torch.nan, device=before.device)
        drawn = drawn.masked_scatter(step.unmasked, step.sampled_probs.float())
        verdicts: list[str | None] = [None] * len(before)
        if step.finished is not None:
            judged = work.any(-1) & ~(work & (before == mask_token_id)).any(-1)
            ends = zip(judged.tolist(), step.finished.tolist(), step.accepted.tolist(), strict=True)
            verdicts = [
                None if not was_judged else "repair" if not ended else "accepted" if fine else "given up"
                for was_judged, ended, fine in ends
            ]
        return cls(
            sample=step.prev_sample.cpu(),
            quality=None if quality is None else quality.float().cpu(),
            unmasked=step.unmasked.cpu(),
            remasked=step.remasked.cpu(),
            drawn=drawn.cpu(),
            nfe_per_row=list(nfe_per_row),
            verdicts=verdicts,
        )


class Trace(list[TraceStep]):
    """The `TraceStep`s of a run in order, with what is needed to show them: `out.trace` of a pipeline.

    Args:
        start: the canvas before the first step, int64 (B, L).
        generated: positions that are generated, bool (B, L).
        attention_mask: 1 for tokens and 0 for padding, (B, L), or None.
        mask_token_id: id of the mask.
        tokenizer: turns ids into strings; None shows the ids.
        prompted: a prompt or chat was continued, and is shown apart from the answer; False for infilling.
        scheduler: class name of the scheduler, for the text of the page.
    Attributes set at the end of the run:
        result: the canvas that the pipeline returned, int64 (B, L).
        quality: quality of the result, float32 (B, L); None if it was not requested.
        confidence, accepted: of each row, as in `PrismPipelineOutput`, for all samples; or None.
        nfe_per_row: forward passes of each row, the one for `quality` included.
    """

    def __init__(
        self,
        start: Tensor,
        generated: Tensor,
        mask_token_id: int,
        tokenizer: Any = None,
        attention_mask: Tensor | None = None,
        prompted: bool = False,
        scheduler: str = "",
    ) -> None:
        super().__init__()
        self.start, self.generated = start.cpu(), generated.cpu()
        self.attention_mask = None if attention_mask is None else attention_mask.cpu()
        self.mask_token_id, self.tokenizer = mask_token_id, tokenizer
        self.prompted, self.scheduler = prompted, scheduler
        self.result: Tensor | None = None
        self.quality: Tensor | None = None
        self.confidence: list[float] | None = None
        self.accepted: list[bool] | None = None
        self.nfe_per_row: list[int] | None = None

    def finish(
        self,
        result: Tensor,
        quality: Tensor | None,
        confidence: Tensor | None,
        accepted: Tensor | None,
        nfe_per_row: list[int],
    ) -> Trace:
        """Set the attributes of the end of the run."""
        self.result = result.cpu()
        self.quality = None if quality is None else quality.float().cpu()
        self.confidence = None if confidence is None else confidence.tolist()
        self.accepted = None if accepted is None else accepted.tolist()
        self.nfe_per_row = list(nfe_per_row)
        return self

    def to_html(
        self,
        path: str | Path | None = None,
        *,
        title: str = "PRISM",
        columns: int | None = None,
        rows: Sequence[int] | None = None,
    ) -> str:
        """One self-contained page that plays the run; every token has its history and its quality. No network.

        The page opens on the result. Play, scrub, or step with the arrow keys. Point at a token, or focus it, to see
        when it was written, how sure the model was, and why it was masked again. Below are counts, qualities, forward
        passes and judgements of every step. The page follows the reader's light or dark setting.

        Args:
            path: file to write, UTF-8; None writes no file.
            title: heading of the page; plain text.
            columns: lay tokens out as a grid of this width (9: a Sudoku, with box borders); None for running text.
            rows: rows of the batch to show, a list of ints; None for all. The page grows with rows, tokens and steps:
                1,024 tokens in 256 steps take about 0.4 MB with a head.
        Returns:
            the page, HTML.
        Raises:
            ValueError: a trace without steps, `columns` below 1, or a row outside the batch.
        """
        from .trace_page import trace_page

        page = trace_page(self, title=title, columns=columns, rows=rows)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def to_svg(self, path: str | Path | None = None, *, row: int = 0, columns: int = 40, seconds: float = 0.4) -> str:
        """A picture that plays one row of the run in a loop, for a README or slides: SVG without a script.

        A token that was just written is white, and one that was just masked again pale orange and empty. Other tokens
        have the colour of their quality, from orange for 0 to blue for 1. Without a head it is the colour of the
        probability with which they were drawn.

        Args:
            path: file to write, UTF-8; None writes no file.
            row: the row of the batch to show.
            columns: cells in a line; 9 with 81 tokens draws the boxes of a Sudoku.
            seconds: duration of each step.
        Returns:
            the picture, SVG.
        Raises:
            ValueError: a trace without steps, or an argument out of its range.
        """
        from .trace_svg import trace_svg

        picture = trace_svg(self, row=row, columns=columns, seconds=seconds)
        if path is not None:
            Path(path).write_text(picture, encoding="utf-8")
        return picture
