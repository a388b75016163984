"""Train an MDM or a PRISM quality head: `accelerate launch -m prism_pipelines.training --objective mdm|prism ...`."""

from __future__ import annotations

import json
import logging
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import set_seed

from ..atomic_files import write_atomically
from ..hub.files import is_hub_id
from ..hub.model_card import pipeline_card
from ..hub.publish import (
    Commit,
    push_adapter_repo,
    push_head_repo,
    push_pipeline,
    save_adapter_repo,
    save_head_repo,
    write_card,
)
from ..pipeline_prism import PrismPipeline
from .arguments import RunArguments, flag, parse_arguments
from .callbacks import HeadProgress, MetricsLog, SudokuProgress, TextProgress, read_log
from .checkpointing import drop_later, folder_of, is_whole, latest_checkpoint
from .held_out import HeadReport, RolloutProgress
from .losses import PRISMObjective
from .optimizer import muon_adamw
from .rollout_losses import RolloutObjective
from .setup import (
    ADAPTER,
    RUN_CONFIG,
    build_objective,
    build_pipeline,
    check_origin,
    check_output_dir,
    load_base,
    load_examples,
    origin_fingerprint,
    resolve_revision,
    template_kwargs,
)
from .trainer import ObjectiveTrainer, check_finite, load_trainable, trainable

logger = logging.getLogger(__name__)


