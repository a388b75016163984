"""The user's own LoRA beside that of a quality head; what is saved is the model in use; hostile files are refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from family_twins import MASK, checkpoint, load
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_pipeline import twin
from test_pipeline_heads import save_base, save_head, tokens

from prism_pipelines import PrismPipeline, QualityHead
from prism_pipelines.hub.adapters import active_adapters, adapter_names
from prism_pipelines.hub.fingerprints import portable_fingerprint, signs_fingerprint, weights_fingerprint
from prism_pipelines.hub.publish import save_head_repo

IDS = torch.full((1, 6), 2)


def save_lora(folder, base, seed, **config):
    """A plain PEFT adapter, no head."""
    torch.manual_seed(seed)
    model = get_peft_model(twin(), LoraConfig(r=2, target_modules=["query", "key"], init_lora_weights=False, **config))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def repos(tmp_path):
    base = save_base(tmp_path / "base")
    return base, save_head(tmp_path / "head", base, 1, num_remask=2), save_lora(tmp_path / "sft", base, 5)


def logits(pipe, ids=IDS):
    with torch.no_grad():
        return pipe.model(ids).logits


def both(base, *adapters):
    """Logits of a base with several adapters at once, by PEFT alone."""
    model = PeftModel.from_pretrained(PrismPipeline.from_pretrained(base).model, adapters[0], adapter_name="x0")
    for i, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, adapter_name=f"x{i}")
    model.base_model.set_adapter([f"x{i}" for i in range(len(adapters))])
    with torch.no_grad():
        return model.eval()(IDS).logits


# --- side by side -----------------------------------------------------------------------------------------------------


def test_an_adapter_of_the_user_and_of_the_head_act_together_in_either_order_and_are_saved_together(repos, tmp_path):
    base, head, sft = repos
    expected = both(base, sft, head)
    pipe = PrismPipeline.from_pretrained(base)
    pipe.load_lora_weights(sft, adapter_name="mine")
    torch.testing.assert_close(logits(pipe), both(base, sft))
    pipe.load_quality_head(head)
    torch.testing.assert_close(logits(pipe), expected)
    other = PrismPipeline.from_pretrained(base, quality_head=head)
    other.load_lora_weights(sft)
    torch.testing.assert_close(logits(other), expected)
    pipe.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved" / "model").glob("*.safetensors"))  # the base is named, not copied
    back = PrismPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(back), logits(pipe)) and torch.equal(tokens(back), tokens(pipe))
    assert sorted(active_adapters(back.model)) == ["mine", "prism"]
    back.unload_quality_head("prism")
    torch.testing.assert_close(logits(back), both(base, sft))
    back.unload_lora_weights("mine")
    torch.testing.assert_close(logits(back), logits(PrismPipeline.from_pretrained(base)))
    assert adapter_names(back.model) == []


def test_an_adapter_that_is_switched_off_stays_so_through_saving(repos, tmp_path):
    base, head, sft = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=head)
    alone = logits(pipe)
    pipe.load_lora_weights(sft, adapter_name="mine")
    pipe.model.set_adapter(["prism"])
    pipe.save_pretrained(tmp_path / "saved")
    back = PrismPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(back), alone) and adapter_names(back.model) == ["mine", "prism"]


def test_a_pipeline_around_a_peft_model_generates_saves_and_takes_a_head(repos, tmp_path):
    base, head, sft = repos
    plain = PrismPipeline.from_pretrained(base)
    pipe = PrismPipeline(PeftModel.from_pretrained(plain.model, sft, adapter_name="mine"), plain.tokenizer)
    torch.testing.assert_close(logits(pipe), both(base, sft))
    pipe.save_pretrained(tmp_path / "saved")
    back = PrismPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(back), logits(pipe)) and active_adapters(back.model) == ["mine"]
    pipe.load_quality_head(head)
    torch.testing.assert_close(logits(pipe), both(base, sft, head))
    with pytest.raises(ValueError, match="is a IA3"):
        other = IA3Config(target_modules=["query"], feedforward_modules=[])
        PrismPipeline(get_peft_model(twin(), other), plain.tokenizer)


def test_fused_adapters_give_the_same_and_are_saved_in_the_weights(repos, tmp_path):
    base, head, sft = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=head)
    pipe.load_lora_weights(sft, adapter_name="mine")
    before = logits(pipe)
    pipe.fuse_lora(safe_fusing=True)
    torch.testing.assert_close(logits(pipe), before)
    with pytest.raises(ValueError, match=r"fused into the weights.*unfuse_lora"):
        pipe.load_lora_weights(sft, adapter_name="another")
    pipe.save_pretrained(tmp_path / "fused")
    assert not list((tmp_path / "fused").rglob("adapter*"))
    back = PrismPipeline.from_pretrained(tmp_path / "fused")
    assert torch.equal(logits(back), logits(pipe)) and adapter_names(back.model) == []
    pipe.unfuse_lora()
    torch.testing.assert_close(logits(pipe), before)
    with pytest.raises(ValueError, match="No adapter is fused"):
        pipe.unfuse_lora()
    with pytest.raises(ValueError, match="fused all together"):
        pipe.fuse_lora(adapter_names=["mine"])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(logits(pipe), before)
    assert adapter_names(pipe.model) == []
    tokens(pipe)  # the head goes on with the weights that its adapter is part of
    scaled = PrismPipeline.from_pretrained(base)
    scaled.load_lora_weights(sft)
    scaled.fuse_lora(lora_scale=0.0)
    torch.testing.assert_close(logits(scaled), logits(PrismPipeline.from_pretrained(base)))
    scaled.unfuse_lora()
    torch.testing.assert_close(logits(scaled), both(base, sft))


def test_a_dora_adapter_acts_as_in_peft_and_is_switched_and_saved(repos, tmp_path):
    base = repos[0]
    dora = save_lora(tmp_path / "dora", base, 6, use_dora=True)
    pipe = PrismPipeline.from_pretrained(base)
    plain = logits(pipe)
    pipe.load_lora_weights(dora)
    torch.testing.assert_close(logits(pipe), both(base, dora))
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(PrismPipeline.from_pretrained(tmp_path / "saved")), logits(pipe))
    pipe.unload_lora_weights()
    assert torch.equal(logits(pipe), plain)


def test_rows_for_new_tokens_are_refused_with_the_reason(repos, tmp_path):
    base, _, sft = repos
    weights = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    embeddings = {"base_model.model.embeddings.word_embeddings.weight": torch.zeros(20, 32)}
    save_file(weights | embeddings, tmp_path / "sft" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"word_embeddings.*rows for new tokens.*Merge it"):
        PrismPipeline.from_pretrained(base).load_lora_weights(sft)


def authors_lora(folder, rank=2):
    """A LoRA of LLaDA under its authors' module names, and the changes it makes to their weights."""
    generator = torch.Generator().manual_seed(3)
    names = ("q_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    base, weights, delta = load_file(checkpoint("llada") / "model.safetensors"), {}, {}
    for key, value in base.items():
        module = key.removesuffix(".weight")
        if ".blocks." in key and module.endswith(names):
            a = torch.randn(rank, value.shape[1], generator=generator) / 8
            b = torch.randn(value.shape[0], rank, generator=generator) / 8
            weights[f"base_model.model.{module}.lora_A.weight"] = a
            weights[f"base_model.model.{module}.lora_B.weight"] = b
            alpha = 8 if module.endswith("attn_out") else 4
            delta[key] = b @ a * alpha / rank
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "alpha_pattern": {"attn_out": 8}}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(names)}))
    return {name: value + delta.get(name, 0) for name, value in base.items()}


