"""How far is judge and repair from the best policy, in worlds so small that the best is computed?

The world is a known p(x) over V^L sequences, the model its exact posterior, and the judge q_i = p(y_i | the others).
A pass that fills several masks draws them independently, so canvases come out that p would not give. A policy judges a
full canvas y, then either stops or pays for two more passes: any subset of the tokens is drawn again in one, with or
without the penalty of judge and repair on the rejected tokens, and the other judges. It ends with the best canvas that
it has seen, and its return is the expected number of right tokens there, sum q_i, less the price of all its passes.
Ours fills and repairs in one pass too. The last line of stdout is one JSON object.
Usage: python -m benchmarks.judging_world
"""

from __future__ import annotations

import itertools
import json
import math
import sys

import torch

from benchmarks.shared import origin
from prism_pipelines.schedulers import JudgeAndRepairScheduler
from prism_pipelines.schedulers.scheduling_judge_repair import EDGE, SURE

V, L = 2, 4
MASK = V
PRICES, WORLDS = (0.005, 0.02, 0.05, 0.1), 5
STATES = list(itertools.product(range(V), repeat=L))
NUMBER = {state: i for i, state in enumerate(STATES)}


class World:
    """p(x) over `STATES`, a few of them likely, and what the model and the judge say."""

    def __init__(self, seed):
        g = torch.Generator().manual_seed(seed)
        weights = torch.rand(len(STATES), generator=g, dtype=torch.float64) ** 12 + 1e-5
        self.p = dict(zip(STATES, (weights / weights.sum()).tolist(), strict=True))
        self.known = {}

    def marginals(self, canvas):
        """(L, V): p(x_i | the visible tokens but the i-th), which at a mask is what the model predicts."""
        if canvas not in self.known:
            table = torch.zeros(L, V, dtype=torch.float64)
            for x, p in self.p.items():
                for i in range(L):
                    if all(c in (MASK, v) for k, (c, v) in enumerate(zip(canvas, x, strict=True)) if k != i):
                        table[i, x[i]] += p
            self.known[canvas] = table / table.sum(-1, keepdim=True)
        return self.known[canvas]

    def quality(self, state):
        """(L,): the judge's verdict on a full canvas."""
        return self.marginals(state)[torch.arange(L), torch.tensor(state)]

    def redrawn(self, state, subset, penalised):
        """(V^L,): the law of the canvas after a pass that draws a subset of a full canvas again."""
        canvas = tuple(MASK if i in subset else v for i, v in enumerate(state))
        table, q = self.marginals(canvas).clone(), self.quality(state)
        law = torch.ones(len(STATES), dtype=torch.float64)
        for i in range(L):
            if i in subset and penalised:
                off = math.log(SURE / (1 - SURE)) - float(q[i].clamp(EDGE, 1 - EDGE).logit())
                table[i, state[i]] *= math.exp(-max(0.0, off))
                table[i] /= table[i].sum()
            for s, other in enumerate(STATES):
                law[s] *= table[i, other[i]] if i in subset else float(other[i] == state[i])
        return law


def best_return(world, price):
    """The return of the best policy, by value iteration over (present canvas, best canvas so far)."""
    right = torch.stack([world.quality(state).sum() for state in STATES])
    subsets = [set(some) for n in range(1, L + 1) for some in itertools.combinations(range(L), n)]
    moves = torch.stack(
        [
            torch.stack([world.redrawn(state, subset, penalised) for state in STATES])
            for subset in subsets
            for penalised in (False, True)
        ]
    )
    n = len(STATES)
    best = torch.where(right[None] > right[:, None], torch.arange(n)[None], torch.arange(n)[:, None])  # (best, new)
    value = right[None].expand(n, n).clone()  # [present, best]: stop, and take the best
    for _ in range(500):
        after = value[torch.arange(n)[None], best]  # [best, new]
        again = torch.maximum(right[None], (moves @ after.T).amax(0) - 2 * price)
        if (again - value).abs().max() < 1e-9:
            break
        value = again
    first = world.redrawn(STATES[0], set(range(L)), False)
    return float(first @ value.diagonal()) - 2 * price, float(first @ right) - 2 * price


def our_return(world, price, rows=600, budget=40, seed=0):
    """The mean return of the scheduler, filling in one pass, and its standard error."""
    scheduler = JudgeAndRepairScheduler(order="random", temperature=1.0, tokens_per_step=L, price=price)
    scheduler.set_timesteps(budget)
    g = torch.Generator().manual_seed(seed)
    sample, active = torch.full((rows, L), MASK), torch.ones(rows, dtype=torch.bool)
    passes = torch.zeros(rows, dtype=torch.long)
    for t in range(budget):
        canvases = [tuple(row) for row in sample.tolist()]
        logits = torch.stack([world.marginals(canvas) for canvas in canvases]).log().float()
        quality = torch.stack(
            [world.quality(c) if MASK not in c else torch.zeros(L, dtype=torch.float64) for c in canvases]
        )
        logits = torch.cat([logits, torch.full((rows, L, 1), -1e9)], -1)
        work = active[:, None].expand(rows, L)
        step = scheduler.step(
            logits, t, sample, quality=quality.float(), generation_mask=work, mask_token_id=MASK, generator=g
        )
        sample, passes = step.prev_sample, passes + active
        active = active & ~step.finished
        if not active.any():
            break
    right = torch.stack([world.quality(tuple(row)).sum() for row in sample.tolist()])
    returns = right - price * passes
    return float(returns.mean()), float(returns.std() / rows**0.5), float(passes.double().mean())


def main() -> int:
    """Print the returns of three policies in each world at each price. Returns the exit status."""
    rows = []
    for price in PRICES:
        for seed in range(WORLDS):
            world = World(seed)
            best, nothing = best_return(world, price)
            ours, error, passes = our_return(world, price)
            row = {"price": price, "world": seed, "no_repair": nothing, "ours": ours, "error": error, "best": best}
            rows.append(row | {"passes": passes, "share": (ours - nothing) / (best - nothing)})
            print(json.dumps(rows[-1]), file=sys.stderr)
    print(json.dumps({**origin(), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
