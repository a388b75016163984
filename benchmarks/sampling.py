"""What does a sampling step cost beside the forward pass that it cannot do without?

Held fixed within one block of the table: model (random weights), batch, prompt, generated length, block length, number
of forwards, dtype, device. Varied: who samples. The bare forwards are the references, in the same run:
    full          as many forwards, with the logits of every position
    block floor   as many forwards, with the output head at the positions of the active block alone
    row floor     as many forwards, with the output head at the masks that the block still holds at that step
All arms take turns, so that a slow spell of the machine falls on all of them; the ratios are of the fastest turns. On a
CPU the time is that of the process's one thread, which other jobs of the machine lengthen less than they do the wall
clock's. The bare arms run one forward in eight and are scaled; the row floor takes its share of every number of masks.
Inside = the time in the model, its output head and the quality head, by hooks, in the first turn.
Throughput counts generated tokens, not the prompt's. diffusers' LLaDA2Pipeline takes one turn. It grows its canvas
block by block, as its block-causal models allow: its forwards see fewer positions than the others'. It cannot remask.
"PRISM random order, judged by ..." samples as the arm before it, with a head that reads a run context.

    taskset -c 0 python -m benchmarks.sampling                        # CPU: 1 thread, 36M parameters, 126k vocabulary
    python -m benchmarks.sampling --shape llada-8b --device cuda      # a GPU of at least 24 GB
    python -m benchmarks.sampling --profile "MDLM, sampling"          # where the time of one arm goes

The last line of stdout is one JSON object: rows, settings, device, versions, commit, seed; --out writes it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.shared import RandomLlama, give, origin
from prism_pipelines import FAMILIES, MDLMScheduler, PrismPipeline, PrismScheduler, QualityHead
from prism_pipelines.cli.arguments import Parser

MASK = 126336  # LLaDA's mask token; the model has random weights
SEED = 0
RECORDS = ("given", "prompt", "prompt_odds", "draw", "draw_odds", "age", "remasks", "fill")
ROWS = (*RECORDS, "first_hidden", "token")
CONTEXTS = {"records": RECORDS, "records, rows": ROWS, "records, rows, own": (*ROWS, "own", "own_odds")}  # of heads
SCALE = 8  # a bare arm runs one in so many of its forwards, but at least as many as this


@dataclass(frozen=True)
class Shape(RandomLlama):
    """What is sampled: the model and the run."""

    batches: tuple[int, ...]
    prompt: int
    generated: tuple[int, ...]
    block: int
    tokens_per_step: int


SHAPES = {
    "cpu": Shape(256, 4, 4, 1024, 126464, True, "float32", (1, 4), 64, (128,), 32, 1),
    "llada-8b": Shape(4096, 32, 32, 12288, 126464, False, "bfloat16", (1, 8), 512, (256, 1024), 32, 1),
    # Every line of this file in seconds, and no figure worth reading.
    "smoke": Shape(32, 2, 4, 64, 126464, True, "bfloat16", (1, 2), 8, (16,), 8, 1),
}


@dataclass(frozen=True)
class Run:
    """One line of the table: a batch of prompts and a length, with the model they go into."""

    shape: Shape
    model: LlamaForCausalLM
    head: QualityHead
    batch: int
    generated: int

    @property
    def steps(self) -> int:
        """Forwards of the run."""
        return self.generated // self.shape.tokens_per_step

    def prompt(self) -> Tensor:
        """The prompts, int64 (B, P)."""
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(1000, (self.batch, self.shape.prompt), generator=generator).to(self.model.device)


# --- references -------------------------------------------------------------------------------------------------------


def canvas(run: Run) -> Tensor:
    """Prompts and masks, int64 (B, P + G)."""
    masks = torch.full((run.batch, run.generated), MASK, device=run.model.device)
    return torch.cat([run.prompt(), masks], dim=1)


def bare_forwards(run: Run, rows_at: Callable[[float], int | None]) -> Callable[[], float]:
    """Forwards of the transformers model alone, with `rows_at(x)` logits of each row; x goes from 0 to 1; None for all.

    Returns:
        what runs some of them, and gives the factor that its time has to be multiplied with.
    """
    ids, count = canvas(run), min(run.steps, max(SCALE, run.steps // SCALE))
    # As fast as this model can see in both directions: no mask, and no causal kernel.
    run.model.config.is_causal = False

    @torch.inference_mode()
    def forwards() -> float:
        for i in range(count):
            rows = rows_at((i + 0.5) / count)
            keep = 0 if rows is None else torch.arange(run.shape.prompt, run.shape.prompt + rows, device=ids.device)
            run.model(input_ids=ids, logits_to_keep=keep, use_cache=False, is_causal=False)
        return run.steps / count

    return forwards


def masks_left(shape: Shape, x: float) -> int:
    """Masks that a block holds when the fraction x of its steps is done."""
    return shape.block - int(x * shape.block / shape.tokens_per_step) * shape.tokens_per_step


# --- samplers ---------------------------------------------------------------------------------------------------------


def ours(run: Run, scheduler, temperature: float, head: QualityHead | None = None) -> Callable[[], float]:
    """`PrismPipeline` with one scheduler, and a head other than the run's."""
    pipe = PrismPipeline(run.model, None, head or run.head, scheduler, FAMILIES["llada"])
    pipe.set_progress_bar_config(disable=True)

    def sample() -> float:
        out = pipe(
            input_ids=run.prompt(),
            gen_length=run.generated,
            block_length=run.shape.block,
            num_inference_steps=run.steps,
            temperature=temperature,
            generator=torch.Generator(run.model.device).manual_seed(SEED),
            output_type="seq",
        )
        assert out.nfe == run.steps and not (out.sequences == MASK).any()
        return 1.0

    return sample


