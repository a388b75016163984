"""The layouts of a repository, loaded from a Hub of our own (examples/local_hub.py)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from family_twins import CHECKPOINTS, MASK, H, aligned, load, save_llada, some_ids
from huggingface_hub import HfApi, close_session, get_session, snapshot_download
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from examples.local_hub import LocalHub
from prism_pipelines import MDLMScheduler, PrismPipeline, PrismScheduler, QualityHead
from prism_pipelines.models.transformers_patches import with_split_weights
from prism_pipelines.sudoku import sudoku_tokenizer

BASE, HEAD, PIPE = "them/tiny-llada", "me/tiny-llada-prism", "me/tiny-pipeline"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LocalHub() as server:
        server.connect(monkeypatch, tmp_path / "cache")
        yield server


def write_head(folder, base=BASE, revision=None, lora=True, seed=0):
    """The repository of a head: adapter at the root, quality_head/, scheduler/."""
    torch.manual_seed(seed)
    head = QualityHead(H, "mlp", base_model=base, base_revision=revision)
    head.save_pretrained(folder / "quality_head")
    PrismScheduler(num_remask=3, order="confidence").save_pretrained(folder / "scheduler")
    (folder / "README.md").write_text(f"---\nlibrary_name: peft\nbase_model: {base}\n---\n# A head\n")
    if lora:
        sizes = {"vocab_size": 40, "hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "prism")
        model.save_pretrained(folder / "written")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / "written" / name).rename(folder / name)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        shutil.rmtree(folder / "written")
    return folder


@pytest.fixture
def base(hub, tmp_path):
    """A plain model repository under LLaDA's own names; its folder."""
    folder = save_llada(tmp_path / "base")
    hub.commit(BASE, folder)
    return folder


def perturbed(folder, out):
    """The same checkpoint with other weights."""
    weights = {name: value * 1.1 for name, value in load_file(folder / "model.safetensors").items()}
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def same(ours, theirs):
    return torch.equal(aligned(ours, some_ids()), aligned(theirs, some_ids()))


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_a_plain_repository_is_its_folder(hub, base):
    pipe = PrismPipeline.from_pretrained(BASE)
    assert same(pipe, load(base)) and isinstance(pipe.scheduler, MDLMScheduler)
    assert pipe.config.mdm_spec["mask_token_id"] == MASK and pipe.model.config._name_or_path == BASE


