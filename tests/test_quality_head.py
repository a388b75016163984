import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from prism_pipelines.models.quality_head import ARCHITECTURES, QualityHead
from prism_pipelines.schedulers.context import INPUTS, context_features, num_features

SPEC = {"mask_token_id": 3, "lora_targets": ["query"]}


def head(architecture, hidden_size=8, **config):
    torch.manual_seed(0)
    return QualityHead(hidden_size, architecture, **config)


def hidden_states(batch=2, length=5, size=8):
    return torch.randn(batch, length, size, generator=torch.Generator().manual_seed(1))


def normalised(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def block_by_hand(block, x, attention_mask):
    """The block one row and one attention head at a time, over the tokens that are not padding."""
    rows = []
    for row, keep in zip(x, attention_mask.bool(), strict=True):
        qkv = normalised(row, block.attention_norm) @ block.query_key_value.weight.T + block.query_key_value.bias
        q, k, v = qkv.split(row.shape[-1], dim=-1)
        width = row.shape[-1] // block.num_heads
        attended = []
        for n in range(block.num_heads):
            part = slice(n * width, (n + 1) * width)
            attended.append((q[:, part] @ k[keep][:, part].T / width**0.5).softmax(-1) @ v[keep][:, part])
        row = row + torch.cat(attended, -1) @ block.attention_out.weight.T + block.attention_out.bias
        inner = gelu(normalised(row, block.mlp_norm) @ block.mlp_in.weight.T + block.mlp_in.bias)
        rows.append(row + inner @ block.mlp_out.weight.T + block.mlp_out.bias)
    return torch.stack(rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_is_its_formula(architecture):
    module = head(architecture, num_attention_heads=2)
    for parameter in module.parameters():  # norms start at the identity, where a wrong formula could hide
        nn.init.normal_(parameter, std=0.5)
    x, attention_mask = hidden_states(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = block_by_hand(module.block, x, attention_mask) if module.attends else x
    expected = normalised(expected, module.norm)
    if architecture.endswith("mlp"):
        expected = gelu(expected @ module.inner.weight.T + module.inner.bias)
    expected = expected @ module.out.weight[0] + module.out.bias
    torch.testing.assert_close(module(x, attention_mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_nothing_and_a_row_of_padding_is_finite(architecture):
    module, x = head(architecture), hidden_states(2, 5)
    attention_mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    logits = module(x, attention_mask)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:1, :3], module(x[:1, :3]))
    other_padding = torch.cat([x[:, :3], torch.full_like(x[:, 3:], 100.0)], 1)
    torch.testing.assert_close(module(other_padding, attention_mask)[0, :3], logits[0, :3])
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_the_block_looks_both_ways():
    module, x = head("block"), hidden_states(1, 4).requires_grad_()
    for i in range(4):
        (gradient,) = torch.autograd.grad(module(x)[0, i], x)
        assert (gradient[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_logits_are_float32_for_any_hidden_dtype(architecture, dtype):
    module, x = head(architecture), hidden_states().to(dtype)
    assert module(x).dtype == torch.float32
    torch.testing.assert_close(module(x), module(x.float()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autocast_changes_nothing(architecture):
    module, x = head(architecture), hidden_states()
    with torch.autocast("cpu", torch.bfloat16):
        logits = module(x)
    torch.testing.assert_close(logits, module(x), rtol=0, atol=0)


CASTS = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(dtype=)": lambda m: m.to(dtype=torch.float16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.bfloat16),
    "to(other tensor)": lambda m: m.to(torch.zeros(1, dtype=torch.float64)),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float16),
    "inside a parent": lambda m: nn.Sequential(m).to(torch.bfloat16),
    "inside a parent, half": lambda m: nn.Sequential(m).half(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_parameters_stay_float32_bit_for_bit(cast):
    module = head("block")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    cast(module)
    for name, value in module.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def test_device_moves_still_work_and_take_no_dtype():
    for move in (lambda m: m.to("meta"), lambda m: m.to("meta", torch.float16), lambda m: nn.Sequential(m).to("meta")):
        module = head("mlp")
        move(module)
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float32)}


def test_parameters_are_float32_under_another_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = head("block")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("asked", [{}, {"torch_dtype": torch.bfloat16}, {"dtype": torch.float16}])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_save_and_load_give_the_same_head(tmp_path, architecture, asked, low_cpu_mem_usage):
    saved = head(architecture, base_model="someone/mdm", base_revision="abc", mdm_spec=SPEC)
    saved.save_pretrained(tmp_path)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(saved.state_dict())
    loaded = QualityHead.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **asked)
    assert torch.equal(loaded(hidden_states()), saved(hidden_states()))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    config = {name: loaded.config[name] for name in ("hidden_size", "base_model", "base_revision", "mdm_spec")}
    assert config == {"hidden_size": 8, "base_model": "someone/mdm", "base_revision": "abc", "mdm_spec": SPEC}


@pytest.mark.parametrize(("hidden_size", "heads"), [(8, 1), (128, 2), (200, 2), (320, 5), (97, 1)])
def test_the_default_number_of_attention_heads_divides_the_width(hidden_size, heads):
    assert head("block", hidden_size).block.num_heads == heads


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"`architecture` must be one of .*'linear', 'mlp', 'block'.*got 'cnn'"):
        QualityHead(8, "cnn")
    with pytest.raises(ValueError, match=r"size 8 \(of someone/mdm\), got 6"):
        QualityHead(8, base_model="someone/mdm")(torch.zeros(1, 2, 6))
    with pytest.raises(ValueError, match=r"`num_attention_heads` must divide hidden_size 8, got 3"):
        QualityHead(8, "block", num_attention_heads=3)
    with pytest.raises(TypeError, match=r"`mdm_spec` must be a dict"):
        QualityHead(8, mdm_spec=("not", "a dict"))


# --- what a run knows ---------------------------------------------------------------------------------------------


def random_context_head(architecture, reads=("given", "prompt", "first_hidden", "token", "draw", "own")):
    module = head(architecture, context=reads)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def random_features(module, batch=2, length=5):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, length, num_features(module.reads_context), generator=generator)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_head_with_context_is_the_head_without(architecture):
    plain, with_context = head(architecture), head(architecture, context=tuple(INPUTS))
    with_context.load_state_dict(plain.state_dict(), strict=False)
    x = hidden_states()
    judged = with_context(x, None, random_features(with_context), x.flip(1), x.flip(0))
    torch.testing.assert_close(judged, plain(x), rtol=0, atol=0)


def test_a_head_that_reads_no_context_has_the_parameters_of_before():
    for architecture in ARCHITECTURES:
        assert not any("context" in name or "first" in name for name in head(architecture).state_dict())


@pytest.mark.parametrize("architecture", ["linear", "mlp"])
def test_context_enters_before_the_head_and_skips_to_its_output(architecture):
    module, x = random_context_head(architecture), hidden_states()
    features, first, rows = random_features(module), hidden_states(2, 5).flip(0), hidden_states(2, 5).flip(1)

    def bare_norm(states):
        centred = states - states.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    u = x + features @ module.context_in.weight.T
    u = u + bare_norm(first) @ module.first_in.weight.T + bare_norm(rows) @ module.token_in.weight.T
    expected = normalised(u, module.norm)
    if architecture == "mlp":
        expected = gelu(expected @ module.inner.weight.T + module.inner.bias)
    expected = expected @ module.out.weight[0] + module.out.bias + features @ module.context_skip.weight[0]
    torch.testing.assert_close(module(x, None, features, first, rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_context_is_the_same_as_context_of_which_nothing_is_known(architecture):
    module, x = random_context_head(architecture), hidden_states()
    features = context_features(None, torch.zeros(2, 5, dtype=torch.long), 3, module.reads_context)
    torch.testing.assert_close(module(x), module(x, None, features, torch.zeros_like(x)), rtol=0, atol=0)


def test_quality_is_the_sigmoid_at_the_temperature_of_the_config():
    x = hidden_states()
    for temperature in (None, 0.5, 3.0):
        module = head("mlp", temperature=temperature)
        torch.testing.assert_close(module.quality(x), 1 / (1 + (-module(x) / (temperature or 1.0)).exp()))


def test_context_and_temperature_are_saved_and_loaded(tmp_path):
    saved = random_context_head("block_mlp")
    saved.register_to_config(temperature=1.5)
    saved.save_pretrained(tmp_path)
    loaded, x = QualityHead.from_pretrained(tmp_path), hidden_states()
    assert loaded.reads_context == saved.reads_context and loaded.config.temperature == 1.5
    judged = loaded.quality(x, None, random_features(saved), x.flip(1))
    assert torch.equal(judged, saved.quality(x, None, random_features(saved), x.flip(1)))


def test_a_head_saved_before_there_was_context_loads(tmp_path):
    saved = head("block")
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["context"], config["temperature"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = QualityHead.from_pretrained(tmp_path)
    assert loaded.reads_context == () and loaded.config.temperature is None
    assert torch.equal(loaded(hidden_states()), saved(hidden_states()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"context": ("given", "prompts")}, "`context` may hold .*; got prompts"),
        ({"context": ("draw", "draw")}, "names an input twice"),
        ({"temperature": 0.0}, "`temperature` must be None or a number above 0, got 0.0"),
    ],
)
def test_wrong_context_and_temperature_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        QualityHead(8, **given)
    with pytest.raises(TypeError, match="`context` must be a list of names"):
        QualityHead(8, context="given")


def test_features_of_another_width_are_named():
    module, x = head("linear", context=("draw",)), hidden_states()
    with pytest.raises(ValueError, match=r"`features` must have 2 channels for context=\('draw',\), got 3"):
        module(x, None, torch.zeros(2, 5, 3))
