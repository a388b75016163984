"""`prism convert`: pickled checkpoints under the names their authors gave them, as folders that load here."""

import json
import os
import pickle

import pytest
import torch
from family_twins import MASK, checkpoint
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from prism_pipelines import PrismPipeline
from prism_pipelines.cli.main import main
from prism_pipelines.hub.convert import convert_checkpoint
from prism_pipelines.models.probes import probe_tokenizer

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *RESIDUES]  # that of AntiBERTy
SEQUENCE = "EVQLVESGGGLVQPGGSLRLSCAAS"


def antibody_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(VOCAB), max_position_embeddings=64, pad_token_id=0, **sizes)
    model = BertForMaskedLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases too, or a forgotten one would not be seen
    return model


def save_antiberty(folder, wrap=lambda weights: weights, legacy=False):
    """A tiny twin of AntiBERTy under its key names: heads of its own, a pooler, a buffer; vocab.txt one folder up."""
    model = antibody_model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["bert.embeddings.position_ids"] = torch.arange(64)[None]
    weights |= {"bert.pooler.dense.weight": torch.randn(32, 32), "bert.pooler.dense.bias": torch.randn(32)}
    for name, rows in (("species", 6), ("chain", 2), ("graft", 2)):
        weights |= {f"cls.{name}.weight": torch.randn(rows, 32), f"cls.{name}.bias": torch.randn(rows)}
    folder.mkdir(parents=True)
    config = model.config.to_dict() | {"architectures": ["AntiBERTy"], "_name_or_path": "/home/them/checkpoint-1"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(wrap(weights), folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (folder.parent / "vocab.txt").write_text("\n".join(VOCAB))
    return folder, model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_checkpoint_with_a_vocabulary_of_residues_is_converted_whole(tmp_path, legacy, capsys):
    source, model = save_antiberty(tmp_path / "source", legacy=legacy)
    vocab = str(tmp_path / "vocab.txt")
    assert main(["convert", str(source), str(tmp_path / "out"), "--vocab", vocab, "--text", SEQUENCE]) == 0
    printed = capsys.readouterr().out
    assert "left out: cls.species.weight" in printed and "tokenizer?        ok: 25 ids" in printed
    pipe = PrismPipeline.from_pretrained(tmp_path / "out")
    ids = pipe.tokenizer(SEQUENCE, return_tensors="pt").input_ids
    assert ids[0].tolist() == [2, *(VOCAB.index(letter) for letter in SEQUENCE), 3]
    assert torch.equal(logits(pipe.model, ids), logits(model, ids))
    assert pipe.mask_token_id == 4 and pipe.tokenizer.decode(ids[0], skip_special_tokens=True) == SEQUENCE
    assert pipe.tokenizer(" ".join(SEQUENCE)).input_ids == ids[0].tolist()
    pipe.set_progress_bar_config(disable=True)
    text = pipe(infill=f"{SEQUENCE}[MASK][MASK]", num_inference_steps=2).texts[0]
    assert text.startswith(SEQUENCE) and len(text) == len(SEQUENCE) + 2 and set(text) <= set(RESIDUES)
    assert "/home/them" not in (tmp_path / "out" / "config.json").read_text()


def old_norms(weights):
    changed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    return {name.replace(*next(((k, v) for k, v in changed.items() if k in name), ("", ""))): value
            for name, value in weights.items()}  # fmt: skip


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": {f"model.{name}": value for name, value in weights.items()}, "epoch": 3},
        lambda weights: {"model": {f"module.{name}": value for name, value in weights.items()}, "step": 1},
        lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()},
        old_norms,
    ],
)
def test_names_of_training_wrappers_and_of_old_norms_are_mapped(tmp_path, wrap):
    source, model = save_antiberty(tmp_path / "source", wrap)
    done = convert_checkpoint(str(source), tmp_path / "out", vocab=tmp_path / "vocab.txt")
    ids = torch.tensor([[2, 8, 4, 9, 3]])
    assert torch.equal(logits(PrismPipeline.from_pretrained(tmp_path / "out").model, ids), logits(model, ids))
    assert done.renamed and "cls.species.weight" in " ".join(done.left_out)


