"""How likely a masked diffusion model finds a text: a Monte Carlo bound, and the pseudo-log-likelihood.

Such a model gives p(token | the rest), not p(text). With exact conditionals the bound is log p(text) itself: it is the
mean over all orders in which the tokens could be revealed one at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..models.denoiser import MaskedDenoiser, token_positions
from ..schedulers.functional import uniform
from ..schedulers.token_sampling import chunk_rows
from .canvas import Canvas, canvas_of_infill, given_positions, pad_rows, warn_of_unknown
from .encoding import NO_FRAME, Frame, prompt_ids

METHODS = ("bound", "pseudo")


class Estimate(NamedTuple):
    """What `estimate` gives: float64 (B,) twice, int64 (B,), int, float32 (B, L) or None."""

    log_likelihood: Tensor
    standard_error: Tensor
    nfe_per_row: Tensor
    nfe: int
    token_log_probs: Tensor | None


class Job(NamedTuple):
    """One forward pass of one row: which of its positions are masked, and what each hidden token counts."""

    row: int
    group: int
    masked: Tensor  # bool (L,)
    weight: float


# --- what is scored ---------------------------------------------------------------------------------------------------


def scored_canvas(
    texts, prompt, input_ids, attention_mask, given, tokenizer, mask_token_id: int, frame: Frame = NO_FRAME
) -> tuple[Canvas, Tensor]:
    """The canvas of some texts or ids, and the positions whose likelihood is asked for, bool (B, L).

    Args:
        texts, prompt, input_ids, attention_mask, given: as `PrismPipeline.log_likelihood`.
        tokenizer, mask_token_id: of the model.
        frame: its closing tokens follow an answer.
    Raises:
        ValueError, TypeError: arguments that do not go together; a mask token or nothing in what is scored.
    """
    if (texts is None) == (input_ids is None):
        raise ValueError("Pass either `texts` or `input_ids` to `log_likelihood`.")
    if prompt is not None:
        if texts is None or given is not None:
            raise ValueError("`prompt` goes with `texts`, which follow it, and without `given`.")
        canvas, scored = canvas_of_answers(prompt, texts, tokenizer, frame)
    else:
        source = texts if input_ids is None else input_ids
        canvas = canvas_of_infill(source, tokenizer, mask_token_id, attention_mask, needs_mask=False)
        scored = torch.ones_like(canvas.sample, dtype=torch.bool)
        if canvas.attention_mask is not None:
            scored &= canvas.attention_mask.bool()
        if canvas.texts is not None:
            scored &= text_positions(canvas, tokenizer)
        if given is not None:
            scored &= ~given_positions(given, texts, canvas, tokenizer)
    if (scored & (canvas.sample == mask_token_id)).any():
        raise ValueError("`log_likelihood` reads whole texts, and one of these holds a mask token. Fill it first.")
    if empty := (~scored.any(-1)).nonzero().flatten().tolist():
        raise ValueError(f"`log_likelihood` has nothing to score in row {empty[0]}: no token of it is in question.")
    return canvas, scored


def text_positions(canvas: Canvas, tokenizer) -> Tensor:
    """Tokens of the texts of a canvas, without those that the tokenizer puts around each text, bool (B, L)."""
    positions = torch.zeros_like(canvas.sample, dtype=torch.bool)
    for row, text in enumerate(canvas.texts):
        bare, ids = tokenizer(text, add_special_tokens=False).input_ids, canvas.sample[row].tolist()
        last = len(ids) - len(bare)
        front = next((n for n in range(last + 1) if ids[n : n + len(bare)] == bare), None)
        positions[row, slice(None) if front is None else slice(front, front + len(bare))] = True
    return positions


def canvas_of_answers(prompt, texts, tokenizer, frame: Frame) -> tuple[Canvas, Tensor]:
    """Prompts, each followed by a text, and which tokens are of the texts, bool (B, L)."""
    prompts, answers = ([one] if isinstance(one, str) else one for one in (prompt, texts))
    for name, given in (("prompt", prompts), ("texts", answers)):
        if not (isinstance(given, (list, tuple)) and all(isinstance(text, str) for text in given)):
            raise TypeError(f"`{name}` must be a text or texts; ids go into `input_ids`, with `given`.")
    prompts = list(prompts) * (len(answers) if len(prompts) == 1 else 1)
    if len(prompts) != len(answers):
        raise ValueError(f"`prompt` must hold one text for each of {len(answers)} texts, got {len(prompts)}.")
    if tokenizer is None:
        raise ValueError("`prompt` is text, but the pipeline has no tokenizer. Pass `input_ids` and `given`.")
    warn_of_unknown("texts", [one + other for one, other in zip(prompts, answers, strict=True)], tokenizer)
    rows, sizes = [], []
    for one, answer in zip(prompts, answers, strict=True):
        before, after = answer_ids(one, answer, tokenizer)
        rows.append([*before, *after, *frame.closing])
        sizes.append((len(before), len(after)))
    ids, mask = pad_rows(rows, tokenizer, "right")
    place = torch.arange(ids.shape[1])
    scored = torch.stack([(place >= start) & (place < start + size) for start, size in sizes])
    return Canvas(ids, scored, None if mask.all() else mask, whole=True), scored


def answer_ids(prompt: str, answer: str, tokenizer) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and of what follows it: cut where the prompt alone ends, spaces at its end moved behind the cut.

    Where the tokenizer reads the prompt differently once the answer is there, the two are read apart.
    """
    spaces = prompt[len(prompt.rstrip()) :]
    prompt, answer = prompt[: len(prompt) - len(spaces)], spaces + answer
    before, whole = prompt_ids([prompt, prompt + answer], tokenizer)
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, tokenizer(answer, add_special_tokens=False).input_ids


