"""Training-free remasking: the backbone judges the visible tokens itself."""

from __future__ import annotations

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .llada2 import check_dropin_config, read_threshold, runs_in_llada2_pipeline
from .scheduling_prism import (
    PrismSchedulerOutput,
    check_remasking,
    remask_and_reveal,
    remasks_by_quality,
)
from .token_sampling import probability_at
from .validation import SchedulerConfig, check_config, check_run, is_int, read_sampling, read_step, require


@runs_in_llada2_pipeline
class SelfConfidenceScheduler(SchedulerMixin, SchedulerConfig):
    """`PrismScheduler`'s rule with the backbone's own probability of a visible token as its quality.

    It needs no trained head and so runs on every masked diffusion model. But a backbone is trained to predict masked
    tokens only: its logits at a visible position, where it sees the token, were never trained, and tend to just
    repeat the token. They are a poor proxy for the exact quality p(token | the others), which would take one forward
    pass for each token. That gap is what PRISM's head closes.

    In steps that remask, the output head also runs at the visible generated tokens; with a history, in every step.

    Args:
        history: score a token by the mean of its probability over this many forward passes, the present one and those
            before it in which it already stood there; None for all of them, 1 for the present one alone. A token that
            is remasked starts anew.
        other fields: as `PrismScheduler`, so `from_config` turns one into the other.
    Raises:
        ValueError: a field out of its range, or both `num_remask` and `eta`.
    Source: the training-free baseline of PRISM (arXiv 2510.01384); the history is that of FreeCorrection
        (arXiv 2602.02927), whose released code averages over all passes, as None does.
    """

    order = 1  # diffusers: forward passes per timestep. The order of revealing is config.order.
    fields_as = "BlockRefinementScheduler"  # diffusers': threshold and block_length mean the same there
    needs_quality = False

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
        history: int | None = 1,
        use_threshold: bool = False,
        threshold: float = 0.9,
        block_length: int = 32,
        quality_threshold: float | None = None,
        max_share: float = 0.25,
    ):
        check_config(self.config)
        check_dropin_config(self.config)
        check_remasking(self.config)
        require(history is None or is_int(history, 1), "history", history, "None or an integer of at least 1")
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None
        self._seen: Tensor | None = None  # the sample of the step before, (B, L)
        self._past: list[Tensor] = []  # own probabilities in the last steps, (B, L), NaN where they do not count
        self._total = self._count = 0  # with history None: sum and number of all that count, (B, L)

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
        self._seen = None

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
        """Remask the visible tokens that the model finds least likely, fill masks, from one forward pass on `sample`.

        As `PrismScheduler.step`, but `quality` is not read: the score comes from `model_output`, at temperature 1 and
        without the mask token. A visible token at -inf has probability 0 and so goes first.
        """
        place = read_step(self.config, self.timesteps, model_output, timestep, sample, generation_mask, mask_token_id)

        def own_probability(visible: Tensor) -> Tensor:
            return probability_at(model_output, visible, sample, place[2])

        quality_of = own_probability
        if self.config.history != 1:  # every step is recorded, not only those that remask
            visible = place[1] & (sample != place[2])
            mean = self._mean_with_past(place[0], sample, own_probability(visible).where(visible, torch.nan))

            def quality_of(_: Tensor) -> Tensor:
                return mean

        output = remask_and_reveal(
            self.config,
            self.num_inference_steps,
            place,
            read_sampling(self.config, temperature, top_p, top_k),
            model_output,
            sample,
            quality_of,
            generator,
            read_threshold(self.config, threshold),
        )
        return output if return_dict else output.to_tuple()

    def _mean_with_past(self, timestep: int, sample: Tensor, now: Tensor) -> Tensor:
        """Mean of `now` (B, L), NaN at masks, and the passes before it in which the same token stood there."""
        if timestep == 0 or self._seen is None or self._seen.shape != sample.shape:
            self._seen, self._past = sample, []
            self._total, self._count = torch.zeros_like(now), torch.zeros_like(now)
        same, self._seen = sample == self._seen, sample
        if self.config.history is None:  # no list of all passes: T of them would cost T squared
            self._total = self._total * same + now.nan_to_num(0.0)
            self._count = self._count * same + ~now.isnan()
            return self._total / self._count
        kept = [before.where(same, torch.nan) for before in self._past] + [now]
        self._past = kept[-self.config.history :]
        return torch.stack(self._past).nanmean(0)
