"""How many more tokens a second do a cache and a threshold give, at the same number of tokens written per forward?

Held fixed within one block of the table: model (random weights), batch, prompt, generated length, block length, order,
temperature 0, dtype, device, and tokens per forward: the threshold is sought such that "block" with it writes about
`tokens_per_step` tokens a forward, and the runs of fixed steps then make as many forwards as a row of that run made.
Varied: the cache, and whether a threshold or a fixed schedule says how many tokens a step writes.
Reference: no cache and fixed steps, same run. All arms of a block take turns, so that a slow spell of the machine falls
on all; the ratio is of tokens a second in the fastest turns, scaled to the reference's tokens per forward. On a CPU the
time is that of the process's one thread, which other jobs of the machine lengthen less than they do the wall clock's.
Throughput counts generated tokens, not the prompt's. What a threshold does to quality no random model can tell.

    taskset -c 0 python -m benchmarks.cache --out docs/figures/cache.json   # CPU, 1 thread, minutes
    python -m benchmarks.cache --shapes llada-8b --device cuda                 # a GPU of at least 24 GB

The last line of stdout is one JSON object: rows, settings, device, versions, commit, seed; --output writes it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import asdict, dataclass

import torch

from benchmarks.shared import RandomLlama, give, origin
from prism_pipelines import FAMILIES, MDLMScheduler, MDMSpec, PrismPipeline
from prism_pipelines.cli.arguments import Parser

SEED = 0


@dataclass(frozen=True)
class Shape(RandomLlama):
    """What is sampled: the model and the run."""

    batches: tuple[int, ...]
    prompt: int
    generated: int
    block: int
    tokens_per_step: float


SHAPES = {
    # 36M parameters, nine tenths of them the vocabulary's: the output head is most of a step.
    "vocabulary": Shape(256, 4, 4, 1024, 126464, True, "float32", (1,), 64, 64, 32, 2.0),
    # 34M parameters, three quarters of them in the layers, and a long prompt: the body is most of a step.
    "body": Shape(512, 8, 8, 1408, 16384, True, "float32", (1,), 384, 64, 32, 2.0),
    "llada-8b": Shape(4096, 32, 32, 12288, 126464, False, "bfloat16", (1, 8), 512, 256, 32, 2.0),
    # Every line of this file in seconds, and no figure worth reading.
    "smoke": Shape(32, 2, 4, 64, 1000, True, "float32", (1, 2), 16, 16, 8, 2.0),
}
ARMS = [("none", False), ("prefix", False), ("block", False), ("prefix", True), ("block", True)]


def pipeline(shape: Shape, device: str) -> PrismPipeline:
    """A bidirectional Llama of random weights; the mask is its last token but one."""
    # Tokens that differ, so that some are surer than others.
    model = shape.model(device, SEED, initializer_range=0.05)
    spec = MDMSpec.from_dict(FAMILIES["llada"].to_dict() | {"mask_token_id": shape.vocabulary - 2})
    pipe = PrismPipeline(model, scheduler=MDLMScheduler(order="confidence", temperature=0.0), mdm_spec=spec)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, shape: Shape, batch: int, cache: str, steps: int, threshold: float | None) -> float:
    """One run; the forwards that a row of it took part in, on average."""
    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(100, shape.vocabulary - 2, (batch, shape.prompt), generator=generator)
    out = pipe(
        input_ids=prompt,
        gen_length=shape.generated,
        block_length=shape.block,
        num_inference_steps=steps,
        cache=cache,
        threshold=threshold,
        output_type="seq",
    )
    return sum(out.nfe_per_row) / batch


def find_threshold(pipe, shape: Shape, batch: int) -> tuple[float, float]:
    """The threshold with which "block" writes nearest to `tokens_per_step`, by bisection; and the forwards of that."""
    low, high, best = math.log(1e-6), 0.0, None
    wanted = shape.generated / shape.tokens_per_step
    for _ in range(8):
        middle = (low + high) / 2
        nfe = sample(pipe, shape, batch, "block", shape.generated, math.exp(middle))
        if best is None or abs(nfe - wanted) < abs(best[1] - wanted):
            best = math.exp(middle), nfe
        low, high = (middle, high) if nfe < wanted else (low, middle)
        if abs(nfe - wanted) <= 0.1 * wanted:
            break
    return best


def measure(pipe, name: str, shape: Shape, batch: int, repeats: int, cuda: bool) -> list[dict]:
    """The rows of one block of the table."""
    clock = time.perf_counter if cuda else time.process_time
    sync = torch.cuda.synchronize if cuda else (lambda: None)
    threshold, steps = find_threshold(pipe, shape, batch)
    took, forwards = {arm: [] for arm in ARMS}, {}
    for _ in range(repeats):
        for cache, adaptive in ARMS:
            sync()
            start = clock()
            # A threshold may use as many steps as there are tokens; the fixed schedule makes as many as "block" needed.
            given = (shape.generated, threshold) if adaptive else (round(steps), None)
            forwards[cache, adaptive] = sample(pipe, shape, batch, cache, *given)
            sync()
            took[cache, adaptive].append(clock() - start)
    rows, reference = [], min(took["none", False]) / forwards["none", False]
    for (cache, adaptive), times in took.items():
        nfe = forwards[cache, adaptive]
        row = {"shape": name, "batch": batch, "cache": cache, "threshold": threshold if adaptive else None, "nfe": nfe}
        row |= {"tokens_per_forward": shape.generated / nfe, "min_s": min(times), "max_s": max(times)}
        row["tokens_per_second"] = batch * shape.generated / min(times)
        row["ratio"] = reference / (min(times) / nfe)
        rows.append(row)
    return rows


def main(argv=None) -> int:
    """Measure, print the table, and the JSON object."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["vocabulary", "body"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", help="file for the JSON object")
    args = parser.parse_args(argv)
    cuda = args.device.startswith("cuda")
    if not cuda:
        torch.set_num_threads(1)
    where, rows = origin(args.device), []
    print(f"{'shape':11}{'batch':>6} {'cache':7}{'threshold':>10}{'forwards':>9}{'tokens/forward':>15}", end="")
    print(f"{'s':>8}{'tokens/s':>9}{'ratio':>7}")
    for name in args.shapes:
        shape = SHAPES[name]
        pipe = pipeline(shape, args.device)
        for batch in shape.batches:
            for row in measure(pipe, name, shape, batch, args.repeats, cuda):
                rows.append(row)
                bar = "fixed" if row["threshold"] is None else f"{row['threshold']:.2g}"
                print(f"{name:11}{batch:6} {row['cache']:7}{bar:>10}{row['nfe']:9.1f}", end="")
                print(f"{row['tokens_per_forward']:15.2f}{row['min_s']:8.2f}{row['tokens_per_second']:9.1f}", end="")
                print(f"{row['ratio']:7.2f}", flush=True)
    told = {
        "rows": rows,
        "settings": {"shapes": {name: asdict(SHAPES[name]) for name in args.shapes}, "repeats": args.repeats},
        "clock": "wall" if cuda else "process time",
        **where,
        "seed": SEED,
    }
    return give(told, args.out)


if __name__ == "__main__":
    sys.exit(main())
