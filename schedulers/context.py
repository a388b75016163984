"""The run context: facts about each token of a canvas besides its id, and the numbers that a quality head reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# What a head or a scheduler may read, with the channels that each gives to `context_features`.
INPUTS = {
    "given": 1,
    "prompt": 4,
    "first_hidden": 0,
    "token": 0,
    "draw": 2,
    "age": 3,
    "remasks": 1,
    "fill": 1,
    "own": 4,
    "prompt_odds": 3,
    "draw_odds": 2,
    "own_odds": 2,
}
ODDS = "_odds"  # ending of the inputs that are log-odds of what another input has as log-probabilities
# Log-probabilities below this say no more: the token is wrong.
LOG_FLOOR = -20.0
SCALE = 0.1  # of log-probabilities, entropy and log-odds as channels
# Log-odds above this are rounding errors of a float32 log-probability.
ODDS_CAP = 12.0
# Inputs that are log-probabilities, or an entropy. The first of each tells whether the input is known.
_LOGS = {
    "prompt": ("first_max", "first_entropy", "prompt_logprob"),
    "draw": ("draw_logprob",),
    "own": ("own_logprob", "own_mean", "own_min"),
}
# Log-probabilities that are also read as log-odds: log(p / (1 - p)) tells .99 from .9999, which log p cannot.
_ODDS = {
    "prompt_odds": ("first_max", "prompt_logprob"),
    "draw_odds": ("draw_logprob",),
    "own_odds": ("own_logprob",),
}


@dataclass(frozen=True)
class RunContext:
    """What is known about each token of a canvas while a run writes it.

    All tensors have shape (B, L) unless said otherwise. NaN means unknown. Masks and given tokens have NaN. A token
    that a callback wrote has NaN in `draw_logprob`. A finished text whose sampling was not recorded has NaN everywhere.

    Args:
        generated: positions that the run may write, bool.
        now: number of the present forward pass, counted from 0 over the whole run, int64 (B,). Finished rows take part
            in no further forward pass, so rows may differ.
        written_at: number of the forward pass that drew the visible token, int64; -1 where none did.
        num_remasked: how often the position was remasked, int64.
        draw_logprob: log-probability of the visible token when it was drawn, float32, at temperature 1 and before
            truncation. With guidance, of the guided model.
        prompt_logprob: log p(y_i | the canvas before anything was written), float32. It comes from the first forward
            pass of the run, or of each block.
        first_max: largest log-probability at the position in that first forward pass, float32.
        first_entropy: entropy of the prediction at the position in that first forward pass, nats, float32.
        first_hidden: hidden state from which that first forward pass predicted the position, (B, L, H) in the model's
            dtype; 0 where there is none. None if no head or scheduler reads it.
        token_rows: row of the output head's weight that belongs to the visible token, (B, L, H) in the model's dtype; 0
            at masks. None if no head or scheduler reads it.
        own_logprob: log p(y_i | y) of the visible token in the present forward pass, float32. In a finished block: in
            the last forward pass on that block. None if no head or scheduler reads it.
        own_mean, own_min: mean and minimum of `own_logprob` since the token was written, float32, or None.
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
    token_rows: Tensor | None = None
    own_logprob: Tensor | None = None
    own_mean: Tensor | None = None
    own_min: Tensor | None = None

    @classmethod
    def unwatched(
        cls, generated: Tensor, draw_logprob: Tensor | None = None, prompt_logprob: Tensor | None = None
    ) -> RunContext:
        """The context of finished texts whose sampling was not recorded: all but the arguments, (B, L), is unknown."""
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
    """The names of context inputs, keys of `INPUTS`, as a tuple.

    Raises:
        ValueError: a name is not in `INPUTS`, or occurs twice.
        TypeError: `names` is not a list or tuple of strings.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`context` must be a list of names such as ('given', 'draw'), got {names!r}.")
    if unknown := sorted(set(names) - set(INPUTS)):
        raise ValueError(f"`context` may hold {', '.join(INPUTS)}; got {', '.join(unknown)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"`context` names an input twice: {', '.join(names)}.")
    return tuple(names)


def num_features(names: tuple[str, ...]) -> int:
    """Number of channels that `context_features` gives for some inputs; "first_hidden" and "token" have none."""
    return sum(INPUTS[name] for name in names)


def first_channels(names: tuple[str, ...]) -> dict[str, int]:
    """The number of the first channel of each input in `context_features`, by name."""
    return {name: num_features(names[:i]) for i, name in enumerate(names)}


def context_features(context: RunContext | None, sample: Tensor, mask_token_id: int, names: tuple[str, ...]) -> Tensor:
    """A run context as channels that a quality head reads, each about in [-2, 2].

    Args:
        context: of the run. None if nothing is known: then all channels are 0.
        sample: token ids, int64 (B, L).
        mask_token_id: id of the mask.
        names: which of `INPUTS`, in the order of the channels.
    Returns:
        float32 of shape (B, L, `num_features(names)`), finite. An input that can be unknown begins with a channel that
        is 1 where the input is known. All its channels are 0 elsewhere.
    """
    if context is None or num_features(names) == 0:
        return torch.zeros((*sample.shape, num_features(names)), device=sample.device)
    channels = []
    for name in names:
        if name in _LOGS:
            channels += _known(context, _LOGS[name], _log)
        elif name in _ODDS:
            channels += _known(context, _ODDS[name], _log_odds)
        elif name == "given":
            channels.append(~context.generated)
        elif name == "age":
            channels += _age(context)
        elif name == "remasks":
            channels.append(context.num_remasked.float().log1p())
        elif name == "fill":
            channels.append(_share_masked(context, sample == mask_token_id))
    return torch.stack([channel.float() for channel in channels], dim=-1)


def _known(context: RunContext, fields: tuple[str, ...], scaled: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Is the input known, and its values as channels; 0 where it is unknown.

    Entropy gets a minus sign, so that `scaled` gets values of at most 0.
    """
    read = [getattr(context, field) for field in fields]
    if read[0] is None:
        return [torch.zeros_like(context.draw_logprob)] * (1 + len(fields))
    values = [-v if field == "first_entropy" else v for field, v in zip(fields, read, strict=True)]
    return [~read[0].isnan(), *(scaled(v).mul(SCALE).nan_to_num(0.0) for v in values)]


