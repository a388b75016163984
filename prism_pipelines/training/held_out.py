"""A head on rollouts, measured on held-out runs: against scores that are free, and at a fitted temperature."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..evaluation.calibration import fit_temperature
from ..evaluation.detection import FREE_SCORES, NAMES, JudgedRow, best_free, detection_measures, detection_table
from ..schedulers.context import RunContext
from .rollout_losses import RolloutObjective, every, log_posterior
from .rollouts import Rollout, RolloutPool

logger = logging.getLogger(__name__)

SEED = 999_983  # of the held-out runs, every time the same
STATES = 3  # looks at each run while it is filled; full canvases are looked at besides
ROWS = {"truth": 192, "posterior": 24}  # held-out rows of a measurement; a posterior takes more passes to know
USEFUL = (0.05, 20.0)  # temperatures between which a head counts as calibrated
MEASURES = {"truth": "within", "posterior": "overlap"}  # what remasking needs: the order within a row
ADVICE = {  # what to use in place of a head that is no better
    "own": "Use SelfConfidenceScheduler.",
    "prompt": "Use PromptConfidenceScheduler.",
    "draw": "Use DrawConfidenceScheduler.",
}


@torch.no_grad()
def judged_rows(objective: RolloutObjective, batches: list[dict[str, Tensor]]) -> list[JudgedRow]:
    """States of held-out runs, each visible token with the head's quality at temperature 1, and the free scores.

    Args:
        objective: its head is measured on runs by its own settings.
        batches: of held-out rows, as the objective takes them.
    """
    training, device = objective.training, objective.denoiser.suppressed.device
    objective.eval()
    rows = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            objective.check_start(batch)
            pool = objective.new_pool(reads_more=FREE_SCORES)
            pool.refill(**batch)
            while not all(run.done for run in pool.runs):
                rows += one_step(objective, pool)
    objective.train(training)
    return rows


def one_step(objective: RolloutObjective, pool: RolloutPool) -> list[JudgedRow]:
    """One step of every run. Returns the judged rows of the runs that `is_looked_at` chooses."""
    sample, attention_mask = pool.batch()
    hidden, found = objective.denoiser.hidden(sample, attention_mask), []
    looks = [is_looked_at(run, every_full=objective.label == "truth") for run in pool.runs]
    labels: list = [None] * len(looks)
    if objective.label == "posterior" and any(looks):
        labels = pool.parts(leave_one_out(objective, pool, sample, attention_mask, looks))
    for run, part, look, label in zip(pool.runs, pool.parts(hidden), looks, labels, strict=True):
        logits, _, context = objective.judge_run(run, part)
        if look:
            label = run.sample == run.clean if label is None else label
            scores = {"head": logits.sigmoid()}
            scores |= {name: getattr(context, field).exp() for name, field in FREE_SCORES.items()}
            found += rows_of(run, scores, label, context)
        pool.advance(run, part, logits.sigmoid())
    return found


def is_looked_at(run: Rollout, every_full: bool) -> bool:
    """Is the present state of a run measured? About `STATES` states of each filling are, and full canvases.

    Args:
        run: under way, or done.
        every_full: measure every full canvas, and not only the last one and every third before it. A label by the
            posterior takes as many forward passes as its stride is wide.
    """
    if run.done or run.is_full:
        return not run.done and (every_full or run.repairs % 3 == 0)
    steps = run.segments[run.segment][1]
    return run.step > 0 and run.step * STATES // steps != (run.step - 1) * STATES // steps


def leave_one_out(
    objective: RolloutObjective, pool: RolloutPool, sample: Tensor, attention_mask: Tensor | None, looks: list[bool]
) -> Tensor:
    """p(y_i | other tokens) at the judged tokens, float32 (B, L), by the objective's stride; 0 elsewhere."""
    width, mask = sample.shape[1], objective.denoiser.spec.mask_token_id
    judged = torch.cat(
        [pool.padded(run.judged & look, width, False) for run, look in zip(pool.runs, looks, strict=True)]
    )
    found = torch.zeros(sample.shape, device=sample.device)
    rows = judged.any(-1)
    masks = None if attention_mask is None else attention_mask[rows]
    for offset in range(objective.stride):
        place = torch.full((len(sample),), offset, device=sample.device)
        now = judged & every(objective.stride, place, width)
        if now.any():
            log_p = log_posterior(objective.denoiser, sample[rows], now[rows], masks, objective.chunk_size)
            found[now] = log_p.exp()
    return found.masked_fill(sample == mask, 0.0)


def rows_of(run: Rollout, scores: dict[str, Tensor], label: Tensor, context: RunContext) -> list[JudgedRow]:
    """The rows of a run that have a judged token."""
    judged, mask, found = run.judged, run.recorder.denoiser.spec.mask_token_id, []
    judged = judged & (run.clean != mask) if label.dtype == torch.bool else judged
    work, age = run.at_work, context.now[:, None] - context.written_at
    for row in judged.any(-1).nonzero().flatten().tolist():
        here = judged[row]
        values = {name: score[row][here].float().nan_to_num(0.0).cpu().numpy() for name, score in scores.items()}
        fill = float((work[row] & (run.sample[row] != mask)).sum() / work[row].sum())
        found.append(JudgedRow(values, label[row][here].cpu().numpy(), fill, age[row][here].cpu().numpy()))
    return found


