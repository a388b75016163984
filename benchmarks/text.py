"""How close to held-out Shakespeare does each decoding rule write in a given number of forward passes?

Held fixed: bundled text model, temperature 1, 256 bytes a text, seeds. Varied: the rule, and the number of forwards
(those of a refinement loop and of a critic count). Reference: PRISM, paired by seed. Every rule's one knob was
chosen on another play from a grid of the same size (`arms.json`, made by examples/text/finish.py). Three arms have
weights of their own and run if their folders are given: MDLM before PRISM's fine-tuning, Token-Critic, whose knob is
chosen here in the same way on the same play, and PRISM with the head alone trained, which has every setting of the
PRISM arm, so that weights alone differ.

Measures: distance of character 4-grams and of words to the held-out plays (lower is better, grows as text gets less:
all cells have as much), share of known words, entropy of the words of a text, distinct word pairs, self-BLEU, and the
negative log-likelihood per byte under a 6-gram judge counted on the training text. The held-out play that settings
were chosen on is measured like an arm, for scale. Intervals, 95 %: bootstrap of texts for entropy and nll, else
Student's t over seeds, paired for differences.

A finished cell (arm, forwards, seed) is a file and is not run again: stop at any time and start again. When all are
there the table and the figure are written to docs/figures. `--quick` runs a part on few texts and exits 1 if entropy
or nll misses the committed interval. The last line of stdout is one JSON object.
Usage: python -m benchmarks.text [--quick] [--data runs/text-data] [--critic FOLDER] [--base FOLDER] [--frozen FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.shared import ROOT, disagreements, files_fingerprint, origin
from prism_pipelines import PrismPipeline, bundled
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation import (
    ngram_judge,
    pipeline_fingerprint,
    run_comparison,
    text_plan,
    text_task,
    tune_arms,
)
from prism_pipelines.evaluation.plots import measures_figure
from prism_pipelines.evaluation.statistics import tabulate
from prism_pipelines.evaluation.text import text_measures

FIGURES = ROOT / "docs" / "figures"
LENGTH, CHOOSE_STEPS, CHOOSE_SEED = 256, 32, 40_000
VALIDATION = "henry_v"
OWN_WEIGHTS = {"base": "MDLM before fine-tuning", "critic": "Token-Critic", "frozen": "PRISM, head alone"}  # by flag
JUDGE_ORDER = 6  # of bytes
DRAWN = {
    "ngram_js": "character 4-grams: distance",
    "nll": "6-gram judge: nats per byte",
    "known_words": "known words",
}
DRAWN |= {"entropy": "entropy of words"}


def works(path: Path) -> dict[str, str]:
    """{title: text} of a file of examples/text/prepare.py."""
    return {row["title"]: row["text"] for row in map(json.loads, path.read_text().splitlines())}


def data_hash(data: Path, *more: Path) -> str:
    """Hash of the training and held-out text, and of more files, for the names of cells."""
    digest = hashlib.sha256()
    for path in (data / "train.jsonl", data / "heldout.jsonl", *more):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def batch_size(device: str) -> int:
    """Texts written together, on which none of them depends."""
    return 16 if device == "cpu" else 64


def load(folder, dtype: str, device: str = "cpu") -> PrismPipeline:
    """A saved pipeline without its progress bar."""
    pipe = PrismPipeline.from_pretrained(str(folder), torch_dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def extra_arms(
    folders: dict, dtype: str, device: str, validation: str, num_samples: int, shipped: list[dict], cells: Path
) -> tuple[list[dict], dict]:
    """Arms with weights of their own; and their models.

    Token-Critic has the best of four settings on the validation play, the frozen head those of the shipped "PRISM".
    """
    prism = next(arm for arm in shipped if arm["name"] == "PRISM")
    wanted = {
        "base": {"scheduler": "MDLMScheduler", "order": "random"},
        "critic": {"scheduler": "TokenCriticScheduler", "noise": [0.0, 0.5, 1.0, 2.0]},
        "frozen": prism,
    }
    arms, models = [], {}
    for name, arm in wanted.items():
        if folders[name] is not None:
            pipe = load(folders[name], dtype, device)
            mark = f"{name} {pipeline_fingerprint(pipe)}"  # a cell must not outlive the weights it was made with
            models[mark] = pipe
            arms.append({**arm, "name": OWN_WEIGHTS[name], "model": mark})
    if not arms:
        return [], {}
    arms, _ = tune_arms(
        None,
        text_task([validation], num_samples=num_samples, gen_length=LENGTH, batch_size=batch_size(device)),
        arms,
        steps=CHOOSE_STEPS,
        seed=CHOOSE_SEED,
        trials=4,
        out_dir=cells / "tuning",
        task_name=f"{num_samples} texts, {dtype}, {hashlib.sha256(validation.encode()).hexdigest()[:12]}",
        quality="ngram_js",
        models=models,
        report=lambda arm, found: print(json.dumps(arm | found), file=sys.stderr),
    )
    return arms, models


def held_out_rows(measure, tokenizer, play: str, num_samples: int, seeds: list[int]) -> list[dict]:
    """The measures of stretches of a held-out play, as if a rule had written them; one row a measure."""
    ids = tokenizer(play, add_special_tokens=False).input_ids
    parts = [tokenizer.decode(ids[i : i + LENGTH]) for i in range(0, len(ids) - LENGTH, LENGTH)]
    groups = [parts[i * num_samples : (i + 1) * num_samples] for i in range(len(parts) // num_samples)][: len(seeds)]
    if not groups:
        raise SystemExit(f"error: --num-samples {num_samples}: the held-out play has {len(parts)} stretches.")
    cells = {("held-out", 0, i): measure(group) for i, group in enumerate(groups)}
    return tabulate(cells, ["held-out"], [0], list(range(len(groups))), "held-out")[0]


def draw(result: dict, path: Path) -> None:
    """The figure: four measures against forwards."""
    panels = {title: {} for title in DRAWN.values()}
    for row in result["rows"]:
        if row["metric"] in DRAWN:
            point = (row["forwards"], row["value"], row["low"], row["high"])
            panels[DRAWN[row["metric"]]].setdefault(row["arm"], []).append(point)
    marks = {DRAWN[row["metric"]]: row["value"] for row in result["held_out"] if row["metric"] in DRAWN}
    measures_figure(panels, path, marks)


def parse_args(argv=None):
    """The flags; see the module's docstring."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part, in minutes, checked against the committed table")
    parser.add_argument("--model", type=Path, default=None, help="saved pipeline folder (default: the bundled one)")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "runs" / "text-data", help="folder of prepare.py; made if missing"
    )
    for name in OWN_WEIGHTS:
        parser.add_argument(f"--{name}", type=Path, default=None, help="folder of such a run; default: no such arm")
    parser.add_argument("--forwards", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--seeds", type=int, default=5, help="seeds of every cell (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=64, help="texts of a cell (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arms", nargs="+", help="only these, by name, PRISM among them; needs --table of its own")
    parser.add_argument("--cells", type=Path, default=ROOT / "runs" / "text_cells", help="finished cells")
    parser.add_argument("--table", type=Path, default=FIGURES / "text.json", help="committed table")
    args = parser.parse_args(argv)
    if args.arms and "PRISM" not in args.arms:
        parser.error("--arms are compared with PRISM: name it too")
    if args.arms and not args.quick and args.table.resolve() == parser.get_default("table").resolve():
        parser.error("--arms makes a part of the table: name another file by --table")
    return args


def main(argv=None) -> int:
    """Run what is missing, then write table and figure; with --quick compare with the table. Returns exit status."""
    args = parse_args(argv)
    if not (args.data / "heldout.jsonl").exists():
        subprocess.run([sys.executable, str(ROOT / "examples/text/prepare.py"), str(args.data)], check=True)
    model = args.model or Path(bundled("text"))
    pipe = load(model, args.dtype, args.device)
    forwards, count = ([16, 32], 16) if args.quick else (args.forwards, args.num_samples)
    seeds = list(range(2 if args.quick else args.seeds))

    plays = works(args.data / "heldout.jsonl")
    test = [text for title, text in plays.items() if title != VALIDATION]
    judge = ngram_judge(list(works(args.data / "train.jsonl").values()), pipe.tokenizer, n=JUDGE_ORDER)
    vocabulary = set((model / "words.txt").read_text().split())
    more = {"vocabulary": vocabulary, "judge": judge, "batch_size": batch_size(args.device)}
    task = text_task(test, num_samples=count, gen_length=LENGTH, **more)
    folders = {name: getattr(args, name) for name in OWN_WEIGHTS}
    plan = text_plan(model)
    own, models = extra_arms(folders, args.dtype, args.device, plays[VALIDATION], count, plan["arms"], args.cells)
    arms = [*plan["arms"], *own]
    if unknown := set(args.arms or ()) - (names := {arm["name"] for arm in arms}):
        raise SystemExit(f"error: --arms {sorted(unknown)} are none of {sorted(names)}.")
    arms = [arm for arm in arms if args.arms is None or arm["name"] in args.arms]
    settings = {"num_samples": count, "length": LENGTH, "dtype": args.dtype}
    settings["data"] = data_hash(args.data, model / "words.txt")
    mark = files_fingerprint(model, settings)
    held_out = held_out_rows(
        lambda texts: text_measures(texts, test, vocabulary, judge=judge),
        pipe.tokenizer,
        plays[VALIDATION],
        count,
        seeds,
    )
    result = run_comparison(
        pipe,
        task,
        arms,
        forwards,
        seeds,
        out_dir=args.cells,
        task_name=f"text {mark}",
        temperature=1.0,
        quality="ngram_js",
        reference="PRISM",
        higher_is_better=False,
        models=models,
    )
    result |= {"settings": {**settings, "fingerprint": mark}, **origin(args.device), "held_out": held_out}
    status = 0
    if args.quick:
        # The others depend on the amount of text.
        rows = [row for row in result["rows"] if row["metric"] in ("entropy", "nll")]
        committed = json.loads(args.table.read_text())["rows"]
        result["disagreements"] = disagreements(rows, committed, ("arm", "forwards", "metric"))
        status = 1 if result["disagreements"] else 0
        print("\n".join(result["disagreements"]) or f"entropy and nll agree with {args.table.name}", file=sys.stderr)
    else:
        FIGURES.mkdir(parents=True, exist_ok=True)
        args.table.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        draw(result, args.table.with_suffix(".png"))
    print(json.dumps(result))
    return status


if __name__ == "__main__":
    sys.exit(main())
