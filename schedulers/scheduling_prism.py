"""PRISM sampling (arXiv 2510.01384): reveal on a fixed schedule, and remask the visible tokens of lowest quality."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import Generators, binomial, lowest, remdm_cap, share_of, visible_target
from .llada2 import check_dropin_config, resolve_threshold, runs_in_llada2_pipeline
from .mixin import MDMSchedulerMixin
from .step import PrismSchedulerOutput, Step
from .token_sampling import Logits
from .validation import (
    Flag,
    Order,
    Temperature,
    TokenId,
    TopK,
    TopP,
    check_fields,
    check_quality,
    integer,
    number,
    one_of,
    require,
)

# --- the rule itself: functions of a config, so that it is the same with another score --------------------------------


class Phase(NamedTuple):
    """What a timestep does. The timesteps are the T steps of the schedule, with those of the loop between them.

    Args:
        step: the step of the schedule that sets the visible count after this timestep, in [0, T).
        by_quality: are tokens of lowest quality remasked? Not inside the loop, nor outside [remask_start, remask_end),
            nor in the last step, which must fill all masks.
        at_random: are random tokens remasked for the loop? In the step that enters the loop, and in all steps of the
            loop but the last.
        holds_level: does the visible count stay at the loop's level? In the step that enters the loop, and inside it.
    """

    step: int
    by_quality: bool
    at_random: bool
    holds_level: bool


def phase_of(config: Any, num_steps: int, timestep: int) -> Phase:
    """The phase of a timestep, for T = `num_steps` and the loop of the config."""
    # 0.55 * 100 is 55.00000000000001, which must not become 56 steps.
    entry = max(0, math.ceil(config.loop_at * num_steps - 1e-6) - 1)
    leave = entry + config.loop_steps  # the last step of the loop; the entry itself if there is none
    step = min(timestep, max(entry, timestep - config.loop_steps))
    in_window = config.remask_start <= step / num_steps < config.remask_end and step < num_steps - 1
    return Phase(
        step=step,
        by_quality=remasks_by_quality(config) and in_window and not entry < timestep <= leave,
        at_random=entry <= timestep < leave,
        holds_level=config.loop_steps > 0 and entry <= timestep <= leave,
    )


def remasks_by_quality(config: Any) -> bool:
    """Does the configuration ask for remasking of the tokens of lowest quality?"""
    return config.num_remask != 0 if config.eta is None else config.eta > 0


def remasks(scheduler: Any) -> bool:
    """Would this configuration ever remask a token?"""
    return remasks_by_quality(scheduler.config) or scheduler.config.loop_steps > 0


def num_to_remask(config: Any, now: Step, target: Tensor, quality: Tensor, u: Tensor) -> Tensor:
    """How many tokens of each row are remasked by quality, int64 (B,).

    Args:
        config: the fields of `PrismScheduler`.
        now: the step.
        target: generated tokens that are visible after it, int64 (B,).
        quality: of the visible tokens, (B, L).
        u: uniform numbers (B, L), read if the number is random.
    """
    if config.eta is not None:
        inverse = config.eta_schedule == "inverse"
        eta = min(1.0, config.eta * config.eta_reference_steps / now.num_steps) if inverse else config.eta
        alpha_t, alpha_s = (count / now.total.clamp(min=1) for count in (now.shown, target))
        n = binomial(now.visible, remdm_cap(alpha_t, alpha_s, eta), u)
    elif config.num_remask is None and config.quality_threshold is not None:
        n = now.shown
    else:
        n = torch.full_like(now.total, 1 if config.num_remask is None else config.num_remask)
    if config.quality_threshold is not None:
        most = torch.maximum(share_of(now.shown, config.max_share), now.shown.clamp(max=1))
        doubtful = (now.visible & (quality < config.quality_threshold)).sum(-1)
        n = torch.minimum(n, torch.minimum(doubtful, most))
    # Only old masks are refilled, so more than total - target remasks would leave a mask at the end.
    return torch.minimum(n, now.total - target)


def remask_and_reveal(
    now: Step, config: Any, score: Callable[[Tensor], Tensor] | None, threshold: float | None
) -> PrismSchedulerOutput:
    """The sampling step of PRISM with any score in the place of its quality.

    Args:
        now: the step.
        config: the fields of `PrismScheduler`.
        score: callable from the visible generated tokens, bool (B, L), to their score (B, L); the lowest are remasked.
            It is called only in steps that remask by score. None: no score is known, so nothing is remasked if the
            configuration needs one.
        threshold: of this step, see `resolve_threshold`; not read in the loop, where the visible count is fixed.
    """
    threshold = resolve_threshold(config, threshold)
    phase = phase_of(config, now.num_steps, now.index)
    if score is None and remasks_by_quality(config):
        phase = phase._replace(by_quality=False, at_random=False)
    u_order, u_token, u_count, u_loop = now.uniform(4)
    target = visible_target(phase.step, now.num_steps, now.total)
    remasked = now.nothing
    if phase.by_quality and score is not None:
        quality = score(now.visible)
        remasked = lowest(quality, now.visible, num_to_remask(config, now, target, quality, u_count))
    due = target - now.shown + remasked.sum(-1)
    if phase.at_random:
        # These are refilled in the next step, so inside the loop the visible count is this much below its level.
        remasked = remasked | lowest(u_loop, now.visible & ~remasked, config.loop_num_remask)
    return now.output(*now.reveal(due, u_order, u_token, None if phase.holds_level else threshold), remasked)


def check_remasking(kind: type, config: Any) -> None:
    """Raise a ValueError for a field that is not what the signature of `kind` allows, or that excludes another."""
    check_fields(kind, config)
    check_dropin_config(config)
    n, eta, bar = config.num_remask, config.eta, config.quality_threshold
    if n is not None and eta is not None:
        raise ValueError(f"`num_remask` and `eta` exclude each other, got {n} and {eta}: set one of them to None.")
    if config.eta_schedule == "inverse":
        reference = config.eta_reference_steps
        require(eta is not None, "eta", eta, 'a number in [0, 1] with eta_schedule="inverse"')
        wanted = 'an integer of at least 1 with eta_schedule="inverse"'
        require(reference is not None, "eta_reference_steps", reference, wanted)
    start, end, in_loop = config.remask_start, config.remask_end, config.loop_num_remask
    require(end > start, "remask_end", end, f"a number in (remask_start, 1] = ({start}, 1]")
    require(not config.loop_steps or in_loop, "loop_num_remask", in_loop, "an integer of at least 1 with `loop_steps`")
    if bar is not None and (eta is not None or n == 0):
        raise ValueError(
            f"`quality_threshold` is {bar}: the tokens below it are remasked, so `eta` must be None and `num_remask` "
            f"None or at least 1, got {eta} and {n}."
        )


# --- the scheduler ----------------------------------------------------------------------------------------------------


@runs_in_llada2_pipeline
class PrismScheduler(MDMSchedulerMixin):
    """Static schedule of T steps with remasking of the tokens that the quality head trusts least.

    After step i, M_i of the M generated tokens of a row are visible. The step remasks the n visible tokens of lowest
    quality. It then fills old masks, not those of this step, until M_i tokens are visible:

        M_i = ceil(M (i + 1) / T)
        n   = num_remask,    or n ~ Binomial(visible, min(eta, (1 - alpha_s) / alpha_t)),    and n <= M - M_i

    Example:
        >>> scheduler = PrismScheduler(num_remask=1, mask_token_id=9)
        >>> scheduler.set_timesteps(2)
        >>> x, quality = torch.tensor([[3, 5, 9, 9]]), torch.tensor([[0.9, 0.1, 0.0, 0.0]])
        >>> scheduler.step(torch.zeros(1, 4, 10), 0, x, quality=quality).remasked.tolist()
        [[False, True, False, False]]

    Args:
        order: which masks are filled first: "random", "confidence", "margin", "entropy" or "left_to_right".
        num_remask: n, tokens of lowest quality remasked in each step. None for 1, if `eta` is None too.
        eta: in [0, 1]; n ~ Binomial(visible, min(eta, (1 - alpha_s) / alpha_t)) instead, where alpha_t and alpha_s
            are the fractions visible before and after the step. Not with `num_remask`.
        eta_schedule: "constant", or "inverse", which uses min(1, eta * eta_reference_steps / T). Then a token is
            remasked about equally often for all T.
        eta_reference_steps: the T at which "inverse" uses `eta` unchanged.
        remask_start, remask_end: remask only in steps i with remask_start <= i / T < remask_end (staged remasking).
        loop_steps: further forward passes that refine the sample at one visible count; 0 for no loop. The run (or each
            block) makes T + loop_steps.
        loop_num_remask: random tokens remasked in each step of the loop and filled in the next.
        loop_at: in (0, 1]; the loop begins once this fraction of the T steps is done.
        temperature, top_p, top_k: of sampling, see `token_sampling.sample_tokens`.
        mask_token_id: None if every `step` is given it.
        use_threshold: besides the masks that are due, fill every mask whose token has a confidence above `threshold`.
            A step then fills at least one mask. Needs order "confidence".
        threshold: of `use_threshold`, at least 0.
        quality_threshold: in (0, 1]; remask only tokens of a quality below this, the lowest first. A step remasks at
            most the share `max_share` of the visible tokens, and at most `num_remask` if that is given. A row that
            `threshold` filled early takes one more forward pass, so that its last tokens are judged too. Not with
            `eta`. None for remasking by number alone.
        max_share: the share for `quality_threshold`, in (0, 1]; rounded down, but at least one token.
        block_length: the default of diffusers' `LLaDA2Pipeline`, see `llada2.py`; `PrismPipeline` has its own.
    Raises:
        ValueError: a field out of its range, or both `num_remask` and `eta`.
    Source: PRISM (arXiv 2510.01384, sampling algorithm and section on text), with ReMDM's cap (arXiv 2503.00307).
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
        use_threshold: Flag = False,
        threshold: Annotated[float, number(0)] = 0.9,
        block_length: Annotated[int, integer(1)] = 32,
        quality_threshold: Annotated[float | None, number(0, 1, above=True)] = None,
        max_share: Annotated[float, number(0, 1, above=True)] = 0.25,
    ) -> None:
        check_remasking(PrismScheduler, self.config)

    @property
    def needs_quality(self) -> bool:
        """Does `step` want `quality`?"""
        return remasks_by_quality(self.config)

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
        """One step: remask the tokens of lowest quality, fill masks, from one forward pass on `sample`.

        Args:
            model_output: logits (B, L, V) aligned with `sample`, or anything that gives (N, V) when indexed by a bool
                (B, L) mask. It is indexed only where logits are needed.
            timestep: one of `timesteps`.
            sample: token ids, int64 of shape (B, L).
            quality: probability that each visible token is right, or any score that is higher for better tokens, float
                of shape (B, L). Read only at visible generated tokens. None remasks nothing and warns once.
            generation_mask: true where tokens are generated, bool of shape (B, L); None for everywhere. Other positions
                (the prompt, padding) never change.
            mask_token_id, temperature, top_p, top_k, threshold: None for the config's. `threshold` is read only if
                the config has `use_threshold=True`.
            generator: one, a list of one per row, or None for torch's default one. With a list, a row's tokens do not
                depend on the other rows.
            return_dict: False for a plain tuple of the output's fields.
        Returns:
            `PrismSchedulerOutput`.
        Raises:
            ValueError: a wrong shape or dtype, a timestep outside the schedule, no mask token, a value out of range.
        """
        now = Step.of(
            self, model_output, timestep, sample, generation_mask, mask_token_id, temperature, top_p, top_k, generator
        )
        if quality is not None:
            check_quality(quality, sample)
        elif self.needs_quality:
            self._warn_once(
                "PrismScheduler got quality=None, so nothing is remasked. Pass the quality head's probabilities as "
                "`quality` (in diffusers' LLaDA2Pipeline: enable_prism(pipe, quality_head)). Without a head, "
                "SelfConfidenceScheduler remasks by the model's own probabilities.",
                stacklevel=3,
            )
        score = None if quality is None else lambda visible: quality
        output = remask_and_reveal(now, self.config, score, threshold)
        return output if return_dict else output.to_tuple()
