"""Does it pay to judge whole canvases and repair them, at equal forward passes?

Held fixed: the Sudoku model, puzzles, one generator a puzzle. Varied: the decoding rule. Fixed rules run once for each
budget; rules that stop by themselves run once, and are read at each budget. Judge and repair is also run with each
budget as its cap, since it spends a small cap otherwise. Every forward pass counts, also those that
judge. "PRISM one-step" alone has the head that is given as --one-step-head. The four arms of judge and repair that are
told something else in place of the head's verdict show what the verdict is worth: random cells (as many and as sure,
elsewhere), an exact checker (right grids are accepted, wrong ones never), an oracle (it knows every wrong cell).
Restarts draw the whole grid again and judge it by the same head and bar; best-of-3 keeps the surest of the first three.

Reported by arm and kind of puzzle: solved within each number of forwards with Wilson intervals, mean and median
forwards, accepted grids and how many of these are right, the area under risk and coverage of `out.confidence`, P(right
after being redrawn | remasked), right cells that were broken, and puzzles that only this arm or only judge and repair
solved. A finished arm is kept in --table and not run again. The last line of stdout is one JSON object.
Usage: python -m benchmarks.judging [--quick] [--quality-head FOLDER] [--one-step-head FOLDER] [--dtype bfloat16]
[--table FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared import ROOT, files_fingerprint, origin
from prism_pipelines import PrismPipeline, QualityHead, bundled, schedulers, sudoku
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation import risk_coverage, row_generators, wilson_interval

PAGE, MARKS = ROOT / "docs" / "judging.md", ("<!-- judging.json -->\n", "<!-- end of judging.json -->\n")
CLUES = {"24-26": (24, 25, 26), "30": (30,)}
SEED = 31_000  # of the puzzles
BUDGETS, QUICK_BUDGETS = (17, 34, 52), (17,)
WITHIN = (17, 34, 52, 128, 1000)
MOST = 128  # forwards of rules that stop by themselves
TRY = 16  # forwards that fill a grid in restarts and best-of-n
RANDOM = {"order": "random", "temperature": 1.0}
REMASKING = {**RANDOM, "num_remask": 8}
FIXED = {  # name: scheduler and its settings
    "confidence order": ("MDLMScheduler", {"order": "confidence", "temperature": 0.0}),
    "self-confidence": ("SelfConfidenceScheduler", REMASKING),
    "prompt": ("PromptConfidenceScheduler", REMASKING),
    "draw": ("DrawConfidenceScheduler", REMASKING),
    "sweep": ("StridedSweepScheduler", {"order": "confidence", "temperature": 1.0}),
    "ReMDM": ("ReMDMScheduler", {"temperature": 1.0, "strategy": "cap", "eta": 0.04}),
    "token to mask": ("TokenToMaskScheduler", RANDOM),
    "PRISM one-step": ("PrismScheduler", REMASKING),
    "PRISM's rule, this head": ("PrismScheduler", REMASKING),
}
OURS = "judge and repair"
TOLD = ("random cells", "exact checker", "oracle ranking")
STOPPING = (OURS, *TOLD, "restarts", "best-of-3")
ARMS = (*FIXED, *STOPPING)


class ToldScheduler(schedulers.JudgeAndRepairScheduler):
    """Judge and repair that is told something else about full grids than what the head says."""

    def told(self, kind: str, solutions: torch.Tensor, generator: torch.Generator) -> ToldScheduler:
        """What it is told, one of `TOLD`, and of which grids."""
        self.kind, self.solutions, self.chance = kind, solutions, generator
        return self

    def step(self, model_output, timestep, sample, *, quality=None, generation_mask=None, **rest):
        """As the parent's."""
        right = sample == self.solutions
        if self.kind == "oracle ranking":
            quality = right.float()
        elif self.kind == "exact checker":
            lowest = quality.masked_fill(~generation_mask, 2).argmin(-1, keepdim=True)
            quality = quality.float().scatter(-1, lowest, 0.0).masked_fill(right.all(-1, keepdim=True), 1.0)
        else:  # the same qualities, on other cells of the same grid
            place = torch.rand(quality.shape, generator=self.chance).masked_fill(~generation_mask, 2).argsort(-1)
            order = torch.where(generation_mask, 0, 1).argsort(stable=True, dim=-1)
            quality = quality.clone().scatter(-1, order, quality.gather(-1, place))
        return super().step(model_output, timestep, sample, quality=quality, generation_mask=generation_mask, **rest)


