"""Comparisons: statistics against enumeration, and the bookkeeping of cells that are done, missing or changed."""

import itertools
import json
import math
import types

import numpy as np
import pytest
import torch
import transformers

from prism_pipelines.evaluation import (
    compare,
    make_scheduler,
    pareto_front,
    pipeline_fingerprint,
    read_comparison,
    run_comparison,
    statistics,
    wilson_interval,
)
from prism_pipelines.evaluation.cells import read_cell

pytest.importorskip("matplotlib")
ARMS = [
    {"name": "mdlm", "scheduler": "MDLMScheduler"},
    {"name": "prism", "scheduler": "PrismScheduler", "num_remask": 4, "loop_steps": 2, "loop_num_remask": 3},
]


def pipeline():
    return types.SimpleNamespace(scheduler="shipped", model=torch.nn.Identity())


def task(pipe, steps, seed):
    """Makes the forwards of its scheduler and returns numbers that depend on arm, forwards and seed."""
    loop = pipe.scheduler.config.get("loop_steps", 0)
    for _ in range(steps + loop):
        pipe.model(torch.zeros(1))
    better = type(pipe.scheduler).__name__ == "PrismScheduler"
    items = np.random.default_rng(seed).random(40) + 0.1 * better
    return {"solved": (items > 0.5).tolist(), "score": items.tolist(), "seed": float(seed), "nfe": steps + loop}


def compared(tmp_path, pipe=None, task=task, arms=ARMS, forwards=(8, 16), seeds=(0, 1), **more):
    options = {"out_dir": tmp_path, "task_name": "toy", "progress": False, **more}
    return run_comparison(pipe or pipeline(), task, arms, forwards, seeds, **options)


# --- statistics -------------------------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_enumerating_every_resample():
    values = [0.0, 1.0, 1.5, 4.0, 10.0]
    means = sorted(sum(draw) / 5 for draw in itertools.product(values, repeat=5))
    low, high = statistics.bootstrap_interval(values, resamples=40_000)
    # 40,000 draws place a 2.5 % quantile to +-0.0008 (one sigma); +-0.004 is allowed.
    for bound, share in ((low, 0.025), (high, 0.975)):
        assert means[int((share - 0.004) * len(means))] <= bound <= means[int((share + 0.004) * len(means))]
    assert statistics.bootstrap_interval([1.0]) is None


def test_wilson_at_published_values():
    # R. Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_t_interval_covers_what_it_says_and_its_quantiles_are_those_of_the_tables():
    # Tables of Student's t, 97.5 %: (degrees of freedom, quantile)
    for df, quantile in (
        (1, 12.7062),
        (2, 4.3027),
        (4, 2.7764),
        (9, 2.2622),
        (10, 2.2281),
        (30, 2.0423),
        (120, 1.9799),
    ):
        values = np.arange(df + 1)
        low, high = statistics.t_interval(values)
        error = values.std(ddof=1) / math.sqrt(df + 1)
        assert (high - low) / 2 == pytest.approx(quantile * error, abs=6e-5 * error)
    assert statistics.t_interval([1.0]) is None
    assert statistics.t_interval([0.0, 2.0]) == pytest.approx((1 - 12.706205, 1 + 12.706205))
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    covered = np.mean([low <= 0 <= high for low, high in map(statistics.t_interval, draws)])
    assert abs(covered - 0.95) < 0.014  # four sigmas of 4000 trials


def dominated(point, points, sign):
    return any(t <= point[0] and sign * v >= sign * point[1] and (t, v) != point for t, v in points)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_front_is_what_no_point_dominates(sign):
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [(int(t), int(v)) for t, v in rng.integers(0, 5, size=(8, 2))]
        expected = sorted({p for p in points if not dominated(p, points, sign)})
        assert pareto_front(points, higher_is_better=sign == 1) == expected


