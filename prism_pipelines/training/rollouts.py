"""States that a model's own runs pass through: half-written rows, which the real schedulers advance during training.

A pool holds the rows of a batch, split into runs. Each forward pass of training is also a forward pass of every run:
its hidden states train the head, and its logits let the schedulers write on. So states of the sampler cost no forward
pass of their own. The idea comes from the streaming in PUMA (github.com/JaeyeonKim01/PUMA).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import schedulers
from ..models.denoiser import LazyLogits, MaskedDenoiser
from ..sampling.canvas import Canvas
from ..sampling.loop import blocks_of
from ..sampling.recorder import RunRecorder
from ..schedulers import MDLMScheduler, PrismScheduler, PrismSchedulerOutput
from ..schedulers.functional import uniform
from ..schedulers.validation import own_fields

REPAIR_STEPS = (4, 8, 16)


@dataclass(frozen=True)
class RolloutSettings:
    """How the runs of a pool differ. Each run draws its own values.

    Args:
        steps_min, steps_max: forward passes of the first filling, uniform on a logarithmic scale; at most one a token.
        orders: (order, temperature) of the schedulers, see `MDLMScheduler`.
        etas: shares of the visible tokens that `PrismScheduler` remasks in a step; 0 for no remasking.
        repairs: how often, at most, a full canvas is judged, masked again in part, and filled again.
        block_length: of semi-autoregressive runs; None for one block, or the model's own.
        mask_rate_min, mask_rate_max: a row begins without this share of its trainable tokens, drawn for each row.
    Raises:
        ValueError: steps that are not 1 <= min <= max, or fewer repairs than 0.
    """

    steps_min: int = 8
    steps_max: int = 64
    orders: tuple[tuple[str, float], ...] = (("random", 1.0), ("random", 1.0), ("random", 1.0), ("confidence", 0.0))
    etas: tuple[float, ...] = (0.0, 0.0, 0.05, 0.2)
    repairs: int = 2
    block_length: int | None = None
    mask_rate_min: float = 1.0
    mask_rate_max: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.steps_min <= self.steps_max:
            raise ValueError(
                "`rollout_steps_min` and `rollout_steps_max` must hold 1 <= min <= max, got "
                f"{self.steps_min} and {self.steps_max}."
            )
        if self.repairs < 0:
            raise ValueError(f"`rollout_repairs` must be at least 0, got {self.repairs}.")


def pick(options: tuple) -> Any:
    """One of some options, each equally likely, by torch's default generator."""
    return options[int(uniform((1,)) * len(options))]


@dataclass
class Rollout:
    """Rows that are filled together, by one scheduler, from one first canvas.

    Args:
        canvas: the rows as they began; `canvas.generated` says what the run writes.
        clean: right tokens, int64 (R, L); the mask token where none is known.
        scheduler: of this run. It must keep nothing from one step to the next.
        segments: positions to fill, bool (R, L), and their number of forward passes: first blocks, then repairs.
        blocks: how many of the segments are blocks.
        repairs: how often the full canvas will still be judged and repaired.
        recorder: keeps the run context.
        sample: the canvas now, int64 (R, L).
        segment, step: index of the next segment, and of the next step in it.
        done: is the run over?
    """

    canvas: Canvas
    clean: Tensor
    scheduler: Any
    segments: list[tuple[Tensor, int]]
    blocks: int
    repairs: int
    recorder: RunRecorder
    sample: Tensor
    segment: int = 0
    step: int = 0
    done: bool = False

    @property
    def is_full(self) -> bool:
        """Is every segment filled?"""
        return self.segment == len(self.segments)

    @property
    def at_work(self) -> Tensor:
        """Positions that the sampler would judge now, bool (R, L): the current block, or all that is generated."""
        in_block = self.blocks > 1 and self.segment < self.blocks
        return self.segments[self.segment][0] if in_block else self.canvas.generated

    @property
    def judged(self) -> Tensor:
        """Visible tokens among `at_work`, bool (R, L)."""
        return self.at_work & (self.sample != self.recorder.denoiser.spec.mask_token_id)


