"""The families of masked diffusion models: one row of data each, and how the row of a checkpoint is found."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint_names import (
    BD3LM_HARDCODED,
    DIFFUGPT_KEYS,
    DIFFULLAMA_KEYS,
    DREAM_HARDCODED,
    DSM_CONFIG,
    ILLADA_HARDCODED,
    LLADA2_CONFIG,
    LLADA2_HARDCODED,
    LLADA2_KEYS,
    LLADA_CONFIG,
    LLADA_HARDCODED,
    LLADA_KEYS,
    LLADA_MOE_CONFIG,
    LLADA_MOE_HARDCODED,
    MDLM_CONFIG,
    MDLM_HARDCODED,
)
from .spec import CheckpointRecipe, MDMSpec

BLOCK_LENGTH_FIELDS = ("block_size", "bd_size")  # what configs of block-causal models call it
EDIT_TOKEN_FIELDS = ("delete_token_id", "split_token_id")  # LLaDA2.2: ids that change the length of a block

_QKV = ("query", "key", "value")  # attention of BERT and RoBERTa
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")  # attention of Llama, Qwen2, Qwen3 and Qwen3-MoE
# Ambiguous and rare residues, gaps and a free place. DPLM's sampler forbids X and the special tokens.
_NO_RESIDUES = ("X", "B", "U", "Z", "O", ".", "-", "<null_1>")


def _masked_lm(
    mask_token_id: int, recipe: CheckpointRecipe, lora_targets: tuple[str, ...], source: str, **facts: Any
) -> MDMSpec:
    """A masked language model of transformers, which is bidirectional without a change."""
    return MDMSpec(mask_token_id, lora_targets=lora_targets, source=source, recipe=recipe, **facts)


def _from_causal(mask_token_id: int, recipe: CheckpointRecipe, source: str, **facts: Any) -> MDMSpec:
    """An autoregressive class of transformers that an additive mask makes bidirectional or block-causal."""
    facts = {"mask_format": "additive", "extra_inputs": ("position_ids",), "lora_targets": _LLAMA} | facts
    return MDMSpec(mask_token_id, source=source, recipe=recipe, **facts)


def _mdlm(source: str, hardcoded_config: dict[str, tuple[Any, ...]], **facts: Any) -> MDMSpec:
    """The diffusion transformer of MDLM and BD3-LM at time 0, as a GPT-NeoX; the mask is the last of its 50,258 ids."""
    recipe = CheckpointRecipe(
        "GPTNeoXForCausalLM",
        config_mapping=MDLM_CONFIG,
        config_values={
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
        hardcoded_config=hardcoded_config,
        fold_time=True,
        tokenizer_repo="openai-community/gpt2",
    )
    return _from_causal(50257, recipe, source, lora_targets=("query_key_value", "dense"), **facts)


def _llada2(source: str, **facts: Any) -> MDMSpec:
    recipe = CheckpointRecipe(
        "Glm4MoeForCausalLM",
        key_mapping=LLADA2_KEYS,
        split_weights={
            "self_attn.query_key_value.weight": [f"self_attn.{name}_proj.weight" for name in "qkv"],
        },
        config_mapping=LLADA2_CONFIG,
        config_values={"norm_topk_prob": True, "num_nextn_predict_layers": 0},
        hardcoded_config=LLADA2_HARDCODED,
    )
    return _from_causal(156895, recipe, source, attention="block_causal", block_length=32, **facts)


def _dsm() -> MDMSpec:
    """ESM-2 trained as a masked diffusion model, with a bias inside its output head and a soft cap after it."""
    recipe = CheckpointRecipe(
        "EsmForMaskedLM",
        key_mapping={r"^lm_head\.decoder\.bias$": "lm_head.bias"},
        config_mapping=DSM_CONFIG,
        config_values={"tie_word_embeddings": True},
        tokenizer_class="EsmTokenizer",
    )
    return _masked_lm(
        32,
        recipe,
        _QKV,
        "GleghornLab/DSM_150, DSM_650: models/modeling_dsm.py of Gleghorn-Lab/DSM (4d56058, read 2026-11-27)",
        extra_inputs=("offset_position_ids",),
        output_bias="lm_head.bias",
        logit_cap=30.0,
        no_content=_NO_RESIDUES,
    )


def _diffugpt(mask_token_id: int, source: str) -> MDMSpec:
    recipe = CheckpointRecipe(
        "GPT2LMHeadModel",
        key_mapping=DIFFUGPT_KEYS,
        vocab_key="embed_tokens.weight",  # its config keeps GPT-2's 50257 where a mask token was added
        tokenizer_class="GPT2Tokenizer",  # its tokenizer_config names a class in the authors' training code
    )
    return _from_causal(mask_token_id, recipe, source, logit_shift=1, lora_targets=("c_attn", "c_proj"))


_ROWS = {
    "llada": _from_causal(
        126336,
        CheckpointRecipe(
            "LlamaForCausalLM", key_mapping=LLADA_KEYS, config_mapping=LLADA_CONFIG, hardcoded_config=LLADA_HARDCODED
        ),
        "GSAI-ML/LLaDA-8B-Base, -Instruct, LLaDA-1.5: config.json and modeling_llada.py",
    ),
    "illada": _from_causal(
        5,
        CheckpointRecipe("LlamaForCausalLM", hardcoded_config=ILLADA_HARDCODED),
        "GSAI-ML/iLLaDA-8B-Base, -Instruct: modeling_illada.py (as copied in public code) and the README of "
        "ML-GSAI/LLaDA (b7e6c35), read 2026-11-27; mask <[MASK]>, in neither config nor tokenizer",
    ),
    "llada:moe": _from_causal(
        156895,
        CheckpointRecipe(
            "Qwen3MoeForCausalLM",
            config_mapping=LLADA_MOE_CONFIG,
            config_values={"norm_topk_prob": False, "decoder_sparse_step": 1},
            hardcoded_config=LLADA_MOE_HARDCODED,
        ),
        "inclusionAI/LLaDA-MoE-7B-A1B: modeling_lladamoe.py; model_type llada too, mask id absent from its config",
    ),
    "Dream": _from_causal(
        151666,
        CheckpointRecipe("Qwen2ForCausalLM", tokenizer_class="Qwen2Tokenizer", hardcoded_config=DREAM_HARDCODED),
        "Dream-org/Dream-v0-7B, Dream-Coder, apple/DiffuCoder-7B: config.json; logits at i - 1 predict i",
        logit_shift=1,
    ),
    "Dream:reasoner": _from_causal(
        151669,
        CheckpointRecipe("Qwen3ForCausalLM"),
        "DreamReasoner-8B: generation_utils.py and config.json (as ported in public code, read 2026-11-27); "
        "logits at i predict i, other than Dream's",
        attention="block_causal",
        block_length=32,
    ),
    "a2d-qwen3": _from_causal(
        151669, CheckpointRecipe("Qwen3ForCausalLM"), "dllm-hub/Qwen3-0.6B-diffusion-mdlm: tokenizer <|mask|>"
    ),
    "a2d-qwen3:bd3lm": _from_causal(
        151669,
        CheckpointRecipe("Qwen3ForCausalLM"),
        "dllm-hub/Qwen3-0.6B-diffusion-bd3lm: block size 32 in its card",
        attention="block_causal",
        block_length=32,
    ),
    "a2d-qwen2": _from_causal(
        151665,
        CheckpointRecipe("Qwen2ForCausalLM"),
        "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm: tokenizer <|mask|>",
    ),
    "a2d-qwen2:bd3lm": _from_causal(
        151665,
        CheckpointRecipe("Qwen2ForCausalLM"),
        "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm: block size 32 in its card",
        attention="block_causal",
        block_length=32,
    ),
    "a2d-llama": _from_causal(
        128256, CheckpointRecipe("LlamaForCausalLM"), "dllm, A2DLlamaConfig: Llama turned bidirectional"
    ),
    "sdar": _from_causal(
        151669,
        CheckpointRecipe("Qwen3ForCausalLM"),
        "JetLM/SDAR-*-Chat-b4 and Gen-Verse/TraDo: block size 4, tokenizer <|MASK|>",
        attention="block_causal",
        block_length=4,
    ),
    "sdar_moe": _from_causal(
        151669,
        CheckpointRecipe("Qwen3MoeForCausalLM"),
        "JetLM/SDAR-30B-A3B: sglang 0.5.23 (models/sdar_moe.py, dllm/config.py), read 2026-11-27",
        attention="block_causal",
        block_length=4,
    ),
    "Fast_dLLM_Qwen": _from_causal(
        151665,
        CheckpointRecipe("Qwen2ForCausalLM"),
        "Efficient-Large-Model/Fast_dLLM_v2: config bd_size 32, tokenizer |<MASK>|; logits at i - 1 predict i",
        attention="block_causal",
        block_length=32,
        logit_shift=1,
    ),
    "llada2_moe": _llada2(
        "inclusionAI/LLaDA2.0-mini, -flash, LLaDA2.1: modeling_llada2_moe.py; mask <|mask|>, block of the model card"
    ),
    "llada2_moe:llada2.2": _llada2(
        "inclusionAI/LLaDA2.2: sglang 0.5.23 (models/llada2.py, dllm/config.py), read 2026-11-27",
        no_content=(156930, 156931),  # <delete> and <split> of a block, which its config does not name
    ),
    "llama:diffcoder": _from_causal(
        5,
        CheckpointRecipe("LlamaForCausalLM"),
        "ByteDance-Seed/Stable-DiffCoder-8B: README (ece1ffb), StableDiffcoderForCausalLM (as copied in public code), "
        "read 2026-11-27",
        attention="block_causal",
        block_length=4,
    ),
    "llama:diffullama": _from_causal(
        811,
        CheckpointRecipe("LlamaForCausalLM", key_mapping=DIFFULLAMA_KEYS),
        "diffusionfamily/diffullama: mask_token of the authors' train.py; logits at i - 1 predict i",
        logit_shift=1,
    ),
    "gpt2:diffugpt-m": _diffugpt(50257, "diffusionfamily/diffugpt-m: the mask is added after GPT-2's 50257 ids"),
    "gpt2:diffugpt": _diffugpt(10541, "diffusionfamily/diffugpt-s: mask_token_id of the authors' loader.py"),
    "mdlm": _mdlm(
        "kuleshov-group/mdlm-owt: the mask is the last id; modeling_mdlm.py (adaLN of a constant time)", MDLM_HARDCODED
    ),
    "bd3lm": _mdlm(
        "kuleshov-group/bd3lm-owt-block_size*: config block_size; modeling_bd3lm.py with sample_mode=True",
        BD3LM_HARDCODED,
        attention="block_causal",
        block_length=16,
    ),
    "bert": _masked_lm(
        103,
        CheckpointRecipe("BertForMaskedLM"),
        _QKV,
        "bert-base-uncased vocab.txt: [MASK]",
        extra_inputs=("position_ids",),
    ),
    "roberta": _masked_lm(
        50264,
        CheckpointRecipe("RobertaForMaskedLM"),
        _QKV,
        "roberta-base vocab.json: <mask>",
        extra_inputs=("offset_position_ids",),
    ),
    "roberta-prelayernorm": _masked_lm(
        50264,
        CheckpointRecipe("RobertaPreLayerNormForMaskedLM"),
        _QKV,
        "efficient_mlm: RoBERTa's vocabulary",
        extra_inputs=("offset_position_ids",),
    ),
    "esm": _masked_lm(
        32,
        CheckpointRecipe("EsmForMaskedLM", hardcoded_config={"dplm_type": ("dplm_esm",)}),  # DPLM-2 has two masks
        _QKV,
        "facebook/esm2_*, airkingbd/dplm_*: vocab.txt <mask>; the bias comes after lm_head.decoder",
        extra_inputs=("offset_position_ids",),
        output_bias="lm_head.bias",
        no_content=_NO_RESIDUES,
    ),
    "dsm": _dsm(),
    "esm_diff": _dsm(),  # what the config of the published checkpoints says
    "esmc": _masked_lm(
        32,
        CheckpointRecipe("EsmcForMaskedLM"),
        _LLAMA,
        "biohub/ESMC-300M, -600M, -6B: transformers 5.23; config mask_token_id",
        extra_inputs=("position_ids",),
        no_content=_NO_RESIDUES,
    ),
    "xlm-roberta": _masked_lm(
        250001,
        CheckpointRecipe("XLMRobertaForMaskedLM"),
        _QKV,
        "xlm-roberta-base: the last of its 250,002 ids",
        extra_inputs=("offset_position_ids",),
    ),
    "xlm-roberta-xl": _masked_lm(
        250001,
        CheckpointRecipe("XLMRobertaXLForMaskedLM"),
        _QKV,
        "facebook/xlm-roberta-xl: XLM-R's tokenizer",
        extra_inputs=("offset_position_ids",),
    ),
    "camembert": _masked_lm(
        32004,
        CheckpointRecipe("CamembertForMaskedLM"),
        _QKV,
        "camembert-base: the last of its 32,005 ids",
        extra_inputs=("offset_position_ids",),
    ),
    "roformer": _masked_lm(
        103, CheckpointRecipe("RoFormerForMaskedLM"), _QKV, "junnyu/roformer_chinese_base: BERT's [MASK]"
    ),
    "electra": _masked_lm(
        103,
        CheckpointRecipe("ElectraForMaskedLM"),
        _QKV,
        "google/electra-*-generator: BERT's vocabulary; a discriminator has no output head",
        extra_inputs=("position_ids",),
    ),
    "ernie": _masked_lm(
        3,
        CheckpointRecipe("ErnieForMaskedLM"),
        _QKV,
        "nghuyong/ernie-3.0-base-zh vocab.txt: [MASK]",
        extra_inputs=("position_ids",),
    ),
    "nomic_bert": _masked_lm(
        103,
        CheckpointRecipe("NomicBertForMaskedLM"),
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "nomic-ai/nomic-bert-2048: BERT's vocabulary",
        extra_inputs=("position_ids",),
    ),
    "gte": _masked_lm(
        250001,
        CheckpointRecipe("GteForMaskedLM"),
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "alibaba-nlp-community/gte-multilingual: XLM-R's tokenizer",
        extra_inputs=("position_ids",),
    ),
    "modernbert": _masked_lm(
        50284, CheckpointRecipe("ModernBertForMaskedLM"), ("Wqkv", "Wo"), "ModernBERT-base tokenizer: [MASK]"
    ),
    "eurobert": _masked_lm(
        128002, CheckpointRecipe("EuroBertForMaskedLM"), _LLAMA, "EuroBERT-210m tokenizer: <|mask|>"
    ),
    "deberta-v2": _masked_lm(
        128000,
        CheckpointRecipe("DebertaV2ForMaskedLM"),
        ("query_proj", "key_proj", "value_proj"),
        "deberta-v3-base tokenizer: [MASK]",
    ),
}
# Keyed by `config.model_type`, or by "model_type:word" for checkpoints of that type whose name or architecture holds
# the word. The first key that fits is taken. The mask id of a row is the one of the original checkpoints; the config
# and the tokenizer of a checkpoint override it.
FAMILIES: dict[str, MDMSpec] = {key: dataclasses.replace(row, family=key) for key, row in _ROWS.items()}


_UNIFORM = "it starts from random tokens and replaces them, and has no mask token"
_CAUSAL_CONTEXT = (
    "it reads finished text causally and the current block in both directions, and no mask for a whole canvas says that"
)
# model_type of models that look like masked diffusion models and cannot be run as one, and why.
REFUSED = {
    "wedlm": "it reads causally, with the known tokens moved to the front, so a mask does not see what follows it",
    "diffusion_gemma": _UNIFORM,
    "diffusion_gemma_text": _UNIFORM,
    "udlm": _UNIFORM,
    "duo": _UNIFORM,
    "DUO": _UNIFORM,
    "nemotron_labs_diffusion": _CAUSAL_CONTEXT,
    "nemotron_labs_diffusion_vlm": _CAUSAL_CONTEXT,
}


def refuse_family(model_type: str | None, name: str) -> None:
    """Raise a ValueError for a model type of `REFUSED`, with the reason."""
    if model_type in REFUSED:
        raise ValueError(
            f"{name!r} (model_type {model_type!r}) is not a masked diffusion model that this package can run: "
            f"{REFUSED[model_type]}. Run it with its authors' code; or pass `mdm_spec` if you know better."
        )


def family_of(config: Any, name: str) -> MDMSpec | None:
    """The row of a checkpoint in `FAMILIES`, or None if there is none.

    Args:
        config: its `model_type` and `architectures` are read, if it has them.
        name: Hub id or folder. For keys "model_type:word", the word is looked for in the last part of this name and
            in the architectures.
    """
    model_type, path = getattr(config, "model_type", None), Path(name)
    if path.parent.name == "snapshots":  # in the Hub's cache: models--owner--name/snapshots/<commit>
        path = path.parent.parent
    named = " ".join([path.name, *(getattr(config, "architectures", None) or ())]).lower()
    for key, row in FAMILIES.items():
        kind, _, word = key.partition(":")
        if word and kind == model_type and word in named:
            return row
    return FAMILIES.get(model_type or "")


def as_spec(given: MDMSpec | Mapping[str, Any] | None) -> MDMSpec | None:
    """An `MDMSpec` from an `MDMSpec` or from its dict; None stays None.

    Raises:
        TypeError: `given` is none of these.
    """
    if isinstance(given, Mapping):
        return MDMSpec.from_dict(given)
    if given is not None and not isinstance(given, MDMSpec):
        raise TypeError(f"`mdm_spec` must be an MDMSpec or its dict, got {type(given).__name__}.")
    return given


def recipe_of(spec: MDMSpec | None) -> CheckpointRecipe:
    """The recipe of a spec, or else the recipe of its family. An empty recipe if there is neither."""
    row = FAMILIES.get(spec.family) if spec is not None and spec.family is not None else None
    return (spec and spec.recipe) or (row and row.recipe) or CheckpointRecipe()


def resolve_spec(
    config: Any = None,
    tokenizer: Any = None,
    *,
    mdm_spec: MDMSpec | Mapping[str, Any] | None = None,
    mask_token_id: int | None = None,
    name: str | None = None,
) -> MDMSpec:
    """The spec of a model, from the most explicit source that knows it.

    The mask id comes from the first of these that has one: `mask_token_id`, `mdm_spec`, `config.mask_token_id`,
    `tokenizer.mask_token_id`, the row of `config.model_type` in `FAMILIES`. All other facts come from `mdm_spec`, or
    else from that row. The block length of a block-causal row comes from `config.block_size` or `config.bd_size` if
    there is one, or else from a name that ends in "-b32".

    Args:
        config: transformers config of the backbone, or None.
        tokenizer: transformers tokenizer, or None.
        mdm_spec: `MDMSpec` or the dict of one; taken as it is.
        mask_token_id: overrides the mask id alone.
        name: what the model is called in messages.
    Returns:
        An `MDMSpec`.
    Raises:
        ValueError: the family or the mask id is not known and was not passed; or the id is outside the vocabulary; or
            the family is one of `REFUSED`.
    """
    model_type = getattr(config, "model_type", None)
    name = name or getattr(config, "_name_or_path", "") or model_type or "the model"
    spec = as_spec(mdm_spec)
    if spec is None:
        spec = spec_of_config(config, tokenizer, mask_token_id, name)
    elif mask_token_id is not None:
        spec = dataclasses.replace(spec, mask_token_id=mask_token_id)
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is not None and spec.mask_token_id >= vocab_size:
        raise ValueError(
            f"`mask_token_id` of {name!r} is {spec.mask_token_id}, outside its vocabulary of {vocab_size} ids. "
            "Pass the right id, or resize the model's embeddings."
        )
    return spec


def spec_of_config(config: Any, tokenizer: Any, mask_token_id: int | None, name: str) -> MDMSpec:
    """The row of a checkpoint with its own mask id and block length; arguments and errors as `resolve_spec`."""
    model_type = getattr(config, "model_type", None)
    refuse_family(model_type, name)
    row = family_of(config, name)
    ids = [mask_token_id, getattr(config, "mask_token_id", None), getattr(tokenizer, "mask_token_id", None)]
    ids.append(row.mask_token_id if row else None)
    found = next((i for i in ids if i is not None), None)
    if found is None:
        raise ValueError(
            f"No mask token is known for {name!r}: config.mask_token_id and tokenizer.mask_token_id are unset, "
            f"and model_type {model_type!r} is not in FAMILIES. Pass mask_token_id=<id> or mdm_spec=MDMSpec(...); "
            f"known: {', '.join(sorted(FAMILIES))}."
        )
    if row is None:
        return MDMSpec(found, source="mask id only")
    return dataclasses.replace(row, mask_token_id=found, **block_facts(row, config, name), **edit_tokens(row, config))


def supports_all_masked_input(config: Any) -> bool:
    """Can a model read a row of masks alone? ESM with token_dropout divides by the share of other tokens, 0 there."""
    return not getattr(config, "token_dropout", False)


def block_facts(row: MDMSpec, config: Any, name: str) -> dict[str, Any]:
    """Attention and block length of a block-causal checkpoint: its config and name override its row."""
    if row.attention != "block_causal":
        return {}
    if getattr(config, "cross_attn", True) is False:  # by this, BD3-LM's config says that attention is not in blocks
        return {"attention": "bidirectional", "block_length": None}
    lengths = [getattr(config, field, None) for field in BLOCK_LENGTH_FIELDS]
    named = re.search(r"-b(\d+)$", name.rstrip("/"))  # SDAR-8B-Chat-b32
    lengths.append(int(named[1]) if named else None)
    return {"block_length": next((length for length in lengths if length is not None), row.block_length)}


def edit_tokens(row: MDMSpec, config: Any) -> dict[str, Any]:
    """`no_content` and the ids that stand for a change of a block's length, which our schedulers cannot make."""
    named = [getattr(config, field, None) for field in EDIT_TOKEN_FIELDS]
    vocab_size = getattr(config, "vocab_size", None)
    tokens = tuple(dict.fromkeys([*row.no_content, *(token for token in named if token is not None)]))
    if vocab_size is not None:
        tokens = tuple(token for token in tokens if isinstance(token, str) or token < vocab_size)
    return {"no_content": tokens}
