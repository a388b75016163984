"""Sizes in a base model's config.json are compared with its tensors before memory is taken, and layers are counted."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from family_twins import CHECKPOINTS, checkpoint, load
from safetensors.torch import load_file, save_file

from prism_pipelines.cli.main import main
from prism_pipelines.hub.convert import convert_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer")

# What config.json calls the width, the number of layers and the inner width (None: it has no word for it).
OWN = {
    "llada": ("d_model", "n_layers", "mlp_hidden_size"),
    "llada:moe": ("hidden_size", "num_hidden_layers", "expert_intermediate_size"),
    "sdar_moe": ("hidden_size", "num_hidden_layers", "moe_intermediate_size"),
    "mdlm": ("hidden_dim", "n_blocks", None),
    "bd3lm": ("hidden_dim", "n_blocks", None),
}
USUAL = ("hidden_size", "num_hidden_layers", "intermediate_size")
GPT2 = ("n_embd", "n_layer", "n_inner")


def words(family):
    found = GPT2 if "diffugpt" in family else OWN.get(family, USUAL)
    config = json.loads((checkpoint(family) / "config.json").read_text())
    absent = [word for word in found[:2] if word not in config]
    assert not absent, f"config.json of {family!r} has no {absent}: enter its own words in OWN of tests/test_sizes.py"
    return found


def with_config(family, folder, **values):
    """A copy of a twin whose config.json says something else."""
    folder = folder / checkpoint(family).name
    shutil.copytree(checkpoint(family), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


@pytest.fixture
def little_memory():
    """A process that may take 2 GiB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_a_size_that_is_not_that_of_the_tensors_is_refused_before_memory_is_taken(family, tmp_path):
    width, layers, inner = words(family)
    wrong = [{width: 10**9}, {width: 2**17}, {width: -3}, {width: "32"}, {width: 0}, {width: 10**40}]
    wrong += [{layers: 10**7}, {layers: -1}, {layers: 0}, {layers: True}] + ([{inner: 10**9}] if inner else [])
    for number, values in enumerate(wrong):
        folder = with_config(family, tmp_path / str(number), **values)
        with pytest.raises(ValueError, match=r"config\.json"):
            load(folder), pytest.fail(f"{values} was loaded")


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_a_config_of_fewer_or_more_layers_than_the_files_is_refused(family, tmp_path):
    layers = words(family)[1]
    for count in (1, 3):
        values = {layers: count} | ({"layer_types": None} if family in ("modernbert", "eurobert") else {})
        folder = with_config(family, tmp_path / str(count), **values)
        with pytest.raises(ValueError, match=rf"says {count} layers, and the files hold 2"):
            load(folder)


def test_layers_that_a_config_says_are_for_several_tokens_at_once_may_be_left_out(tmp_path):
    folder = with_config("llada2_moe", tmp_path, num_nextn_predict_layers=1)
    weights = load_file(folder / "model.safetensors")
    more = {
        name.replace("layers.1.", "layers.2."): value.clone() for name, value in weights.items() if "layers.1." in name
    }
    save_file(weights | more, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).model.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("bert", {"vocab_size": 60}),
        ("esm", {"vocab_size": 60}),
        ("sdar", {"num_attention_heads": 2}),
        ("llada2_moe", {"num_attention_heads": 2}),
        ("llada2_moe", {"num_experts": 10**9}),
        ("bert", {"max_position_embeddings": 10**9}),
        ("bert", {"type_vocab_size": 10**10}),
    ],
)
def test_other_sizes_are_errors_that_say_that_config_and_weights_differ(family, values, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        load(with_config(family, tmp_path, **values))


@pytest.mark.parametrize("family", ["llada", "bert"])
def test_a_damaged_file_of_weights_and_a_damaged_index_are_named(family, tmp_path):
    folder = with_config(family, tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:50], whole[:-20], b"", b"<html>not found</html>"):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            load(folder)
    file.write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    for content in ({}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": "../model.safetensors"}}):
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json of .* is damaged"):
            load(folder)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    with pytest.raises(OSError, match=r"lacks model-00001\.safetensors, a part of its weights"):
        load(folder)


def test_prism_convert_and_prism_info_refuse_them_in_one_line(tmp_path, capsys):
    folder = with_config("bert", tmp_path, num_hidden_layers=10**7)
    assert main(["info", str(folder)]) == 2
    assert "says 10000000 layers, and the files hold 2" in capsys.readouterr().err
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="says 10000000 layers, and the files hold 2"):
        convert_checkpoint(str(folder), tmp_path / "out")
