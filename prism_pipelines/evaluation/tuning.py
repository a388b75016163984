"""Chooses the settings of the arms of a comparison, with the same number of trials for each arm.

A knob is a setting of an arm that holds a list: {"name": "ReMDM", "scheduler": "ReMDMScheduler", "eta": [0.01, 0.1]}.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..atomic_files import write_atomically
from .arms import check_comparison, make_scheduler
from .cells import Cells, check_quality
from .compare import is_higher_better

MOST_SETTINGS = 10_000  # of one arm; each is checked before anything runs
FIXED, SAME = ("name", "scheduler", "model", "outside"), ("temperature", "top_p", "top_k")
MOST_ASKED = 20  # proposals for each trial


def knobs(arm: dict) -> dict[str, list]:
    """{field: values} of the settings of an arm that hold a list."""
    return {name: values for name, values in arm.items() if isinstance(values, list)}


def first_settings(arms: list[dict]) -> list[dict]:
    """The arms with the first value of each knob, but the largest `loop_steps`, for checks before anything runs.

    Raises:
        ValueError: an empty list, too many combinations, or a list for a field that is no setting of a single arm.
    """
    for arm in arms:
        count = math.prod(map(len, knobs(arm).values()))
        if count == 0 or count > MOST_SETTINGS:
            raise ValueError(
                f"Arm {arm.get('name')!r} has {count} settings to choose from; 1 to {MOST_SETTINGS} will do."
            )
        fixed = FIXED if arm.get("outside") else FIXED + SAME
        if wrong := [name for name in knobs(arm) if name in fixed]:
            raise ValueError(
                f"Arm {arm.get('name')!r}: {wrong[0]} cannot be a list; it is no setting to choose, or one that all "
                "arms share."
            )
    return [
        arm | {name: max(values) if name == "loop_steps" else values[0] for name, values in knobs(arm).items()}
        for arm in arms
    ]


def settings_of(arm: dict, temperature: float) -> list[dict]:
    """The arm once for each combination of its knobs' values, the last knob varying fastest; [arm] without knobs.

    Raises:
        ValueError: the scheduler refuses a combination.
    """
    values = knobs(arm)
    options = [arm | dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    for option in options:
        try:
            make_scheduler(option, temperature)
        except ValueError as error:
            tried = {name: option[name] for name in values}
            raise ValueError(f"Arm {arm.get('name')!r} cannot have {tried}: {error}") from error
    return options


def check_optuna(arm: dict, options: list[dict], trials: int) -> None:
    """Check that optuna is installed if an arm has more settings than trials.

    Raises:
        ImportError: optuna is needed and not installed.
    """
    if len(options) <= trials:
        return
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Arm {arm['name']!r} has {len(options)} settings and {trials} trials. Choosing which to try needs optuna: "
            'pip install "prism-pipelines[tune]", or raise the trials.'
        ) from error


def proposals(arm: dict, options: list[dict], trials: int, seed: int, scores: list[float]) -> Iterator[dict]:
    """Settings to try: all if there are no more than `trials`, else those that optuna's TPE proposes from the scores.

    Args:
        arm: an arm with knobs.
        options: `settings_of(arm)`.
        trials: the most settings to yield.
        seed: of the proposals; the same scores give the same proposals.
        scores: scores of the settings that were yielded, in that order; higher is better. The caller appends one after
            each.
    """
    if len(options) <= trials:
        yield from options
        return
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    seen: list[dict] = []
    for asked in itertools.count():
        trial = study.ask()
        # By index: values stand in order as a rule, which a sampler can use, and may be of any kind.
        chosen = {name: values[trial.suggest_int(name, 0, len(values) - 1)] for name, values in knobs(arm).items()}
        option = arm | chosen
        if option not in seen:  # a setting that is proposed again gets its known score and counts as no trial
            seen.append(option)
            yield option
        study.tell(trial, scores[seen.index(option)])
        if len(seen) == trials:
            return
        if asked == MOST_ASKED * trials:  # the sampler has settled
            yield from [option for option in options if option not in seen][: trials - len(seen)]
            return


def tune_arms(
    pipe: Any,
    task: Any,
    arms: list[dict],
    *,
    steps: int,
    seed: int,
    trials: int,
    out_dir: str | Path,
    task_name: str,
    temperature: float = 1.0,
    quality: str | None = None,
    higher_is_better: bool | None = None,
    models: dict[str, Any] | None = None,
    report: Callable[[dict, dict], None] | None = None,
    progress: bool = True,
) -> tuple[list[dict], list[dict]]:
    """Each arm with its best setting, found on data for which no result is reported.

    An arm without knobs is not run. Every tried setting is a cell as in `run_comparison`, and is not run twice. A
    resumed search proposes the same settings.

    Args:
        pipe, task, out_dir, task_name, temperature, quality, models: as `run_comparison`; the task on other data.
        higher_is_better: as `run_comparison`.
        arms: as `run_comparison`, with lists for the settings to choose; of equally good settings the first wins.
        steps: forward passes, including those of a refinement loop.
        seed: of the task and of the proposals.
        trials: the most settings tried for each arm, so that no rule gets more effort than another. An arm with no more
            settings than this gets all of them, in order; else optuna's TPE proposes settings (extra `tune`).
        report: called with (arm, {metric: mean}) after each trial; or None.
        progress: show a bar over the settings on stderr.
    Returns:
        The arms with the chosen values in place of lists, and all trials: [arm | {metric: mean}].
    Raises:
        ValueError: trials or steps below 1, no setting left, settings that a scheduler refuses, no such metric; arms
            that `run_comparison` refuses.
        ImportError: optuna is needed and not installed, or matplotlib for the comparison that follows.
    Source: optuna (arXiv 1907.10902) for TPE.
    """
    if trials < 1:
        raise ValueError(f"`trials` must be at least 1, got {trials}.")
    first = first_settings(arms)
    pipes: dict[Any, Any] = {None: pipe, **(models or {})}
    settings = [settings_of(arm, temperature) for arm in arms]
    check_comparison(first, [steps], [seed], temperature, pipes)
    for arm, options in zip(arms, settings, strict=True):
        check_optuna(arm, options, trials)
    cells = Cells(Path(out_dir) / "cells", task, f"tuning {task_name}", pipes, temperature, quality)
    chosen: list[dict] = []
    tried: list[dict] = []
    total = sum(min(trials, len(options)) for arm, options in zip(arms, settings, strict=True) if knobs(arm))
    with tqdm(total=total, desc="settings tried", disable=not progress) as bar:
        for arm, options in zip(arms, settings, strict=True):
            looked_at: list[dict] = []
            scores: list[float] = []
            for option in proposals(arm, options, trials, seed, scores) if knobs(arm) else ():
                means, score = judged(cells, option, steps, seed, higher_is_better)
                looked_at.append(option)
                scores.append(score)
                tried.append(option | means)
                bar.update()
                if report is not None:
                    report(option, means)
            chosen.append(looked_at[scores.index(max(scores))] if scores else arm)
    found = {"steps": steps, "seed": seed, "tried": tried}
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(out_dir) / "tuning.json", json.dumps(found, indent=1) + "\n")
    return chosen, tried


def judged(
    cells: Cells, option: dict, steps: int, seed: int, higher_is_better: bool | None
) -> tuple[dict[str, float], float]:
    """The means of a setting's metrics, and its score: higher is better."""
    metrics = cells.get(option, steps, seed)["metrics"]
    check_quality(cells.quality, metrics)  # a finished cell may lack it
    means = {metric: float(np.mean(values)) for metric, values in metrics.items()}
    quality = next(iter(means)) if cells.quality is None else cells.quality
    better = is_higher_better(cells.task, quality) if higher_is_better is None else higher_is_better
    return means, means[quality] if better else -means[quality]
