"""`prism eval`: each evaluation from the command line, and what bad input says."""

import json
import sys

import pytest
from test_pipeline import twin
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from prism_pipelines import JudgeAndRepairScheduler, PrismPipeline, PrismPipelineOutput, bundled, sudoku
from prism_pipelines.cli.main import main
from prism_pipelines.evaluation import read_texts
from prism_pipelines.evaluation.code.sandbox import isolation_problem


def told(capsys):
    return json.loads(capsys.readouterr().out)


def test_sudoku(capsys):
    assert main(["eval", "sudoku", "--num-puzzles", "4", "--clues", "44", "--forwards", "20", "--json"]) == 0
    result = told(capsys)
    assert result["puzzles"] == 4
    assert result["low"] <= result["solved"] <= result["high"]


def test_risk_falls_with_coverage_only_as_the_confidence_says_and_needs_a_calibrated_head(monkeypatch, capsys):
    flags = ["eval", "sudoku", "--num-puzzles", "10", "--clues", "44", "--json", "--risk-coverage"]
    pipe = PrismPipeline.from_pretrained(bundled("sudoku"))
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr("prism_pipelines.cli.eval_sudoku.load_bundled_or", lambda *_: pipe)
    pipe.quality_head.register_to_config(temperature=None)
    assert main(flags) == 2
    assert "--risk-coverage needs a calibrated quality head" in capsys.readouterr().err
    pipe.quality_head.register_to_config(temperature=1.0)
    assert main([*flags, "--forwards", "1"]) == 2
    assert "--forwards 1 leaves no forward" in capsys.readouterr().err
    pipe.scheduler = JudgeAndRepairScheduler()
    assert main([*flags, "--forwards", "20"]) == 0
    result = told(capsys)
    assert result["mean_forwards"] <= 20 and result["accepted_right"] <= result["accepted"] <= 10
    assert list(result["risk"]) == [f"{tenth}0 %" for tenth in range(1, 11)]
    assert abs(result["risk"]["100 %"] - (1 - result["solved"])) < 1e-9


def test_a_rule_and_its_fields_are_flags(monkeypatch, capsys):
    seen = []

    def solver(pipe, steps, seed, on_output, return_quality):
        seen.append(pipe.scheduler)
        on_output(PrismPipelineOutput(None, nfe_per_row=[7]))
        return lambda puzzles: puzzles

    monkeypatch.setattr("prism_pipelines.evaluation.pipeline_solver", solver)
    flags = ["eval", "sudoku", "--num-puzzles", "1", "--json", "--scheduler", "MDLMScheduler"]
    assert main([*flags, "--scheduler-config", '{"order": "random", "temperature": 0.5}']) == 0
    assert type(seen[0]).__name__ == "MDLMScheduler"
    assert (seen[0].config.order, seen[0].config.temperature) == ("random", 0.5)
    result = told(capsys)
    assert result["solved"] == 0
    assert result["scheduler"]["name"] == "MDLMScheduler" and result["scheduler"]["temperature"] == 0.5
    assert main([*flags, "--scheduler-config", '{"nothing": 1}']) == 2
    assert "MDLMScheduler has no field 'nothing'" in capsys.readouterr().err


