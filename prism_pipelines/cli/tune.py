"""`prism tune`: the fields of a scheduler for a model, a task and a number of forwards, confirmed on other data."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    COUNT,
    Commands,
    add_command,
    add_scheduler_flags,
    add_seed_flag,
    add_temperature_flags,
)
from .loading import add_bundled_model_flags, load_bundled_or

if TYPE_CHECKING:
    from ..pipeline_prism import PrismPipeline

CONFIRM_SEED = 700_000  # data that the choice is confirmed on begin this far from those it is made on
# What is tried where --fields says nothing else: lists of values in order, the default among them.
FIELDS = {
    "JudgeAndRepairScheduler": {
        "tokens_per_step": [2, 3, 4, 6, 8],
        "doubt_threshold": [0.8, 0.9, 0.95, 0.98],
        "price": [0.02, 0.05, 0.1, 0.2],
        "repair_temperature": [0.5, 1.0],
    },
    "PrismScheduler": {"num_remask": [1, 2, 4, 8, 16], "order": ["random", "confidence"]},
    "SelfConfidenceScheduler": {"num_remask": [1, 2, 4, 8, 16], "order": ["random", "confidence"]},
    "PromptConfidenceScheduler": {"num_remask": [1, 2, 4, 8, 16], "order": ["random", "confidence"]},
    "DrawConfidenceScheduler": {"num_remask": [1, 2, 4, 8, 16], "order": ["random", "confidence"]},
    "ReMDMScheduler": {"eta": [0.01, 0.02, 0.04, 0.08, 0.16]},
    "MDLMScheduler": {"order": ["random", "confidence", "margin", "entropy"]},
}


def add_parser(commands: Commands) -> None:
    """Add the subcommand `tune` to the subparsers of `prism`."""
    parser = add_command(
        commands,
        "tune",
        run_tune,
        "[FLAGS]",
        help="choose a scheduler's fields for a number of forward passes",
        description="Try settings of a scheduler on a task at a number of forward passes, compare the best with the "
        "present setting on other data, and write it if it is better. The same command again tries nothing twice.",
        examples="""
            prism tune --scheduler judge-and-repair --quality-head HEAD --forwards 52 --write HEAD
            prism tune --scheduler prism --fields '{"num_remask": [2, 4, 8]}'
            prism tune --task text --reference a.jsonl --confirm-reference b.jsonl""",
    )
    parser.add_argument("--task", choices=["sudoku", "text"], default="sudoku", help="default: %(default)s")
    parser.add_argument(
        "--forwards", metavar="N", type=COUNT, help="forward passes, at most (default: 52 for sudoku, 32 for text)"
    )
    parser.add_argument("--fields", metavar="JSON", help="what to try, lists of values (default: by scheduler)")
    parser.add_argument("--trials", metavar="N", type=COUNT, default=16, help="settings tried (default: 16)")
    parser.add_argument("--out", metavar="FOLDER", default="runs/tune", help="finished trials (default: %(default)s)")
    parser.add_argument("--write", metavar="FOLDER", help="write the chosen scheduler to FOLDER/scheduler, a head's")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    puzzles = parser.add_argument_group("task sudoku")
    puzzles.add_argument("--num-puzzles", metavar="N", type=COUNT, default=100, help="of each half (default: 100)")
    puzzles.add_argument("--clues", metavar="N", type=int, default=26, help="of each puzzle, 20 to 81 (default: 26)")
    texts = parser.add_argument_group("task text")
    texts.add_argument("--reference", metavar="FILE", help="held-out texts that settings are chosen on")
    texts.add_argument("--confirm-reference", metavar="FILE", help="other held-out texts, to confirm on")
    texts.add_argument("--num-samples", metavar="N", type=COUNT, default=32, help="texts of each half (default: 32)")
    texts.add_argument("--gen-length", metavar="N", type=COUNT, default=128, help="tokens of a text (default: 128)")
    model = parser.add_argument_group("model and sampling")
    add_bundled_model_flags(model, "default: the bundled model for the task")
    add_scheduler_flags(model, config=False)
    add_temperature_flags(model, top_p=False)
    add_seed_flag(model)
    parser.set_defaults(scheduler_config=None)


def run_tune(args: argparse.Namespace) -> int:
    """Choose, confirm and write. Returns the exit status: 0 also where the present setting stays."""
    from .. import evaluation
    from ..schedulers.by_name import change_scheduler

    if args.write is not None and not Path(args.write).is_dir():
        raise ValueError(f"--write {args.write} is not a folder: pass that of the head or the pipeline.")
    if args.task == "text" and (args.reference is None or args.confirm_reference is None):
        raise ValueError("--task text needs --reference and --confirm-reference, two files of held-out texts.")
    pipe = load_bundled_or(args, args.task)
    arm, present = arms_of(pipe.scheduler, args.fields)
    temperature = pipe.scheduler.config.temperature if args.temperature is None else args.temperature
    steps = args.forwards or {"sudoku": 52, "text": 32}[args.task]
    mark = f"{args.task} [{evaluation.pipeline_fingerprint(pipe)}] {present}"
    quality, lower = ("ngram_js", True) if args.task == "text" else ("solved", False)
    named = {"temperature": temperature, "quality": quality, "higher_is_better": not lower}
    (chosen,), tried = evaluation.tune_arms(
        pipe,
        _task(args, args.seed, args.reference),
        [arm],
        steps=steps,
        seed=args.seed,
        trials=args.trials,
        out_dir=f"{args.out}/trials",
        task_name=f"{mark} {_data(args, args.reference)}",
        report=lambda one, found: print(f"tried {json.dumps(one | found)}", file=sys.stderr),
        **named,
    )
    pair = _confirmed(
        pipe,
        _task(args, CONFIRM_SEED + args.seed, args.confirm_reference),
        {"present": present | {"name": "present"}, "chosen": chosen | {"name": "chosen"}},
        steps,
        CONFIRM_SEED + args.seed,
        f"{args.out}/confirm",
        f"{mark} {_data(args, args.confirm_reference)}",
        temperature,
        quality,
    )
    better = pair["difference"] < 0 if lower else pair["difference"] > 0
    fields = {name: value for name, value in chosen.items() if name not in ("name", "scheduler")}
    tuned = {name: chosen[name] for name, values in arm.items() if isinstance(values, list)}
    result = {"scheduler": arm["scheduler"], "steps": steps, "tried": len(tried), "chosen": tuned, "better": better}
    result |= {"metric": quality, "difference": pair["difference"], "low": pair["low"], "high": pair["high"]}
    if better and args.write is not None:
        change_scheduler(pipe.scheduler, None, fields | {"temperature": temperature}).save_pretrained(
            Path(args.write) / "scheduler"
        )
        result["written"] = str(Path(args.write) / "scheduler")
    print(json.dumps(result) if args.json else _sentence(result))
    return 0


def arms_of(scheduler: Any, fields: str | None) -> tuple[dict, dict]:
    """The arm whose lists are tried, and that of the present setting, as `tune_arms` and `run_comparison` take them.

    Args:
        scheduler: the present one.
        fields: {field: list of values} as JSON; None for those of `FIELDS`.
    Raises:
        ValueError: no JSON object of lists, an unknown field, or a scheduler that `FIELDS` does not know.
    """
    from ..schedulers.validation import own_fields

    kind = type(scheduler).__name__
    if fields is None and kind not in FIELDS:
        raise ValueError(f"What to try with {kind} is not known: pass --fields, such as '{{\"eta\": [0.1, 0.2]}}'.")
    try:
        tried = FIELDS[kind] if fields is None else json.loads(fields)
    except ValueError as error:
        raise ValueError(f"--fields {fields!r} is not JSON: {error}.") from None
    if not isinstance(tried, dict) or not tried or not all(isinstance(values, list) for values in tried.values()):
        raise ValueError(f'--fields must be an object of lists such as {{"num_remask": [2, 4, 8]}}, got {fields!r}.')
    config = own_fields(scheduler)
    if unknown := sorted(set(tried) - set(config)):
        raise ValueError(f"--fields: {kind} has no field {unknown[0]!r}; it has {', '.join(sorted(config))}.")
    kept = {name: value for name, value in config.items() if name not in ("temperature", "top_p", "top_k")}
    kept |= {"num_remask": None} if "eta" in tried and "num_remask" in config else {}
    kept |= {"eta": None} if "num_remask" in tried and "eta" in config else {}
    present = {name: value for name, value in config.items() if name in kept}
    return {"name": "tuned", "scheduler": kind, **kept, **tried}, {"scheduler": kind, **present}


def _confirmed(
    pipe: PrismPipeline,
    task: Any,
    arms: dict[str, dict[str, Any]],
    steps: int,
    seed: int,
    folder: str,
    task_name: str,
    temperature: float,
    quality: str,
) -> dict[str, Any]:
    """The paired difference of `quality`, "chosen" - "present", a row of `tabulate`. Finished cells are read.

    Rules that stop by themselves make as many forwards as they need, so these are not compared.
    """
    from ..evaluation.cells import Cells
    from ..evaluation.statistics import tabulate

    cells = Cells(Path(folder), task, task_name, {None: pipe}, temperature, quality)
    metrics = {(name, steps, seed): cells.get(arm, steps, seed)["metrics"] for name, arm in arms.items()}
    pairs = tabulate(metrics, list(arms), [steps], [seed], "present")[1]
    return next(pair for pair in pairs if pair["metric"] == quality and pair["arm"] == "chosen")


def _task(args: argparse.Namespace, seed: int, reference: str) -> Any:
    from .. import evaluation, sudoku

    if args.task == "sudoku":
        return evaluation.sudoku_task(sudoku.make_puzzles(args.num_puzzles, args.clues, seed=seed)[0])
    texts = evaluation.read_texts(reference)
    return evaluation.text_task(texts, num_samples=args.num_samples, gen_length=args.gen_length)


def _data(args: argparse.Namespace, reference: str | None) -> str:
    if args.task == "sudoku":
        return f"{args.num_puzzles} puzzles of {args.clues} clues"
    return f"{args.num_samples} texts of {args.gen_length} tokens, {reference}"


def _sentence(result: dict[str, Any]) -> str:
    interval = "" if result["low"] is None else f" ({result['low']:+.3f} to {result['high']:+.3f})"
    kept = f"Written to {result['written']}." if "written" in result else "Nothing was written."
    return (
        f"{result['tried']} settings of {result['scheduler']} tried in {result['steps']} forwards; the best: "
        f"{json.dumps(result['chosen'])}.\nOn other data, {result['metric']} against the present setting: "
        f"{result['difference']:+.3f}{interval}. {kept}"
    )
