"""What a run knows about its canvas besides the token ids, and the numbers that a quality head reads of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INPUTS = ("given", "prompt", "first_hidden", "draw", "age", "remasks", "fill", "own")
# Log-probabilities below this say no more: the token is wrong.
LOG_FLOOR = -20.0


@dataclass(frozen=True)
class RunContext:
    """What the run that writes a canvas knows about each of its tokens.

    All tensors have shape (B, L) unless said otherwise. NaN means unknown. That is the state of a given token, of a
    mask where the value belongs to a token, of a token that a callback wrote, and of all tokens of a finished text
    that nobody watched being written.

    Args:
        generated: positions that the run may write, bool.
        now: number of the present forward pass, counted from 0 over the whole run.
        written_at: the forward pass that drew the visible token, int64; -1 where none did.
        num_remasked: how often the position was masked again, int64.
        draw_logprob: log-probability of the visible token when it was drawn, float32: the model's own, at temperature
            1 and before truncation.
        prompt_logprob: log p(y_i | the canvas before anything was written), float32, from the first forward pass of
            the run, or of the block where the run has blocks.
        first_max: largest log-probability at the position in that first forward pass, float32.
        first_entropy: entropy there, in nats, float32.
        first_hidden: hidden state that predicted the position there, (B, L, H) in the model's dtype; None if nothing
            reads it.
        own_logprob: log p(y_i | y) of the visible token in the present forward pass, float32; None if nothing reads it.
        own_mean, own_min: mean and minimum of it over the forward passes since the token was written, float32 or None.
    """

    generated: Tensor
    now: int
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


def num_features(names: tuple[str, ...]) -> int:
    """Channels that `context_features` gives for these inputs; "first_hidden" has none, a head reads it by itself."""
    return sum(
        {"given": 1, "prompt": 4, "draw": 2, "age": 3, "remasks": 1, "fill": 1, "own": 4}.get(n, 0) for n in names
    )


def context_features(context: RunContext | None, sample: Tensor, mask_token_id: int, names: tuple[str, ...]) -> Tensor:
    """The inputs of a quality head that a run context gives, each about in [-2, 2].

    Args:
        context: None for a text that nobody watched being written: everything is unknown, nothing is given.
        sample: token ids, int64 (B, L).
        mask_token_id: id of the mask.
        names: which of `INPUTS`, in the order of the channels.
    Returns:
        float32 of shape (B, L, `num_features(names)`), finite. Each input that can be unknown has a channel that is 1
        where it is known; where it is not, all channels of the input are 0.
    """
    known_nothing = torch.full(sample.shape, torch.nan, device=sample.device)
    visible = sample != mask_token_id

    def of(name: str) -> Tensor:
        value = getattr(context, name, None)
        return known_nothing if value is None else value.float()

    def logs(*values: Tensor) -> list[Tensor]:
        known = ~torch.stack(values).isnan().any(0)
        return [known.float(), *((0.1 * v.clamp(min=LOG_FLOOR)).where(known, 0.0) for v in values)]

    channels = []
    for name in names:
        if name == "given":
            channels.append(torch.zeros_like(known_nothing) if context is None else (~context.generated).float())
        elif name == "prompt":
            first = logs(of("first_max"), of("first_entropy").neg())
            channels += [*logs(of("prompt_logprob").where(visible, torch.nan))[1:], *first]
        elif name == "draw":
            channels += logs(of("draw_logprob"))
        elif name == "age":
            channels += _age(context, sample)
        elif name == "remasks":
            count = torch.zeros_like(known_nothing) if context is None else context.num_remasked.float()
            channels.append(count.log1p())
        elif name == "fill":
            channels.append(_share_visible(context, visible))
        elif name == "own":
            channels += logs(of("own_logprob"), of("own_mean"), of("own_min"))
    if not channels:
        return known_nothing.new_zeros((*sample.shape, 0))
    return torch.stack(channels, dim=-1)


def _age(context: RunContext | None, sample: Tensor) -> list[Tensor]:
    """Is the age known, is the token of the last forward pass, and how old is it, on a logarithmic scale."""
    if context is None:
        return [torch.zeros(sample.shape, device=sample.device) for _ in range(3)]
    known = context.written_at >= 0
    age = (context.now - context.written_at).where(known, 0)
    return [known.float(), (known & (age == 1)).float(), age.float().log1p() / 3]


def _share_visible(context: RunContext | None, visible: Tensor) -> Tensor:
    """The share of the generated positions of each row that are visible, at each of its positions."""
    if context is None:
        return torch.ones(visible.shape, device=visible.device)
    generated = context.generated
    share = (generated & visible).sum(-1) / generated.sum(-1).clamp(min=1)
    return share[:, None].expand(visible.shape)


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
