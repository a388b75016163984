"""Masked diffusion without remasking: the baseline that every remasking rule is compared with."""

from __future__ import annotations

from typing import Annotated

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import Generators
from .llada2 import check_dropin_config, resolve_threshold, runs_in_llada2_pipeline
from .mixin import MDMSchedulerMixin
from .step import PrismSchedulerOutput, Step
from .token_sampling import Logits
from .validation import Flag, Order, Temperature, TokenId, TopK, TopP, check_fields, integer, number


@runs_in_llada2_pipeline
class MDLMScheduler(MDMSchedulerMixin):
    """Static schedule of T steps; a token once written stays.

    After step i, M_i of the M generated tokens of a row are visible:

        M_i = ceil(M (i + 1) / T)

    Example:
        >>> scheduler = MDLMScheduler(order="left_to_right", mask_token_id=9)
        >>> scheduler.set_timesteps(2)
        >>> output = scheduler.step(torch.zeros(1, 4, 10), 0, torch.tensor([[9, 9, 9, 9]]))
        >>> output.unmasked.tolist()
        [[True, True, False, False]]

    Args:
        order: which masks are filled first: "random", "confidence", "margin", "entropy" or "left_to_right".
        temperature, top_p, top_k: of sampling, see `token_sampling.sample_tokens`.
        mask_token_id: None if every `step` is given it.
        use_threshold: also fill every mask whose token has a confidence above `threshold`, beyond those due, and at
            least one. Needs order "confidence".
        threshold: of `use_threshold`, at least 0.
        block_length: the default of diffusers' `LLaDA2Pipeline`, see `llada2.py`. `PrismPipeline` has its own.
    Raises:
        ValueError: a field out of its range.
    Source: MDLM (arXiv 2406.07524) for the model, LLaDA (arXiv 2502.09992, algorithm 5) for fixed counts. MDLM's
        ancestral sampler fills each mask with a probability instead, so its counts vary: `ReMDMScheduler(eta=0)`.
    """

    can_remask = False

    @register_to_config
    def __init__(
        self,
        order: Order = "random",
        temperature: Temperature = 1.0,
        top_p: TopP = None,
        top_k: TopK = None,
        mask_token_id: TokenId = None,
        use_threshold: Flag = False,
        threshold: Annotated[float, number(0)] = 0.9,
        block_length: Annotated[int, integer(1)] = 32,
    ) -> None:
        check_fields(MDLMScheduler, self.config)
        check_dropin_config(self.config)

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
        """Fill the masks that are due. As `PrismScheduler.step`, but `quality` is not read."""
        now = Step.of(
            self, model_output, timestep, sample, generation_mask, mask_token_id, temperature, top_p, top_k, generator
        )
        u_order, u_token = now.uniform(2)
        filled = now.reveal(now.target - now.shown, u_order, u_token, resolve_threshold(self.config, threshold))
        output = now.output(*filled, remasked=now.nothing)
        return output if return_dict else output.to_tuple()