def merged(family, weights, folder):
    """The twin of a family with these weights in its checkpoint."""
    shutil.copytree(checkpoint(family), folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return load(folder)


def test_an_adapter_under_the_authors_names_of_llada_is_mapped(tmp_path):
    weights = authors_lora(tmp_path / "lora")
    expected, pipe = merged("llada", weights, tmp_path / "merged"), load(checkpoint("llada"))
    ids = torch.tensor([[3, MASK, 5, 9]])
    pipe.load_lora_weights(str(tmp_path / "lora"))
    torch.testing.assert_close(logits(pipe, ids), logits(expected, ids), atol=1e-5, rtol=1e-5)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(PrismPipeline.from_pretrained(tmp_path / "saved"), ids), logits(pipe, ids))


@pytest.mark.parametrize("family", ["mdlm", "bd3lm"])
def test_an_adapter_under_the_authors_names_of_mdlm_is_put_in_order_and_gated(family, tmp_path):
    base, generator, weights = load_file(checkpoint(family) / "model.safetensors"), torch.Generator().manual_seed(3), {}
    names = ("attn_qkv", "attn_out", "mlp.0", "mlp.2")
    for key, value in list(base.items()):
        module = key.removesuffix(".weight")
        if ".blocks." in key and module.endswith(names) and value.ndim == 2:
            a = torch.randn(2, value.shape[1], generator=generator) / 8
            b = torch.randn(value.shape[0], 2, generator=generator) / 8
            weights |= {f"base_model.model.{module}.lora_{x}.weight": y for x, y in (("A", a), ("B", b))}
            base[key] = value + b @ a * 4 / 2
    lora, ids = tmp_path / "lora", torch.tensor([[3, MASK, 5, 9]])
    lora.mkdir()
    save_file(weights, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(names)}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    pipe, expected = load(checkpoint(family)), logits(merged(family, base, tmp_path / "merged"), ids)
    plain = logits(pipe, ids)
    pipe.load_lora_weights(str(lora))
    assert not torch.allclose(plain, expected, atol=1e-2)
    torch.testing.assert_close(logits(pipe, ids), expected, atol=1e-4, rtol=1e-4)
    pipe.save_pretrained(tmp_path / "saved")
    saved = PrismPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(saved, ids), logits(pipe, ids))
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match=r"saved from this package.*authors' own checkpoint"):
        PrismPipeline.from_pretrained(tmp_path / "native").load_lora_weights(str(lora))


