"""Settings of arms that are lists: how many are tried, which is kept, and that a second run tries nothing again."""

import json
import sys
import types

import pytest
import torch

from prism_pipelines.evaluation import tune_arms
from prism_pipelines.evaluation.tuning import settings_of

PRISM = {"name": "PRISM", "scheduler": "PrismScheduler"}


class Recorder:
    """A pipeline and a task whose result depends on eta alone: best at 0.1."""

    def __init__(self):
        self.pipe = types.SimpleNamespace(scheduler="shipped", model=torch.nn.Identity())
        self.runs = []

    def task(self, pipe, steps, seed):
        config = pipe.scheduler.config
        self.runs.append((config.eta, config.temperature, steps, seed))
        return {"distance": abs((config.eta or 0) - 0.1), "items": [1.0, config.temperature]}

    def tune(self, arms, out_dir, **settings):
        options = {"steps": 8, "seed": 5, "trials": 8, "task_name": "toy", "quality": "distance"} | settings
        options = {"higher_is_better": False, "out_dir": out_dir} | options
        return tune_arms(self.pipe, self.task, arms, **options)


def test_every_setting_of_a_small_grid_is_tried_and_the_best_is_kept(tmp_path):
    one = Recorder()
    arm = {**PRISM, "eta": [0.3, 0.1, 0.2], "loop_steps": 2, "loop_num_remask": 1}
    plain = {"name": "MDLM", "scheduler": "MDLMScheduler"}
    arms, tried = one.tune([plain, arm], tmp_path)
    assert arms == [plain, {**arm, "eta": 0.1}]
    assert [run[0] for run in one.runs] == [0.3, 0.1, 0.2]  # in order; an arm without a list is not run
    assert all(run[2:] == (6, 5) for run in one.runs)  # the loop is part of the forwards
    assert [row["eta"] for row in tried] == [0.3, 0.1, 0.2]
    assert tried[0]["distance"] == pytest.approx(0.2)
    assert tried[0]["items"] == 1.0  # the mean of a list
    assert one.pipe.scheduler == "shipped"
    assert json.loads((tmp_path / "tuning.json").read_text())["tried"] == tried


def test_higher_may_be_better_and_of_equals_the_first_wins(tmp_path):
    one = Recorder()
    assert one.tune([{**PRISM, "eta": [0.1, 0.4]}], tmp_path, higher_is_better=True)[0][0]["eta"] == 0.4
    assert one.tune([{**PRISM, "eta": [0.2, 0.0]}], tmp_path)[0][0]["eta"] == 0.2


def test_the_task_says_which_way_a_metric_is_better(tmp_path):
    one = Recorder()

    def task(pipe, steps, seed):
        return one.task(pipe, steps, seed)

    task.lower_is_better = ("distance",)
    arms, _ = tune_arms(
        one.pipe, task, [{**PRISM, "eta": [0.9, 0.1]}], steps=4, seed=0, trials=2, out_dir=tmp_path, task_name="toy"
    )
    assert arms[0]["eta"] == 0.1


def test_optuna_proposes_as_many_settings_as_there_are_trials_and_none_twice(tmp_path):
    pytest.importorskip("optuna")
    one = Recorder()
    arm = {**PRISM, "eta": [i / 50 for i in range(50)], "temperature": [0.5, 1.0], "outside": True}
    plain = {"name": "MDLM", "scheduler": "MDLMScheduler"}
    arms, tried = one.tune([arm, plain], tmp_path, trials=12)
    assert len(one.runs) == len(tried) == len(set(one.runs)) == 12
    assert arms[0]["eta"] == min((run[0] for run in one.runs), key=lambda eta: abs(eta - 0.1))
    # Random search would come this close in 12 trials with probability 0.6; the sampler learns from the scores.
    assert abs(arms[0]["eta"] - 0.1) <= 0.04
    again = Recorder()
    assert again.tune([arm, plain], tmp_path, trials=12) == (arms, tried)
    assert again.runs == []  # the same proposals, all of them finished


def test_a_space_with_one_setting_more_than_trials_ends(tmp_path):
    pytest.importorskip("optuna")
    one = Recorder()
    one.tune([{**PRISM, "eta": [0.1, 0.2, 0.3, 0.4]}], tmp_path, trials=3)
    assert len(set(one.runs)) == 3


