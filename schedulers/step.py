"""The beginning and the end of every scheduler's `step`: its arguments, checked and counted, and its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from .functional import Generators, highest, lowest, uniform_at, visible_target
from .protocol import Scheduler
from .token_sampling import Logits, Sampling, draw_at, probability_at, true_positions
from .validation import check_mask_token, check_sample, check_timestep, resolve_sampling

Memory = TypeVar("Memory", bound=tuple)


@dataclass
class PrismSchedulerOutput(BaseOutput):
    """What `step` of our schedulers returns.

    Args:
        prev_sample: the next sample, of the shape and dtype of `sample`, (B, L).
        unmasked: masks that were filled in this step, bool (B, L).
        remasked: visible tokens that became masks in this step, bool (B, L); never also in `unmasked`.
        sampled_tokens: the tokens written, int64 (N,), in row-major order of `unmasked`.
        sampled_probs: the model's own probabilities of these tokens at temperature 1, float32 (N,).
        finished: rows that need no further forward pass, bool (B,). None from schedulers that use all their steps.
        accepted: finished rows whose canvas was judged good enough, bool (B,). None as above.
        restored: visible tokens of finished rows that were replaced by those of an earlier, better canvas, bool (B, L).
            None as above.
        judged: quality of each generated token of a judged and finished row, float32 (B, L), NaN elsewhere. None as
            above.
    """

    prev_sample: Tensor
    unmasked: Tensor
    remasked: Tensor
    sampled_tokens: Tensor
    sampled_probs: Tensor
    finished: Tensor | None = None
    accepted: Tensor | None = None
    restored: Tensor | None = None
    judged: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One call of a scheduler's `step`: its arguments, checked, and what every rule counts. B rows, L positions.

    Args:
        model_output: as `PrismScheduler.step`.
        index: the timestep, from 0.
        num_steps: T.
        sample: token ids, (B, L).
        generation_mask: positions that may change, bool (B, L).
        mask_token_id: id of the mask.
        order: which masks are filled first, one of `ORDERS`.
        sampling: temperature, top_p and top_k.
        generator: as `PrismScheduler.step`.
        masked, visible: generated positions that hold a mask, and those that hold a token, bool (B, L).
        total, shown: the number of generated positions, and of the visible ones, int64 (B,).
    """

    model_output: Logits
    index: int
    num_steps: int
    sample: Tensor
    generation_mask: Tensor
    mask_token_id: int
    order: str
    sampling: Sampling
    generator: Generators
    masked: Tensor
    visible: Tensor
    total: Tensor
    shown: Tensor

    @classmethod
    def of(
        cls,
        scheduler: Scheduler,
        model_output: Logits,
        timestep: int | Tensor,
        sample: Tensor,
        generation_mask: Tensor | None,
        mask_token_id: int | None,
        temperature: float | None,
        top_p: float | None,
        top_k: int | None,
        generator: Generators,
    ) -> Step:
        """Read the arguments of `step`. Those that are None come from the scheduler's config.

        Raises:
            ValueError: a wrong shape or dtype, a timestep outside the schedule, no mask token, a value out of range.
        """
        config = scheduler.config
        index = check_timestep(timestep, scheduler.timesteps)
        generation_mask = check_sample(sample, model_output, generation_mask)
        mask_token_id = check_mask_token(config["mask_token_id"] if mask_token_id is None else mask_token_id)
        masked = generation_mask & (sample == mask_token_id)
        visible = generation_mask & ~masked
        return cls(
            model_output=model_output,
            index=index,
            num_steps=scheduler.num_inference_steps,
            sample=sample,
            generation_mask=generation_mask,
            mask_token_id=mask_token_id,
            order=config.get("order", "random"),
            sampling=resolve_sampling(config, temperature, top_p, top_k),
            generator=generator,
            masked=masked,
            visible=visible,
            total=generation_mask.sum(-1),
            shown=visible.sum(-1),
        )

    @property
    def target(self) -> Tensor:
        """Generated tokens that are visible after this step of the static schedule, int64 (B,): ceil(M (i + 1) / T)."""
        return visible_target(self.index, self.num_steps, self.total)

    @property
    def is_last(self) -> bool:
        """Is it the last of the T steps, in which nothing may be remasked?"""
        return self.index == self.num_steps - 1

    @property
    def nothing(self) -> Tensor:
        """No position at all, bool (B, L)."""
        return torch.zeros_like(self.masked)

    def uniform(self, draws: int) -> Tensor:
        """Uniform numbers in [0, 1) for each generated position, float32 (draws, B, L)."""
        return uniform_at(self.generation_mask, draws, self.generator)

    def own_probability(self, positions: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The model's own probability, at temperature 1, of some tokens at `positions`, bool (B, L).

        The tokens are those of `sample`, or `tokens`, int64 (B, L). Returns float32 (B, L), 0 outside `positions`.
        """
        tokens = self.sample if tokens is None else tokens
        return probability_at(self.model_output, positions, tokens, self.mask_token_id)

    def draw(self, positions: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """A token for each of `positions`, bool (B, L), and its probability, (N,) each. `u`: uniform numbers (B, L)."""
        index = true_positions(positions, int(positions.sum()))
        return draw_at(self.model_output, positions, index, self.sampling, self.mask_token_id, u)[:2]

    def reveal(
        self,
        n: Tensor,
        u_order: Tensor,
        u_token: Tensor,
        threshold: float | None = None,
        penalty: tuple[Tensor, Tensor] | None = None,
        most_wrong: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fill n masks of each row.

        "random" and "left_to_right" pick the positions first, and then need logits nowhere else. The other orders draw
        a token at every mask and write those of the highest `order_score`, so they need logits at all masks.

        Args:
            n: int64 of shape (B,); below 1 fills nothing.
            u_order, u_token: independent uniform numbers, float32 of shape (B, L).
            threshold: with order "confidence", also write every token of a confidence above it, and at least one token;
                None for n alone.
            penalty: as `draw_at`.
            most_wrong: with order "confidence", also write further tokens, the surest first, while the sum of
                1 - confidence over all written tokens, their expected number of errors, is at most this. None for n
                alone.
        Returns:
            which masks were filled, bool (B, L); their tokens, int64 (N,); and the model's probabilities of these
            tokens, float32 (N,).
        """
        masked, scored = self.masked, self.order not in ("random", "left_to_right")
        if threshold is not None:
            n = n.clamp(min=1)  # a row that is ahead of the schedule must not wait for it
        if self.order == "random":
            candidates = lowest(u_order, masked, n)
        elif self.order == "left_to_right":
            candidates = masked & (masked.cumsum(-1) <= n[:, None])
        else:
            candidates = masked
        written = torch.minimum(n, masked.sum(-1)).clamp(min=0).sum()
        number, kept_number = torch.stack([candidates.sum(), written]).tolist()  # the one time that a step waits
        index, order = true_positions(candidates, number), self.order if scored else None
        where = (self.model_output, candidates, index, self.sampling, self.mask_token_id)
        tokens, probs, score = draw_at(*where, u_token, order, penalty)
        if not scored:
            return candidates, tokens, probs
        score = torch.zeros_like(u_order).masked_scatter(masked, score)
        if threshold is not None:
            n = torch.maximum(n, (masked & (score > threshold)).sum(-1))
        if most_wrong is not None:
            wrong = (1 - score).masked_fill(~masked, torch.inf).sort(-1).values.cumsum(-1)
            n = torch.maximum(n, (wrong <= most_wrong).sum(-1))
        if threshold is not None or most_wrong is not None:
            kept_number = int(torch.minimum(n, masked.sum(-1)).clamp(min=0).sum())  # the tokens decide: a second wait
        unmasked = highest(score, masked, n)
        (kept,) = true_positions(unmasked[index], kept_number)  # among the masks, those that are filled
        return unmasked, tokens[kept], probs[kept]

    def recall(self, memory: Memory | None) -> Memory | None:
        """`memory`, what a rule noted in the last step. None in the first step, or if memory[0] is not (B, L)."""
        fits = self.index > 0 and memory is not None and memory[0].shape == self.sample.shape
        return memory if fits else None

    def output(self, unmasked: Tensor, tokens: Tensor, probs: Tensor, remasked: Tensor) -> PrismSchedulerOutput:
        """The output of the step that wrote `tokens` at `unmasked` and put masks at `remasked`, bool (B, L) both."""
        filled = self.sample.masked_scatter(unmasked, tokens.to(self.sample.dtype))
        prev_sample = filled.masked_fill(remasked, self.mask_token_id)
        return PrismSchedulerOutput(prev_sample, unmasked, remasked, tokens, probs)
