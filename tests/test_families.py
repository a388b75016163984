"""Every family: a tiny checkpoint under its authors' names gives the logits of the original architecture; refusals.

The checkpoints and the references in plain torch are in family_twins.py; the laws of every family in
test_family_laws.py.
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from family_twins import (
    BAD,
    CHECKPOINTS,
    EOS,
    HEADS,
    INNER,
    LENGTH,
    MASK,
    PAD,
    QWEN_WORDS,
    SOME,
    H,
    V,
    aligned,
    assert_close,
    checkpoint,
    gated_transformer,
    load,
    reference,
    save_qwen,
    some_ids,
    write,
)
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from prism_pipelines import FAMILIES, CheckpointRecipe, MDMSpec, PrismPipeline, QualityHead, resolve_spec
from prism_pipelines.models.families import family_of


def test_every_row_that_calls_itself_tested_is_tested_here():
    tested = {family for family, row in FAMILIES.items() if row.recipe.tested}
    assert set(CHECKPOINTS) == tested, "rows of FAMILIES and twins in CHECKPOINTS of family_twins.py have the same keys"


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_logits_are_those_of_the_reference(family):
    pipe, ids = load(checkpoint(family)), some_ids()
    theirs = reference(family, checkpoint(family), ids)
    assert theirs.std() > 0.1
    assert_close(aligned(pipe, ids), theirs)
    assert aligned(pipe, ids)[..., MASK].isneginf().all()


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_the_spec_that_is_found(family):
    spec = MDMSpec.from_dict(load(checkpoint(family)).config.mdm_spec)
    _, block, shift = CHECKPOINTS[family]
    assert (spec.mask_token_id, spec.block_length, spec.logit_shift) == (MASK, block, shift)
    assert spec.attention == ("block_causal" if block else "bidirectional")


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_a_saved_pipeline_gives_the_same_logits_under_native_names(family, tmp_path):
    pipe, ids = load(checkpoint(family)), some_ids()
    pipe.save_pretrained(tmp_path / "saved")
    again = PrismPipeline.from_pretrained(tmp_path / "saved")
    assert again.config.mdm_spec == pipe.config.mdm_spec
    assert torch.equal(aligned(again, ids), aligned(pipe, ids))
    # transformers reads what was saved by itself, with nothing missing and nothing left over, but for the bias that
    # MDLM's output head has and GPT-NeoX's lacks.
    plain, info = type(pipe.model).from_pretrained(tmp_path / "saved" / "model", output_loading_info=True)
    left = info["unexpected_keys"] - (
        {"lm_head.bias", "embed_out.bias"} if FAMILIES[family].recipe.fold_time else set()
    )
    assert not (left or info["missing_keys"] or info["mismatched_keys"])
    ours = pipe.model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in plain.state_dict().items())
    saved = json.loads((tmp_path / "saved" / "model" / "config.json").read_text())
    assert saved["model_type"] == type(pipe.model).config_class.model_type


def test_a_spec_of_the_users_own_loads_an_unknown_family(tmp_path):
    folder = save_qwen(tmp_path, "theirs", tied=False, biases=False, qk_norm=True)
    facts = {"mask_format": "additive", "extra_inputs": ("position_ids",)}
    spec = MDMSpec(MASK, **facts, recipe=CheckpointRecipe("Qwen3ForCausalLM"))
    pipe = PrismPipeline.from_pretrained(folder, mdm_spec=spec)
    ids, weights = some_ids(), load_file(folder / "model.safetensors")
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    assert_close(aligned(pipe, ids), gated_transformer(weights, QWEN_WORDS, ids, everything, 1e6, 1e-6))


def test_a_soft_cap_on_logits_holds_for_one_token_as_for_all():
    pipe, ids = load(checkpoint("esm_diff")), some_ids(1, 9)
    with torch.no_grad():
        pipe.model.lm_head.decoder.weight.mul_(20)  # far into the cap
        hidden = pipe.denoiser.hidden(ids)[0]
        every = pipe.denoiser.lm_head(hidden)
        tokens = torch.arange(8, 17)
        one = pipe.denoiser.token_logits(hidden, tokens)
    assert 29 < every[:, :MASK].abs().max() <= 30
    torch.testing.assert_close(one, every.gather(1, tokens[:, None])[:, 0])


# --- which row a checkpoint gets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1", "a2d-qwen3:bd3lm"),
        ("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", "a2d-qwen3"),
        ("/home/bd3lm/Qwen3-0.6B-diffusion-mdlm", "a2d-qwen3"),
        ("bd3lm/checkpoint-7/", "a2d-qwen3"),
        ("/cache/models--dllm-hub--Qwen3-0.6B-diffusion-bd3lm-v0.1/snapshots/0123abc", "a2d-qwen3:bd3lm"),
    ],
)
def test_a_word_of_a_row_is_looked_for_in_the_name_of_the_checkpoint_alone(name, row):
    assert family_of(SimpleNamespace(model_type="a2d-qwen3"), name) is FAMILIES[row]


def test_an_architecture_tells_two_models_of_one_type_apart():
    moe = SimpleNamespace(model_type="llada", architectures=["LLaDAMoEModelLM"], vocab_size=157184)
    assert resolve_spec(moe, name="here").recipe.native_class == "Qwen3MoeForCausalLM"
    assert resolve_spec(moe, name="here").mask_token_id == 156895
    dense = SimpleNamespace(model_type="llada", architectures=["LLaDAModelLM"])
    assert family_of(dense, "here") is FAMILIES["llada"]
    assert family_of(SimpleNamespace(model_type="llama"), "meta-llama/Llama-2-7b") is None


def test_models_of_a_shared_type_are_told_apart_or_not_guessed(tmp_path):
    """Two published families are of model_type llama with mask 5 and 811; a Dream may be shifted or not."""
    coder = {"model_type": "llama", "architectures": ["StableDiffcoderForCausalLM"], "vocab_size": 155136}
    spec = resolve_spec(SimpleNamespace(**coder), name="run7")
    assert (spec.mask_token_id, spec.block_length, spec.logit_shift) == (5, 4, 0)
    with pytest.raises(ValueError, match="No mask token is known for 'run7'"):
        resolve_spec(SimpleNamespace(model_type="llama", architectures=["LlamaForCausalLM"]), name="run7")
    reasoner = SimpleNamespace(model_type="Dream", block_size=32, mask_token_id=151669, vocab_size=151936)
    spec = resolve_spec(reasoner, name="Dream-org/DreamReasoner-8B")
    assert (spec.recipe.native_class, spec.logit_shift, spec.block_length) == ("Qwen3ForCausalLM", 0, 32)
    illada = resolve_spec(SimpleNamespace(model_type="illada", vocab_size=155136))
    assert (illada.mask_token_id, illada.attention) == (5, "bidirectional")


def test_ids_that_would_change_the_length_of_a_block_are_not_written(tmp_path):
    flash = SimpleNamespace(model_type="llada2_moe", vocab_size=157184)
    assert resolve_spec(flash, name="inclusionAI/LLaDA2.2-flash").no_content == (156930, 156931)
    assert resolve_spec(flash, name="inclusionAI/LLaDA2.0-mini").no_content == ()
    named = SimpleNamespace(model_type="llada2_moe", vocab_size=157184, delete_token_id=7, split_token_id=9)
    assert resolve_spec(named, name="here").no_content == (7, 9)
    pipe = load(with_config("llada2_moe", tmp_path, delete_token_id=BAD, split_token_id=9))
    for token, allowed in ((BAD, None), (BAD, BAD), (9, None)):
        pipe.model.lm_head.register_forward_hook(
            lambda module, args, out, token=token: out.index_fill(-1, torch.tensor([token]), 1e4)
        )
        out = pipe(input_ids=torch.full((1, 2), 20), gen_length=6, num_inference_steps=2, allow_tokens=allowed)
        assert (token in out.sequences) == (allowed == token)
        pipe.model.lm_head._forward_hooks.clear()


def test_the_config_knows_the_length_of_its_blocks():
    facts = {"model_type": "sdar", "mask_token_id": 5, "vocab_size": 40}
    assert resolve_spec(SimpleNamespace(**facts)).block_length == 4
    assert resolve_spec(SimpleNamespace(**facts, block_size=16)).block_length == 16
    assert resolve_spec(SimpleNamespace(**facts), name="JetLM/SDAR-8B-Chat-b32").block_length == 32
    assert resolve_spec(SimpleNamespace(**facts, block_size=16), name="SDAR-8B-Chat-b32").block_length == 16
    with pytest.raises(ValueError, match="`block_length` of a block-causal model"):
        resolve_spec(SimpleNamespace(**facts, block_size="16"))
    plain = resolve_spec(SimpleNamespace(model_type="bd3lm", cross_attn=False, block_size=1024))
    assert (plain.attention, plain.block_length) == ("bidirectional", None)
    unblocked = resolve_spec(SimpleNamespace(model_type="Dream", mask_token_id=5, block_size=32))
    assert unblocked.block_length is None


def test_the_vocabulary_is_counted_where_the_config_has_it_wrong():
    folder = checkpoint("gpt2:diffugpt-m")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] < MASK
    assert load(folder).model.config.vocab_size == V


def with_config(family, folder, **changed):
    """The checkpoint of a family with other fields in its config; None takes a field out."""
    config = json.loads((checkpoint(family) / "config.json").read_text()) | changed
    config = {name: value for name, value in config.items() if value is not None}
    return write(folder, config, load_file(checkpoint(family) / "model.safetensors"))


def test_end_and_padding_tokens_of_a_native_class_are_not_taken_for_those_of_the_model(tmp_path):
    for folder in (checkpoint("mdlm"), with_config("llada", tmp_path, eos_token_id=None, pad_token_id=None)):
        model = load(folder).model
        assert model.config.eos_token_id is model.config.bos_token_id is model.config.pad_token_id is None
        assert model.generation_config.eos_token_id is None
    assert load(checkpoint("llada")).model.config.eos_token_id == EOS


def test_llada_may_give_its_vocabulary_by_either_name(tmp_path):
    pipe, ids = load(with_config("llada", tmp_path, embedding_size=None)), some_ids()
    assert_close(aligned(pipe, ids), reference("llada", checkpoint("llada"), ids))


def test_untested_specs_say_so_and_remote_code_is_not_run(tmp_path):
    config = {"model_type": "novel", "vocab_size": V, "auto_map": {"AutoModel": "modeling.Model"}}
    write(tmp_path, config, {"x": torch.zeros(1)})
    spec = MDMSpec(MASK, recipe=CheckpointRecipe(tested=False))
    with pytest.warns(UserWarning, match="no test compares"), pytest.raises(ValueError, match="trust_remote_code=True"):
        PrismPipeline.from_pretrained(tmp_path, mdm_spec=spec)


# --- how it is loaded -------------------------------------------------------------------------------------------------


def in_two_files(folder, out):
    """The same checkpoint with its weights in two files and an index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, out / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


