"""Does remasking by quality make more generated Python functions parse, and masked spans come back better?

Held fixed: the model of examples/code, temperature 1, forwards, lengths, seeds. Varied: the rule. Two tasks on
held-out functions: writing one of the same number of tokens from nothing, and filling a contiguous span of `SPAN` of
the tokens.
Measured: share that `ast.parse` accepts (Wilson, 95 %), and the share of the masked tokens that come back as they
were (bootstrap over functions). Nothing is executed.
The last line of stdout is one JSON object.
Usage: python benchmarks/code_parse.py runs/code-prism [--data runs/code-data]
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from shared import origin  # beside this file

from prism_pipelines import PrismPipeline
from prism_pipelines.evaluation import bootstrap_interval, make_scheduler, wilson_interval

SPAN, LONGEST = 0.3, 128
ARMS = [
    {"name": "MDLM", "scheduler": "MDLMScheduler", "order": "random"},
    {"name": "self-confidence", "scheduler": "SelfConfidenceScheduler", "order": "random", "eta": 0.1},
    {"name": "PRISM", "scheduler": "PrismScheduler", "order": "random", "eta": 0.1},
]


def parses(code: str) -> bool:
    """Whether Python accepts the text as a module."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def masked(ids: list[int], task: str, mask_id: int, rng) -> list[int]:
    """The tokens of a function with all of them masked, or a span."""
    if task == "whole":
        return [mask_id] * len(ids)
    length = max(1, round(SPAN * len(ids)))
    start = int(rng.integers(len(ids) - length + 1))
    return ids[:start] + [mask_id] * length + ids[start + length :]


def run(pipe, arm: dict, task: str, rows: list[list[int]], steps: int, seed: int) -> dict:
    """Measures of one rule on one task."""
    pipe.scheduler, rng, end = make_scheduler(arm, 1.0), np.random.default_rng(seed), pipe.tokenizer.eos_token_id
    accepted, right = [], []
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        length = max(map(len, part))
        ids = torch.zeros(len(part), length, dtype=torch.long)
        attention = torch.zeros_like(ids)
        for i, row in enumerate(part):
            ids[i, : len(row)] = torch.tensor(masked(row, task, pipe.mask_token_id, rng))
            attention[i, : len(row)] = 1
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(part))]
        out = pipe(
            infill=ids, attention_mask=attention, num_inference_steps=steps, generator=generators, output_type="seq"
        ).sequences
        for i, row in enumerate(part):
            written = out[i, : len(row)].tolist()
            code = written[: written.index(end)] if end in written else written
            accepted.append(parses(pipe.tokenizer.decode(code)))
            places = [j for j in range(len(row)) if ids[i, j] == pipe.mask_token_id]
            right.append(float(np.mean([written[j] == row[j] for j in places])))
    low, high = wilson_interval(sum(accepted), len(accepted))
    found = {"parse": sum(accepted) / len(accepted), "parse_low": low, "parse_high": high, "n": len(accepted)}
    interval = bootstrap_interval(right) or (None, None)
    return found | {"right": float(np.mean(right)), "right_low": interval[0], "right_high": interval[1]}


def main() -> int:
    """Run every rule on both tasks. Returns exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="saved pipeline of examples/code/train.sh")
    parser.add_argument("--data", type=Path, default=Path("runs/code-data"), help="folder of examples/code/prepare.py")
    parser.add_argument("--num-functions", type=int, default=200)
    parser.add_argument("--forwards", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = PrismPipeline.from_pretrained(str(args.model))
    pipe.set_progress_bar_config(disable=True)
    texts = [json.loads(line)["completion"] for line in (args.data / "heldout.jsonl").read_text().splitlines()]
    rows = [[*pipe.tokenizer(text, add_special_tokens=False).input_ids, pipe.tokenizer.eos_token_id] for text in texts]
    rows = [row for row in rows if len(row) <= LONGEST][: args.num_functions]
    table = []
    for task in ("whole", "span"):
        for steps in args.forwards:
            for arm in ARMS:
                found = run(pipe, arm, task, rows, steps, args.seed)
                table.append({"task": task, "forwards": steps, "arm": arm["name"], **found})
                print(json.dumps(table[-1]), file=sys.stderr)
    print(json.dumps({"rows": table, "arms": ARMS, "seed": args.seed, **origin()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
