"""What a pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from .pipeline_checks import is_calibrated
from .sampling.loop import SamplingContext, SamplingState
from .sampling.stopping import decode
from .sampling.trace import Trace


@dataclass
class PrismPipelineOutput(BaseOutput):
    """What a call of `PrismPipeline` returns.

    Args:
        sequences: the whole canvas, prompt and padding included, int64 (B, L).
        texts: the generated part of each row, or the whole row for `infill`; None with output_type="seq".
        quality: P(token is right) of every token, float32 (B, L) in [0, 1], 1 where nothing was generated; None unless
            `return_quality`.
        nfe: forward passes made.
        nfe_per_row: forward passes in which each row took part, list of B ints.
        trace: `Trace` of all samples, a list of `TraceStep` with a method `to_html`; None unless `return_trace`.
        confidence: P(all generated tokens of the row are right), the product of their qualities, float32 (B,). None
            unless the head is calibrated and the result was judged (by `return_quality`, `select`, or
            `JudgeAndRepairScheduler`). In open text many tokens are right at each place, so there the confidence can
            rank rows, but is no probability.
        accepted: rows in which `JudgeAndRepairScheduler` found that no further repair pays, bool (B,); None for
            schedulers that do not judge.
        probs: the model's own probability of each token when it was drawn, float32 (B, L), at temperature 1, before
            top_p and top_k, and after a `logits_processor`. 1 where nothing was generated. NaN for tokens that were not
            drawn (from a callback, or end tokens that fill a finished row). None unless `return_probs`.
    """

    sequences: Tensor
    texts: list[str] | None = None
    quality: Tensor | None = None
    nfe: int = 0
    nfe_per_row: list[int] | None = None
    trace: Trace | None = None
    confidence: Tensor | None = None
    accepted: Tensor | None = None
    probs: Tensor | None = None


@dataclass
class LikelihoodOutput(BaseOutput):
    """What `PrismPipeline.log_likelihood` returns.

    Args:
        log_likelihood: log-likelihood of the scored tokens of each row, in nats, float64 (B,). -inf if one of them is a
            token that the model never predicts.
        standard_error: standard error of `log_likelihood`, float64 (B,); 0 where nothing is random.
        num_tokens: number of scored tokens, int64 (B,).
        perplexity: exp(-log_likelihood / num_tokens), float64 (B,): an upper bound for method "bound".
        nfe: forward passes made.
        nfe_per_row: forward passes in which each row took part, list of B ints.
        token_log_probs: log p(token | all others), float32 (B, L), NaN elsewhere; None for method "bound".
    """

    log_likelihood: Tensor
    standard_error: Tensor
    num_tokens: Tensor
    perplexity: Tensor
    nfe: int
    nfe_per_row: list[int]
    token_log_probs: Tensor | None = None


def row_confidence(quality: Tensor, generated: Tensor) -> Tensor:
    """Log of the product of the qualities of each row's generated tokens: log P(all are right) if they are independent.

    Args:
        quality: P(token is right), float (B, L).
        generated: positions that count, bool (B, L).
    Returns:
        float32 (B,); 0 for a row without generated tokens.
    """
    return quality.float().clamp(min=1e-6).log().masked_fill(~generated, 0).sum(-1)


def output_of(
    run: SamplingContext,
    state: SamplingState,
    quality: Tensor | None,
    looks_again: bool,
    return_quality: bool,
    best_of: int | None,
    output_type: str,
) -> PrismPipelineOutput:
    """The output of a run. Of each `best_of` adjacent rows only the most confident one is kept; None keeps all."""
    generated, sample, accepted, texts = run.canvas.generated, state.sample, state.accepted, None
    if output_type == "text" and run.tokenizer is not None:
        texts = decode(sample, run.canvas, run.tokenizer, run.mask_token_id, run.endings)
    log_confidence = None if quality is None else row_confidence(quality, generated)
    confidence = log_confidence.exp() if log_confidence is not None and is_calibrated(run.quality_head) else None
    nfe_per_row = state.nfe_per_row + looks_again
    if run.trace is not None:
        run.trace.finish(sample, quality, confidence, accepted, nfe_per_row.tolist())
    probs = state.recorder.draw_probabilities(sample) if run.records_draws and state.recorder else None
    if best_of is not None and log_confidence is not None:
        best = log_confidence.view(-1, best_of).argmax(-1)
        keep = best + torch.arange(len(best), device=best.device) * best_of
        nfe_per_row = nfe_per_row.view(-1, best_of).sum(-1)
        texts = None if texts is None else [texts[row] for row in keep.tolist()]
        sample, rows = sample[keep], (quality, confidence, accepted, probs)
        quality, confidence, accepted, probs = (None if part is None else part[keep] for part in rows)
    return PrismPipelineOutput(
        sequences=sample,
        texts=texts,
        quality=quality if return_quality else None,
        nfe=state.nfe + looks_again,
        nfe_per_row=nfe_per_row.tolist(),
        trace=run.trace,
        confidence=confidence,
        accepted=accepted,
        probs=probs,
    )