def test_forwards_are_those_that_were_made(monkeypatch, capsys):
    made = []
    call = PrismPipeline.__call__

    def counted(self, *args, **settings):
        out = call(self, *args, **settings)
        made.append(out.nfe)
        return out

    monkeypatch.setattr(PrismPipeline, "__call__", counted)
    flags = ["eval", "sudoku", "--num-puzzles", "1", "--scheduler-config", '{"loop_steps": 4, "loop_num_remask": 2}']
    assert main([*flags, "--forwards", "6", "--json"]) == 0
    assert told(capsys)["forwards"] == 6 and made == [6]
    assert main([*flags, "--forwards", "4"]) == 2
    assert "--forwards 4 must be more than the 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["text", "--texts", "F", "--reference", "F", "--model", "M"], "--model has no effect on --texts"),
        (["text", "--texts", "F", "--reference", "F", "--gen-length", "8"], "--gen-length has no effect on --texts"),
        (["compare", "--quick", "--num-puzzles", "500"], "--num-puzzles has no effect with --quick"),
        (["compare", "--task", "text", "--clues", "40"], "--clues has no effect on text"),
        (["compare", "--task", "sudoku", "--gen-length", "40"], "--gen-length has no effect on Sudoku"),
    ],
)
def test_flags_without_effect_are_refused(flags, match, capsys):
    assert main(["eval", *flags]) == 2
    assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reference", "flags", "match"),
    [
        ("", [], "`reference` is empty"),
        ('{"text": "a"}', [], "character 3-grams"),
        ('{"text": "the cat sat"}', ["--judge", "/no/such"], "judge '/no/such' could not be loaded"),
        ('{"text": "the cat sat"}', ["--featurizer", "/no/such"], "MAUVE needs at least as many samples"),
        ('{"text": "the cat sat"}\n{"text": "a dog ran"}', ["--featurizer", "/no/such"], "mauve-text"),
    ],
)
def test_what_scoring_refuses_is_said_before_texts_are_written(reference, flags, match, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mauve", None)
    monkeypatch.setattr("prism_pipelines.cli.eval_text.load_bundled_or", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "r.jsonl").write_text(reference + "\n")
    assert main(["eval", "text", "--model", "M", "--reference", str(tmp_path / "r.jsonl"), *flags]) == 2
    assert match in capsys.readouterr().err


def test_text_of_a_file(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "the cat sat on the mat"}\n{"text": "a dog ran to the cat"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "the dog sat on a mat"}\n{"text": "the cat ran to a dog"}\n')
    arguments = ["eval", "text", "--texts", str(tmp_path / "a.jsonl"), "--reference", str(tmp_path / "b.jsonl")]
    assert main([*arguments, "--json"]) == 0
    result = told(capsys)
    assert result["n"] == 2
    assert result["known_words"] == 1
    assert main(["eval", "text", "--reference", str(tmp_path / "b.jsonl")]) == 2
    assert "--texts" in capsys.readouterr().err


def test_text_with_a_judge_and_words_of_own_files(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "the cat sat"}\n{"text": "a dog"}\n')
    (tmp_path / "words.txt").write_text("The\ncat sat\n")
    flags = ["eval", "text", "--texts", str(tmp_path / "a.jsonl"), "--reference", str(tmp_path / "a.jsonl"), "--json"]
    flags += ["--words", str(tmp_path / "words.txt")]
    found = {}
    for name, text in (("alike", "the cat sat on a dog. " * 9), ("unlike", "zzzz qqqq xxxx " * 9)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
        assert main([*flags, "--ngram-judge", str(tmp_path / f"{name}.jsonl")]) == 0
        result = told(capsys)
        assert result["known_words"] == 0.6
        found[name] = result["perplexity"]["perplexity"]
    assert found["alike"] < found["unlike"] / 2
    assert main([*flags, "--ngram-judge", str(tmp_path / "alike.jsonl"), "--judge", "x/y"]) == 2
    assert "one of --judge and --ngram-judge" in capsys.readouterr().err
    assert main([*flags, "--scheduler", "MDLMScheduler"]) == 2
    assert "--scheduler" in capsys.readouterr().err
    assert main([*flags[:-1], str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err


def test_calibration_writes_its_files(tmp_path, capsys):
    assert main(["eval", "calibration", "--num-sequences", "4", "--out", str(tmp_path), "--json"]) == 0
    assert set(told(capsys)["pooled"]) == {"head", "visible", "drawn"}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"calibration.{kind}" for kind in ("json", "md", "png", "svg")
    }


def test_compare_is_resumed(tmp_path, capsys):
    plan = {"arms": [{"name": "a", "scheduler": "MDLMScheduler"}, {"name": "b", "scheduler": "PrismScheduler"}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"forwards": [4], "seeds": [0, 1]}))
    arguments = ["eval", "compare", "--config", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]
    arguments += ["--num-puzzles", "3", "--clues", "44", "--json"]
    assert main(arguments) == 0
    first = told(capsys)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if "cells" in str(path)}
    assert main(arguments) == 0
    assert told(capsys)["rows"] == first["rows"]
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_compare_on_the_shipped_model_has_prism_ahead_and_takes_the_puzzles_of_a_file(tmp_path, capsys):
    puzzles, _ = sudoku.make_puzzles(32, 30, seed=20_000)
    (tmp_path / "puzzles.txt").write_text("".join(f"{sudoku.format_grid(puzzle)}\n" for puzzle in puzzles))
    flags = ["--puzzles", str(tmp_path / "puzzles.txt"), "--forwards", "26", "--num-seeds", "1"]
    assert main(["eval", "compare", "--task", "sudoku", *flags, "--out", str(tmp_path / "out"), "--json"]) == 0
    rows = {row["arm"]: row for row in told(capsys)["rows"]}
    assert set(rows) == {"MDLM", "PRISM", "self-confidence", "ReMDM-cap"} and rows["PRISM"]["n"] == 32
    assert rows["PRISM"]["value"] > rows["MDLM"]["value"]


def test_lists_in_a_config_are_settings_to_choose_from(tmp_path, capsys):
    arms = [{"name": "MDLM", "scheduler": "MDLMScheduler"}]
    arms += [{"name": "PRISM", "scheduler": "PrismScheduler", "num_remask": [1, 4], "order": ["random", "confidence"]}]
    (tmp_path / "plan.json").write_text(json.dumps({"arms": arms, "forwards": [4, 8, 6], "seeds": [0]}))
    flags = ["eval", "compare", "--config", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out"), "--json"]
    assert main([*flags, "--num-puzzles", "3", "--clues", "30"]) == 0
    tuned = json.loads((tmp_path / "out" / "tuning" / "tuning.json").read_text())
    assert len(tuned["tried"]) == 4
    assert tuned["steps"] == 6  # the middle one
    best = max(tuned["tried"], key=lambda row: row["solved"])
    found = next(arm for arm in told(capsys)["arms"] if arm["name"] == "PRISM")
    assert found == {name: best[name] for name in found}
    assert main([*flags, "--num-puzzles", "3", "--clues", "30", "--tune-forwards", "5", "--trials", "4"]) == 0
    capsys.readouterr()
    assert json.loads((tmp_path / "out" / "tuning" / "tuning.json").read_text())["steps"] == 5


@pytest.mark.parametrize(
    ("plan", "flags", "match"),
    [
        ({"seeds": [0, 0]}, [], "`seeds` must not hold one twice"),
        ({"reference": "none"}, [], "`reference` must name an arm"),
        ({"forwards": []}, [], "Nothing to compare"),
        ({"arms": [{"scheduler": "PrismScheduler", "num_remask": [1, 4]}]}, [], "An arm is"),
        ({}, ["--tune-reference", "x.jsonl"], "--tune-reference is for text"),
        ({"arms": [{"name": "a", "scheduler": "PrismScheduler"}]}, ["--trials", "4"], "--trials has no effect"),
        (
            {"arms": [{"name": "a", "scheduler": "PrismScheduler"}]},
            ["--tune-forwards", "4"],
            "--tune-forwards has no effect",
        ),
    ],
)
def test_what_a_comparison_refuses_is_said_before_settings_are_searched(tmp_path, capsys, plan, flags, match):
    arms = [{"name": "PRISM", "scheduler": "PrismScheduler", "num_remask": [1, 4]}]
    (tmp_path / "plan.json").write_text(json.dumps({"arms": arms, "forwards": [4], "seeds": [0]} | plan))
    words = ["eval", "compare", "--config", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out"), *flags]
    assert main([*words, "--num-puzzles", "2"]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_for_text_are_chosen_on_other_texts(tmp_path, capsys):
    arms = [{"name": "PRISM", "scheduler": "PrismScheduler", "eta": [0.1, 0.3]}]
    (tmp_path / "plan.json").write_text(json.dumps({"arms": arms, "forwards": [4], "seeds": [0, 1]}))
    flags = ["eval", "compare", "--task", "text", "--config", str(tmp_path / "plan.json"), "--num-samples", "2"]
    flags += ["--gen-length", "24", "--out", str(tmp_path / "out"), "--json"]
    assert main(flags) == 2
    assert "--tune-reference" in capsys.readouterr().err
    assert main([*flags, "--tune-reference", f"{bundled('text')}/heldout.jsonl"]) == 2
    assert "texts that the result is reported on" in capsys.readouterr().err
    part = read_texts(f"{bundled('text')}/heldout.jsonl")[1][5000:6000].replace("\n", "  ")
    (tmp_path / "some.json").write_text(json.dumps(["Another text.", part]))
    assert main([*flags, "--tune-reference", str(tmp_path / "some.json")]) == 2
    assert "texts that the result is reported on" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text(json.dumps("To be or not to be, that is the question.") + "\n")
    assert main([*flags, "--tune-reference", str(tmp_path / "other.jsonl")]) == 0
    tuned = json.loads((tmp_path / "out" / "tuning" / "tuning.json").read_text())["tried"]
    best = min(tuned, key=lambda row: row["ngram_js"])
    assert told(capsys)["arms"][0]["eta"] == best["eta"]


def test_code_of_a_model_that_cannot_write_any(tmp_path, capsys):
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["[PAD]", "[MASK]", "x", "="])}, "x"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", pad_token="[PAD]").save_pretrained(
        tmp_path
    )
    twin("bert").save_pretrained(tmp_path)
    problem = {
        "task_id": "T/0",
        "prompt": 'def one():\n    """One."""\n',
        "entry_point": "one",
        "canonical_solution": "    return 1\n",
    }
    problem["test"] = "def check(candidate):\n    assert candidate() == 1\n"
    (tmp_path / "p.jsonl").write_text(json.dumps(problem) + "\n")
    arguments = ["eval", "code", "--model", str(tmp_path), "--problems", str(tmp_path / "p.jsonl"), "--json"]
    arguments += ["--gen-length", "8", "--block-length", "8", "--forwards", "4"]
    assert main(arguments) == 2
    assert "--allow-execution" in capsys.readouterr().err
    if isolation_problem():
        pytest.skip(isolation_problem())
    arguments += ["--workers", "2", "--batch-size", "1", "--num-samples", "2", "--scheduler", "MDLMScheduler"]
    assert main([*arguments, "--few-shot", "1", "--allow-execution"]) == 2
    assert "few_shot" in capsys.readouterr().err
    assert main([*arguments, "--allow-execution", "--out", str(tmp_path / "out.json")]) == 0
    assert told(capsys)["pass_at_k"]["1"]["value"] == 0
    assert len(json.loads((tmp_path / "out.json").read_text())["samples"]) == 2
    assert len((tmp_path / "out.completions.jsonl").read_text().splitlines()) == 2


def test_compare_on_the_bundled_text_model(tmp_path, capsys):
    plan = {"arms": [{"name": "a", "scheduler": "MDLMScheduler"}, {"name": "b", "scheduler": "PrismScheduler"}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"forwards": [4], "seeds": [0, 1]}))
    arguments = ["eval", "compare", "--task", "text", "--config", str(tmp_path / "plan.json"), "--num-samples", "2"]
    assert main([*arguments, "--gen-length", "24", "--out", str(tmp_path / "out"), "--json"]) == 0
    found = told(capsys)
    assert found["quality"] == "ngram_js" and not found["higher_is_better"]  # what the model brings along stays
    assert {row["arm"] for row in found["rows"]} == {"a", "b"} and {row["forwards"] for row in found["rows"]} == {4}
    assert (tmp_path / "out" / "comparison.png").exists()


