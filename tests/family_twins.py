"""Tiny random twins of every family: a checkpoint as its authors saved it, and its logits in plain torch.

Biases and norms are random too, or a forgotten one would not be seen. The twins have no tokenizer.
"""

import copy
import json
import math
import re
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, layer_norm, silu

from prism_pipelines import MDLMScheduler, PrismPipeline

V, H, LAYERS, HEADS, INNER = 40, 32, 2, 4, 48  # a tiny model of H hidden numbers
MASK, PAD, EOS, BAD = 39, 1, 2, 7  # the mask is the last id, as in MDLM
LENGTH = 40  # more than one block of every block-causal family
ROOT = tempfile.TemporaryDirectory(prefix="twins-")
WRITTEN = set()  # the folders of `checkpoint`


# --- twins: a checkpoint as its authors saved it ----------------------------------------------------------------------


class Words:
    """What `build_objective` asks a tokenizer."""

    eos_token_id, pad_token_id = EOS, PAD

    def __len__(self):
        return V


def random_weights(shapes):
    """Weights about 1 for norms, and random otherwise; biases are random too, or a forgotten one would not be seen.

    A norm is known by "norm", "LayerNorm" or "ln_" in its name. A matrix is divided by the root of its inputs, but not
    with "embed" or "wte" in its name.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if re.search(r"norm|LayerNorm|ln_", name) and not name.endswith("bias"):
            value = 1 + 0.2 * value
        elif len(shape) == 2 and "embed" not in name and "wte" not in name:
            value = value / math.sqrt(shape[1])
        else:
            value = 0.5 * value
        weights[name] = value
    return weights


def write(folder, config, weights):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_llada(folder):
    """LLaDA's own names: wte, blocks, attn_out, ff_proj (gate), up_proj, ff_out; a config of d_model, n_layers, ..."""
    config = {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "activation_type": "silu", "alibi": False,
        "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM", "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
        "block_type": "llama", "d_model": H, "embedding_size": V, "eos_token_id": EOS, "include_bias": False,
        "include_qkv_bias": False, "init_device": "meta", "layer_norm_type": "rms", "mask_token_id": MASK,
        "max_sequence_length": 96, "mlp_hidden_size": INNER, "mlp_ratio": 4, "n_heads": HEADS, "n_kv_heads": HEADS,
        "n_layers": LAYERS, "pad_token_id": PAD, "rms_norm_eps": 1e-5, "rope": True, "rope_theta": 500000.0,
        "scale_logits": False, "use_cache": False, "vocab_size": V, "weight_tying": False,
    }  # fmt: skip
    start = "model.transformer"
    shapes = {f"{start}.wte.weight": (V, H), f"{start}.ln_f.weight": (H,), f"{start}.ff_out.weight": (V, H)}
    for i in range(LAYERS):
        block = f"{start}.blocks.{i}"
        shapes |= {f"{block}.{name}.weight": (H,) for name in ("attn_norm", "ff_norm")}
        shapes |= {f"{block}.{name}.weight": (H, H) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        shapes |= {f"{block}.{name}.weight": (INNER, H) for name in ("ff_proj", "up_proj")}
        shapes |= {f"{block}.ff_out.weight": (H, INNER)}
    return write(folder, config, random_weights(shapes))


def save_qwen(folder, model_type, tied, biases, qk_norm, **more):
    """Qwen's names under the model type of those who made it a diffusion model; grouped queries, wide heads."""
    wide, kv_heads = 10, 2
    config = {
        "model_type": model_type, "architectures": ["Model"], "auto_map": {"AutoModel": "modeling.Model"},
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": EOS, "eos_token_id": EOS,
        "hidden_act": "silu", "hidden_size": H, "initializer_range": 0.02, "intermediate_size": INNER,
        "max_position_embeddings": 96, "max_window_layers": LAYERS, "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS, "num_key_value_heads": kv_heads, "pad_token_id": PAD, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": tied,
        "transformers_version": "4.46.2", "use_cache": True, "use_sliding_window": False, "vocab_size": V,
    } | more  # fmt: skip
    if qk_norm:
        config["head_dim"] = wide
    else:
        wide = H // HEADS
        config["mask_token_id"] = MASK
    shapes = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
    shapes |= {} if tied else {"lm_head.weight": (V, H)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{name}_layernorm.weight": (H,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (H, HEADS * wide)}
        for name, rows in (("q", HEADS * wide), ("k", kv_heads * wide), ("v", kv_heads * wide)):
            shapes |= {f"{layer}.self_attn.{name}_proj.weight": (rows, H)}
            shapes |= {f"{layer}.self_attn.{name}_proj.bias": (rows,)} if biases else {}
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (wide,) for name in "qk"} if qk_norm else {}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (INNER, H) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (H, INNER)}
    return write(folder, config, random_weights(shapes))


