"""Loads MDLM checkpoints (the text model of the PRISM paper) as GPT-NeoX: no flash-attention, no remote code.

MDLM's layers are modulated by an embedding of the diffusion time (adaLN). Its released models are trained with that
time fixed at 0, so shift, scale and gate are constants of each layer. They can be folded into its weights exactly:

    norm(x) * w * (1 + scale) + shift    is a layer norm of weight w * (1 + scale) and bias shift
    gate * (A x + b)                     is a linear layer of weight gate * A and bias gate * b
"""

from __future__ import annotations

import re
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

FREQUENCIES = 256  # width of MDLM's sinusoidal embedding of the time
LAYER = r"^backbone\.blocks\.(\d+)\."
# The linear layers of MDLM's own code, by which adapters name them -> GPT-NeoX's.
LAYER_NAMES = {
    LAYER + r"attn_qkv\b": r"gpt_neox.layers.\1.attention.query_key_value",
    LAYER + r"attn_out\b": r"gpt_neox.layers.\1.attention.dense",
    LAYER + r"mlp\.0\b": r"gpt_neox.layers.\1.mlp.dense_h_to_4h",
    LAYER + r"mlp\.2\b": r"gpt_neox.layers.\1.mlp.dense_4h_to_h",
}


def native_model(config: GPTNeoXConfig) -> GPTNeoXForCausalLM:
    """A GPT-NeoX whose output head has a bias, as MDLM's has."""
    model = GPTNeoXForCausalLM(config)
    head = model.get_output_embeddings()
    biased = nn.Linear(head.in_features, head.out_features, bias=True, device=head.weight.device)
    model.set_output_embeddings(biased.to(head.weight.dtype))
    return model


def load_mdlm(files: list[str], config: GPTNeoXConfig, dtype: torch.dtype) -> GPTNeoXForCausalLM:
    """The model of safetensors files: an MDLM checkpoint, or one that this package saved under GPT-NeoX's names.

    Args:
        files: paths of `model.safetensors`, or of its parts.
        config: native config.
        dtype: of the parameters. Folding is done in float32.
    Raises:
        RuntimeError: weights are missing or of another shape.
    """
    weights = {name: value for file in files for name, value in load_file(file).items()}
    model: Any = native_model(config)
    if not any(name.startswith("gpt_neox.") for name in weights):
        weights, model._gates = fold_time(weights, config.num_attention_heads)
    # The head is called lm_head or embed_out, in memory and on disk, depending on the release of transformers.
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    weights = {re.sub(r"^(lm_head|embed_out)\.", f"{head}.", name): value for name, value in weights.items()}
    model.load_state_dict(weights)
    model._computed_weights = True  # rounding of the folding depends on the machine
    return model.to(dtype)


def per_head(rows: Tensor, num_heads: int) -> Tensor:
    """Rows of MDLM's attn_qkv, reordered for GPT-NeoX, which keeps query, key and value of a head together."""
    return rows.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)


def fold_lora(name: str, value: Tensor, model: Any) -> Tensor:
    """Convert a LoRA weight, named as by MDLM's authors, for the same layer of `native_model`.

    The rows of B and the magnitudes of DoRA belong to rows of the layer. So they are reordered and gated as these are.

    Raises:
        ValueError: the model was saved by this package, so that the gates in its weights are not known.
    """
    gates = getattr(model, "_gates", None)
    if gates is None:
        raise ValueError(
            "The adapter names its layers as MDLM's authors do, and the model was saved from this package, with their "
            "gates folded into its weights. Load the adapter into the authors' own checkpoint."
        )
    if ".lora_A." in name:
        return value
    if ".attn_qkv." in name:
        return per_head(value, model.config.num_attention_heads)
    native = next((re.sub(old, new, name) for old, new in LAYER_NAMES.items() if re.search(old, name)), name)
    gate = gates.get(native.split(".lora_")[0])
    if gate is None:
        return value
    # A magnitude is a length. The sign of the gate is in the direction, which is that of the gated weights.
    return gate.abs() * value if "magnitude" in name else gate[:, None] * value


def fold_time(weights: dict[str, Tensor], num_heads: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of an MDLM checkpoint as those of `native_model`, in float32.

    Args:
        weights: state dict under the checkpoint's own names (`backbone.blocks.0.attn_qkv.weight`, ...).
        num_heads: attention heads.
    Returns:
        state dict under GPT-NeoX's names, and the gates of the layers that have one, (H,) each.
    Raises:
        KeyError: a weight is missing.
    Source: modeling_mdlm.py of kuleshov-group/mdlm-owt (arXiv 2406.07524).
    """
    old = {name.removeprefix("backbone."): value.float() for name, value in weights.items()}
    width = old["vocab_embed.embedding"].shape[1]
    modulated = any("adaLN_modulation" in name for name in old)
    if modulated:
        # The embedding of time 0: cos 0 = 1, sin 0 = 0.
        time = torch.cat([torch.ones(FREQUENCIES // 2), torch.zeros(FREQUENCIES // 2)])
        time = old["sigma_map.mlp.0.weight"] @ time + old["sigma_map.mlp.0.bias"]
        time = silu(old["sigma_map.mlp.2.weight"] @ silu(time) + old["sigma_map.mlp.2.bias"])

    def modulation(place: str, parts: int) -> tuple[Tensor, ...]:
        if not modulated:  # BD3-LM with adaln=False: shift 0, scale 0, gate 1
            return ((torch.zeros(width), torch.zeros(width), torch.ones(width)) * 2)[:parts]
        constants = old[f"{place}.adaLN_modulation.weight"] @ time + old[f"{place}.adaLN_modulation.bias"]
        return constants.chunk(parts)

    new, layer = {"gpt_neox.embed_in.weight": old["vocab_embed.embedding"]}, 0
    gates: dict[str, Tensor] = {}
    while f"blocks.{layer}.norm1.weight" in old:
        block, native = f"blocks.{layer}", f"gpt_neox.layers.{layer}"
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(block, 6)
        new[f"{native}.input_layernorm.weight"] = old[f"{block}.norm1.weight"] * (1 + scale)
        new[f"{native}.input_layernorm.bias"] = shift
        new[f"{native}.attention.query_key_value.weight"] = per_head(old[f"{block}.attn_qkv.weight"], num_heads)
        gates |= {f"{native}.attention.dense": gate, f"{native}.mlp.dense_4h_to_h": gate_mlp}
        new[f"{native}.attention.dense.weight"] = gate[:, None] * old[f"{block}.attn_out.weight"]
        new[f"{native}.post_attention_layernorm.weight"] = old[f"{block}.norm2.weight"] * (1 + scale_mlp)
        new[f"{native}.post_attention_layernorm.bias"] = shift_mlp
        new[f"{native}.mlp.dense_h_to_4h.weight"] = old[f"{block}.mlp.0.weight"]
        new[f"{native}.mlp.dense_h_to_4h.bias"] = old[f"{block}.mlp.0.bias"]
        new[f"{native}.mlp.dense_4h_to_h.weight"] = gate_mlp[:, None] * old[f"{block}.mlp.2.weight"]
        new[f"{native}.mlp.dense_4h_to_h.bias"] = gate_mlp * old[f"{block}.mlp.2.bias"]
        layer += 1
    shift, scale = modulation("output_layer", 2)
    new["gpt_neox.final_layer_norm.weight"] = old["output_layer.norm_final.weight"] * (1 + scale)
    new["gpt_neox.final_layer_norm.bias"] = shift
    new["lm_head.weight"] = old["output_layer.linear.weight"]
    new["lm_head.bias"] = old["output_layer.linear.bias"]
    return new, gates
