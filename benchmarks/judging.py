"""Does it pay to judge whole canvases and repair them, at equal forward passes?

Held fixed: the Sudoku model, its quality head, puzzles, one generator a puzzle. Varied: the decoding rule. The head's
temperature is fitted first, on finished runs of other puzzles, and `JudgeAndRepairScheduler` has its default settings.
Reported by arm: solved within each number of forwards, with Wilson intervals; mean forwards; of judge and repair how
many grids it accepted and how many of these are right, and the area under risk and coverage of `out.confidence`.
The last line of stdout is one JSON object; --table writes it to a file.
Usage: python -m benchmarks.judging [--quick] [--model FOLDER] [--quality-head FOLDER] [--dtype bf16] [--table FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared import origin
from prism_pipelines import PrismPipeline, bundled, schedulers, sudoku
from prism_pipelines.evaluation import fit_temperature, risk_coverage, row_generators, wilson_interval

CLUES = {"24-26": (24, 25, 26), "30": (30,)}
SEEDS = {"judge": 31_000, "calibrate": 32_000}
WITHIN = (17, 26, 34, 52, 128)
RANDOM = {"order": "random", "temperature": 1.0}
ARMS = {  # name: scheduler, settings, most forwards
    "confidence order": ("MDLMScheduler", {"order": "confidence", "temperature": 0.0}, 52),
    "self-confidence": ("SelfConfidenceScheduler", {**RANDOM, "num_remask": 8}, 52),
    "prompt": ("PromptConfidenceScheduler", {**RANDOM, "num_remask": 8}, 52),
    "draw": ("DrawConfidenceScheduler", {**RANDOM, "num_remask": 8}, 52),
    "sweep": ("StridedSweepScheduler", {"order": "confidence", "temperature": 1.0}, 52),
    "PRISM, step by step": ("PrismScheduler", {**RANDOM, "num_remask": 8}, 52),
    "judge and repair": ("JudgeAndRepairScheduler", {}, 128),
}


def puzzles_of(clues: tuple[int, ...], total: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """About `total` unique puzzles and their solutions, int64 (N, 81), equal shares of each number of clues."""
    made = [sudoku.make_puzzles(total // len(clues), number, seed) for number in clues]
    return tuple(np.concatenate(part) for part in zip(*made, strict=True))


def run_arm(pipe, arm: str, puzzles: np.ndarray, solutions: np.ndarray, batch_size: int, seed: int) -> dict:
    """Arrays over the puzzles: right, nfe, and where the pipeline says so accepted and confidence."""
    kind, settings, most = ARMS[arm]
    pipe.scheduler = getattr(schedulers, kind)(**settings)
    found = {"right": [], "nfe": [], "accepted": [], "confidence": []}
    for start in range(0, len(puzzles), batch_size):
        rows = slice(start, start + batch_size)
        out = pipe(
            infill=torch.from_numpy(sudoku.to_ids(puzzles[rows])),
            num_inference_steps=most,
            generator=row_generators(puzzles[rows], seed),
            output_type="seq",
        )
        found["right"] += (out.sequences.cpu().numpy() == solutions[rows]).all(-1).tolist()
        found["nfe"] += out.nfe_per_row
        found["accepted"] += [] if out.accepted is None else out.accepted.tolist()
        found["confidence"] += [] if out.confidence is None else out.confidence.tolist()
    return {name: np.array(values) for name, values in found.items()}


def calibrate(pipe, total: int, batch_size: int) -> float:
    """Fit and set the temperature of the pipeline's head, on grids that confidence order finished in few forwards."""
    pipe.quality_head.register_to_config(temperature=None)
    pipe.scheduler = schedulers.MDLMScheduler(order="confidence", temperature=0.0)
    puzzles, solutions = puzzles_of((24, 26, 30), total, SEEDS["calibrate"])
    quality, right = [], []
    for start in range(0, len(puzzles), batch_size):
        rows = slice(start, start + batch_size)
        ids = torch.from_numpy(sudoku.to_ids(puzzles[rows]))
        out = pipe(infill=ids, num_inference_steps=14, return_quality=True, output_type="seq")
        blank = puzzles[rows] == 0
        quality.append(out.quality.cpu().numpy()[blank])
        right.append((out.sequences.cpu().numpy() == solutions[rows])[blank])
    temperature = fit_temperature(np.concatenate(quality), np.concatenate(right))
    pipe.quality_head.register_to_config(temperature=temperature)
    return temperature


def row_of(arm: str, clues: str, found: dict) -> dict:
    """One row of the table."""
    right, nfe, n = found["right"], found["nfe"], len(found["right"])
    row = {"arm": arm, "clues": clues, "n": n, "mean_forwards": float(nfe.mean()), "median": float(np.median(nfe))}
    for most in WITHIN:
        solved = int((right & (nfe <= most)).sum())
        row[f"within_{most}"] = [solved, *wilson_interval(solved, n)]
    if len(found["accepted"]):
        row |= {"accepted": int(found["accepted"].sum()), "accepted_right": int((found["accepted"] & right).sum())}
    if len(found["confidence"]):
        row["risk_area"] = risk_coverage(found["confidence"], right)["area"]
    return row


def parse_args(argv=None):
    """The flags; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 puzzles a kind, in minutes")
    parser.add_argument("--num-puzzles", type=int, default=300, help="of each kind (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME")
    parser.add_argument("--model", default=None, help="saved pipeline folder (default: the bundled one)")
    parser.add_argument("--quality-head", default=None, help="folder of another head")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--table", type=Path, help="write the JSON there")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Calibrate, run every arm on both kinds of puzzles, print the table. Returns the exit status."""
    args = parse_args(argv)
    pipe = PrismPipeline.from_pretrained(args.model or bundled("sudoku"), quality_head=args.quality_head)
    pipe.to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    pipe.set_progress_bar_config(disable=True)
    total, rows = 60 if args.quick else args.num_puzzles, []
    temperature = calibrate(pipe, total, args.batch_size)
    print(f"temperature {temperature:.3f}", file=sys.stderr, flush=True)
    for clues, numbers in CLUES.items():
        puzzles, solutions = puzzles_of(numbers, total, SEEDS["judge"])
        for arm in args.arms:
            began = time.perf_counter()
            row = row_of(arm, clues, run_arm(pipe, arm, puzzles, solutions, args.batch_size, args.seed))
            rows.append(row | {"seconds": round(time.perf_counter() - began)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    settings = {"num_puzzles": total, "seeds": SEEDS, "seed": args.seed, "dtype": args.dtype}
    result = {"settings": settings, "temperature": temperature, **origin(), "rows": rows}
    if args.table:
        args.table.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
