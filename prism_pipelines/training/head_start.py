"""Where a head begins: at another head, and at the best linear map of what it reads of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.quality_head import QualityHead
from ..schedulers.context import SCALE, first_channels, num_features

# The squared distance from the first guess counts as much as the loss of so many tokens. So a few hundred tokens change
# the guess where they agree, and keep it elsewhere. It also keeps a map of tokens that are all wrong finite.
GUESS_TOKENS = 5.0
MAX_ITER = 100
NEARLY_ZERO = 0.05


def begin_neutral(head: QualityHead) -> None:
    """Makes a new head with context give nearly the same quality everywhere, until `fit_skip` or training changes it.

    The transformer block begins as the identity. The output layer begins near zero, but not at zero, where nothing
    below it would learn.
    """
    if not head.reads_context:
        return
    with torch.no_grad():
        for layer in (head.block.attention_out, head.block.mlp_out) if head.attends else ():
            layer.weight.zero_(), layer.bias.zero_()
        head.out.weight.mul_(NEARLY_ZERO)
        head.out.bias.zero_()


def begin_from(head: Any, folder: str) -> None:
    """Copies the layers of another head that have the same name and size.

    Raises:
        ValueError: there is no head, it is for hidden states of another size, or no layer fits.
    """
    place = next((p for p in (Path(folder), Path(folder) / "quality_head") if (p / "config.json").is_file()), None)
    if place is None:
        raise ValueError(f"`--head-from` {folder!r} holds no quality head: no config.json in it or its quality_head/.")
    other: Any = QualityHead.from_pretrained(place)
    own, found = head.state_dict(), other.state_dict()
    fitting = {name: value for name, value in found.items() if name in own and own[name].shape == value.shape}
    if other.config.hidden_size != head.config.hidden_size or not fitting:
        raise ValueError(
            f"`--head-from` {folder!r} is a head for hidden states of size {other.config.hidden_size}, architecture "
            f"{other.config.architecture!r}; this one reads {head.config.hidden_size}. None of its layers fits."
        )
    if other.reads_context != head.reads_context:  # the channels would mean other inputs
        fitting = {name: value for name, value in fitting.items() if not name.startswith("context_")}
    head.load_state_dict(own | fitting)


def first_guess(reads: tuple[str, ...], label: str) -> Tensor:
    """A linear map from the context to the logit before anything is learned, float (F,): zeros, or the log-odds now.

    Args:
        reads: inputs of the head.
        label: "posterior" if the head learns p(y_i | rest). The model's probability of y_i now is near it in models
            that were trained on visible tokens too, such as BERT.
    """
    guess = torch.zeros(num_features(reads))
    if label == "posterior" and "own_odds" in reads:
        guess[first_channels(reads)["own_odds"] + 1] = 1 / SCALE
    return guess


def fit_skip(
    head: QualityHead,
    logits: Tensor,
    features: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    guess: Tensor,
) -> None:
    """Sets the map from the context to the logit, and the bias, to those of the lowest loss on some judged tokens.

    Free scores are among the features. So the head begins at a linear combination of them whose loss on these tokens is
    about the lowest there is. It may still order the tokens of a text worse than a single free score.

    Args:
        head: with context; the rest of it stays as it is.
        logits: what it gives now, float (N,).
        features: channels of the context, float (N, F).
        labels: what `loss` compares with, float (N,). Without any token the head stays as it is.
        loss: from logits and labels to the loss of each token, (N,); convex near its minimum.
        guess: the map to begin at, and to stay near where the tokens say little, float (F,), see `first_guess`.
    """
    if not len(labels):
        return
    # In float64, which a GPU may lack: there are few numbers.
    numbers = (logits, features, labels, guess, head.context_skip.weight[0])
    logits, features, labels, guess, before = (values.detach().cpu().double() for values in numbers)
    rest, ridge = logits - features @ before, GUESS_TOKENS / len(labels)
    weight, bias = guess.clone().requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=MAX_ITER, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        distance = (weight - guess).square().sum() + bias.square()
        total = loss(rest + features @ weight + bias, labels).mean() + ridge * distance
        torch.autograd.backward(total)
        return total

    optimizer.step(closure)  # it enables gradients for the closure
    if bool(torch.cat([weight, bias[None]]).isfinite().all()):
        with torch.no_grad():
            head.context_skip.weight.copy_(weight[None])
            head.out.bias.add_(bias.to(head.out.bias))
