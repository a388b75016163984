"""How much memory does a training step take? Computed from a model's shapes, and checked against a measurement.

    python -m benchmarks.training_memory                 # LLaDA-8B and Dream-7B: LoRA of rank 256 and frozen, bf16
    python -m benchmarks.training_memory --check         # a random model of 8 layers, computed and counted

Counted are weights, gradients, AdamW's two moments, and what one step keeps for its backward pass and needs at its
widest moment. Gradient checkpointing keeps the input of each layer and computes one layer at a time again. What is not
counted: the allocator's fragmentation, the CUDA context (0.5 GB), memory inside kernels. Add 10 %.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.shared import give
from benchmarks.training import PeakMemory, llama, prism, step
from prism_pipelines.cli.arguments import Parser
from prism_pipelines.evaluation.tables import markdown_table

# config.json of the checkpoints; LLaDA under the names of its native class (docs/models.md).
MODELS = {
    "LLaDA-8B": {"hidden": 4096, "layers": 32, "inner": 12288, "key_value": 4096, "vocab": 126464, "tied": False},
    "Dream-7B": {"hidden": 3584, "layers": 28, "inner": 18944, "key_value": 512, "vocab": 152064, "tied": False},
}
FLOAT = 4
CHUNK_NUMBERS = 2**27  # as prism_pipelines/training/setup.py


def parameters(m: dict, rank: int | None) -> dict[str, int]:
    """Parameters of the base model, the adapter on q, k and v, and an MLP head."""
    layer = 2 * m["hidden"] ** 2 + 2 * m["hidden"] * m["key_value"] + 3 * m["hidden"] * m["inner"] + 2 * m["hidden"]
    base = m["layers"] * layer + m["hidden"] + m["vocab"] * m["hidden"] * (1 if m["tied"] else 2)
    adapter = (rank or 0) * m["layers"] * (4 * m["hidden"] + 2 * m["key_value"])
    return {"base": base, "adapter": adapter, "head": m["hidden"] ** 2 + 4 * m["hidden"] + 1}


def layer_bytes(m: dict, tokens: int, width: int, rank: int | None) -> int:
    """What one Llama layer keeps for its backward pass.

    In the model's dtype: q, k, v after the rotation, the attended values, gate, its activation, up. In float32: the
    input of each norm (a copy if the model is narrower). With an adapter on q, k and v, in float32: its input (a copy
    for each if the model is narrower) and its inner rows. Frozen matrices keep nothing.
    """
    h, kv, inner = m["hidden"], m["key_value"], m["inner"]
    kept = width * (2 * h + 2 * kv + 3 * inner) + FLOAT * 2 * h
    if rank:
        kept += FLOAT * ((1 if width == FLOAT else 3) * h + 3 * rank)
    return tokens * kept


def estimate(
    m: dict, *, batch: int, length: int, drawn: int, width: int, rank: int | None, checkpointing: bool, chunk: int
) -> dict[str, float]:
    """Bytes of one step by purpose; `rank` None is the frozen backbone.

    Args:
        m: as the rows of `MODELS`.
        batch, length: of the clean sequences.
        drawn: tokens drawn in each: k in random order, the window in order of confidence.
        width: bytes of a number of the base model.
        rank: of the adapter.
        checkpointing: of the layers.
        chunk: most rows of logits at once.
    """
    count, tokens = parameters(m, rank), batch * length
    trained = count["adapter"] + count["head"]
    mask = batch * length * length * (width + 1)  # the additive mask, and the booleans that it is made of
    one_layer = layer_bytes(m, tokens, width, rank)
    boundary = tokens * m["hidden"] * width
    if rank is None:
        # No graph: one layer's widest moment (gate, activation, up), and its input and residual.
        kept, widest = 0, tokens * width * (3 * m["inner"] + 2 * m["hidden"])
        logits = FLOAT * 2 * min(chunk, drawn * batch) * m["vocab"]
    else:
        kept = m["layers"] * (boundary if checkpointing else one_layer)
        # Going back through a layer: its kept tensors, and gradients of gate, up and their product.
        widest = (one_layer if checkpointing else 0) + tokens * width * 3 * m["inner"]
        # Masked on average: half; a chunk in the model's dtype and, in float32, itself, its softmax and its gradient.
        rows = min(chunk, tokens // 2)
        logits = rows * m["vocab"] * (width + 3 * FLOAT)
    head = FLOAT * tokens * m["hidden"] * 5  # the head's input in float32, normalised, inner, GELU, a gradient
    parts = {
        "base weights": count["base"] * width,
        "adapter and head": trained * FLOAT,
        "gradients": trained * FLOAT,
        "AdamW": 2 * trained * FLOAT,
        "kept for the backward": kept + mask,
        # The logits of the first forward and the head of the second are never there together.
        "widest moment": max(logits, head, widest) if rank else max(widest, logits, head),
    }
    return parts | {"total": sum(parts.values())}


def check(rank: int | None, checkpointing: bool) -> dict[str, float]:
    """The estimate and the count of a mid-size model, float32, without AdamW (the count is of one step's gradients)."""
    m = {"hidden": 256, "layers": 8, "inner": 768, "key_value": 256, "vocab": 4096, "tied": False}
    sizes = {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 768, "vocab_size": 4096}
    model = llama(sizes | {"num_attention_heads": 4, "num_key_value_heads": 4}, "cpu")
    objective = prism(model, rank=rank, frozen=rank is None)
    if checkpointing:
        objective.activation_checkpointing_enable()
        objective.train()
    ids = torch.randint(0, 4000, (4, 512), generator=torch.Generator().manual_seed(0))
    with PeakMemory(objective) as memory:
        step(objective, ids)
    parts = estimate(m, batch=4, length=512, drawn=8, width=4, rank=rank, checkpointing=checkpointing, chunk=4096)
    return {"estimate": parts["total"] - parts["AdamW"], "counted": memory.peak}


def main(argv=None) -> int:
    """Print the tables."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="count a random model instead")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--out", default=None, help="JSON file to write besides")
    args = parser.parse_args(argv)
    result = []
    if args.check:
        cases = (("LoRA", 16, False), ("LoRA, checkpointing", 16, True), ("frozen", None, False))
        for name, rank, checkpointing in cases:
            row = {"step": name} | check(rank, checkpointing)
            result.append(row | {"ratio": row["estimate"] / row["counted"]})
        rows = [
            [row["step"], *(f"{row[name] / 1e6:.0f}" for name in ("estimate", "counted")), f"{row['ratio']:.2f}"]
            for row in result
        ]
        print(markdown_table(["step", "estimate MB", "counted MB", "ratio"], rows, right=3))
    else:
        for name, m in MODELS.items():
            chunk = max(64, min(4096, CHUNK_NUMBERS // m["vocab"]))
            for rank in (args.rank, None):
                parts = estimate(
                    m,
                    batch=args.batch_size,
                    length=args.max_length,
                    drawn=512,  # --reveal-order confidence --reveal-window 512
                    width=2,
                    rank=rank,
                    checkpointing=True,
                    chunk=chunk,
                )
                kind = f"LoRA, rank {rank}" if rank else "frozen"
                batch, length = args.batch_size, args.max_length
                result.append({"model": name, "trained": kind, "length": length, "batch": batch} | parts)
                print(f"{name}, {kind}, {batch} x {length} tokens, bfloat16, gradient checkpointing: GB")
                print("".join(f"    {part:24}{size / 1e9:6.1f}\n" for part, size in parts.items()), end="")
    return give(result, args.out)


if __name__ == "__main__":
    sys.exit(main())