def test_an_adapter_of_a_layer_that_is_cut_here_is_cut_too(tmp_path):
    base = load_file(checkpoint("llada2_moe") / "model.safetensors")
    generator, weights = torch.Generator().manual_seed(3), {}
    for key, value in list(base.items()):
        if key.endswith("query_key_value.weight"):
            a, b = torch.randn(2, value.shape[1], generator=generator), torch.randn(len(value), 2, generator=generator)
            weights[f"base_model.model.{key.removesuffix('weight')}lora_A.weight"] = a
            weights[f"base_model.model.{key.removesuffix('weight')}lora_B.weight"] = b / 8
            base[key] = value + b @ a / 8 * 4 / 2
    (tmp_path / "lora").mkdir()
    save_file(weights, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query_key_value"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    expected, pipe = merged("llada2_moe", base, tmp_path / "merged"), load(checkpoint("llada2_moe"))
    pipe.load_lora_weights(str(tmp_path / "lora"))
    ids = torch.tensor([[3, MASK, 5, 9]])
    torch.testing.assert_close(logits(pipe, ids), logits(expected, ids), atol=1e-5, rtol=1e-5)


def test_loading_adapters_prints_no_false_report(repos, caplog, capfd):
    base, head, sft = repos
    with caplog.at_level(logging.WARNING):
        pipe = PrismPipeline.from_pretrained(base, quality_head=head)
        pipe.load_lora_weights(sft)
    assert "LOAD REPORT" not in caplog.text + capfd.readouterr().err and "newly" not in caplog.text


# --- what is saved is the model in use --------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", ["weights", "rows"])
def test_a_model_that_is_not_its_base_any_more_is_saved_whole(repos, tmp_path, edit):
    base, head, sft = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=head)
    pipe.load_lora_weights(sft, adapter_name="mine")
    if edit == "weights":
        with torch.no_grad():
            pipe.model.get_submodule("roberta_prelayernorm.encoder.layer.1.output.dense").weight.mul_(1.5)
    else:
        pipe.model.resize_token_embeddings(pipe.model.config.vocab_size + 3, mean_resizing=False)
    with pytest.warns(UserWarning, match="saved whole"):
        pipe.save_pretrained(tmp_path / "saved")
    back = PrismPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(back), logits(pipe)) and back.model.config.vocab_size == pipe.model.config.vocab_size
    assert sorted(active_adapters(back.model)) == ["mine", "prism"]
    with pytest.warns(UserWarning, match="saved whole"):
        back.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PrismPipeline.from_pretrained(tmp_path / "again")), logits(pipe))


