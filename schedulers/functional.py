"""The parts that schedulers and losses are made of: random numbers, corruption, choosing positions, drawing tokens.

Plain functions on whole batches. B rows, L positions, V tokens; N positions taken out of (B, L) in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

ORDERS = ("random", "confidence", "margin", "entropy", "left_to_right")


# --- random numbers ---------------------------------------------------------------------------------------------------


def uniform(
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: torch.device | str | None = None,
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


def _moved(drawn: Tensor, device: torch.device | str | None) -> Tensor:
    # To a GPU without waiting for it: the driver takes a copy of ordinary memory before it returns.
    return drawn.to(device or "cpu", non_blocking=drawn.device.type == "cpu")


def uniform_at(
    positions: Tensor, draws: int, generator: torch.Generator | list[torch.Generator] | None = None
) -> Tensor:
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
    generator: torch.Generator | list[torch.Generator] | None = None,
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


def remdm_cap(alpha_t: Tensor | float, alpha_s: Tensor | float, eta: float) -> Tensor | float:
    """Remasking probability of a visible token: sigma = min(eta, (1 - alpha_s) / alpha_t).

    Args:
        alpha_t: fraction visible before the step, in [0, 1]: float, or a tensor of any shape.
        alpha_s: fraction visible after it, alpha_t <= alpha_s <= 1, of the same kind.
        eta: the cap, in [0, 1].
    Returns:
        sigma, of the same kind and shape. Where nothing is visible yet it has no effect, and is at most eta.
    Source: the "cap" schedule of ReMDM (arXiv 2503.00307).
    """
    if isinstance(alpha_t, Tensor):
        return ((1 - alpha_s) / alpha_t.clamp(min=1e-12)).clamp(max=eta)
    return min(eta, (1 - alpha_s) / max(alpha_t, 1e-12))


def remdm_rescale(alpha_t: Tensor | float, alpha_s: Tensor | float, eta: float) -> Tensor | float:
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


def unmask_probability(alpha_t: Tensor | float, alpha_s: Tensor | float, sigma: Tensor | float) -> Tensor | float:
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
    """As `lowest` for the n highest scores. Ties go to the left, and NaN is taken last here too."""
    return lowest(-score, allowed, n)


def choose(
    allowed: Tensor, n: Tensor | int, generator: torch.Generator | list[torch.Generator] | None = None
) -> Tensor:
    """n allowed positions of each row, every set of n equally likely.

    Args:
        allowed, n: as `lowest`.
        generator: one, a list of one per row, or None for torch's default one.
    Returns:
        bool of shape (B, L).
    """
    return lowest(uniform(allowed.shape, generator, allowed.device), allowed, n)


# --- which tokens -----------------------------------------------------------------------------------------------------

# Logits that are worked on at once: 64 MB of float32. More rows go in turn, so memory does not grow with their number.
CHUNK = 2**24
# Tokens among which a nucleus is looked for before the whole vocabulary is sorted.
NUCLEUS = 512


def sample_tokens(
    logits: Tensor,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    u: Tensor | None = None,
    *,
    mask_token_id: int | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution, in float32.

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
        tokens, int64 of shape (N,), and their probabilities, float32 of shape (N,): the model's own, at temperature 1
        and before truncation, since that is what confidence means whatever the sampling settings are.
    Raises:
        RuntimeError: a row has a NaN, +inf, or no possible token. Reported without waiting for the device, as in
            torch.multinomial.
    """
    if u is None and temperature > 0:
        u = uniform(logits.shape[:1], generator, logits.device)
    u = torch.zeros(len(logits), device=logits.device) if u is None else u
    parts = zip(logits.split(chunk_rows(logits.shape[-1])), u.split(chunk_rows(logits.shape[-1])), strict=True)
    drawn = [_sample(suppress(part, mask_token_id), temperature, top_p, top_k, some, None) for part, some in parts]
    tokens, probs, _ = (torch.cat(part) for part in zip(*drawn, strict=True))
    return tokens, probs