def llada2(run: Run, temperature: float) -> Callable[[], float]:
    """diffusers' own pipeline and scheduler, with the same number of forwards."""
    pipe = LLaDA2Pipeline(run.model, BlockRefinementScheduler(block_length=run.shape.block), None)
    pipe.set_progress_bar_config(disable=True)
    never = 2.0  # a confidence that no token has: only the tokens due are written

    def sample() -> float:
        pipe(
            input_ids=run.prompt(),
            gen_length=run.generated,
            block_length=run.shape.block,
            num_inference_steps=run.shape.block // run.shape.tokens_per_step,
            temperature=temperature,
            sampling_method="multinomial" if temperature else "greedy",
            threshold=never,
            editing_threshold=None,
            eos_early_stop=False,
            mask_token_id=MASK,
            generator=torch.Generator(run.model.device).manual_seed(SEED),
            output_type="seq",
        )
        return 1.0

    return sample


def arms_of(run: Run) -> dict[str, Callable[[], float]]:
    """Every arm by name; what it returns is the factor of its time."""
    arms = {
        "full": bare_forwards(run, lambda x: None),
        "block floor": bare_forwards(run, lambda x: run.shape.block),
        "row floor": bare_forwards(run, lambda x: masks_left(run.shape, x)),
    }
    for name, temperature in (("greedy", 0.0), ("sampling", 1.0)):
        arms[f"MDLM, {name}"] = ours(run, MDLMScheduler(order="confidence"), temperature)
        arms[f"PRISM, {name}"] = ours(run, PrismScheduler(order="confidence", num_remask=1), temperature)
        arms[f"LLaDA2Pipeline, {name}"] = llada2(run, temperature)
    random = PrismScheduler(order="random", num_remask=1)
    arms["PRISM random order, sampling"] = ours(run, random, 1.0)
    for name, reads in CONTEXTS.items():
        head = QualityHead(run.shape.hidden, "mlp", context=reads).to(run.model.device)
        arms[f"PRISM random order, judged by {name}"] = ours(run, random, 1.0, head)
    return arms


# --- measuring --------------------------------------------------------------------------------------------------------


def now() -> float:
    """Seconds: of the device when it has done all it was given, or of this process."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def clock(modules: list[torch.nn.Module]):
    """A list that holds the seconds spent in `modules`, the time of one inside another counted once."""
    spent, depth, begun = [0.0], [0], [0.0]

    def enter(*_) -> None:
        if depth[0] == 0:
            begun[0] = now()
        depth[0] += 1

    def leave(*_) -> None:
        depth[0] -= 1
        if depth[0] == 0:
            spent[0] += now() - begun[0]

    hooks = [m.register_forward_pre_hook(enter, prepend=True) for m in modules]
    hooks += [m.register_forward_hook(leave) for m in modules]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def seconds(arm: Callable[[], float]) -> float:
    """Of one turn of an arm."""
    start = now()
    factor = arm()
    return (now() - start) * factor


def first_turn(run: Run, arm: Callable[[], float]) -> dict:
    """One turn with hooks: seconds in all and inside the model, and the peak of GPU memory in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with clock([run.model, run.model.get_output_embeddings(), run.head]) as spent:
        start = now()
        factor = arm()
        total = now() - start
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"turns": [total * factor], "inside": spent[0] / total, "peak_bytes": peak}


