"""Does remasking by quality make more generated Python functions parse, and masked spans come back better?

Held fixed: the model of examples/code, random order, temperature 1, forwards, lengths, seeds. Varied: the rule, its one
knob the best of four by what parses, at 32 forwards on other held-out functions. Two tasks on held-out functions:
writing one of the same number of tokens from nothing, and filling a contiguous span of `SPAN` of the tokens.
Measured, per function: is what was written a function that `ast.parse` accepts; share of the masked tokens that come
back as they were; entropy of its tokens in nats (repetition parses easily). Nothing is executed. 95 % intervals:
Wilson's for what parses, bootstrap over functions for the rest and for differences from PRISM, paired by function.

Each cell (rule, forwards, seed) is a file below `--cells` when done, and not run again: stop at any time and start
again. When all are there the table is written to docs/figures. The last line of stdout is one JSON object.
Usage: python -m benchmarks.code_parse runs/code-prism [--data runs/code-data]
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared import ROOT, give, origin
from prism_pipelines import PrismPipeline
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation import pipeline_fingerprint, run_comparison, tune_arms, unigram_entropy

SPAN, LONGEST, CHOOSE_STEPS, CHOOSE_SEED = 0.3, 128, 32, 40_000
ETA = [0.03, 0.1, 0.3, 0.5]
ARMS = [  # a list is a knob
    {"name": "MDLM", "scheduler": "MDLMScheduler", "order": "random"},
    {"name": "self-confidence", "scheduler": "SelfConfidenceScheduler", "order": "random", "eta": ETA},
    {"name": "PRISM", "scheduler": "PrismScheduler", "order": "random", "eta": ETA},
]


def is_function(code: str) -> bool:
    """Whether Python accepts the text as a module that has a function in it; an empty one parses too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef) for node in tree.body)


def masked(ids: list[int], kind: str, mask_id: int, rng) -> list[int]:
    """The tokens of a function with all of them masked, or a span."""
    if kind == "whole":
        return [mask_id] * len(ids)
    length = max(1, round(SPAN * len(ids)))
    start = int(rng.integers(len(ids) - length + 1))
    return ids[:start] + [mask_id] * length + ids[start + length :]


def writing(rows: list[list[int]], kind: str, batch_size: int):
    """Writing or filling functions as a task of `run_comparison`; lists of one value a function."""

    def task(pipe, steps: int, seed: int) -> dict:
        rng, end = np.random.default_rng(seed), pipe.tokenizer.eos_token_id
        found = {"parse": [], "right": [], "entropy": []}
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
            attention = torch.zeros_like(ids)
            for i, row in enumerate(part):
                ids[i, : len(row)] = torch.tensor(masked(row, kind, pipe.mask_token_id, rng))
                attention[i, : len(row)] = 1
            generators = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(part))]
            out = pipe(
                infill=ids, attention_mask=attention, num_inference_steps=steps, generator=generators, output_type="seq"
            ).sequences
            for i, row in enumerate(part):
                written = out[i, : len(row)].tolist()
                code = written[: written.index(end)] if end in written else written
                places = [j for j in range(len(row)) if ids[i, j] == pipe.mask_token_id]
                found["parse"].append(is_function(pipe.tokenizer.decode(code)))
                found["right"].append(float(np.mean([written[j] == row[j] for j in places])))
                found["entropy"].append(unigram_entropy([code]) if code else 0.0)
        return found

    return task


def last_step(run: Path) -> int | None:
    """Steps of a training run, from its log; None without one."""
    log = run / "training_log.jsonl"
    return json.loads(log.read_text().splitlines()[-1])["step"] if log.exists() else None


def parse_args(argv=None):
    """The flags; see the module's docstring."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="saved pipeline of examples/code/train.sh")
    parser.add_argument("--base", type=Path, default=None, help="the run that it started from, to name its steps")
    parser.add_argument("--data", type=Path, default=Path("runs/code-data"), help="folder of examples/code/prepare.py")
    parser.add_argument("--num-functions", type=int, default=200, help="of a cell, and of the choice of settings")
    parser.add_argument("--forwards", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--seeds", type=int, default=1, help="seeds of every cell (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cells", type=Path, default=ROOT / "runs" / "code_cells", help="finished cells")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "figures" / "code.json")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Choose settings, run every rule on both tasks, write the table. Returns exit status."""
    args = parse_args(argv)
    pipe = PrismPipeline.from_pretrained(str(args.model)).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    texts = [json.loads(line)["completion"] for line in (args.data / "heldout.jsonl").read_text().splitlines()]
    rows = [[*pipe.tokenizer(text, add_special_tokens=False).input_ids, pipe.tokenizer.eos_token_id] for text in texts]
    rows = [row for row in rows if len(row) <= LONGEST]
    if len(rows) < 2 * args.num_functions:
        raise SystemExit(
            f"error: --num-functions {args.num_functions}: twice as many are needed, {len(rows)} are there."
        )
    np.random.default_rng(0).shuffle(rows)  # neighbours are of one module
    tested, others = rows[: args.num_functions], rows[args.num_functions : 2 * args.num_functions]
    settings = {"num_functions": args.num_functions, "span": SPAN, "longest": LONGEST}
    settings["steps"] = {"prism": last_step(args.model), "pretraining": args.base and last_step(args.base)}
    settings["data"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
    mark = pipeline_fingerprint(pipe, json.dumps(settings))
    arms, _ = tune_arms(
        pipe,
        writing(others, "whole", args.batch_size),
        ARMS,
        steps=CHOOSE_STEPS,
        seed=CHOOSE_SEED,
        trials=4,
        out_dir=args.cells / "tuning",
        task_name=mark,
        report=lambda arm, found: print(json.dumps(arm | found), file=sys.stderr, flush=True),
    )
    result = {"settings": {**settings, "fingerprint": mark}, "arms": arms, "seeds": list(range(args.seeds))}
    result |= origin(args.device)
    for kind in ("whole", "span"):
        found = run_comparison(
            pipe,
            writing(tested, kind, args.batch_size),
            arms,
            args.forwards,
            result["seeds"],
            out_dir=args.cells / kind,
            task_name=f"{kind} {mark}",
            reference="PRISM",
        )
        result[kind] = {name: found[name] for name in ("rows", "pairs")}
    result["held_out_entropy"] = unigram_entropy([row[:-1] for row in tested])
    return give(result, args.table)


if __name__ == "__main__":
    sys.exit(main())
