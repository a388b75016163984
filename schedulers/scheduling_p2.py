"""P2 with self-planning: in every step all positions are ranked, and the lowest are masks afterwards."""

from __future__ import annotations

from typing import Annotated

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import Generators, highest
from .mixin import MDMSchedulerMixin
from .step import PrismSchedulerOutput, Step
from .token_sampling import Logits
from .validation import Temperature, TokenId, TopK, TopP, check_fields, number


class P2Scheduler(MDMSchedulerMixin):
    """Static schedule of T steps in which written and unwritten positions compete for the visible places.

    A step draws a token at every mask, and ranks all M generated positions by a score:

        score_i = log p(drawn token)                     at a mask
        score_i = remask_strength * log p(its token)     at a visible position

    Both probabilities are the model's own, at temperature 1. After step i the ceil(M (i + 1) / T) positions of highest
    score are visible, and all others are masks. So a new token can displace an old one. Ties go to the left.

    Example:
        >>> scheduler = P2Scheduler(mask_token_id=9)
        >>> scheduler.set_timesteps(2)
        >>> logits = torch.tensor([[0.0, 5.0]]).expand(2, 2).log()[None]  # token 1 is sure, token 0 impossible
        >>> scheduler.step(logits, 0, torch.tensor([[0, 9]])).prev_sample.tolist()
        [[9, 1]]

    Args:
        remask_strength: at least 0; eta in the paper. 0 never remasks, as `MDLMScheduler(order="confidence")`. 1 ranks
            old and new tokens alike. Above 1, old tokens are remasked more easily, since log p is negative.
        temperature, top_p, top_k: of sampling, see `token_sampling.sample_tokens`.
        mask_token_id: None if every `step` is given it.
    Raises:
        ValueError: a field out of its range.
    Source: P2, path planning (arXiv 2502.03540), self-planning. The released code draws a new token at visible
        positions too and ranks them by its probability; here the token that would stay is ranked.
    """

    @register_to_config
    def __init__(
        self,
        remask_strength: Annotated[float, number(0)] = 1.0,
        temperature: Temperature = 1.0,
        top_p: TopP = None,
        top_k: TopK = None,
        mask_token_id: TokenId = None,
    ) -> None:
        check_fields(P2Scheduler, self.config)

    @property
    def can_remask(self) -> bool:
        """Would this configuration ever remask a token?"""
        return self.config.remask_strength > 0

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
        """Rank all positions, mask the lowest. As `PrismScheduler.step`, but `quality` is not read."""
        now = Step.of(
            self, model_output, timestep, sample, generation_mask, mask_token_id, temperature, top_p, top_k, generator
        )
        (u_token,) = now.uniform(1)
        competing = now.generation_mask if self.can_remask and not now.is_last else now.masked
        drawn, drawn_probs = now.draw(now.masked, u_token)
        log_p = now.own_probability(competing & now.visible).masked_scatter(now.masked, drawn_probs).log()
        score = torch.where(now.masked, log_p, self.config.remask_strength * log_p)
        kept = highest(score, competing, competing.sum(-1) - (now.total - now.target))
        unmasked, remasked = now.masked & kept, competing & now.visible & ~kept
        written = unmasked[now.masked]
        output = now.output(unmasked, drawn[written], drawn_probs[written], remasked)
        return output if return_dict else output.to_tuple()