def save_illada(folder):
    """iLLaDA: Llama's names, tied embeddings, and a config that has no word for the mask."""
    save_qwen(folder, "illada", tied=True, biases=False, qk_norm=False)
    config = json.loads((folder / "config.json").read_text())
    del config["mask_token_id"]
    config |= {"architectures": ["ILLaDAForCausalLM"], "layer_norm_eps": None, "mlp_bias": False, "resid_pdrop": 0.0}
    return write(folder, config, load_file(folder / "model.safetensors"))


EXPERTS, CHOSEN, EXPERT_INNER = 6, 2, 24


def save_sdar_moe(folder):
    """SDAR-MoE: Qwen3-MoE's names; the shares of the chosen experts sum to 1."""
    more = {
        "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": EXPERT_INNER, "norm_topk_prob": True,
        "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "output_router_logits": False,
    }  # fmt: skip
    save_qwen(folder, "sdar_moe", tied=False, biases=False, qk_norm=True, **more)
    shapes = {name: value.shape for name, value in load_file(folder / "model.safetensors").items() if "mlp" not in name}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.mlp.gate.weight": (EXPERTS, H)} | experts(f"model.layers.{i}.mlp.experts")
    return write(folder, json.loads((folder / "config.json").read_text()), random_weights(shapes))


