"""What a run knows about its canvas besides the token ids, and the numbers that a quality head reads of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# What a head or a scheduler may read, with the channels that each gives to `context_features`.
INPUTS = {"given": 1, "prompt": 4, "first_hidden": 0, "draw": 2, "age": 3, "remasks": 1, "fill": 1, "own": 4}
# Log-probabilities below this say no more: the token is wrong.
LOG_FLOOR = -20.0
# Inputs that are log-probabilities, or an entropy. The first of each tells whether the input is known.
_LOGS = {
    "prompt": ("first_max", "first_entropy", "prompt_logprob"),
    "draw": ("draw_logprob",),
    "own": ("own_logprob", "own_mean", "own_min"),
}


@dataclass(frozen=True)
class RunContext:
    """What the run that writes a canvas knows about each of its tokens.

    All tensors have shape (B, L) unless said otherwise. NaN means unknown. That is the state of a given token, of a
    mask where the value belongs to a token, of a token that a callback wrote where the value belongs to the drawing,
    and of all tokens of a finished text that nobody watched being written.

    Args:
        generated: positions that the run may write, bool.
        now: number of the present forward pass, counted from 0 over the whole run, int64 (B,). Rows that are finished
            take part in no forward pass, so rows may differ.
        written_at: the forward pass that drew the visible token, int64; -1 where none did.
        num_remasked: how often the position was masked again, int64.
        draw_logprob: log-probability of the visible token when it was drawn, float32: at temperature 1 and before
            truncation, with guidance if there is any.
        prompt_logprob: log p(y_i | the canvas before anything was written), float32, from the first forward pass of
            the run, or of the block where the run has blocks.
        first_max: largest log-probability at the position in that first forward pass, float32.
        first_entropy: entropy there, in nats, float32.
        first_hidden: hidden state that predicted the position there, (B, L, H) in the model's dtype, 0 where there is
            none; None if nothing reads it.
        own_logprob: log p(y_i | y) of the visible token in the present forward pass, float32; None if nothing reads it.
            With blocks it is that of the last forward pass in which the token's block was at work.
        own_mean, own_min: mean and minimum of it over the forward passes since the token was written, float32 or None.
    """

    generated: Tensor
    now: Tensor
    written_at: Tensor
    num_remasked: Tensor
    draw_logprob: Tensor
    prompt_logprob: Tensor
    first_max: Tensor
    first_entropy: Tensor
    first_hidden: Tensor | None = None
    own_logprob: Tensor | None = None
    own_mean: Tensor | None = None
    own_min: Tensor | None = None

    @classmethod
    def unwatched(
        cls, generated: Tensor, draw_logprob: Tensor | None = None, prompt_logprob: Tensor | None = None
    ) -> RunContext:
        """What is known of texts that nobody watched being written, but for what is given here; (B, L) each."""
        count = torch.zeros(generated.shape, dtype=torch.int64, device=generated.device)
        unknown = torch.full(generated.shape, torch.nan, device=generated.device)
        return cls(
            generated=generated,
            now=count.sum(-1),
            written_at=count - 1,
            num_remasked=count,
            draw_logprob=unknown if draw_logprob is None else draw_logprob,
            prompt_logprob=unknown if prompt_logprob is None else prompt_logprob,
            first_max=unknown,
            first_entropy=unknown,
        )


def check_inputs(names: Any) -> tuple[str, ...]:
    """The names of inputs as a tuple.

    Raises:
        ValueError: one is not in `INPUTS`, or stands there twice.
        TypeError: not a list or tuple of names.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`context` must be a list of names such as ('given', 'draw'), got {names!r}.")
    if unknown := sorted(set(names) - set(INPUTS)):
        raise ValueError(f"`context` may hold {', '.join(INPUTS)}; got {', '.join(unknown)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"`context` names an input twice: {', '.join(names)}.")
    return tuple(names)


def num_features(names: tuple[str, ...]) -> int:
    """Channels that `context_features` gives for these inputs; "first_hidden" has none, a head reads it by itself."""
    return sum(INPUTS[name] for name in names)


def context_features(context: RunContext | None, sample: Tensor, mask_token_id: int, names: tuple[str, ...]) -> Tensor:
    """The inputs of a quality head that a run context gives, each about in [-2, 2].

    Args:
        context: None for a finished text of which nothing is known: all channels are 0.
        sample: token ids, int64 (B, L).
        mask_token_id: id of the mask.
        names: which of `INPUTS`, in the order of the channels.
    Returns:
        float32 of shape (B, L, `num_features(names)`), finite. Each input that can be unknown has a channel that is 1
        where it is known; where it is not, all channels of the input are 0.
    """
    if context is None or num_features(names) == 0:
        return torch.zeros((*sample.shape, num_features(names)), device=sample.device)
    channels = []
    for name in names:
        if name in _LOGS:
            channels += _logs(context, _LOGS[name])
        elif name == "given":
            channels.append(~context.generated)
        elif name == "age":
            channels += _age(context)
        elif name == "remasks":
            channels.append(context.num_remasked.float().log1p())
        elif name == "fill":
            channels.append(_share_masked(context, sample == mask_token_id))
    return torch.stack([channel.float() for channel in channels], dim=-1)


def _logs(context: RunContext, fields: tuple[str, ...]) -> list[Tensor]:
    """Is the input known, and its values; an entropy counts with a minus, so that all of them are at most 0."""
    read = [getattr(context, field) for field in fields]
    if read[0] is None:
        return [torch.zeros_like(context.draw_logprob)] * (1 + len(fields))
    values = torch.stack([-v if field == "first_entropy" else v for field, v in zip(fields, read, strict=True)])
    return [~values[0].isnan(), *values.clamp(min=LOG_FLOOR).mul(0.1).nan_to_num(0.0)]


def _age(context: RunContext) -> list[Tensor]:
    """Is the age known, is the token of the last forward pass, and how old is it, on a logarithmic scale."""
    known = context.written_at >= 0
    age = (context.now[:, None] - context.written_at) * known
    return [known, age == 1, age.float().log1p() / 3]


def _share_masked(context: RunContext, masked: Tensor) -> Tensor:
    """The share of the generated positions of each row that are masks, at each of its positions."""
    share = (context.generated & masked).sum(-1) / context.generated.sum(-1).clamp(min=1)
    return share[:, None].expand(masked.shape)


def forget(context: RunContext, rows: Tensor) -> RunContext:
    """The context of some rows as if they were finished texts that nobody watched being written.

    A head must judge such texts too, so it is trained on some of them. log p(y_i | y) stays, since one forward pass on
    the text gives it; its mean and minimum are then itself.

    Args:
        context: of all rows.
        rows: which rows are to be forgotten, bool (B,).
    """
    some = rows[:, None]
    seen_once = {}
    if context.own_logprob is not None:
        own = context.own_logprob
        seen_once = {name: torch.where(some, own, getattr(context, name)) for name in ("own_mean", "own_min")}
    if context.first_hidden is not None:
        seen_once["first_hidden"] = context.first_hidden.masked_fill(some[..., None], 0)
    unknown = ("draw_logprob", "prompt_logprob", "first_max", "first_entropy")
    return replace(
        context,
        generated=context.generated | some,
        now=context.now.masked_fill(rows, 0),
        written_at=context.written_at.masked_fill(some, -1),
        num_remasked=context.num_remasked.masked_fill(some, 0),
        **{name: getattr(context, name).masked_fill(some, torch.nan) for name in unknown},
        **seen_once,
    )


def token_logprob(context: RunContext | None, name: str, sample: Tensor, kind: str) -> Tensor:
    """A log-probability that a run context holds for every visible token, NaN where it is unknown.

    Args:
        context: of the run.
        name: "prompt_logprob" or "draw_logprob".
        sample: token ids, int64 (B, L).
        kind: class of the scheduler that asks, for the error.
    Returns:
        float32 of shape (B, L).
    Raises:
        ValueError: no context, or one of another shape.
    """
    if context is None:
        raise ValueError(
            f"{kind} needs `context`, a RunContext with `{name}`, and got None. PrismPipeline passes it to every step; "
            "diffusers' LLaDA2Pipeline cannot, use SelfConfidenceScheduler there."
        )
    value = getattr(context, name)
    if value.shape != sample.shape:
        raise ValueError(
            f"`context.{name}` must have the shape of `sample`, {tuple(sample.shape)}, got {tuple(value.shape)}."
        )
    return value
