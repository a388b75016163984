"""`prism eval sudoku`: share of generated puzzles that a model solves."""

from __future__ import annotations

import argparse
import math
from typing import Any

from .arguments import COUNT, Commands, add_command, show
from .loading import add_eval_flags, load_bundled_or, scheduler_facts, steps_within


def add_parser(kinds: Commands) -> None:
    """Add `sudoku` to the subparsers of `prism eval`."""
    parser = add_command(
        kinds,
        "sudoku",
        run,
        "[FLAGS]",
        help="share of puzzles solved, with its interval",
        description="Solve generated puzzles and print the share solved, with its 95 % interval.",
        examples="""
            prism eval sudoku --clues 26 --num-puzzles 200
            prism eval sudoku --scheduler mdlm --forwards 81
            prism eval sudoku --quality-head HEAD --risk-coverage""",
    )
    parser.add_argument(
        "--forwards", metavar="N", type=COUNT, default=52, help="forward passes of a puzzle, at most (default: 52)"
    )
    parser.add_argument("--num-puzzles", metavar="N", type=COUNT, default=100, help="default: 100")
    parser.add_argument("--clues", metavar="N", type=int, default=30, help="of each puzzle, 20 to 81 (default: 30)")
    parser.add_argument(
        "--risk-coverage",
        action="store_true",
        help="share of wrong grids among the surest tenth, fifth, ... of them; needs a calibrated head",
    )
    add_eval_flags(parser, "default: the bundled Sudoku model")


def run(args: argparse.Namespace) -> int:
    """Share of generated puzzles that the model solves. Returns the exit status."""
    import numpy as np

    from .. import evaluation, sudoku
    from ..pipeline_checks import check_calibrated
    from ..schedulers import JudgeAndRepairScheduler

    pipe = load_bundled_or(args, "sudoku")
    outputs: list[Any] = []
    if args.risk_coverage:
        check_calibrated(pipe.quality_head, "--risk-coverage")
    # The forward that judges the result counts; judge and repair makes its own.
    looks = args.risk_coverage and not isinstance(pipe.scheduler, JudgeAndRepairScheduler)
    steps = steps_within(args.forwards, pipe) - looks
    if steps < 1:
        raise ValueError("--forwards 1 leaves no forward to fill the grid, since --risk-coverage judges in one.")
    puzzles, _ = sudoku.make_puzzles(args.num_puzzles, args.clues, seed=args.seed)
    solve = evaluation.pipeline_solver(pipe, steps, args.seed, outputs.append, looks)
    score = evaluation.evaluate_sudoku(solve, puzzles)
    low, high = score.interval
    result = {"solved": score.success, "low": low, "high": high, "puzzles": len(puzzles), "clues": args.clues}
    nfe = [count for out in outputs for count in out.nfe_per_row]
    result |= {"forwards": args.forwards, "mean_forwards": float(np.mean(nfe)), "seed": args.seed}
    if outputs[0].accepted is not None:
        accepted = np.concatenate([out.accepted.cpu().numpy() for out in outputs])
        result |= {"accepted": int(accepted.sum()), "accepted_right": int((accepted & score.solved).sum())}
    if args.risk_coverage:
        confidence = np.concatenate([out.confidence.cpu().numpy() for out in outputs])
        result |= _risk_at_tenths(evaluation.risk_coverage(confidence, score.solved))
    return show(result | scheduler_facts(pipe), args)


def _risk_at_tenths(curve: dict) -> dict:
    """Share of wrong answers among the surest tenth, two tenths, ... of them, and the area, of `risk_coverage`."""
    count = len(curve["risk"])
    risk = {f"{tenth}0 %": curve["risk"][math.ceil(tenth * count / 10) - 1] for tenth in range(1, 11)}
    return {"risk": risk, "risk_area": curve["area"]}
