"""PRISM sampling (arXiv 2510.01384): reveal on a fixed schedule, and remask the visible tokens of lowest quality."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from .functional import binomial, lowest, remdm_cap, share_of, uniform_at, visible_target
from .llada2 import check_dropin_config, read_threshold, runs_in_llada2_pipeline
from .token_sampling import reveal
from .validation import SchedulerConfig, check_config, check_run, is_int, is_number, read_sampling, read_step, require


@dataclass
class PrismSchedulerOutput(BaseOutput):
    """What `step` of our schedulers returns.

    Args:
        prev_sample: the next sample, of the shape and dtype of `sample`, (B, L).
        unmasked: masks that were filled in this step, bool (B, L).
        remasked: visible tokens that became masks in this step, bool (B, L); never also in `unmasked`.
        sampled_tokens: the tokens written, int64 (N,), in row-major order of `unmasked`.
        sampled_probs: the model's own probabilities of these at temperature 1, float32 (N,).
        finished: rows that need no further forward pass, bool (B,); None from schedulers that use all their steps.
        accepted: finished rows in which no token was doubtful, bool (B,); None as above.
        restored: visible tokens of finished rows that gave way to those of an earlier, better canvas, bool (B, L); None
            as above.
        judged: quality of each generated token of a finished row, float32 (B, L), NaN elsewhere; None as above.
    """

    prev_sample: Tensor
    unmasked: Tensor
    remasked: Tensor
    sampled_tokens: Tensor
    sampled_probs: Tensor
    finished: Tensor | None = None
    accepted: Tensor | None = None
    restored: Tensor | None = None
    judged: Tensor | None = None


@runs_in_llada2_pipeline
class PrismScheduler(SchedulerMixin, SchedulerConfig):
    """Static schedule of T steps with remasking of the tokens that the quality head trusts least.

    Of M generated tokens ceil(M (i + 1) / T) are visible after step i, in every row. A step remasks n visible tokens
    and fills as many more masks, but none that it remasked itself. So n <= M minus the tokens visible after the step.

    Args:
        order: which masks are filled first: "random", "confidence", "margin", "entropy" or "left_to_right".
        num_remask: n, tokens of lowest quality remasked in each step. None for 1, if `eta` is None too.
        eta: in [0, 1]; n ~ Binomial(visible, min(eta, (1 - alpha_s) / alpha_t)) instead, where alpha_t and alpha_s
            are the fractions visible before and after the step. Not with `num_remask`.
        eta_schedule: "constant", or "inverse": min(1, eta * eta_reference_steps / T), which keeps the remaskings per
            token level as T grows.
        eta_reference_steps: the T at which "inverse" leaves `eta` as it is.
        remask_start, remask_end: remask only in steps i with remask_start <= i / T < remask_end (staged remasking).
        loop_steps: forward passes added to refine the sample at one level; 0 for no loop. NFE = T + loop_steps.
        loop_num_remask: random tokens remasked in each step of the loop and filled in the next.
        loop_at: in (0, 1]; the loop begins once this fraction of the T steps is done.
        temperature, top_p, top_k: of sampling, see `token_sampling.sample_tokens`.
        mask_token_id: None if every `step` is given it.
        use_threshold: also fill every mask whose token has a confidence above `threshold`, beyond those due, and at
            least one; needs order "confidence".
        threshold: of `use_threshold`, at least 0.
        quality_threshold: in (0, 1]; every token whose quality is below this is remasked, and no others: at most a
            `max_share` of the visible tokens in a step, and at most `num_remask`, if that is given; the lowest go
            first. A row that `threshold` filled early takes one more pass, so that its last tokens are judged too. Not
            with `eta`. None for remasking by number alone.
        max_share: of `quality_threshold`, in (0, 1]; rounded down, and at least one token.
        block_length: the default of diffusers' `LLaDA2Pipeline`, see `llada2.py`; `PrismPipeline` has its own.
    Raises:
        ValueError: a field out of its range, or both `num_remask` and `eta`.
    Source: PRISM (arXiv 2510.01384, sampling algorithm and section on text), with ReMDM's cap (arXiv 2503.00307).
    """

    order = 1  # diffusers: forward passes per timestep. The order of revealing is config.order.
    fields_as = "BlockRefinementScheduler"  # diffusers': threshold and block_length mean the same there

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
        self._warned = False

    @property
    def can_remask(self) -> bool:
        """Would this configuration ever remask a token?"""
        return remasks_by_quality(self.config) or self.config.loop_steps > 0

    @property
    def needs_quality(self) -> bool:
        """Does `step` want `quality`?"""
        return remasks_by_quality(self.config)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        block_length: int | None = None,
    ) -> None:
        """Begin a run of `num_inference_steps` steps and `loop_steps` more.

        Args:
            num_inference_steps: T, at least 1.
            device: accepted because diffusers' loops pass it. `timesteps` stay on the CPU: they are only counted, and
                reading one back from a GPU in every step would make the step wait for it.
            block_length: accepted because diffusers' loops pass it; blocks come in through `generation_mask`.
        Raises:
            ValueError: a number below 1.
        """
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
        generation_mask: Tensor | None = None,
        mask_token_id: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PrismSchedulerOutput | tuple[Tensor, ...]:
        """One step: remask the tokens of lowest quality, fill masks, from one forward pass on `sample`.

        Args:
            model_output: logits (B, L, V) aligned with `sample`, or anything that gives (N, V) when indexed by a bool
                (B, L) mask. It is indexed only where logits are needed.
            timestep: one of `timesteps`.
            sample: token ids, int64 of shape (B, L).
            quality: probability that each visible token is right, or anything that rises with it, float of shape
                (B, L); read at visible generated tokens only. None: nothing is remasked, with a warning, once.
            generation_mask: true where tokens are generated, bool of shape (B, L); None for everywhere. Others (the
                prompt, padding) never change.
            mask_token_id, temperature, top_p, top_k, threshold: None for the config's. `threshold` counts only if the
                config says `use_threshold`.
            generator: one, a list of one per row, or None for torch's default one. With a list, a row's tokens do not
                depend on the other rows.
            return_dict: False for a plain tuple of the output's fields.
        Returns:
            `PrismSchedulerOutput`.
        Raises:
            ValueError: a wrong shape or dtype, a timestep outside the schedule, no mask token, a value out of range.
        """
        place = read_step(self.config, self.timesteps, model_output, timestep, sample, generation_mask, mask_token_id)
        if quality is not None:
            given = f"{quality.dtype} {tuple(quality.shape)}"
            fits = quality.is_floating_point() and quality.shape == sample.shape
            require(fits, "quality", given, f"floats of shape {tuple(sample.shape)}, as `sample`")
        elif self.needs_quality and not self._warned:
            self._warned = True
            warnings.warn(
                "PrismScheduler got quality=None and so remasks nothing. Pass the quality head's probabilities as "
                "`quality` (in diffusers' LLaDA2Pipeline: enable_prism(pipe, quality_head)); without a head, "
                "SelfConfidenceScheduler remasks by the model's own probabilities.",
                stacklevel=3,
            )
        output = remask_and_reveal(
            self.config,
            self.num_inference_steps,
            place,
            read_sampling(self.config, temperature, top_p, top_k),
            model_output,
            sample,
            None if quality is None else lambda visible: quality,
            generator,
            read_threshold(self.config, threshold),
        )
        return output if return_dict else output.to_tuple()


# --- the rule itself: functions of a config, so that SelfConfidenceScheduler is the same rule with another score ------


def check_remasking(config: Mapping) -> None:
    """Raise a ValueError for wrong values of the config fields that say when and how much to remask."""
    n, eta, reference = config["num_remask"], config["eta"], config["eta_reference_steps"]
    require(n is None or is_int(n, 0), "num_remask", n, "None or an integer of at least 0")
    require(eta is None or is_number(eta, 0, 1), "eta", eta, "None or a number in [0, 1]")
    if n is not None and eta is not None:
        raise ValueError(f"`num_remask` and `eta` exclude each other, got {n} and {eta}: set one of them to None.")
    inverse = config["eta_schedule"] == "inverse"
    known = inverse or config["eta_schedule"] == "constant"
    require(known, "eta_schedule", config["eta_schedule"], '"constant" or "inverse"')
    require(not inverse or eta is not None, "eta", eta, 'a number in [0, 1] with eta_schedule="inverse"')
    needed = 'an integer of at least 1 with eta_schedule="inverse"' if inverse else "None or an integer of at least 1"
    valid = is_int(reference, 1) or (reference is None and not inverse)
    require(valid, "eta_reference_steps", reference, needed)
    start, end = config["remask_start"], config["remask_end"]
    require(is_number(start, 0, 1), "remask_start", start, "a number in [0, 1]")
    require(is_number(end, 0, 1) and end > start, "remask_end", end, f"a number in (remask_start, 1] = ({start}, 1]")
    loops, in_loop, at = config["loop_steps"], config["loop_num_remask"], config["loop_at"]
    require(is_int(loops, 0), "loop_steps", loops, "an integer of at least 0")
    require(is_int(in_loop, min(loops, 1)), "loop_num_remask", in_loop, f"an integer of at least {min(loops, 1)}")
    require(is_number(at, 0, 1) and at > 0, "loop_at", at, "a number in (0, 1]")
    bar, share = config["quality_threshold"], config["max_share"]
    valid = bar is None or (is_number(bar, 0, 1) and bar > 0)
    require(valid, "quality_threshold", bar, "None or a number in (0, 1]")
    require(is_number(share, 0, 1) and share > 0, "max_share", share, "a number in (0, 1]")
    if bar is not None and (eta is not None or n == 0):
        raise ValueError(
            f"`quality_threshold` is {bar}: the tokens below it are remasked, so `eta` must be None and `num_remask` "
            f"None or at least 1, got {eta} and {n}."
        )


def remasks_by_quality(config: Mapping) -> bool:
    """Does the configuration ask for remasking of the tokens of lowest quality?"""
    return config["num_remask"] != 0 if config["eta"] is None else config["eta"] > 0


def place_in_schedule(config: Mapping, num_steps: int, timestep: int) -> tuple[int, bool, bool, bool]:
    """Where a timestep stands, once the loop has been put between the T steps of the schedule.

    Returns:
        the step of the schedule whose visible count is due after it, in [0, T); whether tokens of lowest quality are
        remasked (not inside the loop, nor outside [remask_start, remask_end), nor in the last step, which must fill
        all); whether random tokens are, for the loop: in the step that enters it and in all steps of it but the last;
        whether the level is held: in the step that enters the loop and in all steps of it.
    """
    # 0.55 * 100 is 55.00000000000001, which must not become 56 steps.
    entry = max(0, math.ceil(config["loop_at"] * num_steps - 1e-6) - 1)
    leave = entry + config["loop_steps"]  # the last step of the loop; the entry itself if there is none
    step = min(timestep, max(entry, timestep - config["loop_steps"]))
    in_window = config["remask_start"] <= step / num_steps < config["remask_end"] and step < num_steps - 1
    by_quality = remasks_by_quality(config) and in_window and not entry < timestep <= leave
    return step, by_quality, entry <= timestep < leave, config["loop_steps"] > 0 and entry <= timestep <= leave


def remask_and_reveal(
    config: Mapping,
    num_steps: int,
    place: tuple[int, Tensor, int],
    sampling: tuple[float, float | None, int | None],
    model_output,
    sample: Tensor,
    quality_of: Callable[[Tensor], Tensor] | None,
    generator: torch.Generator | list[torch.Generator] | None,
    threshold: float | None = None,
) -> PrismSchedulerOutput:
    """The sampling step of PRISM with any score in the place of its quality.

    Args:
        config: the fields of `PrismScheduler`.
        num_steps: T.
        place: timestep, generation mask and mask token, as `read_step` gives them.
        sampling: temperature, top_p and top_k, as `read_sampling` gives them.
        model_output, sample, generator: as `PrismScheduler.step`.
        quality_of: takes the visible generated tokens, bool (B, L), and gives the score (B, L), of which the lowest
            are remasked; called only in steps that remask by it. None: no score is known, so if the configuration
            needs one nothing is remasked.
        threshold: see `read_threshold`; the loop, which holds a level, does not read it.
    """
    timestep, generation_mask, mask_token_id = place
    step, by_quality, at_random, level_held = place_in_schedule(config, num_steps, timestep)
    threshold = None if level_held else threshold
    if quality_of is None and remasks_by_quality(config):
        by_quality = at_random = False
    u_order, u_token, u_count, u_loop = uniform_at(generation_mask, 4, generator)
    masked = generation_mask & (sample == mask_token_id)  # (B, L)
    visible = generation_mask & ~masked  # (B, L)
    total, shown = generation_mask.sum(-1), visible.sum(-1)  # (B,)
    target = visible_target(step, num_steps, total)  # (B,)

    remasked = torch.zeros_like(masked)
    if by_quality:
        n, quality = num_to_remask(config, num_steps, visible, total, target, u_count), quality_of(visible)
        if (bar := config["quality_threshold"]) is not None:
            doubtful = torch.minimum((visible & (quality < bar)).sum(-1), share_of(shown, config["max_share"]))
            n = doubtful if config["num_remask"] is None else torch.minimum(n, doubtful)
        # Only old masks are refilled, so more than total - target remasks would leave a mask at the end.
        remasked = lowest(quality, visible, torch.minimum(n, total - target))
    due = target - shown + remasked.sum(-1)
    if at_random:
        # Not refilled before the next step: the loop stays this much below the level that it holds.
        remasked = remasked | lowest(u_loop, visible & ~remasked, config["loop_num_remask"])

    if threshold is not None:
        due = due.clamp(min=1)  # a row that is ahead of the schedule must not wait for it
    unmasked, tokens, probs = reveal(
        model_output,
        masked,
        due,
        config["order"],
        *sampling,
        mask_token_id,
        u_order,
        u_token,
        threshold,
    )
    prev_sample = sample.masked_scatter(unmasked, tokens.to(sample.dtype)).masked_fill(remasked, mask_token_id)
    return PrismSchedulerOutput(prev_sample, unmasked, remasked, tokens, probs)


def num_to_remask(config: Mapping, num_steps: int, visible: Tensor, total: Tensor, target: Tensor, u: Tensor) -> Tensor:
    """How many tokens of each row the configuration wants to remask, before the schedule's limit.

    Args:
        config: the fields of `PrismScheduler`.
        num_steps: T.
        visible: generated tokens that are visible, bool (B, L).
        total, target: generated tokens, and how many of them shall be visible after the step, int64 (B,).
        u: uniform numbers (B, L), read if the number is random.
    Returns:
        int64 of shape (B,).
    """
    if config["eta"] is None:
        return torch.full_like(total, 1 if config["num_remask"] is None else config["num_remask"])
    eta = config["eta"]
    if config["eta_schedule"] == "inverse":
        eta = min(1.0, eta * config["eta_reference_steps"] / num_steps)
    alpha_t, alpha_s = (count / total.clamp(min=1) for count in (visible.sum(-1), target))
    return binomial(visible, remdm_cap(alpha_t, alpha_s, eta), u)