class RolloutPool:
    """The runs of a batch. `refill`, make a forward pass on `batch()`, and `advance` each run by what it gave.

    All random numbers come from torch's default generator. A training run that is resumed with the state of that
    generator, and with `state` of the pool, is exactly the one that was not interrupted.

    Args:
        denoiser: of the model that writes.
        reads: inputs of the run context that are recorded.
        settings: how runs differ.
        num_runs: into which the rows of a batch are split. All rows of a run have one scheduler and one schedule.
    """

    def __init__(
        self, denoiser: MaskedDenoiser, reads: Iterable[str], settings: RolloutSettings, num_runs: int
    ) -> None:
        self.denoiser, self.reads, self.settings, self.num_runs = denoiser, tuple(reads), settings, num_runs
        self.runs: list[Rollout] = []

    @property
    def mask_token_id(self) -> int:
        """Of the model."""
        return self.denoiser.spec.mask_token_id

    def refill(
        self, input_ids: Tensor, trainable_mask: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> None:
        """Begin a new run for each that has ended, from rows (B, L) of a batch. Run g takes every G-th row from g on.

        Args:
            input_ids: clean tokens; the mask token where none is known.
            trainable_mask: true where a token may be written, (B, L); None for all. Others are given.
            attention_mask: 1 for tokens and 0 for padding, (B, L); None for no padding.
        """
        count = min(self.num_runs, len(input_ids))
        runs: list[Rollout | None] = [*self.runs] or [None] * count
        self.runs = []
        for number, run in enumerate(runs):
            if run is None or run.done:
                rows = slice(number % count, None, count)
                some = [values if values is None else values[rows] for values in (trainable_mask, attention_mask)]
                run = self.begin(input_ids[rows], *some)
            self.runs.append(run)

    def begin(self, clean: Tensor, trainable_mask: Tensor | None, attention_mask: Tensor | None) -> Rollout:
        """A new run of rows (R, L), with settings of its own."""
        chosen, mask = self.settings, self.mask_token_id
        writable = torch.ones_like(clean, dtype=torch.bool) if trainable_mask is None else trainable_mask.bool()
        writable = writable if attention_mask is None else writable & attention_mask.bool()
        u = uniform((len(clean), 1), None, clean.device)
        rate = chosen.mask_rate_max - (chosen.mask_rate_max - chosen.mask_rate_min) * u
        generated = writable & ((uniform(clean.shape, None, clean.device) < rate) | (clean == mask))
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        canvas = Canvas(clean.masked_fill(generated, mask), generated, attention_mask, whole=True)
        longest = max(1, int(generated.sum(-1).max()))
        low, high = min(chosen.steps_min, longest), min(chosen.steps_max, longest)
        steps = round(low * (high / low) ** float(uniform((1,))))
        (order, temperature), eta = pick(chosen.orders), pick(chosen.etas)
        repairs = int(uniform((1,)) * (chosen.repairs + 1))
        same = {"order": order, "temperature": temperature}
        scheduler = PrismScheduler(**same, eta=eta) if eta else MDLMScheduler(**same)
        return self.start(canvas, clean, scheduler, steps, repairs)

    def start(self, canvas: Canvas, clean: Tensor, scheduler: Any, steps: int, repairs: int = 0) -> Rollout:
        """A run with these settings. If it has several blocks, each gets at least one step."""
        spec, block_length = self.denoiser.spec, self.settings.block_length
        if block_length is not None or spec.attention == "block_causal":
            shortest = block_length or spec.block_length or 1
            steps = max(steps, -(-canvas.sample.shape[1] // shortest) + 1)
        segments = blocks_of(spec, canvas, block_length, steps)
        recorder = RunRecorder(self.denoiser, canvas.generated, self.reads)
        recorder.begin(segments[0][0])
        return Rollout(canvas, clean, scheduler, segments, len(segments), repairs, recorder, canvas.sample)

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """Rows of all runs, int64 (B, L), padded on the right; and their attention mask, None if nothing is padded."""
        width = max(run.sample.shape[1] for run in self.runs)
        sample = torch.cat([self.padded(run.sample, width, self.mask_token_id) for run in self.runs])
        masks = [run.canvas.attention_mask for run in self.runs]
        if all(mask is None for mask in masks) and all(run.sample.shape[1] == width for run in self.runs):
            return sample, None
        whole = [torch.ones_like(r.sample) if m is None else m.long() for m, r in zip(masks, self.runs, strict=True)]
        return sample, torch.cat([self.padded(mask, width, 0) for mask in whole])

    @staticmethod
    def padded(values: Tensor, width: int, value: int) -> Tensor:
        """`values` (R, L), filled up on the right to (R, width)."""
        return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=value)

    def parts(self, values: Tensor) -> list[Tensor]:
        """`values` (B, L, ...) of all rows, split into those of each run."""
        rows = values.split([len(run.sample) for run in self.runs])
        return [part[:, : run.sample.shape[1]] for part, run in zip(rows, self.runs, strict=True)]

    @torch.no_grad()
    def advance(self, run: Rollout, hidden: Tensor, quality: Tensor) -> None:
        """One step of a run.

        Args:
            run: one of the pool, whose recorder has observed this forward pass.
            hidden: of the run's rows, (R, L, H).
            quality: P(token is right) of its tokens, float (R, L); read where the run remasks.
        """
        if run.is_full:
            run.done = not run.repairs
            if run.repairs:
                self._reopen(run, quality)
            return
        where, steps = run.segments[run.segment]
        run.scheduler.set_timesteps(steps)
        step = run.scheduler.step(
            LazyLogits(self.denoiser, hidden),
            run.step,
            run.sample,
            quality=quality,
            generation_mask=where,
            mask_token_id=self.mask_token_id,
        )
        run.recorder.after_step(step)
        run.sample, run.step = step.prev_sample, run.step + 1
        if run.step == steps:
            run.segment, run.step = run.segment + 1, 0
            if run.segment < run.blocks:
                run.recorder.begin(run.segments[run.segment][0])

    def _reopen(self, run: Rollout, quality: Tensor) -> None:
        """Masks a part of a full canvas, or of its last block, again: all tokens below a bar, or any."""
        last = run.segments[run.blocks - 1][0] if run.blocks > 1 else run.canvas.generated
        bar = uniform((len(quality), 1), None, quality.device)
        by_quality = float(uniform((1,))) < 0.5
        chosen = last & ((quality if by_quality else uniform(quality.shape, None, quality.device)) < bar)
        sample = run.sample.masked_fill(chosen, self.mask_token_id)
        nothing = run.sample[:0, 0]
        run.recorder.after_step(
            PrismSchedulerOutput(sample, torch.zeros_like(chosen), chosen, nothing, nothing.float())
        )
        run.sample, run.repairs = sample, run.repairs - 1
        run.segments.append((chosen, min(max(1, int(chosen.sum(-1).max())), pick(REPAIR_STEPS))))

    def state(self) -> dict[str, Tensor]:
        """The state of all runs, for a checkpoint: tensors by name, and the rest as JSON in bytes."""
        tensors: dict[str, Tensor] = {}
        facts = []
        for number, run in enumerate(self.runs):
            named: dict[str, Tensor | None] = {"sample": run.sample, "clean": run.clean, "first": run.canvas.sample}
            named |= {"generated": run.canvas.generated, "attention_mask": run.canvas.attention_mask}
            named |= {f"segment.{i}": where for i, (where, _) in enumerate(run.segments)}
            named |= {f"recorder.{name}": value for name, value in run.recorder.state().items()}
            tensors |= {f"{number}.{name}": value.clone() for name, value in named.items() if value is not None}
            fields = {name: value for name, value in own_fields(run.scheduler).items() if not name.startswith("_")}
            facts.append(
                {
                    "scheduler": type(run.scheduler).__name__,
                    "fields": fields,
                    "steps": [steps for _, steps in run.segments],
                    **{name: getattr(run, name) for name in ("blocks", "repairs", "segment", "step", "done")},
                }
            )
        return tensors | {"facts": torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)}

    def load_state(self, state: dict[str, Tensor], device: torch.device | None = None) -> None:
        """Continue from the result of `state`."""
        facts = json.loads(bytes(state["facts"].tolist()))
        self.runs = []
        for number, fact in enumerate(facts):
            named = {name.partition(".")[::2]: value for name, value in state.items()}
            own = {name: value.to(device) for (owner, name), value in named.items() if owner == str(number)}
            canvas = Canvas(own["first"], own["generated"], own.get("attention_mask"), whole=True)
            segments = [(own[f"segment.{i}"], steps) for i, steps in enumerate(fact["steps"])]
            recorder = RunRecorder(self.denoiser, canvas.generated, self.reads)
            prefix = "recorder."
            recorder.load_state({name[len(prefix) :]: v for name, v in own.items() if name.startswith(prefix)})
            scheduler = getattr(schedulers, fact["scheduler"]).from_config(fact["fields"])
            numbers = {name: fact[name] for name in ("blocks", "repairs")}
            run = Rollout(canvas, own["clean"], scheduler, segments, recorder=recorder, sample=own["sample"], **numbers)
            run.segment, run.step, run.done = (fact[name] for name in ("segment", "step", "done"))
            self.runs.append(run)
