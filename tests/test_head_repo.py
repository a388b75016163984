"""A head's repository: what is in it, that strangers can load it, and that it tells nothing about this machine."""

import json
import re
from pathlib import Path

import pytest
import torch
from family_twins import H, load, save_llada
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from transformers import BertConfig, BertForMaskedLM

from examples.local_hub import LocalHub
from prism_pipelines import PrismPipeline, PrismScheduler, QualityHead, TokenCriticScheduler
from prism_pipelines.hub.model_card import model_card
from prism_pipelines.hub.publish import Commit, push_head_repo, save_head_repo
from prism_pipelines.sudoku import sudoku_tokenizer

BASE, HEAD = "them/tiny-bert", "me/tiny-bert-prism"
TOKEN = "hf_secretsecretsecret"
IDS = torch.randint(1, 10, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LocalHub() as server:
        server.connect(monkeypatch, tmp_path / "cache")
        yield server


def save_bert(folder, seed=0):
    """A plain repository of a tiny BERT with a tokenizer; its folder."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(sudoku_tokenizer()), max_position_embeddings=96, pad_token_id=0, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    sudoku_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def base(hub, tmp_path):
    folder = save_bert(tmp_path / "base")
    hub.commit(BASE, folder)
    return folder


def trained(base, lora=True, name=BASE):
    """A pipeline as training leaves it: an adapter that acts, a head, settings."""
    torch.manual_seed(1)
    pipe = PrismPipeline.from_pretrained(base)
    if lora:
        config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
        pipe.model.add_adapter(config, adapter_name="prism")
        pipe.model.eval()
    head = QualityHead(H, "mlp", base_model=name)
    pipe = PrismPipeline(pipe.model, pipe.tokenizer, head, PrismScheduler(num_remask=3, order="confidence"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        input_ids=IDS, gen_length=8, num_inference_steps=4, generator=torch.Generator().manual_seed(0)
    ).sequences


@pytest.mark.parametrize("lora", [True, False])
def test_what_is_pushed_gives_the_same_tokens_and_qualities(hub, base, lora):
    pipe = trained(base, lora)
    url = pipe.push_to_hub(HEAD, token=TOKEN)
    assert HEAD in url
    again = PrismPipeline.from_pretrained(HEAD)
    assert torch.equal(generate(again), generate(pipe))
    assert torch.equal(again.score(input_ids=IDS)[0], pipe.score(input_ids=IDS)[0])
    assert again.scheduler.config.num_remask == 3 and again.quality_head.config.base_model == BASE
    assert torch.equal(generate(PrismPipeline.from_pretrained(BASE, quality_head=HEAD)), generate(pipe))
    names = set(hub.files(HEAD))
    assert {"README.md", "quality_head/config.json", "scheduler/scheduler_config.json"} <= names
    assert ("adapter_model.safetensors" in names) == lora and not any(name.startswith("model") for name in names)


def test_peft_alone_reads_the_adapter(hub, base):
    pipe = trained(base)
    pipe.push_to_hub(HEAD)
    plain = PeftModel.from_pretrained(BertForMaskedLM.from_pretrained(BASE), HEAD).eval()
    with torch.no_grad():
        ours, theirs = pipe.model(input_ids=IDS).logits, plain(input_ids=IDS).logits
        untuned = BertForMaskedLM.from_pretrained(BASE).eval()(input_ids=IDS).logits
    assert torch.equal(ours, theirs) and not torch.allclose(ours, untuned)


@pytest.mark.parametrize("what", ["head", "pipeline"])
def test_nothing_pushed_tells_folders_of_this_machine_or_the_token(hub, base, tmp_path, what):
    pipe = trained(base, name=str(base))  # trained from a folder
    pipe.push_to_hub(HEAD, what=what, base_model=BASE, token=TOKEN)
    for name, content in hub.files(HEAD).items():
        for secret in (str(tmp_path), str(Path.home()), TOKEN):
            assert secret.encode() not in content, f"{name} holds {secret}"
    assert torch.equal(generate(PrismPipeline.from_pretrained(HEAD)), generate(pipe))


def test_a_whole_pipeline_goes_to_the_hub_and_back(hub, base):
    pipe = trained(base, lora=False)
    pipe.push_to_hub("me/whole", what="pipeline", commit_message="Whole")
    assert "model/model.safetensors" in hub.files("me/whole")
    again = PrismPipeline.from_pretrained("me/whole")
    assert torch.equal(generate(again), generate(pipe)) and again.scheduler.config.num_remask == 3


@pytest.mark.parametrize("what", ["head", "pipeline"])
def test_a_push_takes_away_what_an_earlier_one_left(hub, base, what):
    trained(base).push_to_hub(HEAD, what=what, base_model=BASE)
    pipe = trained(base, lora=False)
    pipe.push_to_hub(HEAD, what=what, base_model=BASE)
    assert not any("adapter" in name for name in hub.files(HEAD))
    again = PrismPipeline.from_pretrained(HEAD)
    assert torch.equal(again.score(input_ids=IDS)[0], pipe.score(input_ids=IDS)[0])


@pytest.mark.filterwarnings("error::UserWarning:prism_pipelines")
def test_a_whole_pipeline_under_a_new_name_loads_in_every_dtype(hub, base):
    pipe = trained(base, lora=False)
    pipe.push_to_hub("me/whole", what="pipeline", base_model=BASE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loaded = PrismPipeline.from_pretrained("me/whole", torch_dtype=dtype)
        assert loaded.quality_head is not None and loaded.model.dtype == dtype


def test_a_head_for_another_model_of_the_same_size_is_refused(hub, base, tmp_path):
    folder = save_head_repo(trained(base), tmp_path / "head")
    other = save_bert(tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="the token embeddings differ"):
        PrismPipeline.from_pretrained(other, quality_head=str(folder))
    with pytest.raises(ValueError, match="the token embeddings differ"):
        PrismPipeline.from_pretrained(other, quality_head=str(folder), torch_dtype=torch.float16)
    for dtype in (torch.bfloat16, torch.float16):  # the same model in another dtype
        assert PrismPipeline.from_pretrained(base, quality_head=str(folder), torch_dtype=dtype).quality_head is not None


def test_a_base_in_a_folder_works_here_and_is_refused_for_the_hub(base, tmp_path):
    pipe = trained(base, name=str(base))
    folder = save_head_repo(pipe, tmp_path / "head")
    assert torch.equal(generate(PrismPipeline.from_pretrained(str(folder))), generate(pipe))
    with pytest.raises(ValueError, match="not an id on the Hub"):
        pipe.push_to_hub(HEAD)
    with pytest.raises(ValueError, match="not an id on the Hub"):
        pipe.push_to_hub(HEAD, what="pipeline")


def test_the_card_says_what_is_known_and_its_snippet_runs(hub, base, tmp_path):
    figure = tmp_path / "calibration.png"
    figure.write_bytes(b"\x89PNG")
    facts = {"dataset": "some/data", "command": "accelerate launch -m prism_pipelines.training --rank 2"}
    facts |= {"steps": 7, "metrics": {"eval_auroc": 0.875, "eval_ece": None}, "license": "mit", "figure": str(figure)}
    push_head_repo(trained(base), Commit(HEAD), facts=facts)
    files = hub.files(HEAD)
    card = files["README.md"].decode()
    header = ModelCard(card).data
    assert header.base_model == BASE and header.library_name == "peft" and header.license == "mit"
    assert {"lora", "prism", "masked-diffusion", "diffusers"} <= set(header.tags)
    assert "some/data" in card and "--rank 2" in card and "| eval_auroc | 0.875 |" in card and "eval_ece" not in card
    assert "PrismScheduler(num_remask=3, order='confidence')" in card and "calibration.png" in files
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(snippet, {})
    assert "PeftModel.from_pretrained(BertForMaskedLM" in card


def test_a_card_without_facts_invents_none(base):
    card = model_card(trained(base, lora=False), BASE, None, None, {}).content
    assert "Training" not in card and "metrics" not in card and "license" not in card and "no adapter" in card


def test_the_adapter_snippet_of_a_base_that_is_a_saved_pipeline_runs(hub, base):
    PrismPipeline.from_pretrained(base).push_to_hub("them/whole", what="pipeline")
    trained(base, name="them/whole").push_to_hub(HEAD)
    snippet = re.findall(r"```python\n(.*?)```", hub.files(HEAD)["README.md"].decode(), re.DOTALL)[1]
    assert 'from_pretrained("them/whole", subfolder="model")' in snippet
    exec(snippet, {})


def test_the_card_of_a_critic_does_not_claim_what_prism_means(base):
    pipe = trained(base, lora=False)
    pipe.scheduler = TokenCriticScheduler()
    card = model_card(pipe, BASE, None, None, {}).content
    assert "# Token-Critic quality head" in card and "2209.04439" in card
    assert "visible token is right" not in card and "2510.01384" not in card


def test_a_head_saved_again_without_its_adapter_leaves_none_behind(base, tmp_path):
    save_head_repo(trained(base), tmp_path / "head")
    save_head_repo(trained(base, lora=False), tmp_path / "head")
    assert not (tmp_path / "head" / "adapter_config.json").exists()


def test_a_key_mapped_family_shares_its_head_too(hub, tmp_path):
    hub.commit("them/tiny-llada", save_llada(tmp_path / "llada"))
    pipe = load(tmp_path / "llada", quality_head=QualityHead(H, base_model="them/tiny-llada"))
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    pipe.model.add_adapter(config, adapter_name="prism")
    pipe.model.eval()
    pipe.push_to_hub("me/tiny-llada-prism")
    again = PrismPipeline.from_pretrained("me/tiny-llada-prism")
    ids = torch.randint(0, 30, (2, 12))
    assert torch.equal(again.score(input_ids=ids)[0], pipe.score(input_ids=ids)[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"what": "adapter"}, '`what` must be "head" or "pipeline"'), ({"base_model": "./here"}, "not an id on the Hub")],
)
def test_wrong_arguments_are_named(base, arguments, words):
    with pytest.raises(ValueError, match=words):
        trained(base).push_to_hub(HEAD, **arguments)


def test_a_pipeline_without_a_head_has_none_to_push(base, tmp_path):
    with pytest.raises(ValueError, match="no quality head"):
        PrismPipeline.from_pretrained(base).push_to_hub(HEAD)
    with pytest.raises(ValueError, match="unknown entries"):
        save_head_repo(trained(base), tmp_path / "head", facts={"accuracy": 1})


def test_adapter_config_names_the_base_and_its_revision(base, tmp_path):
    folder = save_head_repo(trained(base), tmp_path / "head", base_revision="abc123")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, "abc123")
    assert json.loads((folder / "quality_head" / "config.json").read_text())["base_revision"] == "abc123"
