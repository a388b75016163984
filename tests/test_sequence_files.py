"""`prism infill` and `prism score`: every row comes out, filled or with the reason; the numbers are the model's."""

import csv
import json
import re

import pytest
import torch
from test_convert import RESIDUES, save_antiberty

from prism_pipelines import PrismPipeline, QualityHead
from prism_pipelines.cli.main import main
from prism_pipelines.generation import infill_many, quality_page, score_many
from prism_pipelines.generation.sequences import masked_text, parse_spans, read_sequences
from prism_pipelines.hub.convert import convert_checkpoint

FASTA = """>one a heavy chain
EVQLVESGGG
LVQPXXS
>two
evqxvesg
>
QVQLVXSGAE
>two
EVQLVESGGG
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny twin of AntiBERTy, converted."""
    folder = tmp_path_factory.mktemp("antibody")
    source, _ = save_antiberty(folder / "source")
    convert_checkpoint(str(source), folder / "model", vocab=folder / "vocab.txt")
    return folder / "model"


@pytest.fixture
def pipe(model):
    pipe = PrismPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_head(pipe, temperature=None):
    torch.manual_seed(1)
    head = QualityHead(32, "mlp", **({} if temperature is None else {"temperature": temperature}))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    made = PrismPipeline(pipe.model, pipe.tokenizer, head)
    made.set_progress_bar_config(disable=True)
    return made


