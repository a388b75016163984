"""The scripts of examples/ on tiny models, and docs/models.md against the table of families."""

import importlib.util
import json
import re
import warnings
from pathlib import Path

import pytest
from family_twins import H, qwen, save_llada, save_mdlm
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer

from examples.local_hub import LocalHub
from prism_pipelines import FAMILIES, PrismPipeline, PrismScheduler, QualityHead

ROOT = Path(__file__).resolve().parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_bpe(folder, special, **config):
    """A byte-level BPE without merges, as vocab.json and merges.txt: letters, a space, and `special` from id 27 on."""
    folder.mkdir(exist_ok=True)
    vocabulary = [*LETTERS, "\u0120"] + special * ("added_tokens_decoder" not in config)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def llada_repository(folder):
    """LLaDA's tokenizer is one tokenizer.json, and knows no mask token."""
    save_llada(folder)
    words = ["<unk>", "<|startoftext|>", "<|endoftext|>", "<|eot_id|>", *LETTERS]
    letters = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    letters.pre_tokenizer = Split("", "isolated")
    letters.decoder = Fuse()
    letters.add_special_tokens(words[1:4])
    letters.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT, "model_max_length": 10**30}
    config |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def dream_repository(folder):
    """Dream's tokenizer is a class of its own repository, over the files of Qwen2's."""
    qwen("Dream", biases=True)(folder)
    special = {37: "<|endoftext|>", 38: "<|im_end|>", 39: "<|mask|>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return write_bpe(
        folder,
        list(special.values()),
        tokenizer_class="DreamTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        added_tokens_decoder={str(i): {"content": token, **flags} for i, token in special.items()},
        chat_template=CHAT, eos_token="<|endoftext|>", pad_token="<|endoftext|>", mask_token="<|mask|>",
    )  # fmt: skip


@pytest.fixture
def authors_hub(monkeypatch, tmp_path):
    """Tiny models under the names, keys and file layouts of the real repositories."""
    with LocalHub() as hub:
        hub.connect(monkeypatch, tmp_path / "cache")
        hub.commit("GSAI-ML/LLaDA-8B-Instruct", llada_repository(tmp_path / "llada"))
        hub.commit("Dream-org/Dream-v0-Instruct-7B", dream_repository(tmp_path / "dream"))
        hub.commit("kuleshov-group/mdlm-owt", save_mdlm(tmp_path / "mdlm", vocab=50258))
        ends = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")}
        gpt2 = write_bpe(tmp_path / "gpt2", ["<|endoftext|>"], tokenizer_class="GPT2Tokenizer", **ends)
        hub.commit("openai-community/gpt2", gpt2)
        yield hub


@pytest.mark.parametrize("family", ["llada", "dream", "mdlm"])
def test_language_models_runs_each_recipe_on_the_layout_of_the_real_repository(family, authors_hub, capsys):
    arguments = [family, "--prompt", "why is the sky blue", "--gen-length", "64", "--num-inference-steps", "16"]
    arguments += ["--dtype", "float32", "--num-samples", "2", "--device", "cpu"]
    texts = script("language_models").main(arguments)
    assert len(texts) == 2 and any(texts)
    assert all(re.fullmatch("[a-z ]{0,64}", text) for text in texts)
    assert re.search(r"\[\d+ forward passes\]", capsys.readouterr().out)
    asked = [path for _, path in authors_hub.requests]
    assert not any(path.endswith((".py", ".bin")) for path in asked)  # no code of a repository, no pickle


def test_language_models_with_a_head(authors_hub, tmp_path):
    QualityHead(H, base_model="GSAI-ML/LLaDA-8B-Instruct").save_pretrained(tmp_path / "head" / "quality_head")
    PrismScheduler(num_remask=2).save_pretrained(tmp_path / "head" / "scheduler")
    authors_hub.commit("you/llada-8b-prism", tmp_path / "head")
    arguments = ["llada", "--quality-head", "you/llada-8b-prism", "--prompt", "why", "--gen-length", "32"]
    assert len(script("language_models").main([*arguments, "--num-inference-steps", "8", "--device", "cpu"])) == 1


def test_a_folder_of_mdlm_downloads_no_tokenizer(authors_hub, tmp_path):
    with pytest.warns(
        UserWarning, match="has no tokenizer, and the one of 'openai-community/gpt2' cannot be downloaded"
    ):
        pipe = PrismPipeline.from_pretrained(tmp_path / "mdlm")
    assert pipe.tokenizer is None and not authors_hub.requests
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert PrismPipeline.from_pretrained(tmp_path / "mdlm", tokenizer=tokenizer).tokenizer is tokenizer


def test_the_docs_list_every_family_with_its_facts():
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    rows = {
        line.split("`")[1]: line for line in lines if line.startswith("| `") and not line.startswith("| `model_type")
    }
    assert set(rows) == set(FAMILIES), "the table of docs/models.md has a line for each row of FAMILIES, and no other"
    for key, spec in FAMILIES.items():
        line = f"the line of {key!r} in docs/models.md"
        assert str(spec.mask_token_id) in rows[key], f"{line}: the mask id of its row is {spec.mask_token_id}"
        assert ("i - 1" in rows[key]) == (spec.logit_shift == 1), f"{line}: logits at i - 1, or not"
        assert ("untested" in rows[key]) == (not spec.recipe.tested), f"{line}: untested, or not"
        native = spec.recipe.native_class or "remote code"
        assert native in rows[key] or "native masked LM" in rows[key], f"{line}: its route is {native}"
        blocks = f"block-causal, {spec.block_length}" in rows[key]
        assert blocks == (spec.attention == "block_causal"), f"{line}: its attention is {spec.attention}"
