"""`prism info`: what it says about a model, and that its probes find a model that is not as declared."""

import dataclasses
import json

import pytest
import torch
from family_twins import CHECKPOINTS, MASK, checkpoint, load
from test_pipeline import twin
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from prism_pipelines import FAMILIES, MDMSpec, PrismPipeline, bundled
from prism_pipelines.cli.main import main
from prism_pipelines.models.denoiser import MaskedDenoiser
from prism_pipelines.models.probes import masked_nll, probe_attention, probe_mask, probe_rope, probe_shift, run_probes
from prism_pipelines.sudoku import sudoku_tokenizer

QWEN = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}


class Copycat(torch.nn.Module):
    """Knows its text: puts all mass on token i, at row i, or at row i - 1 if shifted."""

    def __init__(self, text, shift, vocab_size=16):
        super().__init__()
        self.text, self.shift = text.roll(-shift, dims=1), shift
        self.embedding = torch.nn.Embedding.from_pretrained(torch.eye(vocab_size))
        self.decoder = torch.nn.Linear(vocab_size, vocab_size, bias=False)
        self.decoder.weight.data.copy_(5 * torch.eye(vocab_size))

    def get_output_embeddings(self):
        return self.decoder

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        return self.decoder(self.embedding(self.text))


@pytest.mark.parametrize("declared", [0, 1])
@pytest.mark.parametrize("true_shift", [0, 1])
def test_the_shift_probe_sees_where_the_prediction_is(declared, true_shift):
    text = torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9, 10, 2, 4, 6]])
    model = Copycat(text, true_shift)
    finding = probe_shift(MaskedDenoiser(model, MDMSpec(0, logit_shift=declared)), text)
    assert finding.verdict == ("ok" if declared == true_shift else "wrong")
    best = masked_nll(model, MDMSpec(0, logit_shift=true_shift), text)
    # 14 allowed rivals at logit 0 against one at 5; the mask id is forbidden.
    assert best == pytest.approx(-torch.log_softmax(torch.tensor([5.0] + [0.0] * 14), 0)[0].item(), abs=1e-5)


def test_the_shift_probe_takes_no_side_without_evidence():
    text = torch.arange(2, 12)[None]
    denoiser = MaskedDenoiser(twin("bert"), MDMSpec(1))
    for parameter in denoiser.model.parameters():
        parameter.data.mul_(1e-3)
    assert probe_shift(denoiser, text).verdict == "unknown"
    assert probe_shift(denoiser, None).verdict == "unknown"


def test_a_causal_model_and_broken_rotary_frequencies_are_found():
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN)).eval()
    assert probe_attention(MaskedDenoiser(model, MDMSpec(1))).verdict == "wrong"
    spec = MDMSpec(1, mask_format="additive", extra_inputs=("position_ids",))
    assert probe_attention(MaskedDenoiser(model, spec)).verdict == "ok"
    assert probe_rope(model).verdict == "ok"
    model.model.rotary_emb.inv_freq.fill_(float("nan"))
    assert probe_rope(model).verdict == "wrong"


def test_a_mask_that_is_also_the_padding_token_is_found():
    tokenizer = sudoku_tokenizer()
    pipe = PrismPipeline(twin(), tokenizer)
    assert {finding.probe: finding.verdict for finding in run_probes(pipe)}["mask token"] == "ok"
    tokenizer.pad_token = tokenizer.mask_token
    assert {finding.probe: finding.verdict for finding in run_probes(pipe)}["mask token"] == "wrong"


