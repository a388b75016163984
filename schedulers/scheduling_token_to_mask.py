"""Token-to-mask ("Remask, Don't Replace"): a token that the model no longer believes in becomes a mask again."""

from __future__ import annotations

from fractions import Fraction

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import lowest, uniform_at, visible_target
from .scheduling_prism import PrismSchedulerOutput
from .token_sampling import probability_at, reveal
from .validation import SchedulerConfig, check_config, check_run, is_int, is_number, read_sampling, read_step, require


class TokenToMaskScheduler(SchedulerMixin, SchedulerConfig):
    """Static schedule of T steps; visible tokens of probability below a threshold are remasked.

    The probability is the model's own of the token that stands there, at temperature 1, as `SelfConfidenceScheduler`
    reads it. Of the tokens below the threshold the least probable go first: in a step at most a share of the visible
    ones, from each position at most so many times in a run, and never so many that the schedule could not be met: of M
    generated tokens ceil(M (i + 1) / T) are visible after step i.

    Args:
        threshold: remask a token of probability below this, in [0, 1]; 0 for never.
        max_remask_per_position: how often one position may be remasked in a run; at least 0.
        max_remask_ratio: the largest share of the visible tokens remasked in one step, rounded down, in [0, 1].
        order: which masks are filled first: "random", "confidence", "margin", "entropy" or "left_to_right".
        temperature, top_p, top_k: of sampling, see `token_sampling.sample_tokens`.
        mask_token_id: None if every `step` is given it.
    Raises:
        ValueError: a field out of its range.
    Source: "Remask, Don't Replace" (arXiv 2604.18738), its rule on low probability. The released code goes on until no
        token is below the threshold, and may always remask one token; here T is fixed, and the share is a hard limit.
    """

    order = 1  # diffusers: forward passes per timestep. The order of revealing is config.order.
    needs_quality = False

    @register_to_config
    def __init__(
        self,
        threshold: float = 0.5,
        max_remask_per_position: int = 5,
        max_remask_ratio: float = 0.25,
        order: str = "random",
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        mask_token_id: int | None = None,
    ):
        check_config(self.config)
        often, share = max_remask_per_position, max_remask_ratio
        require(is_number(threshold, 0, 1), "threshold", threshold, "a number in [0, 1]")
        require(is_int(often, 0), "max_remask_per_position", often, "an integer of at least 0")
        require(is_number(share, 0, 1), "max_remask_ratio", share, "a number in [0, 1]")
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None
        self._times_remasked: Tensor | None = None  # in this run, int64 (B, L)

    @property
    def can_remask(self) -> bool:
        """Would this configuration ever remask a token?"""
        return min(self.config.threshold, self.config.max_remask_per_position, self.config.max_remask_ratio) > 0

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        block_length: int | None = None,
    ) -> None:
        """Begin a run of `num_inference_steps` steps. As `PrismScheduler.set_timesteps`."""
        check_run(num_inference_steps, block_length)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps)
        self._times_remasked = None

    def step(
        self,
        model_output,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        quality: Tensor | None = None,
        generation_mask: Tensor | None = None,
        mask_token_id: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PrismSchedulerOutput | tuple[Tensor, ...]:
        """Remask what has become improbable, fill masks. As `PrismScheduler.step`, but `quality` is not read."""
        index, generation_mask, mask_token_id = read_step(
            self.config, self.timesteps, model_output, timestep, sample, generation_mask, mask_token_id
        )
        sampling = read_sampling(self.config, temperature, top_p, top_k)
        u_order, u_token = uniform_at(generation_mask, 2, generator)
        masked = generation_mask & (sample == mask_token_id)  # (B, L)
        visible = generation_mask & ~masked  # (B, L)
        total, shown = generation_mask.sum(-1), visible.sum(-1)  # (B,)
        target = visible_target(index, self.num_inference_steps, total)  # (B,)

        if index == 0 or self._times_remasked is None or self._times_remasked.shape != sample.shape:
            self._times_remasked = torch.zeros_like(sample, dtype=torch.int64)
        remasked = torch.zeros_like(masked)
        if self.can_remask and index < self.num_inference_steps - 1:
            probability = probability_at(model_output, visible, sample, mask_token_id)
            free = self._times_remasked < self.config.max_remask_per_position
            suspect = visible & free & (probability < self.config.threshold)
            share = Fraction(self.config.max_remask_ratio).limit_denominator(10**6)  # as floats, 0.21 of 300 is 62
            most = shown * share.numerator // share.denominator
            remasked = lowest(probability, suspect, torch.minimum(most, total - target))
            self._times_remasked = self._times_remasked + remasked

        unmasked, tokens, probs = reveal(
            model_output,
            masked,
            target - shown + remasked.sum(-1),
            self.config.order,
            *sampling,
            mask_token_id,
            u_order,
            u_token,
        )
        prev_sample = sample.masked_scatter(unmasked, tokens.to(sample.dtype)).masked_fill(remasked, mask_token_id)
        output = PrismSchedulerOutput(prev_sample, unmasked, remasked, tokens, probs)
        return output if return_dict else output.to_tuple()
