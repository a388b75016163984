"""Training-free remasking: the backbone judges the visible tokens itself."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import Generators
from .llada2 import runs_in_llada2_pipeline
from .mixin import MDMSchedulerMixin
from .scheduling_prism import check_remasking, remask_and_reveal, remasks
from .step import PrismSchedulerOutput, Step
from .token_sampling import Logits
from .validation import Flag, Order, Temperature, TokenId, TopK, TopP, integer, number, one_of


@runs_in_llada2_pipeline
class SelfConfidenceScheduler(MDMSchedulerMixin):
    """`PrismScheduler`'s rule with the backbone's own probability of a visible token as its quality.

        q_i = p(y_i | y)

    The rule needs no trained head, so it runs on every masked diffusion model. But a backbone is trained to predict
    masked tokens only. Its logits at a visible position, where it sees the token, were never trained, and mostly repeat
    the token. They are a poor proxy for the exact quality p(y_i | all other tokens), which would take one forward pass
    for each token. PRISM's head is trained to estimate that quality.

    In steps that remask, the output head also runs at the visible generated tokens. If `history` is not 1, it runs
    there in every step.

    Example:
        >>> scheduler = SelfConfidenceScheduler(num_remask=1, mask_token_id=9)
        >>> scheduler.set_timesteps(2)
        >>> logits = torch.tensor([[0.9, 0.1]]).expand(4, 2).log()[None]  # p(0) = 0.9 everywhere
        >>> scheduler.step(logits, 0, torch.tensor([[0, 1, 9, 9]])).remasked.tolist()
        [[False, True, False, False]]

    Args:
        history: a token's score is the mean of its probability over the last `history` forward passes, the present one
            included, in which it was visible there. None for all such passes, 1 for the present one alone. A token
            that is remasked starts again.
        other fields: as `PrismScheduler`, so `from_config` turns one into the other.
    Raises:
        ValueError: a field out of its range, or both `num_remask` and `eta`.
    Source: the training-free baseline of PRISM (arXiv 2510.01384); the history is that of FreeCorrection
        (arXiv 2602.02927), whose released code averages over all passes, as None does.
    """

    can_remask = property(remasks)

    @register_to_config
    def __init__(
        self,
        order: Order = "random",
        num_remask: Annotated[int | None, integer(0)] = None,
        eta: Annotated[float | None, number(0, 1)] = None,
        eta_schedule: Annotated[str, one_of("constant", "inverse")] = "constant",
        eta_reference_steps: Annotated[int | None, integer(1)] = None,
        remask_start: Annotated[float, number(0, 1)] = 0.0,
        remask_end: Annotated[float, number(0, 1)] = 1.0,
        loop_steps: Annotated[int, integer(0)] = 0,
        loop_num_remask: Annotated[int, integer(0)] = 0,
        loop_at: Annotated[float, number(0, 1, above=True)] = 1.0,
        temperature: Temperature = 1.0,
        top_p: TopP = None,
        top_k: TopK = None,
        mask_token_id: TokenId = None,
        history: Annotated[int | None, integer(1)] = 1,
        use_threshold: Flag = False,
        threshold: Annotated[float, number(0)] = 0.9,
        block_length: Annotated[int, integer(1)] = 32,
        quality_threshold: Annotated[float | None, number(0, 1, above=True)] = None,
        max_share: Annotated[float, number(0, 1, above=True)] = 0.25,
    ) -> None:
        check_remasking(SelfConfidenceScheduler, self.config)

    def step(
        self,
        model_output: Logits,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        quality: Tensor | None = None,
        threshold: float | None = None,
        generation_mask: Tensor | None = None,
        mask_token_id: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> PrismSchedulerOutput | tuple[Tensor, ...]:
        """Remask the visible tokens that the model finds least likely, fill masks, from one forward pass on `sample`.

        As `PrismScheduler.step`, but `quality` is not read: the score comes from `model_output`, at temperature 1 and
        without the mask token. A visible token at -inf has probability 0 and so goes first.
        """
        now = Step.of(
            self, model_output, timestep, sample, generation_mask, mask_token_id, temperature, top_p, top_k, generator
        )
        mean = None if self.config.history == 1 else self._mean_with_past(now)  # which records every step

        def score(visible: Tensor) -> Tensor:
            return now.own_probability(visible) if mean is None else mean

        output = remask_and_reveal(now, self.config, score, threshold)
        return output if return_dict else output.to_tuple()

    def _mean_with_past(self, now: Step) -> Tensor:
        """Mean probability of each visible token over the passes in which it stood there, (B, L); NaN at masks."""
        p = now.own_probability(now.visible).where(now.visible, torch.nan)
        nothing = torch.zeros_like(p)
        past = now.recall(self._memory) or _Past(now.sample, [], nothing, nothing)
        same = now.sample == past.sample
        if self.config.history is None:  # no list of all passes: T of them would cost T squared
            total, times = past.total * same + p.nan_to_num(0.0), past.times * same + ~p.isnan()
            self._memory = _Past(now.sample, [], total, times)
            return total / times
        recent = [*(before.where(same, torch.nan) for before in past.recent), p][-self.config.history :]
        self._memory = _Past(now.sample, recent, nothing, nothing)
        return torch.stack(recent).nanmean(0)


class _Past(NamedTuple):
    """Probabilities of the tokens of `sample` (B, L) in the passes in which they stood there, NaN where they did not.

    Either the `recent` ones, (B, L) each, or the sum and the number of all.
    """

    sample: Tensor
    recent: list[Tensor]
    total: Tensor
    times: Tensor