def test_a_head_on_a_descendant_of_its_base_says_so_and_is_not_pushed_under_the_ancestors_name(repos, tmp_path):
    base, head, sft = repos
    tuned = PrismPipeline.from_pretrained(base, quality_head=head)
    save_head_repo(tuned, tmp_path / "repo", base_model=base)
    descendant = PrismPipeline.from_pretrained(base)
    descendant.load_lora_weights(sft)
    descendant.fuse_lora()
    descendant.unload_lora_weights()
    descendant.save_pretrained(tmp_path / "descendant")
    with pytest.warns(UserWarning, match="made for other weights"):
        pipe = PrismPipeline.from_pretrained(tmp_path / "descendant", quality_head=str(tmp_path / "repo"))
    pipe.save_pretrained(tmp_path / "saved")
    back = PrismPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(back), logits(pipe))
    with pytest.raises(ValueError, match=r"model in use has other weights.*pass `base_model`"):
        save_head_repo(pipe, tmp_path / "other")
    with pytest.warns(UserWarning, match=r"\['default'\] are in use"):
        tuned.load_lora_weights(sft)
        save_head_repo(tuned, tmp_path / "third", base_model=base)


def test_a_base_that_changed_since_the_pipeline_was_saved_is_noticed(repos, tmp_path):
    base, head, _ = repos
    PrismPipeline.from_pretrained(base, quality_head=head).save_pretrained(tmp_path / "saved")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.0.output.dense.weight"))
    save_file(weights | {name: weights[name] + 1}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="other weights of its base model"):
        PrismPipeline.from_pretrained(tmp_path / "saved")


