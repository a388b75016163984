"""How often is a Sudoku solved in a given number of forward passes, and what does each remasking rule add?

Held fixed: bundled model, puzzles, seeds, random order, temperature 1. Varied: the rule that chooses what is remasked,
and the number of forwards. Reference: MDLM, which remasks nothing. The one knob of every other rule is the best of four
on 100 other puzzles of 30 clues at 52 forwards. "Random cells" is PRISM's scheduler with noise for qualities. Two arms
stand outside these settings and say so: MDLM in confidence order (greedy), and PRISM at the settings the model ships
with.

Every arm sees the same puzzles and seeds: 1,000 with 30 clues, 1,000 with 24 to 26 (a third each), all with a unique
solution, from seeds that training never used. A success is a valid grid with every clue kept. Intervals of shares are
Wilson's, 95 %; PRISM is compared with each other arm by the ratio of failures, with a bootstrap over puzzles.
Calibration: on puzzles of 25 to 60 clues the model writes `NUM_REVEALED` cells a forward in random order; after each
forward the head scores the cells written so far; one is right if it equals the unique solution.

Each cell (arm, forwards, clues, seed) is a file below `--cells` when done, and not run again for the same model and
settings: stop at any time and start again. When all are there the table and the figure are written to docs/figures.
`--quick` runs a part of them on fewer puzzles and exits 1 if an interval misses that of the committed table.
The last line of stdout is one JSON object.
Usage: python -m benchmarks.sudoku [--quick] [--device cuda] [--dtype bfloat16]
More puzzles for fewer numbers of forwards and rules: --forwards 52 --arms MDLM PRISM ... --table FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared import ROOT, disagreements, files_fingerprint, origin
from prism_pipelines import MDLMScheduler, PrismPipeline, QualityHead, bundled, sudoku
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation import (
    evaluate_sudoku,
    head_calibration,
    paired_failure_ratio,
    pipeline_solver,
    run_comparison,
    tune_arms,
    wilson_interval,
)
from prism_pipelines.schedulers.validation import own_fields

FIGURES = ROOT / "docs" / "figures"
SAME = {"order": "random"}
NUM_REMASK = [2, 4, 8, 16]  # the paper's number for Sudoku is 4
PRISM = "PRISM"
ARMS = [  # a list is a knob
    {"name": "MDLM", "scheduler": "MDLMScheduler", **SAME},
    {"name": PRISM, "scheduler": "PrismScheduler", **SAME, "num_remask": NUM_REMASK},
    {"name": "self-confidence", "scheduler": "SelfConfidenceScheduler", **SAME, "num_remask": NUM_REMASK},
    {"name": "random cells", "scheduler": "PrismScheduler", **SAME, "num_remask": NUM_REMASK, "model": "noise"},
    {"name": "token-to-mask", "scheduler": "TokenToMaskScheduler", **SAME, "remask_threshold": [0.05, 0.2, 0.5, 0.8]},
    {"name": "ReMDM-cap", "scheduler": "ReMDMScheduler", "strategy": "cap", "eta": [0.02, 0.05, 0.1, 0.2]},
]
OUTSIDE = ("MDLM, confidence order", "PRISM as shipped")
NUM_REVEALED = 4  # cells written a forward, for calibration
FORWARDS = (8, 16, 32, 52, 81)
CLUES = {"30": (30,), "24-26": (24, 25, 26)}
CALIBRATION_CLUES = (25, 30, 36, 44, 52, 60)
PUZZLE_SEED, CHOOSE_SEED, NUM_CHOOSE = 10_000, 12_000, 100


class NoiseHead(QualityHead):
    """A quality head that knows nothing: seeded noise, so that remasking falls on random cells."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size)
        self.generator = torch.Generator()

    def forward(self, hidden, attention_mask=None):
        """Normal noise (B, L), float32, for hidden states (B, L, H)."""
        return torch.randn(hidden.shape[:2], generator=self.generator).to(hidden.device)


