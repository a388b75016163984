"""`prism eval compare`: decoding rules at equal numbers of forward passes, on both bundled models or one other."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import COUNT, Commands, add_command, refuse, show
from .loading import add_eval_flags, load_bundled_or

if TYPE_CHECKING:
    from ..pipeline_prism import PrismPipeline

# Puzzles and noise that settings are chosen on begin this far from those they are compared on.
TUNE_SEED = 500_000
TRIALS = 8  # of an arm that has settings to choose from


def add_parser(kinds: Commands) -> None:
    """Add `compare` to the subparsers of `prism eval`."""
    parser = add_command(
        kinds,
        "compare",
        run,
        "[FLAGS]",
        help="decoding rules at equal forward passes, with intervals and a plot; resumable",
        description="Run every arm (a scheduler and its fields) at equal forward passes over several seeds. Print "
        "and write a table with intervals, and a plot. The same command again goes on after a kill.",
        examples="""
            prism eval compare --quick
            prism eval compare --task text --forwards 16 64 --num-seeds 3
            prism eval compare --config arms.json --model MODEL --quality-head HEAD""",
    )
    parser.add_argument("--task", choices=["sudoku", "text", "all"], help="default: sudoku; without --model all")
    parser.add_argument("--config", metavar="FILE", help=".json or .toml: arms, forwards, seeds; docs/evaluation.md")
    parser.add_argument(
        "--forwards", metavar="N", type=COUNT, nargs="+", help="default: 16 52 for sudoku, 16 32 64 for text"
    )
    parser.add_argument(
        "--num-seeds", metavar="N", type=COUNT, help="from --seed on (default: 3 for sudoku, 5 for text)"
    )
    parser.add_argument("--quick", action="store_true", help="few seeds, puzzles and texts: minutes")
    parser.add_argument("--out", metavar="FOLDER", default="runs/compare", help="default: %(default)s")
    puzzles = parser.add_argument_group("task sudoku")
    puzzles.add_argument("--puzzles", metavar="FILE", help="puzzles, one a line (default: generated ones)")
    puzzles.add_argument("--num-puzzles", metavar="N", type=COUNT, help="default: 100")
    puzzles.add_argument("--clues", metavar="N", type=int, help="of each puzzle, 20 to 81 (default: 30)")
    texts = parser.add_argument_group("task text")
    texts.add_argument("--reference", metavar="FILE", help="held-out texts (default: those beside the text model)")
    texts.add_argument("--num-samples", metavar="N", type=COUNT, help="texts to generate (default: 64)")
    texts.add_argument(
        "--gen-length", metavar="N", type=COUNT, help="tokens of a text (default: what fits, at most 256)"
    )
    tuning = parser.add_argument_group("arms with lists of settings in --config")
    tuning.add_argument("--trials", metavar="N", type=COUNT, help=f"settings tried of each arm (default: {TRIALS})")
    tuning.add_argument(
        "--tune-forwards", metavar="N", type=COUNT, help="to try them at (default: the middle of --forwards)"
    )
    tuning.add_argument("--tune-reference", metavar="FILE", help="other held-out texts, to try them on")
    add_eval_flags(parser, "default: the bundled model for the task", sampling=False)


def run(args: argparse.Namespace) -> int:
    """Arms at equal forwards, with intervals and a figure; of both bundled models if none is named.

    Returns the exit status.
    """
    task = args.task or ("sudoku" if args.model or args.config else "all")
    if task == "all" and (args.model or args.config or args.quality_head):
        raise ValueError(
            "--task all is for the bundled models at their own arms; name one task with --model or --config."
        )
    if task == "sudoku":
        refuse(args, ("--reference", "--num-samples", "--gen-length"), "on Sudoku")
    if task == "text":
        refuse(args, ("--puzzles", "--num-puzzles", "--clues"), "on text")
    if args.puzzles is not None:
        refuse(args, ("--num-puzzles", "--clues"), "with --puzzles")
    if args.quick:
        refuse(args, ("--num-puzzles", "--num-samples", "--num-seeds"), "with --quick")
    from .. import evaluation

    kinds, results = ["sudoku", "text"] if task == "all" else [task], {}
    for kind in kinds:
        out = f"{args.out}/{kind}" if task == "all" else args.out
        pipe, compared, plan, name = (_compare_sudoku if kind == "sudoku" else _compare_text)(args)
        if args.config is not None:
            plan = _configured(args, plan, kind)
        if args.forwards is not None:
            plan["forwards"] = args.forwards
        if args.num_seeds is not None:
            plan["seeds"] = [args.seed + i for i in range(args.num_seeds)]
        if args.quick:
            plan["seeds"] = plan["seeds"][: 1 if kind == "sudoku" else 3]
        print(f"{kind}: {len(plan['arms'])} arms at {plan['forwards']} forwards", file=sys.stderr)
        plan["arms"] = _tuned(args, plan, kind, pipe, out)
        results[kind] = evaluation.run_comparison(pipe, compared, out_dir=out, task_name=name, **plan)
        print(f"table and figure of {kind} are in {out}", file=sys.stderr)
    text = "\n".join(evaluation.comparison_table(result) for result in results.values())
    return show(results if task == "all" else results[task], args, text)


def _configured(args: argparse.Namespace, plan: dict[str, Any], kind: str) -> dict[str, Any]:
    """The plan of `--config`; of the task's own only its quality stays, where the file names no other."""
    from .. import evaluation

    fields = evaluation.read_comparison(args.config)
    if kind == "text" and args.seed and args.num_seeds is None:
        raise ValueError("--seed has no effect with the seeds of --config; pass --num-seeds too, or leave --seed out.")
    kept = {field: plan[field] for field in ("quality", "higher_is_better") if field in plan}
    return (kept if fields.get("quality", plan.get("quality")) == plan.get("quality") else {}) | fields


