"""A step of training on a twin of every family: the default adapter and the head learn, and nothing else does."""

import pytest
import torch
from family_twins import CHECKPOINTS, EVERY, LENGTH, MASK, Words, checkpoint, load

from prism_pipelines import MDMSpec
from prism_pipelines.training.arguments import RunArguments, check_run
from prism_pipelines.training.setup import build_objective


def objective(family, **flags):
    pipe = load(checkpoint(family))
    run = RunArguments(objective="prism", dataset="some/data", base_model="some/model", num_revealed=8, **flags)
    check_run(run)
    torch.manual_seed(0)
    return build_objective(run, pipe.model, Words(), MDMSpec.from_dict(dict(pipe.config.mdm_spec))).train()


def gradients(objective):
    """Of one step in two parts, as the Trainer takes it, without dropout."""
    for module in objective.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.randint(8, MASK, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    trainable = torch.ones_like(ids, dtype=torch.bool)
    trainable[:, [0, -1]] = False  # ESM wants tokens around its masks
    corrupted = objective.corrupt(ids, trainable, generator=torch.Generator().manual_seed(2))
    noise = torch.Generator().manual_seed(3)
    out = objective.predict(ids, trainable, generator=noise, corrupted=corrupted)
    if out.loss is not None:
        out.loss.backward()
    for drawn in out.drawn:
        objective.judge(ids, trainable, corrupted=corrupted, drawn=drawn).loss.backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_the_default_adapter_of_every_family_learns(family):
    found = gradients(objective(family, rank=2))
    assert any("lora_B" in name for name in found) and any(name.startswith("quality_head") for name in found)
    assert all("lora_" in name or name.startswith("quality_head") for name in found)
    for name, gradient in found.items():
        if "lora_A" not in name:  # B starts at zero, so A's first gradient is zero
            assert gradient.isfinite().all() and gradient.abs().max() > 0, name


@pytest.mark.parametrize("family", ["bert", "llada", "esm"])
def test_checkpointing_changes_no_gradient_of_an_adapter(family):
    if family not in CHECKPOINTS:
        pytest.skip("no such twin")
    plain, saving = objective(family, rank=2), objective(family, rank=2)
    saving.gradient_checkpointing_enable()
    one, other = gradients(plain), gradients(saving.train())
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], atol=1e-6), name


@pytest.mark.parametrize("family", EVERY)
def test_a_frozen_backbone_of_every_family_trains_the_head_alone(family):
    found = gradients(objective(family, freeze_backbone=True, head="mlp"))
    assert found and all(name.startswith("quality_head") for name in found)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
