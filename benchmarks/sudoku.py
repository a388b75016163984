"""How often is a Sudoku solved in a given number of forward passes, and what does each remasking rule add?

Held fixed: bundled model, puzzles, seeds, random order, temperature 1. Varied: the rule that chooses what is remasked,
and the number of forwards. Reference: MDLM, which remasks nothing. Each other rule remasks as many cells a step as
serves it best, of `NUM_REMASK`, on 100 other puzzles of 30 clues at 52 forwards. Two arms stand outside these settings
and say so: MDLM in confidence order (greedy), and PRISM at the settings the model ships with.

Every arm sees the same puzzles and seeds: 1,000 with 30 clues, 1,000 with 24 to 26 (a third each), all with a unique
solution, from seeds that training never used. A success is a valid grid with every clue kept. Intervals of shares are
Wilson's, 95 %; PRISM is compared with each other arm by the ratio of failures, with a bootstrap over puzzles.
Calibration: on puzzles of 25 to 60 clues the model writes `NUM_REVEALED` cells a forward in random order; after each
forward the head scores the cells written so far; one is right if it equals the unique solution.

Each cell (arm, forwards, clues, seed) is appended to `--cells` when done, and not run again for the same model and
settings: stop at any time and start again. When all are there the table and the figure are written to docs/figures.
`--quick` runs a part of them on fewer puzzles and exits 1 if an interval misses that of the committed table.
The last line of stdout is one JSON object. Usage: python benchmarks/sudoku.py [--quick] [--device cuda] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from prism_pipelines import MDLMScheduler, PrismPipeline, PrismScheduler, SelfConfidenceScheduler, bundled, sudoku
from prism_pipelines.evaluation import (
    evaluate_sudoku,
    head_calibration,
    paired_failure_ratio,
    pipeline_solver,
    wilson_interval,
)

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
NUM_REMASK = (2, 4, 8, 16)  # tried for each rule; the paper's number for Sudoku is 4
TUNED = ("prism", "self-confidence", "random")
NUM_REVEALED = 4  # cells written a forward, for calibration
FORWARDS = (52, 16, 32, 8, 81)  # the most telling first
CLUES = {"30": (30,), "24-26": (24, 25, 26)}
CALIBRATION_CLUES = (25, 30, 36, 44, 52, 60)
PUZZLE_SEED, CHOOSE_SEED = 10_000, 12_000
ARMS = {
    "mdlm": "MDLM, random order",
    "prism": "PRISM",
    "self-confidence": "self-confidence remasking",
    "random": "random remasking",
    "mdlm-confidence": "MDLM, confidence order, greedy",
    "prism-shipped": "PRISM as shipped",
}


class NoiseHead(torch.nn.Module):
    """Stands in for the quality head and knows nothing: seeded noise, so that remasking falls on random cells."""

    def __init__(self, seed: int, device: torch.device):
        super().__init__()
        self.device = device  # diffusers asks the modules of a pipeline where they are
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, hidden, attention_mask=None):
        """Normal noise (B, L), float32, for hidden states (B, L, H)."""
        return torch.randn(hidden.shape[:2], generator=self.generator).to(hidden.device)


def arrange(pipe: PrismPipeline, parts: tuple, arm: str, seed: int) -> None:
    """Set the pipeline up for an arm, "prism@8" for 8 cells a step; `parts` are its own (quality head, scheduler)."""
    head, shipped = parts
    rule, _, count = arm.partition("@")
    same = {"order": "random", "temperature": 1.0}
    pipe.quality_head = NoiseHead(seed, pipe.model.device) if rule == "random" else head
    if rule == "prism-shipped":
        pipe.scheduler = shipped
    elif rule == "mdlm-confidence":
        pipe.scheduler = MDLMScheduler(order="confidence", temperature=0.0)
    elif rule == "mdlm":
        pipe.scheduler = MDLMScheduler(**same)
    else:
        kind = SelfConfidenceScheduler if rule == "self-confidence" else PrismScheduler
        pipe.scheduler = kind(**same, num_remask=int(count))


def choose_num_remask(run) -> dict[str, int]:
    """Cells remasked a step by each rule: the number that solved most of the puzzles to choose on, the least of equals.

    `run` is from a list of cells to their marks.
    """
    cells = run([(f"{rule}@{count}", 52, "choose", 0) for rule in TUNED for count in NUM_REMASK])
    return {
        rule: max(NUM_REMASK, key=lambda count: cells[f"{rule}@{count}", 52, "choose", 0].count("1")) for rule in TUNED
    }


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


def fingerprint(model: Path, settings: dict) -> str:
    """Hash of weights, scheduler config and settings; a cell counts only for the same fingerprint."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted([*model.rglob("*.safetensors"), *model.rglob("scheduler_config.json")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_cells(path: Path, mark: str) -> dict[tuple, str]:
    """The finished cells of this fingerprint: {(arm, forwards, clues, seed): "0110..." solved or not}."""
    cells = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            cell = json.loads(line)
        except ValueError:  # the last line of a run that was killed while it wrote
            continue
        if cell["fingerprint"] == mark:
            cells[cell["arm"], cell["forwards"], cell["clues"], cell["seed"]] = cell["solved"]
    return cells