def load(model: Path, device: str, dtype: str) -> tuple[PrismPipeline, PrismPipeline]:
    """The pipeline, and the same with noise for qualities."""
    pipe = PrismPipeline.from_pretrained(model).to(device)
    pipe.to(getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    head, spec = NoiseHead(pipe.model.config.hidden_size), pipe.config.mdm_spec
    noise = PrismPipeline(pipe.model, pipe.tokenizer, quality_head=head, scheduler=pipe.scheduler, mdm_spec=spec)
    noise.set_progress_bar_config(disable=True)
    return pipe, noise.to(device)


def task_of(puzzles: np.ndarray, batch_size: int):
    """Solving puzzles, as a task of `run_comparison`; stops if a clue was altered."""

    def task(pipe, steps: int, seed: int) -> dict:
        if isinstance(pipe.quality_head, NoiseHead):
            pipe.quality_head.generator.manual_seed(seed)
        score = evaluate_sudoku(pipeline_solver(pipe, steps, seed), puzzles, batch_size=batch_size)
        if score.altered.any():
            raise RuntimeError("Clues were altered.")
        return {"solved": score.solved.tolist()}

    return task


def outside_arms(pipe: PrismPipeline) -> list[dict]:
    """The two arms with an order and a temperature of their own."""
    confidence, shipped = OUTSIDE
    return [
        {"name": confidence, "scheduler": "MDLMScheduler", "order": "confidence", "temperature": 0.0},
        {"name": shipped, "scheduler": type(pipe.scheduler).__name__, **own_fields(pipe.scheduler)},
    ]


def spread(total: int, parts: int) -> list[int]:
    """`total` as `parts` whole numbers that differ by at most one."""
    return [(total + i) // parts for i in range(parts)]


def puzzles_of(clue_counts: tuple[int, ...], total: int) -> tuple[np.ndarray, np.ndarray]:
    """`total` unique puzzles and their solutions, equal shares of each number of clues. A smaller total is a subset."""
    made = [
        sudoku.make_puzzles(n, clues, PUZZLE_SEED)
        for clues, n in zip(clue_counts, spread(total, len(clue_counts)), strict=True)
    ]
    return np.concatenate([puzzles for puzzles, _ in made]), np.concatenate([solutions for _, solutions in made])


def solved_arrays(
    folder: Path, task_name: str, arms: list[dict], forwards: list[int], seeds: list[int]
) -> dict[tuple, np.ndarray]:
    """{(arm, forwards): bool (S, N)} from the cells of a comparison: which puzzles were solved with each seed."""
    found, arms = {}, json.loads(json.dumps(arms))
    for path in (folder / "cells").glob("*.json"):  # beside what a kill in the middle of a write left
        cell = json.loads(path.read_text())
        if cell["task"] == task_name and cell["arm"] in arms:  # the folder may hold other settings of an arm
            found[cell["arm"]["name"], cell["forwards"], cell["seed"]] = cell["metrics"]["solved"]
    keys = [(arm["name"], t) for arm in arms for t in forwards]  # the folder may also hold other numbers of forwards
    return {key: np.array([found[(*key, seed)] for seed in seeds]) for key in keys}


def tabulate(solved: dict, arms: list[dict], forwards: list[int], clues: str) -> tuple[list[dict], list[dict]]:
    """Rows of the table (share solved with interval), and of the paired comparisons PRISM / other."""
    rows, pairs = [], []
    for steps in forwards:
        for arm in arms:
            marks = solved[arm["name"], steps]
            low, high = wilson_interval(int(marks.sum()), marks.size)
            place = {"clues": clues, "forwards": steps, "arm": arm["name"]}
            rows.append({**place, "solved": int(marks.sum()), "n": marks.size, "low": low, "high": high})
            if arm["name"] != PRISM:
                pairs.append({**place, **paired_failure_ratio(~solved[PRISM, steps], ~marks)})
    return rows, pairs


def measure_calibration(pipe, total: int, batch_size: int) -> dict:
    """Calibration of the head on grids that the model filled partially itself, k cells a forward in random order."""
    shipped = pipe.scheduler
    pipe.scheduler = MDLMScheduler(**SAME, temperature=1.0)
    puzzles, solutions = puzzles_of(CALIBRATION_CLUES, total)
    found = head_calibration(pipe, puzzles, solutions, num_revealed=NUM_REVEALED, batch_size=batch_size)
    pipe.scheduler = shipped
    return found


def draw(result: dict, table: Path) -> None:
    """The figures beside `table`: success against forwards, where there are enough for a curve, and reliability."""
    if len({row["forwards"] for row in result["rows"]}) > 2:
        draw_success(result, table.with_suffix(".png"))
    draw_calibration(result, table.with_name(f"{table.stem}_calibration.png"))


def draw_success(result: dict, path: Path) -> None:
    """Share solved against forwards."""
    from prism_pipelines.evaluation.plots import success_figure

    panels = {}
    for row in result["rows"]:
        point = (row["forwards"], row["solved"] / row["n"], row["low"], row["high"])
        panels.setdefault(f"{row['clues']} clues", {}).setdefault(row["arm"], []).append(point)
    success_figure(panels, path)


def draw_calibration(result: dict, path: Path) -> None:
    """Reliability of the head."""
    from prism_pipelines.evaluation.plots import reliability_figure

    titles = {"revealed": f"{NUM_REVEALED} cells just revealed", "filled": "all states of the run"}
    reliability_figure({title: result["calibration"][name]["reliability"] for name, title in titles.items()}, path)


def parse_args(argv=None):
    """The flags; see the module's docstring."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part, in minutes, checked against the committed table")
    parser.add_argument("--model", type=Path, default=None, help="saved pipeline folder (default: the bundled one)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every cell (default: %(default)s)")
    parser.add_argument("--forwards", type=int, nargs="+", help="numbers of forwards (default: 8 16 32 52 81)")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="some of the arms, PRISM among them (default: all)")
    parser.add_argument("--num-puzzles", type=int, default=1000, help="of each set (default: %(default)s)")
    parser.add_argument("--cells", type=Path, default=ROOT / "runs" / "sudoku_cells", help="finished cells")
    parser.add_argument("--table", type=Path, default=FIGURES / "sudoku.json", help="committed table")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args(argv)
    if (args.forwards or args.arms) and args.quick:
        parser.error("--quick runs all arms in 16 and 52 forwards: leave --forwards and --arms out")
    if (args.forwards or args.arms) and args.table.resolve() == parser.get_default("table").resolve():
        parser.error("--forwards and --arms make another table: name its file by --table")
    names = [arm["name"] for arm in ARMS] + list(OUTSIDE)
    if args.arms and (PRISM not in args.arms or not set(args.arms) <= set(names)):
        parser.error(f"--arms must be some of {names}, {PRISM} among them, got {args.arms}")
    return args


def main(argv=None) -> int:
    """Run what is missing, then write table and figures; with --quick compare with the table. Returns exit status."""
    args = parse_args(argv)
    model = args.model or Path(bundled("sudoku"))
    pipe, noise = load(model, args.device, args.dtype)
    forwards, seeds = ([16, 52], [0]) if args.quick else (list(args.forwards or FORWARDS), list(range(args.seeds)))
    total = 60 if args.quick else args.num_puzzles
    settings = {"num_puzzles": total, "puzzle_seed": PUZZLE_SEED, "dtype": args.dtype}
    mark, committed = files_fingerprint(model, settings), None
    if args.quick:
        committed = json.loads(args.table.read_text())
        arms = [arm for arm in committed["arms"] if "outside" not in arm]
    else:
        arms, _ = tune_arms(
            pipe,
            task_of(sudoku.make_puzzles(NUM_CHOOSE, 30, CHOOSE_SEED)[0], args.batch_size),
            [arm for arm in ARMS if not args.arms or arm["name"] in args.arms],
            steps=52,
            seed=0,
            trials=4,
            out_dir=args.cells / "tuning",
            task_name=files_fingerprint(model, {"dtype": args.dtype}),
            models={"noise": noise},
            report=lambda arm, found: print(json.dumps(arm | found), file=sys.stderr, flush=True),
        )
    arms += [{**arm, "outside": True} for arm in outside_arms(pipe) if not args.arms or arm["name"] in args.arms]

    rows, pairs = [], []
    for clues, counts in CLUES.items():
        run_comparison(
            pipe,
            task_of(puzzles_of(counts, total)[0], args.batch_size),
            arms,
            forwards,
            seeds,
            out_dir=args.cells / clues,
            task_name=mark,
            models={"noise": noise},
        )
        some = tabulate(solved_arrays(args.cells / clues, mark, arms, forwards, seeds), arms, forwards, clues)
        rows, pairs = rows + some[0], pairs + some[1]

    settings |= {"forwards": forwards, "seeds": seeds, "fingerprint": mark}
    result = {"settings": settings, "arms": arms, **origin(args.device), "rows": rows, "pairs": pairs}
    total = 10 * len(CALIBRATION_CLUES) if args.quick else total
    result["calibration"] = measure_calibration(pipe, total, args.batch_size)
    status = 0
    if args.quick:
        apart = disagreements(rows, committed["rows"], ("clues", "forwards", "arm"))
        result["disagreements"] = apart
        status = 1 if apart else 0
        print("\n".join(apart) or f"all {len(rows)} figures agree with {args.table.name}", file=sys.stderr)
    else:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        args.table.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        draw(result, args.table)
    print(json.dumps(result))
    return status


if __name__ == "__main__":
    sys.exit(main())
