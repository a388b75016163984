"""Arms by forwards by seeds: one metric table with intervals, paired differences and a Pareto plot.

An arm is a scheduler with its settings. All arms make the same number of forward passes at the same temperature and see
the same seeds. Every finished cell (arm, forwards, seed) is a file of its own: stop at any time and start again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..atomic_files import write_atomically
from .arms import check_comparison, marked, outside_names
from .cells import Cells, check_quality
from .statistics import pareto_front, tabulate
from .sudoku import evaluate_sudoku, pipeline_solver
from .tables import markdown_table


def run_comparison(
    pipe: Any,
    task: Any,
    arms: Sequence[dict],
    forwards: Sequence[int],
    seeds: Sequence[int],
    *,
    out_dir: str | Path,
    task_name: str,
    temperature: float = 1.0,
    quality: str | None = None,
    reference: str | None = None,
    higher_is_better: bool | None = None,
    models: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict:
    """Run every cell that is not done yet, then write comparison.json, comparison.md and comparison.png.

    Args:
        pipe: a `PrismPipeline`; its scheduler is replaced for each arm and put back.
        models: {name: another pipeline}, for arms with {"model": name} that need other weights.
        task: callable (pipe, steps, seed) -> {metric: number, or list of one number or bool per item}. It must run the
            pipeline with num_inference_steps=steps. A refinement loop adds forward passes, so `steps` is lower for an
            arm with one. Lists must have the same items in the same order in every cell. A metric called "nfe" must
            equal the number of forward passes of the cell. An attribute `lower_is_better` of the task names metrics.
        arms: list of {"name", "scheduler", ...config}, see `make_scheduler`; "model" names one of `models`.
        forwards: numbers of forward passes.
        seeds: integers; every arm runs with each of them.
        out_dir: folder of results and of finished cells.
        task_name: names the model, the data and the settings of the task. Finished cells of another name are not used.
        temperature: of all arms.
        quality: metric of the plot; None for the first.
        reference: arm that all others are compared with, paired by seed and item; None for the first.
        higher_is_better: is a higher `quality` better? None reads the task's `lower_is_better`; without that, True.
        progress: show a bar on stderr.
    Returns:
        {"task", "temperature", "seeds", "arms", "reference", "quality", "higher_is_better", "rows", "pairs", "front"},
        see `tabulate` and `pareto_front`.
    Raises:
        ValueError: arms, forwards or seeds that cannot be compared; cells with different names of metrics, or metrics
            that are not finite; arms that made different numbers of forward passes.
        ImportError: matplotlib is not installed; this is checked before anything runs.
    """
    arms, forwards, seeds = [dict(arm) for arm in arms], list(forwards), list(seeds)
    pipes: dict[Any, Any] = {None: pipe, **(models or {})}
    check_comparison(arms, forwards, seeds, temperature, pipes, reference)
    names = [arm["name"] for arm in arms]
    reference = names[0] if reference is None else reference
    found = _all_cells(
        Cells(Path(out_dir) / "cells", task, task_name, pipes, temperature, quality), arms, forwards, seeds, progress
    )
    _check_equal(found, names)
    rows, pairs = tabulate({key: cell["metrics"] for key, cell in found.items()}, names, forwards, seeds, reference)
    check_quality(quality, metrics := list(dict.fromkeys(row["metric"] for row in rows)))
    quality = metrics[0] if quality is None else quality
    higher_is_better = is_higher_better(task, quality) if higher_is_better is None else higher_is_better
    result = {"task": task_name, "temperature": temperature, "seeds": seeds, "arms": arms, "reference": reference}
    result |= {"quality": quality, "higher_is_better": higher_is_better, "rows": rows, "pairs": pairs}
    result["front"] = _front(result)
    write_comparison(result, out_dir)
    return result


def is_higher_better(task: Any, quality: str) -> bool:
    """Is a higher value of the metric `quality` better? Yes, unless the task's `lower_is_better` names it."""
    return quality not in getattr(task, "lower_is_better", ())


def sudoku_task(puzzles: ArrayLike, *, batch_size: int = 32) -> Callable[[Any, int, int], dict]:
    """Solving puzzles as a task of `run_comparison`.

    Args:
        puzzles: integers (N, 81), 0 for a blank.
        batch_size: as `evaluate_sudoku`.
    Returns:
        callable from (pipe, steps, seed) to {"solved": N bools}.
    """

    def task(pipe: Any, steps: int, seed: int) -> dict:
        score = evaluate_sudoku(pipeline_solver(pipe, steps, seed), puzzles, batch_size=batch_size)
        return {"solved": score.solved.tolist()}

    return task


def _all_cells(
    cells: Cells, arms: list[dict], forwards: list[int], seeds: list[int], progress: bool
) -> dict[tuple[str, int, int], dict]:
    """{(arm, forwards, seed): cell}, those that are not done run with a bar."""
    wanted = [(arm, steps, seed) for seed in seeds for steps in forwards for arm in arms]
    found = {(arm["name"], steps, seed): cells.finished(arm, steps, seed) for arm, steps, seed in wanted}
    todo = [(arm, steps, seed) for arm, steps, seed in wanted if found[arm["name"], steps, seed] is None]
    with _progress(progress, todo, len(wanted)) as report:
        for arm, steps, seed in todo:
            found[arm["name"], steps, seed] = cell = cells.run(arm, steps, seed)
            report(arm, steps, cell["seconds"])
    return {key: cell for key, cell in found.items() if cell is not None}


