"""How much of a full PRISM fine-tune's gain do a LoRA adapter and a head on a frozen backbone recover?

Held fixed: the pretrained Sudoku MDM, training data and steps (examples/sudoku/prism.args), puzzles, seeds, random
order, temperature 1, 4 cells remasked a step, forwards. Varied: which weights PRISM trains. Reference: the MDM itself
without remasking. Gain: solved, minus what the reference solves; goals: LoRA at least 0.9 and frozen at least 0.5 of
the gain of the full fine-tune, at each number of forwards.

    examples/sudoku/heads.sh runs/sudoku-puzzles       # trains the three, then runs this
    python -m benchmarks.sudoku_heads runs/sudoku-puzzles --runs runs

Each cell (arm, forwards, seed) is appended to `<runs>/sudoku-heads.jsonl` when done and not run again for the same
weights: stop at any time and start again. Writes one JSON (--out). The last line of stdout is that JSON on one line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch

from benchmarks.shared import ROOT, give, origin
from prism_pipelines import MDLMScheduler, PrismPipeline, PrismScheduler, sudoku
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation import evaluate_sudoku, pipeline_solver, wilson_interval
from prism_pipelines.evaluation.tables import markdown_table

ARMS = {"mdm": "MDM, no remasking", "full": "full", "lora": "LoRA", "frozen": "frozen backbone"}
GOALS = {"lora": 0.9, "frozen": 0.5}
SAME = {"order": "random", "temperature": 1.0}
NUM_REMASK = 4
PUZZLE_SEED = 10_000


def digest(folder: Path) -> str:
    """Hash of the weights and configs that a folder is loaded from."""
    parts = ["model", "quality_head", "adapter_config.json", "adapter_model.safetensors"]
    files = [file for part in parts for file in sorted((folder / part).rglob("*")) if file.is_file()]
    files += [folder / part for part in parts if (folder / part).is_file()]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def load(arm: str, base: Path, runs: Path, dtype: str) -> PrismPipeline:
    """The pipeline of an arm at the settings that all share."""
    pipe = PrismPipeline.from_pretrained(str(base if arm == "mdm" else runs / f"sudoku-heads-{arm}"))
    pipe.scheduler = MDLMScheduler(**SAME) if arm == "mdm" else PrismScheduler(num_remask=NUM_REMASK, **SAME)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(getattr(torch, dtype))


def measure(args, cells_file: Path) -> list[dict]:
    """Every cell, from the file or run now."""
    done = [json.loads(line) for line in cells_file.read_text().splitlines()] if cells_file.is_file() else []
    puzzles, _ = sudoku.make_puzzles(args.num_puzzles, args.clues, PUZZLE_SEED)
    cells = []
    for arm in ARMS:
        folder = args.base if arm == "mdm" else args.runs / f"sudoku-heads-{arm}"
        names = {"arm": arm, "weights": digest(folder), "puzzles": args.num_puzzles, "clues": args.clues}
        names["dtype"] = args.dtype
        pipe = None
        for forwards in args.forwards:
            for seed in range(args.seeds):
                key = names | {"forwards": forwards, "seed": seed}
                found = next((cell for cell in done if key.items() <= cell.items()), None)
                if found is None:
                    pipe = pipe or load(arm, args.base, args.runs, args.dtype)
                    solved = evaluate_sudoku(pipeline_solver(pipe, forwards, seed=seed), puzzles).solved
                    found = key | {"solved": int(solved.sum())}
                    with cells_file.open("a") as file:
                        file.write(json.dumps(found) + "\n")
                cells.append(found)
    return cells


def table(cells: list[dict], puzzles: int) -> list[dict]:
    """One row for each number of forwards and arm: solved, its interval, and the share of the full gain."""
    rows = []
    for forwards in sorted({cell["forwards"] for cell in cells}):
        share = {}
        for arm in ARMS:
            solved = [cell["solved"] for cell in cells if cell["forwards"] == forwards and cell["arm"] == arm]
            of = puzzles * len(solved)
            share[arm] = sum(solved) / of
            low, high = wilson_interval(sum(solved), of)
            rows.append({"forwards": forwards, "arm": arm, "solved": share[arm], "low": low, "high": high, "of": of})
        gain = share["full"] - share["mdm"]
        for row in rows[-len(ARMS) :]:
            row["share_of_gain"] = (row["solved"] - share["mdm"]) / gain if gain > 0 else None
    return rows


def main(argv=None) -> int:
    """Measure, print the table, write the JSON."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="saved pipeline of the pretrained MDM")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of sudoku-heads-full, -lora, -frozen")
    parser.add_argument("--num-puzzles", type=int, default=500)
    parser.add_argument("--clues", type=int, default=30)
    parser.add_argument("--forwards", type=int, nargs="+", default=[16, 52])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the models")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures" / "sudoku_heads.json")
    args = parser.parse_args(argv)
    cells = measure(args, args.runs / "sudoku-heads.jsonl")
    rows = table(cells, args.num_puzzles)
    print(f"{args.clues} clues, random order, temperature 1; solved, 95 % interval, share of the full gain\n")
    cells_shown = []
    for row in rows:
        share, goal = row["share_of_gain"], GOALS.get(row["arm"])
        met = "" if goal is None or share is None else f"{goal}: {'met' if share >= goal else 'MISSED'}"
        solved = f"{100 * row['solved']:.1f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})"
        gained = "-" if share is None else f"{share:.2f}"
        cells_shown.append([row["forwards"], ARMS[row["arm"]], solved, gained, met])
    print(markdown_table(["forwards", "trained", "solved %", "share of gain", "goal"], cells_shown))
    result = {"rows": rows, "cells": cells, **origin()}
    return give(result, args.out)


if __name__ == "__main__":
    sys.exit(main())
