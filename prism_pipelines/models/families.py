"""What a backbone needs to be called as a masked diffusion model: one row of data per family, no subclass."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from .checkpoint_names import (
    DIFFUGPT_KEYS,
    DIFFULLAMA_KEYS,
    DSM_CONFIG,
    LLADA2_CONFIG,
    LLADA2_KEYS,
    LLADA_CONFIG,
    LLADA_KEYS,
    LLADA_MOE_CONFIG,
    MDLM_CONFIG,
)

ATTENTION_KINDS = ("bidirectional", "block_causal")
MASK_FORMATS = ("padding", "additive", "none")
EXTRA_INPUTS = ("position_ids", "offset_position_ids", "timesteps")
BLOCK_LENGTH_FIELDS = ("block_size", "bd_size")  # what configs of block-causal models call it
EDIT_TOKEN_FIELDS = ("delete_token_id", "split_token_id")  # LLaDA2.2: ids that change the length of a block


@dataclass(frozen=True)
class MDMSpec:
    """Facts about one masked diffusion model. Only the mask id has no default.

    Args:
        mask_token_id: id of the mask token, int in [0, vocab_size).
        attention: "bidirectional", or "block_causal" (blocks of `block_length`, causal between blocks).
        logit_shift: 0, or 1 for models made from an autoregressive one: logits at i - 1 predict token i.
            Moves logits only, never hidden states.
        block_length: block size in tokens of a block-causal model, else None.
        mask_format: what the forward takes as `attention_mask`: "padding" (0/1 of shape (B, L)), "additive" (float
            (B, 1, L, L), which also makes a causal class bidirectional) or "none" (no such argument).
        extra_inputs: further arguments of the forward that are made here: "position_ids" (0, 1, ... from the first
            token that is no padding), "offset_position_ids" (the same, from config.pad_token_id + 1, as RoBERTa counts)
            and "timesteps" (zeros (B,)).
        output_head: dotted name of the output head inside the model; None asks `get_output_embeddings()`.
        output_bias: dotted name of a bias (V,) that the model adds to what its output head gives, or None.
        logit_cap: the model ends with `cap * tanh(logits / cap)`, which its native class leaves out; None for no cap.
        native_class: transformers class that loads the checkpoint without remote code; None for the class that the
            checkpoint's own config names, which takes `trust_remote_code=True` if it is not part of transformers.
        key_mapping: checkpoint key renaming, regular expression -> replacement, for
            `from_pretrained(key_mapping=...)`, or None.
        split_weights: end of the name of a checkpoint weight, after `key_mapping` -> ends of the names of the native
            weights that its rows are cut into, in order, for layers that were saved as one; or None.
        config_mapping: field of the native config -> field of the checkpoint's config; None if they are named alike.
        config_values: further fields of the native config that the checkpoint's config has no word for.
        vocab_key: name of a checkpoint weight with one row per id, where the config's vocab_size is not that of the
            weights; "lm_head.weight" stands in if it is absent, being tied to it. None trusts the config.
        fold_time: the checkpoint's layers are modulated by an embedding of a time that is always 0 (MDLM): fold it into
            the weights, see `convert_mdlm.py`.
        tokenizer_class: transformers class that loads the tokenizer without remote code; None asks `AutoTokenizer`.
        tokenizer_repo: Hub id of the tokenizer, where the checkpoints have none of their own.
        lora_targets: module names that LoRA adapts by default.
        no_content: tokens of the tokenizer, besides the special ones, or their ids, that sampling does not write unless
            `allow_tokens` names them.
        tested: False if no test compares this row with an independent reference; said when it is loaded.
        source: where these values come from.
    Raises:
        ValueError: a value outside the sets above.
    """

    mask_token_id: int
    attention: str = "bidirectional"
    logit_shift: int = 0
    block_length: int | None = None
    mask_format: str = "padding"
    extra_inputs: tuple[str, ...] = ()
    output_head: str | None = None
    output_bias: str | None = None
    logit_cap: float | None = None
    native_class: str | None = None
    key_mapping: dict[str, str] | None = None
    split_weights: dict[str, list[str]] | None = None
    config_mapping: dict[str, str] | None = None
    config_values: dict | None = None
    vocab_key: str | None = None
    fold_time: bool = False
    tokenizer_class: str | None = None
    tokenizer_repo: str | None = None
    lora_targets: tuple[str, ...] = ()
    no_content: tuple[str | int, ...] = ()
    tested: bool = True
    source: str = ""

    def __post_init__(self):
        if isinstance(self.mask_token_id, bool) or not isinstance(self.mask_token_id, int) or self.mask_token_id < 0:
            raise ValueError(f"`mask_token_id` must be a token id >= 0, got {self.mask_token_id!r}.")
        if self.attention not in ATTENTION_KINDS:
            raise ValueError(f"`attention` must be one of {ATTENTION_KINDS}, got {self.attention!r}.")
        if self.mask_format not in MASK_FORMATS:
            raise ValueError(f"`mask_format` must be one of {MASK_FORMATS}, got {self.mask_format!r}.")
        if self.logit_shift not in (0, 1):
            raise ValueError(f"`logit_shift` must be 0 or 1, got {self.logit_shift!r}.")
        if self.logit_cap is not None and not self.logit_cap > 0:
            raise ValueError(f"`logit_cap` must be None or above 0, got {self.logit_cap!r}.")
        if unknown := sorted(set(self.extra_inputs) - set(EXTRA_INPUTS)):
            raise ValueError(f"`extra_inputs` may hold {EXTRA_INPUTS}, got {unknown}.")
        length = self.block_length
        if self.attention == "block_causal":
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                raise ValueError(f"`block_length` of a block-causal model must be at least 1, got {length!r}.")
            if self.mask_format != "additive":
                raise ValueError(f'A block-causal model needs mask_format="additive", got {self.mask_format!r}.')
        elif length is not None:
            raise ValueError(f'`block_length` goes with attention="block_causal" only, got {length!r}.')
        # JSON gives lists back; a spec read from a file must equal the one that was written.
        object.__setattr__(self, "extra_inputs", tuple(self.extra_inputs))
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        object.__setattr__(self, "no_content", tuple(self.no_content))

    def to_dict(self) -> dict:
        """A JSON-able dict; `MDMSpec.from_dict` reads it back to an equal spec."""
        plain = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, values: dict) -> MDMSpec:
        """The spec of a dict made by `to_dict`.

        Raises:
            ValueError: unknown or missing fields, named.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"`mdm_spec` has unknown fields {unknown}; known: {sorted(known)}.")
        if "mask_token_id" not in values:
            raise ValueError("`mdm_spec` needs `mask_token_id`.")
        return cls(**values)