def fitted_temperature(rows: list[JudgedRow]) -> float | None:
    """The temperature of the head's logits, fitted on full canvases (on all rows if none is full).

    A label may be a probability. None if not both right and wrong tokens are there, or if the fit is not `USEFUL`.
    """
    full = [row for row in rows if row.fill == 1] or rows
    if not full:
        return None
    try:
        found = fit_temperature(
            np.concatenate([row.scores["head"] for row in full]), np.concatenate([row.right for row in full])
        )
    except ValueError as error:
        logger.warning("No temperature is fitted: %s", error)
        return None
    if not USEFUL[0] < found < USEFUL[1]:
        logger.warning("No temperature is kept: %.3g would be needed, so the head's quality says too little.", found)
        return None
    return round(found, 4)


def at_temperature(rows: list[JudgedRow], temperature: float | None) -> list[JudgedRow]:
    """The same rows with the head's quality at a temperature."""
    if temperature is None:
        return rows
    changed = []
    for row in rows:
        p = row.scores["head"].astype(np.float64).clip(1e-9, 1 - 1e-9)
        quality = 1 / (1 + np.exp(-np.log(p / (1 - p)) / temperature))
        changed.append(replace(row, scores=row.scores | {"head": quality}))
    return changed


class HeadReport:
    """Measures of a trained head: its temperature, and how it compares with the free scores.

    Args:
        objective: trained or not; its head's config is not changed.
        batches: held-out ones, of which the first `ROWS` rows are taken.
    """

    def __init__(self, objective: RolloutObjective, batches: list[dict[str, Tensor]]) -> None:
        few = batches[: -(-ROWS[objective.label] // len(batches[0]["input_ids"]))]
        rows = judged_rows(objective, few)
        self.measure, self.label = MEASURES[objective.label], objective.label
        self.temperature = fitted_temperature(rows)  # one number of thousands of tokens: as good on others
        self.rows = at_temperature(rows, self.temperature)
        uncalibrated = detection_measures(rows)
        self.uncalibrated_ece = uncalibrated["head"]["ece"] if uncalibrated else None
        self.found = uncalibrated if self.temperature is None else detection_measures(self.rows)

    @property
    def best_free(self) -> str | None:
        """The free score that orders the tokens of a row best."""
        return best_free(self.found, self.measure)

    @property
    def is_ahead(self) -> bool:
        """Does the head order the tokens of a row better than every free score?"""
        return self.found != {} and self.beats_free(self.measure)

    def beats_free(self, measure: str) -> bool:
        """Is the head's value of a measure higher than that of every free score?"""
        own = self.found["head"][measure]
        free = [self.found[name][measure] for name in FREE_SCORES if name in self.found]
        return own is not None and all(value is None or own > value for value in free)

    def metrics(self) -> dict[str, float]:
        """The measures for the log and the model card, by name."""
        if not self.found:
            return {}
        names = {"within": "eval_auroc_within", "pooled": "eval_auroc", "row": "eval_auroc_row", "ece": "eval_ece"}
        names |= {"overlap": "eval_overlap", "rank": "eval_rank"}
        entry = {names[name]: value for name, value in self.found["head"].items()}
        if self.best_free:
            entry[names[self.measure] + "_best_free"] = self.found[self.best_free][self.measure]
        return {name: value for name, value in entry.items() if value is not None}

    def verdict(self) -> str:
        """A few sentences: is the head recommended?"""
        names = {"within": "AUROC within a row", "overlap": "tokens among the lowest"}
        if not self.found or self.found["head"][self.measure] is None:
            return "Nothing can be said of this head: no held-out row had right and wrong tokens to be told apart."
        own, free = self.found["head"][self.measure], self.best_free
        if free is None:
            return f"The head has {own:.3f} ({names[self.measure]}); no free score could be measured."
        score = self.found[free][self.measure]
        if self.is_ahead:
            return f"The head is ahead of the best free score, {NAMES[free]}: {own:.3f} against {score:.3f}."
        behind = f"{NAMES[free]} orders the tokens of a row as well or better ({score:.3f} against {own:.3f})"
        if self.is_judge:
            return (
                "**To judge, not to rank**: the head says best which tokens and which rows are right, so take it with "
                f"a bar on its quality (JudgeAndRepairScheduler). But {behind}. {ADVICE[free][:-1]} to remask by rank."
            )
        return f"**This head is not recommended**: {behind}. {ADVICE[free][:-1]}, or train for more steps."

    @property
    def is_judge(self) -> bool:
        """Does the head judge tokens over all rows, and whole rows, better than every free score?"""
        return self.label == "truth" and self.beats_free("pooled") and self.beats_free("row")

    def table(self) -> str:
        """The measures as a Markdown table."""
        return detection_table(self.found) if self.found else "No held-out run had a token to judge."


class RolloutProgress(TrainerCallback):
    """At every evaluation, measures the head on held-out runs and logs it, see `HeadReport.metrics`.

    Args:
        objective: the objective that is trained.
        batches: held-out batches.
        log: the Trainer's `log`, which passes an entry to `MetricsLog` and to trackers.
    """

    def __init__(
        self, objective: RolloutObjective, batches: list[dict[str, Tensor]], log: Callable[[dict], None]
    ) -> None:
        self.objective, self.batches, self.log = objective, batches, log

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer at each evaluation, on every process."""
        self.log(HeadReport(self.objective, self.batches).metrics())
