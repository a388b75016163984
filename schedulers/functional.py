"""The parts that schedulers and losses are made of: random numbers, corruption, counts, choosing positions.

Plain functions on whole batches. B rows, L positions, V tokens; N positions taken out of (B, L) in row-major order.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

Device = torch.device | str | None
Generators = torch.Generator | list[torch.Generator] | None  # one, or one for each row, or torch's default one
Number = TypeVar("Number", float, Tensor)
ORDERS = ("random", "confidence", "margin", "entropy", "left_to_right")


# --- random numbers ---------------------------------------------------------------------------------------------------


def uniform(
    shape: tuple[int, ...],
    generator: Generators = None,
    device: Device = None,
) -> Tensor:
    """Independent uniform numbers in [0, 1), drawn where the generator lives and then moved.

    Args:
        shape: of the result; with a list of generators, shape[0] is its length.
        generator: None for torch's default one; a list draws row b from generator b alone.
        device: of the result; None for the CPU. A CPU generator thus gives the same numbers for every device.
    Returns:
        float32 of shape `shape`.
    Raises:
        ValueError: a list whose length is not shape[0], or of generators on several devices.
        TypeError: a list that holds something else.
    """
    if isinstance(generator, (list, tuple)):
        _check_one_per_row(generator, shape[0])
        rows = [uniform(tuple(shape[1:]), one, one.device) for one in generator]
        return _moved(torch.stack(rows), device) if rows else torch.zeros(shape, device=device)
    drawn_on = device if generator is None else generator.device
    return _moved(torch.rand(shape, generator=generator, device=drawn_on), device)


def _moved(drawn: Tensor, device: Device) -> Tensor:
    # To a GPU without waiting for it: the driver takes a copy of ordinary memory before it returns.
    return drawn.to(device or "cpu", non_blocking=drawn.device.type == "cpu")


def uniform_at(positions: Tensor, draws: int, generator: Generators = None) -> Tensor:
    """Uniform numbers in [0, 1) for some positions of a batch.

    With a list of generators each row takes from its own exactly `draws` times its number of positions. So neither
    its neighbours nor its padding, whose width the neighbours decide, change what it gets.

    Args:
        positions: bool of shape (B, L).
        draws: how many numbers for each position.
        generator: one, a list of one per row, or None for torch's default one.
    Returns:
        float32 of shape (draws, B, L); what it holds outside `positions` means nothing.
    Raises:
        ValueError: a list whose length is not B, or of generators on several devices.
        TypeError: a list that holds something else.
    """
    if isinstance(generator, torch.Generator) and len(positions) == 1:
        generator = [generator]  # one row draws the same from a generator and from a list of it
    if not isinstance(generator, (list, tuple)):
        return uniform((draws, *positions.shape), generator, positions.device)
    _check_one_per_row(generator, positions.shape[0])
    counts = positions.sum(-1).tolist()
    rows = [uniform((draws, n), one, one.device) for n, one in zip(counts, generator, strict=True)]
    blank = torch.zeros((draws, *positions.shape), device=positions.device)
    return blank.masked_scatter(positions, _moved(torch.cat(rows, dim=-1), positions.device)) if rows else blank


def _check_one_per_row(generators: list, rows: int) -> None:
    if len(generators) != rows:
        raise ValueError(f"`generator` is a list of {len(generators)}, but there are {rows} rows. Pass one for each.")
    if wrong := [one for one in generators if not isinstance(one, torch.Generator)]:
        raise TypeError(f"`generator` must be a list of torch.Generator, got {wrong[0]!r:.80} in it.")
    if len(devices := {str(one.device) for one in generators}) > 1:
        raise ValueError(f"`generator` must be a list on one device, got {sorted(devices)}.")


def binomial(trials: Tensor, p: Tensor, u: Tensor) -> Tensor:
    """How many of each row's trials succeed: Binomial(number of trials, p), from uniform numbers.

    torch's own Binomial takes no generator.

    Args:
        trials: bool of shape (B, L), one trial at each true position.
        p: chance of success in each row, float of shape (B,).
        u: independent uniform numbers in [0, 1), float of shape (B, L).
    Returns:
        int64 of shape (B,). With p = 0 none succeeds, with p = 1 all do.
    """
    return (trials & (u < p[:, None])).sum(-1)


def mask_tokens(
    input_ids: Tensor,
    rate: Tensor,
    mask_token_id: int,
    trainable: Tensor | None = None,
    generator: Generators = None,
) -> tuple[Tensor, Tensor]:
    """The forward process of masked diffusion: each trainable token is masked with probability `rate` of its row.

    Tokens are masked independently, so a row may get no mask at all. With rate 1 every trainable token is masked, with
    rate 0 none. Others never change.

    Args:
        input_ids: clean tokens, integers of shape (B, L).
        rate: float of shape (B,), in [0, 1].
        mask_token_id: written over the masked tokens.
        trainable: bool of shape (B, L), tokens that may be masked; None for all.
        generator: one, a list of one per row, or None for torch's default one.
    Returns:
        the corrupted tokens (B, L), and which of them were masked, bool (B, L).
    Source: the forward process of LLaDA (arXiv 2502.09992).
    """
    masked = uniform(input_ids.shape, generator, input_ids.device) < rate[:, None]
    masked = masked if trainable is None else masked & trainable
    return input_ids.masked_fill(masked, mask_token_id), masked


# --- how many ---------------------------------------------------------------------------------------------------------


def visible_target(step: int, num_steps: int, num_generated: Tensor) -> Tensor:
    """How many generated tokens are visible after `step`: ceil(M * (step + 1) / T).

    Args:
        step: 0-based, in [0, num_steps).
        num_steps: T, forward passes (NFE), not seconds. T > M is legal; some steps then reveal nothing.
        num_generated: M of each row, int64 of shape (B,); rows may differ.
    Returns:
        int64 of shape (B,); equal to M at the last step, so no mask is left.
    Raises:
        ValueError: `step` is outside the schedule.
    Source: the static schedule of PRISM (arXiv 2510.01384, sampling algorithm).
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"`step` must be in [0, {num_steps}), got {step}.")
    return (num_generated * (step + 1) + num_steps - 1) // num_steps  # integers: no float rounding


