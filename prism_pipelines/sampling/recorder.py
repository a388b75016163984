"""Keeps a `RunContext`, the facts known about each token of a run, up to date after every forward pass and step.

Recording makes no forward pass. "prompt" needs the output head once at each generated position, and then one dot
product for each newly written token. Only "own" runs the output head in every step, at the visible tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..models.denoiser import MaskedDenoiser
from ..schedulers.context import ODDS, RunContext, check_inputs
from ..schedulers.token_sampling import chunk_rows, probabilities, true_positions


def recorder_for(
    denoiser: MaskedDenoiser, generated: Tensor, *readers: object, always: Iterable[str] = ()
) -> RunRecorder | None:
    """A recorder of the inputs `always` and of those in the `reads_context` of `readers`; None if there are none.

    `readers` are heads and schedulers.
    """
    reads = {*always, *(name for reader in readers for name in getattr(reader, "reads_context", ()))}
    return RunRecorder(denoiser, generated, sorted(reads)) if reads else None


def context_of_text(
    denoiser: MaskedDenoiser,
    reader: Any,
    sample: Tensor,
    attention_mask: Tensor | None,
    hidden: Tensor,
    given: Tensor | None = None,
) -> RunContext:
    """The context of a finished text whose sampling was not recorded.

    Args:
        denoiser: the model.
        reader: the head or scheduler that will read the context, by its `reads_context`.
        sample: the text, int64 (B, L); may hold masks.
        attention_mask: 1 for tokens and 0 for padding, (B, L); None for no padding.
        hidden: the hidden states of a forward pass on the text, (B, L, H).
        given: the part that was there from the start, bool (B, L). If the reader needs the first forward pass of a run,
            that pass is made here, with all but this part masked. None if nothing is known.
    """
    generated = torch.ones_like(sample, dtype=torch.bool) if given is None else ~given
    generated = generated if attention_mask is None else generated & attention_mask.bool()
    recorder = RunRecorder(denoiser, generated, reader.reads_context)
    if given is not None and recorder.reads_first:
        blank = sample.masked_fill(generated, denoiser.spec.mask_token_id)
        recorder.begin(generated)
        recorder.observe(blank, denoiser.hidden(blank, attention_mask))
    return recorder.observe(sample, hidden)


def own_log_probs(denoiser: MaskedDenoiser, sample: Tensor, attention_mask: Tensor | None, hidden: Tensor) -> Tensor:
    """log p(y_i | y) of every visible token, from a forward pass on the whole text, float32 (B, L); NaN at masks.

    Args:
        denoiser, sample, attention_mask, hidden: as `context_of_text`.
    """
    visible = torch.ones_like(sample, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    own = RunRecorder(denoiser, visible, ["own"]).observe(sample, hidden).own_logprob
    assert own is not None  # it is read
    return own


class RunRecorder:
    """Records a run: `begin` a block, then in each of its steps call `observe`, the scheduler, and `after_step`.

    The recorder needs no pipeline. A training loop that advances rows by a scheduler can use it too, see `restart`. The
    canvas is compared with the result of the last step. So tokens that a callback wrote, or that fill a finished row,
    are found; how they were drawn is unknown.

    Memory: one canvas of hidden states (B, L, H) if "prompt" or "first_hidden" is read, another during each forward
    pass if "token" is read, and about ten of (B, L).

    Args:
        denoiser: the model.
        generated: positions that the run may write, bool (B, L).
        reads: which of `schedulers.context.INPUTS` to record; the others stay unknown.
    Raises:
        ValueError: an unknown input.
    """

    def __init__(self, denoiser: MaskedDenoiser, generated: Tensor, reads: Iterable[str]) -> None:
        self.denoiser, self.generated = denoiser, generated
        self.reads = frozenset(name.removesuffix(ODDS) for name in check_inputs(list(reads)))
        self.reads_first = not self.reads.isdisjoint(("prompt", "first_hidden"))
        self._sample: Tensor | None = None  # the canvas that the records belong to
        self._due: Tensor | None = None  # positions whose first forward pass is the next one
        self._first_hidden: Tensor | None = None
        unknown = torch.full(generated.shape, torch.nan, device=generated.device)
        never, none = torch.full_like(generated, -1, dtype=torch.long), torch.zeros_like(generated, dtype=torch.long)
        self._now, self._written_at, self._num_remasked = never[:, 0], never, none
        self._draw = self._prompt = self._log_sum = self._first_max = self._first_entropy = unknown
        self._own = self._own_sum = self._own_min = unknown
        self._own_count = none

    def restart(self, rows: Tensor, generated: Tensor) -> None:
        """Drop the records of some rows, which become new texts.

        Args:
            rows: the new rows, bool (B,).
            generated: positions that may be written, bool (B, L); other rows are ignored.
        """
        some = rows[:, None]
        self.generated = torch.where(some, generated, self.generated)
        self._now = self._now.masked_fill(rows, -1)
        self._num_remasked = self._num_remasked.masked_fill(some, 0)
        self._forget(some)
        self._log_sum, self._first_max, self._first_entropy = (
            values.masked_fill(some, torch.nan) for values in (self._log_sum, self._first_max, self._first_entropy)
        )
        if self._first_hidden is not None:
            self._first_hidden = self._first_hidden.masked_fill(some[..., None], 0)

    def state(self) -> dict[str, Tensor]:
        """All records by name, for a checkpoint of a training run."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state`; the recorder must be new and read the same inputs."""
        for name, value in state.items():
            setattr(self, name, value)

    def begin(self, positions: Tensor) -> None:
        """Say that the next forward pass is the first one for some positions, bool (B, L): a block, or new rows."""
        self._due = positions

    @torch.no_grad()
    def observe(self, sample: Tensor, hidden: Tensor, work: Tensor | None = None) -> RunContext:
        """Record a forward pass and return its context.

        Args:
            sample: the canvas that the model saw, int64 (B, L).
            hidden: its hidden states, (B, L, H); with guidance those of the conditional forward pass.
            work: positions that may change in this step, bool (B, L); None for all that are generated.
        """
        work = self.generated if work is None else work
        self._now = self._now + work.any(-1)
        self._take_edits(sample)
        if (self._due is not None and self.reads_first) or "own" in self.reads:
            predicts = self.denoiser.aligned(hidden.detach())
            if self._due is not None and self.reads_first:
                self._take_first(sample, predicts, self._due)
            if "own" in self.reads:
                self._take_own(sample, predicts, work)
        self._due = None
        return self._context(self.denoiser.token_rows(sample) if "token" in self.reads else None)

    @torch.no_grad()
    def after_step(self, step: Any) -> None:
        """Record the result of a scheduler's step, a `PrismSchedulerOutput`."""
        unmasked, remasked = step.unmasked, step.remasked
        restored = getattr(step, "restored", None)
        self._forget(unmasked | remasked if restored is None else unmasked | remasked | restored)
        self._num_remasked = self._num_remasked + remasked
        self._written_at = torch.where(unmasked, self._now[:, None], self._written_at)
        self._draw = self._draw.masked_scatter(unmasked, step.sampled_probs.float().log())
        if "prompt" in self.reads and self._first_hidden is not None:
            index = true_positions(unmasked, len(step.sampled_tokens))
            self._prompt = self._prompt.index_put(index, self._given_first(index, step.sampled_tokens))
        self._sample = step.prev_sample

    @torch.no_grad()
    def draw_probabilities(self, sample: Tensor) -> Tensor:
        """The probability of each token of the finished canvas when it was drawn, float32 (B, L).

        1 where nothing is generated. NaN for tokens that were not drawn: written by a callback, restored from an
        earlier canvas, or the end token that fills a finished row.
        """
        self._take_edits(sample)
        return self._draw.exp().masked_fill(~self.generated, 1.0)

    def _context(self, token_rows: Tensor | None) -> RunContext:
        own = {}
        if "own" in self.reads:
            mean = self._own_sum / self._own_count
            own = {"own_logprob": self._own, "own_mean": mean, "own_min": self._own_min}
        return RunContext(
            generated=self.generated,
            now=self._now,
            written_at=self._written_at,
            num_remasked=self._num_remasked,
            draw_logprob=self._draw,
            prompt_logprob=self._prompt,
            first_max=self._first_max,
            first_entropy=self._first_entropy,
            first_hidden=self._first_hidden if "first_hidden" in self.reads else None,
            token_rows=token_rows,
            **own,
        )

    def _forget(self, positions: Tensor) -> None:
        """Drop the records of the tokens at `positions`, bool (B, L) or (B, 1)."""
        self._written_at = self._written_at.masked_fill(positions, -1)
        self._draw, self._prompt = (v.masked_fill(positions, torch.nan) for v in (self._draw, self._prompt))
        if "own" in self.reads:
            self._own, self._own_sum, self._own_min = (
                v.masked_fill(positions, torch.nan) for v in (self._own, self._own_sum, self._own_min)
            )
            self._own_count = self._own_count.masked_fill(positions, 0)

    def _take_edits(self, sample: Tensor) -> None:
        """Tokens that changed without a step; their probability in the first forward pass is still known."""
        before, self._sample = self._sample, sample
        if before is None or before is sample:  # the usual case; comparing would wait for the device
            return
        changed = self.generated & (sample != before)
        self._forget(changed)
        if "prompt" in self.reads and self._first_hidden is not None:
            index = (changed & (sample != self.denoiser.spec.mask_token_id)).nonzero(as_tuple=True)
            self._prompt = self._prompt.index_put(index, self._given_first(index, sample[index]))

    def _take_first(self, sample: Tensor, predicts: Tensor, due: Tensor) -> None:
        """The first forward pass at the masks that are due. A visible token is no mask: the model has seen it."""
        due = due & self.generated & (sample == self.denoiser.spec.mask_token_id)
        before = torch.zeros_like(predicts) if self._first_hidden is None else self._first_hidden
        self._first_hidden = torch.where(due[..., None], predicts, before)
        if "prompt" not in self.reads:
            return
        index = due.nonzero(as_tuple=True)
        found = [torch.stack(log_statistics(logits)) for logits in _logits_at(self.denoiser, predicts, index)]
        if found:
            log_sum, largest, entropy = torch.cat(found, dim=1)
            self._log_sum = self._log_sum.index_put(index, log_sum)
            self._first_max = self._first_max.index_put(index, largest)
            self._first_entropy = self._first_entropy.index_put(index, entropy)

    def _given_first(self, index: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        """log p(token | first canvas) at some positions, float32 (N,); NaN where there was no first forward pass."""
        assert self._first_hidden is not None  # the first forward pass is over
        logits = self.denoiser.token_logits(self._first_hidden[index], tokens.long())
        return (logits - self._log_sum[index]).clamp(max=0)  # the sum is of logits rounded to the model's dtype

    def _take_own(self, sample: Tensor, predicts: Tensor, work: Tensor) -> None:
        visible = work & self.generated & (sample != self.denoiser.spec.mask_token_id)
        index = visible.nonzero(as_tuple=True)
        tokens, done, found = sample[index].long(), 0, []
        for logits in _logits_at(self.denoiser, predicts, index):
            chosen = logits.gather(-1, tokens[done : done + len(logits), None])[:, 0].float()
            found.append((chosen - log_statistics(logits)[0]).clamp(max=0))
            done += len(logits)
        if not found:
            return
        now = torch.cat(found)
        self._own = self._own.index_put(index, now)
        self._own_sum = self._own_sum.index_put(index, self._own_sum[index].nan_to_num(0.0, neginf=-torch.inf) + now)
        self._own_min = self._own_min.index_put(index, torch.fmin(self._own_min[index], now))
        self._own_count = self._own_count + visible


def _logits_at(denoiser: MaskedDenoiser, predicts: Tensor, index: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Logits (n, V) at some positions of aligned hidden states (B, L, H), a bounded number of rows at a time."""
    for part in zip(*(which.split(chunk_rows(denoiser.vocab_size)) for which in index), strict=True):
        if len(part[0]):
            yield denoiser.lm_head(predicts[part])


def log_statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, largest log-probability and entropy in nats of each row of logits (N, V), float32 (N,) each."""
    p = probabilities(logits)
    largest = p.amax(-1).log()
    return logits.amax(-1).float() - largest, largest, torch.special.entr(p).sum(-1)
