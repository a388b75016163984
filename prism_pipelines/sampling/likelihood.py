"""How likely a masked diffusion model finds a text: a Monte Carlo bound, and the pseudo-log-likelihood.

Such a model gives p(token | the rest), not p(text). The bound is the mean of log p over all orders in which the tokens
could be revealed one at a time. With exact conditionals it equals log p(text).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.denoiser import MaskedDenoiser, token_positions
from ..models.families import MDMSpec
from ..models.protocols import Tokenizer
from ..schedulers.functional import uniform
from ..schedulers.token_sampling import chunk_rows
from .canvas import Canvas, canvas_of_infill, given_positions, pad_rows, warn_of_unknown
from .encoding import NO_FRAME, Frame, as_texts, prompt_ids

METHODS = ("bound", "pseudo")


class Estimate(NamedTuple):
    """The result of `estimate`: float64 (B,) twice, int64 (B,), int, float32 (B, L) or None."""

    log_likelihood: Tensor
    standard_error: Tensor
    nfe_per_row: Tensor
    nfe: int
    token_log_probs: Tensor | None


class Job(NamedTuple):
    """One forward pass of one row: its masked positions, bool (L,), and the weight of their log-probabilities."""

    row: int
    group: int  # the term of the row's likelihood that it is a sample of
    masked: Tensor  # bool (L,)
    weight: float


# --- what is scored ---------------------------------------------------------------------------------------------------


def scored_canvas(
    texts: Any,
    prompt: Any,
    input_ids: Any,
    attention_mask: Any,
    given: Any,
    tokenizer: Tokenizer | None,
    mask_token_id: int,
    frame: Frame = NO_FRAME,
) -> tuple[Canvas, Tensor]:
    """The canvas of some texts or ids, and the positions to score, bool (B, L).

    Args:
        texts, prompt, input_ids, attention_mask, given: as `PrismPipeline.log_likelihood`.
        tokenizer, mask_token_id: of the model.
        frame: its closing tokens follow an answer.
    Raises:
        ValueError, TypeError: arguments that exclude each other; a mask token, or no token at all, to score.
    """
    if (texts is None) == (input_ids is None):
        raise ValueError("Pass either `texts` or `input_ids` to `log_likelihood`.")
    if prompt is not None:
        if texts is None or given is not None:
            raise ValueError("`prompt` needs `texts`, which follow it, and excludes `given`.")
        canvas, scored = canvas_of_answers(prompt, texts, tokenizer, frame)
    else:
        source = texts if input_ids is None else input_ids
        canvas = canvas_of_infill(source, tokenizer, mask_token_id, attention_mask, needs_mask=False)
        scored = torch.ones_like(canvas.sample, dtype=torch.bool)
        if canvas.attention_mask is not None:
            scored &= canvas.attention_mask.bool()
        if canvas.texts is not None and tokenizer is not None:  # texts need a tokenizer
            scored &= text_positions(canvas.texts, canvas.sample, tokenizer)
        if given is not None:
            scored &= ~given_positions(given, texts, canvas, tokenizer)
    if (scored & (canvas.sample == mask_token_id)).any():
        raise ValueError("`log_likelihood` needs whole texts, and one of these holds a mask token. Fill it first.")
    if empty := (~scored.any(-1)).nonzero().flatten().tolist():
        raise ValueError(f"`log_likelihood` has nothing to score in row {empty[0]}: it has no token that is not given.")
    return canvas, scored


def text_positions(texts: tuple[str, ...], sample: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Which tokens of `sample` (B, L) belong to a text, not to the special tokens around it, bool (B, L)."""
    positions = torch.zeros_like(sample, dtype=torch.bool)
    for row, text in enumerate(texts):
        bare, ids = tokenizer(text, add_special_tokens=False).input_ids, sample[row].tolist()
        last = len(ids) - len(bare)
        front = next((n for n in range(last + 1) if ids[n : n + len(bare)] == bare), None)
        positions[row, slice(None) if front is None else slice(front, front + len(bare))] = True
    return positions


def canvas_of_answers(prompt: Any, texts: Any, tokenizer: Tokenizer | None, frame: Frame) -> tuple[Canvas, Tensor]:
    """A canvas of prompts, each followed by a text, and which tokens belong to the texts, bool (B, L)."""
    prompts, answers = as_texts(prompt), as_texts(texts)
    if prompts is None or answers is None:
        name = "prompt" if prompts is None else "texts"
        raise TypeError(f"`{name}` must be a text or texts. Pass ids as `input_ids`, with `given`.")
    prompts = prompts * (len(answers) if len(prompts) == 1 else 1)
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
    column = torch.arange(ids.shape[1])
    scored = torch.stack([(column >= start) & (column < start + size) for start, size in sizes])
    return Canvas(ids, scored, None if mask.all() else mask, whole=True), scored


