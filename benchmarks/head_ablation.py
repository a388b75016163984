"""What makes a head find wrong tokens: what it reads, its target, the states that it learns on, or its architecture?

Held fixed: a bundled model, frozen; states of its own runs with their labels, made once and read by every head; steps
and batch of the fit. Varied: one thing at a time from the bundled head's choice, with several training seeds. Measured
on other states, by `benchmarks.detection`. "one-step states" are PRISM's: true tokens, and those of one step of the
sampler, which are judged. A label by the posterior is known at some positions of a state, see `log_posterior`.

    python -m benchmarks.head_ablation --quick                                      # about ten minutes of one core
    python -m benchmarks.head_ablation --dtype bfloat16 --table docs/figures/head_ablation.json

The last line of stdout is one JSON object; --table writes it to a file.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.detection import LOOKS, canvases, measures, rows_of_task
from benchmarks.shared import give, origin
from prism_pipelines import PrismPipeline, QualityHead, bundled, sudoku
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation.detection import NAMES
from prism_pipelines.schedulers.context import INPUTS, ODDS, context_features, first_channels
from prism_pipelines.training.head_start import begin_neutral, first_guess, fit_skip
from prism_pipelines.training.rollout_losses import WARM_UP, every, label_loss, log_posterior
from prism_pipelines.training.rollouts import RolloutPool, RolloutSettings
from prism_pipelines.training.setup import CONTEXTS

ALL = tuple(INPUTS)
SETTINGS = {"sudoku": RolloutSettings(12, 52), "text": RolloutSettings(16, 64, repairs=8)}
STRIDE, OFFSETS = {"sudoku": 16, "text": 8}, 2  # labels by the posterior: at every s-th position, from so many offsets
RUNS, ROWS = {"sudoku": 12, "text": 6}, {"sudoku": 96, "text": 24}
FIT_ROWS, RATE, FLOOR = {"sudoku": 48, "text": 16}, {"sudoku": 3e-3, "text": 4e-3}, -12.0
# By the target of a variant: label and loss of `label_loss`.
LOSSES = {"truth": ("truth", "bce"), "posterior": ("posterior", "squared"), "soft": ("posterior", "bce")}
KEEP = 0.15  # share of the states of a pool that are kept: those of successive steps differ little
SEED = 17_000


@dataclass(frozen=True)
class Variant:
    """A way to make a head: what it reads, what it is taught, where, and by which layers."""

    context: tuple[str, ...]
    target: str  # "truth", "posterior", or "soft": cross-entropy against the posterior
    states: str = "rollout"
    architecture: str = "block"


@dataclass
class States:
    """Labelled states: hidden states and rows of tokens (N, L, H), features of all inputs (N, L, F), else (N, L).

    Labels are NaN where they are not known; the posterior is a log-probability.
    """

    hidden: Tensor
    first_hidden: Tensor
    token_rows: Tensor
    features: Tensor
    truth: Tensor
    posterior: Tensor


def variants(task: str) -> dict[str, Variant]:
    """The bundled head's choice, and each change of it by name."""
    label = "truth" if task == "sudoku" else "posterior"
    full = Variant(CONTEXTS[label], label, architecture="block_mlp" if task == "sudoku" else "block")
    found = {"as bundled": full}
    for name in full.context:
        dropped = (name, name + ODDS)  # log-odds say what the log-probabilities say
        found[f"without {name}"] = replace(full, context=tuple(n for n in full.context if n not in dropped))
    found["no context"] = replace(full, context=())
    if task == "sudoku":
        found["target: posterior"] = replace(full, target="posterior")
        found["one-step states"] = replace(full, states="one_step")
        found["one-step states, no context (PRISM)"] = replace(full, states="one_step", context=())
    else:
        found["without log-odds"] = replace(full, context=tuple(n for n in full.context if not n.endswith(ODDS)))
        found["loss: cross-entropy"] = replace(full, target="soft")
        found["with the first canvas"] = replace(full, context=(*full.context, "prompt", "first_hidden"))
    found["linear"] = replace(full, architecture="linear")
    return found