@pytest.mark.parametrize("family", ["llada", "gpt2:diffugpt-m", "esm", "mdlm"])
def test_weights_in_two_files_in_a_subfolder(family, tmp_path):
    inner = tmp_path / f"tiny-{family.replace(':', '-')}" / "a" / "b"
    inner.mkdir(parents=True)
    in_two_files(checkpoint(family), inner)
    ids = some_ids()
    pipe = load(inner.parent.parent, subfolder="a/b")
    assert_close(aligned(pipe, ids), reference(family, checkpoint(family), ids))
    with pytest.raises(OSError, match=r"has no a/c/config\.json"):
        load(inner.parent.parent, subfolder="a/c")


@pytest.mark.parametrize("family", ["llada", "Dream", "esm"])
def test_a_device_map_changes_nothing(family):
    ids = some_ids()
    assert_close(aligned(load(checkpoint(family), device_map="cpu"), ids), aligned(load(checkpoint(family)), ids))


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_lora_at_the_targets_of_the_row_is_saved_and_comes_back(family, tmp_path):
    pipe, ids = load(checkpoint(family)), some_ids()
    before = aligned(pipe, ids)
    targets = list(pipe.denoiser.spec.lora_targets)
    torch.manual_seed(0)
    pipe.model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "prism")
    after = aligned(pipe, ids)
    assert (after - before)[..., :MASK].abs().max() > 1e-3
    pipe.save_pretrained(tmp_path)
    assert_close(aligned(PrismPipeline.from_pretrained(tmp_path), ids), after)