def _front(result: dict) -> list[tuple]:
    """The Pareto front of the arms that are inside the comparison."""
    outside = outside_names(result["arms"])
    rows = [row for row in result["rows"] if row["metric"] == result["quality"] and row["arm"] not in outside]
    return pareto_front([(row["forwards"], row["value"]) for row in rows], result["higher_is_better"])


def _check_equal(cells: dict, names: list[str]) -> None:
    """Same metrics of the same size in every cell, and the same work in every arm."""
    shapes = {key: {m: np.shape(v) for m, v in cell["metrics"].items()} for key, cell in cells.items()}
    first_key, first = next(iter(shapes.items()))
    for key, shape in shapes.items():
        if shape != first:
            raise ValueError(f"Metrics of {key} are {shape}, those of {first_key} {first}: they cannot be compared.")
        read, other = cells[key]["rows_read"], cells[names[0], key[1], key[2]]["rows_read"]
        if read != other:
            raise ValueError(
                f"Arm {key[0]!r} had the model read {read} rows at T = {key[1]}, seed {key[2]}, and {names[0]!r} "
                f"{other}: arms are compared at equal forwards."
            )


def seconds_left(todo: list[tuple], done: list[tuple]) -> float | None:
    """Seconds that the cells to do will take. None before the first cell is done.

    They come from the seconds per forward pass of the same arm, or of all arms if that arm has not run.

    Args:
        todo: (arm, forwards) of the cells to do.
        done: (arm, forwards, seconds) of the cells that were run in this call.
    """
    if not done:
        return None

    def rate(cells: list[tuple]) -> float:
        return sum(cell[2] for cell in cells) / sum(cell[1] for cell in cells)

    return sum(steps * rate([cell for cell in done if cell[0] == arm] or done) for arm, steps in todo)


@contextmanager
def _progress(shown: bool, todo: list[tuple], total: int) -> Iterator[Callable[[dict, int, float], None]]:
    """A bar over all cells; yields what reports a finished cell as (arm, forwards, seconds)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    left = [(arm["name"], steps) for arm, steps, _ in todo]
    done: list[tuple] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        line = bar.add_task("cells", total=total, completed=total - len(todo), left="")

        def report(arm: dict, steps: int, seconds: float) -> None:
            done.append((arm["name"], steps, seconds))
            rest = seconds_left(left[len(done) :], done) or 0.0
            text = f"about {rest / 60:.0f} min left" if rest >= 60 else f"about {rest:.0f} s left"
            bar.update(line, advance=1, description=f"{arm['name']} T={steps}", left=text)

        yield report


# --- results ----------------------------------------------------------------------------------------------------------


def write_comparison(result: dict, out_dir: str | Path) -> None:
    """Write the result of `run_comparison` to comparison.json, .md, .png and .svg in a folder."""
    from .plots import pareto_figure

    folder, outside = Path(out_dir), outside_names(result["arms"])
    arms: dict[str, list] = {}
    write_atomically(folder / "comparison.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "comparison.md", comparison_table(result))
    for row in result["rows"]:
        if row["metric"] == result["quality"]:
            point = (row["forwards"], row["value"], row["low"], row["high"])
            arms.setdefault(marked(row["arm"], outside), []).append(point)
    better = "higher" if result["higher_is_better"] else "lower"
    beside = {marked(name, outside) for name in outside}
    label = f"{result['quality']} ({better} is better)"
    pareto_figure(arms, result["front"], label, folder / "comparison.png", outside=beside)


def comparison_table(result: dict) -> str:
    """Markdown: the table of all metrics, the paired differences, and the settings."""
    outside = outside_names(result["arms"])
    front = {tuple(point) for point in result["front"]}

    def value(row: dict) -> str:
        best = row["metric"] == result["quality"] and (row["forwards"], row["value"]) in front
        return f"**{row['value']:.4g}**" if best and row["arm"] not in outside else f"{row['value']:.4g}"

    def cells(row: dict, number: str, n: object) -> list:
        return [row["metric"], row["forwards"], marked(row["arm"], outside), number, _span(row), n]

    rows = [cells(row, value(row), f"{row['n']} ({row['interval']})") for row in result["rows"]]
    lines = [f"# {result['task']}", ""]
    lines.append(markdown_table(["metric", "forwards", "arm", "value", "95 % interval", "n"], rows))
    if result["pairs"]:
        rows = [cells(pair, f"{pair['difference']:+.4g}", pair["n"]) for pair in result["pairs"]]
        lines += ["", f"Difference from {marked(result['reference'], outside)}, paired by seed and item:", ""]
        lines.append(markdown_table(["metric", "forwards", "arm", "difference", "95 % interval", "n"], rows))
    better = "higher" if result["higher_is_better"] else "lower"
    settings = f"Temperature {result['temperature']:g}, seeds {result['seeds']}. Bold: on the Pareto front of "
    settings += f"{result['quality']} ({better} is better) against forwards."
    if outside:
        settings += " Outside: has a temperature, top_p or top_k of its own and is no part of the comparison."
    return "\n".join([*lines, "", settings]) + "\n"


def _span(row: dict) -> str:
    return "-" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