def test_parts_with_an_index_are_one_checkpoint(tmp_path):
    source, model = save_antiberty(tmp_path / "source")
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    index = {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        torch.save({name: weights[name] for name in names}, source / f"pytorch_model-{number}.bin")
        index |= dict.fromkeys(names, f"pytorch_model-{number}.bin")
    (source / "pytorch_model.bin").unlink()
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    convert_checkpoint(str(source), tmp_path / "out", vocab=tmp_path / "vocab.txt")
    ids = torch.tensor([[2, 8, 4, 9, 3]])
    assert torch.equal(logits(PrismPipeline.from_pretrained(tmp_path / "out").model, ids), logits(model, ids))
    (source / "pytorch_model-1.bin").unlink()
    with pytest.raises(OSError, match=r"lacks pytorch_model-1\.bin"):
        convert_checkpoint(str(source), tmp_path / "again", vocab=tmp_path / "vocab.txt")


def test_a_family_that_is_loaded_by_renaming_keeps_its_authors_names(tmp_path):
    weights = load_file(checkpoint("llada") / "model.safetensors")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((checkpoint("llada") / "config.json").read_text())
    torch.save({f"module.{name}": value for name, value in weights.items()}, source / "pytorch_model.bin")
    convert_checkpoint(str(source), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == weights.keys()
    ids = torch.tensor([[3, MASK, 5]])
    same = PrismPipeline.from_pretrained(checkpoint("llada")).model
    assert torch.equal(logits(PrismPipeline.from_pretrained(tmp_path / "out").model, ids), logits(same, ids))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_pickle_that_would_run_code_runs_none_and_writes_nothing(tmp_path, capsys):
    source, _ = save_antiberty(tmp_path / "source", lambda weights: weights | {"extra": Bomb(tmp_path / "ran")})
    assert main(["convert", str(source), str(tmp_path / "out"), "--vocab", str(tmp_path / "vocab.txt")]) == 2
    assert "more than tensors" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    with open(source / "pytorch_model.bin", "wb") as file:
        pickle.dump({"weight": Bomb(tmp_path / "ran")}, file)
    with pytest.raises(ValueError, match="more than tensors"):
        convert_checkpoint(str(source), tmp_path / "out", vocab=tmp_path / "vocab.txt")
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_converted_is_named_and_nothing_is_written(tmp_path):
    source, _ = save_antiberty(tmp_path / "source")
    vocab, file = tmp_path / "vocab.txt", source / "pytorch_model.bin"
    whole, config = file.read_bytes(), json.loads((source / "config.json").read_text())
    weights = torch.load(file, weights_only=True)

    def refused(words, error=ValueError, **arguments):
        with pytest.raises(error, match=words):
            convert_checkpoint(str(source), tmp_path / "out", **({"vocab": vocab} | arguments))
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == []

    torch.save({name: value for name, value in weights.items() if "layer.1" not in name}, file)
    refused(r"config\.json says 2 layers, and the files hold 1")
    torch.save({name: value for name, value in weights.items() if "layer.0" not in name}, file)
    refused(r"weights of BertForMaskedLM are not in .*layer\.0")
    torch.save(weights | {"cls.predictions.transform.dense.bias": torch.zeros(3)}, file)
    refused(r"transform\.dense\.bias is \(3,\), and its config\.json says \(32,\)")
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    torch.save(wrapped | {"module.cls.predictions.transform.dense.bias": torch.zeros(3)}, file)
    refused(r"transform\.dense\.bias is \(3,\), and BertForMaskedLM has \(32,\)")
    torch.save(weights | {"cls.predictions.decoder.weight": torch.zeros(25, 32)}, file)
    refused("differ, and BertForMaskedLM ties them")
    torch.save({"epoch": 3}, file)
    refused("holds no tensors")
    file.write_bytes(whole[:1000])
    refused("cannot be read as weights")
    file.write_bytes(whole)
    (source / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    refused(r"do not fit BertForMaskedLM.*its config\.json says")
    (source / "config.json").write_text(json.dumps(config))
    vocab.write_text("\n".join(VOCAB[:5]))
    refused("has 5 ids only, and the model has rows for 25")
    vocab.write_text("\n".join([*VOCAB[:-1], "A"]))
    refused("line 25 repeats the token 'A'")
    vocab.write_text("\n".join([*VOCAB[:-1], "hello"]))
    refused("tokens of several characters")
    vocab.write_text("\n".join(VOCAB))
    refused("has no other", OSError, weights="other")
    file.unlink()
    refused("--weights FILE", OSError)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        convert_checkpoint(str(source), tmp_path / "full")


def test_a_tokenizer_that_cannot_be_the_models_is_found(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    five = BertTokenizer(vocab_file=str(tmp_path / "vocab.txt"))  # transformers 5.23 does not read it
    assert probe_tokenizer(five, 25).verdict == "wrong"
    words = BertTokenizer(vocab={token: i for i, token in enumerate(VOCAB)}, do_lower_case=False)
    assert len(words) == 25
    finding = probe_tokenizer(words, 25)  # a sequence is one unknown word to it
    assert finding.verdict == "wrong" and "prism convert" in finding.seen
    assert probe_tokenizer(None, 25).verdict == "unknown"


@pytest.mark.parametrize(("ids", "rows"), [(126349, 126464), (151669, 152064), (50257, 50258), (33, 64), (16, 16)])
def test_rows_that_round_a_vocabulary_up_are_no_fault(ids, rows):
    from prism_pipelines.models.probes import wrong_size

    assert wrong_size(ids, rows) is None and wrong_size(rows + 1, rows) and wrong_size(5, 25)
