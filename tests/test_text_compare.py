"""Comparing rules on text: the arms a model brings along, choosing one knob, the measures of a task."""

import json
import types
from pathlib import Path

import pytest
import torch

from prism_pipelines import bundled
from prism_pipelines.evaluation import (
    distinct_n,
    known_word_share,
    ngram_distance,
    run_comparison,
    task_of_folder,
    text_measures,
    text_plan,
)

TEXTS, REFERENCE = ["the cat sat on the mat", "a dog"], ["the dog sat on a mat"]


def test_the_measures_of_a_task_are_those_of_the_single_functions():
    found = text_measures(TEXTS, REFERENCE, {"the", "dog"}, judge=lambda texts: [[1.0, 3.0], [5.0]])
    assert found["ngram_js"] == ngram_distance(TEXTS, REFERENCE, n=4)
    assert found["known_words"] == known_word_share(TEXTS, {"the", "dog"}) == 3 / 8
    assert found["distinct_2"] == distinct_n([text.split() for text in TEXTS], 2)
    assert found["nll"] == [2.0, 5.0] and len(found["entropy"]) == 2
    assert found["entropy"][0] > found["entropy"][1]
    assert "nll" not in text_measures(TEXTS, REFERENCE, {"the"})
    assert found["degenerate"] == 0
    for wrong, match in (([], "empty"), (["a [MASK]"], "MASK")):
        with pytest.raises(ValueError, match=match):
            text_measures(wrong, REFERENCE, {"the"})


def test_a_wordless_text_is_counted_and_stops_nothing():
    judge = lambda texts: [[float(len(text))] * len(text) for text in texts]  # noqa: E731
    whole = text_measures(TEXTS, REFERENCE, {"the", "dog"}, judge=judge)
    found = text_measures([TEXTS[0], "", " ?!", TEXTS[1]], REFERENCE, {"the", "dog"}, judge=judge)
    assert found.pop("degenerate") == 0.5 and found["entropy"] == [whole["entropy"][0], 0, 0, whole["entropy"][1]]
    assert found["nll"] == [22.0, pytest.approx(10.0), 3.0, 5.0]  # of the one without tokens, the others' mean
    for name in ("ngram_js", "word_js", "known_words", "distinct_2", "self_bleu"):
        assert found[name] == whole[name]
    worst = text_measures([" ", "..."], REFERENCE, {"the"})
    assert worst == {
        "ngram_js": 1, "word_js": 1, "known_words": 0, "entropy": [0, 0], "distinct_2": 0, "self_bleu": 1,
        "degenerate": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no token"):
        text_measures(["", ""], REFERENCE, {"the"}, judge=judge)


def test_an_arm_with_a_model_of_its_own_runs_that_model(tmp_path):
    pytest.importorskip("matplotlib")
    first, second = (types.SimpleNamespace(scheduler=name, model=torch.nn.Identity()) for name in ("one", "two"))
    ran = []

    def task(pipe, steps, seed):
        for _ in range(steps):
            pipe.model(torch.zeros(1))
        ran.append(pipe is second)
        return {"x": 1.0}

    arms = [{"name": "a", "scheduler": "MDLMScheduler"}, {"name": "b", "scheduler": "MDLMScheduler", "model": "critic"}]
    options = {"out_dir": tmp_path, "task_name": "toy", "progress": False}
    run_comparison(first, task, arms, [4], [0], models={"critic": second}, **options)
    assert ran == [False, True] and (first.scheduler, second.scheduler) == ("one", "two")
    with pytest.raises(ValueError, match="critic"):
        run_comparison(first, task, arms, [4], [0], **options)


def test_a_folder_brings_its_arms_its_held_out_text_and_its_words(tmp_path):
    assert [arm["name"] for arm in text_plan(tmp_path)["arms"]] == ["MDLM", "ReMDM-cap", "self-confidence", "PRISM"]
    plan = {"arms": [{"name": "x", "scheduler": "MDLMScheduler"}], "forwards": [4], "seeds": [0]}
    (tmp_path / "arms.json").write_text(json.dumps(plan))
    assert text_plan(tmp_path) == plan
    with pytest.raises(ValueError, match="--reference"):
        task_of_folder(tmp_path, num_samples=1, gen_length=4)


def test_the_bundled_plan_tunes_every_rule_that_has_a_knob():
    plan = text_plan(bundled("text"))
    names = [arm["name"] for arm in plan["arms"]]
    assert names[0] == plan["reference"] == "MDLM" and {"PRISM", "PRISM + loop", "P2", "token-to-mask"} <= set(names)
    tried = json.loads((Path(bundled("text")) / "metrics.json").read_text())["settings_tried"]
    for name in {row["name"] for row in tried}:
        rows = [row for row in tried if row["name"] == name]
        best = min(rows, key=lambda row: row["ngram_js"])
        (arm,) = [arm for arm in plan["arms"] if arm["name"] == name]
        assert len(rows) == 4 and arm.items() <= best.items()
