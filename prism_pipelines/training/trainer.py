"""The Trainer of an objective: steps that add up exactly, and checkpoints that appear at once or not at all."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from .checkpointing import WEIGHTS, folder_of, latest_checkpoint, seal_checkpoint
from .rollout_losses import RolloutObjective

EVAL_SEED = 999_983  # of the noise of every evaluation


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters by name, tied ones once. Sharded ones are gathered, so every process must call this."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).contiguous() for name, p in sorted(tensors.items())
    }


def check_finite(model: torch.nn.Module) -> None:
    """Checks that the trainable parameters are finite. Every process must call this.

    Raises:
        FloatingPointError: one contains NaN or inf.
    """
    for name, tensor in trainable(model).items():
        if not tensor.isfinite().all():
            raise FloatingPointError(
                f"The weights in {name} contain NaN or inf, and are not saved. Lower --learning-rate, or check the "
                "data; the last checkpoint was written before this."
            )


def is_write_error(error: Exception) -> bool:
    """Did writing a file fail? On a full disk torch.save raises RuntimeError, and safetensors SafetensorError."""
    if isinstance(error, RuntimeError):  # and those of CUDA and NCCL are RuntimeErrors too
        return any(word in str(error) for word in ("PytorchStreamWriter", "unexpected pos", "write"))
    return isinstance(error, (OSError, SafetensorError))


def load_trainable(model: torch.nn.Module, checkpoint: str) -> None:
    """Put the weights of a checkpoint into the trainable parameters.

    Raises:
        ValueError: it holds other parameters.
    """
    saved = load_file(Path(checkpoint) / WEIGHTS)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    odd = sorted(saved.keys() ^ wanted.keys())
    odd += [name for name in sorted(saved.keys() & wanted.keys()) if saved[name].shape != wanted[name].shape]
    if odd:
        raise ValueError(
            f"`resume_from_checkpoint` {checkpoint!r} was written by a run with other trainable tensors; {len(odd)} "
            f"differ, such as {odd[0]!r}. Resume with the flags of that run."
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            value = saved[name].to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):
                value = torch.distributed.tensor.distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


class ObjectiveTrainer(Trainer):
    """`transformers.Trainer` for an objective of `losses`.

    A step is the same however its batch is split over processes and accumulation steps. For that, all batches of a step
    are masked before the first forward pass, and every sum is divided by the count of the whole step. Each of PRISM's
    two forward passes has its own backward pass, so their activations are never in memory together.

    Checkpoints hold only the trainable tensors. A checkpoint appears whole or not at all.
    """

    model: Any
    optimizer: Any
    held_out: list[dict[str, torch.Tensor]]  # of a head on rollouts: batches that it is measured on
    facts: dict  # what a model card says of the run
    origin_fingerprint: dict[str, str]
    report: Any  # of a head on rollouts: its `HeadReport`, when the run is done

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple:
        """As the Trainer's, but keeps the batches of a step, which `corrupt_step` needs before the first is trained."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_batches = batches
        return batches, num_items

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one batch; returns its share of the loss of the step, detached."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        if "corrupted" not in inputs:
            self.corrupt_step()  # here, and not where the batches are read: a resumed run restores its noise in between
        total, calls = torch.zeros((), device=self.args.device), [{"part": "predict"} if self.is_prism else {}]
        while calls:
            call = calls.pop(0)
            # DDP adds up gradients over processes in the last backward of a step alone.
            waits = isinstance(model, DistributedDataParallel) and (calls or call.get("part") == "predict")
            with cast(Any, model).no_sync() if waits else contextlib.nullcontext():
                with self.compute_loss_context_manager():
                    output = model(**inputs, **call)
                if output.loss is not None:
                    self.accelerator.backward(output.loss / len(self.step_batches))
                    total += output.loss.detach() / len(self.step_batches)
            calls += [{"part": "judge", "drawn": drawn} for drawn in output.get("drawn") or []]
        return total

    def evaluate(self, *args: Any, **kwargs: Any) -> dict:
        """As the Trainer's, with the same noise in every evaluation. The random state of training does not change."""
        if isinstance(self.model, RolloutObjective):  # its runs are under way; `RolloutProgress` measures on others
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
            return {}
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            torch.manual_seed(EVAL_SEED + self.args.process_index)
            return super().evaluate(*args, **kwargs)

    @property
    def is_prism(self) -> bool:
        """Does a step have a second forward pass?"""
        return hasattr(self.model, "quality_head")

    def corrupt_step(self) -> None:
        """Masks all batches of a step, and gives each the counts by which its sums are divided."""
        counts = []
        for batch in self.step_batches:
            batch.update(self._prepare_inputs(batch))
            batch["corrupted"] = self.model.corrupt(**batch)
            counts.append(self.model.counts(**batch))
        names = sorted(counts[0])
        sums = torch.stack([sum(count[name] for count in counts) for name in names])
        if self.args.world_size > 1:
            torch.distributed.all_reduce(sums)
        means = sums / (self.args.world_size * len(counts))
        for batch in self.step_batches:
            batch["totals"] = dict(zip(names, means, strict=True))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        tensors = trainable(self.model)
        if self.args.should_save:
            folder = Path(output_dir) if output_dir else folder_of(self.args)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_trainable(model or self.model, resume_from_checkpoint)
        if isinstance(self.model, RolloutObjective):
            file = Path(resume_from_checkpoint) / f"rollouts-{self.args.process_index}.safetensors"
            if not file.is_file():
                raise ValueError(
                    f"`--resume-from-checkpoint` {resume_from_checkpoint!r} has no {file.name}: the runs under way are "
                    "kept for each process. Resume with as many processes as before."
                )
            self.model.load_state(load_file(file), self.args.device)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        check_finite(self.model)
        run_dir, partial = folder_of(self.args), folder_of(self.args) / "partial"
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # Everything the Trainer writes goes below args.output_dir, so that is what moves for the time of writing.
        self.args.output_dir = str(partial)
        try:
            super()._save_checkpoint(model, trial)
            if isinstance(self.model, RolloutObjective):
                (partial / name).mkdir(parents=True, exist_ok=True)  # a process that saves nothing else may be first
                save_file(self.model.state(), partial / name / f"rollouts-{self.args.process_index}.safetensors")
            self.args.output_dir = str(run_dir)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal_checkpoint(partial / name, run_dir / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not is_write_error(error):
                raise
            before = latest_checkpoint(run_dir)
            kept = f"The one before it, {Path(before).name}, is whole." if before else "There is none before it."
            raise OSError(
                f"{name} could not be written to {run_dir}: {error}. {kept} Free some space, or see "
                "--save-total-limit, and run the same command with --resume-from-checkpoint latest."
            ) from error
        finally:
            self.args.output_dir = str(run_dir)
        if self.args.should_save:
            shutil.rmtree(partial)
            rotate_checkpoints(output_dir=str(run_dir), save_total_limit=self.args.save_total_limit)
