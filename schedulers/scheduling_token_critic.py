"""Token-Critic: fill every mask, let a critic judge the whole in a second forward pass, mask what it rejects."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import Generators, lowest, visible_target
from .mixin import MDMSchedulerMixin
from .step import PrismSchedulerOutput, Step
from .token_sampling import Logits
from .validation import Order, Temperature, TokenId, TopK, TopP, check_fields, check_quality, number


class HalfStep(NamedTuple):
    """Where a timestep of Token-Critic stands.

    Args:
        full_step: k, the full step that it belongs to.
        full_steps: K, the number of full steps.
        action: "reveal" (the first pass of an even T), "draw" or "judge".
    """

    full_step: int
    full_steps: int
    action: str


class TokenCriticScheduler(MDMSchedulerMixin):
    """T forward passes, two for each full step but the last: one draws, one judges.

    A drawing half-step fills every mask. A judging half-step, on the full sequence, keeps the tokens that the critic
    finds best, and masks all others, old or new. The critic's score is `quality`. Of M generated tokens so many are
    visible after full step k of K:

        M_k = ceil(M (k + 1) / K)

    The last full step only draws, for nothing may be masked after it: T = 2 K - 1 passes make K full steps. If T is
    even, the pass left over comes first, as a step of `MDLMScheduler`, so K = T / 2 + 1.

    Example:
        >>> scheduler = TokenCriticScheduler(mask_token_id=9)
        >>> scheduler.set_timesteps(3)  # draw, judge, draw
        >>> full, quality = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[0.9, 0.2, 0.1, 0.8]])
        >>> scheduler.step(torch.zeros(1, 4, 10), 1, full, quality=quality).prev_sample.tolist()
        [[4, 9, 9, 7]]

    Args:
        order: which masks that first step of an even T fills, as `MDLMScheduler`; not used otherwise.
        noise: noise * (1 - (k + 1) / K) * (u - 1/2) is added to the critic's score, u uniform; at least 0.
        temperature, top_p, top_k: of sampling, see `token_sampling.sample_tokens`.
        mask_token_id: None if every `step` is given it.
    Raises:
        ValueError: a field out of its range.
    Source: Token-Critic (arXiv 2209.04439). There the critic is a network of its own and the schedule a cosine; here it
        is the quality head, and the schedule is linear, as for the other rules.
    """

    needs_quality = True

    @register_to_config
    def __init__(
        self,
        order: Order = "random",
        noise: Annotated[float, number(0)] = 0.0,
        temperature: Temperature = 1.0,
        top_p: TopP = None,
        top_k: TopK = None,
        mask_token_id: TokenId = None,
    ) -> None:
        check_fields(TokenCriticScheduler, self.config)

    def place_in_schedule(self, timestep: int) -> HalfStep:
        """Where a timestep stands."""
        left_over = 1 - self.num_inference_steps % 2
        full_steps = (self.num_inference_steps + 1) // 2 + left_over
        if timestep < left_over:
            return HalfStep(0, full_steps, "reveal")
        half = timestep - left_over
        return HalfStep(left_over + half // 2, full_steps, "judge" if half % 2 else "draw")

    def step(
        self,
        model_output: Logits,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        quality: Tensor | None = None,
        generation_mask: Tensor | None = None,
        mask_token_id: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> PrismSchedulerOutput | tuple[Tensor, ...]:
        """Draw at all masks, or judge and remask. As `PrismScheduler.step`; judging half-steps alone read `quality`.

        With `quality` None a judging half-step masks nothing, and a warning says so once.
        """
        now = Step.of(
            self, model_output, timestep, sample, generation_mask, mask_token_id, temperature, top_p, top_k, generator
        )
        if quality is not None:
            check_quality(quality, sample)
        u_order, u_token, u_noise = now.uniform(3)
        full_step, full_steps, action = self.place_in_schedule(now.index)
        target = visible_target(full_step, full_steps, now.total)
        remasked, due = now.nothing, torch.zeros_like(now.total)
        if action == "judge" and quality is not None:
            spread = self.config.noise * (1 - (full_step + 1) / full_steps)
            remasked = lowest(quality + spread * (u_noise - 0.5), now.visible, now.shown - target)
        elif action == "judge":
            self._warn_once(
                "TokenCriticScheduler got quality=None, so nothing is masked. Pass the critic's score as `quality`.",
                stacklevel=2,
            )
        else:
            due = (now.total if action == "draw" else target) - now.shown
        output = now.output(*now.reveal(due, u_order, u_token), remasked)
        return output if return_dict else output.to_tuple()
