"""Write docs/results.md and the README's table from the tables in docs/figures: no number is typed by hand.

Usage: python -m benchmarks.results [--check]   (--check: exit 1 if the file is not what the tables give)
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys

from benchmarks.shared import ROOT
from benchmarks.sudoku_heads import ARMS as HEADS
from benchmarks.text_results import (
    PUBLISHED,
    ablation_section,
    card_section,
    loop_sentence,
    merged,
    ranking_section,
    text_section,
    value,
)
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation.arms import marked
from prism_pipelines.evaluation.tables import markdown_table

TEXT = ("text", "text_64", "text_128", "text_256")  # tables of other numbers of forwards; the later may lack arms
RESULTS, README = ROOT / "docs" / "results.md", ROOT / "README.md"
HEAD = """# Results

What was measured here; anyone can measure it again. This page is written by `make results` from the tables in
`docs/figures`; each names the machine, the versions and the commit it was made with.
"""

MISSING = """## Not measured yet

MAUVE and perplexity under a large judge (no such model could be loaded here), other seeds of training; Sudoku on
1,000 puzzles in other numbers of forwards, with token-to-mask and ReMDM, with several seeds; code by a model that was
trained in full: with the few steps of the one above hardly a function parses under any rule, so its table shows that
the experiment runs, and not which rule is better; ablations on the text model that ships now. `prism eval
compare` runs any of these arms on any model.
"""


def share(row: dict) -> str:
    """Share solved with its interval, in percent."""
    return f"{100 * row['solved'] / row['n']:.1f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})"


def sudoku_section(table: dict) -> str:
    """Success by forwards for each set of puzzles, paired comparisons, calibration."""
    settings, rows = table["settings"], table["rows"]
    forwards = sorted({row["forwards"] for row in rows})
    outside = {arm["name"] for arm in table["arms"] if arm.get("outside")}
    inside = [arm for arm in table["arms"] if arm["name"] not in outside]
    fields = ("num_remask", "eta", "remask_threshold", "threshold")  # the last is its name in older tables
    knobs = [(arm["name"], k, arm[k]) for arm in inside for k in fields if k in arm]
    chosen = ", ".join(f"{name} {knob} {value}" for name, knob, value in knobs)
    lines = [
        "## Sudoku",
        "",
        f"`python -m benchmarks.sudoku --seeds {len(settings['seeds'])} --num-puzzles {settings['num_puzzles']} "
        f"--dtype {settings['dtype']}`, commit `{table['commit']}`, {table['device']}, "
        f"torch {table['versions']['torch']}. [What is held fixed](sudoku.md#how-the-benchmark-measures). Percent of "
        "puzzles solved, 95 % Wilson intervals.",
        "",
        f"Each rule's knob, the best of four on other puzzles: {chosen}.",
        "",
    ]
    for clues in dict.fromkeys(row["clues"] for row in rows):
        shares = []
        for arm in dict.fromkeys(row["arm"] for row in rows):
            found = {row["forwards"]: row for row in rows if row["clues"] == clues and row["arm"] == arm}
            shares.append([marked(arm, outside), *(share(found[t]) for t in forwards)])
        lines += [f"### {clues} clues", "", markdown_table(["forwards", *forwards], shares)]
        lines += ["", "PRISM's failures divided by those of the other rule, on the same puzzles (bootstrap, 95 %):", ""]
        ratios = []
        for arm in dict.fromkeys(p["arm"] for p in table["pairs"] if p["arm"] not in outside):
            found = {p["forwards"]: p for p in table["pairs"] if p["clues"] == clues and p["arm"] == arm}
            ratios.append([f"PRISM / {arm}", *(ratio(found[t]) for t in forwards)])
        lines += [markdown_table(["forwards", *forwards], ratios), ""]
    return "\n".join([*lines, "![share solved against forwards](figures/sudoku.png)", ""])


def many_puzzles_section(table: dict) -> str:
    """More puzzles at fewer numbers of forwards: shares with PRISM's ratio of failures beside them, and calibration."""
    settings, outside = table["settings"], {arm["name"] for arm in table["arms"] if arm.get("outside")}
    forwards, sets = settings["forwards"], list(dict.fromkeys(row["clues"] for row in table["rows"]))
    lines = [
        f"### {settings['num_puzzles']:,} puzzles",
        "",
        f"`python -m benchmarks.sudoku --forwards {' '.join(map(str, forwards))} --seeds {len(settings['seeds'])} "
        f"--arms {shlex.join(arm['name'] for arm in table['arms'])} --table docs/figures/sudoku_1000.json`, commit "
        f"`{table['commit']}`, {table['device']}. Percent of "
        f"{settings['num_puzzles']:,} puzzles of each kind solved, and PRISM's failures divided by the rule's.",
        "",
    ]
    cells = []
    rows = {(row["clues"], row["forwards"], row["arm"]): row for row in table["rows"]}
    pairs = {(pair["clues"], pair["forwards"], pair["arm"]): pair for pair in table["pairs"]}
    for steps in forwards:
        for name in (arm["name"] for arm in table["arms"]):
            row = [steps, marked(name, outside)]
            for clues in sets:
                pair = pairs.get((clues, steps, name))
                compared = pair is not None and name not in outside
                row += [share(rows[clues, steps, name]), ratio(pair) if compared else "-"]
            cells.append(row)
    header = ["forwards", "rule", *(title for clues in sets for title in (f"{clues} clues", "PRISM / rule"))]
    return "\n".join([*lines, markdown_table(header, cells), "", *calibration_lines(table["calibration"])])