def test_a_plain_repository_with_a_head_repository(hub, base, tmp_path):
    folder = write_head(tmp_path / "head")
    hub.commit(HEAD, folder)
    pipe = PrismPipeline.from_pretrained(BASE, quality_head=HEAD, torch_dtype=torch.bfloat16)
    local = load(base, quality_head=folder, torch_dtype=torch.bfloat16)
    assert same(pipe, local) and not same(pipe, load(base, torch_dtype=torch.bfloat16))  # the adapter acts
    assert isinstance(pipe.scheduler, PrismScheduler) and pipe.scheduler.config.num_remask == 3
    for name, value in load_file(folder / "quality_head" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(value, pipe.quality_head.state_dict()[name]) and value.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    assert MASK not in pipe(gen_length=6, num_inference_steps=3).sequences


@pytest.mark.parametrize("lora", [True, False])
def test_a_head_repository_alone_finds_its_base_at_its_revision(hub, base, tmp_path, lora):
    first = hub.sha(BASE, "main")
    hub.commit(BASE, perturbed(base, tmp_path / "newer"))
    folder = write_head(tmp_path / "head", revision=first, lora=lora)
    hub.commit(HEAD, folder)
    pipe = PrismPipeline.from_pretrained(HEAD)
    assert same(pipe, load(base, quality_head=folder)) and pipe.scheduler.config.num_remask == 3
    assert not same(pipe, PrismPipeline.from_pretrained(BASE, quality_head=folder))
    assert pipe.quality_head.config.base_model == BASE


def test_a_saved_pipeline_comes_back_from_the_hub(hub, base, tmp_path):
    local = load(base, quality_head=QualityHead(H), scheduler=PrismScheduler(num_remask=2))
    local.save_pretrained(tmp_path / "pipe")
    hub.commit(PIPE, tmp_path / "pipe")
    pipe = PrismPipeline.from_pretrained(PIPE)
    assert same(pipe, local) and pipe.scheduler.config.num_remask == 2 and pipe.config.mdm_spec == local.config.mdm_spec
    for name, value in local.quality_head.state_dict().items():
        assert torch.equal(value, pipe.quality_head.state_dict()[name])


@pytest.mark.slow
def test_a_saved_pipeline_with_a_tokenizer_loads_in_a_fresh_process_by_hf_endpoint(hub, tmp_path):
    sizes = {"hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertForMaskedLM(BertConfig(vocab_size=16, max_position_embeddings=96, pad_token_id=0, **sizes))
    PrismPipeline(model, sudoku_tokenizer(), QualityHead(H)).save_pretrained(tmp_path / "pipe")
    hub.commit(PIPE, tmp_path / "pipe", branch="v2")
    code = f"from prism_pipelines import PrismPipeline; p = PrismPipeline.from_pretrained({PIPE!r}, revision='v2');"
    code += "print(p('12', gen_length=3, num_inference_steps=2).texts)"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=hub.environment(tmp_path / "fresh"), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert len(eval(ran.stdout)[0]) == 3 and (tmp_path / "fresh").is_dir()


def test_a_saved_pipeline_of_a_loaded_head_comes_back_with_its_adapter(hub, base, tmp_path):
    hub.commit(HEAD, write_head(tmp_path / "head"))
    pipe = PrismPipeline.from_pretrained(HEAD)
    pipe.save_pretrained(tmp_path / "pipe")
    hub.commit(PIPE, tmp_path / "pipe")
    assert same(PrismPipeline.from_pretrained(tmp_path / "pipe"), pipe)
    assert same(PrismPipeline.from_pretrained(PIPE), pipe)


# --- where in the repository ------------------------------------------------------------------------------------------


def test_revision_is_a_branch_a_tag_or_a_commit(hub, base, tmp_path):
    first = hub.commit(BASE, {"README.md": b"# first"}, tag="v1")
    newer = perturbed(base, tmp_path / "newer")
    hub.commit(BASE, newer, branch="next")
    for revision in (first, "v1", "main", None):
        assert same(PrismPipeline.from_pretrained(BASE, revision=revision), load(base))
    assert same(PrismPipeline.from_pretrained(BASE, revision="next"), load(newer))
    with pytest.raises(OSError, match="no-such"):
        PrismPipeline.from_pretrained(BASE, revision="no-such")


def test_a_revision_is_that_of_the_model_and_not_of_its_head(hub, base, tmp_path):
    newer = perturbed(base, tmp_path / "newer")
    hub.commit(BASE, newer, branch="next")
    hub.commit(HEAD, write_head(tmp_path / "head", revision="main"))
    with pytest.warns(UserWarning, match="made for revision 'main', and the model has revision 'next'"):
        pipe = PrismPipeline.from_pretrained(BASE, revision="next", quality_head=HEAD)
    assert same(pipe, load(newer, quality_head=tmp_path / "head"))
    hub.commit(HEAD, write_head(tmp_path / "other", seed=1), branch="second")
    pipe = PrismPipeline.from_pretrained(BASE)
    pipe.load_quality_head(HEAD, revision="second")
    assert same(pipe, load(base, quality_head=tmp_path / "other"))


def test_subfolder(hub, base, tmp_path):
    inside = {f"deep/model/{f.name}": f.read_bytes() for f in base.iterdir()}
    hub.commit("them/many", inside)
    hub.commit("them/many", {"config.json": b"{}"})
    assert same(PrismPipeline.from_pretrained("them/many", subfolder="deep/model"), load(base))


@pytest.mark.parametrize("family", ["mdlm", "a2d-qwen3:bd3lm"])
def test_other_routes_from_the_hub(hub, tmp_path, family):
    folder = CHECKPOINTS[family][0](tmp_path / "x")
    repo = {"mdlm": "them/mdlm-owt", "a2d-qwen3:bd3lm": "dllm-hub/Qwen3-diffusion-bd3lm"}[family]
    hub.commit(repo, folder)
    pipe = PrismPipeline.from_pretrained(repo, mask_token_id=MASK)
    local = load(folder, mdm_spec=pipe.config.mdm_spec)
    assert same(pipe, local) and pipe.config.mdm_spec["block_length"] == CHECKPOINTS[family][1]


def test_a_loaded_repository_needs_no_hub_any_more(hub, base, tmp_path, monkeypatch):
    hub.commit(HEAD, write_head(tmp_path / "head", revision=hub.sha(BASE, "main")))
    online = PrismPipeline.from_pretrained(HEAD)
    hub.stop()
    asked = len(hub.requests)
    assert same(PrismPipeline.from_pretrained(HEAD, local_files_only=True), online)
    assert hub.requests[asked:] == []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    assert same(PrismPipeline.from_pretrained(HEAD), online)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_no_such_repository(hub):
    with pytest.raises(OSError, match="them/nothing"):
        PrismPipeline.from_pretrained("them/nothing")


def test_a_repository_without_a_model_or_a_head(hub, base):
    hub.commit("me/empty", {"README.md": b"# nothing"})
    with pytest.raises(OSError, match=r"'me/empty' has no config\.json"):
        PrismPipeline.from_pretrained("me/empty")
    with pytest.raises(OSError, match=r"'me/empty' has no quality_head/config\.json"):
        PrismPipeline.from_pretrained(BASE, quality_head="me/empty")


def test_a_hub_that_cannot_be_reached_is_not_called_an_empty_repository(hub):
    hub.stop()
    with (
        pytest.warns(UserWarning, match="cannot be reached"),
        pytest.raises(OSError, match=r"not downloaded before, and the Hub .* cannot be reached"),
    ):
        PrismPipeline.from_pretrained("them/never-loaded")


def test_a_head_for_another_model_of_the_hub(hub, base, tmp_path):
    hub.commit("them/other", base)
    hub.commit(HEAD, write_head(tmp_path / "head"))
    with pytest.raises(ValueError, match="was made for 'them/tiny-llada', and the model is 'them/other'"):
        PrismPipeline.from_pretrained("them/other", quality_head=HEAD)


def test_a_head_that_names_no_base(hub, tmp_path):
    hub.commit(HEAD, write_head(tmp_path / "head", base=None, lora=False))
    with pytest.raises(ValueError, match="does not name its base model"):
        PrismPipeline.from_pretrained(HEAD)


@pytest.mark.parametrize("family", ["llada", "mdlm", "bert"])
def test_pickles_on_the_hub_are_refused(hub, tmp_path, family):
    folder = CHECKPOINTS[family][0](tmp_path / "x")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.commit("them/pickled", folder)
    with pytest.raises(OSError, match=r"prism convert them/pickled DST\. It has no tokenizer either"):
        PrismPipeline.from_pretrained("them/pickled")
    assert ("GET", "/them/pickled/resolve/main/pytorch_model.bin") not in hub.requests


def test_a_pickled_adapter_on_the_hub_is_refused(hub, base, tmp_path):
    folder = write_head(tmp_path / "head")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    hub.commit(HEAD, folder)
    with pytest.raises(OSError, match=r"has no adapter_model\.safetensors"):
        PrismPipeline.from_pretrained(HEAD)


# --- the fake itself: what huggingface_hub uploads is what it downloads -----------------------------------------------


def test_an_uploaded_folder_comes_back(hub, base, tmp_path):
    folder = write_head(tmp_path / "head")
    api = HfApi(endpoint=hub.url, token="hf_test")
    api.create_repo("me/uploaded")
    api.create_repo("me/uploaded", exist_ok=True)
    sha = api.upload_folder(repo_id="me/uploaded", folder_path=folder).oid
    assert hub.sha("me/uploaded", "main") == sha
    back = snapshot_download("me/uploaded", revision=sha)
    written = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert hub.files("me/uploaded") == written
    for name, content in written.items():
        assert Path(back, name).read_bytes() == content
    assert same(PrismPipeline.from_pretrained("me/uploaded"), load(base, quality_head=folder))


def test_nothing_in_the_cache_and_nothing_may_be_fetched(hub, base, monkeypatch):
    with pytest.raises(OSError, match=r"config\.json of 'them/tiny-llada' was not downloaded .*local_files_only=True"):
        PrismPipeline.from_pretrained(BASE, local_files_only=True)
    with pytest.raises(OSError, match=r"No quality head: .*was not downloaded before, and local_files_only=True"):
        load(base).load_quality_head(HEAD, local_files_only=True)
    snapshot_download(BASE, allow_patterns="config.json")
    with pytest.raises(OSError, match=r"model\.safetensors of .* was not downloaded before"):
        PrismPipeline.from_pretrained(BASE, local_files_only=True)


def test_a_transformers_that_cannot_cut_weights_is_named(monkeypatch):
    monkeypatch.delattr("transformers.core_model_loading.Split")
    with pytest.raises(ImportError, match=r"LlamaForCausalLM .* transformers [0-9.]+ cannot cut"):
        with_split_weights(LlamaForCausalLM, {"qkv.weight": ["q.weight"]})


def test_a_hub_that_is_down_is_asked_once_and_what_is_cached_loads(hub, base, tmp_path, monkeypatch):
    hub.commit(HEAD, write_head(tmp_path / "head"))
    expected = PrismPipeline.from_pretrained(HEAD)
    hub.stop()
    close_session()  # or an open connection would still be served
    asked = []
    client = get_session()
    send = type(client).send
    monkeypatch.setattr(type(client), "send", lambda self, *a, **k: asked.append(1) or send(self, *a, **k))
    with pytest.warns(UserWarning, match=r"cannot be reached .*downloaded before are used") as warned:
        assert same(PrismPipeline.from_pretrained(HEAD), expected)
    assert len([1 for one in warned if "cannot be reached" in str(one.message)]) == len(asked) == 1
    with (
        pytest.warns(UserWarning, match="cannot be reached"),
        pytest.raises(OSError, match=r"not downloaded before, and the Hub"),
    ):
        PrismPipeline.from_pretrained("them/never-seen")
    assert len(asked) == 2