@pytest.mark.parametrize("family", ["llada", "mdlm", "bert"])
def test_the_dtype_may_be_named_and_must_be_floating(family):
    assert load(checkpoint(family), torch_dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(checkpoint(family), dtype="auto").model.dtype == torch.float32
    for wrong in (torch.int8, "float33", 3):
        with pytest.raises(ValueError, match="`torch_dtype` must be a floating-point dtype"):
            load(checkpoint(family), torch_dtype=wrong)


@pytest.mark.parametrize("family", ["llada", "Dream", "esm"])
def test_a_quantization_config_reaches_transformers(family, monkeypatch):
    native = getattr(transformers, FAMILIES[family].recipe.native_class)
    given = {}

    def stop(path, **options):
        given.update(options)
        raise RuntimeError("seen")

    monkeypatch.setattr(native, "from_pretrained", stop)
    wish = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(RuntimeError, match="seen"):
        load(checkpoint(family), quantization_config=wish, device_map="auto")
    assert given["quantization_config"] is wish and given["device_map"] == "auto"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_causal_model_by_mistake(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=INNER
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="No mask token is known"):
        PrismPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a masked language model of transformers"):
        PrismPipeline.from_pretrained(tmp_path, mask_token_id=MASK)
    with pytest.raises(ValueError, match="is causal: its first position"):
        PrismPipeline.from_pretrained(tmp_path, mdm_spec=MDMSpec(MASK))
    additive = MDMSpec(MASK, mask_format="additive")
    PrismPipeline.from_pretrained(tmp_path, mdm_spec=additive)


@pytest.mark.parametrize(
    ("family", "changed", "says"),
    [
        ("esm", {"dplm_type": "dplm2_esm"}, "dplm_type 'dplm2_esm'"),
        ("mdlm", {"time_conditioning": True}, "time_conditioning True"),
        ("bd3lm", {"causal": True}, "causal True"),
        ("llada", {"attention_layer_norm": True}, "attention_layer_norm True"),
        ("llada", {"input_emb_norm": True}, "input_emb_norm True"),
        ("llada", {"block_type": "sequential"}, "block_type 'sequential'"),
        ("llada:moe", {"clip_qkv": 8.0}, r"clip_qkv 8\.0"),
        ("llada:moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size 8"),
        ("llada2_moe", {"norm_head": True}, "norm_head True"),
        ("llada2_moe:llada2.2", {"expert_capacity": 4}, "expert_capacity 4"),
        ("illada", {"layer_norm_eps": 1e-5}, r"layer_norm_eps 1e-05"),
        ("illada", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("Dream", {"block_size": 32}, "block_size 32"),
    ],
)
def test_a_relative_of_a_family_that_is_something_else(family, changed, says, tmp_path):
    folder = tmp_path / checkpoint(family).name  # the name tells some rows apart
    with pytest.raises(ValueError, match=says):
        load(with_config(family, folder, **changed))


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("wedlm", "reads causally"),
        ("diffusion_gemma", "random tokens"),
        ("udlm", "random tokens"),
        ("duo", "random tokens"),
        ("nemotron_labs_diffusion", "finished text causally"),
    ],
)
def test_a_model_that_is_refused_by_name_says_why(model_type, says, tmp_path):
    folder = with_config("sdar", tmp_path, model_type=model_type)
    with pytest.raises(ValueError, match=f"model_type '{model_type}'.*{says}"):
        load(folder)
    assert load(folder, mdm_spec=FAMILIES["sdar"]).spec.block_length == 4
    with pytest.raises(ValueError, match=says):
        resolve_spec(SimpleNamespace(model_type=model_type, mask_token_id=3, vocab_size=V))


