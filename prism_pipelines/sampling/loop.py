"""The sampling loop: blocks from left to right, in each the scheduler's timesteps, in each one call of the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..models.checks import non_finite, refuse_nan
from ..models.denoiser import GuidedLogits, LazyLogits, MaskedDenoiser, ProcessedLogits, token_positions
from ..models.families import MDMSpec
from ..models.precision import warn_of_slow_bfloat16
from ..models.quality_head import QualityHead
from ..schedulers.context import RunContext
from ..schedulers.protocol import Scheduler
from ..schedulers.validation import is_number, loop_steps, own_fields
from .canvas import Canvas, split_blocks
from .kv_cache import CachedForward, ForwardOutput
from .recorder import RunRecorder, recorder_for
from .stopping import Endings, finished_rows
from .trace import Trace, TraceStep

NAN_QUALITY = "`quality_head` gives NaN"
Logits = LazyLogits | GuidedLogits | ProcessedLogits


@dataclass(frozen=True)
class SamplingContext:
    """What stays the same through one call of the pipeline.

    Args:
        denoiser, quality_head, scheduler: the parts; the head may be None.
        canvas: what is filled.
        mask_token_id: of the mask.
        sampling: keyword arguments of `scheduler.step`: temperature, top_p, top_k, generator.
        cfg_scale: of `GuidedLogits`; None or 0 for one forward pass per step.
        cache, cache_refresh_interval: of `CachedForward`.
        endings: what finishes a row before its canvas is full.
        tokenizer: needed for stop strings.
        logits_processor: of `ProcessedLogits`, or None.
        records_draws: record the probability with which each token was drawn, even if neither head nor scheduler
            reads it.
        trace: gets every step of the run; None for no trace.
    """

    denoiser: MaskedDenoiser
    quality_head: QualityHead | None
    scheduler: Scheduler
    canvas: Canvas
    mask_token_id: int
    sampling: dict
    cfg_scale: float | None = None
    cache: str = "none"
    cache_refresh_interval: int | None = None
    endings: Endings = field(default_factory=Endings)
    tokenizer: Any = None
    logits_processor: Callable | None = None
    records_draws: bool = False
    trace: Trace | None = None

    @property
    def forwards_per_step(self) -> int:
        """Forward passes of one step: 2 with guidance, else 1."""
        return 2 if self.cfg_scale else 1

    @cached_property
    def adaptive(self) -> bool:
        """May a threshold fill a block before its steps are over? A loop needs all its steps."""
        return bool(own_fields(self.scheduler).get("use_threshold", False)) and not loop_steps(self.scheduler)

    @cached_property
    def rechecks(self) -> bool:
        """Does a full block take one more forward pass, so that its last tokens are judged and perhaps remasked?"""
        return own_fields(self.scheduler).get("quality_threshold") is not None


@dataclass
class SamplingState:
    """What changes during one call of the pipeline.

    Args:
        sample: ids of the canvas, int64 (B, L).
        nfe, nfe_per_row: forward passes made, and those in which each row took part, int64 (B,).
        judged: quality of the tokens in rows that the scheduler finished, float32 (B, L); NaN elsewhere.
        accepted: rows of which the scheduler accepted every block so far, bool (B,); None if it judges no rows.
        recorder: keeps the run context; None if neither head nor scheduler reads it.
    """

    sample: Tensor
    nfe: int
    nfe_per_row: Tensor
    judged: Tensor
    accepted: Tensor | None = None
    recorder: RunRecorder | None = None

    def take_verdict(self, step: Any, rows: Tensor) -> Tensor:
        """Store the judgement of a step on the active `rows`, bool (B,), and return the rows that it finished."""
        finished = rows & step.finished
        self.judged = torch.where(finished[:, None] & ~step.judged.isnan(), step.judged, self.judged)
        before = torch.ones_like(rows) if self.accepted is None else self.accepted
        self.accepted = before & ~(finished & ~step.accepted)
        return finished


def copy_of_scheduler(scheduler: Scheduler) -> Any:
    """A copy for one run, which may change its timesteps, history and counts, also those of a subclass.

    `from_config` would lose what a subclass keeps outside its config. A deep copy would copy a model in a subclass.
    """
    own = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if type(value) in (list, dict, set, Tensor):
            setattr(own, name, copy.deepcopy(value))
    return own


def scheduler_of(scheduler: Scheduler, threshold: float | None) -> Scheduler:
    """The scheduler of one call: a copy of the pipeline's, with `use_threshold` if a `threshold` is given.

    Raises:
        ValueError: the threshold, or the one in the config, is outside (0, 1]; or the scheduler has no threshold; or
            its order is not "confidence".
    """
    config, kind = own_fields(scheduler), type(scheduler).__name__
    own = copy_of_scheduler(scheduler)
    if threshold is None and not config.get("use_threshold", False):
        return own
    value = config["threshold"] if threshold is None else threshold
    if not is_number(value, 0, 1) or value == 0:
        raise ValueError(f"`threshold` must be a number in (0, 1], got {value!r}.")
    if threshold is None:
        return own
    if "use_threshold" not in config:
        raise ValueError(
            f"`threshold` is {threshold}, but {kind} does not decode by confidence. Schedulers that do: "
            "MDLMScheduler, PrismScheduler, SelfConfidenceScheduler."
        )
    if config["order"] != "confidence":
        raise ValueError(
            f"`threshold` is {threshold}, but the scheduler writes in {config['order']!r} order, which does not ask "
            f'how sure a token is. Set pipe.scheduler = {kind}.from_config(pipe.scheduler.config, order="confidence").'
        )
    own.register_to_config(use_threshold=True, threshold=threshold)
    return own


def blocks_of(
    spec: MDMSpec, canvas: Canvas, block_length: int | None, num_steps: int | None
) -> list[tuple[Tensor, int]]:
    """`split_blocks` of a canvas; for a block-causal model, blocks begin where the model's own blocks do.

    Raises:
        ValueError: fewer steps than blocks, or a length that is neither a multiple nor a divisor of the model's own.
    """
    if spec.attention != "block_causal":
        return split_blocks(canvas.generated, block_length, num_steps)
    own = spec.block_length
    block_length = block_length or own
    if own and block_length and block_length % own and own % block_length:
        raise ValueError(
            f"`block_length` must be a multiple or a divisor of the model's block of {own} tokens, got {block_length}."
        )
    positions = token_positions(canvas.sample, canvas.attention_mask)
    return split_blocks(canvas.generated, block_length, num_steps, positions)


def warn_of_idle_steps(run: SamplingContext, blocks: list[tuple[Tensor, int]]) -> None:
    """Warn if some steps can do nothing: a block has more steps than masks, and the scheduler never remasks."""
    if run.adaptive or run.scheduler.can_remask:
        return
    idle = sum(max(0, num_steps - int(block_mask.sum(-1).max())) for block_mask, num_steps in blocks)
    if idle:
        warnings.warn(
            f"{idle} of {sum(num_steps for _, num_steps in blocks)} steps will write nothing: there are fewer tokens "
            f"to generate, and {type(run.scheduler).__name__} remasks none. Lower `num_inference_steps`.",
            stacklevel=4,
        )


def fill_canvas(run: SamplingContext, blocks: list[tuple[Tensor, int]], after_step: Callable) -> SamplingState:
    """Fill the masks of a canvas.

    Args:
        run: the parts and settings.
        blocks: positions of each block, bool (B, L), and its number of steps, as `split_blocks` gives them.
        after_step: called after each step with the timestep and the tensors of a callback; returns the canvas for the
            next step.
    """
    sample = run.canvas.sample
    if sample.device.type == "cpu" and run.denoiser.model.dtype == torch.bfloat16:
        warn_of_slow_bfloat16("Load the model with torch_dtype=torch.float32.")
    always = ("draw",) if run.records_draws else ()
    recorder = recorder_for(run.denoiser, run.canvas.generated, run.quality_head, run.scheduler, always=always)
    state = SamplingState(
        sample,
        0,
        torch.zeros(len(sample), dtype=torch.long),
        torch.full(sample.shape, torch.nan, device=sample.device),
        recorder=recorder,
    )
    call = ModelCall(run, recorder)
    finished = torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
    for block_mask, num_steps in blocks:  # (B, L), int
        fill_block(run, call, state, block_mask & ~finished[:, None], num_steps, after_step)
        ends = run.endings
        if ends.fill is not None:
            finished = finished | finished_rows(
                state.sample, run.canvas.generated, run.mask_token_id, ends.finishing, ends.stops, run.tokenizer
            )
            rest = run.canvas.generated & (state.sample == run.mask_token_id) & finished[:, None]
            state.sample = state.sample.masked_fill(rest, ends.fill)
    return state


def fill_block(
    run: SamplingContext,
    call: ModelCall,
    state: SamplingState,
    block_mask: Tensor,
    num_steps: int,
    after_step: Callable,
) -> None:
    """Fill the masks of one block, bool (B, L), and update `state`. Rows without work take part in no forward pass."""
    active = block_mask.any(-1)  # (B,)
    taking_part = active.tolist()
    if not any(taking_part):
        return
    run.scheduler.set_timesteps(num_steps, device=block_mask.device)
    call.begin(state.sample, block_mask)
    for t in run.scheduler.timesteps:  # one denoising per timestep, for every scheduler
        work = block_mask & active[:, None]
        logits, quality, context = call(state.sample, taking_part, work)
        extra: dict[str, Any] = {"context": context} if getattr(run.scheduler, "reads_context", ()) else {}
        step = run.scheduler.step(
            logits,
            t,
            state.sample,
            quality=quality,
            generation_mask=work,
            mask_token_id=run.mask_token_id,
            **run.sampling,
            **extra,
        )
        if state.recorder is not None:
            state.recorder.after_step(step)
        state.nfe += run.forwards_per_step
        state.nfe_per_row += run.forwards_per_step * torch.tensor(taking_part)
        if run.trace is not None:
            forwards = state.nfe_per_row.tolist()
            run.trace.append(TraceStep.of(step, quality, state.sample, work, forwards, run.mask_token_id))
        tensors = {
            "sample": step.prev_sample,
            "quality": quality,
            "remasked": step.remasked,
            "unmasked": step.unmasked,
            "generation_mask": block_mask,
        }
        state.sample = after_step(t, tensors)
        if state.sample is not step.prev_sample:
            call.forget()
        if getattr(step, "finished", None) is not None:
            active = active & ~state.take_verdict(step, active)
        elif run.adaptive:
            active = rows_at_work(run, block_mask, state.sample, step)
        else:
            continue  # all rows take part in the next step too; asking which would wait for the device
        taking_part = active.tolist()
        if not any(taking_part):
            break


def rows_at_work(run: SamplingContext, block_mask: Tensor, sample: Tensor, step: Any) -> Tensor:
    """Rows of a block (B, L) that another step could change, bool (B,).

    These are the rows with a mask left. If `run.rechecks`, also the rows in which `step` wrote or remasked a token.
    """
    at_work = (block_mask & (sample == run.mask_token_id)).any(-1)
    if run.rechecks:
        at_work = at_work | (step.unmasked | step.remasked).any(-1)
    return at_work


class ModelCall:
    """Logits, quality and run context of a canvas, by one forward pass of the model, or two with guidance."""

    def __init__(self, run: SamplingContext, recorder: RunRecorder | None = None):
        self.run, self.recorder = run, recorder
        settings = (run.denoiser, run.canvas.attention_mask, run.cache, run.cache_refresh_interval)
        self._given = CachedForward(*settings)
        self._free = CachedForward(*settings) if run.cfg_scale else None
        self._quality: Tensor | None = None

    def begin(self, sample: Tensor, block_mask: Tensor) -> None:
        """Begin a block; arguments as `CachedForward.begin`."""
        self._given.begin(sample, block_mask)
        if self.recorder is not None:
            self.recorder.begin(block_mask)
        if self._free is not None:
            self._free.begin(sample, block_mask)

    def forget(self) -> None:
        """Drop what is cached, because the canvas was changed from outside."""
        self._given.forget()
        if self._free is not None:
            self._free.forget()

    def __call__(
        self, sample: Tensor, taking_part: list[bool], work: Tensor
    ) -> tuple[Logits, Tensor | None, RunContext | None]:
        """One forward pass on a canvas, or two with guidance.

        Args:
            sample: the canvas, int64 (B, L).
            taking_part: for each row, does it take part in the pass?
            work: positions that may change in this step, bool (B, L).
        Returns:
            logits, to be indexed by a bool (B, L) mask; quality, float32 (B, L), or None without a head; and the
            `RunContext`, None if nothing is recorded. Rows that do not take part have the values of an earlier pass.
        """
        run = self.run
        seen = self._given(sample, taking_part)
        logits: Any = LazyLogits(run.denoiser, seen.canvas)
        if self._free is not None and run.cfg_scale is not None:
            free = self._free(torch.where(run.canvas.generated, sample, run.mask_token_id), taking_part)
            logits = GuidedLogits(logits, LazyLogits(run.denoiser, free.canvas), run.cfg_scale)
        if run.logits_processor is not None:
            logits = ProcessedLogits(logits, run.logits_processor, sample)
        context = None if self.recorder is None else self.recorder.observe(sample, seen.canvas, work)
        if run.quality_head is not None:
            self._quality = seen.spread(self._judge(run.quality_head, seen, sample, context), self._quality)
            no_nan(self._quality.masked_fill(~work, 0.0))
        return logits, self._quality, context

    def _judge(self, head: QualityHead, seen: ForwardOutput, sample: Tensor, context: RunContext | None) -> Tensor:
        mask = self.run.canvas.attention_mask
        # A head that reads the mask runs without a cache (`check_cache`), so all columns are there.
        mask = None if mask is None or seen.selection.columns is not None else seen.selection.take(mask)
        inputs = head.inputs(context, sample, self.run.mask_token_id)
        known = {name: None if value is None else seen.selection.take(value) for name, value in inputs.items()}
        return head.quality(seen.fresh, mask, **known)


def judged_quality(run: SamplingContext, state: SamplingState) -> Tensor | None:
    """Quality of a full canvas, float32 (B, L), as the scheduler judged it; None unless every token was judged."""
    if state.accepted is None or (state.judged.isnan() & run.canvas.generated).any():
        return None
    return state.judged.masked_fill(~run.canvas.generated, 1.0)


def look_again(run: SamplingContext, state: SamplingState) -> Tensor:
    """Quality of a full canvas by one more forward pass, float32 (B, L); 1 where nothing is generated."""
    head, mask = run.quality_head, run.canvas.attention_mask
    assert head is not None  # `check_scheduler_and_head` refuses a call that would look again without one
    hidden, known = run.denoiser.hidden(state.sample, mask), {}
    if state.recorder is not None:
        known = head.inputs(state.recorder.observe(state.sample, hidden), state.sample, run.mask_token_id)
    quality = head.quality(hidden, mask, **known)
    return no_nan(quality.masked_fill(~run.canvas.generated, 1.0))


def no_nan(quality: Tensor) -> Tensor:
    """Return `quality`. A NaN raises an error for `nan_errors` later, since nothing waits for the device here."""
    torch._assert_async(~quality.isnan().any(), NAN_QUALITY)
    return quality


@contextmanager
def nan_errors(denoiser: MaskedDenoiser, canvas: Canvas, quality_head: QualityHead | None = None) -> Iterator[None]:
    """Turn the errors of a run with NaN in logits or qualities into an error that names where the NaN comes from.

    Raises:
        ValueError: as `checks.refuse_nan`, or the quality of a token is NaN.
    """
    try:
        yield
    except RuntimeError as error:
        if "The logits hold a NaN" in str(error) or NAN_QUALITY in str(error):
            refuse_nan(denoiser, canvas.sample, canvas.attention_mask)
        if NAN_QUALITY in str(error):
            bad = None if quality_head is None else non_finite(quality_head.state_dict().items())
            why = f": {bad}" if bad else ", and its weights are finite: numbers overflow"
            raise ValueError(f"{NAN_QUALITY}{why}. Load another head.") from error
        raise


@contextmanager
def memory_errors(rows: int, length: int) -> Iterator[None]:
    """Turn an out-of-memory error into one that says which arguments to lower.

    Raises:
        torch.OutOfMemoryError: with the size of the batch.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU's allocator raises it bare
        full = isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
        if not full:
            raise
        raise torch.OutOfMemoryError(
            f"Out of memory with {rows} rows of {length} tokens. Lower the number of rows of this call (prompts, or "
            f"`num_samples`) or `gen_length`; a smaller `block_length` needs less where the logits do not fit. {error}"
        ) from error
