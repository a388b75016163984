"""One process of two: a step of an objective sharded by FSDP2 beside the same step unsharded. Fails if they differ."""

import torch
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from prism_pipelines import MDMSpec, QualityHead
from prism_pipelines.models.denoiser import MaskedDenoiser
from prism_pipelines.training.losses import PRISMObjective
from prism_pipelines.training.trainer import load_trainable, trainable


def build(way):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes))
    if way == "lora":
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model.add_adapter(config, adapter_name="prism")
    spec = MDMSpec(mask_token_id=39, mask_format="additive")
    head = QualityHead(32, "mlp")
    return PRISMObjective(MaskedDenoiser(model, spec), head, num_revealed=3, freeze_backbone=way == "frozen").train()


def step(objective):
    ids = torch.randint(0, 39, (4, 16), generator=torch.Generator().manual_seed(1))
    corrupted = objective.corrupt(ids, generator=torch.Generator().manual_seed(2))
    totals = objective.counts(corrupted, ids)
    noise = torch.Generator().manual_seed(3)
    out = objective(ids, generator=noise, part="predict", corrupted=corrupted, totals=totals)
    if out.loss is not None:
        out.loss.backward()
    for drawn in out.drawn:
        objective(ids, part="judge", corrupted=corrupted, totals=totals, drawn=drawn).loss.backward()
    # Before the next forward: after one without a backward, FSDP leaves the parameters whole, which have no gradient.
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
    objective.eval()
    with torch.no_grad():
        measured = objective(ids, generator=torch.Generator().manual_seed(4), part="measure", num_log_probs=2)
    return gradients, measured


def sharded_step(way, folder):
    torch.distributed.init_process_group("gloo")
    plain, sharded = build(way), build(way)
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.denoiser.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    (expected, one), (found, other) = step(plain), step(sharded)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].full_tensor(), gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other.quality, one.quality)
    torch.testing.assert_close(other.loss_mdm, one.loss_mdm)
    # Weights are gathered whole for a checkpoint, and sharded again when it is read.
    gathered = trainable(sharded)
    assert all(torch.equal(gathered[name], value) for name, value in trainable(plain).items())
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.zero_()
    load_trainable(sharded, folder)
    assert all(torch.equal(gathered[name], value) for name, value in trainable(sharded).items())