# --- estimates --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def estimate(
    denoiser: MaskedDenoiser,
    canvas: Canvas,
    scored: Tensor,
    method: str = "bound",
    num_samples: int = 128,
    batch_size: int = 16,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Estimate:
    """Log-likelihood of the scored tokens of each row given the others, in nats.

    "bound": `E over l of (M / l) * sum over l hidden tokens of log p(token | the M - l others)`, l uniform in 1..M and
    the hidden tokens a uniform set of that size. It is at most log p(text) in expectation, and equal to it if the
    conditionals are exact. The values of l of one row are spread evenly from a random start, which is unbiased and of
    lower variance than independent ones. A block-causal model has such a term for each of its blocks, given those
    before.
    "pseudo": `sum of log p(token | all others)`, M forward passes. No likelihood, but what encoders are compared by.

    Args:
        denoiser: of the model.
        canvas: whole texts.
        scored: positions in question, bool (B, L), at least one a row.
        method: "bound" or "pseudo".
        num_samples: for "bound", forward passes of each row, or of each of its blocks; one where one token is scored.
        batch_size: rows of a forward pass.
        generator: one, or one per row: then a row's result does not depend on the others.
    Source: LLaDA (arXiv 2502.09992, equation 6 and Appendix B.5; `get_log_likelihood.py` of its authors).
    """
    groups = group_of(denoiser.spec, canvas, scored)
    if method == "bound":
        jobs = bound_jobs(groups, num_samples, generator)
    else:
        places = [(row, column) for row, column in scored.nonzero().tolist()]
        jobs = [Job(row, i, one_position(scored.shape[1], column), 1.0) for i, (row, column) in enumerate(places)]
    values = torch.zeros(len(jobs), dtype=torch.float64)
    tokens = torch.full(scored.shape, torch.nan)
    lengths = row_ends(canvas)
    order = sorted(range(len(jobs)), key=lambda i: (lengths[jobs[i].row], jobs[i].row))
    nfe = 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        nfe += 1
        length = max(lengths[jobs[i].row] for i in batch)
        found = hidden_log_probs(denoiser, canvas, [jobs[i] for i in batch], length)
        for i, (columns, log_probs) in zip(batch, found, strict=True):
            values[i] = jobs[i].weight * log_probs.double().sum()
            if method == "pseudo":
                tokens[jobs[i].row, columns] = log_probs
    return summed(jobs, values, len(scored), nfe, tokens if method == "pseudo" else None)


def one_position(length: int, column: int) -> Tensor:
    """Bool (length,), true at one place."""
    return torch.arange(length) == column


def row_ends(canvas: Canvas) -> list[int]:
    """Where the padding at the end of each row begins."""
    length = canvas.sample.shape[1]
    if canvas.attention_mask is None:
        return [length] * len(canvas.sample)
    return (length - canvas.attention_mask.flip(-1).argmax(-1)).tolist()


def group_of(spec, canvas: Canvas, scored: Tensor) -> Tensor:
    """Which term of its row's likelihood a position belongs to, int64 (B, L); -1 where nothing is scored."""
    group = torch.zeros_like(canvas.sample)
    if spec.attention == "block_causal":
        group = token_positions(canvas.sample, canvas.attention_mask) // spec.block_length
    return group.masked_fill(~scored, -1).cpu()


