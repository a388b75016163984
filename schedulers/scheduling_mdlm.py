"""Masked diffusion without remasking: the baseline that every remasking rule is compared with."""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import uniform_at, visible_target
from .llada2 import check_dropin_config, read_threshold, runs_in_llada2_pipeline
from .scheduling_prism import PrismSchedulerOutput
from .token_sampling import reveal
from .validation import SchedulerConfig, check_config, check_run, read_sampling, read_step


@runs_in_llada2_pipeline
class MDLMScheduler(SchedulerMixin, SchedulerConfig):
    """Static schedule of T steps; a token once written stays.

    Of M generated tokens ceil(M (i + 1) / T) are visible after step i, in every row. The paper's ancestral sampler
    fills each mask with a probability instead, so its counts vary and some of its steps fill nothing.

    Args:
        order: which masks are filled first: "random", "confidence", "margin", "entropy" or "left_to_right".
        temperature, top_p, top_k: of sampling, see `token_sampling.sample_tokens`.
        mask_token_id: None if every `step` is given it.
        use_threshold: also fill every mask whose token has a confidence above `threshold`, beyond those due, and at
            least one; needs order "confidence".
        threshold: of `use_threshold`, at least 0.
        block_length: the default of diffusers' `LLaDA2Pipeline`, see `llada2.py`; `PrismPipeline` has its own.
    Raises:
        ValueError: a field out of its range.
    Source: MDLM (arXiv 2406.07524) for the model, LLaDA (arXiv 2502.09992, algorithm 5) for fixed counts.
    """

    order = 1  # diffusers: forward passes per timestep. The order of revealing is config.order.
    fields_as = "BlockRefinementScheduler"  # diffusers': threshold and block_length mean the same there
    can_remask = False
    needs_quality = False

    @register_to_config
    def __init__(
        self,
        order: str = "random",
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        mask_token_id: int | None = None,
        use_threshold: bool = False,
        threshold: float = 0.9,
        block_length: int = 32,
    ):
        check_config(self.config)
        check_dropin_config(self.config)
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None

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
        threshold: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PrismSchedulerOutput | tuple[Tensor, ...]:
        """Fill the masks that are due. As `PrismScheduler.step`, but `quality` is not read."""
        index, generation_mask, mask_token_id = read_step(
            self.config, self.timesteps, model_output, timestep, sample, generation_mask, mask_token_id
        )
        sampling = read_sampling(self.config, temperature, top_p, top_k)
        u_order, u_token = uniform_at(generation_mask, 2, generator)
        masked = generation_mask & (sample == mask_token_id)
        total, hidden = generation_mask.sum(-1), masked.sum(-1)
        due = visible_target(index, self.num_inference_steps, total) - (total - hidden)
        threshold = read_threshold(self.config, threshold)
        if threshold is not None:
            due = due.clamp(min=1)  # a row that is ahead of the schedule must not wait for it
        unmasked, tokens, probs = reveal(
            model_output,
            masked,
            due,
            self.config.order,
            *sampling,
            mask_token_id,
            u_order,
            u_token,
            threshold,
        )
        prev_sample = sample.masked_scatter(unmasked, tokens.to(sample.dtype))
        output = PrismSchedulerOutput(prev_sample, unmasked, torch.zeros_like(masked), tokens, probs)
        return output if return_dict else output.to_tuple()