def _log(values: Tensor) -> Tensor:
    """Log-probabilities down to the floor."""
    return values.clamp(min=LOG_FLOOR)


def _log_odds(values: Tensor) -> Tensor:
    """Log-odds of log-probabilities, of which rounding may leave one above 0."""
    values = values.clamp(max=0)
    return (values - (-values.expm1()).log()).clamp(LOG_FLOOR, ODDS_CAP)


def _age(context: RunContext) -> list[Tensor]:
    """Is the age of the token known, was it drawn in the last forward pass, and its age on a logarithmic scale."""
    known = context.written_at >= 0
    age = (context.now[:, None] - context.written_at) * known
    return [known, age == 1, age.float().log1p() / 3]


def _share_masked(context: RunContext, masked: Tensor) -> Tensor:
    """The share of the generated positions of each row that are masks, at each of its positions."""
    share = (context.generated & masked).sum(-1) / context.generated.sum(-1).clamp(min=1)
    return share[:, None].expand(masked.shape)


def forget(context: RunContext, rows: Tensor) -> RunContext:
    """A context in which some rows are finished texts whose sampling was not recorded.

    A head must judge such texts too, so it is trained on some of them. `token_rows` stays, and so does `own_logprob`,
    because one forward pass on the text gives it; `own_mean` and `own_min` become equal to it. In these rows
    `generated` is true everywhere.

    Args:
        context: of all rows.
        rows: the rows whose records are dropped, bool (B,).
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
    """One log-probability of a run context, checked: float32 (B, L), NaN where it is unknown.

    Args:
        context: of the run.
        name: "prompt_logprob" or "draw_logprob".
        sample: token ids, int64 (B, L).
        kind: class name of the scheduler that reads it, for the error.
    Raises:
        ValueError: `context` is None, or its tensors do not have the shape of `sample`.
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
