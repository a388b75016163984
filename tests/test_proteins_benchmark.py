"""The antibody example's tools on a tiny twin: regions, split, masking, likelihood, planted mutations, the table."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_convert import VOCAB
from transformers import BertConfig, BertForMaskedLM

from benchmarks import antibodies, proteins
from prism_pipelines import PrismPipeline, QualityHead
from prism_pipelines.hub.convert import character_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "examples" / "antibody" / "therapeutic.fasta"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random BERT of residues, long enough for a heavy chain, and a head for it."""
    folder = tmp_path_factory.mktemp("proteins")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(VOCAB), max_position_embeddings=160, pad_token_id=0, **sizes)
    twin = BertForMaskedLM(config)
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    twin.save_pretrained(folder / "model")
    character_tokenizer(VOCAB, config.to_dict()).save_pretrained(folder / "model")
    PrismPipeline.from_pretrained(folder / "model", quality_head=QualityHead(32, "mlp")).save_pretrained(
        folder / "head"
    )
    return folder


@pytest.fixture
def pipe(model):
    pipe = PrismPipeline.from_pretrained(model / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_published_chain_is_a_whole_heavy_chain_with_its_loops(capsys):
    chains = antibodies.heavy_chains(PUBLISHED)
    assert len(chains) == len(set(chains)) == 15 and capsys.readouterr().err == ""
    first = chains[0]
    cut = {name: first[place.start : place.stop] for name, place in antibodies.regions(first).items()}
    assert cut == {"H1": "GFNIKDTYIH", "H2": "RIYPTNGYTRYADSVKG", "H3": "SRWGGDGFYAMDY"}  # trastuzumab's
    assert antibodies.regions("DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSG") is None


def test_no_loop_of_the_test_chains_is_like_one_of_the_train_chains():
    chains = antibodies.heavy_chains(PUBLISHED)
    near = [chain.replace("SRWGGDGFYAMDY", "SRWGGDGYYAMDY") for chain in chains[:1]]
    train, test = antibodies.split([*chains, *near], 6)
    assert sorted([*train, *test]) == sorted([*chains, *near]) and len(test) == 6
    loops = [(antibodies.loop(one), antibodies.loop(other)) for one in train for other in test]
    assert all(antibodies.identity(one, other) <= antibodies.SAME for one, other in loops)
    assert antibodies.identity("SRWGGDGFYAMDY", "SRWGGDGYYAMDY") == 12 / 13


def test_sampled_chains_are_whole_and_the_same_for_the_same_seed(pipe, monkeypatch):
    monkeypatch.setattr(antibodies, "regions", lambda text: None if len(text) % 2 else {"H3": range(3)})
    one = antibodies.sample(pipe, 5, 2, 4, 0)
    assert one == antibodies.sample(pipe, 5, 2, 4, 0) and len(set(one)) == 5
    assert all(text.endswith(antibodies.END) and text.startswith(antibodies.BEGINNINGS) for text in one)


def test_what_is_masked_depends_on_sequence_and_seed_alone():
    chain = antibodies.heavy_chains(PUBLISHED)[0]
    assert len(proteins.masked_positions(chain, "60", 0)) == round(0.6 * len(chain))
    assert proteins.masked_positions(chain, "60", 0) == proteins.masked_positions(chain, "60", 0)
    assert proteins.masked_positions(chain, "60", 0) != proteins.masked_positions(chain, "60", 1)
    places = proteins.masked_positions(chain, "H3", 0)
    assert "".join(chain[i] for i in places) == "SRWGGDGFYAMDY"
    assert proteins.masked(chain, places, "?").replace("?", "") == chain.replace("SRWGGDGFYAMDY", "")


def test_the_likelihood_of_hiding_one_at_a_time_is_the_pseudo_log_likelihood(pipe):
    texts, places = ["EVQLVESGG", "QVQLQQ"], [[1, 4, 5], [0, 2]]
    found = proteins.likelihood(pipe, texts, places, 99, 2)
    exact = pipe.log_likelihood(texts, method="pseudo").token_log_probs
    for row, where in enumerate(places):
        expected = sum(float(exact[row, 1 + i]) for i in where) / len(where)
        assert found[row] == pytest.approx(expected, abs=1e-4)


def test_detection_ranks_the_planted_residue_among_the_others():
    scores = {"EVQL": [9, 0.5, 0.1, 0.5, 0.9, 9], "EVQK": [9, 0.5, 0.2, 0.2, 0.9, 9]}
    fake = SimpleNamespace(
        text_frame=SimpleNamespace(opening=(2,)),
        score=lambda texts, by: (torch.tensor([scores[text] for text in texts]), None, None),
    )
    found = proteins.detect(fake, "own", [("EVQL", 1), ("EVQL", 2), ("EVQK", 1)], 2)
    assert found["worst"] == [True, False, False]
    assert found["auroc"] == pytest.approx([1, (1 + 0.5) / 3, (2 + 0.5) / 3])
    chains = antibodies.heavy_chains(PUBLISHED)[:2]
    for (mutant, place), chain in zip(
        proteins.planted(chains, 2, 0), [c for c in chains for _ in range(2)], strict=True
    ):
        assert [i for i, (a, b) in enumerate(zip(mutant, chain, strict=True)) if a != b] == [place]


def test_the_table_has_every_arm_and_a_run_that_goes_on_repeats_nothing(model, tmp_path, capsys, monkeypatch):
    words = [str(model / "model"), str(PUBLISHED), "--quick", "--num-sequences", "3", "--forwards", "4", "--seeds", "0"]
    words += ["--quality-head", f"mine={model / 'head'}", "--left-out", "1", "--copies", "1"]
    words += ["--cells", str(tmp_path / "cells.jsonl"), "--table", str(tmp_path / "t.json")]
    assert proteins.main(words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [*proteins.arms_of({"mine": ""})]
    assert [row["arm"] for row in result["rows"]] == names * 2 and len(names) == 10
    assert {row["mean_nfe"] for row in result["rows"] if "judge" not in row["arm"]} <= {4.0, 8.0}
    assert [row["by"] for row in result["planted"]] == ["own probability", "leave one out", "head: mine"]
    table = (tmp_path / "t.md").read_text()
    assert all(f"| {name} |" in table for name in names) and "3 sequences, 1 seed, paired" in table
    cells = (tmp_path / "cells.jsonl").read_text()
    monkeypatch.setattr(proteins, "write", lambda *_: pytest.fail("a finished cell was run again"))
    assert proteins.main(words) == 0 and (tmp_path / "cells.jsonl").read_text() == cells


def test_the_example_is_made_of_commands_that_exist():
    """`run.sh` names files and flags that are there; the weights are not in the repository."""
    from prism_pipelines.cli.main import build_parser

    text = (ROOT / "examples" / "antibody" / "run.sh").read_text().replace("\\\n", " ")
    commands = [shlex.split(line.split("||")[0]) for line in text.splitlines() if line.strip().startswith("prism ")]
    assert [words[1] for words in commands] == ["convert", "infill", "score"]
    for words in commands:
        build_parser().parse_args(words[1:] if words[-1] != "\\" else words[1:-1])
    lines = [line.strip().removesuffix("> /dev/null") for line in text.splitlines() if "benchmarks.proteins" in line]
    assert proteins.parse_args(shlex.split(lines[0])[3:]).quick
    names = {path.name for path in (ROOT / "examples" / "antibody").iterdir()}
    assert names == {"run.sh", "rollouts.args", "therapeutic.fasta"}


def test_the_docs_have_the_table_of_the_committed_numbers():
    result = json.loads((ROOT / "docs" / "figures" / "proteins.json").read_text())
    assert proteins.markdown(result) in (ROOT / "docs" / "proteins.md").read_text()
    verified = json.loads((ROOT / "docs" / "figures" / "proteins_verified.json").read_text())
    assert (
        f"**{100 * verified['recovered']:.1f} %** of {verified['masked']:,}"
        in (ROOT / "docs" / "proteins.md").read_text()
    )