def written(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- nothing is lost --------------------------------------------------------------------------------------------------


def test_every_record_comes_back_with_its_given_residues_and_its_case(model, tmp_path, capsys):
    source, out = written(tmp_path, "a.fasta", FASTA), tmp_path / "out.jsonl"
    words = [
        "infill",
        str(model),
        str(source),
        "--out",
        str(out),
        "--mask",
        "Xx",
        "--num-inference-steps",
        "3",
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    told, rows = capsys.readouterr().err, rows_of(out)
    assert "line 8: the name 'two' is that of line 4" in told and "4 rows, 1 with nothing to fill" in told
    assert [row["header"] for row in rows] == ["one a heavy chain", "two", "", "two"]
    assert [row["id"] for row in rows] == ["one", "two", 2, "two"]
    for row, given in zip(rows, ["EVQLVESGGGLVQP..S", "evq.vesg", "QVQLV.SGAE", "EVQLVESGGG"], strict=True):
        assert re.fullmatch(given.replace(".", f"[{RESIDUES}]"), row["filled"]), row
        assert len(row["quality"]) == given.count(".")
    before = out.read_bytes()
    assert main(words) == 0 and out.read_bytes() == before


BAD = {  # file ending: (content, line, what is said)
    "gap": (".fasta", ">a\nEVQL\n>b\nEV-QL\n", 3, "'-' at position 3 is unknown"),
    "stop codon": (".fa", ">a\nEVQL\n>b\nEVQL*\n", 3, "'*' at position 5 is unknown"),
    "alphabet": (".txt", "EVQL\n\nEVQZ\n", 3, "'Z' at position 4"),
    "no residues": (".faa", ">a\n>b\nEVQL\n", 1, "no residues follow this header"),
    "too long": (".txt", "EVQL\n" + "E" * 70 + "\n", 2, "72 tokens are too long, the model takes 64"),
    "megabytes": (".txt", "EVQL\n" + "E" * 10_000_000, 2, "10,000,000 characters are too long"),
    "megabytes in a cell": (
        ".csv",
        'name,sequence\na,EVQL\nb,"' + "E" * 10_000_000 + '"\n',
        3,
        "10,000,000 characters",
    ),
    "cells": (".csv", "name,sequence\na,EVQL\nb,EVQL,x\n", 3, "1 more cells than the header line has"),
    "no column": (".jsonl", '{"sequence": "EVQL"}\n{"seq": "EVQL"}\n', 2, "no column 'infill' or 'sequence' or 'text'"),
    "number": (".jsonl", '{"sequence": "EVQL"}\n\n{"sequence": 3}\n', 3, "no text in column 'sequence'"),
    "list": (".jsonl", '"EVQL"\n[1]\n', 2, "neither an object nor a string"),
    "positions": (
        ".jsonl",
        '{"text": "EVQL", "positions": "2-9"}\n"EVQL"\n',
        1,
        "positions '2-9' do not lie in 1 to 4",
    ),
    "positions of words": (".jsonl", '{"text": "EVQL", "positions": "H3"}\n"EVQL"\n', 1, "are written as 97-110,120"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_row_that_cannot_be_used_is_named_by_its_line_and_kept(pipe, tmp_path, name):
    ending, content, line, said = BAD[name]
    source, out = written(tmp_path, f"in{ending}", content), tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match=rf"1 of 2 rows .*line {line} \(.*{re.escape(said)}"):
        infill_many(pipe, source, out, progress=False)
    assert list(tmp_path.glob("out*")) == []
    told = infill_many(pipe, source, out, progress=False, invalid="skip", num_inference_steps=2)
    assert (told["rows"], told["skipped"], told["complete"]) == (2, 1, True)
    rows = rows_of(out)
    (bad,) = [row for row in rows if row["error"] is not None]
    (good,) = [row for row in rows if row["error"] is None]
    assert said in bad["error"] and bad["filled"] is None and good["filled"] == "EVQL"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.fasta", "EVQL\n>a\nEVQL\n", "line 1: residues before the first header"),
        ("a.jsonl", '{"text": "EVQL"}\n{"text"\n', "line 2 is not JSON"),
        ("a.fasta", "\n\n", "holds no sequence"),
        ("a.docx", "EVQL", "must end in .fasta"),
        (
            "a.csv",
            "name,sequence,confidence\na,EVQL,1\n",
            "Line 2 has the column 'confidence', which the output writes",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(pipe, tmp_path, name, content, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        infill_many(pipe, written(tmp_path, name, content), tmp_path / "out.jsonl", progress=False)
    with pytest.raises(ValueError, match=r"must end in \.jsonl, \.csv or \.fasta"):
        infill_many(pipe, written(tmp_path, "b.fasta", FASTA), tmp_path / "out.xlsx", marks="Xx", progress=False)


def test_a_column_that_no_row_has_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'heavy'; it has name, sequence"):
        read_sequences(written(tmp_path, "a.csv", "name,sequence\na,EVQL\n"), "heavy")


# --- what is filled ---------------------------------------------------------------------------------------------------


def test_each_format_in_and_out_gives_the_same_fills(pipe, tmp_path):
    texts = ["EVQLXXSGG", "QVXLVESG"]
    sources = {
        "a.txt": "\n".join(texts),
        "a.csv": "name,sequence\n" + "".join(f"s{i},{text}\n" for i, text in enumerate(texts)),
        "a.tsv": "name\tsequence\n" + "".join(f"s{i}\t{text}\n" for i, text in enumerate(texts)),
        "a.jsonl": "".join(json.dumps({"name": f"s{i}", "text": text}) + "\n" for i, text in enumerate(texts)),
        "a.fasta": "".join(f">s{i}\n{text}\n" for i, text in enumerate(texts)),
    }
    found = []
    for name, content in sources.items():
        source = written(tmp_path, name, content)
        for ending in (".jsonl", ".csv", ".fasta"):
            out = tmp_path / f"{name}.out{ending}"
            infill_many(pipe, source, out, marks="X", num_inference_steps=2, progress=False)
            if ending == ".fasta":
                found.append(re.findall(r"^[^>].*$", out.read_text(), re.M))
            elif ending == ".csv":
                found.append([row["filled"] for row in csv.DictReader(out.open(newline=""))])
            else:
                found.append([row["filled"] for row in rows_of(out)])
    assert all(one == found[0] for one in found) and "X" not in "".join(found[0])


def test_positions_of_a_row_count_characters_from_one(pipe, tmp_path):
    rows = [{"text": "EVQLVESGG", "positions": "1-2,9"}, {"text": "EVQLVESGG", "positions": [[4, 5], 7]}]
    rows.append({"text": "EVQLVESGG"})
    source = written(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    infill_many(pipe, source, tmp_path / "o.jsonl", positions="3", num_inference_steps=2, progress=False)
    for row, given in zip(rows_of(tmp_path / "o.jsonl"), ["..QLVESG.", "EVQ..E.GG", "EV.LVESGG"], strict=True):
        assert re.fullmatch(given, row["filled"]) and len(row["quality"]) == given.count(".")
    assert parse_spans("97-110, 120", 120) == [(96, 110), (119, 120)]


def test_in_text_a_mask_stands_for_each_token_and_not_for_each_letter():
    from test_generate_many import tokenizer

    words = tokenizer(unk_token="[UNK]")
    assert masked_text("w1 w22 w13", words, "4-5") == "w1 [MASK] w13"
    assert masked_text("w1 ? w13", words, None, "?") == "w1 [MASK] w13"
    assert masked_text("w1 [MASK] w-13", words, None, "", "-M") == "w1 [MASK] w13"  # the mask token's name stays whole


def test_samples_are_lines_of_their_own_and_the_surest_is_kept_alone(pipe, tmp_path):
    source = written(tmp_path, "a.fasta", ">a\nXXXXXXXXXXXX\n>b\nEVQL\n")
    asked = {"marks": "X", "num_inference_steps": 4, "num_samples": 3, "progress": False}
    judged = with_head(pipe, temperature=1.5)
    infill_many(judged, source, tmp_path / "all.jsonl", **asked)
    infill_many(judged, source, tmp_path / "best.jsonl", **asked, select="confidence")
    rows = rows_of(tmp_path / "all.jsonl")
    assert [row["sample"] for row in rows] == [0, 1, 2, None] and len({row["filled"] for row in rows[:3]}) == 3
    best, other = rows_of(tmp_path / "best.jsonl")
    surest = max(rows[:3], key=lambda row: row["confidence"])
    assert best["filled"] == surest["filled"] and best["confidence"] == surest["confidence"]
    assert best["nfe"] == sum(row["nfe"] for row in rows[:3]) and other["filled"] == "EVQL"
    with pytest.raises(ValueError, match="needs a calibrated quality head"):
        infill_many(pipe, source, tmp_path / "no.jsonl", **asked, select="confidence")


def test_a_run_that_broke_off_goes_on_and_writes_what_an_unbroken_one_does(pipe, tmp_path, monkeypatch):
    source = written(tmp_path, "a.fasta", "".join(f">s{i}\nEVQ{'X' * (1 + i % 5)}SGG\n" for i in range(9)))
    asked = {"marks": "X", "num_inference_steps": 3, "progress": False}
    infill_many(pipe, source, tmp_path / "whole.jsonl", **asked, batch_size=2)
    call, calls = PrismPipeline.__call__, []

    def breaks(self, **more):
        calls.append(more)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(self, **more)

    with monkeypatch.context() as patched:
        patched.setattr(PrismPipeline, "__call__", breaks)
        with pytest.raises(KeyboardInterrupt):
            infill_many(pipe, source, tmp_path / "out.jsonl", **asked, batch_size=2)
    assert not (tmp_path / "out.jsonl").exists()
    told = infill_many(pipe, source, tmp_path / "out.jsonl", **asked, batch_size=2)
    assert told["generated"] == 5  # two batches of two were done
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    infill_many(pipe, source, tmp_path / "one.jsonl", **asked, batch_size=1)
    assert [row["filled"] for row in rows_of(tmp_path / "one.jsonl")] == [
        row["filled"] for row in rows_of(tmp_path / "whole.jsonl")
    ]
    with pytest.raises(ValueError, match="belongs to another run: seed was 0 and is 1"):
        infill_many(pipe, source, tmp_path / "out.jsonl", **asked | {"seed": 1})


# --- what is scored ---------------------------------------------------------------------------------------------------


def probabilities(pipe, ids):
    """Of every token at every place of some ids (L,), without tokens that are never predicted; float64 (L, V)."""
    with torch.no_grad():
        logits = pipe.model(ids[None]).logits[0].double()
    logits[:, [0, 4]] = -torch.inf  # padding and mask
    return logits.softmax(-1)


@pytest.mark.parametrize("by", ["own", "leave_one_out"])
def test_scores_are_the_models_own_probabilities(pipe, tmp_path, by):
    texts = ["EVQLVESGG", "QVQLX"]
    source = written(tmp_path, "a.txt", "\n".join(texts))
    score_many(pipe, source, tmp_path / "o.jsonl", by=by, marks="X", progress=False)
    for row, text in zip(rows_of(tmp_path / "o.jsonl"), texts, strict=True):
        ids = torch.tensor([2, *(4 if letter == "X" else 5 + RESIDUES.index(letter) for letter in text), 3])
        expected = []
        for i, letter in enumerate(text, 1):
            seen = ids.clone()
            if by == "leave_one_out":
                seen[i] = 4
            expected.append(None if letter == "X" else float(probabilities(pipe, seen)[i, ids[i]]))
        assert row["tokens"] == ["[MASK]" if letter == "X" else letter for letter in text]
        assert [one is None for one in row["quality"]] == [one is None for one in expected]
        known = [(one, other) for one, other in zip(row["quality"], expected, strict=True) if other is not None]
        assert all(abs(one - other) < 1e-4 for one, other in known)
        worst = min(range(len(text)), key=lambda i: (expected[i] is None, expected[i] or 0))
        assert row["lowest_token"] == f"{text[worst]}{worst + 1}"
        assert row["mean_quality"] == pytest.approx(sum(one for _, one in known) / len(known), abs=1e-3)


def test_with_a_head_scores_are_its_quality(pipe, tmp_path):
    judged, text = with_head(pipe), "EVQLVESGG"
    score_many(judged, written(tmp_path, "a.txt", text), tmp_path / "o.jsonl", progress=False)
    with torch.no_grad():
        hidden = judged.denoiser.hidden(torch.tensor([judged.tokenizer(text).input_ids]))
        expected = judged.quality_head(hidden).sigmoid()[0, 1:-1].tolist()
    assert rows_of(tmp_path / "o.jsonl")[0]["quality"] == pytest.approx(expected, abs=1e-4)


def test_score_refuses_what_it_cannot_judge_by(pipe):
    with pytest.raises(ValueError, match="needs a quality head"):
        pipe.score("EVQL")
    with pytest.raises(ValueError, match="`by` must be one of 'head', 'own', 'leave_one_out', got 'loo'"):
        pipe.score("EVQL", by="loo")
    with pytest.raises(ValueError, match="`given` is read by heads with context"):
        pipe.score("EVQL", by="own", given="EV")


def test_the_page_colours_every_residue_and_runs_nothing_of_the_file(model, tmp_path):
    source = written(tmp_path, "a.fasta", "><script>alert(1)</script>\nEVQLVESGG\n>b @ROWS@\n*\n")
    out, page = tmp_path / "o.jsonl", tmp_path / "p.html"
    words = ["score", str(model), str(source), "--out", str(out), "--html", str(page), "--invalid", "skip"]
    assert main([*words, "--device", "cpu"]) == 0
    text, (row, bad) = page.read_text(), rows_of(out)
    assert "<script" not in text and "&lt;script&gt;" in text and f"Not scored: {bad['error'][:0]}" in text
    for number, (token, quality) in enumerate(zip(row["tokens"], row["quality"], strict=True), 1):
        low = " low" if quality < 0.5 else ""
        tip = f'title="{token} {number}: {quality}"'
        assert f'<span class="q{low}" style="--p:{quality}" {tip}>{token}</span>' in text
    assert text.count("b @ROWS@") == 1 and text == quality_page(out, "a.fasta, scored by own")


def test_the_page_needs_json_lines(model, tmp_path, capsys):
    source = written(tmp_path, "a.txt", "EVQL")
    assert main(["score", str(model), str(source), "--out", str(tmp_path / "o.csv"), "--html", "p.html"]) == 2
    assert "--html is made of a .jsonl output" in capsys.readouterr().err
