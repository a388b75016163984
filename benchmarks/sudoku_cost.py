"""What does sampling cost beside the forward passes it consists of?

Held fixed: bundled Sudoku model, 64 puzzles as one batch, 52 forwards, seed, dtype, device. Varied: the scheduler.
Reference: as many bare forwards of the same transformers model on the same ids, with all its logits. The runs of all
rows alternate, so that a slow spell of the machine falls on all of them. Goal: a ratio of at most 1.25.
The last line of stdout is one JSON object: rows, device, versions, commit, seed.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch

from benchmarks.shared import give, origin, seconds
from prism_pipelines import MDLMScheduler, PrismPipeline, PrismScheduler, SelfConfidenceScheduler, bundled, sudoku
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation import pipeline_solver
from prism_pipelines.schedulers.validation import loop_steps


def main(argv=None) -> int:
    """Time every scheduler beside the bare forwards and print the table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="saved pipeline folder (default: the bundled one)")
    parser.add_argument("--num-puzzles", type=int, default=64)
    parser.add_argument("--forwards", type=int, default=52)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args(argv)

    pipe = PrismPipeline.from_pretrained(args.model or bundled("sudoku")).to(args.device)
    pipe.to(getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    puzzles, _ = sudoku.make_puzzles(args.num_puzzles, clues=30, seed=10_000)
    ids = torch.from_numpy(sudoku.to_ids(puzzles)).to(args.device)
    same = {"order": "random", "temperature": 1.0}
    schedulers = {
        "MDLM": MDLMScheduler(**same),
        "self-confidence": SelfConfidenceScheduler(**same, num_remask=4),
        "PRISM": PrismScheduler(**same, num_remask=4),
        "PRISM as shipped": pipe.scheduler,
    }

    def bare():
        with torch.inference_mode():
            for _ in range(args.forwards):
                pipe.model(input_ids=ids)

    def sampling(scheduler):
        def run():
            pipe.scheduler = scheduler
            pipeline_solver(pipe, args.forwards - loop_steps(scheduler))(puzzles)

        return run

    runs = {"bare forwards": bare} | {name: sampling(scheduler) for name, scheduler in schedulers.items()}
    took = seconds(runs, args.repeats)
    floor = {"median": statistics.median(took["bare forwards"]), "min": min(took["bare forwards"])}
    rows = []
    print(f"{'':18}{'median s':>10}{'min s':>8}{'max s':>8}{'ratio of medians':>18}{'of minima':>11}")
    for name, times in took.items():
        row = {"name": name, "median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}
        row |= {"ratio_median": row["median_s"] / floor["median"], "ratio_min": row["min_s"] / floor["min"]}
        rows.append(row)
        print(
            f"{name:18}{row['median_s']:10.3f}{row['min_s']:8.3f}{row['max_s']:8.3f}"
            f"{row['ratio_median']:18.3f}{row['ratio_min']:11.3f}"
        )
    told = {"puzzles": args.num_puzzles, "steps": args.forwards, "dtype": args.dtype, "repeats": args.repeats}
    told["seed"] = 10_000
    return give({"rows": rows, "settings": told, **origin(args.device)})


if __name__ == "__main__":
    sys.exit(main())