def test_the_mask_id_is_read_under_the_checkpoints_own_name(tmp_path, monkeypatch):
    row = FAMILIES["llada"]
    mapping = row.recipe.config_mapping | {"mask_token_id": "blank_id"}
    named = dataclasses.replace(row, recipe=dataclasses.replace(row.recipe, config_mapping=mapping))
    monkeypatch.setitem(FAMILIES, "llada", named)
    folder = with_config("llada", tmp_path, blank_id=MASK - 1, mask_token_id=None)
    assert load(folder, mask_token_id=None).spec.mask_token_id == MASK - 1


def test_who_passes_a_spec_knows_better_than_the_config(tmp_path):
    folder = with_config("Dream", tmp_path, block_size=32)
    assert load(folder, mdm_spec=FAMILIES["Dream"]).config.mdm_spec["logit_shift"] == 1


@pytest.mark.parametrize("kept", [("lm_head",), ("embed_tokens", "lm_head")])
def test_a_diffugpt_whose_embeddings_are_saved_under_its_head(kept, tmp_path):
    """They are one tensor, and safetensors keeps one of its names, or both if they were cloned."""
    weights = load_file(checkpoint("gpt2:diffugpt-m") / "model.safetensors")
    shared = weights.pop("embed_tokens.weight")
    weights |= {f"{name}.weight": shared.clone() for name in kept}
    config = json.loads((checkpoint("gpt2:diffugpt-m") / "config.json").read_text())
    folder = write(tmp_path / "tiny-diffugpt-m", config, weights)
    ids = some_ids()
    assert_close(aligned(load(folder), ids), reference("gpt2:diffugpt-m", checkpoint("gpt2:diffugpt-m"), ids))