def test_rows_and_pairs_by_hand():
    cells = {
        ("a", 8, 0): {"ok": [True, False, True], "x": [1.0, 2.0, 3.0], "s": 5.0},
        ("a", 8, 1): {"ok": [True, True, True], "x": [3.0, 2.0, 1.0], "s": 7.0},
        ("b", 8, 0): {"ok": [False, False, True], "x": [2.0, 3.0, 4.0], "s": 6.0},
        ("b", 8, 1): {"ok": [True, False, False], "x": [4.0, 3.0, 2.0], "s": 8.0},
    }
    rows, pairs = statistics.tabulate(cells, ["a", "b"], [8], [0, 1], "a")
    by = {(row["arm"], row["metric"]): row for row in rows}
    assert by["a", "ok"]["value"] == pytest.approx(5 / 6) and by["a", "ok"]["n"] == 6
    assert (by["a", "ok"]["low"], by["a", "ok"]["high"]) == wilson_interval(5, 6)
    assert (by["a", "x"]["low"], by["a", "x"]["high"], by["a", "x"]["n"]) == (2.0, 2.0, 3)  # seeds average to 2, 2, 2
    assert (by["b", "s"]["value"], by["b", "s"]["n"], by["b", "s"]["interval"]) == (7.0, 2, "t")
    assert [by["b", "s"][key] for key in ("low", "high")] == pytest.approx([7 - 12.706205, 7 + 12.706205])
    (one,) = [row for row in statistics.tabulate(cells, ["a"], [8], [0], "a")[0] if row["metric"] == "s"]
    assert (one["low"], one["high"], one["n"]) == (None, None, 1)
    differences = {pair["metric"]: pair for pair in pairs}
    # b - a is 1 for every item and every seed: pairing leaves no spread, though the arms themselves spread widely
    assert [differences["x"][key] for key in ("difference", "low", "high")] == pytest.approx([1, 1, 1])
    assert [differences["s"][key] for key in ("difference", "low", "high", "n")] == pytest.approx([1, 1, 1, 2])
    assert differences["ok"]["difference"] == pytest.approx(-3 / 6) and differences["ok"]["n"] == 3


def test_time_left_follows_each_arm_and_not_the_cells_found_finished():
    assert compare.seconds_left([("a", 8)], []) is None
    done = [("a", 8, 4.0), ("b", 8, 16.0)]
    assert compare.seconds_left([("a", 16), ("b", 4)], done) == pytest.approx(16 * 0.5 + 4 * 2.0)
    assert compare.seconds_left([("c", 10)], done) == pytest.approx(10 * 20 / 16)  # not run yet: mean of all


# --- running ----------------------------------------------------------------------------------------------------------


def test_a_comparison_tabulates_every_cell_and_puts_the_scheduler_back(tmp_path):
    pipe = pipeline()
    found = compared(tmp_path, pipe)
    assert pipe.scheduler == "shipped" and found["quality"] == "solved" and found["reference"] == "mdlm"
    assert len(found["rows"]) == 2 * 2 * 4 and len(found["pairs"]) == 2 * 4
    (pair,) = [p for p in found["pairs"] if p["metric"] == "score" and p["forwards"] == 8]
    assert [pair[k] for k in ("difference", "low", "high")] == pytest.approx([0.1, 0.1, 0.1])
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"] == found["rows"]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert f"{found['rows'][0]['value']:.4g}" in (tmp_path / "comparison.md").read_text()
    assert not list(tmp_path.rglob("*partial*"))


def test_the_loop_is_part_of_the_forwards_and_temperature_is_the_same(tmp_path):
    seen = []

    def look(pipe, steps, seed):
        seen.append((type(pipe.scheduler).__name__, steps, pipe.scheduler.config.temperature))
        return {"x": 1.0}

    compared(tmp_path, types.SimpleNamespace(scheduler=None), look, forwards=[8], seeds=[0], temperature=0.7)
    assert seen == [("MDLMScheduler", 8, 0.7), ("PrismScheduler", 6, 0.7)]


def test_an_interrupted_comparison_goes_on_and_redoes_no_finished_cell(tmp_path):
    done = []

    def interrupted(pipe, steps, seed):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append((type(pipe.scheduler).__name__, steps, seed))
        return task(pipe, steps, seed)

    pipe = pipeline()
    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path, pipe, interrupted)
    assert pipe.scheduler == "shipped" and not (tmp_path / "comparison.json").exists()
    (tmp_path / "cells" / "mdlm.json.1.partial").write_text('{"arm": ')  # what a kill in the middle of a write leaves

    def rest(pipe, steps, seed):
        done.append((type(pipe.scheduler).__name__, steps, seed))
        return task(pipe, steps, seed)

    found = compared(tmp_path, task=rest)
    assert len(done) == len(set(done)) == 8
    assert found == compared(tmp_path / "at once")
    compared(tmp_path, task=interrupted, seeds=[1, 0])  # all there: nothing is run
    assert len(done) == 8