_QKV = ("query", "key", "value")  # attention of BERT and RoBERTa
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")  # attention of Llama, Qwen2, Qwen3 and Qwen3-MoE
# Ambiguous and rare residues, gaps and a free place. DPLM's sampler forbids X and the special tokens.
_NO_RESIDUES = ("X", "B", "U", "Z", "O", ".", "-", "<null_1>")


def _masked_lm(mask_token_id: int, native_class: str, lora_targets: tuple[str, ...], source: str, **facts) -> MDMSpec:
    return MDMSpec(mask_token_id, native_class=native_class, lora_targets=lora_targets, source=source, **facts)


def _from_causal(mask_token_id: int, native_class: str, source: str, **facts) -> MDMSpec:
    """An autoregressive class of transformers that an additive mask makes bidirectional or block-causal."""
    facts = {"mask_format": "additive", "extra_inputs": ("position_ids",), "lora_targets": _LLAMA} | facts
    return MDMSpec(mask_token_id, native_class=native_class, source=source, **facts)


def _mdlm(source: str, **facts) -> MDMSpec:
    """The diffusion transformer of MDLM and BD3-LM at time 0, as a GPT-NeoX; the mask is the last of its 50,258 ids."""
    return MDMSpec(
        50257,
        native_class="GPTNeoXForCausalLM",
        mask_format="additive",
        extra_inputs=("position_ids",),
        config_mapping=MDLM_CONFIG,
        config_values={
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
        fold_time=True,
        tokenizer_repo="openai-community/gpt2",
        lora_targets=("query_key_value", "dense"),
        source=source,
        **facts,
    )


def _llada2(source: str, **facts) -> MDMSpec:
    return _from_causal(
        156895,
        "Glm4MoeForCausalLM",
        source,
        attention="block_causal",
        block_length=32,
        key_mapping=LLADA2_KEYS,
        split_weights={
            "self_attn.query_key_value.weight": [f"self_attn.{name}_proj.weight" for name in "qkv"],
        },
        config_mapping=LLADA2_CONFIG,
        config_values={"norm_topk_prob": True, "num_nextn_predict_layers": 0},
        **facts,
    )


def _dsm() -> MDMSpec:
    """ESM-2 trained as a masked diffusion model, with a bias inside its output head and a soft cap after it."""
    return MDMSpec(
        32,
        native_class="EsmForMaskedLM",
        extra_inputs=("offset_position_ids",),
        output_bias="lm_head.bias",
        logit_cap=30.0,
        key_mapping={r"^lm_head\.decoder\.bias$": "lm_head.bias"},
        config_mapping=DSM_CONFIG,
        config_values={"tie_word_embeddings": True},
        tokenizer_class="EsmTokenizer",
        lora_targets=_QKV,
        no_content=_NO_RESIDUES,
        source="GleghornLab/DSM_150, DSM_650: models/modeling_dsm.py of Gleghorn-Lab/DSM (4d56058, read 2026-11-27)",
    )


def _diffugpt(mask_token_id: int, source: str) -> MDMSpec:
    return _from_causal(
        mask_token_id,
        "GPT2LMHeadModel",
        source,
        logit_shift=1,
        key_mapping=DIFFUGPT_KEYS,
        vocab_key="embed_tokens.weight",  # its config keeps GPT-2's 50257 where a mask token was added
        tokenizer_class="GPT2Tokenizer",  # its tokenizer_config names a class of the authors' training code
        lora_targets=("c_attn", "c_proj"),
    )


# Keyed by `config.model_type`, or by "model_type:word" for checkpoints of that type whose name or architecture holds
# the word (the first that fits). The mask id of a row is that of the original checkpoints; config and tokenizer
# override it.
FAMILIES: dict[str, MDMSpec] = {
    "llada": _from_causal(
        126336,
        "LlamaForCausalLM",
        "GSAI-ML/LLaDA-8B-Base, -Instruct, LLaDA-1.5: config.json and modeling_llada.py",
        key_mapping=LLADA_KEYS,
        config_mapping=LLADA_CONFIG,
    ),
    "illada": _from_causal(
        5,
        "LlamaForCausalLM",
        "GSAI-ML/iLLaDA-8B-Base, -Instruct: modeling_illada.py (as copied in public code) and the README of "
        "ML-GSAI/LLaDA (b7e6c35), read 2026-11-27; mask <[MASK]>, in neither config nor tokenizer",
    ),
    "llada:moe": _from_causal(
        156895,
        "Qwen3MoeForCausalLM",
        "inclusionAI/LLaDA-MoE-7B-A1B: modeling_lladamoe.py; model_type llada too, mask id absent from its config",
        config_mapping=LLADA_MOE_CONFIG,
        config_values={"norm_topk_prob": False, "decoder_sparse_step": 1},
    ),
    "Dream": _from_causal(
        151666,
        "Qwen2ForCausalLM",
        "Dream-org/Dream-v0-7B, Dream-Coder, apple/DiffuCoder-7B: config.json; logits at i - 1 predict i",
        logit_shift=1,
        tokenizer_class="Qwen2Tokenizer",
    ),
    "Dream:reasoner": _from_causal(
        151669,
        "Qwen3ForCausalLM",
        "DreamReasoner-8B: generation_utils.py and config.json (as ported in public code, read 2026-11-27); "
        "logits at i predict i, other than Dream's",
        attention="block_causal",
        block_length=32,
    ),
    "a2d-qwen3": _from_causal(151669, "Qwen3ForCausalLM", "dllm-hub/Qwen3-0.6B-diffusion-mdlm: tokenizer <|mask|>"),
    "a2d-qwen3:bd3lm": _from_causal(
        151669,
        "Qwen3ForCausalLM",
        "dllm-hub/Qwen3-0.6B-diffusion-bd3lm: block size 32 in its card",
        attention="block_causal",
        block_length=32,
    ),
    "a2d-qwen2": _from_causal(
        151665, "Qwen2ForCausalLM", "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm: tokenizer <|mask|>"
    ),
    "a2d-qwen2:bd3lm": _from_causal(
        151665,
        "Qwen2ForCausalLM",
        "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm: block size 32 in its card",
        attention="block_causal",
        block_length=32,
    ),
    "a2d-llama": _from_causal(128256, "LlamaForCausalLM", "dllm, A2DLlamaConfig: Llama turned bidirectional"),
    "sdar": _from_causal(
        151669,
        "Qwen3ForCausalLM",
        "JetLM/SDAR-*-Chat-b4 and Gen-Verse/TraDo: block size 4, tokenizer <|MASK|>",
        attention="block_causal",
        block_length=4,
    ),
    "sdar_moe": _from_causal(
        151669,
        "Qwen3MoeForCausalLM",
        "JetLM/SDAR-30B-A3B: sglang 0.5.23 (models/sdar_moe.py, dllm/config.py), read 2026-11-27",
        attention="block_causal",
        block_length=4,
    ),
    "Fast_dLLM_Qwen": _from_causal(
        151665,
        "Qwen2ForCausalLM",
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
        "LlamaForCausalLM",
        "ByteDance-Seed/Stable-DiffCoder-8B: README (ece1ffb), StableDiffcoderForCausalLM (as copied in public code), "
        "read 2026-11-27",
        attention="block_causal",
        block_length=4,
    ),
    "llama:diffullama": _from_causal(
        811,
        "LlamaForCausalLM",
        "diffusionfamily/diffullama: mask_token of the authors' train.py; logits at i - 1 predict i",
        logit_shift=1,
        key_mapping=DIFFULLAMA_KEYS,
    ),
    "gpt2:diffugpt-m": _diffugpt(50257, "diffusionfamily/diffugpt-m: the mask is added after GPT-2's 50257 ids"),
    "gpt2:diffugpt": _diffugpt(10541, "diffusionfamily/diffugpt-s: mask_token_id of the authors' loader.py"),
    "mdlm": _mdlm("kuleshov-group/mdlm-owt: the mask is the last id; modeling_mdlm.py (adaLN of a constant time)"),
    "bd3lm": _mdlm(
        "kuleshov-group/bd3lm-owt-block_size*: config block_size; modeling_bd3lm.py with sample_mode=True",
        attention="block_causal",
        block_length=16,
    ),
    "bert": _masked_lm(
        103, "BertForMaskedLM", _QKV, "bert-base-uncased vocab.txt: [MASK]", extra_inputs=("position_ids",)
    ),
    "roberta": _masked_lm(
        50264, "RobertaForMaskedLM", _QKV, "roberta-base vocab.json: <mask>", extra_inputs=("offset_position_ids",)
    ),
    "roberta-prelayernorm": _masked_lm(
        50264,
        "RobertaPreLayerNormForMaskedLM",
        _QKV,
        "efficient_mlm: RoBERTa's vocabulary",
        extra_inputs=("offset_position_ids",),
    ),
    "esm": _masked_lm(
        32,
        "EsmForMaskedLM",
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
        "EsmcForMaskedLM",
        _LLAMA,
        "biohub/ESMC-300M, -600M, -6B: transformers 5.23; config mask_token_id",
        extra_inputs=("position_ids",),
        no_content=_NO_RESIDUES,
    ),
    "xlm-roberta": _masked_lm(
        250001,
        "XLMRobertaForMaskedLM",
        _QKV,
        "xlm-roberta-base: the last of its 250,002 ids",
        extra_inputs=("offset_position_ids",),
    ),
    "xlm-roberta-xl": _masked_lm(
        250001,
        "XLMRobertaXLForMaskedLM",
        _QKV,
        "facebook/xlm-roberta-xl: XLM-R's tokenizer",
        extra_inputs=("offset_position_ids",),
    ),
    "camembert": _masked_lm(
        32004,
        "CamembertForMaskedLM",
        _QKV,
        "camembert-base: the last of its 32,005 ids",
        extra_inputs=("offset_position_ids",),
    ),
    "roformer": _masked_lm(103, "RoFormerForMaskedLM", _QKV, "junnyu/roformer_chinese_base: BERT's [MASK]"),
    "electra": _masked_lm(
        103,
        "ElectraForMaskedLM",
        _QKV,
        "google/electra-*-generator: BERT's vocabulary; a discriminator has no output head",
        extra_inputs=("position_ids",),
    ),
    "ernie": _masked_lm(
        3, "ErnieForMaskedLM", _QKV, "nghuyong/ernie-3.0-base-zh vocab.txt: [MASK]", extra_inputs=("position_ids",)
    ),
    "nomic_bert": _masked_lm(
        103,
        "NomicBertForMaskedLM",
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "nomic-ai/nomic-bert-2048: BERT's vocabulary",
        extra_inputs=("position_ids",),
    ),
    "gte": _masked_lm(
        250001,
        "GteForMaskedLM",
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "alibaba-nlp-community/gte-multilingual: XLM-R's tokenizer",
        extra_inputs=("position_ids",),
    ),
    "modernbert": _masked_lm(50284, "ModernBertForMaskedLM", ("Wqkv", "Wo"), "ModernBERT-base tokenizer: [MASK]"),
    "eurobert": _masked_lm(128002, "EuroBertForMaskedLM", _LLAMA, "EuroBERT-210m tokenizer: <|mask|>"),
    "deberta-v2": _masked_lm(
        128000,
        "DebertaV2ForMaskedLM",
        ("query_proj", "key_proj", "value_proj"),
        "deberta-v3-base tokenizer: [MASK]",
    ),
}


_UNIFORM = "it starts from random tokens and replaces them, and has no mask token"
_CAUSAL_CONTEXT = (
    "it reads finished text causally and the block at work in both directions, and no mask for a whole canvas says that"
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
            f"{name!r} (model_type {model_type!r}) is no masked diffusion model that can be run here: "
            f"{REFUSED[model_type]}. Run it by its authors' code; or pass `mdm_spec` if you know better."
        )


def family_of(config, name: str) -> MDMSpec | None:
    """The row of a checkpoint, or None if there is none.

    Args:
        config: has `model_type` and `architectures`, or lacks them.
        name: Hub id or folder. Words are looked for in its last part, and in the architectures that the config names.
    """
    model_type, path = getattr(config, "model_type", None), Path(name)
    if path.parent.name == "snapshots":  # in the Hub's cache: models--owner--name/snapshots/<commit>
        path = path.parent.parent
    said = " ".join([path.name, *(getattr(config, "architectures", None) or ())]).lower()
    for key, row in FAMILIES.items():
        kind, _, word = key.partition(":")
        if word and kind == model_type and word in said:
            return row
    return FAMILIES.get(model_type)


def as_spec(given) -> MDMSpec | None:
    """An `MDMSpec`, or the dict of one, as an `MDMSpec`; None as None.

    Raises:
        TypeError: something else.
    """
    if isinstance(given, dict):
        return MDMSpec.from_dict(given)
    if given is not None and not isinstance(given, MDMSpec):
        raise TypeError(f"`mdm_spec` must be an MDMSpec or its dict, got {type(given).__name__}.")
    return given


def resolve_spec(config=None, tokenizer=None, *, mdm_spec=None, mask_token_id=None, name=None) -> MDMSpec:
    """The spec of a model, from the most explicit source that knows it.

    Order for the mask id: `mask_token_id`, `mdm_spec`, `config.mask_token_id`, `tokenizer.mask_token_id`, the row of
    `config.model_type` in `FAMILIES`. Everything else comes from `mdm_spec`, else from that row; the block length of a
    block-causal row from `config.block_size` or `config.bd_size` if there is one, else from a name that ends in "-b32".

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
    mdm_spec = as_spec(mdm_spec)
    if mdm_spec is None:
        refuse_family(model_type, name)
        row = family_of(config, name)
        ids = [getattr(config, "mask_token_id", None), getattr(tokenizer, "mask_token_id", None)]
        ids.append(row.mask_token_id if row else None)
        found = next((i for i in [mask_token_id, *ids] if i is not None), None)
        if found is None:
            raise ValueError(
                f"No mask token is known for {name!r}: config.mask_token_id and tokenizer.mask_token_id are unset, "
                f"and model_type {model_type!r} is not in FAMILIES. Pass mask_token_id=<id> or mdm_spec=MDMSpec(...); "
                f"known: {', '.join(sorted(FAMILIES))}."
            )
        if row is None:
            mdm_spec = MDMSpec(found, source="mask id only")
        else:
            facts = block_facts(row, config, name) | edit_tokens(row, config)
            mdm_spec = dataclasses.replace(row, mask_token_id=found, **facts)
    elif mask_token_id is not None:
        mdm_spec = dataclasses.replace(mdm_spec, mask_token_id=mask_token_id)
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is not None and mdm_spec.mask_token_id >= vocab_size:
        raise ValueError(
            f"`mask_token_id` of {name!r} is {mdm_spec.mask_token_id}, outside its vocabulary of {vocab_size} ids. "
            "Pass the right id, or resize the model's embeddings."
        )
    return mdm_spec


def supports_all_masked_input(config) -> bool:
    """Can a model read a row of masks alone? Not ESM with token_dropout: it divides by the share of other tokens."""
    return not getattr(config, "token_dropout", False)


def block_facts(row: MDMSpec, config, name: str) -> dict:
    """What the config of a block-causal checkpoint knows better than its row: how long blocks are, or that none are."""
    if row.attention != "block_causal":
        return {}
    if getattr(config, "cross_attn", True) is False:  # BD3-LM's word for its attention in blocks
        return {"attention": "bidirectional", "block_length": None}
    lengths = [getattr(config, field, None) for field in BLOCK_LENGTH_FIELDS]
    named = re.search(r"-b(\d+)$", name.rstrip("/"))  # SDAR-8B-Chat-b32
    lengths.append(int(named[1]) if named else None)
    return {"block_length": next((length for length in lengths if length is not None), row.block_length)}


def edit_tokens(row: MDMSpec, config) -> dict:
    """`no_content` with the ids that would change the length of a block, which no scheduler of ours acts on."""
    named = [getattr(config, field, None) for field in EDIT_TOKEN_FIELDS]
    vocab_size = getattr(config, "vocab_size", None)
    tokens = dict.fromkeys([*row.no_content, *(token for token in named if token is not None)])
    if vocab_size is not None:
        tokens = [token for token in tokens if isinstance(token, str) or token < vocab_size]
    return {"no_content": tuple(tokens)}