def test_another_base_is_noticed_in_float16_too(repos, tmp_path):
    base, head, _ = repos
    tuned, half = tmp_path / "tuned", {"dtype": torch.float16}
    shutil.copytree(base, tuned)
    weights = load_file(tuned / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    save_file(weights | {name: -weights[name]}, tuned / "model.safetensors", metadata={"format": "pt"})
    config = tmp_path / "head" / "quality_head" / "config.json"
    marks = {"signs_fingerprint": signs_fingerprint(PrismPipeline.from_pretrained(base).model)}
    config.write_text(json.dumps(json.loads(config.read_text()) | marks))
    PrismPipeline.from_pretrained(base, quality_head=head, **half)
    with pytest.warns(UserWarning, match="made for other weights"):
        PrismPipeline.from_pretrained(tuned, quality_head=head, **half)
    PrismPipeline.from_pretrained(base, quality_head=head, **half).save_pretrained(tmp_path / "saved")
    PrismPipeline.from_pretrained(tmp_path / "saved", **half)
    save_file(load_file(tuned / "model.safetensors"), Path(base) / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="other weights of its base model"):
        PrismPipeline.from_pretrained(tmp_path / "saved", **half)


def test_a_fingerprint_is_the_same_in_bfloat16_and_with_adapters_and_differs_for_every_weight(repos):
    base, head, _ = repos
    model = PrismPipeline.from_pretrained(base).model
    mark = weights_fingerprint(model)
    assert portable_fingerprint(PrismPipeline.from_pretrained(base, quality_head=head).model) == mark
    assert portable_fingerprint(PrismPipeline.from_pretrained(base, dtype=torch.bfloat16).model) == mark
    half = PrismPipeline.from_pretrained(base, dtype=torch.float16).model
    assert portable_fingerprint(half) is None
    embedding, whole = signs_fingerprint(model).split("-")
    assert signs_fingerprint(half) == f"{embedding}-{whole}"
    half.hf_quantizer = object()  # quantized weights have no signs; embeddings are kept
    assert signs_fingerprint(half) == f"{embedding}-"
    for parameter in model.parameters():
        kept = parameter.detach().clone()
        parameter.data += 1
        assert weights_fingerprint(model) != mark
        parameter.data.copy_(kept)
    assert weights_fingerprint(model) == mark


# --- hostile files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 10**9}, "does not fit its config.json"),
        ({"hidden_size": -3}, "`hidden_size` must be an integer of at least 1, got -3"),
        ({"hidden_size": "32"}, "`hidden_size` must be"),
        ({"hidden_size": 10**40}, "wrong config.json|does not fit"),
        ({"architecture": "block", "num_attention_heads": 0}, "num_attention_heads"),
        ({"architecture": "linear"}, "inner.* should be absent"),
    ],
)
def test_sizes_of_a_heads_config_are_compared_with_its_file_before_memory_is_taken(repos, tmp_path, values, words):
    base, head, _ = repos
    config = tmp_path / "head" / "quality_head" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    with pytest.raises(ValueError, match=words):
        PrismPipeline.from_pretrained(base, quality_head=head)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("file", ["quality_head/diffusion_pytorch_model.safetensors", "adapter_model.safetensors"])
def test_numbers_that_are_none_are_named_with_their_tensor(repos, tmp_path, number, file):
    base, head, _ = repos
    weights = load_file(tmp_path / "head" / file)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = number
    save_file(weights, tmp_path / "head" / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"NaN or inf: {name} \({'NaN' if number != number else 'inf'}\)"):
        PrismPipeline.from_pretrained(base, quality_head=head)


def test_a_missing_tensor_a_damaged_file_and_broken_json_are_named(repos, tmp_path):
    base, head, _ = repos
    file = tmp_path / "head" / "quality_head" / "diffusion_pytorch_model.safetensors"
    whole, weights = file.read_bytes(), load_file(file)
    del weights["out.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"out\.bias is missing, and should be \(1,\)"):
        PrismPipeline.from_pretrained(base, quality_head=head)
    file.write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors is damaged"):
        PrismPipeline.from_pretrained(base, quality_head=head)
    file.write_bytes(whole)
    for name in ("quality_head/config.json", "scheduler/scheduler_config.json", "adapter_config.json"):
        path = tmp_path / "head" / name
        kept = path.read_text()
        for broken, words in (
            ("{", "is not JSON"),
            ("[1]", "must be a JSON object, got a list"),
            ("[" * 10**5, "not JSON"),
        ):
            path.write_text(broken)
            with pytest.raises(ValueError, match=f"{name}.*{words}"):
                PrismPipeline.from_pretrained(base, quality_head=head)
        path.write_text(kept)
    PrismPipeline.from_pretrained(base, quality_head=head)


@pytest.mark.parametrize("rank", [10**9, -1, "4", 0])
def test_a_rank_that_is_not_that_of_the_weights_is_refused_before_memory_is_taken(repos, tmp_path, rank):
    base, head, _ = repos
    config = tmp_path / "head" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": rank}))
    with pytest.raises(ValueError, match="rank"):
        PrismPipeline.from_pretrained(base, quality_head=head)


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("adapter_config.json", {"lora_alpha": float("nan")}, "lora_alpha nan.*NaN or inf"),
        ("adapter_config.json", {"lora_alpha": 1e308}, r"lora_alpha 1e\+308.*NaN or inf"),
        ("adapter_config.json", {"lora_alpha": "x"}, "lora_alpha 'x'"),
        ("adapter_config.json", {"alpha_pattern": {"query": float("inf")}}, "lora_alpha inf"),
        ("adapter_config.json", {"rank_pattern": [1]}, r"rank_pattern=\[1\], which must be a JSON object"),
        ("adapter_config.json", {"lora_dropout": "x"}, r"wrong adapter_config\.json: PEFT says"),
        ("adapter_config.json", {"target_modules": []}, r"wrong adapter_config\.json: PEFT says No `target_modules`"),
        ("adapter_config.json", {"target_modules": ["evil"]}, r"PEFT says Target modules .*evil"),
        ("scheduler/scheduler_config.json", {"_class_name": ["x"]}, r"recommends the scheduler \['x'\]"),
        ("quality_head/config.json", {"base_model": 5}, "base_model must be a string, got 5|does not name its base"),
        ("quality_head/config.json", {"weights_fingerprint": [1]}, r"weights_fingerprint must be a string, got \[1\]"),
    ],
)
def test_values_of_a_wrong_type_are_named_with_their_file_and_leave_nothing_behind(
    repos, file, values, words, tmp_path
):
    base, head, _ = repos
    config = tmp_path / "head" / file
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    pipe = PrismPipeline.from_pretrained(base)
    before = logits(pipe)
    with pytest.raises(ValueError, match=words):
        pipe.load_quality_head(head), pipe(gen_length=2, num_inference_steps=1)
        PrismPipeline.from_pretrained(base, quality_head=head)  # which reads the recommended scheduler too
    with pytest.raises(ValueError, match=words):
        PrismPipeline.from_pretrained(head)
    if file == "adapter_config.json":
        assert torch.equal(logits(pipe), before) and adapter_names(pipe.model) == []