def share_of(count: Tensor, share: float) -> Tensor:
    """A share of a count, rounded down.

    Args:
        count: int64 of any shape.
        share: in [0, 1].
    Returns:
        int64 of the same shape.
    """
    exact = Fraction(share).limit_denominator(10**6)  # as floats, 0.21 of 300 is 62
    return count * exact.numerator // exact.denominator


def remdm_cap(alpha_t: Number, alpha_s: Number, eta: float) -> Number:
    """Remasking probability of a visible token: sigma = min(eta, (1 - alpha_s) / alpha_t).

    Args:
        alpha_t: fraction visible before the step, in [0, 1]: float, or a tensor of any shape.
        alpha_s: fraction visible after it, alpha_t <= alpha_s <= 1, of the same kind.
        eta: the cap, in [0, 1].
    Returns:
        sigma, of the same kind and shape; some value of at most eta where alpha_t is 0 and nothing is visible.
    Source: the "cap" schedule of ReMDM (arXiv 2503.00307).
    """
    if isinstance(alpha_t, Tensor):
        return ((1 - alpha_s) / alpha_t.clamp(min=1e-12)).clamp(max=eta)
    return min(eta, (1 - alpha_s) / max(alpha_t, 1e-12))


def remdm_rescale(alpha_t: Number, alpha_s: Number, eta: float) -> Number:
    """Remasking probability of a visible token: sigma = eta * min(1, (1 - alpha_s) / alpha_t).

    Args:
        alpha_t, alpha_s: as `remdm_cap`.
        eta: the share of the largest possible sigma, in [0, 1].
    Returns:
        sigma, of the same kind and shape as the alphas.
    Source: the "rescale" schedule of ReMDM (arXiv 2503.00307).
    """
    return eta * remdm_cap(alpha_t, alpha_s, 1.0)


def remdm_confidence(sigma_max: float, confidence: Tensor) -> Tensor:
    """Remasking probability of each token: sigma_max * softmax(-confidence) over the row.

    Args:
        sigma_max: min(1, (1 - alpha_s) / alpha_t), in [0, 1].
        confidence: probability with which each visible token was drawn, float of shape (B, L); +inf for positions
            that must not be remasked, such as masks.
    Returns:
        float of shape (B, L); 0 where `confidence` is +inf.
    Source: the "conf" schedule of ReMDM (arXiv 2503.00307).
    """
    return sigma_max * (-confidence).softmax(-1).nan_to_num(0)  # a row of +inf alone gives NaN: nothing to remask


def unmask_probability(alpha_t: Number, alpha_s: Number, sigma: Number) -> Number:
    """Chance that a mask is filled in a step: (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t).

    With it alpha_s is visible after the step although sigma of the visible tokens are remasked; sigma = 0 gives
    ancestral sampling of plain masked diffusion.

    Args:
        alpha_t: fraction visible before the step, in [0, 1): float, or a tensor of any shape.
        alpha_s: fraction visible after it, alpha_t <= alpha_s <= 1, of the same kind.
        sigma: remasking probability, as from `remdm_cap`, of the same kind.
    Returns:
        a probability, of the same kind and shape.
    Source: the reverse posterior of ReMDM (arXiv 2503.00307).
    """
    return (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)


# --- which positions --------------------------------------------------------------------------------------------------


def lowest(score: Tensor, allowed: Tensor, n: Tensor | int) -> Tensor:
    """The n positions of lowest score in each row, among those allowed.

    Ties go to the left. NaN counts as larger than any number.

    Args:
        score: float of shape (B, L).
        allowed: bool of shape (B, L).
        n: int64 of shape (B,), or one number for all rows. More than are allowed gives all of them, below 1 gives none.
    Returns:
        bool of shape (B, L).
    """
    order = score.argsort(dim=-1, stable=True)
    candidate = allowed.gather(-1, order)
    n = n[:, None] if isinstance(n, Tensor) else n
    taken = candidate & (candidate.cumsum(-1) <= n)
    return torch.zeros_like(allowed).scatter(-1, order, taken)


def highest(score: Tensor, allowed: Tensor, n: Tensor | int) -> Tensor:
    """As `lowest`, for the n highest scores. Ties go to the left. NaN counts as lower than any number."""
    return lowest(-score, allowed, n)


def choose(allowed: Tensor, n: Tensor | int, generator: Generators = None) -> Tensor:
    """n allowed positions of each row, every set of n equally likely.

    Args:
        allowed, n: as `lowest`.
        generator: one, a list of one per row, or None for torch's default one.
    Returns:
        bool of shape (B, L).
    """
    return lowest(uniform(allowed.shape, generator, allowed.device), allowed, n)
