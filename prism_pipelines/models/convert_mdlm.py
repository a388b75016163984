"""MDLM checkpoints (the text model of the PRISM paper) as a native GPT-NeoX: no flash-attention, no remote code.

MDLM's layers are modulated by an embedding of the diffusion time (adaLN), and its released models are trained with that
time held at 0. Shift, scale and gate are then constants of each layer, and go into its weights without any loss:

    norm(x) * w * (1 + scale) + shift    is a layer norm of weight w * (1 + scale) and bias shift
    gate * (A x + b)                     is a linear layer of weight gate * A and bias gate * b
"""

from __future__ import annotations

import re

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

FREQUENCIES = 256  # width of MDLM's sinusoidal embedding of the time


def native_model(config: GPTNeoXConfig) -> GPTNeoXForCausalLM:
    """A GPT-NeoX whose output head has a bias, as MDLM's has."""
    model = GPTNeoXForCausalLM(config)
    head = model.get_output_embeddings()
    biased = nn.Linear(head.in_features, head.out_features, bias=True, device=head.weight.device)
    model.set_output_embeddings(biased.to(head.weight.dtype))
    return model


def load_mdlm(files: list[str], config: GPTNeoXConfig, dtype: torch.dtype) -> GPTNeoXForCausalLM:
    """The model of safetensors files: an MDLM checkpoint, or one saved from here under GPT-NeoX's names.

    Args:
        files: paths of `model.safetensors`, or of its parts.
        config: native config.
        dtype: of the parameters. Folding is done in float32.
    Raises:
        RuntimeError: weights are missing or of another shape.
    """
    weights = {name: value for file in files for name, value in load_file(file).items()}
    if not any(name.startswith("gpt_neox.") for name in weights):
        weights = fold_time(weights, config.num_attention_heads)
    model = native_model(config)
    # The head is called lm_head or embed_out: it depends on the release of transformers, in memory and on disk.
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    weights = {re.sub(r"^(lm_head|embed_out)\.", f"{head}.", name): value for name, value in weights.items()}
    model.load_state_dict(weights)
    model._computed_weights = True  # rounding of the folding depends on the machine
    return model.to(dtype)


def fold_time(weights: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Weights of an MDLM checkpoint as those of `native_model`, in float32.

    Args:
        weights: state dict under the checkpoint's own names (`backbone.blocks.0.attn_qkv.weight`, ...).
        num_heads: attention heads.
    Returns:
        state dict under GPT-NeoX's names.
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

    new = {"gpt_neox.embed_in.weight": old["vocab_embed.embedding"]}
    layer = 0
    while f"blocks.{layer}.norm1.weight" in old:
        block, native = f"blocks.{layer}", f"gpt_neox.layers.{layer}"
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(block, 6)
        new[f"{native}.input_layernorm.weight"] = old[f"{block}.norm1.weight"] * (1 + scale)
        new[f"{native}.input_layernorm.bias"] = shift
        # MDLM packs all queries, all keys, all values; GPT-NeoX packs query, key, value of each head.
        qkv = old[f"{block}.attn_qkv.weight"]
        qkv = qkv.view(3, num_heads, width // num_heads, width).transpose(0, 1).reshape(3 * width, width)
        new[f"{native}.attention.query_key_value.weight"] = qkv
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
    return new
