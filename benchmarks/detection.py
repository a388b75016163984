"""Which score finds the wrong tokens on the states that a sampler makes?

Held fixed: model, texts or puzzles, the runs (plain schedulers, so the states depend on no score), seeds. Varied: the
score. Sudoku: a token is right if it is the solution's; states of random order at temperature 1 and of confidence
order at temperature 0, on puzzles of 30 and of 24 to 26 clues. Text, and any --model: nothing is given, and what is to
be found is the model's own p(y_i | other tokens), from passes in which every 16th token is masked; states of random
order at temperature 1. Scores: heads (--heads NAME=FOLDER, besides the one that ships), and what a run knows for
nothing. Reported: AUROC within a row, over all tokens, and of "no token of the row is wrong" by the lowest score; ECE;
of text how many of a score's 8 lowest are among the 8 least likely, and the rank correlation; all by fill and by age
of the tokens.

    python -m benchmarks.detection --quick                         # both bundled models, under 15 minutes on one core
    python -m benchmarks.detection --heads new=runs/head --tasks sudoku --table docs/figures/detection.json

The last line of stdout is one JSON object; --table writes it to a file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared import give, origin
from prism_pipelines import MDLMScheduler, PrismPipeline, QualityHead, bundled, sudoku
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation import detection_measures, detection_table
from prism_pipelines.evaluation.detection import FREE_SCORES, NAMES, JudgedRow
from prism_pipelines.sampling.canvas import Canvas
from prism_pipelines.sampling.encoding import text_frame
from prism_pipelines.sampling.rows import pad_batch, written_by_the_model
from prism_pipelines.training.rollout_losses import every, log_posterior
from prism_pipelines.training.rollouts import RolloutPool, RolloutSettings

RANDOM, GREEDY = {"order": "random", "temperature": 1.0}, {"order": "confidence", "temperature": 0.0}
RUNS = {  # scheduler settings and forward passes
    "sudoku": ((RANDOM, 16), (RANDOM, 52), (GREEDY, 16), (GREEDY, 32)),
    "text": ((RANDOM, 32), (RANDOM, 64)),
}
CLUES = {"30": (30,), "24-26": (24, 25, 26)}
LOOKS = {"sudoku": (0.25, 0.5, 0.75, 0.9, 1.0), "text": (0.4, 0.7, 1.0)}  # share of the run that is done
FILLS = ((0.0, 0.5), (0.5, 0.999), (0.999, 1.0))
AGES = {"age 1": (1, 1), "age 2-8": (2, 8), "older": (9, 10**9)}
STRIDE = 16
ONE_STEP, KNOWS = "bundled head (one-step)", "bundled head (knows the run)"
SEED = 41_000


def canvases(task: str, pipe, count: int, length: int):
    """(kind, batch) of what runs begin from, as the training takes it: rows of the same kind together."""
    if task == "sudoku":
        for kind, clues in CLUES.items():
            made = [sudoku.make_puzzles(count // len(clues), number, SEED) for number in clues]
            puzzles, solutions = (np.concatenate(part) for part in zip(*made, strict=True))
            batch = {"input_ids": torch.from_numpy(solutions.astype(np.int64))}
            yield kind, batch | {"trainable_mask": torch.from_numpy(puzzles == 0)}
        return
    opening, closing = text_frame(pipe.tokenizer, pipe.denoiser.spec)
    inside = length - len(opening) - len(closing)
    row = written_by_the_model(opening, inside, closing, pipe.mask_token_id)
    yield f"{length} tokens", pad_batch([row] * count, 0)


@torch.no_grad()
def judged_rows(pipe, heads: dict[str, QualityHead], task: str, kind: str, batch, settings: dict, steps: int):
    """The judged tokens of every row in the states that are looked at, by every score."""
    denoiser, mask = pipe.denoiser, pipe.mask_token_id
    reads = dict.fromkeys([*FREE_SCORES, *(name for head in heads.values() for name in head.reads_context)])
    clean, writable = batch["input_ids"], batch["trainable_mask"]
    pool = RolloutPool(denoiser, reads, RolloutSettings(), 1)
    run = pool.start(
        Canvas(clean.masked_fill(writable, mask), writable, None, True), clean, MDLMScheduler(**settings), steps
    )
    pool.runs, looks, number = [run], {round(share * steps) for share in LOOKS[task]}, 0
    while not run.done:
        hidden = denoiser.hidden(*pool.batch())
        context = run.recorder.observe(run.sample, hidden)
        if number in looks:
            yield from rows_of(denoiser, heads, task, kind, run, hidden, context)
        pool.advance(run, hidden, torch.ones(run.sample.shape))
        number += 1


def rows_of_task(
    pipe, heads: dict[str, QualityHead], task: str, count: int, length: int, batch_size: int
) -> list[JudgedRow]:
    """The judged tokens of all states of a task: `count` puzzles of each kind, or a fifth of it texts."""
    rows = []
    for kind, batch in canvases(task, pipe, count if task == "sudoku" else max(8, count // 5), length):
        for settings, steps in RUNS[task]:
            torch.manual_seed(SEED)
            for start in range(0, len(batch["input_ids"]), batch_size):
                part = {name: value[start : start + batch_size] for name, value in batch.items()}
                rows += judged_rows(pipe, heads, task, kind, part, settings, steps)
    return rows


def rows_of(denoiser, heads, task: str, kind: str, run, hidden, context):
    """A `JudgedRow` for each row of one state."""
    mask = denoiser.spec.mask_token_id
    judged, age = run.judged, context.now[:, None] - context.written_at
    scores = {name: getattr(context, field).exp() for name, field in FREE_SCORES.items()}
    for name, head in heads.items():
        scores[name] = head.quality(hidden, None, **head.inputs(context, run.sample, mask))
    label = run.sample == run.clean
    if task != "sudoku":
        label = torch.zeros(run.sample.shape)
        for offset in range(STRIDE):
            now = judged & every(STRIDE, torch.full((len(judged),), offset), judged.shape[1])
            label[now] = log_posterior(denoiser, run.sample, now).exp()
    for row in range(len(judged)):
        here = judged[row]
        if here.any():
            values = {name: score[row][here].float().numpy() for name, score in scores.items()}
            fill = float(here.sum() / run.canvas.generated[row].sum())
            yield JudgedRow(values, label[row][here].numpy(), fill, age[row][here].numpy(), kind)


def of_age(row: JudgedRow, low: int, high: int) -> JudgedRow:
    """The tokens of a row that were written so many passes ago."""
    here = (row.age >= low) & (row.age <= high)
    return replace(row, scores={k: v[here] for k, v in row.scores.items()}, right=row.right[here], age=row.age[here])


def measures(rows: list[JudgedRow]) -> dict:
    """All of them, by fill, and by age."""
    found = {"all": detection_measures(rows)}
    for low, high in FILLS:
        name = "full" if low > 0.9 else f"fill {low:g}-{0.5 if high == 0.5 else 1:g}"
        found[name] = detection_measures([row for row in rows if low < row.fill <= high])
    for name, (low, high) in AGES.items():
        some = [of_age(row, low, high) for row in rows]
        found[name] = detection_measures([row for row in some if len(row.right)])
    return {name: value for name, value in found.items() if value}


def heads_of(pipe, source: str, named: list[str]) -> dict[str, QualityHead]:
    """Of a bundled model the head in its pipeline and the one that knows the run; and those of --heads."""
    heads = {} if pipe.quality_head is None else {ONE_STEP: pipe.quality_head}
    is_bundled, ours = source in map(bundled, ("sudoku", "text")), Path(f"{source}-head")
    for words in [*([f"{KNOWS}={ours}"] if is_bundled else []), *named]:
        name, _, folder = words.partition("=")
        if name in (*FREE_SCORES, *heads):
            raise SystemExit(f"error: --heads has {words!r}, and {name!r} is another score. Take another name.")
        place = Path(folder) / "quality_head"
        heads[name] = QualityHead.from_pretrained(place if place.is_dir() else folder)
    size = pipe.model.config.hidden_size
    return {name: head.eval() for name, head in heads.items() if head.config.hidden_size == size}


def docs_tables(result: dict) -> str:
    """The tables of docs/judging.md, from the JSON."""
    lines = []
    for title, found in result["tasks"].items():
        if title.startswith("sudoku"):
            lines += [f"| Sudoku, {title[8:]} | within a grid | all cells | grid has no error | ECE |"]
            cells = {s: [v[name] for name in ("within", "pooled", "row", "ece")] for s, v in found["all"].items()}
        else:
            fills = [name for name in found if name.startswith("f")]
            lines += [f"| Text, {title[6:]} | at fill .4 | .7 | 1 | ECE |"]
            cells = {s: [*(found[name][s]["overlap"] for name in fills), v["ece"]] for s, v in found["all"].items()}
        lines.append("| --- | ---: | ---: | ---: | ---: |")
        digits = [3] * 4 if title.startswith("sudoku") else [1, 1, 1, 3]
        for score, values in cells.items():
            shown = ["-" if v is None else f"{v:.{d}f}" for v, d in zip(values, digits, strict=True)]
            lines.append(f"| {NAMES.get(score, score)} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def parse_args(argv=None):
    """The flags; see the module's docstring."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 puzzles of each kind, 12 texts")
    parser.add_argument("--tasks", nargs="+", choices=["sudoku", "text"], default=["sudoku", "text"])
    parser.add_argument("--model", help="Hub id or folder of another model, in place of the bundled text model")
    parser.add_argument("--heads", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--rows", type=int, default=300, help="puzzles of each kind; an eighth of it texts")
    parser.add_argument("--length", type=int, default=256, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=60)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--table", type=Path, help="write the JSON there")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Run every task, print its tables, write the JSON. Returns the exit status."""
    args = parse_args(argv)
    count = 60 if args.quick else args.rows
    result = {"settings": {"rows": count, "seed": SEED, "dtype": args.dtype, "length": args.length}, "tasks": {}}
    for task in args.tasks:
        began = time.perf_counter()
        source = args.model if args.model and task == "text" else bundled(task)
        pipe = PrismPipeline.from_pretrained(source).to(getattr(torch, args.dtype))
        rows = rows_of_task(pipe, heads_of(pipe, source, args.heads), task, count, args.length, args.batch_size)
        for kind in dict.fromkeys(row.kind for row in rows):
            found = measures([row for row in rows if row.kind == kind])
            result["tasks"][f"{task}, {kind}" + (" clues" if task == "sudoku" else "")] = found
            print(f"\n{task}, {kind}\n\n{detection_table(found['all'])}\n", file=sys.stderr, flush=True)
        print(f"{task}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    result |= origin()
    if args.table:
        before = json.loads(args.table.read_text()) if args.table.exists() else {}
        if before.get("settings") == result["settings"]:  # the other task, measured by itself
            result["tasks"] = before["tasks"] | result["tasks"]
    print(docs_tables(result))
    return give(result, args.table)


if __name__ == "__main__":
    sys.exit(main())
