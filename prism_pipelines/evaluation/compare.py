"""Arms by forwards by seeds: one metric table with intervals, paired differences and a Pareto figure.

An arm is a scheduler with its settings. All arms make the same number of forward passes at the same temperature and see
the same seeds. Every finished cell (arm, forwards, seed) is a file of its own: stop at any time and start again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from contextlib import contextmanager
from numbers import Real
from pathlib import Path

import numpy as np
import torch

from .. import __version__
from ..atomic_files import write_atomically
from ..schedulers.by_name import scheduler_class
from ..schedulers.validation import own_fields
from .figure_style import need_matplotlib
from .statistics import pareto_front, tabulate
from .sudoku import evaluate_sudoku, pipeline_solver

FIELDS = {
    "arms": list,
    "forwards": list,
    "seeds": list,
    "temperature": (int, float),
    "quality": str,
    "reference": str,
    "higher_is_better": bool,
}


def read_comparison(path) -> dict:
    """Arguments of `run_comparison` from a small .json or .toml file.

    Fields: arms, forwards, seeds (needed), temperature, quality, reference, higher_is_better.

    Returns:
        dict for `run_comparison(pipe, task, **fields, ...)`.
    Raises:
        ValueError: another ending, broken content, a needed field missing or an unknown one.
        OSError: the file cannot be read.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".json", ".toml"):
        raise ValueError(f"{path} must end in .json or .toml, got {path.suffix!r}.")
    try:
        fields = json.loads(text) if path.suffix == ".json" else _read_toml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold fields, got {type(fields).__name__}.")
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise ValueError(f"{path} has unknown fields {unknown}; known: {sorted(FIELDS)}.")
    if missing := [name for name in ("arms", "forwards", "seeds") if name not in fields]:
        raise ValueError(f"{path} lacks {missing}.")
    if wrong := [name for name, value in fields.items() if not isinstance(value, FIELDS[name])]:
        kind = {list: "a list", str: "a string", bool: "true or false"}.get(FIELDS[wrong[0]], "a number")
        raise ValueError(f"{path}: {wrong[0]!r} must be {kind}, got {fields[wrong[0]]!r}.")
    if not all(isinstance(arm, dict) and isinstance(arm.get("model", ""), str) for arm in fields["arms"]):
        raise ValueError(f'{path}: an arm is {{"name": ..., "scheduler": ..., ...config}}, got {fields["arms"]!r}.')
    return fields


def _read_toml(text: str) -> dict:
    try:
        import tomllib
    except ImportError as error:
        raise ValueError("TOML needs Python 3.11 or newer; use JSON.") from error
    return tomllib.loads(text)


def make_scheduler(arm: dict, temperature: float):
    """The scheduler of an arm.

    Args:
        arm: {"name", "scheduler", ...config}; the scheduler a public class name such as "PrismScheduler". An arm with
            "outside": true may have a temperature, top_p or top_k of its own, and is marked so in the tables. "model"
            is not read here.
        temperature: of all other arms.
    Returns:
        a new scheduler.
    Raises:
        ValueError: an unknown scheduler or setting, or another temperature than the others.
    """
    _check_names(arm)
    config = {key: value for key, value in arm.items() if key not in ("name", "scheduler", "outside", "model")}
    try:
        kind = scheduler_class(arm["scheduler"])
    except ValueError as error:
        raise ValueError(f"Arm {arm['name']!r}: {error}") from None
    if not arm.get("outside") and config.get("temperature", temperature) != temperature:
        raise ValueError(
            f"Arm {arm['name']!r} has temperature {config['temperature']}, the comparison {temperature}. Arms are "
            'compared at the same temperature; set "outside": true for one that stands beside the others.'
        )
    try:
        return kind(**{"temperature": temperature, **config})
    except TypeError as error:
        raise ValueError(f"Arm {arm['name']!r}: {error}.") from error


