"""Lets our schedulers run inside diffusers' unmodified `LLaDA2Pipeline`. No other file knows of that pipeline's loop.

The pipeline calls a scheduler once per forward pass on one block of the sequence, with the keyword arguments of
diffusers' `BlockRefinementScheduler`. It asks the scheduler whether a row or a block is done. It writes a position only
if `transfer_index` or `editing_transfer_index` is true there. So a remasking is reported as an edit whose new token is
the mask. The pipeline passes neither the quality of a token nor where `gen_length` ends inside the last block.
`enable_prism` puts both into the scheduler's `inbox` before each step. Read in diffusers 0.42.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from .validation import is_number, require

SchedulerClass = TypeVar("SchedulerClass", bound=type)
SAMPLING_METHODS = ("auto", "greedy", "multinomial")
# Arguments of `BlockRefinementScheduler.step` that ours does not have: one of them tells whose loop is calling.
_THEIRS = frozenset({"prompt_mask", "sampling_method", "editing_threshold", "minimal_topk"})


@dataclass
class LLaDA2StepOutput(BaseOutput):
    """What `step` returns when it is called with `LLaDA2Pipeline`'s keyword arguments, B rows and blocks of L tokens.

    Args:
        prev_sample: the next tokens of the block, of the dtype of `sample`, (B, L).
        transfer_index: masks that were filled, bool (B, L).
        editing_transfer_index: visible tokens that became masks, bool (B, L).
        sampled_tokens: `prev_sample` again. The pipeline reads it where `transfer_index` or `editing_transfer_index`
            is true.
        sampled_probs: the model's own probabilities of the filled tokens at temperature 1, float32 (B, L); 0 elsewhere.
        pred_logits: `model_output`.
    """

    prev_sample: Tensor
    transfer_index: Tensor
    editing_transfer_index: Tensor
    sampled_tokens: Tensor
    sampled_probs: Tensor
    pred_logits: Tensor


@dataclass
class _Block:
    """Where a scheduler stands in the block that `LLaDA2Pipeline` is working on."""

    timestep: int = 0  # forward passes made; the pipeline's own count stops while a block holds no mask
    full: Tensor | None = None  # rows of the block without a mask, bool (B,)


@dataclass
class Inbox:
    """What `LLaDA2Pipeline` cannot pass to a scheduler's next `step`. That step empties the inbox.

    Args:
        quality: of the tokens in the last forward pass, float (B, W). The block is the last L of the W positions. None
            if no head judged them.
        kept: positions that are not cut off after `gen_length`, bool (B, W). The step writes at these alone. None for
            all.
    """

    quality: Tensor | None = None
    kept: Tensor | None = None

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """Return (quality, kept) and empty the inbox."""
        quality, kept = self.quality, self.kept
        self.quality = self.kept = None
        return quality, kept


def runs_in_llada2_pipeline(cls: SchedulerClass) -> SchedulerClass:
    """Class decorator: a scheduler with a static schedule that `LLaDA2Pipeline` can drive as well.

    An argument that only `LLaDA2Pipeline` passes switches `step` to that pipeline's form. Without one, `step` runs as
    it is written. The class needs the config fields of `check_dropin_config` and a keyword `threshold` of `step`.
    """
    kind: Any = cls
    own_set_timesteps, own_step = kind.set_timesteps, kind.step

    @functools.wraps(own_set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        own_set_timesteps(self, *args, **kwargs)
        self._block, self.inbox = _Block(), Inbox()

    @functools.wraps(own_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _THEIRS.isdisjoint(kwargs):
            return own_step(self, *args, **kwargs)
        return _step_in_block(self, own_step, *args, **kwargs)

    kind.set_timesteps, kind.step = set_timesteps, step
    kind.check_eos_finished = staticmethod(check_eos_finished)  # as in BlockRefinementScheduler
    kind.check_block_should_continue = check_block_should_continue
    return cls


def check_dropin_config(config: Mapping[str, Any]) -> None:
    """Raise a ValueError for `use_threshold` with another order than "confidence"."""
    fits = not config["use_threshold"] or config["order"] == "confidence"
    require(
        fits, "order", config["order"], '"confidence" with use_threshold=True, which writes what the model is sure of'
    )


def resolve_threshold(config: Mapping[str, Any], threshold: float | None) -> float | None:
    """The confidence above which every token is written: the argument, or if that is None, the config's.

    The result is None without `use_threshold`. `LLaDA2Pipeline` passes its default in every call, so the argument does
    not show what the user wants.

    Raises:
        ValueError: below 0. Above 1 is legal, as in that pipeline: no token passes it.
    """
    if not config["use_threshold"]:
        return None
    threshold = config["threshold"] if threshold is None else threshold
    require(is_number(threshold, 0), "threshold", threshold, "a number of at least 0")
    return threshold


def _step_in_block(
    scheduler: Any,
    own_step: Callable[..., Any],
    model_output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    *,
    mask_token_id: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    sampling_method: str = "auto",
    threshold: float | None = None,
    editing_threshold: float | None = None,
    minimal_topk: int | None = None,
    prompt_mask: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    return_dict: bool = True,
) -> LLaDA2StepOutput | tuple[Tensor, ...]:
    """`own_step` with the arguments and the output of `BlockRefinementScheduler.step`.

    Not read: `timestep` (see `_Block`), `editing_threshold` (remasking takes the place of editing), `minimal_topk` (the
    schedule says how many are filled). A `top_k` of 0 means none, as there.

    Raises:
        ValueError: an unknown `sampling_method`, a `prompt_mask` of another shape or dtype; and those of `own_step`.
    """
    require(sampling_method in SAMPLING_METHODS, "sampling_method", sampling_method, f"one of {SAMPLING_METHODS}")
    block = getattr(scheduler, "_block", None) or _Block()
    generation_mask = torch.ones_like(sample, dtype=torch.bool)
    if prompt_mask is not None:
        given = f"{prompt_mask.dtype} {tuple(prompt_mask.shape)}"
        fits = prompt_mask.dtype == torch.bool and prompt_mask.shape == sample.shape[1:]
        require(fits, "prompt_mask", given, f"torch.bool {tuple(sample.shape[1:])}, one for each token of the block")
        generation_mask &= ~prompt_mask
    quality, kept = scheduler.inbox.take() if hasattr(scheduler, "inbox") else (None, None)
    if kept is not None:
        generation_mask &= kept[:, -sample.shape[1] :].to(sample.device)
    output = own_step(
        scheduler,
        model_output,
        block.timestep,
        sample.clone(),  # a view of the canvas, which the pipeline overwrites; a scheduler may remember it
        quality=None if quality is None else quality[:, -sample.shape[1] :],
        generation_mask=generation_mask,
        mask_token_id=mask_token_id,
        temperature=0.0 if sampling_method == "greedy" else temperature,
        top_p=top_p,
        top_k=top_k or None,
        threshold=threshold,
        generator=generator,
    )
    block.timestep += 1
    mask_token_id = scheduler.config.mask_token_id if mask_token_id is None else mask_token_id
    block.full = ~(generation_mask & (output.prev_sample == mask_token_id)).any(-1)
    probs = torch.zeros(sample.shape, device=sample.device).masked_scatter(output.unmasked, output.sampled_probs)
    new = output.prev_sample
    theirs = LLaDA2StepOutput(new, output.unmasked, output.remasked, new, probs, model_output)
    return theirs if return_dict else theirs.to_tuple()


def check_eos_finished(
    cur_x: Tensor,
    sampled_tokens: Tensor,
    final_transfer: Tensor,
    finished: Tensor,
    eos_token_id: int,
    mask_token_id: int,
    prompt_length: int,
) -> Tensor:
    """Which rows are done, bool (B,): they hold an end token, and no mask up to the end of this block.

    `LLaDA2Pipeline` writes nothing more into such a row. A row is not done before its block is full, so that no mask
    stays, and an end token or a token before it can still be corrected. End tokens of the prompt do not count.

    Args:
        cur_x: the canvas up to the end of this block, int64 (B, W).
        sampled_tokens, final_transfer: not read.
        finished: rows done before, bool (B,).
        eos_token_id, mask_token_id: ids.
        prompt_length: positions at the start that were given.
    """
    generated = cur_x[:, prompt_length:]
    return finished | ((generated == eos_token_id).any(-1) & (generated != mask_token_id).all(-1))


def check_block_should_continue(
    self: Any,
    step_idx: int,
    masks_remaining: bool | Tensor,
    editing_enabled: bool,
    editing_transfer_index: Tensor,
    post_steps: int,
    max_post_steps: int,
    finished: Tensor,
) -> bool:
    """Is another forward pass on this block due?

    A block takes all timesteps of the scheduler, its loop included. Without a loop it ends early if all rows are full.

    Args:
        step_idx, masks_remaining, editing_enabled, editing_transfer_index, post_steps, max_post_steps: not read; they
            count the editing of `BlockRefinementScheduler`.
        finished: rows that are done, bool (B,).
    """
    block = self._block
    loop = self.config.get("loop_steps", 0) > 0  # it may begin after the block is full, and opens it again
    full = bool((block.full | finished).all()) and not loop
    if block.timestep < len(self.timesteps) and not full and not bool(finished.all()):
        return True
    self._block = _Block()
    return False
