"""`--objective mdm --rank R`: the model itself is tuned by a LoRA adapter, saved as PEFT saves one."""

import json

import pytest
import torch
import transformers
from family_twins import MASK, checkpoint, load
from peft import PeftModel
from safetensors.torch import load_file
from test_training import assert_identical, pretrained, run, run_and_die  # noqa: F401  (pretrained is a fixture)
from test_training_families import Words

from prism_pipelines import PrismPipeline
from prism_pipelines.training.arguments import RunArguments, check_run
from prism_pipelines.training.run import main
from prism_pipelines.training.setup import build_objective

LORA = ("--objective=mdm", "--rank=3", "--lora-alpha=6", "--learning-rate=1e-2")


def logits_of(pipe, ids):
    with torch.no_grad():
        hidden = pipe.denoiser.hidden(ids)
        return pipe.denoiser.logits(hidden, torch.ones_like(ids, dtype=torch.bool))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, pretrained):  # noqa: F811
    folder = tmp_path_factory.mktemp("lora")
    pipe = run(folder, *LORA, "--max-steps=6", f"--base-model={pretrained}")
    return pipe, folder


def test_the_result_is_a_plain_adapter_that_peft_and_the_pipeline_load(tuned, pretrained):  # noqa: F811
    pipe, folder = tuned
    assert not (folder / "model").exists() and not (folder / "quality_head").exists()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert config["base_model_name_or_path"] == str(pretrained.absolute())
    ids = torch.randint(0, 10, (2, 81), generator=torch.Generator().manual_seed(0))
    expected = logits_of(pipe, ids)
    base = PrismPipeline.from_pretrained(pretrained)
    finite = expected.isfinite()
    assert (expected - logits_of(base, ids))[finite].abs().max() > 1e-3
    kind = getattr(transformers, type(pipe.model).__name__)
    theirs = PeftModel.from_pretrained(kind.from_pretrained(pretrained, subfolder="model"), folder).eval()
    plain = PrismPipeline(theirs, base.tokenizer, mdm_spec=base.config.mdm_spec)
    torch.testing.assert_close(logits_of(plain, ids)[finite.view_as(expected)], expected[finite])
    base.load_lora_weights(folder)
    torch.testing.assert_close(logits_of(base, ids), expected)
    torch.testing.assert_close(logits_of(PrismPipeline.from_pretrained(folder), ids), expected)


def test_the_backbone_stays_as_it_was(tuned, pretrained):  # noqa: F811
    pipe, _ = tuned
    before = load_file(pretrained / "model" / "model.safetensors")
    for name, value in pipe.model.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if "lora_" not in name and plain in before:
            assert torch.equal(value, before[plain]), name


def test_an_interrupted_run_goes_on_exactly(tmp_path, monkeypatch, pretrained):  # noqa: F811
    flags = (*LORA, "--max-steps=6", "--save-steps=2", f"--base-model={pretrained}")
    run(tmp_path / "whole", *flags)
    run_and_die(tmp_path / "broken", monkeypatch, 3, *flags)
    run(tmp_path / "broken", *flags, "--resume-from-checkpoint=latest")
    found = [{"adapter": load_file(tmp_path / name / "adapter_model.safetensors")} for name in ("whole", "broken")]
    assert_identical(*found)


@pytest.mark.parametrize("family", ["llada", "sdar", "llada2_moe", "Dream", "esm_diff"])
def test_the_adapter_of_a_family_learns_and_nothing_else(family):
    flags = RunArguments(objective="mdm", dataset="some/data", base_model="some/model", rank=2)
    check_run(flags)
    pipe = load(checkpoint(family))
    built = build_objective(flags, pipe.model, Words(), pipe.spec).train()
    ids = torch.randint(8, MASK, (4, 20), generator=torch.Generator().manual_seed(1))
    trainable = torch.ones_like(ids, dtype=torch.bool)
    trainable[:, [0, -1]] = False  # ESM wants tokens around its masks
    built(ids, trainable, generator=torch.Generator().manual_seed(2)).loss.backward()
    found = {name: p.grad for name, p in built.named_parameters() if p.requires_grad}
    assert found and all("lora_" in name for name in found)
    assert all(gradient.abs().max() > 0 for name, gradient in found.items() if "lora_B" in name)


def test_the_card_says_how_it_is_loaded_and_trained(tuned):
    card = (tuned[1] / "README.md").read_text()
    assert "library_name: peft" in card and "An adapter of rank 3" in card
    assert "--objective mdm" in card and "--rank 3" in card and "PeftModel.from_pretrained" in card
    assert str(tuned[1].parent) not in card


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ("--objective=mdm", "--rank=2"),
            "--rank only applies to an adapter, which needs a pretrained model: pass --base-model",
        ),
        (
            ("--objective=mdm", "--full=true"),
            "--full goes with --objective prism or critic; mdm trains all weights, or",
        ),
        (
            ("--rank=2", "--objective=mdm", "--optimizer=muon", "--base-model=x"),
            "`--optimizer muon` is for all weights",
        ),
        (("--objective=mdm", "--load-in-4bit=true", "--base-model=x"), "Weights in 4 or 8 bits cannot be trained"),
        (
            ("--objective=mdm", "--rank=2", "--push-to-hub=true", "--hub-model-id=a/b", "--base-model=/nowhere/x"),
            "a head or an adapter needs a base model that others can load",
        ),
    ],
)
def test_what_no_run_can_use_is_named(flags, says, tmp_path, capsys):
    dataset = ["--dataset=sudoku", f"--output-dir={tmp_path}", "--use-cpu"]
    assert main([*dataset, *flags]) == 2
    assert says in capsys.readouterr().err
