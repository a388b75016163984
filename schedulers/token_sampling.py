"""Drawing tokens from logits, and filling masks with them.

What drawing means, for logits (N, V) with the mask token at -inf and uniform numbers u (N,):

    p     = softmax(logits)                     the model's own probabilities, from which confidence is taken
    mass  = softmax(logits / temperature)       then 0 outside the top_k tokens, then 0 outside the nucleus of top_p
    token = the first v with mass[0] + ... + mass[v] > u * sum(mass); after truncation the most likely v come first
    prob  = p[token]

`sample_tokens` computes this. The rest of this file makes it fast: no sort of the vocabulary, short sums in float32,
bounded memory, logits only where they are needed, and one wait for the device in a step.

Plain functions on whole batches. B rows, L positions, V tokens; N positions taken out of (B, L) in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .functional import Generators, uniform

# The most logits that are processed at once: 64 MB of float32. Further rows wait, so memory does not grow with them.
CHUNK = 2**24
# Tokens among which a nucleus is looked for before the whole vocabulary is sorted.
NUCLEUS = 512


class Logits(Protocol):
    """Logits (B, L, V), or any object that gives rows (N, V) when it is indexed by a bool (B, L) mask.

    If the object has a method `at(row, column)`, that is called instead, for some of the positions at a time.
    """

    def __getitem__(self, positions: Tensor, /) -> Tensor:
        """Logits (N, V) where `positions`, bool (B, L), is true."""
        ...


class Sampling(NamedTuple):
    """How tokens are drawn, see `sample_tokens`."""

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None


# --- drawing a token --------------------------------------------------------------------------------------------------


def sample_tokens(
    logits: Tensor,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    u: Tensor | None = None,
    *,
    mask_token_id: int | None = None,
    generator: Generators = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution, in float32.

    Example:
        >>> logits, u = torch.randn(50, 9), torch.rand(50, 1)
        >>> mass, ids = (logits / 0.7).softmax(-1).topk(3)
        >>> first = (mass.cumsum(-1) > u * mass.sum(-1, keepdim=True)).int().argmax(-1, keepdim=True)
        >>> tokens, probs = sample_tokens(logits, temperature=0.7, top_k=3, u=u[:, 0])
        >>> torch.equal(tokens, ids.gather(-1, first)[:, 0])
        True

    Truncation follows the habit of transformers and diffusers: temperature first, then top_k, then top_p on what is
    left. A token of probability zero is never drawn.

    Args:
        logits: (N, V), any float type, finite or -inf, with at least one token possible in each row.
        temperature: >= 0; 0 takes the most likely token (the first of equals).
        top_p: keep the smallest set of most likely tokens that holds this much, in (0, 1]; None for all.
        top_k: keep this many of the most likely tokens, >= 1; None, or more than V, for all. Which of several equally
            likely tokens is kept at the edge is not defined.
        u: uniform numbers in [0, 1), float32 of shape (N,): row i's token depends on logits[i] and u[i] alone.
            None draws them from `generator`.
        mask_token_id: a token that must not be drawn; it counts as probability zero throughout.
    Returns:
        tokens, int64 of shape (N,), and their probabilities, float32 of shape (N,). These are the model's own, at
        temperature 1 and before truncation, so that confidence does not depend on the sampling settings.
    Raises:
        RuntimeError: a row has a NaN, +inf, or no possible token. Reported without waiting for the device, as in
            torch.multinomial.
    """
    if u is None and temperature > 0:
        u = uniform(logits.shape[:1], generator, logits.device)
    u = torch.zeros(len(logits), device=logits.device) if u is None else u
    parts = zip(logits.split(chunk_rows(logits.shape[-1])), u.split(chunk_rows(logits.shape[-1])), strict=True)
    sampling = Sampling(temperature, top_p, top_k)
    drawn = [_sample(suppress(part, mask_token_id), sampling, some, None) for part, some in parts]
    tokens, probs, _ = (torch.cat(part) for part in zip(*drawn, strict=True))
    return tokens, probs