def prepare(run: RunArguments, args: transformers.TrainingArguments) -> tuple[ObjectiveTrainer, PrismPipeline]:
    """Everything up to the first step: the trainer, and the pipeline of the modules that it trains.

    Raises:
        ValueError, OSError: a flag that no run can use, or a base model or data that is not there.
    """
    check_output_dir(folder_of(args), args.resume_from_checkpoint)
    if run.base_model and Path(run.base_model).exists():
        run.base_model = str(Path(run.base_model).absolute())  # a head names it, and is loaded from other folders too
    whole = run.full or (run.objective == "mdm" and not run.adapter)
    if run.push_to_hub and not (whole or is_hub_id(run.base_model)):
        raise ValueError(
            "`--push-to-hub` of a head or an adapter needs a base model that others can load, and "
            f"`--base-model` {run.base_model!r} is not an id on the Hub. Push that one first (docs/sharing.md), and "
            "train on its id."
        )
    set_seed(args.seed)
    run.revision = resolve_revision(run)
    model, tokenizer, spec = load_base(run)
    origin = origin_fingerprint(run, model)
    train_examples, held_out, collate = load_examples(run, args, model, tokenizer, spec)
    objective = build_objective(run, model, tokenizer, spec)
    optimizer = None
    if run.optimizer == "muon":
        optimizer = muon_adamw(objective, run.muon_learning_rate, args)
    pipe = build_pipeline(objective, tokenizer, run)
    trainer = ObjectiveTrainer(
        model=objective,
        args=args,
        data_collator=collate,
        train_dataset=train_examples,
        eval_dataset=held_out,
        optimizers=(optimizer, None),
        callbacks=[MetricsLog(objective)],
    )
    check_plugins(trainer.accelerator.state, isinstance(objective, RolloutObjective))
    if trainer.is_fsdp_enabled and (run.sample_texts or run.sample_puzzles or run.optimizer == "muon"):
        raise ValueError(
            "`--sample-texts`, `--sample-puzzles` and `--optimizer muon` need a model that is not sharded."
        )
    if isinstance(objective, RolloutObjective):
        trainer.held_out = eval_batches(held_out, collate, args)
        if args.eval_strategy != "no":
            trainer.add_callback(RolloutProgress(objective, trainer.held_out, trainer.log))
    elif args.eval_strategy != "no" and isinstance(objective, PRISMObjective):
        trainer.add_callback(
            HeadProgress(objective, eval_batches(held_out, collate, args), trainer.log, not args.disable_tqdm)
        )
    if run.sample_texts:
        given = [given_ids(example) for example in held_out[: run.sample_texts]]
        trainer.add_callback(TextProgress(pipe, given, min(64, max(1, (run.max_length or 1) // 2))))
    if run.sample_puzzles:
        trainer.add_callback(SudokuProgress(pipe, run.sample_puzzles, trainer.log))
    trainer.facts, trainer.origin_fingerprint = run_facts(run, args), origin
    if args.process_index:
        set_seed(args.seed + args.process_index)  # processes see other examples, and need other noise
    return trainer, pipe


def given_ids(example: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids before the last stretch of an example that is trained, and ids after it."""
    ids, learned = example["input_ids"], example["trainable_mask"]
    end = int(learned.nonzero()[-1]) + 1
    given = (~learned[:end]).nonzero().flatten().tolist()
    start = given[-1] + 1 if given else 0
    return ids[:start], ids[end:]


def check_plugins(state: Any, rolls_out: bool) -> None:
    """Checks that accelerate does not split the model or the step in a way that the objectives cannot handle.

    Args:
        state: the `accelerate.state.AcceleratorState`.
        rolls_out: is the objective a `RolloutObjective`?
    Raises:
        ValueError: DeepSpeed, Megatron-LM, FSDP 1, FSDP 2 with mixed precision, or any FSDP with rollouts.
    """
    way = "Use DDP, or FSDP with fsdp_version: 2 (examples/accelerate/fsdp.yaml)."
    for kind in ("DEEPSPEED", "MEGATRON_LM"):
        if state.distributed_type == kind:
            raise ValueError(f"accelerate's {kind} would take a step at each of the two backwards of ours. {way}")
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None and rolls_out:
        raise ValueError(
            "`--objective distill`, `--states rollout` and `--states mixed` run the model between the steps of "
            "training, which a sharded model cannot do. Use DDP: leave out accelerate's FSDP file."
        )
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError(f"FSDP {fsdp.fsdp_version} flattens the weights, and checkpoints would hold none. {way}")
    if fsdp is not None and fsdp.mixed_precision_policy is not None:
        raise ValueError(
            "FSDP with mixed precision would cast the quality head, which computes in float32. Set mixed_precision: "
            "'no' in accelerate's file, leave out --bf16 and --fp16, and pass --dtype bfloat16."
        )


def eval_batches(
    examples: Any, collate: Callable | None, args: transformers.TrainingArguments
) -> list[dict[str, torch.Tensor]]:
    """The batches of the held-out examples.

    Raises:
        ValueError: there is no example.
    """
    if not len(examples):
        raise ValueError("No example is held out: raise --num-eval-examples, or pass --eval-strategy no.")
    return list(DataLoader(examples, batch_size=args.per_device_eval_batch_size, collate_fn=collate))


def run_facts(run: RunArguments, args: transformers.TrainingArguments) -> dict:
    """What a model card says about a run: its flags that differ from the defaults, hardware, versions."""
    plain = {entry.name: entry.default for entry in fields(args)}
    shown: tuple[str, ...] = (
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "seed",
    )
    shown += ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay")
    shown += ("max_grad_norm", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon")
    shown += ("bf16", "fp16", "gradient_checkpointing", "dataloader_drop_last")
    own = {entry.name: entry.default for entry in fields(run) if entry.init and entry.name != "preset"}
    if not run.adapter:
        own = {name: value for name, value in own.items() if name not in ("rank", "lora_alpha")}  # filled in, not used
    flags = {name: value for name, value in asdict(run).items() if name in own and value != own[name]}
    flags |= {name: getattr(args, name) for name in shown if getattr(args, name) not in (plain[name], None, {})}
    if isinstance(flags.get("lr_scheduler_kwargs"), dict):
        flags["lr_scheduler_kwargs"] = json.dumps(flags["lr_scheduler_kwargs"])
    if args.data_seed != args.seed:
        flags["data_seed"] = args.data_seed
    for name in ("base_model", "dataset", "eval_dataset", "tokenizer"):
        if name in flags and Path(flags[name]).exists():
            flags[name] = Path(flags[name]).absolute().name  # a card must not show paths of this machine
    words = [word for name, value in flags.items() for word in (flag(name), str(getattr(value, "value", value)))]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    call: dict = {"use_chat_template": False} if run.no_chat_template else {}
    if run.chat_template_kwargs:
        call["chat_template_kwargs"] = template_kwargs(run.chat_template_kwargs)
    return {
        "call": call,
        "dataset": flags.get("dataset", "none: the model's own runs"),
        "command": shlex.join(["accelerate", "launch", "-m", "prism_pipelines.training", *words]),
        "hardware": f"{args.world_size} x {device}",
        "versions": {name: version(name) for name in ("prism-pipelines", "torch", "transformers", "peft")},
        "steps": args.max_steps if args.max_steps > 0 else None,
    }


def train(trainer: ObjectiveTrainer, pipe: PrismPipeline, run: RunArguments) -> PrismPipeline:
    """Trains and saves into `--output-dir`; `--resume-from-checkpoint latest` resumes.

    All weights trained: a whole saved pipeline. Head alone, or head and adapter: a head's repository, a few MB. Adapter
    alone: a plain PEFT adapter.
    """
    args = trainer.args
    checkpoint = args.resume_from_checkpoint
    if checkpoint == "latest":
        checkpoint = latest_checkpoint(folder_of(args))
        logger.warning("Resuming from %s.", checkpoint or "nothing: no checkpoint yet")
    elif checkpoint and not is_whole(Path(checkpoint)):
        raise ValueError(f"`--resume-from-checkpoint` {checkpoint!r} is not a complete checkpoint: pass `latest`.")
    if trainer.is_world_process_zero():  # where a model is loaded once, the other processes have no weights yet
        if checkpoint:
            check_origin(Path(checkpoint).parent, trainer.origin_fingerprint)
        drop_later(folder_of(args), step_of(checkpoint) if checkpoint else 0)
        folder_of(args).mkdir(parents=True, exist_ok=True)
        write_atomically(folder_of(args) / RUN_CONFIG, json.dumps(trainer.origin_fingerprint) + "\n")
    if checkpoint and finished(checkpoint, args):
        load_trainable(trainer.model, checkpoint)  # Trainer.train would take one step more
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    check_finite(trainer.model)
    objective = trainer.model
    if trainer.is_fsdp_enabled:
        pipe, objective = rebuilt(run, trainable(trainer.model))
    if trainer.is_world_process_zero():
        pipe.model.eval()
        facts = {"metrics": last_metrics(folder_of(args))}
        if isinstance(objective, RolloutObjective):
            trainer.report = report = HeadReport(objective, trainer.held_out)
            facts = head_facts(pipe, run, report) | {"metrics": facts["metrics"] | report.metrics()}
        save(pipe, run, args, trainer.facts | facts)
    return pipe


def head_facts(pipe: PrismPipeline, run: RunArguments, report: HeadReport) -> dict:
    """Stores the fitted temperature in the head's config, and returns the facts of its model card."""
    pipe.quality_head.register_to_config(temperature=report.temperature)
    targets = {
        "truth": "P(the token is the right one), learned from the data",
        "posterior": "the model's own p(token | all other tokens), learned without data",
    }
    states = "rollout" if run.objective == "distill" else run.states
    return {
        "target": targets[report.label],
        "states": {"rollout": "the model's own runs", "mixed": "the model's own runs, and one-step states"}[states],
        "detection": f"{report.table()}\n\n{report.verdict()}",
    }


def rebuilt(run: RunArguments, tensors: dict[str, torch.Tensor]) -> tuple[PrismPipeline, torch.nn.Module]:
    """Pipeline and objective of a run, built again from its base and its trained tensors, after sharded training."""
    model, tokenizer, spec = load_base(run)
    objective = build_objective(run, model, tokenizer, spec)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[name])
    return build_pipeline(objective.eval(), tokenizer, run), objective


def save(pipe: PrismPipeline, run: RunArguments, args: transformers.TrainingArguments, facts: dict) -> None:
    """Writes the result, and pushes it with `--push-to-hub`."""
    folder, commit = folder_of(args), Commit(args.hub_model_id or "", args.hub_private_repo, args.hub_token)
    base: dict[str, Any] = {"base_model": run.base_model, "base_revision": run.revision}
    if (folder / "calibration.png").is_file():
        facts["figure"] = str(folder / "calibration.png")
    if run.objective == "mdm" and run.adapter:
        save_adapter_repo(pipe, ADAPTER, folder, **base, facts=facts)
        if run.push_to_hub:
            push_adapter_repo(pipe, ADAPTER, commit, **base, facts=facts)
        return
    if run.objective == "mdm" or run.full:
        pipe.save_pretrained(folder)
        write_card(folder, pipeline_card(pipe, run.base_model, facts), facts)
        if run.push_to_hub:
            push_pipeline(pipe, commit, facts=facts)
        return
    save_head_repo(pipe, folder, **base, facts=facts)
    if run.push_to_hub:
        push_head_repo(pipe, commit, facts=facts)


def last_metrics(folder: str | Path) -> dict[str, float]:
    """The last value of each held-out measure in the log."""
    found: dict[str, float] = {}
    for entry in read_log(folder):
        measures = (
            "eval_loss",
            "eval_auroc",
            "eval_ece",
            "eval_overlap",
            "eval_rank",
            "eval_posterior_drift",
            "solved_",
        )
        found |= {name: value for name, value in entry.items() if name.startswith(measures)}
    return found


def step_of(checkpoint: str) -> int:
    """The step at which a checkpoint was written."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]


def finished(checkpoint: str, args: transformers.TrainingArguments) -> bool:
    """Whether a checkpoint is the last one of a run of `max_steps` steps, or, if that is not above 0, of its epochs."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["global_step"] >= state["max_steps"] and state["epoch"] >= args.num_train_epochs


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 2 after an error before training, 1 after one in it; each prints a line."""
    status = 2
    try:
        run, args = parse_arguments(argv)
        trainer, pipe = prepare(run, args)
        status = 1
        train(trainer, pipe, run)
    except (ValueError, OSError, FloatingPointError, ImportError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return status
    return 0
