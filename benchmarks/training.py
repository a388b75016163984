"""What does a PRISM training step cost beside a plain step of the same masked diffusion model, in time and memory?

Held fixed: a Llama-like model with random weights, batch, seed, device. Varied: what is trained. A step is everything
from clean tokens to gradients; no optimizer, which costs the same in all. References: "mdm", the plain step of the same
code with all weights trained; and two bare forwards of the same model without gradients, "body" without its output
head and "model" with all logits. The steps alternate, so that a slow spell of the machine falls on all.

Memory is the most bytes alive at once: weights, gradients and everything in between. On a CPU they are counted tensor
by tensor (`PeakMemory`), on CUDA torch counts. Heads on rollouts: "rollout" and "rollout, lora" learn from the truth,
"distill" from the model's own posterior, also without the input `own`, which needs logits at all visible tokens.
Goals: prism <= 2.2 mdm steps, frozen <= 1.3 times two bare forwards, rollout <= 1.3 mdm, distill <= 1.3 frozen, peak of
prism <= 1.3 of mdm. "prism, one backward" keeps both graphs in memory, as a plain `objective(batch)` does.
Usage: python -m benchmarks.training [--quick] [--large] [--device cuda] [--out docs/figures/training_cost.json]
The last line of stdout is one JSON object: rows, device, versions, commit, seed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import weakref

import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.shared import give, origin, seconds
from prism_pipelines import MDMSpec, QualityHead
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation.tables import markdown_table
from prism_pipelines.models.denoiser import MaskedDenoiser
from prism_pipelines.training.losses import MDMObjective, PRISMObjective
from prism_pipelines.training.rollout_losses import RolloutObjective
from prism_pipelines.training.rollouts import RolloutSettings
from prism_pipelines.training.setup import CONTEXTS

SEED = 0
RATIOS = (
    ("prism", "mdm"),
    ("lora", "mdm"),
    ("frozen", "two bodies"),
    ("frozen", "two models"),
    ("rollout", "mdm"),
    ("rollout, lora", "mdm"),
    ("distill", "frozen"),
    ("distill, no own", "frozen"),
)
GOALS = {
    "prism / mdm": 2.2,
    "frozen / two bodies": 1.3,
    "rollout / mdm": 1.3,
    "rollout, lora / mdm": 1.3,
    "distill / frozen": 1.3,
    "peak of prism / mdm": 1.3,
}


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that come to life inside it; `peak` is the most at one moment.

    Memory inside a kernel is not seen.

    Args:
        model: module whose parameters and buffers are there already and count from the start.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        there = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in model.state_dict().values()}
        there |= {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in model.buffers()}
        self.live, self.now, self.peak = there, sum(there.values()), sum(there.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage) -> None:
        """Count a storage until it is freed, once."""
        key = storage._cdata
        if key in self.live:
            return
        self.live[key] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, key)

    def drop(self, key) -> None:
        """A storage is gone."""
        self.now -= self.live.pop(key)


def llama(sizes: dict, device: str) -> LlamaForCausalLM:
    """A model with random weights."""
    torch.manual_seed(SEED)
    config = LlamaConfig(**sizes, max_position_embeddings=4096, attn_implementation="sdpa")
    return LlamaForCausalLM(config).to(device)


def denoiser_of(model) -> MaskedDenoiser:
    """The model with attention to both sides; its last id is the mask."""
    spec = MDMSpec(mask_token_id=model.config.vocab_size - 1, mask_format="additive")
    return MaskedDenoiser(model, spec)


def prism(model, rank: int | None = None, frozen: bool = False, k: int = 8) -> PRISMObjective:
    """The objective of PRISM's LLaDA setting; random order, so that the output head runs at k rows for the draws."""
    add_lora(model, rank)
    head = QualityHead(model.config.hidden_size, "mlp").to(model.device)
    return PRISMObjective(denoiser_of(model), head, num_revealed=k, freeze_backbone=frozen).train()


def add_lora(model, rank: int | None) -> None:
    """LoRA of LLaDA's setting, where there is a rank."""
    if rank:
        targets = ["q_proj", "k_proj", "v_proj"]
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapter_name="prism")


def rollouts(model, label: str, rank: int | None = None, reads: tuple[str, ...] = ()) -> RolloutObjective:
    """The objective of a head on rollouts, with the default inputs or others; the backbone is frozen without a rank."""
    add_lora(model, rank)
    head = QualityHead(model.config.hidden_size, "mlp", context=reads or CONTEXTS[label]).to(model.device)
    settings = RolloutSettings(mask_rate_min=0.5 if label == "truth" else 1.0)
    objective = RolloutObjective(
        denoiser_of(model), head, settings=settings, label=label, freeze_backbone=rank is None
    ).train()
    objective.stride_checked = 1.0  # random weights have no order that a stride could keep
    return objective


