"""ReMDM: every visible token may be remasked with a probability that leaves the model's marginals as they are."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import Generators, remdm_cap, remdm_confidence, remdm_rescale, unmask_probability
from .mixin import MDMSchedulerMixin
from .step import PrismSchedulerOutput, Step
from .token_sampling import Logits
from .validation import Temperature, TokenId, TopK, TopP, check_fields, number, one_of, require

DEFAULT_ETA = 0.04


class ReMDMScheduler(MDMSchedulerMixin):
    """Per-token sampling in T steps: each token is remasked or filled with a probability of its own.

        P(a visible token is remasked) = sigma
        P(a mask is filled)            = (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)

    alpha_t and alpha_s are the fractions visible before and after step i: i / T and (i + 1) / T, and for "loop" a curve
    with a plateau. With an exact model a token is visible after the step with probability exactly alpha_s, whatever
    sigma is. So the number of visible tokens is random; only the last step, which fills all masks, is certain. With
    eta = 0 this is the ancestral sampler of MDLM. There is no order of revealing.

    Example:
        >>> scheduler = ReMDMScheduler(strategy="rescale", eta=1.0, mask_token_id=9)
        >>> scheduler.set_timesteps(2)  # sigma = (1 - 0.5) / 0 -> 1 in the first step, and 0 in the last
        >>> x = scheduler.step(torch.zeros(1, 4, 9), 0, torch.tensor([[3, 3, 3, 3]])).prev_sample
        >>> x.tolist(), (scheduler.step(torch.zeros(1, 4, 9), 1, x).prev_sample < 9).all().item()
        ([[9, 9, 9, 9]], True)

    Args:
        strategy: how sigma is set.
            "cap": min(eta, (1 - alpha_s) / alpha_t).
            "rescale": eta * min(1, (1 - alpha_s) / alpha_t).
            "conf": min(1, (1 - alpha_s) / alpha_t) * softmax(-confidence) over the tokens written in this run. The
                confidence of a token is the model's probability of it when it was drawn. Masks have sigma 0 and are
                filled with probability (alpha_s - alpha_t) / (1 - alpha_t), as in the paper. So this strategy alone
                does not keep the marginals exactly: the visible fraction is lower by alpha_t * sigma.
            "loop": alpha rises to `loop_alpha`, stays there while tokens are remasked with probability `eta`, then
                rises to 1 without remasking.
        eta: in [0, 1], of "cap", "rescale" and "loop"; "conf" does not read it. None for 0.04.
        loop_start, loop_end: fractions of the T steps between which "loop" holds its level; 0 < start < end < 1.
        loop_alpha: that level, in (0, 1). There sigma is at most (1 - loop_alpha) / loop_alpha.
        temperature, top_p, top_k: of sampling, see `token_sampling.sample_tokens`.
        mask_token_id: None if every `step` is given it.
    Raises:
        ValueError: a field out of its range.
    Source: ReMDM (arXiv 2503.00307). `loop_start` = 1 - t_on, `loop_end` = 1 - t_off, `loop_alpha` = alpha(t_on) there.
        The released code takes the confidence after nucleus truncation; here it is the model's own.
    """

    @register_to_config
    def __init__(
        self,
        strategy: Annotated[str, one_of("cap", "rescale", "conf", "loop")] = "cap",
        eta: Annotated[float | None, number(0, 1)] = DEFAULT_ETA,
        loop_start: Annotated[float, number(0, 1, above=True, below=True)] = 0.45,
        loop_end: Annotated[float, number(0, 1, above=True, below=True)] = 0.95,
        loop_alpha: Annotated[float, number(0, 1, above=True, below=True)] = 0.9,
        temperature: Temperature = 1.0,
        top_p: TopP = None,
        top_k: TopK = None,
        mask_token_id: TokenId = None,
    ) -> None:
        check_fields(ReMDMScheduler, self.config)
        require(loop_end > loop_start, "loop_end", loop_end, f"a number in (loop_start, 1) = ({loop_start}, 1)")

    @property
    def can_remask(self) -> bool:
        """Would this configuration ever remask a token?"""
        return self.config.strategy == "conf" or self._eta > 0

    @property
    def _eta(self) -> float:
        return DEFAULT_ETA if self.config.eta is None else self.config.eta

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
        """Remask and fill, each token for itself. As `PrismScheduler.step`, but `quality` is not read."""
        now = Step.of(
            self, model_output, timestep, sample, generation_mask, mask_token_id, temperature, top_p, top_k, generator
        )
        u_fill, u_token, u_remask = now.uniform(3)
        alpha_t, alpha_s = self.alpha(now.index), self.alpha(now.index + 1)
        if self.config.strategy == "conf":
            confidence = self._confidence(now)
            remasked = now.visible & (u_remask < remdm_confidence(remdm_cap(alpha_t, alpha_s, 1.0), confidence))
            unmasked = now.masked & (u_fill < unmask_probability(alpha_t, alpha_s, 0.0))
        else:
            sigma = self._sigma(now.index, alpha_t, alpha_s)
            remasked = now.visible & (u_remask < sigma)
            unmasked = now.masked & (u_fill < unmask_probability(alpha_t, alpha_s, sigma))
        tokens, probs = now.draw(unmasked, u_token)
        output = now.output(unmasked, tokens, probs, remasked)
        if self.config.strategy == "conf":
            self._memory = _Drawn(output.prev_sample, confidence.masked_scatter(unmasked, probs))
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
            return remdm_rescale(alpha_t, alpha_s, self._eta)
        rounding = 1e-9  # 0.15 * 20 is 3.0000000000000004 or less than 3, as the float likes
        begin, end = self.config.loop_start - rounding, self.config.loop_end + rounding
        level = begin <= index / self.num_inference_steps and (index + 1) / self.num_inference_steps <= end
        if self.config.strategy == "loop" and not level:
            return 0.0
        return remdm_cap(alpha_t, alpha_s, self._eta)

    def _confidence(self, now: Step) -> Tensor:
        """Probability with which each token was drawn, (B, L); +inf for masks and for what this run did not write."""
        unknown = torch.full(now.sample.shape, torch.inf, device=now.sample.device)
        before = now.recall(self._memory) or _Drawn(now.sample, unknown)
        return before.confidence.masked_fill((now.sample != before.sample) | ~now.visible, torch.inf)


class _Drawn(NamedTuple):
    """The sample that a step left, (B, L), and the probability with which each of its tokens was drawn, (B, L)."""

    sample: Tensor
    confidence: Tensor