def run_cells(pipe, wanted: list[tuple], puzzles: dict, path: Path, mark: str, batch_size: int) -> dict[tuple, str]:
    """Run the wanted cells that are not in the file yet, append each when done, and return all of them."""
    cells, parts = read_cells(path, mark), (pipe.quality_head, pipe.scheduler)
    todo = [cell for cell in wanted if cell not in cells]
    work, spent, done = sum(cell[1] for cell in todo), 0.0, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_text().endswith("\n"):  # killed while it wrote; the next line must stand alone
        path.write_text(path.read_text() + "\n")
    for cell in todo:
        arm, forwards, clues, seed = cell
        start = time.perf_counter()
        arrange(pipe, parts, arm, seed)
        # The forwards of a refinement loop count too.
        steps = forwards - pipe.scheduler.config.get("loop_steps", 0)
        if steps < 1:
            raise ValueError(f"the shipped loop of {forwards - steps} forwards leaves none of {forwards}; shorten it")
        score = evaluate_sudoku(pipeline_solver(pipe, steps, seed), puzzles[clues], batch_size=batch_size)
        if score.altered.any():
            raise RuntimeError(f"{arm} altered clues")
        took = time.perf_counter() - start
        spent, done = spent + took, done + forwards
        cells[cell] = "".join("1" if solved else "0" for solved in score.solved)
        row = {"arm": arm, "forwards": forwards, "clues": clues, "seed": seed, "seconds": round(took, 2)}
        with path.open("a") as file:
            file.write(json.dumps({**row, "fingerprint": mark, "solved": cells[cell]}) + "\n")
        left = spent / done * (work - done)
        print(f"{arm:16} T={forwards:2} clues={clues:5} seed={seed}  {100 * score.success:5.1f} %  "
              f"{took:6.1f} s, about {left / 60:.0f} min left", file=sys.stderr)  # fmt: skip
    pipe.quality_head, pipe.scheduler = parts
    return cells


def solved_array(cells: dict, arm: str, forwards: int, clues: str, seeds: list[int]) -> np.ndarray:
    """bool (S, N): which puzzles an arm solved with each seed."""
    return np.array([[mark == "1" for mark in cells[arm, forwards, clues, seed]] for seed in seeds])


def tabulate(cells: dict, arms, forwards: list[int], seeds: list[int]) -> tuple[list[dict], list[dict]]:
    """Rows of the table (share solved with interval), and of the paired comparisons PRISM / other."""
    rows, pairs = [], []
    for clues in CLUES:
        for steps in forwards:
            solved = {arm: solved_array(cells, arm, steps, clues, seeds) for arm in arms}
            for arm, marks in solved.items():
                low, high = wilson_interval(int(marks.sum()), marks.size)
                place = {"clues": clues, "forwards": steps, "arm": arm}
                rows.append({**place, "solved": int(marks.sum()), "n": marks.size, "low": low, "high": high})
                if arm != "prism":
                    pairs.append({**place, **paired_failure_ratio(~solved["prism"], ~marks)})
    return rows, pairs


def measure_calibration(pipe, total: int, batch_size: int) -> dict:
    """Calibration of the head on grids that the model filled partially itself, k cells a forward in random order."""
    shipped = pipe.scheduler
    pipe.scheduler = MDLMScheduler(order="random", temperature=1.0)
    puzzles, solutions = puzzles_of(CALIBRATION_CLUES, total)
    found = head_calibration(pipe, puzzles, solutions, num_revealed=NUM_REVEALED, batch_size=batch_size)
    pipe.scheduler = shipped
    return found