def test_weights_without_a_place_are_named(tmp_path):
    weights = load_file(checkpoint("llada") / "model.safetensors")
    config = json.loads((checkpoint("llada") / "config.json").read_text())
    write(tmp_path, config, weights | {"model.transformer.blocks.0.q_norm.weight": torch.ones(H)})
    with pytest.warns(UserWarning, match=r"1 weights of .* are not used by LlamaForCausalLM, such as .*q_norm"):
        load(tmp_path)


def test_bd3lm_without_modulation_by_time(tmp_path):
    """`adaln=False` is a modulation by the constants shift 0, scale 0, gate 1, which the reference gets as weights."""
    config = json.loads((checkpoint("bd3lm") / "config.json").read_text())
    weights = load_file(checkpoint("bd3lm") / "model.safetensors")
    for name in weights:
        if "adaLN_modulation" in name:
            gates = torch.zeros_like(weights[name])
            if name.endswith("bias") and "blocks" in name:
                gates[2 * H : 3 * H] = gates[5 * H :] = 1
            weights[name] = gates
    (tmp_path / "plain").mkdir()
    write(tmp_path / "modulated", config, weights)
    left_out = ("adaLN_modulation", "sigma_map")
    plain = {name: value for name, value in weights.items() if not any(word in name for word in left_out)}
    write(tmp_path / "plain", config | {"adaln": False}, plain)
    ids = some_ids()
    assert_close(aligned(load(tmp_path / "plain"), ids), reference("bd3lm", tmp_path / "modulated", ids))


def test_weights_quantized_under_names_of_their_own_are_refused(tmp_path):
    quantized = with_config("llada", tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="pass quantization_config= to quantize it here"):
        load(quantized)


def test_esm_refuses_a_row_of_masks_alone():
    pipe = load(checkpoint("esm"))
    with pytest.raises(ValueError, match="nothing but masks"):
        pipe(gen_length=5, num_inference_steps=2)
    padded = torch.tensor([[PAD, MASK, MASK], [9, MASK, MASK]])
    with pytest.raises(ValueError, match="nothing but masks"):
        pipe.denoiser.hidden(padded, (padded != PAD).long())


def test_a_bidirectional_model_that_calls_itself_block_causal():
    encoder = MDMSpec(MASK, mask_format="padding").to_dict()
    with pytest.raises(ValueError, match="block-causal model needs mask_format"):
        load(checkpoint("bert"), mdm_spec=encoder | {"attention": "block_causal", "block_length": 4})