def chunk_rows(vocab_size: int) -> int:
    """How many rows of `vocab_size` logits are processed at once; at least 1."""
    return max(1, CHUNK // max(1, vocab_size))


def _sample(
    logits: Tensor,
    sampling: Sampling,
    u: Tensor,
    order: str | None,
    drawn_from: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sample_tokens` for one chunk, and the `order_score` of its rows; with order None that is the probability.

    `drawn_from`: other logits (N, V) that the tokens are drawn from; probabilities and scores stay those of `logits`.
    """
    temperature, top_p, top_k = sampling
    p = probabilities(logits)  # (N, V)
    wanted = logits if drawn_from is None else drawn_from
    if temperature == 0:
        tokens = first_largest(wanted)
    elif top_k is not None and top_k < logits.shape[-1]:
        best, ids = wanted.topk(top_k)
        mass = at_temperature(best, temperature).softmax(-1)
        mass = mass if top_p is None or top_p == 1 else mass.masked_fill(_surplus(mass, mass.sum(-1), top_p), 0)
        tokens = ids.gather(-1, invert(mass, u)[:, None])[:, 0]
    else:
        mass = p if temperature == 1 and drawn_from is None else at_temperature(wanted, temperature).softmax(-1)
        tokens = invert(mass, u) if top_p is None or top_p == 1 else _draw_from_nucleus(wanted, mass, u, top_p)
    probs = p.gather(-1, tokens[:, None])[:, 0]
    # A NaN, a +inf, or a maximum of -inf makes the whole row of a softmax NaN.
    fine = ~probs.isnan().any()
    torch._assert_async(fine, "The logits hold a NaN, +inf, or a row in which no token is possible.")
    return tokens, probs, probs if order is None else order_score(p, tokens, order)


def probabilities(logits: Tensor) -> Tensor:
    """softmax of `logits` (N, V), in float32, that adds up to 1 within 1e-6.

    torch's softmax reads the logits once, where log-sum-exp and exp read them four times. But it adds one number after
    the other, so for 126,000 tokens its result adds up to 1 within 2e-5 only. Here that result is divided by its sum,
    which is added in pairs.
    """
    p = logits.softmax(-1, dtype=torch.float32)
    return p.div_(p.sum(-1, keepdim=True))


def suppress(logits: Tensor, token_id: int | None) -> Tensor:
    """`logits` (N, V) with token `token_id` at -inf; unchanged if `token_id` is None or has no logit."""
    if token_id is None or token_id >= logits.shape[-1]:
        return logits
    logits = logits.clone()
    logits[:, token_id] = -torch.inf
    return logits


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """`logits` (N, V), less each row's maximum, divided by a temperature > 0, in float32; 1e-30 does not overflow."""
    logits = logits.float()
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)


# --- the nucleus, without sorting the vocabulary ----------------------------------------------------------------------


def _draw_from_nucleus(logits: Tensor, mass: Tensor, u: Tensor, top_p: float) -> Tensor:
    """Tokens (N,) from the smallest set of most likely tokens of each row that holds `top_p` of its `mass` (N, V).

    Equal logits rank by id. Sorting a large vocabulary takes longer than a small model's forward, so the set is looked
    for among the `NUCLEUS` first tokens; rows whose set reaches further (one look back from the device) are sorted.
    """
    total = mass.sum(-1)
    if logits.shape[-1] <= 4 * NUCLEUS:
        return _draw_ranked(mass, logits.sort(descending=True, stable=True).indices, total, u, top_p)[0]
    ids = logits.topk(NUCLEUS).indices.sort().values
    best, rank = logits.gather(-1, ids).sort(descending=True, stable=True)
    tokens, surplus = _draw_ranked(mass, ids.gather(-1, rank), total, u, top_p)
    # Which of the tokens equal to the last one are among these is the choice of `topk`: none of them may count.
    reaches_further = ~(surplus | (best > best[:, -1:])).all(-1)
    rest = reaches_further.nonzero()[:, 0]
    if len(rest):
        ids = logits[rest].sort(descending=True, stable=True).indices
        tokens[rest] = _draw_ranked(mass[rest], ids, total[rest], u[rest], top_p)[0]
    return tokens


def _draw_ranked(mass: Tensor, ids: Tensor, total: Tensor, u: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens (N,) from a nucleus within `ids` (N, K), the most likely first; and which of these lie outside it."""
    mass = mass.gather(-1, ids)
    surplus = _surplus(mass, total, top_p)
    return ids.gather(-1, invert(mass.masked_fill(surplus, 0), u)[:, None])[:, 0], surplus


def _surplus(mass: Tensor, total: Tensor, top_p: float) -> Tensor:
    """Which tokens of `mass` (N, K), sorted, lie outside the smallest set that holds `top_p` of `total` (N,)."""
    before = mass.cumsum(-1) - mass  # what the more likely tokens hold
    surplus = before >= top_p * total[:, None]
    surplus[:, :1] = False  # the most likely token stays, however small top_p
    return surplus


# --- the first largest and the inverse of a cumulative sum, block by block --------------------------------------------


def first_largest(values: Tensor) -> Tensor:
    """`values.argmax(-1)` of (N, V), the first of equals, by way of `amax`: on a CPU ten times as fast as `argmax`."""
    block, size = _blocks(values, torch.Tensor.amax).argmax(-1), _block_size(values)
    return block * size + _inside(values, block, size, -torch.inf).argmax(-1)


def invert(mass: Tensor, u: Tensor) -> Tensor:
    """First indices (N,) at which the cumulative sum of `mass` (N, V), float32, exceeds u (N,) times its total.

    A block of tokens is found first, then the token in that block. So two short sums replace one over V, and rounding
    errors stay small.
    """
    size = _block_size(mass)
    block, rest = _invert(_blocks(mass, torch.Tensor.sum), u)
    return block * size + _invert(_inside(mass, block, size, 0), rest)[0]


def _block_size(values: Tensor) -> int:
    return math.isqrt(values.shape[-1] - 1) + 1


def _blocks(values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """`reduce` over each block of the last dimension of (N, V), (N, number of blocks); the last may be shorter."""
    size = _block_size(values)
    whole = values.shape[-1] // size * size
    parts = [reduce(values[:, :whole].unflatten(-1, (-1, size)), -1)]
    if whole < values.shape[-1]:
        parts.append(reduce(values[:, whole:], -1, keepdim=True))
    return torch.cat(parts, -1)


def _inside(values: Tensor, block: Tensor, size: int, beyond: float) -> Tensor:
    """One block of each row, (N, size); `beyond` past the end of the row."""
    index = block[:, None] * size + torch.arange(size, device=values.device)
    last = values.shape[-1] - 1
    return values.gather(-1, index.clamp(max=last)).masked_fill(index > last, beyond)


def _invert(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """First index at which the cumulative mass exceeds u * total, and how far into that index's mass u lies.

    Given the index, that second number is uniform in [0, 1] again. An index without mass is never returned, whatever
    rounding does to the sums: its cumulative mass counts as 0, and u * total stays below the largest.

    Args:
        mass: float32 of shape (N, K), >= 0, some above 0 in each row.
        u: float32 of shape (N,), in [0, 1].
    Returns:
        int64 and float32 of shape (N,).
    """
    cumulative = mass.cumsum(-1).masked_fill(mass == 0, 0)
    total = cumulative.amax(-1)
    target = torch.minimum(u * total, total.nextafter(torch.zeros_like(total)))[:, None]
    index = (cumulative > target).to(torch.uint8).argmax(-1, keepdim=True)  # the first of equals
    end, width = cumulative.gather(-1, index), mass.gather(-1, index)
    return index[:, 0], (1 - (end - target) / width).clamp(0, 1)[:, 0]


# --- which of the drawn tokens to write -------------------------------------------------------------------------------


def order_score(p: Tensor, tokens: Tensor, order: str) -> Tensor:
    """The score by which an order of decoding ranks each row's token; the highest is written first.

    "confidence": p(token), "margin": p(first) - p(second), "entropy": minus the entropy in nats; all at temperature 1.

    Args:
        p: the model's probabilities at temperature 1, float32 of shape (N, V).
        tokens: int64 of shape (N,); only "confidence" reads them.
        order: one of the three.
    Returns:
        float32 of shape (N,).
    Source: LLaDA (arXiv 2502.09992) for confidence, Kim et al. (arXiv 2502.06768) for margin, Dream (arXiv 2508.15487)
        for entropy.
    """
    if order == "confidence":
        return p.gather(-1, tokens[:, None])[:, 0]
    if order == "margin":
        best = p.topk(min(2, p.shape[-1])).values
        return best[:, 0] - best[:, 1:].sum(-1)  # no second token if V = 1
    return -torch.special.entr(p).sum(-1)  # entr(0) = 0


# --- filling masks ----------------------------------------------------------------------------------------------------


def true_positions(mask: Tensor, count: int) -> tuple[Tensor, ...]:
    """`mask.nonzero(as_tuple=True)` for a mask of any shape that has `count` true elements.

    Because `count` is known, this does not wait for the device. `nonzero` and indexing by a mask do.
    """
    flat = mask.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:count]
    return torch.unravel_index(flat, mask.shape)


def logit_chunks(
    model_output: Logits, positions: Tensor, index: tuple[Tensor, ...], mask_token_id: int
) -> Iterator[Tensor]:
    """Logits (n, V) at some positions, at most `CHUNK` numbers at a time, with the mask token at -inf.

    Args:
        model_output: see `Logits`.
        positions: bool of shape (B, L), N of them true.
        index: the same as rows and columns, int64 of shape (N,) each, in row-major order.
        mask_token_id: the mask token.
    """
    source: Any = model_output
    chunks: Iterable[Tensor]
    if isinstance(source, Tensor) or hasattr(source, "at"):
        read = source.at if hasattr(source, "at") else lambda row, column: source[row, column]
        size = chunk_rows(source.shape[-1])
        chunks = (read(*part) for part in zip(*(which.split(size) for which in index), strict=True))
    else:
        logits = source[positions]
        chunks = logits.split(chunk_rows(logits.shape[-1]))
    # `LazyLogits` hold the mask token at -inf already, which saves a copy of them.
    without = None if getattr(model_output, "mask_token_id", None) == mask_token_id else mask_token_id
    for chunk in chunks:
        yield suppress(chunk, without)


def draw_at(
    model_output: Logits,
    positions: Tensor,
    index: tuple[Tensor, ...],
    sampling: Sampling,
    mask_token_id: int,
    u: Tensor,
    order: str | None = None,
    penalty: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token at each of some positions.

    Args:
        model_output, positions, index, mask_token_id: as `logit_chunks`.
        sampling: temperature, top_p and top_k, as `sample_tokens`.
        u: uniform numbers, float32 of shape (B, L).
        order: "confidence", "margin" or "entropy", see `order_score`; None for no score.
        penalty: a token of each position, int64 (B, L), and the amount by which its logit is lowered when tokens are
            drawn, float32 (B, L). Probabilities and scores are without the penalty. None for no penalty.
    Returns:
        tokens, int64 (N,), their probabilities as `sample_tokens`, float32 (N,), and the score, float32 (N,).
    """
    drawn, done, u = [], 0, u[index]
    for logits in logit_chunks(model_output, positions, index, mask_token_id):
        drawn_from = None
        if penalty is not None:
            token, amount = (values[index][done : done + len(logits), None] for values in penalty)
            drawn_from = logits.float().scatter_add(-1, token, -amount.float())
        drawn.append(_sample(logits, sampling, u[done : done + len(logits)], order, drawn_from))
        done += len(logits)
    tokens, probs, score = (torch.cat(part) for part in zip(*drawn, strict=True))
    return tokens, probs, score


def probability_at(model_output: Logits, positions: Tensor, tokens: Tensor, mask_token_id: int) -> Tensor:
    """The model's own probability, at temperature 1, of the tokens that stand at some positions.

    Args:
        model_output, positions, mask_token_id: as `logit_chunks`.
        tokens: int64 of shape (B, L); others than at `positions` are not read.
    Returns:
        float32 of shape (B, L); 0 outside `positions`, and for tokens whose logit is -inf.
    """
    index = positions.nonzero(as_tuple=True)
    probs, done, tokens = [], 0, tokens[index].long()
    for logits in logit_chunks(model_output, positions, index, mask_token_id):
        probs.append(probabilities(logits).gather(-1, tokens[done : done + len(logits), None])[:, 0])
        done += len(logits)
    # The softmax of a row in which nothing is possible is NaN.
    return torch.zeros(positions.shape, device=positions.device).index_put(index, torch.cat(probs).nan_to_num(0))


# --- seeds ------------------------------------------------------------------------------------------------------------


def seeded_generators(seed: int, rows: Iterable[int]) -> list[torch.Generator]:
    """A CPU generator for each row, seeded by `seed` and the row's number alone, not by its batch.

    torch's CPU generator reads the low 32 bits of its seed: 2^32 / 1,000,003 seeds apart stay distinct.
    """
    return [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**32) for row in rows]
