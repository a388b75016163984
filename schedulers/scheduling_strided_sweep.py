"""The strided sweep: a training-free corrector that judges and redraws tokens by their exact conditionals."""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import uniform, uniform_at, visible_target
from .scheduling_prism import PrismSchedulerOutput
from .token_sampling import draw_at, probability_at, reveal, true_positions
from .validation import SchedulerConfig, check_config, check_run, is_int, is_number, read_sampling, read_step, require


class StridedSweepScheduler(SchedulerMixin, SchedulerConfig):
    """Fill the canvas in a share of the steps; in the others mask every s-th token and redraw the improbable ones.

    1. Steps before F = max(1, floor(fill_share * T)): fill on the static schedule, ceil(M (i + 1) / F) tokens.
    2. The step that ends the filling, and each later one but the last: mask every s-th generated token, from an
       offset that goes on by one from step to step.
    3. The next step has p(y_i | the tokens that are not masked) at each of these: below `redraw_threshold` the token
       is drawn anew from that same forward pass, else it comes back.

    A masked diffusion model is trained for just these probabilities, while its logits at a visible token were never
    trained. The price is that a forward pass judges M / s tokens only. The larger s, the nearer p is to the exact
    conditional p(y_i | all other tokens). With random offsets at the start, the positions at the end of a row take
    part as often as all others.

    Args:
        redraw_threshold: redraw a token of probability below this, in [0, 1]; 0 for never.
        stride: s, at least 2.
        fill_share: share of the steps in which the canvas is filled, in (0, 1].
        order: which masks are filled first: "random", "confidence", "margin", "entropy" or "left_to_right".
        temperature, top_p, top_k: of sampling, see `token_sampling.sample_tokens`. Tokens are judged at temperature 1.
        mask_token_id: None if every `step` is given it.
    Raises:
        ValueError: a field out of its range.
    Source: ours; see docs/judging.md. Of the family of predictor-correctors for masked diffusion: Gibbs steps
        on a part of the tokens.
    """

    order = 1  # diffusers: forward passes per timestep. The order of revealing is config.order.
    needs_quality = False

    @register_to_config
    def __init__(
        self,
        redraw_threshold: float = 0.1,
        stride: int = 8,
        fill_share: float = 0.5,
        order: str = "random",
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        mask_token_id: int | None = None,
    ):
        check_config(self.config)
        bar, share = redraw_threshold, fill_share
        require(is_number(bar, 0, 1), "redraw_threshold", bar, "a number in [0, 1]")
        require(is_int(stride, 2), "stride", stride, "an integer of at least 2")
        require(is_number(share, 0, 1) and share > 0, "fill_share", share, "a number in (0, 1]")
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None
        self._held: Tensor | None = None  # tokens that the step before masked, int64 (B, L); -1 elsewhere
        self._offset: Tensor | None = None  # of the next tokens to be masked, int64 (B,)

    @property
    def can_remask(self) -> bool:
        """Would this configuration ever remask a token?"""
        return self.config.redraw_threshold > 0 and self.config.fill_share < 1

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
        self._held = None

    @property
    def _fill_steps(self) -> int:
        if not self.can_remask:
            return self.num_inference_steps
        return max(1, int(self.config.fill_share * self.num_inference_steps + 1e-6))

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
        """Fill masks, or give back or redraw what the step before masked; then mask the next tokens.

        As `PrismScheduler.step`, but `quality` is not read.
        """
        index, generation_mask, mask_token_id = read_step(
            self.config, self.timesteps, model_output, timestep, sample, generation_mask, mask_token_id
        )
        sampling = read_sampling(self.config, temperature, top_p, top_k)
        u_order, u_token = uniform_at(generation_mask, 2, generator)
        if index == 0 or self._held is None or self._held.shape != sample.shape:
            self._held = torch.full_like(sample, -1)
            start = uniform((len(sample), 1), generator, sample.device)[:, 0] * self.config.stride
            self._offset = start.long()
        masked = generation_mask & (sample == mask_token_id)  # (B, L)
        if index < self._fill_steps:
            total, shown = generation_mask.sum(-1), (generation_mask & ~masked).sum(-1)  # (B,)
            due = visible_target(index, self._fill_steps, total) - shown
            order = self.config.order
            unmasked, tokens, probs = reveal(
                model_output, masked, due, order, *sampling, mask_token_id, u_order, u_token
            )
        else:
            unmasked = masked
            tokens, probs = self._judged(model_output, masked, sampling, mask_token_id, u_token)
        prev_sample = sample.masked_scatter(unmasked, tokens.to(sample.dtype))

        remasked = torch.zeros_like(masked)
        if self.can_remask and self._fill_steps - 1 <= index < self.num_inference_steps - 1:
            number = generation_mask.cumsum(-1) - 1  # of each generated token in its row
            remasked = generation_mask & ~masked & ((number - self._offset[:, None]) % self.config.stride == 0)
            self._held = sample.masked_fill(~remasked, -1)
            self._offset = (self._offset + 1) % self.config.stride
        prev_sample = prev_sample.masked_fill(remasked, mask_token_id)
        output = PrismSchedulerOutput(prev_sample, unmasked, remasked, tokens, probs)
        return output if return_dict else output.to_tuple()

    def _judged(self, model_output, masked, sampling, mask_token_id, u_token) -> tuple[Tensor, Tensor]:
        """For each mask the token that stood there, or a new one if that is improbable, and its probability, (N,)."""
        held = self._held.masked_fill(self._held < 0, 0)
        at = true_positions(masked, int(masked.sum()))
        drawn, drawn_probs, _ = draw_at(model_output, masked, at, sampling, mask_token_id, u_token)
        held_probs = probability_at(model_output, masked, held, mask_token_id)[at]
        # What somebody else masked is not held: it is drawn.
        stays = (self._held[at] >= 0) & (held_probs >= self.config.redraw_threshold)
        return torch.where(stays, held[at], drawn), torch.where(stays, held_probs, drawn_probs)