def test_cells_of_text_follow_the_reference_and_seeds_start_at_the_seed(tmp_path, capsys):
    flags = ["eval", "compare", "--task", "text", "--num-samples", "2", "--gen-length", "24", "--forwards", "4"]
    plan = {"arms": [{"name": "a", "scheduler": "MDLMScheduler"}], "forwards": [4], "seeds": [0], "quality": "entropy"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    flags += ["--config", str(tmp_path / "plan.json"), "--num-seeds", "1", "--seed", "7", "--json"]
    names = []
    for words in ("To be or not to be", "that is the question"):
        (tmp_path / "held.jsonl").write_text(json.dumps(words) + "\n")
        assert main([*flags, "--reference", str(tmp_path / "held.jsonl"), "--out", str(tmp_path / "out")]) == 0
        found = told(capsys)
        assert found["seeds"] == [7] and found["higher_is_better"]  # that of the text plan was for its own quality
        names.append(found["task"])
    assert names[0] != names[1] and len(list((tmp_path / "out" / "cells").iterdir())) == 2


BAD = [
    ["sudoku", "--device", "nope"],
    ["compare", "--device", "cuda:99"],
    ["code", "--model", "x", "--problems", "y", "--allow-execution", "--no-isolation", "--out", "/no/such/dir/x.json"],
    ["calibration", "--data", "/no/such.txt"],
    ["compare", "--puzzles", "/no/such/puzzles.txt"],
    ["compare", "--puzzles", __file__, "--clues", "30"],
    ["compare", "--task", "sudoku", "--clues", "17"],
    ["compare", "--task", "text", "--model", bundled("sudoku")],
    ["compare", "--task", "all", "--model", bundled("sudoku")],
]


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(flags, capsys, tmp_path):
    assert main(["eval", *flags]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("prism: error:")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["calibration", "--max-length", "0"], "--max-length"),
        (["calibration", "--num-sequences", "-1"], "--num-sequences"),
        (["sudoku", "--forwards", "0"], "--forwards"),
        (["compare", "--seed", "-1"], "--seed"),
    ],
)
def test_a_bad_number_is_one_line(flags, named, capsys):
    with pytest.raises(SystemExit):
        main(["eval", *flags])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and named in lines[0]


def test_texts_are_calibrated_on_a_model_that_reads_them(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("To be or not to be that is the question " * 8)
    flags = ["eval", "calibration", "--data", str(tmp_path / "t.txt"), "--max-length", "32", "--num-sequences", "2"]
    assert main([*flags, "--json"]) == 0
    assert told(capsys)["sequences"] == 2
    assert main([*flags, "--model", bundled("sudoku")]) == 2
    assert "does not know 100%" in capsys.readouterr().err
    assert main(["eval", "calibration", "--model", bundled("text")]) == 2
    assert "not a Sudoku model" in capsys.readouterr().err
