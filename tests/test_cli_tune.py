"""`prism tune`: what is tried, what is kept, what is written, and what bad input says."""

import json

import pytest

from prism_pipelines import MDLMScheduler, PrismScheduler, SelfConfidenceScheduler
from prism_pipelines.cli.main import main
from prism_pipelines.cli.tune import CONFIRM_SEED, FIELDS, arms_of
from prism_pipelines.schedulers.by_name import scheduler_class


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A task on which 8 remasked cells are best, in the place of Sudoku; its calls are counted."""
    calls = []

    def task_of(args, seed, reference):
        def task(pipe, steps, task_seed):
            n = pipe.scheduler.config.num_remask
            calls.append((n, steps, task_seed))
            return {"solved": [i < 20 - abs(n - 8) for i in range(20)]}

        return task

    monkeypatch.setattr("prism_pipelines.cli.tune._task", task_of)
    flags = ["tune", "--scheduler", "self-confidence", "--forwards", "9", "--json", "--out", str(tmp_path / "run")]
    return calls, [*flags, "--fields", '{"num_remask": [2, 8, 4]}'], tmp_path


def test_the_best_is_confirmed_on_other_data_and_written_and_nothing_is_tried_twice(world, capsys):
    calls, flags, folder = world
    assert main([*flags, "--write", str(folder)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [call[0] for call in calls[:3]] == [2, 8, 4] and {call[1] for call in calls} == {9}
    assert calls[4] == (8, 9, CONFIRM_SEED) and calls[3][2] == CONFIRM_SEED  # the present setting, then the chosen one
    assert result["chosen"]["num_remask"] == 8 and result["better"] and result["difference"] > 0
    written = SelfConfidenceScheduler.from_pretrained(folder / "scheduler")
    assert written.config.num_remask == 8
    assert main(flags) == 0
    assert len(calls) == 5 and json.loads(capsys.readouterr().out)["chosen"] == result["chosen"]


def test_a_setting_that_is_not_better_on_the_other_data_is_not_written(world, monkeypatch, capsys):
    _, flags, folder = world

    def task_of(args, seed, reference):
        best = 2 if seed >= CONFIRM_SEED else 8
        return lambda pipe, steps, s: {
            "solved": [i < 20 - abs(pipe.scheduler.config.num_remask - best) for i in range(20)]
        }

    monkeypatch.setattr("prism_pipelines.cli.tune._task", task_of)
    monkeypatch.setattr(
        "prism_pipelines.schedulers.by_name.change_scheduler",
        lambda old, name=None, fields=None: SelfConfidenceScheduler(num_remask=2),
    )
    assert main([*flags, "--write", str(folder)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert not result["better"] and "written" not in result and not (folder / "scheduler").exists()


@pytest.mark.parametrize("kind", FIELDS)
def test_what_is_tried_by_default_is_what_the_scheduler_has_and_takes(kind):
    scheduler = scheduler_class(kind)()
    arm, present = arms_of(scheduler, None)
    for name, values in FIELDS[kind].items():
        for value in values:
            kept = {k: v for k, v in arm.items() if k not in ("name", "scheduler") and not isinstance(v, list)}
            scheduler_class(kind)(**kept | {name: value})
    assert present["scheduler"] == kind and not any(isinstance(value, list) for value in present.values())


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--fields", "{"], "--fields '{' is not JSON"),
        (["--fields", '{"num_remask": 3}'], "--fields must be an object of lists"),
        (["--fields", '{"nothing": [3]}'], "has no field 'nothing'"),
        (["--task", "text"], "--task text needs --reference and --confirm-reference"),
        (["--write", "/nowhere"], "--write /nowhere is not a folder"),
        (["--scheduler", "p2"], "What to try with P2Scheduler is not known: pass --fields"),
    ],
)
def test_bad_input_is_named(flags, said, capsys):
    assert main(["tune", *flags]) == 2
    assert said in capsys.readouterr().err


def test_numbers_and_shares_of_remasking_exclude_each_other():
    arm, present = arms_of(PrismScheduler(eta=0.1), '{"num_remask": [2, 4]}')
    assert arm["eta"] is None and present["eta"] == 0.1
    arm, _ = arms_of(MDLMScheduler.from_config(PrismScheduler(num_remask=3).config), None)
    assert arm["order"] == FIELDS["MDLMScheduler"]["order"] and "num_remask" not in arm  # which it does not have