def test_without_optuna_a_large_space_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    one = Recorder()
    with pytest.raises(ImportError, match=r"'PRISM' has 3 settings and 2 trials.*prism-pipelines\[tune\]"):
        one.tune([{**PRISM, "eta": [0.1, 0.2, 0.3]}], tmp_path, trials=2)
    one.tune([{**PRISM, "eta": [0.1, 0.2, 0.3]}], tmp_path, trials=3)
    assert len(one.runs) == 3


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path):
    one = Recorder()
    real = one.task

    def task(pipe, steps, seed):
        if len(one.runs) == 2:
            raise KeyboardInterrupt
        return real(pipe, steps, seed)

    one.task = task
    arm = {**PRISM, "eta": [0.3, 0.2, 0.1]}
    with pytest.raises(KeyboardInterrupt):
        one.tune([arm], tmp_path)
    assert one.pipe.scheduler == "shipped"
    one.task = real
    assert one.tune([arm], tmp_path)[0][0]["eta"] == 0.1
    assert [run[0] for run in one.runs] == [0.3, 0.2, 0.1]
    with pytest.raises(ValueError, match="`quality` must be a metric of the task, got 'none'"):
        one.tune([arm], tmp_path, quality="none")  # also where every cell is finished
    assert len(one.runs) == 3
    one.tune([arm], tmp_path, task_name="other weights")
    assert len(one.runs) == 6


@pytest.mark.parametrize(
    ("arm", "settings", "match"),
    [
        ({"eta": []}, {}, "'PRISM' has 0 settings"),
        ({"eta": [0.1, 2.0]}, {}, r"'PRISM' cannot have \{'eta': 2.0\}"),
        ({"eta": [0.1], "num_remask": [1]}, {}, "cannot have.*num_remask"),
        ({"temperature": [0.5, 1.0]}, {}, "temperature cannot be a list"),
        ({"top_k": [5, 10], "eta": 0.1}, {}, "top_k cannot be a list"),
        ({"eta": [0.1, 0.2], "outside": True}, {}, "nothing to compare"),
        ({"scheduler": ["PrismScheduler"]}, {}, "scheduler cannot be a list"),
        ({"eta": list(range(101)), "loop_num_remask": list(range(1, 101))}, {}, "10100 settings"),
        ({"eta": [0.1]}, {"trials": 0}, "`trials` must be at least 1, got 0"),
        ({"eta": [0.1, 0.2], "loop_steps": 8, "loop_num_remask": 1}, {}, "a loop of 8 forwards leaves none"),
        ({"eta": [0.1], "model": "critic"}, {}, "wants the model 'critic', which `models` does not hold"),
        ({"eta": [0.1], "scheduler": None}, {}, 'An arm is {"name": ..., "scheduler": ...'),
        ({"eta": [0.1], "name": None}, {}, 'An arm is {"name": ..., "scheduler": ...'),
        ({"eta": [0.1]}, {"steps": "8"}, "`forwards` must be integers"),
        ({"eta": [0.1, 0.2]}, {"quality": "none"}, "`quality` must be a metric"),
    ],
)
def test_what_cannot_be_tuned_is_refused(tmp_path, arm, settings, match):
    one = Recorder()
    with pytest.raises(ValueError, match=match):
        one.tune([PRISM | arm], tmp_path, **settings)
    assert len(one.runs) <= 1  # what only a result can show


def test_two_arms_of_one_name_are_refused(tmp_path):
    one = Recorder()
    arms = [{**PRISM, "eta": [0.1, 0.2]}, {**PRISM, "scheduler": "SelfConfidenceScheduler", "eta": [0.3, 0.4]}]
    with pytest.raises(ValueError, match="`arms` must not hold one twice"):
        one.tune(arms, tmp_path)
    assert not one.runs


def test_optuna_is_asked_for_before_the_first_arm_is_tried(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    one = Recorder()
    arms = [{**PRISM, "name": "small", "eta": [0.1]}, {**PRISM, "eta": [0.1, 0.2, 0.3]}]
    with pytest.raises(ImportError, match="'PRISM' has 3 settings and 2 trials"):
        one.tune(arms, tmp_path, trials=2)
    assert not one.runs


def test_the_settings_of_an_arm_are_the_product_of_its_lists():
    arm = {**PRISM, "order": ["random", "confidence"], "num_remask": [1, 2]}
    found = [(option["order"], option["num_remask"]) for option in settings_of(arm, 1.0)]
    assert found == [("random", 1), ("random", 2), ("confidence", 1), ("confidence", 2)]
    assert settings_of(PRISM, 1.0) == [PRISM]


def test_a_bar_counts_the_settings_that_are_tried(tmp_path, capsys):
    arms = [{"name": "MDLM", "scheduler": "MDLMScheduler"}, {**PRISM, "eta": [0.3, 0.1, 0.2]}]
    Recorder().tune(arms, tmp_path / "shown")
    assert "settings tried: 100%" in (said := capsys.readouterr().err) and "3/3" in said
    Recorder().tune(arms, tmp_path / "quiet", progress=False)
    assert not capsys.readouterr().err
