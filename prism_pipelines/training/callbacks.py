"""What a training run writes down besides its weights: parts of the loss, the head on held-out data, puzzles solved."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import sudoku
from ..atomic_files import write_atomically
from ..evaluation.plots import reliability_figure
from ..evaluation.statistics import calibration_measures
from ..models.checks import max_length
from ..pipeline_prism import PrismPipeline
from ..schedulers import MDLMScheduler
from .checkpointing import folder_of
from .data import HELD_OUT_SEED
from .losses import PRISMObjective

logger = logging.getLogger(__name__)

DRIFT_BATCHES = 16  # held-out batches on which the drift is measured, the first ones
DRIFT_TOKENS = 64  # most masks of a batch whose whole posterior is kept, V numbers each ...
DRIFT_NUMBERS = 2**21  # ... and most of these numbers: 8 MB a batch


def write_log(output_dir: str | Path, entry: dict) -> None:
    """Append one JSON object to `<output_dir>/training_log.jsonl`."""
    with (Path(output_dir) / "training_log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(output_dir: str | Path) -> list[dict]:
    """The entries that `write_log` wrote; the last one is left out if a kill cut it short."""
    file = Path(output_dir) / "training_log.jsonl"
    entries: list[dict] = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


class MetricsLog(TrainerCallback):
    """Appends each entry of the Trainer's log to `<output_dir>/training_log.jsonl`, one JSON object a line.

    An entry with a loss also gets the mean over steps and processes, since the last such entry, of every scalar that
    the objective returned (loss_mdm, loss_prism, accuracy, ...). The Trainer itself drops these. There is an entry at
    every checkpoint, and a resumed run deletes the entries after its checkpoint. So a run that was killed and resumed
    has the same log as one that was not.
    """

    def __init__(self, objective: torch.nn.Module) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        objective.register_forward_hook(self.collect)

    def collect(self, objective: torch.nn.Module, inputs: tuple, output: Mapping) -> None:
        """Forward hook: adds up the scalars of one training step, without waiting for the device."""
        if objective.training:
            for name, value in output.items():
                if isinstance(value, torch.Tensor):
                    self.sums[name] = self.sums.get(name, 0) + value.detach().float()
                    self.counts[name] = self.counts.get(name, 0) + 1

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Removes the entries after the step that the run is resumed from."""
        file = folder_of(args) / "training_log.jsonl"
        if state.is_world_process_zero:
            kept = [entry for entry in read_log(folder_of(args)) if entry["step"] <= state.global_step]
            kept = kept if state.global_step else []
            write_atomically(file, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Makes the Trainer log the loss in every step in which it writes a checkpoint."""
        control.should_log = control.should_log or control.should_save

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **_: Any
    ) -> None:
        """Called by the Trainer on every process; only the first one writes.

        Raises:
            FloatingPointError: the loss is NaN or inf.
        """
        entry = {"step": state.global_step, **(logs or {})}
        loss = entry.get("loss")
        if loss is not None and not torch.tensor(loss).isfinite():
            raise FloatingPointError(
                f"The loss is {loss} at step {state.global_step}. Lower --learning-rate, or check the data; the last "
                "checkpoint was written before this."
            )
        if loss is not None and self.counts:
            entry |= self.means()
            self.sums, self.counts = {}, {}
        if state.is_world_process_zero:
            write_log(folder_of(args), entry)

    def means(self) -> dict[str, float]:
        """Means of the scalars since the last entry; every process must call."""
        names = sorted(self.sums)
        values = torch.stack([self.sums[name] / self.counts[name] for name in names])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
            values /= torch.distributed.get_world_size()
        return {name: value for name, value in zip(names, values.tolist(), strict=True) if name != "loss"}


class SudokuProgress(TrainerCallback):
    """At every evaluation, solves held-out puzzles and logs the share solved by number of clues.

    Each puzzle is solved twice, in 52 forward passes: by the model alone in confidence order, and by the pipeline as it
    will be saved.

    Args:
        pipe: the pipeline of the modules that are trained.
        num_puzzles: puzzles of each number of clues.
        log: the Trainer's `log`, which passes an entry to `MetricsLog` and to trackers.
    """

    def __init__(self, pipe: PrismPipeline, num_puzzles: int, log: Callable[[dict], None]) -> None:
        self.pipe, self.log = pipe, log
        self.sets = {clues: sudoku.make_puzzles(num_puzzles, clues, HELD_OUT_SEED)[0] for clues in (44, 36, 30)}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer after each evaluation."""
        if not state.is_world_process_zero:
            return
        training = self.pipe.model.training
        self.pipe.model.eval()
        entry, scheduler = {}, self.pipe.scheduler
        for name, arm in (("confidence", MDLMScheduler(order="confidence", temperature=0.0)), ("pipeline", scheduler)):
            self.pipe.scheduler = arm
            for clues, puzzles in self.sets.items():
                out: Any = self.pipe(
                    infill=torch.from_numpy(sudoku.to_ids(puzzles)),
                    num_inference_steps=52,
                    generator=torch.Generator().manual_seed(0),
                    output_type="seq",
                )
                entry[f"solved_{name}_{clues}_clues"] = float(sudoku.is_solved(out.sequences.cpu(), puzzles).mean())
        self.pipe.scheduler = scheduler
        self.pipe.model.train(training)
        self.log(entry)


class TextProgress(TrainerCallback):
    """At every evaluation, writes texts with the pipeline as it is now, each with the page of its trace.

    The texts are in a log entry, and their pages in `<output_dir>/samples/step-<step>-<i>.html`.

    Args:
        pipe: the pipeline of the modules that are trained.
        prompts: given ids (before, after) of each text, int64 (P,) and (Q,); of length 0 for a text from nothing.
        gen_length: tokens to write, in half as many forward passes; fewer if the model's maximum length is reached.
    """

    def __init__(self, pipe: PrismPipeline, prompts: list[tuple[torch.Tensor, torch.Tensor]], gen_length: int) -> None:
        self.pipe, self.prompts, self.gen_length = pipe, prompts, gen_length

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer after each evaluation."""
        if not state.is_world_process_zero:
            return
        training, device = self.pipe.model.training, self.pipe.device
        texts: list[str] = []
        self.pipe.model.eval()
        (folder_of(args) / "samples").mkdir(exist_ok=True)
        limit = max_length(self.pipe.model.config) or sys.maxsize
        for number, (before, after) in enumerate(self.prompts):
            gen_length = min(self.gen_length, limit - len(before) - len(after))
            if gen_length < 1:
                continue
            masks = torch.full((gen_length,), self.pipe.mask_token_id)
            given: dict = {"input_ids": before[None].to(device), "gen_length": gen_length}
            if len(after) or not len(before):
                given = {"infill": torch.cat([before, masks, after])[None].to(device)}
            out: Any = self.pipe(
                **given,
                num_inference_steps=max(1, gen_length // 2),
                generator=torch.Generator().manual_seed(number),
                return_trace=True,
            )
            texts += out.texts
            page = folder_of(args) / "samples" / f"step-{state.global_step}-{number}.html"
            out.trace.to_html(page, title=f"Step {state.global_step}")
        self.pipe.model.train(training)
        write_log(folder_of(args), {"step": state.global_step, "texts": texts})


class HeadProgress(TrainerCallback):
    """At every evaluation, measures the head and the backbone on held-out examples, and logs it.

    Each example is masked, and k masks are filled as in training. The noise is the same every time, so that entries can
    be compared:

        eval_loss_prism, eval_loss_mdm    the two parts of the loss
        eval_auroc, eval_ece              of the head at the filled tokens; chance is 0.5, and 0 is calibrated
        eval_share_right                  share of filled tokens that are right
        eval_posterior_drift              mean KL(before || now) of the unmasking posterior at masks, in nats, where
                                          "before" is the model before the first step; from the first
                                          `DRIFT_BATCHES` batches, where the other measures are from all

    Args:
        objective: the `PRISMObjective` that is trained.
        batches: held-out batches, as the objective takes them.
        log: the Trainer's `log`, which passes an entry to `MetricsLog` and to trackers.
        progress: show a bar over the batches on stderr, in the first process.
    """

    def __init__(
        self,
        objective: PRISMObjective,
        batches: list[dict[str, torch.Tensor]],
        log: Callable[[dict], None],
        progress: bool = False,
    ) -> None:
        self.objective, self.batches, self.log = objective, batches, log
        self.base: torch.Tensor | None = None  # the posterior before the first step
        self.progress = progress

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Computes the posterior that the drift is measured from; a resumed run reads it from the first run's file."""
        file = folder_of(args) / "base_posterior.safetensors"
        if state.global_step == 0:
            entry = self.measure()
            self.base = self.now
            if state.is_world_process_zero:
                write_atomically(file, save({"log_probs": self.now, "batches": self.digest()}))
            self.log(entry | {"eval_posterior_drift": 0.0})
        elif not file.is_file():
            logger.warning("%s is gone, so eval_posterior_drift is left out from now on.", file)
        elif not torch.equal((saved := load_file(file)).get("batches", torch.empty(0)), self.digest()):
            logger.warning("The held-out batches are others now, so eval_posterior_drift is left out from now on.")
        else:
            self.base = saved["log_probs"]

    def digest(self) -> torch.Tensor:
        """Hash of the batches for the drift, uint8 (32,): a stored posterior is valid for these batches only."""
        sha = hashlib.sha256()
        for batch in self.batches[:DRIFT_BATCHES]:
            for name, value in sorted(batch.items()):
                sha.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())
        return torch.tensor(list(sha.digest()), dtype=torch.uint8)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer after each evaluation, on every process."""
        entry = self.measure()
        if self.base is not None:
            # Forbidden ids have log-probability -inf in both, and the difference would be NaN; they add nothing.
            terms = torch.where(self.base.isneginf(), 0.0, self.base.exp() * (self.base - self.now))
            entry["eval_posterior_drift"] = float(terms.sum(-1).mean())
        self.log(entry)
        if state.is_world_process_zero:
            self.draw(folder_of(args) / "calibration.png")

    def draw(self, path: Path) -> None:
        """The calibration figure of the model card, from the last `measure`."""
        try:
            reliability_figure({"held-out tokens": self.score["reliability"]}, path)
        except ImportError as error:
            logger.warning("The model card gets no calibration figure. %s", error)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """All measures but the drift. For that, `now` gets the posterior at the first masks of each batch."""
        objective, device = self.objective, self.objective.denoiser.suppressed.device
        few = min(DRIFT_TOKENS, DRIFT_NUMBERS // objective.denoiser.vocab_size)
        training = objective.training
        objective.eval()
        outputs = []
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        bar = tqdm(self.batches, "head on held-out examples", leave=False, disable=not (self.progress and first))
        for number, batch in enumerate(bar):
            batch = {name: value.to(device) for name, value in batch.items()}
            noise = torch.Generator().manual_seed(number)
            kept = few if number < DRIFT_BATCHES else 0
            out = objective(**batch, generator=noise, part="measure", num_log_probs=kept)
            outputs.append({name: value.cpu() for name, value in out.items()})
        objective.train(training)
        quality, right, self.now = (
            torch.cat([out[name] for out in outputs]) for name in ("quality", "right", "log_probs")
        )
        if not len(quality):
            raise ValueError(
                f"None of the {sum(len(batch['input_ids']) for batch in self.batches)} held-out examples had a masked "
                "token to judge: raise --num-eval-examples, or pass --eval-strategy no."
            )
        if not quality.isfinite().all():
            raise FloatingPointError(
                "The head's output contains NaN or inf on held-out examples. Lower --learning-rate."
            )
        self.score = score = calibration_measures(quality.sigmoid().numpy(), right.numpy())
        return {
            "eval_loss_prism": float(binary_cross_entropy_with_logits(quality, right.float())),
            "eval_loss_mdm": float(torch.stack([out["loss_mdm"] for out in outputs]).mean()),
            "eval_auroc": score["auroc"],
            "eval_ece": score["ece"],
            "eval_share_right": float(right.float().mean()),
        }