def _tuned(
    args: argparse.Namespace, plan: dict[str, Any], kind: str, pipe: PrismPipeline, out: str
) -> list[dict[str, Any]]:
    """The arms of the plan, those with lists at the best of the settings tried: on other puzzles or texts."""
    from .. import evaluation
    from ..evaluation.arms import check_comparison
    from ..evaluation.tuning import first_settings, knobs

    if not any(map(knobs, plan["arms"])):
        refuse(args, ("--trials", "--tune-forwards", "--tune-reference"), "without an arm of --config that has lists")
        return plan["arms"]
    if kind == "sudoku" and args.tune_reference is not None:
        raise ValueError("--tune-reference is for text; puzzles to choose settings on are generated.")
    check_comparison(  # what it refuses must not show after the search
        first_settings(plan["arms"]),
        plan["forwards"],
        plan["seeds"],
        plan.get("temperature", 1.0),
        {None: pipe},
        plan.get("reference"),
    )
    if kind == "sudoku":
        task, mark = _sudoku_task(args, TUNE_SEED + args.seed)
        mark += f" [{evaluation.pipeline_fingerprint(pipe)}]"
    elif args.tune_reference is None:
        raise ValueError("Lists in --config are settings to choose from, on other texts: pass --tune-reference FILE.")
    elif _share_a_text(_texts_read(args, args.tune_reference), _texts_read(args, args.reference)):
        raise ValueError("--tune-reference has a text of the texts that the result is reported on: pass others.")
    else:
        task, mark = _text_task(args, pipe, args.tune_reference)
    forwards = sorted(plan["forwards"])
    arms, _ = evaluation.tune_arms(
        pipe,
        task,
        plan["arms"],
        steps=args.tune_forwards or forwards[len(forwards) // 2],
        seed=TUNE_SEED + args.seed,
        trials=args.trials or TRIALS,
        out_dir=f"{out}/tuning",
        task_name=f"{_named(args, kind)}: {mark}",
        report=lambda arm, found: print(f"tried {json.dumps(arm | found)}", file=sys.stderr),
        **{name: plan[name] for name in ("temperature", "quality", "higher_is_better") if name in plan},
    )
    return arms


def _compare_sudoku(args: argparse.Namespace) -> tuple[PrismPipeline, Any, dict[str, Any], str]:
    """Pipeline, task, plan and name of a comparison on the puzzles of a file, or on generated ones."""
    from .. import evaluation
    from ..evaluation.arms import SUDOKU_ARMS
    from .sudoku import read_puzzles

    if args.puzzles is None:
        task, mark = _sudoku_task(args, args.seed)
    else:
        if not Path(args.puzzles).is_file():
            raise ValueError(f"--puzzles {args.puzzles} is not a file: pass a text file with one puzzle a line.")
        puzzles, _ = read_puzzles(args.puzzles)
        digest = hashlib.sha256(puzzles.tobytes()).hexdigest()[:12]
        task, mark = evaluation.sudoku_task(puzzles), f"{len(puzzles)} puzzles of {Path(args.puzzles).name} [{digest}]"
    pipe = load_bundled_or(args, "sudoku")
    plan = {"arms": SUDOKU_ARMS, "forwards": [16, 52], "seeds": [args.seed + i for i in range(3)]}
    return pipe, task, plan, f"{_named(args, 'sudoku')}: {mark} [{evaluation.pipeline_fingerprint(pipe)}]"


def _sudoku_task(args: argparse.Namespace, seed: int) -> tuple[Any, str]:
    """The task of solving generated puzzles; its name."""
    from .. import evaluation, sudoku

    count, clues = 20 if args.quick else args.num_puzzles or 100, 30 if args.clues is None else args.clues
    puzzles, _ = sudoku.make_puzzles(count, clues, seed=seed)
    return evaluation.sudoku_task(puzzles), f"{count} puzzles of {clues} clues from seed {seed}"


def _compare_text(args: argparse.Namespace) -> tuple[PrismPipeline, Any, dict[str, Any], str]:
    """Pipeline, task, plan and name of a comparison by text written from nothing."""
    from .. import bundled, evaluation

    pipe, plan = load_bundled_or(args, "text"), evaluation.text_plan(args.model or bundled("text"))
    plan["seeds"] = [args.seed + seed for seed in plan["seeds"]]
    plan["forwards"] = [steps for steps in plan["forwards"] if not args.quick or steps <= 32] or plan["forwards"][:1]
    task, mark = _text_task(args, pipe, args.reference)
    return pipe, task, plan, f"{_named(args, 'text')}: {mark}"


def _texts_read(args: argparse.Namespace, reference: str | None) -> set[str]:
    """The texts that generated ones are compared with, however their lines are broken."""
    from .. import bundled
    from ..evaluation.text_compare import held_out

    texts = {" ".join(text.split()) for text in held_out(args.model or bundled("text"), reference)}
    return texts - {""}  # which is in every text; scoring refuses it by name


def _share_a_text(some: set[str], others: set[str]) -> bool:
    """Is a text of one side also on the other, whole or as a part of a text there?"""
    return any(a in b or b in a for a in some for b in others)


def _text_task(args: argparse.Namespace, pipe: PrismPipeline, reference: str | None) -> tuple[Any, str]:
    """The task of writing text from nothing, judged by a file or else by the model's own held-out texts; its name."""
    from .. import bundled, evaluation
    from .text import room

    folder, count = args.model or bundled("text"), 16 if args.quick else args.num_samples or 64
    length = room(pipe, None, args.gen_length)
    task = evaluation.task_of_folder(folder, reference, num_samples=count, gen_length=length)
    mark = evaluation.pipeline_fingerprint(pipe, *evaluation.folder_contents(folder, reference))
    return task, f"{count} texts of {length} tokens [{mark}]"


def _named(args: argparse.Namespace, default: str) -> str:
    """The model and head, for people; a finished cell is found again by this and `evaluation.pipeline_fingerprint`."""
    head = f" with {args.quality_head}" if args.quality_head else ""
    return f"{args.model or f'bundled {default}'}{head}"