def chunk_rows(vocab_size: int) -> int:
    """Rows of that many logits that are worked on at once; at least 1."""
    return max(1, CHUNK // max(1, vocab_size))


def _sample(
    logits: Tensor, temperature: float, top_p: float | None, top_k: int | None, u: Tensor, order: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sample_tokens` for one chunk, and the `order_score` of its rows; with order None that is the probability."""
    p = probabilities(logits)  # (N, V)
    if temperature == 0:
        tokens = first_largest(logits)
    elif top_k is not None and top_k < logits.shape[-1]:
        best, ids = logits.topk(top_k)
        mass = at_temperature(best, temperature).softmax(-1)
        mass = mass if top_p is None or top_p == 1 else mass.masked_fill(_surplus(mass, mass.sum(-1), top_p), 0)
        tokens = ids.gather(-1, invert(mass, u)[:, None])[:, 0]
    else:
        mass = p if temperature == 1 else at_temperature(logits, temperature).softmax(-1)
        tokens = invert(mass, u) if top_p is None or top_p == 1 else _draw_from_nucleus(logits, mass, u, top_p)
    probs = p.gather(-1, tokens[:, None])[:, 0]
    # A NaN, a +inf, or a maximum of -inf makes the whole row of a softmax NaN.
    fine = ~probs.isnan().any()
    torch._assert_async(fine, "The logits hold a NaN, +inf, or a row in which no token is possible.")
    return tokens, probs, probs if order is None else order_score(p, tokens, order)


def probabilities(logits: Tensor) -> Tensor:
    """softmax of `logits` (N, V), in float32, that adds up to 1 within 1e-6.

    torch's own reads the logits once where log-sum-exp and exp read them four times; but its sum, one number after the
    other, is off by 2e-5 for 126,000 tokens. The sum of what it gives, made in pairs, says by how much.
    """
    p = logits.softmax(-1, dtype=torch.float32)
    return p.div_(p.sum(-1, keepdim=True))


def suppress(logits: Tensor, token_id: int | None) -> Tensor:
    """`logits` (N, V) with token `token_id` at -inf; as they are if it is None or has no logit."""
    if token_id is None or token_id >= logits.shape[-1]:
        return logits
    logits = logits.clone()
    logits[:, token_id] = -torch.inf
    return logits


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """`logits` (N, V) over a temperature > 0, in float32, less each row's maximum: neither 1e4 nor 1e-30 overflows."""
    logits = logits.float()
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)


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


def first_largest(values: Tensor) -> Tensor:
    """`values.argmax(-1)` of (N, V), the first of equals: as fast as `amax`, which on a CPU is ten times as fast."""
    block, size = _blocks(values, torch.Tensor.amax).argmax(-1), _block_size(values)
    return block * size + _inside(values, block, size, -torch.inf).argmax(-1)


def invert(mass: Tensor, u: Tensor) -> Tensor:
    """Indices (N,) at which the cumulative `mass` (N, V), float32, exceeds u (N,) of its total.

    First which block, then where in it: two short cumulative sums instead of one over V, so errors stay small.
    """
    size = _block_size(mass)
    block, rest = _invert(_blocks(mass, torch.Tensor.sum), u)
    return block * size + _invert(_inside(mass, block, size, 0), rest)[0]


def _block_size(values: Tensor) -> int:
    return math.isqrt(values.shape[-1] - 1) + 1


def _blocks(values: Tensor, reduce) -> Tensor:
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


def order_score(p: Tensor, tokens: Tensor, order: str) -> Tensor:
    """How much a decoding order wants each row's token to be written: the highest comes first.

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

    Who knows the number need not wait for the device: `nonzero` and indexing by a mask do.
    """
    flat = mask.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:count]
    return torch.unravel_index(flat, mask.shape)


def logit_chunks(model_output, positions: Tensor, index: tuple[Tensor, Tensor], mask_token_id: int) -> Iterator[Tensor]:
    """Logits (n, V) at some positions, at most `CHUNK` numbers at a time, with the mask token at -inf.

    Args:
        model_output: as `reveal`.
        positions: bool of shape (B, L), N of them true.
        index: the same as rows and columns, int64 of shape (N,) each, in row-major order.
        mask_token_id: the mask token.
    """
    if isinstance(model_output, Tensor) or hasattr(model_output, "at"):
        read = model_output.at if hasattr(model_output, "at") else lambda row, column: model_output[row, column]
        size = chunk_rows(model_output.shape[-1])
        chunks = (read(*part) for part in zip(*(which.split(size) for which in index), strict=True))
    else:
        logits = model_output[positions]
        chunks = logits.split(chunk_rows(logits.shape[-1]))
    # `LazyLogits` hold the mask token at -inf already, which saves a copy of them.
    without = None if getattr(model_output, "mask_token_id", None) == mask_token_id else mask_token_id
    for chunk in chunks:
        yield suppress(chunk, without)


def draw_at(
    model_output,
    positions: Tensor,
    index: tuple[Tensor, Tensor],
    sampling: tuple[float, float | None, int | None],
    mask_token_id: int,
    u: Tensor,
    order: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token at each of some positions.

    Args:
        model_output, positions, index, mask_token_id: as `logit_chunks`.
        sampling: temperature, top_p and top_k, as `sample_tokens`.
        u: uniform numbers, float32 of shape (B, L).
        order: "confidence", "margin" or "entropy", see `order_score`; None for no score.
    Returns:
        tokens, int64 (N,), their probabilities as `sample_tokens`, float32 (N,), and the score, float32 (N,).
    """
    drawn, done, u = [], 0, u[index]
    for logits in logit_chunks(model_output, positions, index, mask_token_id):
        drawn.append(_sample(logits, *sampling, u[done : done + len(logits)], order))
        done += len(logits)
    tokens, probs, score = (torch.cat(part) for part in zip(*drawn, strict=True))
    return tokens, probs, score


def probability_at(model_output, positions: Tensor, tokens: Tensor, mask_token_id: int) -> Tensor:
    """The model's own probability, at temperature 1, of the tokens that stand at some positions.

    Args:
        model_output, positions, mask_token_id: as `logit_chunks`.
        tokens: int64 of shape (B, L); others than at `positions` are not read.
    Returns:
        float32 of shape (B, L), 0 outside `positions`, and where a token is at -inf.
    """
    index = positions.nonzero(as_tuple=True)
    probs, done, tokens = [], 0, tokens[index].long()
    for logits in logit_chunks(model_output, positions, index, mask_token_id):
        probs.append(probabilities(logits).gather(-1, tokens[done : done + len(logits), None])[:, 0])
        done += len(logits)
    # The softmax of a row in which nothing is possible is NaN.
    return torch.zeros(positions.shape, device=positions.device).index_put(index, torch.cat(probs).nan_to_num(0))


def reveal(
    model_output,
    masked: Tensor,
    n: Tensor,
    order: str,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    mask_token_id: int,
    u_order: Tensor,
    u_token: Tensor,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill n masks of each row.

    "random" and "left_to_right" pick the positions first, and then need logits nowhere else. The other orders draw a
    token at every mask and write those of the highest `order_score`, so they need logits at all masks.

    Args:
        model_output: (B, L, V) logits, or anything that gives (N, V) when indexed by a bool (B, L) mask. If it has a
            method `at(row, column)`, that is asked for the logits at these indices instead, some at a time.
        masked: bool of shape (B, L).
        n: int64 of shape (B,); below 1 fills nothing.
        order: one of `ORDERS`.
        temperature, top_p, top_k, mask_token_id: as `sample_tokens`.
        u_order, u_token: independent uniform numbers, float32 of shape (B, L).
        threshold: with order "confidence", every token of a confidence above it is written too; None for n alone.
    Returns:
        which masks were filled, bool (B, L); their tokens, int64 (N,); and the model's probabilities of these tokens,
        float32 (N,).
    """
    if order == "random":
        candidates = lowest(u_order, masked, n)
    elif order == "left_to_right":
        candidates = masked & (masked.cumsum(-1) <= n[:, None])
    else:
        candidates = masked
    number, written = candidates.sum(), torch.minimum(n, masked.sum(-1)).clamp(min=0).sum()
    number, written = torch.stack([number, written]).tolist()  # the one time that a step waits for the device
    index = true_positions(candidates, number)
    sampling = (temperature, top_p, top_k)
    if order in ("random", "left_to_right"):
        return candidates, *draw_at(model_output, candidates, index, sampling, mask_token_id, u_token)[:2]
    tokens, probs, score = draw_at(model_output, candidates, index, sampling, mask_token_id, u_token, order)
    score = torch.zeros_like(u_order).masked_scatter(masked, score)
    if threshold is not None:
        n = torch.maximum(n, (masked & (score > threshold)).sum(-1))
        written = int(torch.minimum(n, masked.sum(-1)).clamp(min=0).sum())  # the tokens decide: a second wait
    unmasked = highest(score, masked, n)
    (kept,) = true_positions(unmasked[index], written)  # among the masks, those that are filled
    return unmasked, tokens[kept], probs[kept]
