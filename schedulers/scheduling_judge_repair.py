"""Judge and repair: fill the canvas in few steps, judge it whole, redraw what is doubtful, stop when nothing is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import Device, Generators, lowest
from .mixin import MDMSchedulerMixin
from .step import PrismSchedulerOutput, Step
from .token_sampling import Logits
from .validation import Order, Temperature, TokenId, TopK, TopP, check_fields, check_quality, integer, number, require

# A rejected token of at least this quality gets no penalty on its logit when its position is drawn again.
SURE = 0.999
# Qualities are clamped to [EDGE, 1 - EDGE] before their logit is taken.
EDGE = 1e-4
# A failed repair makes the next repair this many times as large.
WIDEN = 4


class JudgeAndRepairScheduler(MDMSchedulerMixin):
    """Spends forward passes where the quality head says that they pay, row by row.

    A row has M tokens to generate in at most T forward passes. q_i is the quality of token i, P(y_i is right). A pass
    fills w = ceil(M / F) tokens, where F = min(ceil(M / tokens_per_step), T - 1). Redrawing a set of m tokens promises
    the gain G = sum (b - q_i) over those with q_i < b. It costs C = price * (R + 1), for R = ceil(m / w) passes to fill
    and one to judge.

        1. FILL    all masks in at most F passes, on the schedule of F passes. With order "confidence" a pass writes
                   further tokens, the surest first, while sum (1 - confidence) over all that it writes is at most
                   `price`. So an easy canvas takes few passes.
        2. JUDGE   the full canvas in one pass. If it has the largest sum of q_i so far, keep it as the best.
        3. ACCEPT  the row if the tokens with q_i < b have G < C. The row is finished.
        4. DOUBT   Of n repairs so far, f = n - k have failed. k is the sum of their success in [0, 1]: how much each
                   raised the best sum of q_i, divided by its G. After a failure the wrong tokens are looked for among
                   tokens that seemed right: doubtful are those with q_i < 1 - (1 - b) / (1 + f). If too few passes are
                   left for all of them, only the lowest count. The lowest 4^f of them are drawn again, or all of them
                   if these few do not pay (see 5).
        5. GIVE UP if no pass is left for a repair, or if G (1 + k) / (1 + n) < C for the tokens to be drawn again. The
                   row ends as its best canvas.
        6. REPAIR  Mask these m tokens. Fill them as in 1, in at most R passes at `repair_temperature`. The logit of the
                   rejected token of each position is lowered by logit(0.999) - logit(q_i). Go to 2.

    One wrong token makes right tokens around it look wrong, so the first repair redraws the worst token alone. But a
    wrong token may also stand among others that were drawn to fit it, so a larger repair follows one that failed.
    `PrismPipeline` makes no further pass for a finished row: `num_inference_steps` is an upper limit, and `nfe_per_row`
    says how many passes were made. A repair that could not be finished and judged in time is not begun.

    Example:
        >>> scheduler = JudgeAndRepairScheduler(mask_token_id=9)
        >>> scheduler.set_timesteps(4)
        >>> full, quality = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[0.99, 0.1, 0.99, 0.99]])
        >>> scheduler.step(torch.zeros(1, 4, 10), 0, full, quality=quality).prev_sample.tolist()
        [[4, 9, 6, 7]]

    It needs a head whose quality is a probability (calibrated, see docs/judging.md), which reads full canvases.

    Args:
        order: which masks are filled first: "random", "confidence", "margin", "entropy" or "left_to_right".
        temperature: of filling.
        repair_temperature: of repairs. They need randomness: at 0 they would repeat the same errors.
        doubt_threshold: b, in (0, 1].
        tokens_per_step: tokens that a forward pass fills, at least 1; more if T is too small for that.
        price: tokens that one more forward pass must be expected to correct, above 0.
        pool_factor: at least 1. Above 1, T is the average over the rows of a batch: the passes that finished rows did
            not use go to the others, at most pool_factor * T for a row. A row then depends on its batch.
        top_p, top_k: of sampling, see `token_sampling.sample_tokens`.
        mask_token_id: None if every `step` is given it.
    Raises:
        ValueError: a field out of its range.
    Source: ours; see docs/judging.md.
    """

    needs_quality = True

    @register_to_config
    def __init__(
        self,
        order: Order = "confidence",
        temperature: Temperature = 0.0,
        repair_temperature: Temperature = 1.0,
        doubt_threshold: Annotated[float, number(0, 1, above=True)] = 0.95,
        tokens_per_step: Annotated[int, integer(1)] = 4,
        price: Annotated[float, number(0, above=True)] = 0.05,
        pool_factor: Annotated[int, integer(1)] = 1,
        top_p: TopP = None,
        top_k: TopK = None,
        mask_token_id: TokenId = None,
    ) -> None:
        check_fields(JudgeAndRepairScheduler, self.config)

    def set_timesteps(self, num_inference_steps: int, device: Device = None, block_length: int | None = None) -> None:
        """Begin a run of at most `num_inference_steps` steps, or `pool_factor` times as many for a single row.

        Raises:
            ValueError: fewer than 2 steps, one to fill and one to judge. In `PrismPipeline` each block needs 2.
        """
        super().set_timesteps(num_inference_steps, device, block_length)
        enough = "at least 2 for JudgeAndRepairScheduler, one to fill the canvas (or each block) and one to judge it"
        require(num_inference_steps > 1, "num_inference_steps", num_inference_steps, enough)
        self.timesteps = torch.arange(num_inference_steps * self.config.pool_factor)

    def step(
        self,
        model_output: Logits,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        quality: Tensor | None = None,
        generation_mask: Tensor | None = None,
        mask_token_id: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> PrismSchedulerOutput | tuple[Tensor, ...]:
        """Fill masks of rows that have some; judge rows that have none. Arguments as `PrismScheduler.step`.

        `quality` is read only in rows without a mask. NaN counts as 1. `temperature` is for filling, not for repairs.

        Returns:
            `PrismSchedulerOutput` with all its fields.
        Raises:
            ValueError: also if `quality` is None.
        """
        now = Step.of(
            self, model_output, timestep, sample, generation_mask, mask_token_id, temperature, top_p, top_k, generator
        )
        if quality is None:
            raise ValueError("`quality` must be the quality head's probabilities, got None. Pass a quality head.")
        check_quality(quality, sample)
        rows = self._memory
        if now.index == 0 or rows is None or rows.best.shape != sample.shape:
            rows = self._memory = _Rows.begin(now, self.config.tokens_per_step)
        left = rows.passes_left(now, len(self.timesteps) - 1 - now.index)
        verdict = rows.judge(self.config, now, quality, left)
        filled, probs, unmasked = self._fill(now, rows, rows.due(now.masked, left))
        prev_sample = torch.where(verdict.restored, rows.best, filled).masked_fill(verdict.remasked, now.mask_token_id)
        tokens, probs = filled[unmasked].long(), probs[unmasked]
        output = PrismSchedulerOutput(prev_sample, unmasked, verdict.remasked, tokens, probs, *verdict.ends)
        return output if return_dict else output.to_tuple()

    def _fill(self, now: Step, rows: _Rows, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Steps 1 and 6: the sample with at least n (B,) masks filled, their probabilities, and which; (B, L) each."""
        u_order, u_token = now.uniform(2)
        most_wrong = self.config.price if now.order == "confidence" else None
        filled, probs, unmasked = now.sample, torch.zeros(now.sample.shape, device=now.sample.device), now.nothing
        for repairing in (False, True):
            some, penalty = replace(now, masked=now.masked & (rows.repairing == repairing)[:, None]), None
            if repairing:
                some = replace(some, sampling=some.sampling._replace(temperature=self.config.repair_temperature))
                penalty = (rows.rejected, rows.penalty)
            new, tokens, their_probs = some.reveal(n, u_order, u_token, None, penalty, most_wrong)
            filled = filled.masked_scatter(new, tokens.to(filled.dtype))
            probs, unmasked = probs.masked_scatter(new, their_probs), unmasked | new
        return filled, probs, unmasked


