"""NaN and inf in a model, a head or an adapter are named as what they are, with the tensor."""

import pytest
import torch
from family_twins import MASK, checkpoint, load
from safetensors.torch import load_file, save_file

from prism_pipelines import MDLMScheduler, P2Scheduler, PrismPipeline, PrismScheduler, QualityHead

FAMILIES = ["bert", "llada"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_weight_is_named_and_not_called_causal(family, value, tmp_path):
    folder = checkpoint(family)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if weights[name].ndim == 2 and ".0." in name)
    weights[name][0, 0] = value
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    kind = "NaN" if value != value else "inf"
    with pytest.raises(ValueError, match=rf"A weight of .* holds NaN or inf: .*layer.*0.*weight \({kind}\)") as caught:
        load(tmp_path)
    assert "causal" not in str(caught.value)


def test_an_overflow_is_named_with_its_module_and_dtype():
    pipe = load(checkpoint("llada"))
    with torch.no_grad():
        pipe.model.model.layers[0].mlp.down_proj.weight.mul_(1e6)
        pipe.model.model.layers[0].mlp.down_proj.weight.clamp_(-6e4, 6e4)
    pipe.model.half()
    with pytest.raises(ValueError, match=r"gives NaN or inf from model.layers.0.* numbers overflow torch.float16") as e:
        PrismPipeline.from_pipe(pipe)
    assert "torch.bfloat16 or torch.float32" in str(e.value) and "causal" not in str(e.value)


def test_a_weight_that_only_some_text_reads_is_named_when_it_is_read():
    pipe = load(checkpoint("llada"))
    with torch.no_grad():
        pipe.model.get_input_embeddings().weight[20] = torch.nan
    call = {"gen_length": 4, "num_inference_steps": 2, "output_type": "seq"}
    assert not (pipe(input_ids=[[9, 10]], **call, suppress_tokens=20).sequences == MASK).any()
    with pytest.raises(ValueError, match=r"holds NaN or inf: model.embed_tokens.weight \(NaN\)"):
        pipe(input_ids=[[9, 20]], **call)


@pytest.mark.parametrize("architecture", ["linear", "mlp", "block"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_head_with_nan_is_refused_by_every_way_in(architecture, value, tmp_path):
    head, pipe = QualityHead(32, architecture), load(checkpoint("bert"))
    name, weight = list(head.named_parameters())[-1]
    with torch.no_grad():
        weight.view(-1)[0] = value
    head.save_pretrained(tmp_path / "quality_head")
    message = rf"A weight of `quality_head` holds NaN or inf: {name}"
    for way in (
        lambda: pipe.load_quality_head(head),
        lambda: pipe.load_quality_head(str(tmp_path)),
        lambda: PrismPipeline(pipe.model, quality_head=head, mdm_spec=pipe.spec),
        lambda: PrismPipeline.from_pipe(pipe, quality_head=head),
        lambda: load(checkpoint("bert"), quality_head=head),
    ):
        with pytest.raises(ValueError, match=message):
            way()
    assert pipe.quality_head is None


@pytest.mark.parametrize("family", ["llada", "sdar", "bert"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_weight_of_the_output_head_is_named_when_it_is_read(family, value):
    pipe = load(checkpoint(family))
    names = {id(parameter): name for name, parameter in pipe.model.named_parameters()}
    weight = pipe.denoiser.output_parameters()[-1]
    with torch.no_grad():
        weight[20] = value
    with pytest.raises(ValueError, match=rf"holds NaN or inf: .*{names[id(weight)].split('.')[-1]}"):
        pipe(input_ids=[[9, 10]], gen_length=4, num_inference_steps=2)


def test_an_overflow_in_the_output_head_is_named():
    pipe = load(checkpoint("llada"))
    with torch.no_grad():
        pipe.model.get_output_embeddings().weight[20] = 3e38
    with pytest.raises(ValueError, match=r"gives NaN or inf from the output head on, and its weights are finite"):
        pipe(input_ids=[[9, 10]], gen_length=4, num_inference_steps=2)


@pytest.mark.parametrize("scheduler", [PrismScheduler(num_remask=2), P2Scheduler(), MDLMScheduler()])
def test_a_quality_that_is_nan_stops_the_run_and_names_its_tensor(scheduler):
    pipe = load(checkpoint("bert"))
    pipe.quality_head, pipe.scheduler = QualityHead(32, "mlp"), scheduler
    call = {"gen_length": 6, "num_inference_steps": 3, "output_type": "seq"}
    with torch.no_grad():
        pipe.quality_head.inner.weight.fill_(torch.nan)  # after the checks of loading
    message = r"`quality_head` gives NaN: inner.weight \(NaN\)"
    with pytest.raises(ValueError, match=message):
        pipe(input_ids=[[9, 10]], return_quality=True, **call)
    with pytest.raises(ValueError, match=message):
        pipe.score(input_ids=[[9, 10]])
    with torch.no_grad():
        for parameter in pipe.quality_head.parameters():
            parameter.fill_(1e38)
    with pytest.raises(ValueError, match="gives NaN, and its weights are finite: numbers overflow"):
        pipe.quality_head.inner.weight.data[:, ::2] *= -1
        pipe.score(input_ids=[[9, 10]])