def run_comparison(
    pipe,
    task,
    arms,
    forwards,
    seeds,
    *,
    out_dir,
    task_name: str,
    temperature: float = 1.0,
    quality: str | None = None,
    reference: str | None = None,
    higher_is_better: bool | None = None,
    models: dict | None = None,
    progress: bool = True,
) -> dict:
    """Run every cell that is not done yet, then write comparison.json, comparison.md and comparison.png.

    Args:
        pipe: a `PrismPipeline`; its scheduler is replaced for each arm and put back.
        models: {name: another pipeline}, for arms with {"model": name} that need weights of their own.
        task: callable (pipe, steps, seed) -> {metric: number, or list of one number or bool per item}. It must run the
            pipeline with num_inference_steps=steps; the forwards of a refinement loop come on top and are taken off
            `steps` here. Lists must have the same items in the same order in every cell. A metric called "nfe" is
            checked against the forwards wanted. Its attribute `lower_is_better`, if it has one, names metrics.
        arms: list of {"name", "scheduler", ...config}, see `make_scheduler`; "model" names one of `models`.
        forwards: numbers of forward passes.
        seeds: integers; every arm gets every one.
        out_dir: folder of results and of finished cells.
        task_name: names the model, the data and the settings of the task. Cells count only for the same name.
        temperature: of all arms.
        quality: metric of the figure; None for the first.
        reference: arm that the others are compared with, paired; None for the first.
        higher_is_better: of `quality`; None for what the task's `lower_is_better` says, else True.
        progress: show a bar on stderr.
    Returns:
        {"task", "temperature", "seeds", "arms", "quality", "higher_is_better", "rows", "pairs", "front"}, see
        `tabulate` and `pareto_front`.
    Raises:
        ValueError: arms, forwards or seeds that cannot be compared; metrics that differ from cell to cell or are not
            finite; arms that made different numbers of forwards.
        ImportError: matplotlib is not installed (asked before anything runs).
    """
    arms, forwards, seeds = [dict(arm) for arm in arms], list(forwards), list(seeds)
    pipes = {None: pipe, **(models or {})}
    check_comparison(arms, forwards, seeds, temperature, pipes, reference)
    names = [arm["name"] for arm in arms]
    reference = names[0] if reference is None else reference
    wanted = [(arm, steps, seed) for seed in seeds for steps in forwards for arm in arms]
    folder = Path(out_dir) / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {(arm["name"], t, s): folder / cell_file(arm, t, s, temperature, task_name) for arm, t, s in wanted}
    cells = {key: read_cell(path) for key, path in paths.items()}
    todo = [(arm, t, s) for arm, t, s in wanted if cells[arm["name"], t, s] is None]
    named = {"temperature": temperature, "task_name": task_name, "quality": quality}
    with _progress(progress, todo, len(wanted)) as report:
        for arm, steps, seed in todo:
            key, running = (arm["name"], steps, seed), pipes[arm.get("model")]
            cells[key] = run_cell(running, task, arm, steps, seed, path=paths[key], **named)
            report(arm, steps, cells[key]["seconds"])
    _check_equal(cells, names)
    rows, pairs = tabulate({key: cell["metrics"] for key, cell in cells.items()}, names, forwards, seeds, reference)
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    check_quality(quality, metrics)
    quality = metrics[0] if quality is None else quality
    higher_is_better = is_higher_better(task, quality) if higher_is_better is None else higher_is_better
    outside = _outside(arms)
    points = [(row["forwards"], row["value"]) for row in rows if row["metric"] == quality and row["arm"] not in outside]
    result = {
        "task": task_name,
        "temperature": temperature,
        "seeds": seeds,
        "arms": arms,
        "reference": reference,
        "quality": quality,
        "higher_is_better": higher_is_better,
        "rows": rows,
        "pairs": pairs,
        "front": pareto_front(points, higher_is_better),
    }
    write_comparison(result, out_dir)
    return result


def check_quality(quality: str | None, metrics) -> None:
    """Is `quality`, unless it is None, one of the metrics of a task?

    Raises:
        ValueError: it is not.
    """
    if quality is not None and quality not in metrics:
        raise ValueError(f"`quality` must be a metric of the task, got {quality!r}; it has {list(metrics)}.")


def is_higher_better(task, quality: str) -> bool:
    """What the task's `lower_is_better` says of a metric; true without one."""
    return quality not in getattr(task, "lower_is_better", ())