KNOWING = ("exact checker", "oracle ranking")  # arms of judging.json that are told what is right
OURS = "judge and repair"
# The rivals that the README shows: the best of all, and one of each kind. docs/judging.md has the others.
SHOWN = ("confidence order", "random cells", "PRISM one-step", "self-confidence", "ReMDM")


def solved_within(table: dict) -> dict:
    """{clues: {arm: {forwards: (share, low, high)}}} of docs/figures/judging.json: solved in at most so many passes."""
    found: dict = {}
    for row in sorted(table["rows"], key=lambda row: -row["budget"]):  # a run that was limited to them comes last
        arms = found.setdefault(row["clues"], {})
        for name in row:
            if name.startswith("within_") and row["arm"] not in KNOWING:
                solved, low, high = row[name]
                arms.setdefault(row["arm"], {})[int(name.removeprefix("within_"))] = (solved / row["n"], low, high)
    return found


def readme_table(table: dict) -> str:
    """The README's table: `SHOWN` at the number of forward passes that most arms were run with; ours also beyond."""
    found, sets = solved_within(table), sorted({row["clues"] for row in table["rows"]}, reverse=True)
    fixed = [row["budget"] for row in table["rows"] if row["arm"] not in (*KNOWING, OURS)]
    equal = max(sorted(set(fixed)), key=fixed.count)
    limit = max(row["budget"] for row in table["rows"] if row["arm"] == OURS)
    ours = {row["clues"]: row for row in table["rows"] if row["arm"] == OURS and row["budget"] == limit}

    def solved(arm: str, clues: str, passes: int) -> tuple | None:
        return found[clues].get(arm, {}).get(passes)

    arms = [arm for arm in SHOWN if any(solved(arm, clues, equal) for clues in sets)]
    arms.sort(key=lambda arm: max(point[0] for clues in sets if (point := solved(arm, clues, equal))), reverse=True)
    means = " and ".join(f"{ours[clues]['mean_forwards']:.1f}" for clues in sets if clues in ours)
    lines = ["| | forward passes | " + " | ".join(f"{clues} clues (%)" for clues in sets) + " |"]
    lines.append("| --- " * (2 + len(sets)) + "|")
    for name, words, arm, passes in (
        (f"**{OURS}** with `sudoku-head`", f"{means} on average, {limit} at most", OURS, limit),
        ("... stopped after", f"{equal} at most", OURS, equal),
        *((arm, f"{equal} at most", arm, equal) for arm in arms),
    ):
        points = [solved(arm, clues, passes) for clues in sets]
        shares = ["{:.1f} ({:.1f}-{:.1f})".format(*(100 * x for x in point)) if point else "" for point in points]
        lines.append(f"| {name} | {words} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def readme(judging: dict) -> str:
    """README.md with its table from the committed figures."""
    text, start, end = README.read_text(), "<!-- table: judging -->\n", "\n<!-- end of table -->"
    return text[: text.index(start) + len(start)] + readme_table(judging) + text[text.index(end) :]


def calibration_lines(calibration: dict) -> list[str]:
    """The head's calibration by number of clues."""
    lines = ["### Calibration of the head", ""]
    lines += ["Of 'this cell is right'. Pooled AUROC also rewards telling hard puzzles from easy ones.", ""]
    cells = []
    for clues, found in [*calibration["by_clues"].items(), ("all", calibration)]:
        for name in ("revealed", "filled"):
            one = found[name]
            auroc = "-" if one["auroc"] is None else f"{one['auroc']:.3f}"
            cells.append([clues, name, one["n"], f"{100 * one['wrong']:.1f}", auroc, f"{one['ece']:.3f}"])
    lines.append(markdown_table(["clues", "states", "cells", "wrong (%)", "AUROC", "ECE"], cells))
    return [*lines, "", "![reliability](figures/sudoku_1000_calibration.png)", ""]


def heads_section(table: dict) -> str:
    """All weights, LoRA and a head alone, side by side."""
    cell = table["cells"][0]
    lines = [
        "### All weights, LoRA, head alone",
        "",
        f"`examples/sudoku/heads.sh` ([how](training.md#all-weights-lora-frozen-backbone)), {cell['dtype']}, commit "
        f"`{table['commit']}`: a smaller model, {cell['clues']} clues, random order, temperature 1, "
        f"{table['rows'][0]['of']} runs a figure.",
        "",
    ]
    cells = []
    for row in table["rows"]:
        gained = "-" if row["share_of_gain"] is None else f"{row['share_of_gain']:.2f}"
        solved = share(row | {"solved": row["solved"] * row["of"], "n": row["of"]})
        cells.append([row["forwards"], HEADS[row["arm"]], solved, gained])
    header = ["forwards", "trained", "solved", "share of the gain of all weights"]
    return "\n".join([*lines, markdown_table(header, cells), ""])


def code_section(table: dict) -> str:
    """What parses, what comes back and how varied it is, for each task; and what PRISM changes."""
    settings, forwards = table["settings"], sorted({row["forwards"] for row in table["whole"]["rows"]})
    knobs = "; ".join(f"{arm['name']} eta {arm['eta']:g}" for arm in table["arms"] if "eta" in arm)
    lines = [
        "## Python functions",
        "",
        f"`examples/code/train.sh`, then `python -m benchmarks.code_parse runs/code-prism --num-functions "
        f"{settings['num_functions']} --seeds {len(table['seeds'])} --forwards {' '.join(map(str, forwards))}` (commit "
        f"`{table['commit']}`, {table['device']}, torch {table['versions']['torch']}): an experiment, not shipped. A "
        f"small model of short functions of the standard library (at most {settings['longest']} tokens), "
        f"{settings['steps']['pretraining']} steps of pretraining and {settings['steps']['prism']} of PRISM (by "
        f"`--max-steps`; the `.args` files say more); temperature 1, random order; each knob the best of four by what "
        f"parses, on other functions: {knobs}. Entropy of held-out functions: {table['held_out_entropy']:.2f} nats. "
        "95 % intervals: Wilson's for what parses, else bootstrap over functions.",
        "",
    ]
    for kind, title in (("whole", "Written from nothing"), ("span", f"A span of {settings['span']:.0%} filled")):
        rows = {(row["arm"], row["forwards"], row["metric"]): row for row in table[kind]["rows"]}
        cells = [
            [steps, arm["name"], *(value(rows[arm["name"], steps, metric]) for metric in ("parse", "right", "entropy"))]
            for steps in forwards
            for arm in table["arms"]
        ]
        header = ["forwards", "rule", "parses", "tokens as they were", "entropy"]
        lines += [f"### {title}", "", markdown_table(header, cells)]
        lines += ["", "PRISM minus the other, paired by function:", ""]
        for pair in table[kind]["pairs"]:
            if pair["metric"] == "parse" or (kind == "span" and pair["metric"] == "right"):
                what = {"parse": "parses", "right": "as they were"}[pair["metric"]]
                lines.append(
                    f"* {pair['arm']}, {pair['forwards']} forwards, {what}: {0 - pair['difference']:+.3f} "
                    f"({0 - pair['high']:+.3f} to {0 - pair['low']:+.3f})"
                )
        lines.append("")
    return "\n".join(lines)


def ratio(pair: dict) -> str:
    """A paired ratio of failures with its interval; a dash where it is not defined."""
    values = [pair.get(name) for name in ("ratio", "low", "high")]
    return "-" if None in values else "{:.2f} ({:.2f}-{:.2f})".format(*values)


def main() -> int:
    """Write or check the page. Returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file in place of writing it")
    args = parser.parse_args()
    folder, tables = ROOT / "docs" / "figures", {}
    for name in ("sudoku", "sudoku_1000", "sudoku_heads", *TEXT, "text_ranking", "ablations", "code", "judging"):
        tables[name] = json.loads((folder / f"{name}.json").read_text())
    metrics = json.loads((ROOT / "prism_pipelines" / "bundled" / "text" / "metrics.json").read_text())
    parts = [HEAD, sudoku_section(tables["sudoku"]), many_puzzles_section(tables["sudoku_1000"])]
    parts += [heads_section(tables["sudoku_heads"]), card_section(metrics)]
    text = merged({name: tables[name] for name in TEXT})
    parts += [text_section(text), loop_sentence(text)]
    parts.append(ranking_section(tables["text_ranking"]))
    parts += [ablation_section(tables["ablations"]), code_section(tables["code"])]
    page = "\n".join([*parts, PUBLISHED, MISSING])
    for path, text in ((RESULTS, page), (README, readme(tables["judging"]))):
        if not args.check:
            path.write_text(text)
        elif path.read_text() != text:
            print(f"{path} is not what the tables give: run `make results`", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