@pytest.mark.parametrize("change", ["arm", "task_name", "temperature"])
def test_a_cell_of_other_settings_does_not_count(tmp_path, change):
    runs = []

    def count(pipe, steps, seed):
        runs.append(seed)
        return {"x": 1.0}

    pipe = types.SimpleNamespace(scheduler=None)
    compared(tmp_path, pipe, count, ARMS[:1], [8], [0])
    renamed = [{**ARMS[0], "order": "confidence"}] if change == "arm" else ARMS[:1]
    more = {"task_name": {"task_name": "other"}, "temperature": {"temperature": 0.5}}.get(change, {})
    compared(tmp_path, pipe, count, renamed, [8], [0], **more)
    assert len(runs) == 2


def test_unequal_forwards_are_refused(tmp_path):
    def cheat(pipe, steps, seed):
        for _ in range(steps + 10 * (type(pipe.scheduler).__name__ == "PrismScheduler")):
            pipe.model(torch.zeros(1))
        return {"x": 1.0}

    with pytest.raises(ValueError, match=r"'prism' had the model read 16 rows.*'mdlm' 8"):
        compared(tmp_path, task=cheat, forwards=[8])
    with pytest.raises(ValueError, match="'mdlm' made 9 forwards where 8 were wanted"):
        compared(tmp_path / "b", task=lambda pipe, steps, seed: {"nfe": 9}, forwards=[8])


def test_a_comparison_may_go_on_with_another_batch_size(tmp_path):
    def batched(size):
        def task(pipe, steps, seed):
            for _ in range((steps + pipe.scheduler.config.get("loop_steps", 0)) * (12 // size)):
                pipe.model(torch.zeros(size))
            return {"x": 1.0}

        return task

    compared(tmp_path, task=batched(6), arms=ARMS[:1])
    compared(tmp_path, task=batched(4))
    cells = [json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*.json")]
    assert {(cell["forwards"], cell["rows_read"]) for cell in cells} == {(8, 96), (16, 192)}
    assert {cell["device"] for cell in cells} == {"cpu"}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"arms": []}, "0 arms"),
        ({"arms": [{"name": "x"}]}, "An arm is"),
        ({"arms": [ARMS[0], ARMS[0]]}, "`arms` must not hold one twice"),
        ({"arms": [{"name": "x", "scheduler": "NoScheduler"}]}, "NoScheduler.*PrismScheduler"),
        (
            {"arms": [{"name": "x", "scheduler": "MDLMScheduler", "ordr": "margin"}]},
            "Arm 'x'.* 'ordr'; it has.* order,",
        ),
        (
            {"arms": [{"name": "x", "scheduler": "MDLMScheduler", "order": "margins"}]},
            "Arm 'x': `order` must be one of",
        ),
        ({"arms": [{"name": "x", "scheduler": "MDLMScheduler", "temperature": 0.0}]}, "temperature 0.0.*outside"),
        ({"arms": [{**ARMS[0], "top_p": 0.9}, ARMS[1]]}, "same top_p.*outside"),
        ({"arms": [{**ARMS[0], "outside": True}]}, "nothing to compare"),
        ({"forwards": [[2]]}, "`forwards` must be integers"),
        ({"forwards": [2]}, "loop of 2 forwards leaves none of 2"),
        ({"forwards": [0]}, "`forwards` must be integers"),
        ({"seeds": [1.5]}, "`seeds` must be integers"),
        ({"reference": "nobody"}, "`reference`.*nobody"),
        ({"quality": "beauty", "task": lambda *a: {"x": 1.0}}, "`quality`.*beauty"),
        ({"task": lambda *a: {}}, "dict of metrics"),
        ({"task": lambda *a: {"x": math.nan}}, "'x'.*finite"),
        ({"task": lambda pipe, steps, seed: {"x": [1.0] * (seed + 1)}}, "cannot be compared"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path, change, names):
    with pytest.raises(ValueError, match=names):
        compared(tmp_path, **{"pipe": types.SimpleNamespace(scheduler=None), **change})


def test_an_arm_outside_the_comparison_keeps_its_temperature_and_is_marked(tmp_path):
    greedy = {"name": "greedy", "scheduler": "MDLMScheduler", "temperature": 0.0, "outside": True}
    assert make_scheduler(greedy, 1.0).config.temperature == 0.0

    def best(pipe, steps, seed):
        loop = pipe.scheduler.config.get("loop_steps", 0)
        for _ in range(steps + loop):
            pipe.model(torch.zeros(1))
        return {"x": 9.0 if pipe.scheduler.config.temperature == 0 else 1.0 + steps + loop}

    found = compared(tmp_path, task=best, arms=[*ARMS, greedy], forwards=[6])
    assert found["front"] == [(6, 7.0)]
    table = (tmp_path / "comparison.md").read_text()
    assert "| greedy (outside) | 9 |" in table and "| greedy (outside) | +2 |" in table
    compared(tmp_path, task=best, arms=[ARMS[0], {**ARMS[1], "top_k": 3, "outside": True}], forwards=[6])


def test_a_task_says_which_of_its_metrics_are_better_low(tmp_path):
    def costs(pipe, steps, seed):
        return {"cost": float(steps), "gain": float(steps)}

    costs.lower_is_better = ("cost",)
    pipe = types.SimpleNamespace(scheduler=None)
    assert compared(tmp_path, pipe, costs)["front"] == [(8, 6.0)]  # two of its 8 are the loop
    assert compared(tmp_path, pipe, costs, quality="gain")["front"] == [(8, 8.0), (16, 16.0)]
    assert not compared(tmp_path, pipe, costs, quality="gain", higher_is_better=False)["higher_is_better"]


def test_the_fingerprint_follows_weights_head_scheduler_and_contents():
    def made(weight=1.0, head=None, eta=0.1, dtype=torch.float32, shift=0, theta=1.0, template=None, vocab=None):
        model = torch.nn.Linear(2, 2).to(dtype)
        model.config = transformers.LlamaConfig(rope_theta=theta, name_or_path=f"/somewhere/{next(places)}")
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, weight)
        scheduler = make_scheduler({"name": "x", "scheduler": "PrismScheduler", "eta": eta}, 1.0)
        vocab = vocab or {"a": 0, "b": 1}
        tokenizer = types.SimpleNamespace(chat_template=template, special_tokens_map={}, get_vocab=lambda: vocab)
        config = types.SimpleNamespace(mdm_spec={"logit_shift": shift})
        parts = {"quality_head": head, "scheduler": scheduler, "tokenizer": tokenizer, "config": config}
        return types.SimpleNamespace(model=model, **parts)

    places = itertools.count()
    assert pipeline_fingerprint(made(), b"a") == pipeline_fingerprint(made(), "a")
    others = [made(2.0), made(head=torch.nn.Linear(2, 1)), made(eta=0.2), made(dtype=torch.bfloat16)]
    others += [made(shift=1), made(theta=2.0), made(template="x"), made(vocab={"a": 1, "b": 0})]
    assert pipeline_fingerprint(made(), "a") == pipeline_fingerprint(made(vocab={"b": 1, "a": 0}), "a")
    marks = {pipeline_fingerprint(pipe, "a") for pipe in [made(), *others]}
    marks |= {pipeline_fingerprint(made(), *contents) for contents in ((), ("b",), ("a", ""), ("", "a"))}
    assert len(marks) == 13