def bound_jobs(groups: Tensor, num_samples: int, generator) -> list[Job]:
    """Sets of hidden positions for the bound: for each term of each row `num_samples` of them."""
    jobs, term = [], 0
    for row, group in enumerate(groups):
        own = generator[row] if isinstance(generator, (list, tuple)) else generator
        for block in group.unique().tolist():
            if block < 0:
                continue
            columns = (group == block).nonzero().flatten()
            total, count = len(columns), num_samples if len(columns) > 1 else 1
            start = uniform((1,), own, "cpu")
            size = (((start + torch.arange(count) / count) % 1.0) * total).long().clamp(max=total - 1) + 1  # (count,)
            rank = uniform((count, total), own, "cpu").argsort(-1).argsort(-1)
            for sizes, ranks in zip(size, rank, strict=True):
                masked = torch.zeros(groups.shape[1], dtype=torch.bool)
                masked[columns[ranks < sizes]] = True
                # The first block sees none of the later ones, so each term has canvases of its own.
                jobs.append(Job(row, term, masked, total / int(sizes)))
            term += 1
    return jobs


def hidden_log_probs(denoiser: MaskedDenoiser, canvas: Canvas, jobs: list[Job], length: int):
    """log p of the hidden tokens of some canvases by one forward pass: for each (columns, float32 (n,)) on the CPU."""
    rows = torch.tensor([job.row for job in jobs], device=canvas.sample.device)
    masked = torch.stack([job.masked for job in jobs])[:, :length].to(canvas.sample.device)
    ids = canvas.sample[rows, :length]
    mask = None if canvas.attention_mask is None else canvas.attention_mask[rows, :length]
    mask = None if mask is None or mask.all() else mask
    hidden = denoiser.hidden(ids.masked_fill(masked, denoiser.spec.mask_token_id), mask)
    index = masked.nonzero(as_tuple=True)
    found = []
    for part in zip(*(which.split(chunk_rows(denoiser.vocab_size)) for which in index), strict=True):
        logits = denoiser.logits_at(hidden, *part).float()
        chosen = logits.gather(-1, ids[part][:, None])[:, 0]
        found.append(chosen - logits.logsumexp(-1))
    log_probs, counts = torch.cat(found).cpu(), masked.sum(-1).tolist()
    columns = index[1].cpu()
    return zip(columns.split(counts), log_probs.split(counts), strict=True)


def summed(jobs: list[Job], values: Tensor, rows: int, nfe: int, tokens: Tensor | None) -> Estimate:
    """Means of each term of a row, added up; the standard error is that of independent samples."""
    row, term = (torch.tensor(which) for which in zip(*((job.row, job.group) for job in jobs), strict=True))
    count = term.bincount()
    mean = term.bincount(weights=values) / count
    spread = term.bincount(weights=(values - mean[term]).square()) / (count - 1).clamp(min=1) / count
    row_of = torch.zeros_like(count).index_put((term,), row)  # a term belongs to one row
    total, variance = (row_of.bincount(weights=each, minlength=rows) for each in (mean, spread))
    return Estimate(total, variance.sqrt(), row.bincount(minlength=rows), nfe, tokens)


@torch.no_grad()
def is_greedy(denoiser: MaskedDenoiser, canvas: Canvas, scored: Tensor) -> list[bool]:
    """Would the model write the scored tokens of each row itself, the most certain first, at temperature 0?

    A row is given up at its first other token, so the answer no costs few forward passes, and yes one per token. As in
    LLaDA's evaluation; a block-causal model writes block after block.
    """
    groups, answers = group_of(denoiser.spec, canvas, scored), []
    for row, (group, end) in enumerate(zip(groups, row_ends(canvas), strict=True)):
        mask = None if canvas.attention_mask is None else canvas.attention_mask[row : row + 1, :end]
        mask = None if mask is None or mask.all() else mask
        target, left = canvas.sample[row : row + 1, :end], scored[row, :end].clone()
        sample, same = target.masked_fill(left[None].to(target.device), denoiser.spec.mask_token_id), True
        while same and left.any():
            now = left & (group[:end] == group[:end][left].min())
            columns = now.nonzero().flatten().to(target.device)
            hidden = denoiser.hidden(sample, mask)
            p = denoiser.logits_at(hidden, torch.zeros_like(columns), columns).float().softmax(-1)
            best = int(p.amax(-1).argmax())
            column, token = int(columns[best]), int(p[best].argmax())
            same = token == int(target[0, column])
            sample[0, column], left[column] = token, False
        answers.append(same)
    return answers