def answer_ids(prompt: str, answer: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of its answer, which are tokenized together. Spaces at the prompt's end move to the answer.

    If the ids of the prompt change when the answer follows, the two are tokenized apart.
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

    "bound": `E over l of (M / l) * sum over l hidden tokens of log p(token | the M - l others)`, with l uniform in 1..M
    and the hidden tokens a uniform set of that size. Its expectation is at most log p(text), with equality if the
    conditionals are exact. The values of l of one row are spread evenly from a random start. This is unbiased, and its
    variance is lower than that of independent values. A block-causal model has one such term for each of its blocks,
    given the blocks before.
    "pseudo": `sum of log p(token | all others)`, M forward passes. It is no likelihood, but the usual measure for
    encoders.

    Args:
        denoiser: the model.
        canvas: whole texts.
        scored: positions to score, bool (B, L), at least one a row.
        method: "bound" or "pseudo".
        num_samples: for "bound", forward passes of each row, or of each of its blocks; 1 where one token is scored.
        batch_size: rows of a forward pass.
        generator: one, or one per row; with one per row a row's result does not depend on the others.
    Source: LLaDA (arXiv 2502.09992, equation 6 and Appendix B.5; `get_log_likelihood.py` of its authors).
    """
    groups = group_of(denoiser.spec, canvas, scored)
    if method == "bound":
        jobs = bound_jobs(groups, num_samples, generator)
    else:
        every = torch.arange(scored.shape[1])
        jobs = [Job(row, i, every == column, 1.0) for i, (row, column) in enumerate(scored.nonzero().tolist())]
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


def row_ends(canvas: Canvas) -> list[int]:
    """The column at which the padding at the end of each row begins."""
    length = canvas.sample.shape[1]
    if canvas.attention_mask is None:
        return [length] * len(canvas.sample)
    return (length - canvas.attention_mask.flip(-1).argmax(-1)).tolist()


def group_of(spec: MDMSpec, canvas: Canvas, scored: Tensor) -> Tensor:
    """The term of the row's sum that a position belongs to: its block, or 0. int64 (B, L); -1 if not scored."""
    group = torch.zeros_like(canvas.sample)
    if spec.attention == "block_causal":
        assert spec.block_length is not None
        group = token_positions(canvas.sample, canvas.attention_mask) // spec.block_length
    return group.masked_fill(~scored, -1).cpu()


def bound_jobs(
    groups: Tensor, num_samples: int, generator: torch.Generator | list[torch.Generator] | None
) -> list[Job]:
    """Random sets of hidden positions for the bound: `num_samples` for each term of each row, 1 for a single token."""
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
                # A block sees no later one, so each term has canvases of its own.
                jobs.append(Job(row, term, masked, total / int(sizes)))
            term += 1
    return jobs


def hidden_log_probs(
    denoiser: MaskedDenoiser, canvas: Canvas, jobs: list[Job], length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each job, the columns of its hidden tokens and their log p, float32 (n,), on the CPU; one forward pass."""
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
    """For each row, the mean of each term's samples, summed. The standard error assumes independent samples."""
    row, term = (torch.tensor(which) for which in zip(*((job.row, job.group) for job in jobs), strict=True))
    count = term.bincount()
    mean = term.bincount(weights=values) / count
    spread = term.bincount(weights=(values - mean[term]).square()) / (count - 1).clamp(min=1) / count
    row_of = torch.zeros_like(count).index_put((term,), row)  # a term belongs to one row
    total, variance = (row_of.bincount(weights=each, minlength=rows) for each in (mean, spread))
    return Estimate(total, variance.sqrt(), row.bincount(minlength=rows), nfe, tokens)


@torch.no_grad()
def is_greedy(denoiser: MaskedDenoiser, canvas: Canvas, scored: Tensor) -> list[bool]:
    """Would the model itself write the scored tokens of each row, at temperature 0, the most certain token first?

    A row ends at the first token that differs. So a "no" costs few forward passes, and a "yes" costs one per token. A
    block-causal model writes block after block. Source: the evaluation of LLaDA.
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