def disagreements(rows: list[dict], table: dict) -> list[str]:
    """Rows whose interval does not overlap that of the committed table."""
    committed = {(row["clues"], row["forwards"], row["arm"]): row for row in table["rows"]}
    apart = []
    for row in rows:
        known = committed[row["clues"], row["forwards"], row["arm"]]
        if row["low"] > known["high"] or row["high"] < known["low"]:
            apart.append(
                f"{row['arm']} T={row['forwards']} clues={row['clues']}: {row['low']:.3f}-{row['high']:.3f} here, "
                f"{known['low']:.3f}-{known['high']:.3f} committed"
            )
    return apart


def origin() -> dict:
    """Where these numbers come from: machine, versions and commit."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "threads": torch.get_num_threads(), "versions": versions, "commit": commit}


def draw(result: dict) -> None:
    """The two figures of docs/figures."""
    from prism_pipelines.plots import reliability_figure, success_figure

    panels = {}
    for row in result["rows"]:
        arms = panels.setdefault(f"{row['clues']} clues", {})
        point = (row["forwards"], row["solved"] / row["n"], row["low"], row["high"])
        arms.setdefault(ARMS[row["arm"]], []).append(point)
    success_figure(panels, FIGURES / "sudoku.png")
    titles = {"revealed": f"{NUM_REVEALED} cells just revealed", "filled": "all states of the run"}
    curves = {titles[name]: found["reliability"] for name, found in result["calibration"].items()}
    reliability_figure(curves, FIGURES / "sudoku_calibration.png")


def parse_args(argv=None):
    """The flags; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part, in minutes, checked against the committed table")
    parser.add_argument("--model", type=Path, default=None, help="saved pipeline folder (default: the bundled one)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every cell (default: %(default)s)")
    parser.add_argument("--num-puzzles", type=int, default=1000, help="of each set (default: %(default)s)")
    parser.add_argument("--cells", type=Path, default=ROOT / "runs" / "sudoku_cells.jsonl", help="finished cells")
    parser.add_argument("--table", type=Path, default=FIGURES / "sudoku.json", help="committed table")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bf16"], default="float32")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Run what is missing, then write table and figures; with --quick compare with the table. Returns exit status."""
    args = parse_args(argv)
    model = args.model or Path(bundled("sudoku"))
    pipe = PrismPipeline.from_pretrained(model).to(args.device)
    pipe.to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    pipe.set_progress_bar_config(disable=True)

    forwards, seeds = (list(FORWARDS[:2]), [0]) if args.quick else (list(FORWARDS), list(range(args.seeds)))
    total = 60 if args.quick else args.num_puzzles
    settings = {"num_puzzles": total, "puzzle_seed": PUZZLE_SEED, "dtype": args.dtype}
    puzzles = {name: puzzles_of(counts, total)[0] for name, counts in CLUES.items()}
    puzzles["choose"] = sudoku.make_puzzles(100, 30, CHOOSE_SEED)[0]
    mark = fingerprint(model, settings)

    def run(wanted):
        return run_cells(pipe, wanted, puzzles, args.cells, mark, args.batch_size)

    chosen = json.loads(args.table.read_text())["settings"]["num_remask"] if args.quick else choose_num_remask(run)
    arms = {arm: f"{arm}@{chosen[arm]}" if arm in chosen else arm for arm in ARMS}
    # Seed by seed, and the 30-clue cells at 52 and 16 forwards first: what is there after an hour says the most.
    found = run([(arm, t, c, s) for s in seeds for c in CLUES for t in forwards for arm in arms.values()])
    cells = {(arm, t, c, s): found[arms[arm], t, c, s] for arm in ARMS for t in forwards for c in CLUES for s in seeds}

    rows, pairs = tabulate(cells, ARMS, sorted(forwards), seeds)
    settings |= {"num_remask": chosen, "seeds": seeds, "fingerprint": mark}
    result = {"settings": settings, **origin(), "rows": rows, "pairs": pairs}
    total = 10 * len(CALIBRATION_CLUES) if args.quick else total
    result["calibration"] = measure_calibration(pipe, total, args.batch_size)
    status = 0
    if args.quick:
        apart = disagreements(rows, json.loads(args.table.read_text()))
        result["disagreements"] = apart
        status = 1 if apart else 0
        print("\n".join(apart) or f"all {len(rows)} figures agree with {args.table.name}", file=sys.stderr)
    else:
        FIGURES.mkdir(parents=True, exist_ok=True)
        args.table.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        draw(result)
    print(json.dumps(result))
    return status


if __name__ == "__main__":
    sys.exit(main())