@torch.no_grad()
def labelled(denoiser, run, hidden: Tensor, context, task: str) -> States:
    """One state of a run with its labels; a text has no truth."""
    mask, judged = denoiser.spec.mask_token_id, run.judged
    truth = torch.where(judged & (task == "sudoku"), (run.sample == run.clean).float(), torch.nan)
    posterior = torch.full(run.sample.shape, torch.nan)
    stride = STRIDE[task]
    for offset in torch.randperm(stride)[:OFFSETS].tolist():
        now = judged & every(stride, torch.full((len(judged),), offset), judged.shape[1])
        posterior[now] = log_posterior(denoiser, run.sample, now).float()
    features = context_features(context, run.sample, mask, ALL)
    half = [values.to(torch.float16) for values in (hidden, context.first_hidden, context.token_rows, features)]
    return States(*half, truth, posterior)


@torch.no_grad()
def make_states(pipe, task: str, count: int, one_step: bool) -> States:
    """`count` rows of states of the model's runs. With `one_step` a run begins from true tokens and makes one step."""
    denoiser, settings, found = pipe.denoiser, SETTINGS[task], []
    if one_step:
        settings = replace(settings, mask_rate_min=0.05, repairs=0)
    pool, tick, made, batch = RolloutPool(denoiser, ALL, settings, RUNS[task]), 0, 0, None
    while made < count:
        if one_step or batch is None or tick % 40 == 0:
            batch = training_rows(pipe, task, ROWS[task], SEED + tick)
        if one_step:
            pool.runs = []
        pool.refill(**batch)
        for last in (False, True) if one_step else (True,):
            hidden = denoiser.hidden(*pool.batch())
            for run, part in zip(pool.runs, pool.parts(hidden), strict=True):
                context = run.recorder.observe(run.sample, part, run.at_work)
                keep = last and (one_step or run.is_full or torch.rand(()) < KEEP) and tick >= WARM_UP * (not one_step)
                if keep and bool(run.judged.any()):
                    found.append(labelled(denoiser, run, part, context, task))
                    made += len(part)
                pool.advance(run, part, torch.rand(run.sample.shape))
        tick += 1
    return States(*(torch.cat([getattr(one, field.name) for one in found]) for field in fields(States)))