class Redraws:
    """Counts what became of cells that were masked again; `watch` is a callback of the pipeline."""

    def __init__(self, puzzles: np.ndarray, solutions: np.ndarray):
        self.sample = torch.from_numpy(sudoku.to_ids(puzzles))
        self.solutions = torch.from_numpy(solutions)
        self.was_right = torch.zeros(self.sample.shape, dtype=torch.bool)
        self.out = self.was_right.clone()  # remasked and not yet drawn again
        self.counts = np.zeros(4, dtype=int)  # wrong to wrong, wrong to right, right to wrong, right to right

    def watch(self, pipe, step: int, timestep, state: dict) -> dict:
        """Follow one step."""
        drawn, remasked = state["unmasked"] & self.out, state["remasked"]
        now = state["sample"] == self.solutions
        self.counts += np.bincount((2 * self.was_right.int() + now.int())[drawn].numpy(), minlength=4)
        self.was_right = torch.where(remasked, self.sample == self.solutions, self.was_right)
        self.out = (self.out & ~drawn) | remasked
        self.sample = state["sample"].clone()
        return {}


def puzzles_of(clues: tuple[int, ...], total: int) -> tuple[np.ndarray, np.ndarray]:
    """About `total` unique puzzles and their solutions, int64 (N, 81), equal shares of each number of clues."""
    made = [sudoku.make_puzzles(max(1, total // len(clues)), number, SEED) for number in clues]
    return tuple(np.concatenate(part) for part in zip(*made, strict=True))


def call(pipe, puzzles: np.ndarray, steps: int, seed: int, **more):
    """One call of the pipeline on all puzzles, each with its own generator."""
    ids = torch.from_numpy(sudoku.to_ids(puzzles))
    generator = row_generators(puzzles, seed)
    return pipe(infill=ids, num_inference_steps=steps, generator=generator, output_type="seq", **more)


def run_arm(pipe, heads: dict, arm: str, budget: int, puzzles: np.ndarray, solutions: np.ndarray, seed: int) -> dict:
    """Lists over the puzzles: right and nfe, and where the arm says so accepted and confidence; counts of redraws."""
    pipe.quality_head = heads["one-step" if arm == "PRISM one-step" else "context"]
    if arm in ("restarts", "best-of-3"):
        return run_restarts(pipe, puzzles, solutions, seed, stops=arm == "restarts", tries=budget // (TRY + 1))
    if arm in FIXED:
        kind, settings = FIXED[arm]
        pipe.scheduler = getattr(schedulers, kind)(**settings)
    elif arm == OURS:
        pipe.scheduler = schedulers.JudgeAndRepairScheduler()
    else:
        chance = torch.Generator().manual_seed(seed)
        pipe.scheduler = ToldScheduler().told(arm, torch.from_numpy(solutions), chance)
    redraws = Redraws(puzzles, solutions)
    out = call(pipe, puzzles, budget, seed, callback_on_step_end=redraws.watch)
    found = {"right": (out.sequences.numpy() == solutions).all(-1).tolist(), "nfe": out.nfe_per_row}
    for name in ("accepted", "confidence"):
        value = getattr(out, name)
        found |= {} if value is None else {name: value.tolist()}
    return found | {"redraws": redraws.counts.tolist()}


def run_restarts(pipe, puzzles, solutions, seed: int, stops: bool, tries: int) -> dict:
    """Whole grids drawn again and judged by the head, the first at temperature 0.

    Args:
        stops: a grid leaves when judge and repair would accept it; else all `tries` are made, and the surest kept.
    """
    rule = schedulers.JudgeAndRepairScheduler().config
    n = len(puzzles)
    right, accepted = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    nfe, best = np.zeros(n, dtype=int), np.full(n, -1.0)
    for attempt in range(tries):
        open_rows = np.nonzero(~accepted if stops else np.ones(n, dtype=bool))[0]
        if not len(open_rows):
            break
        pipe.scheduler = schedulers.MDLMScheduler(order="confidence", temperature=float(attempt > 0))
        out = call(pipe, puzzles[open_rows], TRY, seed + attempt, return_quality=True)
        confidence = out.confidence.numpy()
        better = confidence > best[open_rows]
        rows = open_rows[better]
        right[rows] = (out.sequences.numpy() == solutions[open_rows]).all(-1)[better]
        best[rows] = confidence[better]
        nfe[open_rows] += out.nfe_per_row
        gain = (rule["doubt_threshold"] - out.quality.float()).clamp(min=0).sum(-1).numpy()
        accepted[open_rows] |= gain < rule["price"] * 2
    found = {"right": right.tolist(), "nfe": nfe.tolist(), "confidence": best.tolist()}
    return found | ({"accepted": accepted.tolist()} if stops else {})


def row_of(arm: str, clues: str, budget: int, found: dict) -> dict:
    """One row of the table, with what every puzzle did as a string of 0 and 1."""
    right, nfe, n = np.array(found["right"]), np.array(found["nfe"]), len(found["right"])
    row = {"arm": arm, "clues": clues, "budget": budget, "n": n}
    row |= {"mean_forwards": float(nfe.mean()), "median": float(np.median(nfe))}
    for most in WITHIN:
        if (arm in STOPPING and most <= budget) or most == budget:
            solved = int((right & (nfe <= most)).sum())
            row[f"within_{most}"] = [solved, *wilson_interval(solved, n)]
    if "accepted" in found:
        accepted = np.array(found["accepted"])
        row |= {"accepted": int(accepted.sum()), "accepted_right": int((accepted & right).sum())}
    if "confidence" in found:
        row["risk_area"] = risk_coverage(found["confidence"], right)["area"]
    if sum(found.get("redraws", [])):
        row["redraws"] = dict(zip(("ww", "wr", "rw", "rr"), found["redraws"], strict=True))
    return row | {"solved": "".join(map(str, right.astype(int))), "nfe": nfe.tolist()}


def pairs(rows: list[dict]) -> list[dict]:
    """Puzzles that only judge and repair solved, and those that only the other arm did.

    Judge and repair has the other arm's budget as its cap where it was run so, else its largest.
    """
    found = []
    for row in rows:
        ours = [one for one in rows if one["arm"] == OURS and one["clues"] == row["clues"]]
        ours.sort(key=lambda one: (one["budget"] != row["budget"], -one["budget"]))
        if row["arm"] == OURS or not ours:
            continue
        a, b = ([s == "1" for s in one["solved"]] for one in (ours[0], row))
        counts = [
            sum(x and not y for x, y in zip(a, b, strict=True)),
            sum(y and not x for x, y in zip(a, b, strict=True)),
        ]
        found.append({"arm": row["arm"], "clues": row["clues"], "budget": row["budget"], "only_ours": counts[0]})
        found[-1]["only_other"] = counts[1]
    return found


def section(table: dict) -> str:
    """The part of docs/judging.md that a table gives."""
    settings = table["settings"]
    budgets = sorted({row["budget"] for row in table["rows"] if row["arm"] in FIXED})
    lines = [
        f"`python -m benchmarks.judging --num-puzzles {settings['num_puzzles']} --dtype {settings['dtype']} --budgets "
        f"{' '.join(map(str, budgets))}` (an arm without a number was not run), commit "
        f"`{table['commit']}`, {table['device']}. One seed of sampling and one of training; the same puzzles and "
        "generators in all arms. Solved in percent with 95 % Wilson intervals; fixed rules have a run for each budget.",
    ]
    for clues in dict.fromkeys(row["clues"] for row in table["rows"]):
        rows = [row for row in table["rows"] if row["clues"] == clues]
        columns = [most for most in WITHIN if any(f"within_{most}" in row for row in rows)]
        lines += ["", f"### {clues} clues, {rows[0]['n']} puzzles", ""]
        head = ["arm", *(f"<= {most}" for most in columns), "mean (median) forwards", "accepted / right"]
        head += ["redrawn: wrong to right, right to wrong", "only ours / only it"]
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for row in sorted(rows, key=lambda row: (ARMS.index(row["arm"]) if row["arm"] != OURS else -1, row["budget"])):
            lines.append("| " + " | ".join(_cells(row, columns, pairs(rows))) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: dict, columns: list[int], compared: list[dict]) -> list[str]:
    cells = [row["arm"] + (f", at most {row['budget']}" if row["arm"] == OURS else "")]
    for most in columns:
        found = row.get(f"within_{most}")
        shares = [] if found is None else [found[0] / row["n"], *found[1:]]
        cells.append("{:.1f} ({:.1f}-{:.1f})".format(*(100 * share for share in shares)) if shares else "")
    cells.append(f"{row['mean_forwards']:.1f} ({row['median']:.0f})")
    cells.append(f"{row['accepted']} / {row['accepted_right']}" if "accepted" in row else "")
    drawn = row.get("redraws", {})
    wrong, right = (sum(drawn.get(name, 0) for name in names) for names in (("ww", "wr"), ("rw", "rr")))
    cells.append(f"{drawn['wr'] / wrong:.2f}, {drawn['rw'] / right:.2f}" if wrong and right else "")
    same = [one for one in compared if all(one[name] == row[name] for name in ("arm", "clues", "budget"))]
    return [*cells, f"{same[0]['only_ours']} / {same[0]['only_other']}" if same else ""]


def write_page(table: dict) -> None:
    """Put the section of a table between its marks in docs/judging.md."""
    before, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + section(table) + MARKS[1] + rest.split(MARKS[1])[1])


def parse_args(argv=None):
    """The flags; see the module's docstring."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30 puzzles a kind, fixed rules in 17 forwards: minutes")
    parser.add_argument("--num-puzzles", type=int, default=300, help="of each kind (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="NAME")
    parser.add_argument("--clues", nargs="+", choices=list(CLUES), default=list(CLUES))
    parser.add_argument("--budgets", nargs="+", type=int, default=None, help="of fixed rules (default: 17 34 52)")
    parser.add_argument("--most", type=int, default=MOST, help="of rules that stop (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=None, help="saved pipeline folder (default: the bundled one)")
    parser.add_argument(
        "--quality-head",
        default=None,
        help="folder of the head that judges (default: sudoku-head of the package; with --model the model's own)",
    )
    parser.add_argument("--one-step-head", default=None, help="folder of PRISM's head (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--table", type=Path, help="write the JSON there, and go on from what it holds")
    parser.add_argument("--page", action="store_true", help="run nothing: put --table into docs/judging.md")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Run every arm on every kind of puzzles, print the table. Returns the exit status."""
    args = parse_args(argv)
    if args.page:
        write_page(json.loads((args.table or ROOT / "docs" / "figures" / "judging.json").read_text()))
        return 0
    total = 30 if args.quick else args.num_puzzles
    budgets = args.budgets or (QUICK_BUDGETS if args.quick else BUDGETS)
    model = Path(args.model or bundled("sudoku"))
    judge = args.quality_head or (None if args.model else bundled("sudoku-head"))
    pipe = PrismPipeline.from_pretrained(model, quality_head=judge)
    one_step = pipe.quality_head if args.one_step_head is None else QualityHead.from_pretrained(args.one_step_head)
    if judge and args.one_step_head is None:
        one_step = PrismPipeline.from_pretrained(model).quality_head
    heads = {"context": pipe.quality_head, "one-step": one_step}
    dtype = getattr(torch, args.dtype)
    pipe.to(dtype)
    for head in heads.values():
        head.to(dtype).eval()
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_puzzles": total, "puzzle_seed": SEED, "seed": args.seed, "dtype": args.dtype}
    settings["rule"] = {k: v for k, v in schedulers.JudgeAndRepairScheduler().config.items() if k[0] != "_"}
    settings["weights"] = files_fingerprint(Path(judge or model), {})
    rows = []
    if args.table and args.table.exists():
        kept = json.loads(args.table.read_text())
        if kept["settings"] != settings:
            raise SystemExit(f"error: {args.table} was made with other settings: {kept['settings']}.")
        rows = kept["rows"]
    for clues in args.clues:
        puzzles, solutions = puzzles_of(CLUES[clues], total)
        jobs = [(arm, args.most) for arm in STOPPING if arm != "best-of-3"] + [("best-of-3", 3 * (TRY + 1))]
        jobs += [(arm, budget) for budget in budgets for arm in (OURS, *FIXED)]
        for arm, budget in [job for job in jobs if job[0] in args.arms]:
            if any((row["arm"], row["clues"], row["budget"]) == (arm, clues, budget) for row in rows):
                continue
            began = time.perf_counter()
            row = row_of(arm, clues, budget, run_arm(pipe, heads, arm, budget, puzzles, solutions, args.seed))
            rows.append(row | {"seconds": round(time.perf_counter() - began)})
            shown = {name: value for name, value in rows[-1].items() if name not in ("solved", "nfe")}
            print(json.dumps(shown), file=sys.stderr, flush=True)
            result = {"settings": settings, **origin(), "pairs": pairs(rows), "rows": rows}
            if args.table:
                args.table.write_text(json.dumps(result) + "\n")
    print(json.dumps({"settings": settings, **origin(), "pairs": pairs(rows), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
