"""Training-free remasking: a token is judged by what the model thought before anything was written."""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .context import RunContext, token_logprob
from .llada2 import check_dropin_config, read_threshold, runs_in_llada2_pipeline
from .scheduling_prism import PrismSchedulerOutput, check_remasking, remask_and_reveal, remasks_by_quality
from .validation import SchedulerConfig, check_config, check_run, read_sampling, read_step


@runs_in_llada2_pipeline
class PromptConfidenceScheduler(SchedulerMixin, SchedulerConfig):
    """`PrismScheduler`'s rule with p(y_i | prompt) as the quality of a visible token y_i.

    p(y_i | prompt) is the model's probability of the token in the first forward pass of the run (of the block, where
    there are blocks), on the canvas in which all that is generated is masked. What was written since bends around a
    wrong token and supports it; the prompt does not. So where the prompt determines the answer, this score finds wrong
    tokens better than the model's present opinion. Where nothing is given it says how common a token is, and no more.

    It needs no trained head and no further forward pass: the pipeline keeps the hidden states of the first one.

    Args:
        all fields: as `PrismScheduler`, so `from_config` turns one into the other.
    Raises:
        ValueError: a field out of its range, or fields that exclude each other.
    Source: ours; see docs/judging.md.
    """

    order = 1  # diffusers: forward passes per timestep. The order of revealing is config.order.
    fields_as = "BlockRefinementScheduler"  # diffusers': threshold and block_length mean the same there
    needs_quality = False
    reads_context = ("prompt",)

    @register_to_config
    def __init__(
        self,
        order: str = "random",
        num_remask: int | None = None,
        eta: float | None = None,
        eta_schedule: str = "constant",
        eta_reference_steps: int | None = None,
        remask_start: float = 0.0,
        remask_end: float = 1.0,
        loop_steps: int = 0,
        loop_num_remask: int = 0,
        loop_at: float = 1.0,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        mask_token_id: int | None = None,
        use_threshold: bool = False,
        threshold: float = 0.9,
        block_length: int = 32,
        quality_threshold: float | None = None,
        max_share: float = 0.25,
    ):
        check_config(self.config)
        check_dropin_config(self.config)
        check_remasking(self.config)
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None

    @property
    def can_remask(self) -> bool:
        """Would this configuration ever remask a token?"""
        return remasks_by_quality(self.config) or self.config.loop_steps > 0

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        block_length: int | None = None,
    ) -> None:
        """Begin a run of `num_inference_steps` steps and `loop_steps` more. As `PrismScheduler.set_timesteps`."""
        check_run(num_inference_steps, block_length)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps + self.config.loop_steps)

    def step(
        self,
        model_output,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        quality: Tensor | None = None,
        context: RunContext | None = None,
        generation_mask: Tensor | None = None,
        mask_token_id: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PrismSchedulerOutput | tuple[Tensor, ...]:
        """Remask the visible tokens of the lowest p(token | prompt), fill masks.

        As `PrismScheduler.step`, but `quality` is not read: the score is `context.prompt_logprob`. A token whose
        value is unknown (NaN) is remasked after all others, and never by `quality_threshold`.

        Raises:
            ValueError: also if tokens are to be remasked by their score and `context` is None.
        """
        place = read_step(self.config, self.timesteps, model_output, timestep, sample, generation_mask, mask_token_id)
        output = remask_and_reveal(
            self.config,
            self.num_inference_steps,
            place,
            read_sampling(self.config, temperature, top_p, top_k),
            model_output,
            sample,
            lambda visible: token_logprob(context, "prompt_logprob", sample, type(self).__name__).exp(),
            generator,
            read_threshold(self.config, threshold),
        )
        return output if return_dict else output.to_tuple()