class _Verdict(NamedTuple):
    """What `_Rows.judge` decides, see `PrismSchedulerOutput`; `ends` holds the last four fields of that."""

    remasked: Tensor
    restored: Tensor
    ends: tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class _Rows:
    """Where each row of a run stands. B rows, L positions.

    Args:
        purse: passes that all rows together have left, int64 (). A finished row spends none.
        masks, steps, done: masks at the start of the present filling, its passes, and the passes made, int64 (B,).
        pace: w, tokens that a pass fills, int64 (B,).
        repairing: rows whose present filling is a repair, bool (B,).
        finished: rows that need no further pass, bool (B,).
        best, best_quality: the canvas with the largest sum of q_i, (B, L), and its q_i; -1 before the first judgement.
        rejected, penalty: tokens that a repair redraws, int64 (B, L), and what is taken off their logits, float32
            (B, L).
        repairs, promised: n, repairs begun, int64 (B,), and G of the last one, float32 (B,).
        delivered: k, the summed success of the repairs, float32 (B,).
    """

    purse: Tensor
    masks: Tensor
    steps: Tensor
    done: Tensor
    pace: Tensor
    repairing: Tensor
    finished: Tensor
    best: Tensor
    best_quality: Tensor
    rejected: Tensor
    penalty: Tensor
    repairs: Tensor
    promised: Tensor
    delivered: Tensor

    @classmethod
    def begin(cls, now: Step, tokens_per_step: int) -> _Rows:
        """Rows at the start of a run, with the passes that are left of T."""
        budget = now.num_steps - now.index
        masks, blank = now.masked.sum(-1), torch.zeros(now.sample.shape, device=now.sample.device)
        steps = _quotient(masks, tokens_per_step).clamp(1, max(1, budget - 1))
        no = torch.zeros_like(masks, dtype=torch.bool)
        return cls(
            purse=budget * now.generation_mask.any(-1).sum(),
            masks=masks,
            steps=steps,
            done=torch.zeros_like(masks),
            pace=_quotient(masks, steps).clamp(min=1),
            repairing=no,
            finished=no,
            best=now.sample,
            best_quality=blank - 1,
            rejected=now.sample.long(),
            penalty=blank,
            repairs=torch.zeros_like(masks),
            promised=blank.sum(-1),
            delivered=blank.sum(-1),
        )

    def passes_left(self, now: Step, most: int) -> Tensor:
        """How many passes each working row can take after this one, at most `most`, int64 ()."""
        rows = (now.generation_mask.any(-1) & ~self.finished).sum().clamp(min=1)
        self.purse = self.purse - rows
        return (self.purse // rows).clamp(0, most)

    def due(self, masked: Tensor, left: Tensor) -> Tensor:
        """How many of the masks (B, L) each row fills in this pass, int64 (B,); all of them if no pass is `left`."""
        rest, filling = masked.sum(-1), masked.any(-1)
        after = self.masks - _quotient(self.masks * (self.done + 1), self.steps)
        self.done = self.done + filling
        ends = self.done >= self.steps
        return torch.where(ends | (left == 0), rest, (rest - after).clamp(min=1))

    def judge(self, config: Any, now: Step, quality: Tensor, left: Tensor) -> _Verdict:
        """Steps 2 to 5 of the algorithm in rows without a mask. A repair is filled in the passes that follow."""
        bar = config.doubt_threshold
        working = now.generation_mask.any(-1) & ~self.finished  # (B,)
        full = working & ~now.masked.any(-1)  # (B,)
        at = now.generation_mask & full[:, None]  # (B, L)
        q = quality.float().nan_to_num(1.0).clamp(0, 1).masked_fill(~at, 0)

        def gain(tokens: Tensor) -> Tensor:
            return ((bar - q).clamp(min=0) * tokens).sum(-1)

        def price(tokens: Tensor) -> Tensor:
            return config.price * (_quotient(tokens.sum(-1), self.pace) + 1)

        def pays(tokens: Tensor) -> Tensor:
            kept = (1 + self.delivered) / (1 + self.repairs)
            return tokens.any(-1) & (kept * gain(tokens) >= price(tokens))

        self._note_best(now.sample, q, at, full)
        below = at & (q < bar)
        accepted = full & (gain(below) < price(below))
        failed = self.repairs - self.delivered
        doubtful = at & (q < 1 - (1 - bar) / (1 + failed)[:, None])
        doubtful = lowest(q, doubtful, self.pace * (left - 1).clamp(min=0))
        few = lowest(q, doubtful, (WIDEN ** failed.clamp(max=15)).long())  # 4^15 are more than any canvas holds
        chosen = torch.where(pays(few)[:, None], few, doubtful)
        repair = full & ~accepted & pays(chosen)

        ended, remasked = full & ~repair, chosen & repair[:, None]
        judged = torch.where(accepted[:, None], q, self.best_quality).masked_fill(~(at & ended[:, None]), torch.nan)
        restored = at & (ended & ~accepted)[:, None] & (self.best != now.sample)
        finished = ended | (working & (left == 0))
        self.finished = self.finished | finished
        self._begin_repairs(now.sample, q, repair, remasked, gain(chosen))
        return _Verdict(remasked, restored, (finished, accepted, restored, judged))

    def _note_best(self, sample: Tensor, q: Tensor, at: Tensor, full: Tensor) -> None:
        """Step 2: keep the canvas if it is the best so far, and add the success of the last repair to `delivered`."""
        brought = (q.sum(-1) - (self.best_quality * at).sum(-1)) * full
        better = (brought > 0)[:, None]
        self.best = torch.where(better, sample, self.best)
        self.best_quality = torch.where(better, q, self.best_quality)
        self.delivered = self.delivered + ((brought / self.promised).clamp(0, 1) * (self.repairs > 0)).nan_to_num(0.0)

    def _begin_repairs(self, sample: Tensor, q: Tensor, repair: Tensor, remasked: Tensor, gain: Tensor) -> None:
        """Step 6: the tokens `remasked` (B, L) of the rows `repair` (B,) are to be drawn again."""
        number = remasked.sum(-1)
        self.masks = torch.where(repair, number, self.masks)
        self.steps = torch.where(repair, _quotient(number, self.pace), self.steps)
        self.done = self.done.masked_fill(repair, 0)
        self.repairing = self.repairing | repair
        self.promised = torch.where(repair, gain, self.promised)
        self.repairs = self.repairs + repair
        self.rejected = torch.where(remasked, sample.long(), self.rejected)
        off = torch.logit(torch.tensor(SURE)).item() - q.clamp(EDGE, 1 - EDGE).logit()
        self.penalty = torch.where(repair[:, None], (off * remasked).clamp(min=0), self.penalty)


def _quotient(a: Tensor, b: Tensor | int) -> Tensor:
    """ceil(a / b) of integers, for a >= 0."""
    return (a + b - 1) // b
