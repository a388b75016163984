"""ReMDM: every visible token may be remasked with a probability that leaves the model's marginals as they are."""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import remdm_cap, remdm_confidence, remdm_rescale, uniform_at, unmask_probability
from .scheduling_prism import PrismSchedulerOutput
from .token_sampling import draw_at
from .validation import SchedulerConfig, check_config, check_run, is_number, read_sampling, read_step, require

STRATEGIES = ("cap", "rescale", "conf", "loop")


class ReMDMScheduler(SchedulerMixin, SchedulerConfig):
    """Per-token sampling in T steps: each visible token is remasked with probability sigma, each mask filled with
    probability (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t).

    alpha_t and alpha_s are the fractions visible before and after step i: i / T and (i + 1) / T, and for "loop" a curve
    with a plateau. With an exact model a token is visible after the step with probability exactly alpha_s, whatever
    sigma is. The number of visible tokens is therefore random; only the last step, which fills all, is certain. With
    eta = 0 this is the ancestral sampler of MDLM. There is no order of revealing.

    Args:
        strategy: how sigma is set.
            "cap": min(eta, (1 - alpha_s) / alpha_t).
            "rescale": eta * min(1, (1 - alpha_s) / alpha_t).
            "conf": min(1, (1 - alpha_s) / alpha_t) * softmax(-confidence) over the tokens written in this run, where
                the confidence of a token is the model's probability of it when it was drawn. Masks have sigma 0 and
                are filled with probability (alpha_s - alpha_t) / (1 - alpha_t), as in the paper; so this strategy,
                alone of the four, does not quite keep the marginals: alpha_t * sigma fewer tokens are visible.
            "loop": alpha rises to `loop_alpha`, stays there while tokens are remasked with probability `eta`, then
                rises to 1 without remasking.
        eta: in [0, 1], of "cap", "rescale" and "loop"; "conf" does not read it.
        loop_start, loop_end: fractions of the T steps between which "loop" holds its level; 0 < start < end < 1.
        loop_alpha: that level, in (0, 1). There sigma is at most (1 - loop_alpha) / loop_alpha.
        temperature, top_p, top_k: of sampling, see `token_sampling.sample_tokens`.
        mask_token_id: None if every `step` is given it.
    Raises:
        ValueError: a field out of its range.
    Source: ReMDM (arXiv 2503.00307). `loop_start` = 1 - t_on, `loop_end` = 1 - t_off, `loop_alpha` = alpha(t_on) there.
        The released code takes the confidence after nucleus truncation; here it is the model's own.
    """

    order = 1  # diffusers: forward passes per timestep.
    needs_quality = False

    @register_to_config
    def __init__(
        self,
        strategy: str = "cap",
        eta: float = 0.04,
        loop_start: float = 0.45,
        loop_end: float = 0.95,
        loop_alpha: float = 0.9,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        mask_token_id: int | None = None,
    ):
        check_config({"order": "random", **self.config})
        require(strategy in STRATEGIES, "strategy", strategy, f"one of {STRATEGIES}")
        require(is_number(eta, 0, 1), "eta", eta, "a number in [0, 1]")
        require(is_number(loop_start, 0, 1) and 0 < loop_start < 1, "loop_start", loop_start, "a number in (0, 1)")
        within = is_number(loop_end, 0, 1) and loop_start < loop_end < 1
        require(within, "loop_end", loop_end, f"a number in (loop_start, 1) = ({loop_start}, 1)")
        require(is_number(loop_alpha, 0, 1) and 0 < loop_alpha < 1, "loop_alpha", loop_alpha, "a number in (0, 1)")
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None
        self._left: Tensor | None = None  # the sample that the step before left, (B, L)
        self._confidence: Tensor | None = None  # probability with which each of its tokens was drawn, (B, L)

    @property
    def can_remask(self) -> bool:
        """Would this configuration ever remask a token?"""
        return self.config.strategy == "conf" or self.config.eta > 0

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
        self._left = self._confidence = None

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
        """Remask and fill, each token for itself. As `PrismScheduler.step`, but `quality` is not read."""
        index, generation_mask, mask_token_id = read_step(
            self.config, self.timesteps, model_output, timestep, sample, generation_mask, mask_token_id
        )
        sampling = read_sampling(self.config, temperature, top_p, top_k)
        u_fill, u_token, u_remask = uniform_at(generation_mask, 3, generator)
        masked = generation_mask & (sample == mask_token_id)  # (B, L)
        visible = generation_mask & ~masked  # (B, L)
        alpha_t, alpha_s = self.alpha(index), self.alpha(index + 1)
        if self.config.strategy == "conf":
            known = self._confidence_of(index, sample).masked_fill(~visible, torch.inf)
            sigma, fill = remdm_confidence(remdm_cap(alpha_t, alpha_s, 1.0), known), 0.0
        else:
            sigma = fill = self._sigma(index, alpha_t, alpha_s)
        remasked = visible & (u_remask < sigma)
        unmasked = masked & (u_fill < unmask_probability(alpha_t, alpha_s, fill))
        index = unmasked.nonzero(as_tuple=True)
        tokens, probs, _ = draw_at(model_output, unmasked, index, sampling, mask_token_id, u_token)
        prev_sample = sample.masked_scatter(unmasked, tokens.to(sample.dtype)).masked_fill(remasked, mask_token_id)
        if self.config.strategy == "conf":
            self._left, self._confidence = prev_sample, known.masked_scatter(unmasked, probs)
        output = PrismSchedulerOutput(prev_sample, unmasked, remasked, tokens, probs)
        return output if return_dict else output.to_tuple()

    def alpha(self, index: int) -> float:
        """Fraction visible once `index` of the T steps are done: 0 for 0, 1 for T."""
        x = index / self.num_inference_steps
        if self.config.strategy != "loop":
            return x
        start, end, level = self.config.loop_start, self.config.loop_end, self.config.loop_alpha
        if x < end:
            return level * min(1.0, x / start)
        return 1 - (1 - level) * (1 - x) / (1 - end)

    def _sigma(self, index: int, alpha_t: float, alpha_s: float) -> float:
        if self.config.strategy == "rescale":
            return remdm_rescale(alpha_t, alpha_s, self.config.eta)
        rounding = 1e-9  # 0.15 * 20 is 3.0000000000000004 or less than 3, as the float likes
        begin, end = self.config.loop_start - rounding, self.config.loop_end + rounding
        level = begin <= index / self.num_inference_steps and (index + 1) / self.num_inference_steps <= end
        if self.config.strategy == "loop" and not level:
            return 0.0
        return remdm_cap(alpha_t, alpha_s, self.config.eta)

    def _confidence_of(self, index: int, sample: Tensor) -> Tensor:
        """Confidence of each token, (B, L); +inf for tokens that this run did not write, which are not remasked."""
        if index == 0 or self._left is None or self._left.shape != sample.shape:
            return torch.full(sample.shape, torch.inf, device=sample.device)
        return self._confidence.masked_fill(sample != self._left, torch.inf)
