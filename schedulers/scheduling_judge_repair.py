"""Judge and repair: fill the canvas in few steps, judge it whole, redraw what is doubtful, stop when nothing is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from .functional import lowest, uniform_at
from .scheduling_prism import PrismSchedulerOutput
from .token_sampling import reveal
from .validation import SchedulerConfig, check_config, check_run, is_int, is_number, read_sampling, read_step, require

# How sure the judge must be of a token before its being drawn again is no longer held against it.
SURE = 0.999
# Qualities are read no further than this from 0 and 1: a judge is never surer.
EDGE = 1e-4
# Repairs of a row after which what they have brought counts as much as the belief that they keep their promises.
PATIENCE = 4


class JudgeAndRepairScheduler(SchedulerMixin, SchedulerConfig):
    """Spends forward passes where the quality head says that they pay, row by row.

    Of each row, with M tokens to generate in at most T forward passes, and P(y_i is right) the head's quality q_i:

        1. FILL    all masks in at most F = min(ceil(M / tokens_per_step), max(1, floor(T / 2))) passes. With order
                   "confidence" every token of a probability above quality_threshold = b is written at once, so an easy
                   canvas takes fewer; each pass fills at least what the schedule of F passes asks for.
        2. JUDGE   the full canvas in one pass. If it has the largest sum of q_i so far, keep it as the best.
        3. ACCEPT  if the gain that redrawing the tokens with q_i < b promises, sum (b - q_i), is below the price of the
                   R + 1 passes that it takes: price * (R + 1). The row is finished.
        4. DOUBT   Each repair so far has kept a share of its promise, in [0, 1]: by how much it raised the best sum of
                   q_i, divided by the gain that it promised. With n repairs that kept k in all, n - k have failed, and
                   the wrong tokens must be among those that were not doubted: doubtful are the tokens with
                   q_i < 1 - (1 - b) / (1 + n - k), the lowest first if there are passes for only so many.
        5. GIVE UP if too few passes are left, or if (4 + k) / (4 + n) of the gain that the doubtful promise is below
                   the price. The row is finished, with its best canvas.
        6. REPAIR  mask the doubtful tokens; fill them as in 1, in at most R = ceil(their number / (M / F)) passes at
                   `repair_temperature`, with logit(0.999) - logit(q_i) taken off the logit of the token that was
                   rejected at each position. Go to 2.

    The bar is high, for recall: a wrong token is surrounded by others that were bent to it, and those must go too;
    right ones come back. A row that is finished costs no more passes in `PrismPipeline`, so `num_inference_steps` is
    the most that are made and `nfe_per_row` says how many were. A repair that could not be finished and judged is not
    begun.

    It needs a head whose quality is a probability (calibrated, see docs/judging.md), which reads full canvases.

    Args:
        order: which masks are filled first: "random", "confidence", "margin", "entropy" or "left_to_right".
        temperature: of filling.
        repair_temperature: of repairs, which need randomness: at 0 they would repeat the same errors.
        quality_threshold: b, in (0, 1].
        tokens_per_step: tokens that a forward pass fills, at least 1; more where T is small.
        price: tokens that a further forward pass must be expected to set right, above 0.
        pool_factor: at least 1. Above 1, T is what the rows of a batch may take on average: what finished rows leave
            goes to the others, of which each takes at most pool_factor * T. A row then depends on its batch.
        top_p, top_k: of sampling, see `token_sampling.sample_tokens`.
        mask_token_id: None if every `step` is given it.
    Raises:
        ValueError: a field out of its range.
    Source: ours; see docs/judging.md.
    """

    order = 1  # diffusers: forward passes per timestep. The order of revealing is config.order.
    needs_quality = True
    can_remask = True

    @register_to_config
    def __init__(
        self,
        order: str = "confidence",
        temperature: float = 0.0,
        repair_temperature: float = 1.0,
        quality_threshold: float = 0.95,
        tokens_per_step: int = 4,
        price: float = 0.05,
        pool_factor: int = 1,
        top_p: float | None = None,
        top_k: int | None = None,
        mask_token_id: int | None = None,
    ):
        check_config(self.config)
        heat, bar = repair_temperature, quality_threshold
        require(is_number(heat, 0), "repair_temperature", heat, "a number of at least 0")
        require(is_number(bar, 0, 1) and bar > 0, "quality_threshold", bar, "a number in (0, 1]")
        require(is_int(tokens_per_step, 1), "tokens_per_step", tokens_per_step, "an integer of at least 1")
        require(is_number(price, 0) and price > 0, "price", price, "a number above 0")
        require(is_int(pool_factor, 1), "pool_factor", pool_factor, "an integer of at least 1")
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None
        self._rows: _Rows | None = None

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        block_length: int | None = None,
    ) -> None:
        """Begin a run of at most `num_inference_steps` steps. As `PrismScheduler.set_timesteps`.

        Raises:
            ValueError: fewer than 2, one to fill and one to judge; in `PrismPipeline` that is 2 for each block.
        """
        check_run(num_inference_steps, block_length)
        enough = "at least 2 for JudgeAndRepairScheduler, one to fill the canvas (or each block) and one to judge it"
        require(num_inference_steps > 1, "num_inference_steps", num_inference_steps, enough)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps * self.config.pool_factor)
        self._rows = None

    def step(
        self,
        model_output,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        quality: Tensor | None = None,
        generation_mask: Tensor | None = None,
        mask_token_id: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PrismSchedulerOutput | tuple[Tensor, ...]:
        """Fill masks of rows that have some; judge rows that have none. As `PrismScheduler.step`.

        `quality` is read in rows without a mask only. NaN counts as right. `temperature` is that of filling.

        Returns:
            `PrismSchedulerOutput` with all its fields.
        Raises:
            ValueError: also if `quality` is None.
        """
        index, generation_mask, mask_token_id = read_step(
            self.config, self.timesteps, model_output, timestep, sample, generation_mask, mask_token_id
        )
        heat, top_p, top_k = read_sampling(self.config, temperature, top_p, top_k)
        given = None if quality is None else f"{quality.dtype} {tuple(quality.shape)}"
        fits = quality is not None and quality.is_floating_point() and quality.shape == sample.shape
        require(fits, "quality", given, f"the quality head's probabilities, floats {tuple(sample.shape)}, as `sample`")
        masked = generation_mask & (sample == mask_token_id)  # (B, L)
        if index == 0 or self._rows is None or self._rows.best.shape != sample.shape:
            budget = self.num_inference_steps - index
            self._rows = _Rows.begin(sample, masked, generation_mask, self.config.tokens_per_step, budget)
        rows = self._rows
        left = rows.passes_left(generation_mask, len(self.timesteps) - 1 - index)
        verdict = rows.judge(self.config, sample, quality, generation_mask, masked, left)
        finished, accepted, remasked, restored, judged = verdict

        n = rows.due(masked, left)
        u_order, u_token = uniform_at(generation_mask, 2, generator)
        tokens, probs = sample, torch.zeros(sample.shape, device=sample.device)
        unmasked = torch.zeros_like(masked)
        for again in (False, True):  # rows that are filled, and rows that are repaired: two temperatures
            some = masked & (rows.repairing == again)[:, None]
            sampling = (self.config.repair_temperature if again else heat, top_p, top_k)
            penalty = (rows.rejected, rows.penalty) if again else None
            new, drawn, drawn_probs = reveal(
                model_output,
                some,
                n,
                self.config.order,
                *sampling,
                mask_token_id,
                u_order,
                u_token,
                self.config.quality_threshold if self.config.order == "confidence" else None,
                penalty,
            )
            tokens = tokens.masked_scatter(new, drawn.to(sample.dtype))
            probs, unmasked = probs.masked_scatter(new, drawn_probs), unmasked | new
        prev_sample = torch.where(restored, rows.best, tokens).masked_fill(remasked, mask_token_id)
        output = PrismSchedulerOutput(
            prev_sample,
            unmasked,
            remasked,
            tokens[unmasked].long(),
            probs[unmasked],
            finished,
            accepted,
            restored,
            judged,
        )
        return output if return_dict else output.to_tuple()


@dataclass
class _Rows:
    """Where each row of a run stands. B rows, L positions.

    Args:
        purse: passes that the rows have left, together, int64 (). One that takes no part spends none.
        masks, steps, done: masks at the start of the present filling, passes it takes, and those made, int64 (B,).
        pace: tokens that a pass fills, int64 (B,).
        repairing: is it a repair? bool (B,).
        finished: rows that are, bool (B,).
        best, best_quality: the canvas of the largest expected number of right tokens, (B, L), and its quality, -1 at
            first.
        rejected, penalty: those tokens, int64 (B, L), and what is taken off their logits, float32 (B, L).
        repairs, promised: repairs begun, int64 (B,), and the gain that the present one promised, float32 (B,).
        delivered: shares of their promises that the repairs kept, in sum, float32 (B,).
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
    def begin(cls, sample: Tensor, masked: Tensor, generation_mask: Tensor, tokens_per_step: int, budget: int) -> _Rows:
        """Rows whose masks (B, L) are to be filled, and then repaired, in `budget` passes, on average if they pool."""
        masks, blank = masked.sum(-1), torch.zeros(sample.shape, device=sample.device)
        steps = _quotient(masks, tokens_per_step).clamp(1, max(1, budget // 2))
        no = torch.zeros_like(masks, dtype=torch.bool)
        return cls(
            purse=budget * generation_mask.any(-1).sum(),
            masks=masks,
            steps=steps,
            done=torch.zeros_like(masks),
            pace=_quotient(masks, steps).clamp(min=1),
            repairing=no,
            finished=no,
            best=sample,
            best_quality=blank - 1,
            rejected=sample.long(),
            penalty=blank,
            repairs=torch.zeros_like(masks),
            promised=blank.sum(-1),
            delivered=blank.sum(-1),
        )

    def passes_left(self, generation_mask: Tensor, most: int) -> Tensor:
        """How many passes each row at work can take after this one, at most `most`, int64 ()."""
        rows = (generation_mask.any(-1) & ~self.finished).sum().clamp(min=1)
        self.purse = self.purse - rows
        return (self.purse // rows).clamp(0, most)

    def due(self, masked: Tensor, left: Tensor) -> Tensor:
        """How many of the masks (B, L) each row fills in this pass, int64 (B,), `left` passes before the last."""
        rest, filling = masked.sum(-1), masked.any(-1)
        after = self.masks - _quotient(self.masks * (self.done + 1), self.steps)
        self.done = self.done + filling
        ends = self.done >= self.steps
        return torch.where(ends | (left == 0), rest, (rest - after).clamp(min=1))

    def judge(
        self, config, sample: Tensor, quality: Tensor, generation_mask: Tensor, masked: Tensor, left: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Steps 2 to 5 of the algorithm in rows without a mask; the repair is filled in the passes that follow.

        Returns:
            finished and accepted, bool (B,); remasked and restored, bool (B, L); judged, float32 (B, L).
        """
        bar, price = config["quality_threshold"], config["price"]
        full = generation_mask.any(-1) & ~masked.any(-1) & ~self.finished  # (B,)
        at = generation_mask & full[:, None]  # (B, L)
        q = quality.float().nan_to_num(1.0).clamp(0, 1).masked_fill(~at, 0)
        brought = (q.sum(-1) - (self.best_quality * at).sum(-1)) * full
        better = brought > 0
        self.best = torch.where(better[:, None], sample, self.best)
        self.best_quality = torch.where(better[:, None], q, self.best_quality)
        self.delivered = self.delivered + ((brought / self.promised).clamp(0, 1) * (self.repairs > 0)).nan_to_num(0.0)

        doubtful = at & (q < bar)
        gain, passes = ((bar - q) * doubtful).sum(-1), _quotient(doubtful.sum(-1), self.pace) + 1
        accepted = full & (gain < price * passes)
        failed = self.repairs - self.delivered
        doubtful = at & (q < 1 - (1 - bar) / (1 + failed)[:, None])
        chosen = lowest(q, doubtful, self.pace * (left - 1).clamp(min=0))
        gain, passes = ((bar - q).clamp(min=0) * chosen).sum(-1), _quotient(chosen.sum(-1), self.pace) + 1
        kept = (PATIENCE + self.delivered) / (PATIENCE + self.repairs)
        repair = full & ~accepted & chosen.any(-1) & (kept * gain >= price * passes)

        ended = full & ~repair
        judged = torch.where(accepted[:, None], q, self.best_quality)
        judged = judged.masked_fill(~(at & ended[:, None]), torch.nan)
        restored = at & (ended & ~accepted)[:, None] & (self.best != sample)
        ended = ended | (generation_mask.any(-1) & ~self.finished & (left == 0))
        self.finished = self.finished | ended

        remasked = chosen & repair[:, None]
        self.masks = torch.where(repair, remasked.sum(-1), self.masks)
        self.steps = torch.where(repair, passes - 1, self.steps)
        self.done = self.done.masked_fill(repair, 0)
        self.repairing = self.repairing | repair
        self.promised = torch.where(repair, gain, self.promised)
        self.repairs = self.repairs + repair
        self.rejected = torch.where(remasked, sample.long(), self.rejected)
        off = torch.logit(torch.tensor(SURE)).item() - q.clamp(EDGE, 1 - EDGE).logit()
        self.penalty = torch.where(repair[:, None], (off * remasked).clamp(min=0), self.penalty)
        return ended, accepted, remasked, restored, judged


def _quotient(a: Tensor, b: Tensor | int) -> Tensor:
    """ceil(a / b) of integers, for a >= 0."""
    return (a + b - 1) // b
