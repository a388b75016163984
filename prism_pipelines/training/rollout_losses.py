"""Losses of a quality head on the states that the model's own runs pass through, see `rollouts.py`.

There are two labels. If the given tokens determine the answer, a visible token is right if it is the true one. In free
text another token than the true one is not wrong. There the label is the model's own leave-one-out posterior
log p(y_i | all other tokens), and no data is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers.utils import ModelOutput

from ..evaluation.statistics import rank_correlation
from ..models.denoiser import MaskedDenoiser
from ..schedulers.context import RunContext, forget
from ..schedulers.functional import uniform
from .head_start import first_guess, fit_skip
from .loss_terms import mean_where, share_of_all, split_positions
from .losses import PRISMObjective, PRISMOutput
from .rollouts import Rollout, RolloutPool, RolloutSettings

logger = logging.getLogger(__name__)

LABELS = ("truth", "posterior")
STATES = ("one_step", "rollout", "mixed")
DISTILL_LOSSES = ("squared", "bce")
WARM_UP = 16  # forward passes before the first step, so that no training begins on empty rows
FEW = 16  # written tokens of which at least two are to differ
PROBES = 128  # tokens on which a stride is compared with brute force
ENOUGH = 0.99  # rank correlation of a stride that is wide enough


@dataclass
class RolloutOutput(ModelOutput):
    """What `RolloutObjective` returns on rollouts. All are scalars; all but `loss` are detached.

    Args:
        loss: float32, to be minimised: loss_head + lambda_mdm * loss_mdm.
        loss_head: mean loss of the head at the judged tokens.
        loss_mdm: as `MDMOutput.loss`; None if the backbone is frozen.
        label: mean label: share of judged tokens that are right, or mean log-probability.
        quality: mean predicted quality of judged tokens.
        num_judged: judged tokens.
        stride: s, where every s-th position is masked for the label; None for the label "truth".
        drawn: from `predict` only: what `judge` takes.
    """

    loss: Tensor | None = None
    loss_head: Tensor | None = None
    loss_mdm: Tensor | None = None
    label: Tensor | None = None
    quality: Tensor | None = None
    num_judged: Tensor | None = None
    stride: Tensor | None = None
    drawn: list | None = None


@torch.no_grad()
def log_posterior(
    denoiser: MaskedDenoiser,
    sample: Tensor,
    positions: Tensor,
    attention_mask: Tensor | None = None,
    chunk_size: int = 4096,
) -> Tensor:
    """log p(y_i | y without `positions`), by one forward pass in which all of these are masked.

    With one position per row this is the leave-one-out posterior. With more, none of them sees the others.

    Args:
        denoiser: of the model.
        sample: canvas y, int64 (B, L).
        positions: visible tokens, bool (B, L), N of them.
        attention_mask: (B, L) or None.
        chunk_size: rows of logits kept at once.
    Returns:
        float32 (N,), in row-major order.
    """
    hidden = denoiser.hidden(sample.masked_fill(positions, denoiser.spec.mask_token_id), attention_mask)
    found = []
    for part in split_positions(positions, chunk_size):
        log_probs = denoiser.logits(hidden, part).float().log_softmax(-1)
        found.append(log_probs.gather(-1, sample[part][:, None])[:, 0])
    return torch.cat(found)


def every(stride: int, offset: Tensor, length: int) -> Tensor:
    """Positions i with i = offset modulo stride, bool (B, L), for offsets (B,)."""
    return (torch.arange(length, device=offset.device) - offset[:, None]) % stride == 0


@torch.no_grad()
def compare_stride(
    denoiser: MaskedDenoiser,
    sample: Tensor,
    visible: Tensor,
    stride: int,
    attention_mask: Tensor | None = None,
    probes: int = PROBES,
) -> float:
    """Rank correlation of strided labels with brute force, one forward pass a token, on tokens chosen at random.

    1 where there is nothing to rank.

    Args:
        denoiser, attention_mask: as `log_posterior`.
        sample, visible: canvas (B, L), and its tokens that are judged.
        stride: at least 1.
        probes: tokens compared, at most.
    """
    row, column = visible.nonzero(as_tuple=True)
    chosen = uniform((len(row),), None, row.device).argsort()[:probes]
    row, column = row[chosen], column[chosen]
    exact, strided = [], []
    for rows, columns in zip(row.split(len(sample)), column.split(len(sample)), strict=True):
        own = every(sample.shape[1], columns, sample.shape[1])
        masks = None if attention_mask is None else attention_mask[rows]
        exact.append(log_posterior(denoiser, sample[rows], own, masks))
        together = visible[rows] & every(stride, columns % stride, sample.shape[1])
        strided.append(log_posterior(denoiser, sample[rows], together, masks)[own[together]])
    both = [torch.cat(values).cpu().numpy() for values in (exact, strided) if values]
    found = rank_correlation(*both) if both else None
    return 1.0 if found is None else found


def label_loss(logits: Tensor, labels: Tensor, label: str, distill_loss: str, label_floor: float) -> Tensor:
    """The loss of each judged token, (N,), from the head's logits and the labels, (N,) each.

    Args:
        label, distill_loss, label_floor: as `RolloutObjective`.
    """
    if label == "truth":
        return binary_cross_entropy_with_logits(logits, labels, reduction="none")
    if distill_loss == "bce":
        return binary_cross_entropy_with_logits(logits, labels.exp(), reduction="none")
    return (logsigmoid(logits) - labels.clamp(min=label_floor)).square()


class RolloutObjective(PRISMObjective):
    """The loss of a head at the visible tokens of a run that is under way. The run then makes one more step.

    Label "truth":     BCE(out_i, 1[y_i = x_i]) at all visible generated tokens. Its minimiser is P(x_i = y_i | y and
                       what the head knows of the run), under the law of the sampler.
    Label "posterior": (logsigmoid(out_i) - max(log p(y_i | rest of y), floor))^2 at every s-th position. One more
                       forward pass, with these positions masked, gives log p. The other choice, BCE with p as a soft
                       label, does not distinguish very low values of p, which matter for remasking.

    Both are proved by enumeration in tests/test_prism_theory.py. The average is over the judged tokens of all
    processes together. With a backbone that is trained too, lambda_mdm times the masked diffusion loss of the batch is
    added, at the cost of its own forward pass.

    A head that reads a run context must also judge texts whose sampling was not recorded. So a share of the rows is
    judged without their context.

    Args:
        denoiser, quality_head: as `PRISMObjective`; the head is a `QualityHead`.
        settings: of the runs.
        num_runs: runs in a batch.
        num_pools: batches of one step (gradient accumulation); each has a pool of its own.
        label: "truth" or "posterior".
        states: "rollout"; or "mixed": every other batch is that of `PRISMObjective`.
        stride: s of "posterior"; widened until it agrees with brute force, see `compare_stride`.
        distill_loss: "squared" or "bce".
        label_floor: log-probabilities below count as this.
        forget_share: rows judged without their context, in [0, 1].
        Others as `PRISMObjective`.
    Raises:
        ValueError: an unknown choice or a number out of range; or "posterior" with a backbone that is trained, since
            an adapter would change the posterior that it is to be taught.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        quality_head: nn.Module,
        *,
        settings: RolloutSettings,
        num_runs: int = 4,
        num_pools: int = 1,
        label: str = "truth",
        states: str = "rollout",
        stride: int = 16,
        distill_loss: str = "squared",
        label_floor: float = -12.0,
        forget_share: float = 0.1,
        **prism: Any,
    ) -> None:
        super().__init__(denoiser, quality_head, **prism)
        for name, value, choices in (
            ("label", label, LABELS),
            ("states", states, STATES[1:]),
            ("distill_loss", distill_loss, DISTILL_LOSSES),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")
        for name, count in (("num_runs", num_runs), ("num_pools", num_pools), ("stride", stride)):
            if count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}.")
        if not label_floor < 0:
            raise ValueError(f"`label_floor` must be a log-probability below 0, got {label_floor}.")
        if not 0 <= forget_share <= 1:
            raise ValueError(f"`forget_share` must be in [0, 1], got {forget_share}.")
        if label == "posterior" and not self.freeze_backbone:
            raise ValueError(
                "`--objective distill` needs a frozen backbone: an adapter would change the posterior that the head is "
                "taught. Leave out --full and LoRA's flags."
            )
        self.settings, self.num_runs, self.num_pools = settings, num_runs, num_pools
        self.label, self.states, self.stride = label, states, stride
        self.distill_loss, self.label_floor, self.forget_share = distill_loss, label_floor, forget_share
        self.pools: list[RolloutPool] = []
        self.turn = 0  # batches so far
        self.stride_checked: float | None = None  # rank correlation of the stride

    def new_pool(self, reads_more: Iterable[str] = ()) -> RolloutPool:
        """An empty pool of these settings."""
        reads = dict.fromkeys((*self.quality_head.reads_context, *reads_more))
        return RolloutPool(self.denoiser, reads, self.settings, self.num_runs)

    def corrupt(
        self,
        input_ids: Tensor,
        trainable_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple:
        """What a batch is trained on: (z, masked, rate) of `PRISMObjective`, then the pool, and its judged tokens.

        The first three are None for a frozen backbone, the last two left out for a one-step batch of "mixed".
        """
        turn, self.turn = self.turn, self.turn + 1
        one_step = self.states == "mixed" and turn // self.num_pools % 2 == 1
        clean: tuple = (None, None, None)
        if one_step or not self.freeze_backbone:
            clean = super().corrupt(input_ids, trainable_mask, attention_mask, generator)
        if one_step:
            return clean
        batch: dict[str, Any] = {"input_ids": input_ids, "trainable_mask": trainable_mask}
        batch["attention_mask"] = attention_mask
        while len(self.pools) <= turn % self.num_pools:
            self.pools.append(self.warmed_up(batch))
        pool = self.pools[turn % self.num_pools]
        pool.refill(**batch)
        return (*clean, pool, self.judged(pool))

    def warmed_up(self, batch: dict) -> RolloutPool:
        """A pool whose runs have made some steps.

        On the first pool the stride of the label is checked, and a new head's linear start is fitted. A map that is
        trained already, such as that of `--head-from`, stays: a fit on a few states would make it worse.
        """
        pool = self.new_pool()
        self.check_start(batch)
        with torch.no_grad():
            for _ in range(WARM_UP):
                pool.refill(**batch)
                self.look(pool)
            self.check_written(pool)
            if self.label == "posterior" and self.stride_checked is None:
                self.check_stride(pool)
            skip = getattr(self.quality_head, "context_skip", None)
            if not self.pools and skip is not None and not skip.weight.any():
                self.fit_start(pool, batch)
        return pool

    def fit_start(self, pool: RolloutPool, batch: dict) -> None:
        """Fits the linear start of the head on the tokens that are judged in some steps; all processes get the same."""
        found = []
        for _ in range(WARM_UP):
            pool.refill(**batch)
            found.append(self.judge_runs(pool, self.judged(pool)))
        logits, features, labels = (torch.cat(part) for part in zip(*found, strict=True))
        guess = first_guess(self.quality_head.reads_context, self.label)
        fit_skip(self.quality_head, logits, features, labels, self.head_loss, guess)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for parameter in (self.quality_head.context_skip.weight, self.quality_head.out.bias):
                torch.distributed.broadcast(parameter.data, 0)

    def check_start(self, batch: dict) -> None:
        """Checks that runs of these rows can teach something.

        Raises:
            ValueError: the label is the truth, and nothing is given that would determine it; or a stride that is longer
                than the rows.
        """
        ids, trainable = batch["input_ids"], batch["trainable_mask"]
        nothing_given = trainable is None or bool(trainable.all())
        if self.label == "truth" and nothing_given and self.settings.mask_rate_min == 1:
            raise ValueError(
                "`--states rollout` needs rows with a given part: from nothing, what the model writes says nothing of "
                "the data. Pass prompts with answers, lower --mask-rate-min, or take --objective distill."
            )
        if self.label == "posterior" and self.stride > ids.shape[1]:
            raise ValueError(
                f"`--label-stride` is {self.stride}, and the rows have {ids.shape[1]} tokens. Pass at most that."
            )

    def check_written(self, pool: RolloutPool) -> None:
        """Checks that the model writes more than one token.

        Raises:
            ValueError: it does not (such as end tokens alone), so there is nothing to learn.
        """
        written = torch.cat([run.sample[run.judged] for run in pool.runs])
        if len(written) >= FEW and len(written.unique()) == 1:
            raise ValueError(
                f"The model wrote nothing but the token {int(written[0])} in {len(written)} places, so a head has "
                "nothing to learn. Pass a --dataset of prompts, or another --max-length."
            )

    def check_stride(self, pool: RolloutPool) -> None:
        """Doubles the stride until its labels rank tokens almost as brute force does, and logs the result."""
        sample, attention_mask = pool.batch()
        visible = torch.cat([pool.padded(run.judged, sample.shape[1], False) for run in pool.runs])
        length = sample.shape[1]
        while True:
            found = compare_stride(self.denoiser, sample, visible, self.stride, attention_mask)
            logger.warning("Labels by stride %d: rank correlation %.4f with brute force.", self.stride, found)
            if found > ENOUGH or self.stride >= length:
                break
            self.stride = min(2 * self.stride, length)
        self.stride_checked = found

    def judged(self, pool: RolloutPool) -> list[Tensor]:
        """The tokens of each run that have a label in this step, bool (R, L)."""
        chosen = []
        for run in pool.runs:
            judged = run.judged
            if self.label == "posterior":
                offset = (uniform((len(judged),), None, judged.device) * self.stride).long()
                judged = judged & every(self.stride, offset, judged.shape[1])
            else:
                judged = judged & (run.clean != self.denoiser.spec.mask_token_id)
            chosen.append(judged)
        return chosen

    def counts(
        self,
        corrupted: tuple,
        input_ids: Tensor,
        trainable_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As `PRISMObjective.counts`."""
        if len(corrupted) == 3:
            return super().counts(corrupted, input_ids, trainable_mask, attention_mask)
        zero = torch.zeros((), device=input_ids.device)
        counts = {"tokens": zero, "masked": zero}
        if corrupted[1] is not None:  # not that of PRISMObjective, which counts revealed tokens too
            counts = super(PRISMObjective, self).counts(corrupted, input_ids, trainable_mask, attention_mask)
        return counts | {"judged": sum(chosen.sum() for chosen in corrupted[4]).float()}

    def predict(  # type: ignore[override]  # on rollouts the loss has other parts
        self,
        input_ids: Tensor,
        trainable_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        corrupted: tuple | None = None,
        totals: dict[str, Tensor] | None = None,
    ) -> PRISMOutput | RolloutOutput:
        """The masked diffusion loss of the batch, where the backbone is trained; see `PRISMObjective.predict`."""
        corrupted = corrupted or self.corrupt(input_ids, trainable_mask, attention_mask, generator)
        if len(corrupted) == 3:
            batch = (input_ids, trainable_mask, attention_mask, generator)
            return super().predict(*batch, corrupted=corrupted, totals=totals)
        if self.freeze_backbone:
            return RolloutOutput(drawn=[[True]])
        z, masked, rate, _, _ = corrupted
        hidden = self.denoiser.hidden(z, attention_mask)
        loss, _ = self.mdm_loss(hidden, input_ids, masked, rate, attention_mask, totals)
        return RolloutOutput(self.lambda_mdm * loss, loss_mdm=loss.detach(), drawn=[[True]])

    def judge(  # type: ignore[override]  # on rollouts the loss has other parts
        self,
        input_ids: Tensor,
        trainable_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        corrupted: tuple,
        drawn: list,
        totals: dict[str, Tensor] | None = None,
    ) -> PRISMOutput | RolloutOutput:
        """The head's loss at the judged tokens of the runs, each of which makes a step. See `PRISMObjective.judge`.

        Random numbers of the runs come from torch's default generator.
        """
        if len(corrupted) == 3:
            batch = (input_ids, trainable_mask, attention_mask)
            return super().judge(*batch, corrupted=corrupted, drawn=drawn, totals=totals)
        logits, _, labels = self.judge_runs(corrupted[3], corrupted[4])
        total = self.head_loss(logits, labels).sum()
        count, everywhere = logits.new_tensor(logits.numel()), torch.ones_like(labels, dtype=torch.bool)
        return RolloutOutput(
            total / share_of_all(count, (totals or {}).get("judged")) + self.untouched(),
            loss_head=total.detach() / count.clamp(min=1),
            label=mean_where(labels, everywhere),
            quality=mean_where(logits.sigmoid(), everywhere),
            num_judged=count.long(),
            stride=count.new_tensor(self.stride) if self.label == "posterior" else None,
        )

    def head_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each judged token, float32 (N,), from the head's logits and the labels, (N,) each."""
        return label_loss(logits, labels, self.label, self.distill_loss, self.label_floor)

    def judge_runs(self, pool: RolloutPool, judged: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the head says of the judged tokens of all runs, and their labels. Then each run makes a step.

        Returns:
            the head's logits (N,), the channels of the context that it read (N, F), labels (N,); all float32.
        """
        samples = [run.sample for run in pool.runs]
        found, attention_mask = None, pool.batch()[1]
        if self.label == "posterior":
            with torch.no_grad():
                sample = pool.batch()[0]
                positions = torch.cat([pool.padded(chosen, sample.shape[1], False) for chosen in judged])
                found = log_posterior(self.denoiser, sample, positions, attention_mask, self.chunk_size)
        looks = [[part[chosen] for part in look] for look, chosen in zip(self.look(pool), judged, strict=True)]
        logits, features = (torch.cat(part).float() for part in zip(*looks, strict=True))
        if found is None:
            right = [
                (sample == run.clean)[chosen].float()
                for sample, run, chosen in zip(samples, pool.runs, judged, strict=True)
            ]
            found = torch.cat(right)
        return logits, features, found

    def look(self, pool: RolloutPool) -> list[tuple[Tensor, Tensor]]:
        """The head's logits (R, L) of each run, and the channels that it read, (R, L, F). Then each run makes a step.

        One forward pass on all runs gives them.
        """
        sample, attention_mask = pool.batch()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            hidden = self.denoiser.hidden(sample, attention_mask)
        found = []
        for run, part in zip(pool.runs, pool.parts(hidden), strict=True):
            logits, features, _ = self.judge_run(run, part)
            found.append((logits, features))
            pool.advance(run, part.detach(), logits.detach().sigmoid())
        return found

    def judge_run(self, run: Rollout, hidden: Tensor) -> tuple[Tensor, Tensor, RunContext]:
        """The head's logits (R, L) of one run, the channels that it read (R, L, F), and the context that they are of.

        While training, some rows lack their context.
        """
        context = run.recorder.observe(run.sample, hidden, run.at_work)
        if self.training and self.quality_head.reads_context:
            context = forget(context, uniform((len(hidden),), None, hidden.device) < self.forget_share)
        known = self.quality_head.inputs(context, run.sample, self.denoiser.spec.mask_token_id)
        logits = self.quality_head(hidden, run.canvas.attention_mask, **known)
        return logits, known.get("features", logits.new_empty((*logits.shape, 0))), context

    def state(self) -> dict[str, Tensor]:
        """The runs under way, for a checkpoint; the weights are not in it."""
        facts = torch.tensor([self.turn, self.stride, len(self.pools)])
        pools = {f"{i}/{name}": value for i, pool in enumerate(self.pools) for name, value in pool.state().items()}
        return pools | {"facts": facts}

    def load_state(self, state: dict[str, Tensor], device: torch.device | None = None) -> None:
        """Continue from the result of `state`."""
        self.turn, self.stride, count = state["facts"].tolist()
        self.stride_checked, self.pools = ENOUGH, [self.new_pool() for _ in range(count)]
        for i, pool in enumerate(self.pools):
            prefix = f"{i}/"
            pool.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, device)