def sudoku_task(puzzles, *, batch_size: int = 32):
    """Solving puzzles as a task of `run_comparison`.

    Args:
        puzzles: integers (N, 81), 0 for a blank.
        batch_size: as `evaluate_sudoku`.
    Returns:
        callable from (pipe, steps, seed) to {"solved": N bools}.
    """

    def task(pipe, steps, seed):
        score = evaluate_sudoku(pipeline_solver(pipe, steps, seed), puzzles, batch_size=batch_size)
        return {"solved": score.solved.tolist()}

    return task


# --- cells ------------------------------------------------------------------------------------------------------------


def fingerprint(pipe, *contents: bytes | str) -> str:
    """Hash of a pipeline (weights, head, configs, tokenizer), this package's version, and any other content.

    For `task_name`, so that cells of a retrained model or of other held-out texts are not taken for these. Where a
    model was loaded from plays no part.

    Args:
        pipe: a `PrismPipeline`.
        contents: of files and settings.
    Returns:
        12 hex digits.
    """
    digest = hashlib.sha256()
    for part in (pipe.model, pipe.quality_head):
        for name, tensor in ({} if part is None else part.state_dict()).items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
    rule = {"scheduler": type(pipe.scheduler).__name__, **own_fields(pipe.scheduler)}
    parts = [rule, dict(pipe.config.mdm_spec), _model_config(pipe.model), _tokenizer_fields(pipe.tokenizer)]
    contents = (json.dumps([*parts, __version__], sort_keys=True, default=str), *contents)
    for content in contents:
        content = content.encode() if isinstance(content, str) else content
        digest.update(b"%d\n" % len(content) + content)
    return digest.hexdigest()[:12]


def _model_config(model) -> dict:
    fields = json.loads(model.config.to_json_string()) if hasattr(model, "config") else {}
    fields.pop("_name_or_path", None)
    return fields


def _tokenizer_fields(tokenizer) -> list | None:
    if tokenizer is None:
        return None
    template = getattr(tokenizer, "chat_template", None)
    return [template, getattr(tokenizer, "special_tokens_map", None), tokenizer.get_vocab()]


def run_cell(
    pipe, task, arm: dict, steps: int, seed: int, *, path: Path, temperature: float, task_name: str, quality: str | None
) -> dict:
    """One cell: the task with the scheduler of the arm, and its file.

    Args:
        pipe, task, seed, temperature, task_name, quality: as `run_comparison`; the scheduler of `pipe` is put back.
        arm: as `make_scheduler`.
        steps: forwards, those of a refinement loop among them.
        path: where the cell is written when it is done.
    Returns:
        {"arm", "forwards", "seed", "task", "metrics", "rows_read", "device", "seconds"}; "rows_read" are those of all
        forwards of the model, however they were put in batches.
    """
    shipped, start = pipe.scheduler, time.perf_counter()
    pipe.scheduler = make_scheduler(arm, temperature)
    try:
        with _counted_rows(pipe) as read:
            metrics = task(pipe, steps - arm.get("loop_steps", 0), seed)
    finally:
        pipe.scheduler = shipped
    metrics = _checked_metrics(metrics, (arm["name"], steps, seed))
    check_quality(quality, metrics)
    cell = {"arm": arm, "forwards": steps, "seed": seed, "task": task_name, "metrics": metrics}
    cell |= {"rows_read": read[0], "device": _device_name(pipe), "seconds": time.perf_counter() - start}
    write_atomically(path, json.dumps(cell, allow_nan=False) + "\n")
    return cell


def cell_file(arm: dict, forwards: int, seed: int, temperature: float, task_name: str) -> str:
    """File name of a cell: readable, and different whenever anything that decides its result differs."""
    settings = {key: value for key, value in arm.items() if key != "name"}
    content = json.dumps([settings, forwards, seed, temperature, task_name], sort_keys=True)
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", arm["name"])
    return f"{name}_T{forwards}_s{seed}_{hashlib.sha256(content.encode()).hexdigest()[:12]}.json"


