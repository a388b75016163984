"""Token-to-mask ("Remask, Don't Replace"): a token that the model no longer believes in becomes a mask again."""

from __future__ import annotations

from typing import Annotated

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import Generators, lowest, share_of
from .mixin import MDMSchedulerMixin
from .step import PrismSchedulerOutput, Step
from .token_sampling import Logits
from .validation import Order, Temperature, TokenId, TopK, TopP, check_fields, integer, number


class TokenToMaskScheduler(MDMSchedulerMixin):
    """Static schedule of T steps; visible tokens of low probability are remasked.

        p(y_i) < remask_threshold    =>    y_i becomes a mask

    p is the model's own probability of the visible token y_i, at temperature 1, as `SelfConfidenceScheduler` reads it.
    The least probable go first: in a step at most a share of the visible tokens, from each position at most so many
    times in a run, and never so many that the schedule could not be met. Of M generated tokens ceil(M (i + 1) / T) are
    visible after step i.

    Example:
        >>> scheduler = TokenToMaskScheduler(mask_token_id=9, max_remask_ratio=0.5)
        >>> scheduler.set_timesteps(2)
        >>> logits = torch.tensor([[0.9, 0.1]]).expand(4, 2).log()[None]  # p(0) = 0.9 everywhere
        >>> scheduler.step(logits, 0, torch.tensor([[0, 1, 9, 9]])).remasked.tolist()
        [[False, True, False, False]]

    Args:
        remask_threshold: remask a token of probability below this, in [0, 1]; 0 for never.
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

    @register_to_config
    def __init__(
        self,
        remask_threshold: Annotated[float, number(0, 1)] = 0.5,
        max_remask_per_position: Annotated[int, integer(0)] = 5,
        max_remask_ratio: Annotated[float, number(0, 1)] = 0.25,
        order: Order = "random",
        temperature: Temperature = 1.0,
        top_p: TopP = None,
        top_k: TopK = None,
        mask_token_id: TokenId = None,
    ) -> None:
        check_fields(TokenToMaskScheduler, self.config)

    @property
    def can_remask(self) -> bool:
        """Would this configuration ever remask a token?"""
        config = self.config
        return min(config.remask_threshold, config.max_remask_per_position, config.max_remask_ratio) > 0

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
        """Remask what has become improbable, fill masks. As `PrismScheduler.step`, but `quality` is not read."""
        now = Step.of(
            self, model_output, timestep, sample, generation_mask, mask_token_id, temperature, top_p, top_k, generator
        )
        u_order, u_token = now.uniform(2)
        (times_remasked,) = now.recall(self._memory) or (torch.zeros_like(sample, dtype=torch.int64),)
        remasked = now.nothing
        if self.can_remask and not now.is_last:
            p = now.own_probability(now.visible)
            free = times_remasked < self.config.max_remask_per_position
            suspect = now.visible & free & (p < self.config.remask_threshold)
            most = share_of(now.shown, self.config.max_remask_ratio)
            remasked = lowest(p, suspect, torch.minimum(most, now.total - now.target))
        self._memory = (times_remasked + remasked,)
        filled = now.reveal(now.target - now.shown + remasked.sum(-1), u_order, u_token)
        output = now.output(*filled, remasked)
        return output if return_dict else output.to_tuple()
