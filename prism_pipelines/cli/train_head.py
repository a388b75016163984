"""`prism train-head MODEL --out DIR`: a quality head for any model, learned from the model alone, without data."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from .arguments import COUNT, Commands, add_command, add_seed_flag
from .loading import add_source_flags
from .quiet import is_quiet

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from transformers import TrainerCallback, TrainerState

    from ..training.held_out import HeadReport

LENGTH = 256  # tokens of a text at most, where the model takes more
STRIDE = 8  # checked against brute force, and widened where the model needs that
STEPS = (16, 64)  # forward passes of a run, fewer for shorter texts
REPAIRS = 8  # rounds in which a full canvas is judged and filled again: full canvases are the hardest to judge
RATE = 0.5  # learning rate times hidden size, at most FASTEST
FASTEST = 4e-3


def add_parser(commands: Commands) -> None:
    """Add the subcommand `train-head` to the subparsers of `prism`."""
    parser = add_command(
        commands,
        "train-head",
        run,
        "MODEL --out FOLDER [FLAGS]",
        help="make a quality head for a model from the model alone, without data",
        description="Let the model write, and teach a small head to predict, from what the run knows, the model's own "
        "probability of each token given all others. The model itself stays as it is. Then compare what the "
        "head finds on held-out texts with what needs no head. The same command again goes on after a kill.",
        examples="""
            prism train-head GSAI-ML/LLaDA-8B-Instruct --out head --dtype bfloat16
            prism train-head antibody --out head --max-length 122
            prism train-head MODEL --out head --dataset prompts.jsonl --max-steps 2000""",
        status="0 done and ahead of every free score, 1 made but not recommended, 2 bad input.",
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id, folder or saved pipeline of a masked diffusion model")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for the head; empty or absent")
    parser.add_argument("--max-steps", metavar="N", type=COUNT, default=500, help="training steps (default: 500)")
    parser.add_argument("--batch-size", metavar="N", type=COUNT, default=16, help="texts of a step (default: 16)")
    parser.add_argument(
        "--max-length", metavar="N", type=COUNT, help=f"tokens of a text (default: {LENGTH}, or what it takes)"
    )
    parser.add_argument("--dataset", metavar="DATA", help="prompts or texts to begin from, Hub id or file")
    parser.add_argument("--head", metavar="KIND", default="block", help="linear, mlp, block (default) or block_mlp")
    parser.add_argument("--block-length", metavar="N", type=COUNT, help="of semi-autoregressive runs")
    parser.add_argument("--mask-token-id", metavar="ID", type=int, help="overrides what is detected")
    add_source_flags(parser)
    add_seed_flag(parser)


def training_flags(args: argparse.Namespace, hidden_size: int, length: int) -> list[str]:
    """The flags of the training command that this command stands for."""
    flags = {
        "objective": "distill",
        "base_model": args.model,
        "output_dir": args.out,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 12,
        "max_length": length,
        "label_stride": min(STRIDE, length),
        "head": args.head,
        "dtype": args.dtype,
        "seed": args.seed,
        "rollout_steps_min": min(STEPS[0], length),
        "rollout_steps_max": min(STEPS[1], length),
        "rollout_repairs": REPAIRS,
        "learning_rate": f"{min(FASTEST, RATE / hidden_size):.2g}",
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(30, args.max_steps // 10),
        "adam_beta2": 0.98,
        "max_grad_norm": 1,
        "logging_steps": max(1, args.max_steps // 20),
        "save_steps": max(1, args.max_steps // 5),
        "save_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "disable_tqdm": "true",
        "num_eval_examples": 24,
    }
    flags |= {name: getattr(args, name) for name in ("dataset", "block_length", "revision", "mask_token_id")}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None]
    return [*words, *(["--trust-remote-code"] if args.trust_remote_code else [])]


def size_of(args: argparse.Namespace) -> tuple[int, int]:
    """Hidden size of the model, and the length of the texts that the head is trained on.

    Raises:
        ValueError, OSError: there is no such model, or it takes fewer tokens than `--max-length` says.
    """
    from transformers import AutoConfig

    from ..hub.files import read_json
    from ..models.checks import max_length

    hub_kwargs = {"revision": args.revision}
    index = read_json(args.model, "model_index.json", hub_kwargs)
    folder = {} if index is None else {"subfolder": "model"}
    config = AutoConfig.from_pretrained(
        args.model, revision=args.revision, trust_remote_code=args.trust_remote_code, **folder
    )
    limit = max_length(config)
    if args.max_length and limit and args.max_length > limit:
        raise ValueError(f"--max-length is {args.max_length}, and the model takes {limit} tokens at most.")
    return config.hidden_size, args.max_length or min(LENGTH, limit or LENGTH)


def run(args: argparse.Namespace) -> int:
    """Train, measure, report. Returns the exit status."""
    from rich.console import Console
    from transformers import PrinterCallback

    from ..training.arguments import parse_arguments
    from ..training.run import prepare, train

    begun = time.monotonic()
    run_arguments, training_arguments = parse_arguments(training_flags(args, *size_of(args)))
    trainer, pipe = prepare(run_arguments, training_arguments)
    trainer.remove_callback(PrinterCallback)
    with progress_bar(Console(stderr=True)) as bar:
        trainer.add_callback(step_bar(bar))
        try:
            train(trainer, pipe, run_arguments)
        except FloatingPointError as error:
            raise ValueError(str(error)) from None
    report = trainer.report
    console = Console()
    console.print(table(report))
    console.print(calibration_line(report), highlight=False)
    console.print(report.verdict().replace("**", ""), highlight=False)
    console.print(f"Made in {(time.monotonic() - begun) / 60:.1f} minutes. Use it:", highlight=False)
    console.print(
        f'  PrismPipeline.from_pretrained("{args.model}", quality_head="{args.out}")', highlight=False, soft_wrap=True
    )
    if not report.is_ahead:
        print("prism: the head is made and saved, and is not recommended (see above)", file=sys.stderr)
        return 1
    return 0


def step_bar(bar: Progress) -> TrainerCallback:
    """A callback that shows the steps of a training and the time that they will take, then the measurement."""
    from transformers import TrainerCallback

    class StepBar(TrainerCallback):
        """The time of a step is the mean of those since the training began here."""

        def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            self.task = bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self.first, self.began = state.global_step, 0.0

        def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            now = time.monotonic()
            if not self.began:  # the first step fills the pool, which takes longer than the others
                self.first, self.began = state.global_step, now
                return
            each = (now - self.began) / (state.global_step - self.first)
            left = each * (state.max_steps - state.global_step)
            amount = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
            words = f"training, about {amount} left, then the measurement"
            bar.update(self.task, completed=state.global_step, description=words)

        def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            bar.remove_task(self.task)
            bar.add_task("measuring the trained head on held-out texts", total=None)

    return StepBar()


def progress_bar(console: Console) -> Progress:
    """A bar on stderr; hidden if stderr is no terminal, or by --quiet."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, disable=is_quiet() or not console.is_terminal, transient=True)


def calibration_line(report: HeadReport) -> str:
    """How far the head's claims are from the probabilities, before its temperature is fitted and after."""
    if report.uncalibrated_ece is None:
        return "Calibration error unknown: no held-out text had a token to judge."
    words = f"Calibration error {report.uncalibrated_ece:.3f}"
    if report.temperature is None:
        return f"{words}. No temperature could be fitted."
    return f"{words}; {report.found['head']['ece']:.3f} with the fitted temperature, {report.temperature:g}."


def table(report: HeadReport) -> Table:
    """What the head finds against free scores, for a terminal."""
    from rich.table import Table

    from ..evaluation.detection import NAMES, TITLES

    found = Table(title="What this head finds on held-out texts, against free scores")
    found.add_column("score")
    names = list(next(iter(report.found.values()))) if report.found else []
    for name in names:
        found.add_column(TITLES[name], justify="right")
    for score, values in report.found.items():
        cells = ["-" if values[name] is None else f"{values[name]:.3f}" for name in names]
        found.add_row(NAMES.get(score, score), *cells, style="bold" if score == "head" else "")
    return found
