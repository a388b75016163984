"""The strided sweep: a training-free corrector that judges and redraws tokens by their exact conditionals."""

from __future__ import annotations

from typing import Annotated

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import Generators, uniform, visible_target
from .mixin import MDMSchedulerMixin
from .step import PrismSchedulerOutput, Step
from .token_sampling import Logits
from .validation import Order, Temperature, TokenId, TopK, TopP, check_fields, integer, number


class StridedSweepScheduler(MDMSchedulerMixin):
    """Fill the canvas in a share of the steps; in the others mask every s-th token and redraw the improbable ones.

    1. Steps before F = max(1, floor(fill_share * T)): fill on the static schedule, ceil(M (i + 1) / F) of M tokens.
    2. The step that ends the filling, and each later one but the last: mask every s-th generated token. The first of
       them is one position further right in each step.
    3. The next step reads the probability of each of these tokens, given those that are not masked:

        p(y_i | unmasked) < redraw_threshold    =>    y_i is drawn anew from that same forward pass, else it comes back

    A masked diffusion model is trained for exactly these probabilities, while its logits at a visible token were never
    trained. The cost is that a forward pass judges only M / s tokens. The larger s, the nearer p is to the exact
    conditional p(y_i | all other tokens). The sweep begins at a random position, so that all positions are judged
    equally often.

    Example:
        >>> scheduler = StridedSweepScheduler(stride=2, mask_token_id=9)
        >>> scheduler.set_timesteps(4)  # 2 to fill, then every other token is masked and judged
        >>> output = scheduler.step(torch.zeros(1, 4, 9), 1, torch.tensor([[1, 1, 1, 1]]))
        >>> output.remasked.sum().item()
        2

    Args:
        redraw_threshold: redraw a token of probability below this, in [0, 1]; 0 for never.
        stride: s, at least 2.
        fill_share: share of the steps in which the canvas is filled, in (0, 1].
        order: which masks are filled first: "random", "confidence", "margin", "entropy" or "left_to_right".
        temperature, top_p, top_k: of sampling, see `token_sampling.sample_tokens`. Tokens are judged at temperature 1.
        mask_token_id: None if every `step` is given it.
    Raises:
        ValueError: a field out of its range.
    Source: ours; see docs/judging.md. It is a predictor-corrector for masked diffusion: Gibbs steps on a part of the
        tokens.
    """

    @register_to_config
    def __init__(
        self,
        redraw_threshold: Annotated[float, number(0, 1)] = 0.1,
        stride: Annotated[int, integer(2)] = 8,
        fill_share: Annotated[float, number(0, 1, above=True)] = 0.5,
        order: Order = "random",
        temperature: Temperature = 1.0,
        top_p: TopP = None,
        top_k: TopK = None,
        mask_token_id: TokenId = None,
    ) -> None:
        check_fields(StridedSweepScheduler, self.config)

    @property
    def can_remask(self) -> bool:
        """Would this configuration ever remask a token?"""
        return self.config.redraw_threshold > 0 and self.config.fill_share < 1

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
        """Fill masks, or give back or redraw what the step before masked; then mask the next tokens.

        As `PrismScheduler.step`, but `quality` is not read.
        """
        now = Step.of(
            self, model_output, timestep, sample, generation_mask, mask_token_id, temperature, top_p, top_k, generator
        )
        u_order, u_token = now.uniform(2)
        held, offset = now.recall(self._memory) or self._nothing_held(now)
        fill_steps = max(1, int(self.config.fill_share * now.num_steps + 1e-6)) if self.can_remask else now.num_steps
        if now.index < fill_steps:
            due = visible_target(now.index, fill_steps, now.total) - now.shown
            unmasked, tokens, probs = now.reveal(due, u_order, u_token)
        else:
            unmasked, (tokens, probs) = now.masked, self._judged(now, held, u_token)
        remasked = now.nothing
        if self.can_remask and fill_steps - 1 <= now.index and not now.is_last:
            number_in_row = now.generation_mask.cumsum(-1) - 1
            remasked = now.visible & ((number_in_row - offset[:, None]) % self.config.stride == 0)
            held, offset = sample.masked_fill(~remasked, -1), (offset + 1) % self.config.stride
        self._memory = (held, offset)
        output = now.output(unmasked, tokens, probs, remasked)
        return output if return_dict else output.to_tuple()

    def _nothing_held(self, now: Step) -> tuple[Tensor, Tensor]:
        """What is remembered: tokens that the step before masked, (B, L), -1 elsewhere; the next offset, int64 (B,)."""
        rows = (len(now.sample), 1)
        offset = uniform(rows, now.generator, now.sample.device)[:, 0] * self.config.stride
        return torch.full_like(now.sample, -1), offset.long()

    def _judged(self, now: Step, held: Tensor, u_token: Tensor) -> tuple[Tensor, Tensor]:
        """For each mask the token that stood there, or a new one if that is improbable, and its probability, (N,)."""
        drawn, drawn_probs = now.draw(now.masked, u_token)
        held_probs = now.own_probability(now.masked, held.clamp(min=0))[now.masked]
        held = held[now.masked]
        # A mask that another put there holds no token: one is drawn.
        stays = (held >= 0) & (held_probs >= self.config.redraw_threshold)
        return torch.where(stays, held, drawn), torch.where(stays, held_probs, drawn_probs)