def save_llada_moe(folder):
    """LLaDA-MoE: attention of Qwen3 with one norm for all heads, a softmax over experts that is not renormalised."""
    config = {
        "model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "clip_qkv": None,
        "auto_map": {"AutoModel": "modeling_lladamoe.LLaDAMoEModelLM"}, "dense_intermediate_size": 4 * INNER,
        "eos_token_id": EOS, "expert_intermediate_size": EXPERT_INNER, "hidden_act": "silu", "hidden_size": H,
        "max_position_embeddings": 96, "moe_layer_freq": [1] * LAYERS, "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax", "norm_topk_prob": None, "num_attention_heads": HEADS,
        "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS, "pad_token_id": PAD, "partial_rotary_factor": 1, "qk_layernorm": True,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 50000, "router_aux_loss_coef": 0.01,
        "shared_expert_intermediate_size": None, "tie_word_embeddings": False, "use_cache": False, "vocab_size": V,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,), "lm_head.weight": (V, H)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{name}_layernorm.weight": (H,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (H, H) for name in "qkvo"}
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (H // HEADS,) for name in "qk"}
        shapes |= {f"{layer}.mlp.gate.weight": (EXPERTS, H)} | experts(f"{layer}.mlp.experts")
    return write(folder, config, random_weights(shapes))


def experts(start):
    """Shapes of a list of gated networks."""
    each = {"gate_proj": (EXPERT_INNER, H), "up_proj": (EXPERT_INNER, H), "down_proj": (H, EXPERT_INNER)}
    return {f"{start}.{e}.{name}.weight": shape for e in range(EXPERTS) for name, shape in each.items()}


def save_llada2(folder):
    """LLaDA2: queries, keys and values in one weight, rotary positions on half of a head, experts in groups that a
    sigmoid and a bias choose, one shared expert, and a first layer without experts."""
    wide, kv_heads = 12, 2
    config = {
        "model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "attention_dropout": 0.0,
        "auto_map": {"AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"}, "embedding_dropout": 0.0,
        "eos_token_id": EOS, "first_k_dense_replace": 1, "head_dim": wide, "hidden_act": "silu", "hidden_size": H,
        "initializer_range": 0.02, "intermediate_size": INNER, "max_position_embeddings": 96, "max_window_layers": 28,
        "moe_intermediate_size": EXPERT_INNER, "moe_router_enable_expert_bias": True, "n_group": 2, "norm_head": False,
        "norm_topk_prob": True, "num_attention_heads": HEADS, "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN,
        "num_hidden_layers": LAYERS, "num_key_value_heads": kv_heads, "num_shared_experts": 1, "output_dropout": 0.0,
        "pad_token_id": PAD, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 600000, "routed_scaling_factor": 2.5, "score_function": "sigmoid", "sliding_window": 4096,
        "tie_word_embeddings": False, "topk_group": 1, "use_bias": False, "use_cache": False, "use_qk_norm": True,
        "use_qkv_bias": False, "use_sliding_window": False, "vocab_size": V,
    }  # fmt: skip
    shapes = {"model.word_embeddings.weight": (V, H), "model.norm.weight": (H,), "lm_head.weight": (V, H)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{name}_layernorm.weight": (H,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.attention.query_key_value.weight": ((HEADS + 2 * kv_heads) * wide, H)}
        shapes |= {f"{layer}.attention.{name}_layernorm.weight": (wide,) for name in ("query", "key")}
        shapes |= {f"{layer}.attention.dense.weight": (H, HEADS * wide)}
        if i < config["first_k_dense_replace"]:
            shapes |= {f"{layer}.mlp.{name}_proj.weight": (INNER, H) for name in ("gate", "up")}
            shapes |= {f"{layer}.mlp.down_proj.weight": (H, INNER)}
            continue
        shapes |= {f"{layer}.mlp.gate.weight": (EXPERTS, H), f"{layer}.mlp.gate.expert_bias": (EXPERTS,)}
        shapes |= experts(f"{layer}.mlp.experts")
        shapes |= {f"{layer}.mlp.shared_experts.{name}_proj.weight": (EXPERT_INNER, H) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.shared_experts.down_proj.weight": (H, EXPERT_INNER)}
    return write(folder, config, random_weights(shapes))


def save_diffullama(folder):
    """A Llama whose embeddings a wrapper took out: denoise_model.layers.*, embed_tokens, lm_head."""
    save_qwen(folder, "llama", tied=False, biases=False, qk_norm=False)
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.embed_tokens.", "embed_tokens."): value for name, value in weights.items()}
    renamed = {re.sub(r"^model\.", "denoise_model.", name): value for name, value in renamed.items()}
    return write(folder, json.loads((folder / "config.json").read_text()), renamed)


def save_diffugpt(folder):
    """A GPT-2 out of the same wrapper; the config still has the vocabulary of before the mask was added."""
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "bos_token_id": EOS, "eos_token_id": EOS, "layer_norm_epsilon": 1e-5, "n_ctx": 96, "n_embd": H,
        "n_head": HEADS, "n_layer": LAYERS, "n_positions": 96, "vocab_size": V - 3,
    }  # fmt: skip
    shapes = {"embed_tokens.weight": (V, H), "denoise_model.wpe.weight": (96, H)}
    shapes |= {"denoise_model.ln_f.weight": (H,), "denoise_model.ln_f.bias": (H,)}
    for i in range(LAYERS):
        block = f"denoise_model.h.{i}"
        shapes |= {f"{block}.{name}.{kind}": (H,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        for name, shape in {
            "attn.c_attn": (H, 3 * H), "attn.c_proj": (H, H), "mlp.c_fc": (H, 4 * H), "mlp.c_proj": (4 * H, H),
        }.items():  # fmt: skip
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[1:]}
    return write(folder, config, random_weights(shapes))


def save_esm(folder):
    """ESM-2 and DPLM as transformers 4 wrote them: rotary frequencies in each layer, a bias beside the decoder."""
    config = {
        "model_type": "esm", "architectures": ["EsmForDPLM"], "dplm_type": "dplm_esm",
        "attention_probs_dropout_prob": 0.0, "emb_layer_norm_before": False, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": H, "initializer_range": 0.02, "intermediate_size": INNER,
        "is_folding_model": False, "layer_norm_eps": 1e-5, "mask_token_id": MASK, "max_position_embeddings": 98,
        "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "pad_token_id": PAD,
        "position_embedding_type": "rotary", "token_dropout": True, "use_cache": True, "vocab_size": V,
    }  # fmt: skip
    shapes = {"esm.embeddings.word_embeddings.weight": (V, H), "lm_head.bias": (V,)}
    shapes |= {"esm.contact_head.regression.weight": (1, LAYERS * HEADS), "esm.contact_head.regression.bias": (1,)}
    square = ["lm_head.dense"]
    norms = ["lm_head.layer_norm", "esm.encoder.emb_layer_norm_after"]
    for i in range(LAYERS):
        layer = f"esm.encoder.layer.{i}"
        norms += [f"{layer}.attention.LayerNorm", f"{layer}.LayerNorm"]
        square += [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")]
        square += [f"{layer}.attention.output.dense"]
        shapes |= {f"{layer}.intermediate.dense.weight": (INNER, H), f"{layer}.intermediate.dense.bias": (INNER,)}
        shapes |= {f"{layer}.output.dense.weight": (H, INNER), f"{layer}.output.dense.bias": (H,)}
    shapes |= {f"{name}.weight": (H, H) for name in square} | {f"{name}.bias": (H,) for name in square}
    shapes |= {f"{name}.weight": (H,) for name in norms} | {f"{name}.bias": (H,) for name in norms}
    weights = random_weights(shapes)
    wide = H // HEADS
    for i in range(LAYERS):
        name = f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"
        weights[name] = 1 / 10000 ** (torch.arange(0, wide, 2) / wide)
    weights["esm.embeddings.position_ids"] = torch.arange(98)[None]
    weights["lm_head.decoder.weight"] = weights["esm.embeddings.word_embeddings.weight"].clone()
    return write(folder, config, weights)


def save_dsm(folder, model_type):
    """DSM: ESM-2's body, and an output head of its own whose bias is in the decoder."""
    save_esm(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["dplm_type"]
    config |= {"model_type": model_type, "architectures": ["DSM"], "tie_word_embeddings": False, "num_at_layers": 1}
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.decoder.bias"] = weights.pop("lm_head.bias")
    return write(folder, config, weights)


def save_mdlm(folder, vocab=V, **more):
    """MDLM's DiT: an embedding of time modulates each norm and gates each branch (adaLN). BD3-LM's has blocks."""
    config = {
        "model_type": "mdlm", "architectures": ["MDLM"], "cond_dim": 16, "dropout": 0.1, "hidden_dim": H,
        "auto_map": {"AutoConfig": "configuration_mdlm.MDLMConfig", "AutoModelForMaskedLM": "modeling_mdlm.MDLM"},
        "model_length": 96, "n_blocks": LAYERS, "n_heads": HEADS, "return_dict": False, "time_conditioning": False,
        "torch_dtype": "float32", "transformers_version": "4.38.2", "vocab_size": vocab,
    } | more  # fmt: skip
    shapes = {
        "backbone.vocab_embed.embedding": (vocab, H),
        "backbone.sigma_map.mlp.0.weight": (16, 256),
        "backbone.sigma_map.mlp.0.bias": (16,),
        "backbone.sigma_map.mlp.2.weight": (16, 16),
        "backbone.sigma_map.mlp.2.bias": (16,),
        "backbone.rotary_emb.inv_freq": (H // HEADS // 2,),
    }
    for i in range(LAYERS):
        block = f"backbone.blocks.{i}"
        shapes |= {f"{block}.norm1.weight": (H,), f"{block}.norm2.weight": (H,)}
        shapes |= {f"{block}.attn_qkv.weight": (3 * H, H), f"{block}.attn_out.weight": (H, H)}
        shapes |= {f"{block}.mlp.0.weight": (4 * H, H), f"{block}.mlp.0.bias": (4 * H,)}
        shapes |= {f"{block}.mlp.2.weight": (H, 4 * H), f"{block}.mlp.2.bias": (H,)}
        shapes |= {f"{block}.adaLN_modulation.weight": (6 * H, 16), f"{block}.adaLN_modulation.bias": (6 * H,)}
    last = "backbone.output_layer"
    shapes |= {f"{last}.norm_final.weight": (H,), f"{last}.linear.weight": (vocab, H), f"{last}.linear.bias": (vocab,)}
    shapes |= {f"{last}.adaLN_modulation.weight": (2 * H, 16), f"{last}.adaLN_modulation.bias": (2 * H,)}
    weights = random_weights(shapes)
    wide = H // HEADS
    weights["backbone.rotary_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, wide, 2) / wide)
    return write(folder, config, weights)


ENCODERS = {
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {}),
    "roberta-prelayernorm": ("RobertaPreLayerNorm", {}),
    "xlm-roberta": ("XLMRoberta", {}),
    "xlm-roberta-xl": ("XLMRobertaXL", {}),
    "camembert": ("Camembert", {}),
    "roformer": ("RoFormer", {}),
    "electra": ("Electra", {"embedding_size": H}),
    "ernie": ("Ernie", {}),
    "nomic_bert": ("NomicBert", {}),
    "gte": ("Gte", {}),
    "esmc": ("Esmc", {}),
    "modernbert": ("ModernBert", {"local_attention": 8, "cls_token_id": None, "sep_token_id": None}),
    "eurobert": ("EuroBert", {"head_dim": 8, "num_key_value_heads": 2}),
    "deberta-v2": (
        "DebertaV2",
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_buckets": 8,
            "type_vocab_size": 0,
        },
    ),
}


def save_encoder(folder, family):
    name, more = ENCODERS[family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=V, hidden_size=H, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=INNER,
        max_position_embeddings=98, pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS, **more,
    )  # fmt: skip
    config.mask_token_id = MASK
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForMaskedLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:  # RoFormer's rotary angles
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for name, parameter in model.named_parameters():
            if "position_embeddings" in name:
                parameter.mul_(0.3)  # a token tells more than its position, as in a trained model
    model.save_pretrained(folder)
    return folder


# --- references: plain torch, from the file and its own names ---------------------------------------------------------


def rotate(x, theta):
    """Rotary embedding of (B, heads, L, D) by the angles of position p: p * theta ** (-2 i / D), halves paired."""
    wide = x.shape[-1]
    angle = torch.arange(x.shape[-2])[:, None] / theta ** (torch.arange(0, wide, 2) / wide)
    first, second = x[..., : wide // 2], x[..., wide // 2 :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(q, k, v, seen):
    """Attention of (B, heads, L, D) where `seen` (L, L) says which query sees which key."""
    score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return score.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def rms(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


LLADA_WORDS = {
    "embed": "model.transformer.wte", "norm": "model.transformer.ln_f", "head": "model.transformer.ff_out",
    "layer": "model.transformer.blocks.{}", "norm1": "attn_norm", "norm2": "ff_norm", "q": "q_proj", "k": "k_proj",
    "v": "v_proj", "out": "attn_out", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
}  # fmt: skip
QWEN_WORDS = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "layer": "model.layers.{}",
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
    "v": "self_attn.v_proj", "out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}  # fmt: skip


DIFFULLAMA_WORDS = QWEN_WORDS | {
    "embed": "embed_tokens", "norm": "denoise_model.norm", "layer": "denoise_model.layers.{}",
}  # fmt: skip


def gated_transformer(weights, words, ids, seen, theta, eps):
    """Logits (B, L, V) of a pre-norm transformer with rotary positions and a gated SiLU network (LLaDA, Qwen)."""

    def linear(x, name):
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    x = weights[f"{words['embed']}.weight"][ids]
    for i in range(LAYERS):
        layer = words["layer"].format(i)
        y = rms(x, weights[f"{layer}.{words['norm1']}.weight"], eps)
        wide = weights[f"{layer}.{words['out']}.weight"].shape[1] // HEADS
        q, k, v = (
            linear(y, f"{layer}.{words[name]}").unflatten(-1, (-1, wide)).transpose(1, 2) for name in ("q", "k", "v")
        )
        if f"{layer}.self_attn.q_norm.weight" in weights:
            q = rms(q, weights[f"{layer}.self_attn.q_norm.weight"], eps)
            k = rms(k, weights[f"{layer}.self_attn.k_norm.weight"], eps)
        q, k = rotate(q, theta), rotate(k, theta)
        k, v = (t.repeat_interleave(HEADS // t.shape[1], dim=1) for t in (k, v))
        x = x + linear(attend(q, k, v, seen).transpose(1, 2).flatten(-2), f"{layer}.{words['out']}")
        y = rms(x, weights[f"{layer}.{words['norm2']}.weight"], eps)
        if f"{layer}.mlp.gate.weight" in weights:
            share = linear(y, f"{layer}.mlp.gate").softmax(-1)
            share = share * keep_highest(share, CHOSEN)
            x = x + expert_mixture(y, weights, f"{layer}.mlp", share / share.sum(-1, keepdim=True))
            continue
        inner = silu(linear(y, f"{layer}.{words['gate']}")) * linear(y, f"{layer}.{words['up']}")
        x = x + linear(inner, f"{layer}.{words['down']}")
    x = rms(x, weights[f"{words['norm']}.weight"], eps)
    head = f"{words['head']}.weight"
    return x @ weights[head if head in weights else f"{words['embed']}.weight"].T


def expert_mixture(x, weights, start, share):
    """Networks of `start`.experts on (B, L, H), weighted by `share` (B, L, experts), which is 0 where not chosen."""
    total = torch.zeros_like(x)
    for e in range(EXPERTS):
        gate, up, down = (weights[f"{start}.experts.{e}.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        total = total + share[..., e : e + 1] * ((silu(x @ gate) * (x @ up)) @ down)
    return total


def keep_highest(scores, count):
    """Which of the last dimension are among the `count` highest, by sorting in Python."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for row, flags in zip(scores.reshape(-1, scores.shape[-1]), kept.view(-1, scores.shape[-1]), strict=True):
        flags[sorted(range(len(row)), key=lambda e: -float(row[e]))[:count]] = True
    return kept


def moe_reference(weights, ids, seen, llada2):
    """Logits of LLaDA-MoE or LLaDA2 (modeling_lladamoe.py, modeling_llada2_moe.py)."""
    attention = "attention" if llada2 else "self_attn"
    eps, theta = (1e-6, 6e5) if llada2 else (1e-5, 5e4)
    x = weights["model.word_embeddings.weight" if llada2 else "model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        layer, start = f"model.layers.{i}", f"model.layers.{i}.{attention}"
        y = rms(x, weights[f"{layer}.input_layernorm.weight"], eps)
        if llada2:
            wide = weights[f"{start}.query_layernorm.weight"].shape[0]
            heads = (y @ weights[f"{start}.query_key_value.weight"].T).unflatten(-1, (-1, wide)).transpose(1, 2)
            q, k, v = heads[:, :HEADS], heads[:, HEADS : HEADS + 2], heads[:, HEADS + 2 :]
            k, v = (t.repeat_interleave(HEADS // 2, dim=1) for t in (k, v))
            norms, out, turned = ("query_layernorm", "key_layernorm"), "dense", wide // 2
        else:
            q, k, v = ((y @ weights[f"{start}.{n}_proj.weight"].T).unflatten(-1, (HEADS, -1)) for n in "qkv")
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            norms, out, turned = ("q_norm", "k_norm"), "o_proj", q.shape[-1]
        q, k = (rms(t, weights[f"{start}.{name}.weight"], eps) for t, name in zip((q, k), norms, strict=True))
        q, k = (torch.cat([rotate(t[..., :turned], theta), t[..., turned:]], dim=-1) for t in (q, k))
        x = x + attend(q, k, v, seen).transpose(1, 2).flatten(-2) @ weights[f"{start}.{out}.weight"].T
        y, mlp = rms(x, weights[f"{layer}.post_attention_layernorm.weight"], eps), f"{layer}.mlp"
        if f"{mlp}.gate.weight" not in weights:
            gate, up, down = (weights[f"{mlp}.{name}_proj.weight"].T for name in ("gate", "up", "down"))
            x = x + (silu(y @ gate) * (y @ up)) @ down
            continue
        score = y @ weights[f"{mlp}.gate.weight"].T
        if not llada2:
            share = score.softmax(-1)
            x = x + expert_mixture(y, weights, mlp, share * keep_highest(share, CHOSEN))
            continue
        share = score.sigmoid()
        rank = share + weights[f"{mlp}.gate.expert_bias"]
        groups = rank.unflatten(
            -1, (2, -1)
        )  # of two groups of three, that with the larger sum of its best two takes part
        best = (groups * keep_highest(groups, 2)).sum(-1)
        best = keep_highest(best, 1).repeat_interleave(EXPERTS // 2, dim=-1)
        share = share * keep_highest(rank.masked_fill(~best, -torch.inf), CHOSEN)
        share = 2.5 * share / share.sum(-1, keepdim=True)
        gate, up, down = (weights[f"{mlp}.shared_experts.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        x = x + expert_mixture(y, weights, mlp, share) + (silu(y @ gate) * (y @ up)) @ down
    return rms(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def gpt2_reference(weights, ids, seen):
    """Logits of GPT-2 (learned positions, tanh GELU, weights stored input by output) where all may see all."""
    w = {name.removeprefix("denoise_model."): value for name, value in weights.items()}

    def norm(x, name):
        return layer_norm(x, [H], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embed_tokens.weight"][ids] + w["wpe.weight"][: ids.shape[1]]
    for i in range(LAYERS):
        q, k, v = (
            linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        )
        x = x + linear(attend(q, k, v, seen).transpose(1, 2).flatten(-2), f"h.{i}.attn.c_proj")
        y = gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["embed_tokens.weight"].T


def esm_reference(weights, ids):
    """Logits of ESM-2: masked embeddings are zero and the others scaled by the share of masks (token dropout)."""

    def norm(x, name):
        return layer_norm(x, [H], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    masked = ids == MASK
    x = weights["esm.embeddings.word_embeddings.weight"][ids] * ~masked[..., None]
    x = x * (1 - 0.15 * 0.8) / (1 - masked.float().mean(-1))[:, None, None]
    everything = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)
    for i in range(LAYERS):
        layer = f"esm.encoder.layer.{i}"
        y = norm(x, f"{layer}.attention.LayerNorm")
        q, k, v = (
            linear(y, f"{layer}.attention.self.{name}").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        y = attend(rotate(q, 10000), rotate(k, 10000), v, everything).transpose(1, 2).flatten(-2)
        x = x + linear(y, f"{layer}.attention.output.dense")
        y = gelu(linear(norm(x, f"{layer}.LayerNorm"), f"{layer}.intermediate.dense"))
        x = x + linear(y, f"{layer}.output.dense")
    x = norm(x, "esm.encoder.emb_layer_norm_after")
    x = norm(gelu(linear(x, "lm_head.dense")), "lm_head.layer_norm")
    if "lm_head.bias" in weights:
        return x @ weights["lm_head.decoder.weight"].T + weights["lm_head.bias"]
    return 30 * torch.tanh(linear(x, "lm_head.decoder") / 30)  # DSM


def mdlm_reference(weights, ids, seen):
    """Logits of MDLM and BD3-LM at time 0, the modulation written out (arXiv 2406.07524, modeling_mdlm.py)."""
    w = {name.removeprefix("backbone."): value for name, value in weights.items()}

    def linear(x, name):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    time = torch.zeros(len(ids))
    angle = time[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = torch.cat([angle.cos(), angle.sin()], dim=-1)
    c = silu(linear(silu(linear(time, "sigma_map.mlp.0")), "sigma_map.mlp.2"))
    x = w["vocab_embed.embedding"][ids]
    for i in range(LAYERS):
        b = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(c, f"{b}.adaLN_modulation")[:, None].chunk(6, dim=-1)
        y = layer_norm(x, [H]) * w[f"{b}.norm1.weight"] * (1 + scale1) + shift1
        q, k, v = linear(y, f"{b}.attn_qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = attend(rotate(q, 10000), rotate(k, 10000), v, seen).transpose(1, 2).flatten(-2)
        x = x + gate1 * linear(y, f"{b}.attn_out")
        y = layer_norm(x, [H]) * w[f"{b}.norm2.weight"] * (1 + scale2) + shift2
        x = x + gate2 * linear(gelu(linear(y, f"{b}.mlp.0"), approximate="tanh"), f"{b}.mlp.2")
    shift, scale = linear(c, "output_layer.adaLN_modulation")[:, None].chunk(2, dim=-1)
    x = layer_norm(x, [H]) * w["output_layer.norm_final.weight"] * (1 + scale) + shift
    return linear(x, "output_layer.linear")


def seen_by_blocks(length, block):
    return torch.tensor([[k // block <= q // block for k in range(length)] for q in range(length)])


def qwen(model_type, tied=False, biases=False, qk_norm=False, **more):
    return lambda folder: save_qwen(folder, model_type, tied, biases, qk_norm, **more)


# family, a key of FAMILIES -> (save, block length or None, shift of the logits). `reference` must know it too.
CHECKPOINTS = {
    "llada": (save_llada, None, 0),
    "llada:moe": (save_llada_moe, None, 0),
    "illada": (save_illada, None, 0),
    "llada2_moe": (save_llada2, 32, 0),
    "llada2_moe:llada2.2": (save_llada2, 32, 0),
    "Dream": (qwen("Dream", biases=True), None, 1),
    "Dream:reasoner": (qwen("Dream", qk_norm=True, block_size=32, mask_token_id=MASK), 32, 0),
    "a2d-qwen3": (qwen("a2d-qwen3", tied=True, qk_norm=True), None, 0),
    "a2d-qwen3:bd3lm": (qwen("a2d-qwen3", tied=True, qk_norm=True), 32, 0),
    "a2d-qwen2": (qwen("a2d-qwen2", tied=True, biases=True), None, 0),
    "a2d-qwen2:bd3lm": (qwen("a2d-qwen2", tied=True, biases=True), 32, 0),
    "a2d-llama": (qwen("a2d-llama"), None, 0),
    "sdar": (qwen("sdar", qk_norm=True), 4, 0),
    "sdar_moe": (save_sdar_moe, 4, 0),
    "llama:diffcoder": (qwen("llama", architectures=["StableDiffcoderForCausalLM"]), 4, 0),
    "Fast_dLLM_Qwen": (qwen("Fast_dLLM_Qwen", tied=True, biases=True, bd_size=8), 8, 1),
    "llama:diffullama": (save_diffullama, None, 1),
    "gpt2:diffugpt": (save_diffugpt, None, 1),
    "gpt2:diffugpt-m": (save_diffugpt, None, 1),
    "mdlm": (save_mdlm, None, 0),
    "bd3lm": (lambda folder: save_mdlm(folder, model_type="bd3lm", cross_attn=True, block_size=8), 8, 0),
    "esm": (save_esm, None, 0),
    "dsm": (lambda folder: save_dsm(folder, "dsm"), None, 0),
    "esm_diff": (lambda folder: save_dsm(folder, "esm_diff"), None, 0),
    **{family: (lambda folder, f=family: save_encoder(folder, f), None, 0) for family in ENCODERS},
}
SHIFTED = [family for family, (_, _, shift) in CHECKPOINTS.items() if shift]
SOME = ("llada", "Dream", "sdar", "mdlm", "bert")  # key-mapped, shifted, block-causal, folded, an encoder
# Every family, for laws of code that is the same for each: `make test` holds SOME to them, `make test-slow` the others.
EVERY = [pytest.param(family, marks=() if family in SOME else pytest.mark.slow) for family in CHECKPOINTS]
BLOCK_CAUSAL = [family for family, (_, block, _) in CHECKPOINTS.items() if block]


def reference(family, folder, ids):
    """Logits (B, L, V) that predict token i at i, from the checkpoint's file alone."""
    _, block, shift = CHECKPOINTS[family]
    if family in ENCODERS:
        model = getattr(transformers, f"{ENCODERS[family][0]}ForMaskedLM").from_pretrained(folder)
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits
    weights = load_file(folder / "model.safetensors")
    if family in ("esm", "dsm", "esm_diff"):
        return esm_reference(weights, ids)
    length = ids.shape[1]
    seen = seen_by_blocks(length, block or length)
    if family in ("mdlm", "bd3lm"):
        return mdlm_reference(weights, ids, seen)
    if family in ("llada:moe", "llada2_moe", "llada2_moe:llada2.2"):
        return moe_reference(weights, ids, seen, family != "llada:moe")
    if "diffugpt" in family:
        logits = gpt2_reference(weights, ids, seen)
    elif family == "llada":
        logits = gated_transformer(weights, LLADA_WORDS, ids, seen, 5e5, 1e-5)
    else:
        words = DIFFULLAMA_WORDS if family == "llama:diffullama" else QWEN_WORDS
        if f"{words['embed']}.weight" not in weights:
            pytest.fail(f"`reference` in family_twins.py knows no architecture for {family!r}: call its own there.")
        logits = gated_transformer(weights, words, ids, seen, 1e6, 1e-6)
    return torch.stack([logits[:, max(i - 1, 0)] for i in range(length)], dim=1) if shift else logits


@cache
def checkpoint(family):
    """The folder of a family's checkpoint, written once and removed at the end. No test writes in it."""
    folder = CHECKPOINTS[family][0](Path(ROOT.name) / f"tiny-{family.replace(':', '-')}")
    WRITTEN.add(folder)
    return folder


def load(folder, **given):
    """The pipeline of a folder; the twins have no tokenizer, so families with the mask id in it need to be told.

    A twin is read from disk once in each process. What is returned is a copy that a test may change.
    """
    if folder in WRITTEN and set(given) <= {"scheduler"}:
        pipe = copy.deepcopy(loaded_once(folder))
        pipe.scheduler = given.get("scheduler", pipe.scheduler)
        return pipe
    pipe = PrismPipeline.from_pretrained(folder, **({"mask_token_id": MASK} | given))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def loaded_once(folder):
    pipe = PrismPipeline.from_pretrained(folder, mask_token_id=MASK)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def some_ids(rows=3, length=LENGTH, seed=0):
    """Random ids, half of them masks; none is padding or the end token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, MASK, (rows, length), generator=generator)
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, MASK)


@torch.no_grad()
def aligned(pipe, ids, attention_mask=None):
    """Logits (B, L, V) of the pipeline's own denoiser."""
    hidden = pipe.denoiser.hidden(ids, attention_mask)
    return pipe.denoiser.logits(hidden, torch.ones_like(ids, dtype=torch.bool)).view(*ids.shape, -1)


def assert_close(ours, theirs, atol=1e-5):
    assert ours.shape == theirs.shape and ours.isfinite().sum() == ours.numel() - ours[..., 0].numel()
    torch.testing.assert_close(ours[..., :MASK].float(), theirs[..., :MASK].float(), rtol=0, atol=atol)


def greedy(**config):
    return MDLMScheduler(**({"order": "confidence", "temperature": 0.0} | config))
