"""What a training run writes down besides its weights: parts of the loss, the head on held-out data, puzzles solved."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import TrainerCallback

from . import sudoku
from .evaluation.sudoku import calibration
from .losses import PRISMObjective
from .pipeline_prism import PrismPipeline
from .schedulers import MDLMScheduler
from .training_data import HELD_OUT_SEED

logger = logging.getLogger(__name__)

DRIFT_TOKENS = 64  # masks a batch whose whole posterior is kept, V numbers each


def write_log(output_dir: str, entry: dict) -> None:
    """Append one JSON object to `<output_dir>/training_log.jsonl`."""
    with (Path(output_dir) / "training_log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


class MetricsLog(TrainerCallback):
    """Appends each entry of the Trainer's log to `<output_dir>/training_log.jsonl`, one JSON object a line.

    An entry of training also gets the mean of every scalar the objective returned since the last one (loss_mdm,
    loss_prism, accuracy, ...), which the Trainer itself drops.
    """

    def __init__(self, objective: torch.nn.Module):
        self.sums, self.count = {}, 0
        objective.register_forward_hook(self.collect)

    def collect(self, objective, inputs, output):
        """Forward hook: adds up the scalars of one training step, without waiting for the device."""
        if objective.training:
            for name, value in output.items():
                self.sums[name] = self.sums.get(name, 0) + value.detach().float()
            self.count += 1

    def on_log(self, args, state, control, logs=None, **_):
        """Called by the Trainer on every process; only the first one writes.

        Raises:
            FloatingPointError: the loss is no number any more.
        """
        entry = {"step": state.global_step, **(logs or {})}
        loss = entry.get("loss")
        if loss is not None and not torch.tensor(loss).isfinite():
            raise FloatingPointError(
                f"The loss is {loss} at step {state.global_step}. Lower --learning_rate, or check the data; the last "
                "checkpoint was written before this."
            )
        if loss is not None and self.count:
            entry |= {name: float(value) / self.count for name, value in self.sums.items() if name != "loss"}
            self.sums, self.count = {}, 0
        if state.is_world_process_zero:
            write_log(args.output_dir, entry)


class SudokuProgress(TrainerCallback):
    """At every evaluation, solves held-out puzzles and logs the share solved by number of clues.

    Two ways, 52 forwards each: the model alone in confidence order, and the pipeline as it will be saved.
    """

    def __init__(self, pipe: PrismPipeline, num_puzzles: int):
        self.pipe = pipe
        self.sets = {clues: sudoku.make_puzzles(num_puzzles, clues, HELD_OUT_SEED)[0] for clues in (44, 36, 30)}

    def on_evaluate(self, args, state, control, **_):
        """Called by the Trainer after each evaluation."""
        if not state.is_world_process_zero:
            return
        training = self.pipe.model.training
        self.pipe.model.eval()
        entry, scheduler = {"step": state.global_step}, self.pipe.scheduler
        for name, arm in (("confidence", MDLMScheduler(order="confidence", temperature=0.0)), ("pipeline", scheduler)):
            self.pipe.scheduler = arm
            for clues, puzzles in self.sets.items():
                out = self.pipe(
                    infill=torch.from_numpy(sudoku.to_ids(puzzles)),
                    num_inference_steps=52,
                    generator=torch.Generator().manual_seed(0),
                    output_type="seq",
                )
                entry[f"solved_{name}_{clues}_clues"] = float(sudoku.is_solved(out.sequences.cpu(), puzzles).mean())
        self.pipe.scheduler = scheduler
        self.pipe.model.train(training)
        write_log(args.output_dir, entry)
        logger.warning("%s", entry)


class HeadProgress(TrainerCallback):
    """At every evaluation, measures the head and the backbone on held-out examples, and logs it.

    Each example is masked and k masks are filled as in training, with the same noise every time, so entries compare:

        eval_loss_prism, eval_loss_mdm    the two parts of the loss
        eval_auroc, eval_ece              of the head at the filled tokens; chance is 0.5, and 0 is calibrated
        eval_share_right                  filled tokens that are right: what a head without knowledge would say of all
        eval_posterior_drift              mean KL(base || now) of the unmasking posterior at masks, nats: what LoRA or
                                          full tuning moved since the first entry, which is taken before any step

    Args:
        objective: the `PRISMObjective` that is trained.
        batches: held-out batches, as the objective takes them.
    """

    def __init__(self, objective: PRISMObjective, batches: list[dict[str, torch.Tensor]]):
        self.objective, self.batches, self.base = objective, batches, None

    def on_train_begin(self, args, state, control, **_):
        """Takes the reference of the drift; a resumed run reads it from where the first one left it."""
        file = Path(args.output_dir) / "base_posterior.safetensors"
        if file.is_file():
            self.base = load_file(file)["log_probs"]
        entry = self.measure()
        if self.base is None:
            self.base = self.now
            if state.is_world_process_zero:
                save_file({"log_probs": self.base}, file)
        if state.is_world_process_zero and state.global_step == 0:
            write_log(args.output_dir, {"step": 0, **entry, "eval_posterior_drift": 0.0})

    def on_evaluate(self, args, state, control, **_):
        """Called by the Trainer after each evaluation, on every process."""
        entry = self.measure()
        # Forbidden ids have log-probability -inf in both, and their difference is no number.
        difference = (self.base - self.now).nan_to_num(0.0, posinf=0.0, neginf=0.0)
        entry["eval_posterior_drift"] = float((self.base.exp() * difference).sum(-1).mean())
        if state.is_world_process_zero:
            write_log(args.output_dir, {"step": state.global_step, **entry})
            logger.warning("%s", {"step": state.global_step, **entry})

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """All but the drift, for which it keeps the posterior at the first masks of each batch as `now`."""
        objective, device = self.objective, self.objective.denoiser.forbidden.device
        training = objective.training
        objective.eval()
        quality, right, losses, posteriors = [], [], [], []
        for number, batch in enumerate(self.batches):
            batch = {name: value.to(device) for name, value in batch.items()}
            judged = objective.judge(**batch, generator=torch.Generator().manual_seed(number))
            mdm_loss, _ = objective.mdm_loss(
                judged.hidden, batch["input_ids"], judged.masked, judged.rate, batch.get("attention_mask")
            )
            few = judged.masked & (judged.masked.flatten().cumsum(0).view_as(judged.masked) <= DRIFT_TOKENS)
            posteriors.append(objective.denoiser.logits(judged.hidden, few).float().log_softmax(-1).cpu())
            quality.append(judged.quality.cpu())
            right.append(judged.right.cpu())
            losses.append(float(mdm_loss))
        objective.train(training)
        quality, right, self.now = torch.cat(quality), torch.cat(right), torch.cat(posteriors)
        score = calibration(quality.sigmoid().numpy(), right.numpy())
        return {
            "eval_loss_prism": float(binary_cross_entropy_with_logits(quality, right.float())),
            "eval_loss_mdm": sum(losses) / len(losses),
            "eval_auroc": score["auroc"],
            "eval_ece": score["ece"],
            "eval_share_right": float(right.float().mean()),
        }