@pytest.mark.parametrize("file", ["quality_head/diffusion_pytorch_model.safetensors", "adapter_model.safetensors"])
def test_weights_that_are_whole_numbers_or_no_matrices_are_refused(repos, tmp_path, file):
    base, head, _ = repos
    weights = load_file(tmp_path / "head" / file)
    name = sorted(weights)[0]
    for value, words in ((weights[name].to(torch.int8), "torch.int8, not a float"), (torch.tensor(1.0), r"\(\)")):
        save_file(weights | {name: value}, tmp_path / "head" / file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words):
            PrismPipeline.from_pretrained(base, quality_head=head)


def test_a_count_in_a_schedulers_settings_that_no_tensor_holds_is_refused(repos, tmp_path):
    base, head, _ = repos
    config = tmp_path / "head" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_remask": 10**30}))
    with pytest.raises(ValueError, match=r"`num_remask` must be .* at most 2147483647"):
        PrismPipeline.from_pretrained(base, quality_head=head)


def test_other_kinds_of_adapters_and_initialisations_are_refused_with_the_reason(repos, tmp_path):
    base, _, sft = repos
    config = tmp_path / "sft" / "adapter_config.json"
    kept = json.loads(config.read_text())
    for values, words in (({"peft_type": "IA3"}, "is a IA3"), ({"init_lora_weights": "pissa"}, "changed the weights")):
        config.write_text(json.dumps(kept | values))
        with pytest.raises(ValueError, match=words):
            PrismPipeline.from_pretrained(base).load_lora_weights(sft)
    with pytest.raises(OSError, match="No LoRA adapter"):
        PrismPipeline.from_pretrained(base).load_lora_weights(base)
    with pytest.raises(ValueError, match="adapter's name"):
        config.write_text(json.dumps(kept))
        PrismPipeline.from_pretrained(base).load_lora_weights(sft, adapter_name="a.b")


def test_a_heads_file_is_what_its_head_was(repos):
    base, head, _ = repos
    pipe = PrismPipeline.from_pretrained(base, quality_head=head)
    again = QualityHead.from_pretrained(head, subfolder="quality_head")
    for name, value in again.state_dict().items():
        assert torch.equal(pipe.quality_head.state_dict()[name], value)
    assert not pipe.quality_head.training and pipe.quality_head.out.weight.dtype == torch.float32