def read_cell(path: Path) -> dict | None:
    """A finished cell; None if it is not there.

    Raises:
        ValueError: the file is damaged, or of a version that counted something else.
    """
    if not path.exists():
        return None
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is a damaged cell: {error}. Remove it, and it is made again.") from error
    if "rows_read" not in cell:
        raise ValueError(f"{path} is a cell of an earlier version. Remove it, and it is made again.")
    return cell


def check_comparison(
    arms: list[dict], forwards: list, seeds: list, temperature: float, pipes: dict, reference: str | None = None
) -> None:
    """What `run_comparison` refuses of its arms, asked before anything runs; arguments as there, `pipes` with the
    model None.

    Raises:
        ValueError, ImportError: as `run_comparison`.
    """
    need_matplotlib()  # a missing extra must not show after hours of work
    if not arms or not forwards or not seeds:
        raise ValueError(f"Nothing to compare: {len(arms)} arms, {len(forwards)} forwards, {len(seeds)} seeds.")
    for arm in arms:
        _check_names(arm)
    for name, values, least in (("forwards", forwards, 1), ("seeds", seeds, 0)):
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values):
            raise ValueError(f"`{name}` must be integers of at least {least}, got {values}.")
    for name, values in (("arms", [arm["name"] for arm in arms]), ("forwards", forwards), ("seeds", seeds)):
        if len(set(values)) != len(values):
            raise ValueError(f"`{name}` must not hold one twice, got {values}.")
    names = [arm["name"] for arm in arms]
    if reference is not None and reference not in names:
        raise ValueError(f"`reference` must name an arm, got {reference!r}; arms: {names}.")
    inside = [arm for arm in arms if not arm.get("outside")]
    if not inside:
        raise ValueError('Every arm is "outside": true, so there is nothing to compare.')
    for name in ("top_p", "top_k"):
        found = {arm["name"]: arm.get(name) for arm in inside}
        if len(set(found.values())) > 1:
            raise ValueError(
                f"Arms are compared at the same {name}, got {found}. "
                'Set "outside": true for one that stands beside the others.'
            )
    for arm in arms:
        make_scheduler(arm, temperature)
        if arm.get("model") not in pipes:
            raise ValueError(f"Arm {arm['name']!r} wants the model {arm['model']!r}, which `models` does not hold.")
        if min(forwards) <= arm.get("loop_steps", 0):
            raise ValueError(
                f"Arm {arm['name']!r}: a loop of {arm['loop_steps']} forwards leaves none of {min(forwards)}."
            )


def _check_names(arm: dict) -> None:
    if not isinstance(arm.get("name"), str) or not isinstance(arm.get("scheduler"), str):
        raise ValueError(f'An arm is {{"name": ..., "scheduler": ..., ...config}}, got {arm}.')


def _outside(arms: list[dict]) -> set[str]:
    """Names of the arms that stand beside the comparison."""
    return {arm["name"] for arm in arms if arm.get("outside")}


def _marked(name: str, outside: set[str]) -> str:
    return f"{name} (outside)" if name in outside else name


def _checked_metrics(metrics, key: tuple) -> dict:
    """Plain numbers and lists of a cell."""
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError(f"`task` must return a dict of metrics, got {metrics!r} for {key}.")
    plain = {}
    for name, value in metrics.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, Real) and math.isfinite(item) for item in items):
            raise ValueError(f"Metric {name!r} of {key} must be a finite number or a list of these, got {value!r}.")
        plain[name] = value
    if plain.get("nfe", key[1]) != key[1]:
        raise ValueError(f"Arm {key[0]!r} made {plain['nfe']} forwards where {key[1]} were wanted.")
    return plain


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


@contextmanager
def _counted_rows(pipe):
    """Counts rows that `pipe.model` reads while it is open; [None] if there is no such module.

    Rows and not calls: a comparison may go on with another batch size.
    """
    read, model = [None], getattr(pipe, "model", None)
    if not hasattr(model, "register_forward_pre_hook"):
        yield read
        return
    read[0] = 0

    def count(module, args, kwargs):
        read[0] += next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield read
    finally:
        handle.remove()


