"""Token-Critic: fill every mask, let a critic judge the whole in a second forward pass, mask what it rejects."""

from __future__ import annotations

import warnings

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import lowest, uniform_at, visible_target
from .scheduling_prism import PrismSchedulerOutput
from .token_sampling import reveal
from .validation import SchedulerConfig, check_config, check_run, is_number, read_sampling, read_step, require


class TokenCriticScheduler(SchedulerMixin, SchedulerConfig):
    """T forward passes, two for each full step but the last: one draws, one judges.

    A drawing half-step fills every mask. A judging half-step, on the full sequence, keeps the tokens that the critic
    finds best, as many as the static schedule wants, and masks all others, old or new. The critic's score is
    `quality`, so its forward pass is a timestep like any other and NFE = T.

    The last full step only draws, for nothing may be masked after it: T = 2 K - 1 passes make K full steps. If T is
    even, the pass left over comes first, as a step of `MDLMScheduler`, so K = T / 2 + 1. After full step k, of M
    generated tokens ceil(M (k + 1) / K) are visible.

    Args:
        order: which masks that first step of an even T fills; as `MDLMScheduler`, and else not used.
        noise: noise * (1 - (k + 1) / K) * (u - 1/2) is added to the critic's score, u uniform; at least 0.
        temperature, top_p, top_k: of sampling, see `token_sampling.sample_tokens`.
        mask_token_id: None if every `step` is given it.
    Raises:
        ValueError: a field out of its range.
    Source: Token-Critic (arXiv 2209.04439). There the critic is a network of its own and the schedule a cosine; here it
        is the quality head, and the schedule is linear, as for the other rules.
    """

    order = 1  # diffusers: forward passes per timestep. The order of revealing is config.order.
    can_remask = True
    needs_quality = True

    @register_to_config
    def __init__(
        self,
        order: str = "random",
        noise: float = 0.0,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        mask_token_id: int | None = None,
    ):
        check_config(self.config)
        require(is_number(noise, 0), "noise", noise, "a number of at least 0")
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None
        self._warned = False

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        block_length: int | None = None,
    ) -> None:
        """Begin a run of `num_inference_steps` forward passes. As `PrismScheduler.set_timesteps`."""
        check_run(num_inference_steps, block_length)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps)

    def place_in_schedule(self, timestep: int) -> tuple[int, int, str]:
        """Where a timestep stands.

        Returns:
            the full step k it belongs to, the number of full steps K, and what it does: "reveal" (the first pass of an
            even T), "draw" or "judge".
        """
        left_over = 1 - self.num_inference_steps % 2
        full_steps = (self.num_inference_steps + 1) // 2 + left_over
        if timestep < left_over:
            return 0, full_steps, "reveal"
        half = timestep - left_over
        return left_over + half // 2, full_steps, "judge" if half % 2 else "draw"

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
        """Draw at all masks, or judge and remask. As `PrismScheduler.step`; judging half-steps alone read `quality`.

        With `quality` None a judging half-step masks nothing, and a warning says so once.
        """
        index, generation_mask, mask_token_id = read_step(
            self.config, self.timesteps, model_output, timestep, sample, generation_mask, mask_token_id
        )
        sampling = read_sampling(self.config, temperature, top_p, top_k)
        if quality is not None:
            given = f"{quality.dtype} {tuple(quality.shape)}"
            fits = quality.is_floating_point() and quality.shape == sample.shape
            require(fits, "quality", given, f"floats of shape {tuple(sample.shape)}, as `sample`")
        u_order, u_token, u_noise = uniform_at(generation_mask, 3, generator)
        masked = generation_mask & (sample == mask_token_id)  # (B, L)
        visible = generation_mask & ~masked  # (B, L)
        total, shown = generation_mask.sum(-1), visible.sum(-1)  # (B,)
        full_step, full_steps, action = self.place_in_schedule(index)
        target = visible_target(full_step, full_steps, total)  # (B,)

        remasked, due = torch.zeros_like(masked), torch.zeros_like(total)
        if action == "judge" and quality is not None:
            spread = self.config.noise * (1 - (full_step + 1) / full_steps)
            remasked = lowest(quality + spread * (u_noise - 0.5), visible, shown - target)
        elif action == "judge":
            self._warn()
        else:
            due = total - shown if action == "draw" else target - shown
        unmasked, tokens, probs = reveal(
            model_output, masked, due, self.config.order, *sampling, mask_token_id, u_order, u_token
        )
        prev_sample = sample.masked_scatter(unmasked, tokens.to(sample.dtype)).masked_fill(remasked, mask_token_id)
        output = PrismSchedulerOutput(prev_sample, unmasked, remasked, tokens, probs)
        return output if return_dict else output.to_tuple()

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "TokenCriticScheduler got quality=None and so masks nothing. Pass the critic's score as `quality`.",
                stacklevel=3,
            )