def test_a_missing_or_impossible_mask_id(tmp_path):
    with pytest.raises(ValueError, match=r"`mask_token_id` of .* is 151669, outside its vocabulary of 40"):
        PrismPipeline.from_pretrained(checkpoint("sdar"))
    unknown = json.loads((checkpoint("bert") / "config.json").read_text()) | {"model_type": "new"}
    del unknown["mask_token_id"]
    write(tmp_path, unknown, load_file(checkpoint("bert") / "model.safetensors"))
    with pytest.raises(ValueError, match=r"No mask token is known .* Pass mask_token_id=<id> or mdm_spec"):
        PrismPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mask_token_id"):
        resolve_spec(transformers.BertConfig(vocab_size=V), mask_token_id=-1)


@pytest.mark.parametrize("family", SOME)
def test_a_head_of_another_size_or_base(family):
    with pytest.raises(ValueError, match=r"made for hidden size 64 .* has 32"):
        load(checkpoint(family), quality_head=QualityHead(64, base_model="some/base"))
    pipe = load(checkpoint(family))
    pipe.model.config._name_or_path = "GSAI-ML/LLaDA-8B-Base"
    with pytest.raises(ValueError, match=r"made for 'GSAI-ML/LLaDA-1\.5', and the model is 'GSAI-ML/LLaDA-8B-Base'"):
        pipe.load_quality_head(QualityHead(H, base_model="GSAI-ML/LLaDA-1.5"))
    assert pipe.quality_head is None
    pipe._revision = "v2"
    with pytest.warns(UserWarning, match="made for revision 'v1', and the model has revision 'v2'"):
        pipe.load_quality_head(QualityHead(H, base_model="GSAI-ML/LLaDA-8B-Base", base_revision="v1"))


@pytest.mark.parametrize("family", ["llada", "sdar", "mdlm", "bert"])
def test_pickled_weights_are_refused(family, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint(family) / "config.json").read_text())
    torch.save(load_file(checkpoint(family) / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"pickle.* Convert it: prism convert "):
        load(tmp_path)


@pytest.mark.parametrize("family", ["llada", "mdlm", "sdar"])
def test_weights_that_are_missing_or_of_another_shape_are_named(family, tmp_path):
    config = json.loads((checkpoint(family) / "config.json").read_text())
    weights = load_file(checkpoint(family) / "model.safetensors")
    lost = next(name for name in weights if "attn_out" in name or "o_proj" in name)
    write(tmp_path, config, {name: value for name, value in weights.items() if name != lost})
    with pytest.raises(ValueError, match=r"attn_out|o_proj"):
        load(tmp_path)
    write(tmp_path, config, weights | {lost: torch.randn(H, 2 * H)})
    with pytest.raises(ValueError, match=r"attn_out|o_proj|attention\.dense"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["llada", "bert"])
def test_attention_and_memory_settings_reach_the_model(family, monkeypatch, tmp_path):
    assert load(checkpoint(family), attn_implementation="eager").model.config._attn_implementation == "eager"
    kind, seen = type(load(checkpoint(family)).model), {}
    real = kind.from_pretrained.__func__

    def from_pretrained(cls, path, **options):
        seen.update({name: options.pop(name, None) for name in ("max_memory", "offload_folder")})
        return real(cls, path, **options)

    monkeypatch.setattr(kind, "from_pretrained", classmethod(from_pretrained))
    load(checkpoint(family), max_memory={"cpu": "1GiB"}, offload_folder=str(tmp_path))
    assert seen == {"max_memory": {"cpu": "1GiB"}, "offload_folder": str(tmp_path)}


def test_kernels_that_read_no_additive_mask_are_refused():
    with pytest.raises(ValueError, match="`attn_implementation` is 'flash_attention_2', which takes no additive mask"):
        load(checkpoint("llada"), attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="`attn_implementation` is not supported for MDLM"):
        load(checkpoint("mdlm"), attn_implementation="sdpa")
