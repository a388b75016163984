"""The flags of a training run, and what is refused before anything is loaded."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import HfArgumentParser

from ..models.precision import warn_of_slow_bfloat16

CHOICES = {
    "objective": ("mdm", "prism", "critic", "distill"),
    "states": ("one_step", "rollout", "mixed"),
    "distill_loss": ("squared", "bce"),
    "optimizer": ("adamw", "muon"),
    "dtype": ("float32", "bfloat16", "float16"),
    "train_on": ("last_turn", "all_turns"),
}
PRESETS = ("sudoku", "owt", "llada")
# Flags that mean nothing under the other objectives.
REVEALING = ("num_revealed", "reveal_order", "reveal_window")
DRAWING = ("draws_per_state", "lambda_mdm", "draw_temperature", "top_p", "head", "head_from")
ROLLING: tuple[str, ...] = (
    "context",
    "forget_share",
    "rollout_runs",
    "rollout_steps_min",
    "rollout_steps_max",
    "rollout_repairs",
)
ROLLING += ("rollout_temperature", "block_length")
DISTILLING = ("distill_loss", "label_stride", "label_floor")


def flag(name: str) -> str:
    """How a field is written on the command line: `--base-model` for base_model."""
    return "--" + name.replace("_", "-")


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RunArguments:
    """What is trained, on what, by which objective. Everything else is `transformers.TrainingArguments`."""

    objective: str = field(metadata={"help": "mdm (pretrain), prism (fine-tune with a head), critic or distill."})
    dataset: str | None = _flag(None, "sudoku (generated grids), or a Hub id, file or folder; distill needs none.")
    preset: str | None = _flag(None, "Flags of the paper's sudoku, owt or llada setting; those given besides win.")
    base_model: str | None = _flag(None, "Hub id, folder or saved pipeline to start from; none makes a new model.")
    revision: str | None = _flag(None, "Branch, tag or commit of --base-model.")
    dtype: str = _flag("float32", "Of the base model's weights; bfloat16 halves them. Adapter and head stay float32.")
    mask_token_id: int | None = _flag(None, "Mask token of a base model that is not known.")
    trust_remote_code: bool = _flag(False, "Run model code of --base-model where no native class serves.")
    load_in_4bit: bool = _flag(False, "Base model in 4 bits (NF4) by bitsandbytes; for LoRA or --freeze-backbone.")
    load_in_8bit: bool = _flag(False, "The same in 8 bits.")
    model_type: str = _flag("roberta-prelayernorm", "transformers model_type of a new model.")
    config_overrides: str | None = _flag(None, "Config of a new model: hidden_size=128,num_hidden_layers=8,...")
    tokenizer: str | None = _flag(None, "Of a new model: folder or Hub id.")

    dataset_name: str | None = _flag(None, "Configuration of a Hub data set.")
    dataset_split: str = _flag("train", "Split of a Hub data set.")
    dataset_revision: str | None = _flag(None, "Commit of a Hub data set.")
    eval_dataset: str | None = _flag(None, "Held-out data: Hub id, file or folder; none holds out part of --dataset.")
    eval_split: str = _flag("validation", "Split of a Hub --eval-dataset.")
    streaming: bool = _flag(False, "Read the data as training goes; needs --max-steps.")
    max_length: int | None = _flag(
        None, "Most tokens of an example, and those of a packed text; 512, or what the model takes if that is less."
    )
    too_long: str = _flag("error", "Rows longer than that: error, or drop.")
    packing: bool | None = _flag(
        None, "Rows of text end to end, cut into --max-length; by default for language models, not for encoders."
    )
    no_chat_template: bool = _flag(False, "Train prompt and completion as plain text, without the chat template.")
    chat_template_kwargs: str | None = _flag(
        None, "JSON for the chat template, such as '{\"enable_thinking\": false}'."
    )
    train_on: str = _flag("last_turn", "Of a chat: last_turn, or all_turns for every message of the assistant.")
    num_eval_examples: int = _flag(512, "Held-out examples (at most a tenth of --dataset).")
    num_train_examples: int = _flag(1_000_000, "sudoku: examples in one epoch.")
    num_base_grids: int = _flag(20_000, "sudoku: grids generated; the rest are symmetries.")
    puzzle_share: float = _flag(0.0, "sudoku: share of examples that are puzzles.")
    shuffle_buffer: int = _flag(1000, "With --streaming: rows among which the next one is drawn; 0 for none.")
    sample_texts: int = _flag(0, "Texts written at each evaluation, with a page that shows how; 0 for none.")
    puzzle_clues_min: int = _flag(23, "sudoku: fewest clues of a puzzle to train on.")
    puzzle_clues_max: int = _flag(34, "sudoku: most clues of a puzzle to train on.")
    sample_puzzles: int = _flag(0, "sudoku: puzzles per clue count solved at each evaluation.")

    weighting: str = _flag("elbo", "MDM loss: elbo (1/t, the paper's) or uniform.")
    mask_rate_min: float = _flag(1e-3, "Lowest masking rate t (excluded).")
    mask_rate_max: float = _flag(1.0, "Highest masking rate t.")
    num_revealed: int = _flag(1, "prism: k, tokens revealed per state.")
    draws_per_state: int = _flag(1, "prism, critic: y drawn for each z.")
    reveal_order: str = _flag("random", "prism: random or confidence.")
    reveal_window: int | None = _flag(None, "prism: reveal in the leftmost N masks only.")
    lambda_mdm: float = _flag(0.5, "prism, critic: weight of the MDM loss.")
    draw_temperature: float = _flag(1.0, "prism, critic: temperature of the drawn tokens.")
    top_p: float | None = _flag(None, "prism, critic: nucleus of the drawn tokens.")
    head: str = _flag("linear", "prism, critic, distill: architecture of the head, linear, mlp, block or block_mlp.")
    head_from: str | None = _flag(None, "The same: folder of a head to begin from; layers of equal name and size.")

    states: str = _flag("one_step", "prism: judged states: one_step (the paper's), rollout (the sampler's), or mixed.")
    context: str | None = _flag(None, "rollout, distill: what the head reads of the run, by commas, or none.")
    forget_share: float = _flag(0.1, "rollout, distill: share of rows that are judged without their run.")
    rollout_runs: int = _flag(4, "rollout, distill: runs in a batch; each has a schedule of its own.")
    rollout_steps_min: int = _flag(8, "rollout, distill: fewest forward passes of a run.")
    rollout_steps_max: int = _flag(64, "rollout, distill: most of them.")
    rollout_repairs: int = _flag(2, "rollout, distill: how often at most a full canvas is masked in part and refilled.")
    rollout_temperature: float = _flag(1.0, "rollout, distill: temperature of the drawn tokens.")
    block_length: int | None = _flag(None, "rollout, distill: of semi-autoregressive runs; none for one block.")
    distill_loss: str = _flag("squared", "distill: squared (of log-probabilities) or bce.")
    label_stride: int = _flag(16, "distill: every so many-th token is masked for the label; widened where needed.")
    label_floor: float = _flag(-12.0, "distill: log-probabilities below count as this.")

    rank: int | None = _flag(
        None,
        "Rank of the LoRA adapter, 16 by default; with mdm, to tune the model by an adapter in place of all weights.",
    )
    lora_alpha: int | None = _flag(None, "Scale of the adapter; its rank by default.")
    lora_dropout: float = _flag(0.0, "Dropout before the adapter.")
    lora_targets: str | None = _flag(None, "Modules that get an adapter, by commas; those of the family by default.")
    freeze_backbone: bool = _flag(False, "prism, critic: train the head alone, no adapter.")
    full: bool = _flag(False, "prism, critic: train all weights, no adapter.")
    optimizer: str = _flag("adamw", "adamw (see --optim), or muon for the matrices of a --full or new model.")
    muon_learning_rate: float = _flag(0.02, "Learning rate of Muon.")
    adapter: bool = field(default=False, init=False)  # is a LoRA adapter trained?
    num_pools: int = field(default=1, init=False)  # batches of a step, which gradient accumulation says
    push_to_hub: bool = field(
        default=False, init=False
    )  # --push-to-hub: ours, and not each checkpoint as the Trainer would


def parse_arguments(argv: list[str] | None = None) -> tuple[RunArguments, transformers.TrainingArguments]:
    """Flags of the command line (and of files given by `--args-file`, and of `--preset`); unknown ones are an error.

    Raises:
        ValueError: a value that no run can use.
    """
    kinds: Any = (RunArguments, transformers.TrainingArguments)
    parser = HfArgumentParser(kinds, prog="prism_pipelines.training")
    parser.set_defaults(
        remove_unused_columns=False,
        prediction_loss_only=True,
        report_to="none",
        label_names=["input_ids"],
        use_cpu=not torch.accelerator.is_available(),  # else --bf16 is refused where there is a CPU alone
    )
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        parser.parse_args(["--help"])  # transformers' reading of --args-file would show that flag alone
    words = expanded(words)
    run, args = parser.parse_args_into_dataclasses(args=[*preset_flags(words), *words], look_for_args_file=False)
    # A NaN loss would be replaced by the mean of the others, and the run would continue.
    args.logging_nan_inf_filter = False
    # Processes that shuffle by seeds of their own would read some examples twice and others never.
    args.data_seed = args.seed if args.data_seed is None else args.data_seed
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs. Start by: accelerate launch -m prism_pipelines.training"
        )
    if run.streaming:
        if args.dataloader_num_workers > 1:
            raise ValueError("`--dataloader-num-workers` is at most 1 with --streaming: each reads other rows.")
        args.accelerator_config.dispatch_batches = False  # each process reads for itself: batches differ in length
    if args.lr_scheduler_type == "warmup_stable_decay" and "num_decay_steps" not in (args.lr_scheduler_kwargs or {}):
        raise ValueError(
            "`--lr-scheduler-type warmup_stable_decay` needs its length: --lr-scheduler-kwargs "
            "'{\"num_decay_steps\": 100}'."
        )
    if (run.sample_texts or run.sample_puzzles) and args.eval_strategy == "no":
        raise ValueError("`--sample-texts` and `--sample-puzzles` are written at evaluations: pass --eval-strategy.")
    if args.load_best_model_at_end:
        raise ValueError(
            "`--load-best-model-at-end` is not supported: the last weights are the result. Choose a checkpoint by "
            "training_log.jsonl, and stop there by --max-steps."
        )
    if args.save_only_model:
        raise ValueError(
            "`--save-only-model` is not supported: a run is not resumed without its optimizer and schedule. "
            "Pass --save-total-limit 1 for a small folder."
        )
    run.push_to_hub, args.push_to_hub = args.push_to_hub, False
    run.num_pools = args.gradient_accumulation_steps
    if run.push_to_hub and not args.hub_model_id:
        raise ValueError("`--push-to-hub` needs `--hub-model-id owner/name`.")
    if (args.bf16 or run.dtype == "bfloat16") and args.device.type == "cpu":
        warn_of_slow_bfloat16("Pass --bf16 false --dtype float32.")
    check_run(run)
    return run, args


def expanded(words: list[str]) -> list[str]:
    """The words, after the flags in the files of `--args-file FILE`, so that the command line wins.

    Raises:
        ValueError: there is no such file, or it has an `--args-file` itself.
    """
    from_files, rest, left = [], [], iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != "--args-file":
            rest.append(word)
            continue
        file = Path(value if equals else next(left, ""))
        if not file.is_file():
            raise ValueError(f"`--args-file` {str(file)!r} is not a file.")
        flags = shlex.split(file.read_text(), comments=True)
        if any(word.partition("=")[0].replace("_", "-") == "--args-file" for word in flags):
            raise ValueError(f"`--args-file` {str(file)!r} names another --args-file; pass both on the command line.")
        from_files += flags
    return from_files + rest


def preset_flags(words: list[str]) -> list[str]:
    """Flags of the file of `--preset NAME` or `--preset=NAME`, [] without one.

    Raises:
        ValueError: no such preset.
    """
    named = [words[i + 1 : i + 2] for i, word in enumerate(words) if word == "--preset"]
    named += [[word.split("=", 1)[1]] for word in words if word.startswith("--preset=")]
    if not named:
        return []
    name = named[-1][0] if named[-1] else ""
    if name not in PRESETS:
        raise ValueError(f"`--preset` must be one of {', '.join(PRESETS)}, got {name!r}.")
    file = resources.files("prism_pipelines.training") / "presets" / f"{name}.args"
    return shlex.split(file.read_text(), comments=True)


def check_run(run: RunArguments) -> None:
    """Checks flags against each other, and fills in the defaults of the adapter.

    Raises:
        ValueError: flags that no run can use; the error names the flag.
    """
    for name, choices in CHOICES.items():
        if getattr(run, name) not in choices:
            raise ValueError(f"`{flag(name)}` must be one of {', '.join(choices)}, got {getattr(run, name)!r}.")
    tuned = [flag(name) for name in ("freeze_backbone", "full") if getattr(run, name)]
    adapter = [flag(name) for name in ("rank", "lora_alpha", "lora_targets") if getattr(run, name) is not None]
    adapter += ["--lora-dropout"] if run.lora_dropout else []
    if run.objective == "mdm" and tuned:
        raise ValueError(
            f"{tuned[0]} goes with --objective prism or critic; mdm trains all weights, or an adapter with --rank."
        )
    if run.objective == "mdm" and adapter and run.base_model is None:
        raise ValueError(f"{adapter[0]} only applies to an adapter, which needs a pretrained model: pass --base-model.")
    run.adapter = bool(adapter) if run.objective == "mdm" else not tuned
    check_unused(run)
    if run.dataset is None and run.objective != "distill":
        raise ValueError(f"`--objective {run.objective}` learns from data: pass --dataset. Only distill needs none.")
    if run.objective == "distill":
        if tuned[1:] or "--full" in tuned or adapter:
            raise ValueError(
                f"{(tuned + adapter)[-1]} does not go with --objective distill: an adapter would change the posterior "
                "that the head is taught. The backbone is frozen."
            )
        run.freeze_backbone, run.adapter, tuned = True, False, ["--freeze-backbone"]
    if run.objective != "mdm" and run.base_model is None:
        raise ValueError(f"`--objective {run.objective}` fine-tunes a pretrained model: pass --base-model.")
    new = [name for name in ("tokenizer", "config_overrides") if getattr(run, name) is not None]
    if run.base_model is not None and new:
        raise ValueError(f"`{flag(new[0])}` only applies to a new model; `--base-model` brings its own.")
    if len(tuned) + bool(adapter) > 1:
        raise ValueError(f"Pass one of --freeze-backbone, --full and LoRA's flags, got {', '.join(tuned + adapter)}.")
    all_weights = run.full or (run.objective == "mdm" and not run.adapter)
    if run.optimizer == "muon" and not all_weights:
        raise ValueError("`--optimizer muon` is for all weights: pass --full, or leave it out.")
    if (run.load_in_4bit or run.load_in_8bit) and all_weights:
        raise ValueError("Weights in 4 or 8 bits cannot be trained; use LoRA or --freeze-backbone.")
    if run.dtype != "float32" and all_weights:
        raise ValueError("`--dtype` must be float32 where all weights are trained; --bf16 computes in bfloat16.")
    check_ranges(run)
    if run.dataset != "sudoku" and (run.puzzle_share or run.sample_puzzles):
        raise ValueError("`--puzzle-share` and `--sample-puzzles` go with --dataset sudoku.")
    if run.dataset == "sudoku" and (run.sample_texts or run.streaming):
        raise ValueError("`--sample-texts` and `--streaming` go with a data set of text.")
    texts = ("packing", "no_chat_template", "chat_template_kwargs", "train_on")
    if run.dataset == "sudoku" and (given := [n for n in texts if getattr(run, n) != getattr(RunArguments, n)]):
        raise ValueError(f"`{flag(given[0])}` goes with a data set of text.")
    if not 20 <= run.puzzle_clues_min <= run.puzzle_clues_max <= 80:
        raise ValueError(
            "`--puzzle-clues-min` and `--puzzle-clues-max` must hold 20 <= min <= max <= 80, got "
            f"{run.puzzle_clues_min} and {run.puzzle_clues_max}."
        )
    run.rank = run.rank or 16
    run.lora_alpha = run.lora_alpha or run.rank


def check_unused(run: RunArguments) -> None:
    """Checks that no flag is given that the objective does not read.

    Raises:
        ValueError: one is given; the error names the flag.
    """
    of_runs = run.states != "one_step" or run.objective == "distill"
    unused = {
        "mdm": REVEALING + DRAWING + DISTILLING + ("states",),
        "critic": REVEALING + DISTILLING + ("states",),
        "prism": DISTILLING + (REVEALING if run.states == "rollout" else ()),
        "distill": (*REVEALING, "draws_per_state", "lambda_mdm", "draw_temperature", "top_p", "states"),
    }[run.objective]
    places = dict.fromkeys(REVEALING, "prism and --states one_step or mixed") | dict.fromkeys(DISTILLING, "distill")
    places |= dict.fromkeys(ROLLING, "distill, or prism with --states rollout or mixed") | {"states": "prism"}
    places |= dict.fromkeys(("head", "head_from"), "prism, critic or distill")
    unused += () if of_runs else ROLLING
    if given := [name for name in unused if getattr(run, name) != getattr(RunArguments, name)]:
        place = places.get(given[0], "prism or critic")
        raise ValueError(f"`{flag(given[0])}` goes with --objective {place}; {run.objective} has no use for it.")


def check_ranges(run: RunArguments) -> None:
    """Checks counts and shares.

    Raises:
        ValueError: one is out of range; the error names its flag.
    """
    lowest = dict.fromkeys(("rank", "lora_alpha", "max_length", "num_train_examples", "num_base_grids"), 1)
    lowest |= dict.fromkeys(("rollout_runs", "label_stride", "block_length"), 1)
    lowest |= dict.fromkeys(("num_eval_examples", "shuffle_buffer", "sample_texts", "sample_puzzles"), 0)
    for name, least in lowest.items():
        value = getattr(run, name)
        if value is not None and value < least:
            raise ValueError(f"`{flag(name)}` must be at least {least}, got {value}.")
    for name in ("puzzle_share", "lora_dropout", "forget_share"):
        if not 0 <= getattr(run, name) <= 1:
            raise ValueError(f"`{flag(name)}` must be in [0, 1], got {getattr(run, name)}.")