def training_rows(pipe, task: str, count: int, seed: int) -> dict[str, Tensor]:
    """Rows that runs begin from, other than those that heads are measured on."""
    if task == "text":
        return next(iter(canvases(task, pipe, count, 256)))[1]
    puzzles, solutions = sudoku.make_puzzles(count, 23 + seed // 40 % 10, seed)
    batch = {"input_ids": torch.from_numpy(solutions.astype(np.int64))}
    return batch | {"trainable_mask": torch.from_numpy(puzzles == 0)}


def fit(states: States, variant: Variant, task: str, seed: int, steps: int) -> QualityHead:
    """A head of this kind, taught on these states."""
    torch.manual_seed(seed)
    head = QualityHead(states.hidden.shape[-1], variant.architecture, context=variant.context)
    begin_neutral(head)
    first = first_channels(ALL)
    channels = [first[name] + c for name in variant.context for c in range(INPUTS[name])]
    vectors = {"first_hidden": states.first_hidden, "token": states.token_rows}
    labels = states.truth if variant.target == "truth" else states.posterior

    def loss_of(out: Tensor, label: Tensor) -> Tensor:
        return label_loss(out, label, *LOSSES[variant.target], FLOOR)

    def judged(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        label, features = labels[rows], states.features[rows][..., channels].float()
        read = [vectors[name][rows] if name in variant.context else None for name in vectors]
        out, known = head(states.hidden[rows], None, features if channels else None, *read), ~label.isnan()
        return out[known], features[known], label[known]

    if channels:
        with torch.no_grad():
            guess = first_guess(variant.context, LOSSES[variant.target][0])
            fit_skip(head, *judged(torch.randperm(len(labels))[: 4 * FIT_ROWS[task]]), loss_of, guess)
    optimizer = torch.optim.AdamW(head.parameters(), RATE[task], betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 30) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    for _ in range(steps):
        out, _, label = judged(torch.randint(len(labels), (FIT_ROWS[task],)))
        optimizer.zero_grad()
        loss_of(out, label).mean().backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return head.eval()


def columns_of(task: str, found: dict[str, dict]) -> dict[str, dict[str, float]]:
    """{score: {title: value}} from {kind: measures}."""
    table: dict[str, dict[str, float]] = {}
    for kind, by_state in found.items():
        wanted = {}
        if task == "sudoku":
            wanted = {f"{kind} clues, {name}": ("all", name) for name in ("within", "pooled", "row")}
        else:
            states = [name for name in by_state if name.startswith("f")]
            titles = [f"fill {share:g}" for share in LOOKS["text"]]
            wanted = {title: (state, "overlap") for title, state in zip(titles, states, strict=True)}
        for title, (state, measure) in wanted.items():
            for score, values in by_state[state].items():
                table.setdefault(score, {})[title] = values[measure]
    return table


def over_seeds(columns: dict[str, dict[str, float]]) -> dict[str, dict[str, list[float]]]:
    """Columns of "name #seed" put together as {name: {title: values of the seeds}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for score, values in columns.items():
        for title, value in values.items():
            found.setdefault(score.partition(" #")[0], {}).setdefault(title, []).append(value)
    return found


def markdown(table: dict[str, dict[str, list[float]]]) -> str:
    """Mean over the seeds, with the lowest and highest."""
    titles = list(next(iter(table.values())))
    lines = [f"| head | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(titles)}"]
    for name, values in table.items():
        cells = []
        for title in titles:
            some, digits = values[title], 1 if title.startswith("fill") else 3
            mean = f"{np.mean(some):.{digits}f}"
            cells.append(mean if len(some) == 1 else f"{mean} ({min(some):.{digits}f}-{max(some):.{digits}f})")
        lines.append(f"| {NAMES.get(name, name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(argv=None):
    """The flags; see the module's docstring."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the states and steps, one seed")
    parser.add_argument("--tasks", nargs="+", choices=["sudoku", "text"], default=["sudoku", "text"])
    parser.add_argument("--num-states", type=int, help="rows of states (default: 6000 grids, 1500 texts)")
    parser.add_argument("--max-steps", type=int, default=400, help="of each fit (default: %(default)s)")
    parser.add_argument("--num-seeds", type=int, default=3, help="training seeds (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=120, help="puzzles of each kind; a fifth of it texts")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the backbone")
    parser.add_argument("--table", type=Path, help="write the JSON there")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Make states, fit every head, measure all of them at once. Returns the exit status."""
    args = parse_args(argv)
    steps, seeds, share = (args.max_steps // 5, 1, 5) if args.quick else (args.max_steps, args.num_seeds, 1)
    result = {
        "settings": {"steps": steps, "seeds": seeds, "rows": args.rows // share, "dtype": args.dtype},
        "tasks": {},
    }
    for task in args.tasks:
        began = time.perf_counter()
        pipe = PrismPipeline.from_pretrained(bundled(task)).to(getattr(torch, args.dtype))
        count = (args.num_states or {"sudoku": 6000, "text": 1500}[task]) // share
        torch.manual_seed(SEED)
        states = {"rollout": make_states(pipe, task, count, False)}
        if task == "sudoku":
            states["one_step"] = make_states(pipe, task, count, True)
        made = time.perf_counter() - began
        heads = {}
        for name, variant in variants(task).items():
            for seed in range(seeds):
                heads[f"{name} #{seed}"] = fit(states[variant.states], variant, task, seed, steps)
            print(f"{task}, {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        rows = rows_of_task(pipe, heads, task, args.rows // share, 256, 60)
        kinds = dict.fromkeys(row.kind for row in rows)
        found = {kind: measures([row for row in rows if row.kind == kind]) for kind in kinds}
        table = over_seeds(columns_of(task, found))
        seconds = {"states": round(made), "all": round(time.perf_counter() - began)}
        result["tasks"][task] = {"states": count, "seconds": seconds, "table": table}
        print(f"\n{markdown(table)}\n", flush=True)
    return give(result | origin(), args.table)


if __name__ == "__main__":
    sys.exit(main())