def test_a_mask_that_is_an_ordinary_token_is_right_only_where_its_authors_chose_it():
    # DiffuLLaMA has id 811 of Llama's own vocabulary as its mask; the Sudoku tokenizer has digits.
    tokenizer = sudoku_tokenizer()
    digit, source = tokenizer.convert_tokens_to_ids("7"), FAMILIES["llama:diffullama"].source
    for spec in (MDMSpec(digit), MDMSpec(digit, source=source)):
        assert probe_mask(PrismPipeline(twin(), tokenizer, mdm_spec=spec)).verdict == "wrong"
    model = BertForMaskedLM(BertConfig(**QWEN | {"vocab_size": 812}))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(812)}, unk_token="w0"))
    ordinary = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    assert probe_mask(PrismPipeline(model, ordinary, mdm_spec=MDMSpec(811, source=source))).verdict == "ok"
    assert probe_mask(PrismPipeline(model, ordinary, mdm_spec=MDMSpec(811))).verdict == "wrong"


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_probes_find_nothing_wrong_with_a_family(family):
    verdicts = {finding.probe: finding.verdict for finding in run_probes(load(checkpoint(family)))}
    without = dict.fromkeys(("tokenizer", "mask token", "logit shift"), "unknown")  # the twins have no tokenizer
    assert verdicts == {"attention": "ok", "rotary embedding": "ok"} | without


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_info_of_a_family(family, capsys):
    assert main(["info", str(checkpoint(family)), "--mask-token-id", str(MASK), "--json"]) == 0
    facts, row = json.loads(capsys.readouterr().out)["facts"], FAMILIES[family]
    _, block, shift = CHECKPOINTS[family]
    assert facts["class"] == f"{row.recipe.native_class} (native)"
    assert facts["mask_token_id"] == f"{MASK} (given)"
    assert facts["attention"] == (f"block_causal, blocks of {block}" if block else "bidirectional")
    assert facts["logit_shift"] == str(shift)
    assert facts["attention mask"].startswith(row.mask_format)
    assert facts["keys renamed"] == (f"{len(row.recipe.key_mapping)} rules" if row.recipe.key_mapping else "no")
    assert facts["LoRA targets"] == ", ".join(row.lora_targets)
    assert facts["source"] == row.source and facts["tested"] == "against an independent reference"
    assert facts["quality head"] == "none" and "SelfConfidenceScheduler" in facts["remasking"]


@pytest.mark.parametrize("family", ["llada", "Dream", "sdar", "Fast_dLLM_Qwen", "mdlm", "bert"])
def test_the_shift_of_a_model_that_knows_its_text_is_right_or_found_wrong(family):
    """Trained on one text with hidden tokens, read where its authors read it; then declared otherwise."""
    pipe, shift = load(checkpoint(family)), CHECKPOINTS[family][2]
    generator = torch.Generator().manual_seed(0)
    text = torch.randperm(MASK - 8, generator=generator)[None] + 8
    optimizer = torch.optim.AdamW(pipe.model.parameters(), lr=5e-3)
    for _ in range(60):
        hide = torch.rand(text.shape, generator=generator) < 0.2
        hide[0, 0], hide[0, -1] = False, True
        hidden = pipe.denoiser.hidden(text.masked_fill(hide, MASK))
        loss = torch.nn.functional.cross_entropy(pipe.denoiser.logits(hidden, hide), text[hide])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert probe_shift(pipe.denoiser, text).verdict == "ok"
    declared = dataclasses.replace(pipe.denoiser.spec, logit_shift=1 - shift)
    assert probe_shift(MaskedDenoiser(pipe.model, declared), text).verdict == "wrong"


def test_info_of_a_model_under_its_authors_names(capsys):
    assert main(["info", str(checkpoint("gpt2:diffugpt-m")), "--mask-token-id", str(MASK)]) == 0
    out = capsys.readouterr().out
    for line in ("GPT2LMHeadModel (native)", "39 (given)", "keys renamed      2 rules", "diffusionfamily/diffugpt-m"):
        assert line in out


def test_info_of_the_bundled_model(capsys):
    assert main(["info", str(bundled("sudoku"))]) == 0
    out = capsys.readouterr().out
    assert "RobertaPreLayerNormForMaskedLM (native)" in out
    assert "mlp, hidden size 128" in out
    assert "attention?        ok: position 0 changes with the last token" in out


def test_info_of_a_plain_model_as_json(tmp_path, capsys):
    BertForMaskedLM(BertConfig(**QWEN | {"vocab_size": 120})).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["mask_token_id"].startswith("103 (from the row of its family")
    assert told["facts"]["quality head"] == "none"
    assert "SelfConfidenceScheduler" in told["facts"]["remasking"]
    assert main(["info", str(tmp_path), "--json", "--mask-token-id", "7"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["mask_token_id"] == "7 (given)"


def test_info_says_in_one_line_why_a_model_cannot_be_loaded(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