def measure(run: Run, only: str, turns: int) -> list[dict]:
    """The rows of one batch and length."""
    bare = ("full", "block floor", "row floor")
    arms = {name: arm for name, arm in arms_of(run).items() if only in name or name in bare}
    arms["full"]()  # warm-up
    found = {name: first_turn(run, arm) for name, arm in arms.items()}
    for _ in range(turns - 1):
        for name, arm in arms.items():
            if not name.startswith("LLaDA2"):
                found[name]["turns"].append(seconds(arm))
    best = {name: min(row["turns"]) for name, row in found.items()}
    rows = []
    for name, row in found.items():
        extra = (1 - row["inside"]) * row["turns"][0]
        rows.append(
            {
                "arm": name,
                "batch": run.batch,
                "generated": run.generated,
                "forwards": run.steps,
                "turns_s": row["turns"],
                "ms_per_step": 1000 * best[name] / run.steps,
                "by_full": best[name] / best["full"],
                "by_block_floor": best[name] / best["block floor"],
                "by_row_floor": best[name] / best["row floor"],
                "total_by_inside": 1 / row["inside"],
                "extra_ms_per_step": 1000 * extra / run.steps,
                "tokens_per_s": run.batch * run.generated / best[name],
                "forwards_per_token": run.steps / (run.batch * run.generated),
                "peak_bytes": row["peak_bytes"],
            }
        )
    return rows


def print_rows(rows: list[dict]) -> None:
    """A table that can be read."""
    columns = {
        "ms_per_step": "ms/step",
        "by_full": "/ full",
        "by_block_floor": "/ block",
        "by_row_floor": "/ rows",
        "total_by_inside": "total/inside",
        "extra_ms_per_step": "extra ms/step",
        "tokens_per_s": "tokens/s",
        "forwards_per_token": "fwd/token",
    }
    for batch, generated in dict.fromkeys((row["batch"], row["generated"]) for row in rows):
        print(f"\nbatch {batch}, {generated} generated")
        print(f"{'':30}" + "".join(f"{title:>15}" for title in columns.values()))
        for row in rows:
            if (row["batch"], row["generated"]) == (batch, generated):
                print(f"{row['arm']:30}" + "".join(f"{row[name]:15.2f}" for name in columns))


def main(argv=None) -> int:
    """Time every arm and print the table, or profile one arm."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=None, help="this batch alone")
    parser.add_argument("--gen-length", type=int, default=None, help="this length alone")
    parser.add_argument("--tokens-per-step", type=int, default=None, help="written by each forward")
    parser.add_argument("--arms", default="", help="arms whose name holds this, beside the bare forwards")
    parser.add_argument("--repeats", type=int, default=3, help="of each arm but LLaDA2Pipeline")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", default=None, metavar="ARM", help="print torch's profile of one arm instead")
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here as well")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    told = {**origin(args.device), "seed": SEED}  # before anyone touches the files
    shape = SHAPES[args.shape]
    if args.tokens_per_step is not None:
        shape = replace(shape, tokens_per_step=args.tokens_per_step)
    model, head = shape.model(args.device, SEED), QualityHead(shape.hidden, "mlp").to(args.device)
    batches = shape.batches if args.batch_size is None else (args.batch_size,)
    lengths = shape.generated if args.gen_length is None else (args.gen_length,)
    runs = [Run(shape, model, head, batch, generated) for generated in lengths for batch in batches]
    if args.profile is not None:
        arm = arms_of(runs[0])[args.profile]
        arm()
        with torch.profiler.profile() as profile:
            arm()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
        return 0
    rows = []
    for run in runs:
        print(f"batch {run.batch}, {run.generated} generated ...", file=sys.stderr)
        rows += measure(run, args.arms, args.repeats)
    print_rows(rows)
    settings = {"shape": args.shape, **asdict(shape), "turns": args.repeats, "cores": len(os.sched_getaffinity(0))}
    settings["parameters"] = sum(p.numel() for p in model.parameters())
    return give({"rows": rows, "settings": settings, **told}, args.out)


if __name__ == "__main__":
    sys.exit(main())