def _device_name(pipe) -> str:
    """What the pipeline's model runs on, such as "cpu" or "NVIDIA H100 80GB HBM3"."""
    device = torch.device(getattr(pipe, "device", "cpu"))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seconds_left(todo: list[tuple], done: list[tuple]) -> float | None:
    """Time that the cells left will take, from seconds per forward of the same arm, or of all arms if it has not run.

    Args:
        todo: (arm, forwards) of cells left.
        done: (arm, forwards, seconds) of cells run now; those found finished say nothing.
    Returns:
        seconds, or None before the first cell is done.
    """
    if not done:
        return None

    def rate(cells):
        return sum(cell[2] for cell in cells) / sum(cell[1] for cell in cells)

    return sum(steps * rate([cell for cell in done if cell[0] == arm] or done) for arm, steps in todo)


@contextmanager
def _progress(shown: bool, todo: list[tuple], total: int):
    """A bar over all cells; yields what reports a finished cell as (arm, forwards, seconds)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    left, done = [(arm["name"], steps) for arm, steps, _ in todo], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        line = bar.add_task("cells", total=total, completed=total - len(todo), left="")

        def report(arm, steps, seconds):
            done.append((arm["name"], steps, seconds))
            rest = seconds_left(left[len(done) :], done)
            text = f"about {rest / 60:.0f} min left" if rest >= 60 else f"about {rest:.0f} s left"
            bar.update(line, advance=1, description=f"{arm['name']} T={steps}", left=text)

        yield report


# --- results ----------------------------------------------------------------------------------------------------------


def write_comparison(result: dict, out_dir) -> None:
    """Write what `run_comparison` found to comparison.json, .md, .png and .svg in a folder."""
    from .plots import pareto_figure

    folder, arms, outside = Path(out_dir), {}, _outside(result["arms"])
    write_atomically(folder / "comparison.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "comparison.md", comparison_table(result))
    for row in result["rows"]:
        if row["metric"] == result["quality"]:
            point = (row["forwards"], row["value"], row["low"], row["high"])
            arms.setdefault(_marked(row["arm"], outside), []).append(point)
    better = "higher" if result["higher_is_better"] else "lower"
    marked = {_marked(name, outside) for name in outside}
    label = f"{result['quality']} ({better} is better)"
    pareto_figure(arms, result["front"], label, folder / "comparison.png", outside=marked)


def comparison_table(result: dict) -> str:
    """Markdown: the table of all metrics, the paired differences, and the settings."""
    outside = _outside(result["arms"])
    front = {tuple(point) for point in result["front"]}
    lines = [f"# {result['task']}", "", "| metric | forwards | arm | value | 95 % interval | n |", "| --- " * 6 + "|"]
    for row in result["rows"]:
        best = row["metric"] == result["quality"] and (row["forwards"], row["value"]) in front
        best = best and row["arm"] not in outside
        value = f"**{row['value']:.4g}**" if best else f"{row['value']:.4g}"
        cells = [
            row["metric"],
            row["forwards"],
            _marked(row["arm"], outside),
            value,
            _span(row),
            f"{row['n']} ({row['interval']})",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if result["pairs"]:
        lines += ["", f"Difference from {_marked(result['reference'], outside)}, paired by seed and item:", ""]
        lines += ["| metric | forwards | arm | difference | 95 % interval | n |", "| --- " * 6 + "|"]
        for pair in result["pairs"]:
            cells = [
                pair["metric"],
                pair["forwards"],
                _marked(pair["arm"], outside),
                f"{pair['difference']:+.4g}",
                _span(pair),
            ]
            lines.append("| " + " | ".join(map(str, [*cells, pair["n"]])) + " |")
    better = "higher" if result["higher_is_better"] else "lower"
    lines += ["", f"Temperature {result['temperature']:g}, seeds {result['seeds']}. Bold: on the Pareto front of "]
    lines[-1] += f"{result['quality']} ({better} is better) against forwards."
    if outside:
        lines[-1] += " Outside: has a temperature, top_p or top_k of its own and is no part of the comparison."
    return "\n".join(lines) + "\n"


def _span(row: dict) -> str:
    return "-" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
