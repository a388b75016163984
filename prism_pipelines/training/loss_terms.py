"""Parts of the losses: masking rates, positions in chunks, and divisors with which several processes add up exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from ..schedulers.functional import uniform


def mask_rates(
    batch: int, low: float, high: float, generator: torch.Generator | None = None, device: torch.device | None = None
) -> Tensor:
    """Masking rate t of each row. Each t is uniform in (low, high], and together they are evenly spread.

    Args:
        batch: B. Row b gets `high - (high - low) * frac(u + b / B)`, with one uniform u for all rows. So the order of
            rows does not matter, and each B-th of the range holds exactly one t.
        low, high: bounds of t.
        generator: `torch.Generator` or None.
        device: of the result.
    Returns:
        float32 of shape (B,).
    Source: the low-discrepancy sampler of Variational Diffusion Models (arXiv 2107.00630).
    """
    ladder = torch.arange(batch, device=device) / batch
    return high - (high - low) * ((uniform((1,), generator, device) + ladder) % 1)


def split_positions(positions: Tensor, size: int) -> list[Tensor]:
    """Disjoint masks of at most `size` positions each, in row-major order, that together give `positions`.

    Args:
        positions: bool of shape (B, L).
        size: most positions of one part, at least 1.
    Returns:
        One or more bool masks of shape (B, L); one empty mask if `positions` is empty.
    """
    part = (positions.flatten().cumsum(0) - 1).view_as(positions) // size
    count = max(1, -(-int(positions.sum()) // size))
    return [positions & (part == i) for i in range(count)]


def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of `values` where `chosen` (bool, same shape) is true, detached; 0 where nothing is."""
    return ((values * chosen).sum() / chosen.sum().clamp(min=1)).detach()


def trainable_positions(input_ids: Tensor, trainable_mask: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Where a token may be masked, bool (B, L): where both masks, (B, L) or None, are true."""
    trainable = torch.ones_like(input_ids, dtype=torch.bool)
    for mask in (trainable_mask, attention_mask):
        trainable = trainable if mask is None else trainable & mask.bool()
    return trainable


def share_of_all(count: Tensor, total: Tensor | None = None) -> Tensor:
    """The divisor of a sum over this process's tokens, for which the mean over processes is the mean over all tokens.

    Processes average their gradients, and their numbers of tokens differ. If each divided by its own number, a token of
    a short batch would weigh more. So every process divides by the average number.

    Args:
        count: tokens of this process, a scalar.
        total: the divisor, if the caller knows it because it has counted all batches of the step; or None.
    Returns:
        float32 scalar, above 0: `total` if that is given; in one process or in evaluation `count`, at least 1; else the
        average of `count` over processes.
    """
    if total is not None:
        return total.clamp(min=torch.finfo(torch.float32).tiny)
    count = count.detach().float()
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled():
        count = count.clone()
        torch.distributed.all_reduce(count)
        return count.clamp(min=1) / torch.distributed.get_world_size()
    return count.clamp(min=1)
