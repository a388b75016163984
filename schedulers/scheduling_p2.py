"""P2 with self-planning: in every step all positions are ranked, and the lowest are masks afterwards."""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import highest, uniform_at, visible_target
from .scheduling_prism import PrismSchedulerOutput
from .token_sampling import draw_at, probability_at
from .validation import SchedulerConfig, check_config, check_run, is_number, read_sampling, read_step, require


class P2Scheduler(SchedulerMixin, SchedulerConfig):
    """Static schedule of T steps in which written and unwritten positions compete for the visible places.

    A step draws a token at every mask and ranks all generated positions by log p: of the token drawn at a mask, and,
    times eta, of the token that stands at a visible position; both are the model's own at temperature 1. The highest
    ceil(M (i + 1) / T) of M positions are visible after step i, all others are masks. So an old token
    goes where a new one ranks above it. Ties go to the left.

    Args:
        eta: at least 0. 0 never remasks (`MDLMScheduler(order="confidence")`); 1 ranks old and new tokens alike; more
            makes old tokens more likely to go, since log p is negative.
        temperature, top_p, top_k: of sampling, see `token_sampling.sample_tokens`.
        mask_token_id: None if every `step` is given it.
    Raises:
        ValueError: a field out of its range.
    Source: P2, path planning (arXiv 2502.03540), self-planning. The released code draws a new token at visible
        positions too and ranks them by its probability; here the token that would stay is ranked.
    """

    order = 1  # diffusers: forward passes per timestep.
    needs_quality = False

    @register_to_config
    def __init__(
        self,
        eta: float = 1.0,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        mask_token_id: int | None = None,
    ):
        check_config({"order": "random", **self.config})
        require(is_number(eta, 0), "eta", eta, "a number of at least 0")
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None

    @property
    def can_remask(self) -> bool:
        """Would this configuration ever remask a token?"""
        return self.config.eta > 0

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
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PrismSchedulerOutput | tuple[Tensor, ...]:
        """Rank all positions, mask the lowest. As `PrismScheduler.step`, but `quality` is not read."""
        index, generation_mask, mask_token_id = read_step(
            self.config, self.timesteps, model_output, timestep, sample, generation_mask, mask_token_id
        )
        sampling = read_sampling(self.config, temperature, top_p, top_k)
        u_token = uniform_at(generation_mask, 1, generator)[0]
        masked = generation_mask & (sample == mask_token_id)  # (B, L)
        total = generation_mask.sum(-1)  # (B,)
        target = visible_target(index, self.num_inference_steps, total)  # (B,)
        competing = generation_mask if self.can_remask and index < self.num_inference_steps - 1 else masked

        index = masked.nonzero(as_tuple=True)
        drawn, drawn_probs, _ = draw_at(model_output, masked, index, sampling, mask_token_id, u_token)
        p = probability_at(model_output, competing & ~masked, sample, mask_token_id).index_put(index, drawn_probs)
        score = torch.where(masked, p.log(), self.config.eta * p.log())
        kept = highest(score, competing, competing.sum(-1) - (total - target))

        unmasked, remasked = masked & kept, competing & ~masked & ~kept
        written = unmasked[masked]
        tokens, probs = drawn[written], drawn_probs[written]
        prev_sample = sample.masked_scatter(unmasked, tokens.to(sample.dtype)).masked_fill(remasked, mask_token_id)
        output = PrismSchedulerOutput(prev_sample, unmasked, remasked, tokens, probs)
        return output if return_dict else output.to_tuple()
