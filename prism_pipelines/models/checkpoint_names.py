"""How checkpoints name their weights and config fields, and which config values a class of transformers can run."""

LLADA_KEYS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.q_proj\.": r"model.layers.\1.self_attn.q_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.k_proj\.": r"model.layers.\1.self_attn.k_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.v_proj\.": r"model.layers.\1.self_attn.v_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_out\.": r"model.layers.\1.self_attn.o_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.up_proj\.": r"model.layers.\1.mlp.up_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_out\.": r"model.layers.\1.mlp.down_proj.",
}
LLADA_CONFIG = {
    "vocab_size": "embedding_size",
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "weight_tying",
    "attention_bias": "include_qkv_bias",
    "mask_token_id": "mask_token_id",
    "pad_token_id": "pad_token_id",
    "eos_token_id": "eos_token_id",
}
# Words that several configs share with the native ones.
_SAME_WORDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "mask_token_id",
    "pad_token_id",
    "eos_token_id",
)
LLADA_MOE_CONFIG = {name: name for name in (*_SAME_WORDS, "num_experts", "attention_bias")} | {
    "moe_intermediate_size": "expert_intermediate_size",
}
LLADA2_KEYS = {
    r"^model\.word_embeddings\.": "model.embed_tokens.",
    r"\.attention\.query_key_value\.": ".self_attn.query_key_value.",
    r"\.attention\.query_layernorm\.": ".self_attn.q_norm.",
    r"\.attention\.key_layernorm\.": ".self_attn.k_norm.",
    r"\.attention\.dense\.": ".self_attn.o_proj.",
    r"\.mlp\.gate\.expert_bias$": ".mlp.gate.e_score_correction_bias",
}
LLADA2_CONFIG = {
    name: name
    for name in (
        *_SAME_WORDS,
        "intermediate_size",
        "moe_intermediate_size",
        "first_k_dense_replace",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "head_dim",
        "partial_rotary_factor",
        "use_qk_norm",
    )
} | {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts", "attention_bias": "use_qkv_bias"}
MDLM_CONFIG = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_dim",
    "num_hidden_layers": "n_blocks",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "model_length",
}


# DiffuGPT and DiffuLLaMA were saved from a wrapper that held the embeddings outside the model.
DIFFUGPT_KEYS = {r"^denoise_model\.": "transformer.", r"^embed_tokens\.": "transformer.wte."}
DIFFULLAMA_KEYS = {r"^denoise_model\.": "model.", r"^embed_tokens\.": "model.embed_tokens."}
DSM_CONFIG = {
    name: name
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "layer_norm_eps",
        "position_embedding_type",
        "emb_layer_norm_before",
        "token_dropout",
        "mask_token_id",
        "pad_token_id",
    )
}

# --- config values that the native class has built in (`CheckpointRecipe.hardcoded_config`) ---------------------------

LLADA_HARDCODED = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "rope": (True,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
}
LLADA_MOE_HARDCODED = {
    "clip_qkv": (None,),
    "qk_layernorm": (True,),
    "partial_rotary_factor": (1,),
    "shared_expert_intermediate_size": (None,),
    "moe_router_enable_expert_bias": (False, None),
}
ILLADA_HARDCODED = {
    "layer_norm_eps": (None,),  # with a value, it would have other norms
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
}
LLADA2_HARDCODED = {
    "norm_head": (False,),
    "use_bias": (False,),
    "expert_capacity": (None,),  # LLaDA2.2 chooses experts for a whole block; the native class chooses for each token
}
# DreamReasoner has the model_type of Dream: a copy of it under another name has a block size.
DREAM_HARDCODED = {"block_size": (None,)}
MDLM_HARDCODED = {"time_conditioning": (False, None)}
BD3LM_HARDCODED = {"time_conditioning": (False, None), "causal": (False, None)}