def step(objective, ids) -> None:
    """One training step as `ObjectiveTrainer` does it, without the optimizer."""
    objective.zero_grad()
    noise = torch.Generator().manual_seed(SEED)
    if not isinstance(objective, PRISMObjective):
        objective(ids, generator=noise).loss.backward()
        return
    corrupted = objective.corrupt(ids, generator=noise)
    out = objective.predict(ids, generator=noise, corrupted=corrupted)
    if out.loss is not None:
        out.loss.backward()
    for drawn in out.drawn:
        objective.judge(ids, corrupted=corrupted, drawn=drawn).loss.backward()


def one_backward(objective, ids) -> None:
    """The same step with both graphs in memory."""
    objective.zero_grad()
    objective(ids, generator=torch.Generator().manual_seed(SEED)).loss.backward()


@torch.no_grad()
def forwards(denoiser, ids, logits: bool) -> None:
    """Two bare forwards."""
    for _ in range(2):
        if logits:
            denoiser.model(input_ids=ids, **denoiser.inputs(ids))
        else:
            denoiser.hidden(ids)


def peak_bytes(run, model, device: str) -> int:
    """Most bytes alive during `run`, weights included."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - sum(p.numel() * p.element_size() for p in model.parameters())
        run()
        return torch.cuda.max_memory_allocated() - others
    with PeakMemory(model) as memory:
        run()
    return memory.peak


def measure(sizes: dict, batch: int, length: int, repeats: int, device: str) -> list[dict]:
    """Seconds and peak memory of every step."""
    ids = torch.randint(0, sizes["vocab_size"] - 1, (batch, length), generator=torch.Generator().manual_seed(SEED))
    ids = ids.to(device)
    without_own = tuple(name for name in CONTEXTS["posterior"] if not name.startswith("own"))
    objectives = {
        "mdm": MDMObjective(denoiser_of(llama(sizes, device))).train(),
        "prism": prism(llama(sizes, device)),
        "lora": prism(llama(sizes, device), rank=16),
        "frozen": prism(llama(sizes, device), frozen=True),
        "rollout": rollouts(llama(sizes, device), "truth"),
        "rollout, lora": rollouts(llama(sizes, device), "truth", rank=16),
        "distill": rollouts(llama(sizes, device), "posterior"),
        "distill, no own": rollouts(llama(sizes, device), "posterior", reads=without_own),
    }
    runs = {name: (lambda o=objective: step(o, ids)) for name, objective in objectives.items()}
    runs["prism, one backward"] = lambda: one_backward(objectives["prism"], ids)
    bare = denoiser_of(llama(sizes, device)).eval()
    runs |= {"two bodies": lambda: forwards(bare, ids, False), "two models": lambda: forwards(bare, ids, True)}
    owner = {name: objectives.get(name.removesuffix(", one backward"), bare) for name in runs}
    for run in runs.values():
        run()  # the runs of a pool begin here
    rows = []
    for name, run in runs.items():
        for objective in objectives.values():
            objective.zero_grad(set_to_none=True)
        rows.append({"step": name, "peak_bytes": peak_bytes(run, owner[name], device)})
    took = seconds(runs, repeats)
    for row in rows:
        times = took[row["step"]]
        row |= {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}
    return rows


def main(argv=None) -> int:
    """Measure, print the table and whether the goals hold."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller, one repeat")
    parser.add_argument("--large", action="store_true", help="a model for a GPU, with LLaDA's vocabulary")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default=None, help="JSON file to write besides")
    args = parser.parse_args(argv)
    width, layers, batch, length, vocabulary = 256, 6, 4, 256, 4096
    if args.quick:
        width, layers, batch, length = 64, 2, 2, 64
    elif args.large:
        width, layers, batch, length, vocabulary = 1024, 16, 8, 512, 126464
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 3 * width}
    sizes |= {"num_attention_heads": max(4, width // 64), "vocab_size": vocabulary}
    sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    rows = measure(sizes, batch, length, 1 if args.quick else args.repeats, args.device)
    by = {row["step"]: row for row in rows}
    # The smallest time is the one that other work on the machine disturbed least; medians stand in the table.
    ratios = {}
    for stat in ("median_s", "min_s"):
        for step_of, reference in RATIOS:
            ratios[f"{step_of} / {reference}, {stat}"] = by[step_of][stat] / by[reference][stat]
    ratios["peak of prism / mdm"] = by["prism"]["peak_bytes"] / by["mdm"]["peak_bytes"]
    ratios["peak of prism, one backward / mdm"] = by["prism, one backward"]["peak_bytes"] / by["mdm"]["peak_bytes"]
    cells = [
        [row["step"], f"{row['median_s']:.3f}", f"{row['min_s']:.3f}", f"{row['peak_bytes'] / 1e6:.0f}"] for row in rows
    ]
    print(markdown_table(["step", "median s", "min s", "peak MB"], cells, right=3))
    for name, value in ratios.items():
        goal = GOALS.get(name.split(", median_s")[0])
        print(f"{name}: {value:.2f}" + (f"  (goal {goal}: {'met' if value <= goal else 'MISSED'})" if goal else ""))
    result = {
        "rows": rows,
        "ratios": ratios,
        "sizes": sizes | {"batch": batch, "length": length},
        **origin(args.device),
        "seed": SEED,
    }
    return give(result, args.out)


if __name__ == "__main__":
    sys.exit(main())
