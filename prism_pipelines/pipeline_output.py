"""What a pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.utils import BaseOutput
from torch import Tensor

from .sampling.trace import TraceStep


@dataclass
class PrismPipelineOutput(BaseOutput):
    """What a call of `PrismPipeline` returns.

    Args:
        sequences: the whole canvas, prompt and padding included, int64 (B, L).
        texts: the generated part of each row, or the whole row for `infill`; None with output_type="seq".
        quality: P(token is right) of every token, float32 (B, L) in [0, 1], 1 where nothing was generated; None unless
            `return_quality`.
        nfe: forward passes made.
        nfe_per_row: the same for each row, list of B ints.
        trace: list of `TraceStep`, or None unless `return_trace`.
    """

    sequences: Tensor
    texts: list[str] | None = None
    quality: Tensor | None = None
    nfe: int = 0
    nfe_per_row: list[int] | None = None
    trace: list[TraceStep] | None = None