def test_a_damaged_cell_is_named(tmp_path):
    (tmp_path / "cell.json").write_text('{"arm": ')
    with pytest.raises(ValueError, match=r"cell\.json is a damaged cell"):
        read_cell(tmp_path / "cell.json")
    (tmp_path / "cell.json").write_text('{"arm": {}, "model_forwards": 3}')
    with pytest.raises(ValueError, match=r"cell\.json is a cell of an earlier version"):
        read_cell(tmp_path / "cell.json")


def test_a_comparison_is_read_from_json_and_toml(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"arms": ARMS[:1], "forwards": [8], "seeds": [0]}))
    (tmp_path / "a.toml").write_text(
        'forwards = [8]\nseeds = [0]\n[[arms]]\nname = "mdlm"\nscheduler = "MDLMScheduler"\n'
    )
    assert read_comparison(tmp_path / "a.json") == {"arms": ARMS[:1], "forwards": [8], "seeds": [0]}
    pytest.importorskip("tomllib")
    assert read_comparison(tmp_path / "a.toml") == read_comparison(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("a.yaml", "", "yaml"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[]", "list"),
        ("a.json", '{"arms": [], "forwards": 2, "seeds": [0]}', "'forwards' must be a list"),
        ("a.json", '{"arms": [], "forwards": [2], "seeds": 3}', "'seeds' must be a list"),
        ("a.json", '{"arms": [], "forwards": [2], "seeds": [3], "quality": ["x"]}', "'quality' must be a string"),
        ("a.json", '{"arms": [{"model": []}], "forwards": [2], "seeds": [0]}', "an arm is"),
        ("a.json", '{"arms": ["x"], "forwards": [2], "seeds": [0]}', "an arm is"),
        ("a.json", '{"arms": [], "forwards": []}', "lacks.*seeds.*needs lists such as"),
        ("a.json", '{"arms": [], "forwards": [], "seeds": [], "temprature": 1}', "temprature"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, names):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=names):
        read_comparison(tmp_path / name)
