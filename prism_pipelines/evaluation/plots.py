"""Figures of evaluations and benchmarks, as PNG and SVG. Needs matplotlib, which the extra `eval` installs.

Every function writes `path`, and next to it the same figure with the other ending, in the style of `figure_style.py`.
Without matplotlib each raises ImportError.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from .figure_style import ARM_LOOKS, GREY, label_ends, looks, new_figure, save_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _arms(axis: Axes, arms: dict, highlight: list[str] | None, number: str) -> dict:
    """One line an arm against the number of forwards; few in colour, with bars for their intervals, the others grey.

    Arms in colour are moved a little sideways, so that their bars do not hide each other.

    Args:
        arms: {arm: [(forwards, value, low, high), ...]}; low and high None where there is no interval.
        highlight: arms in colour, see `figure_style.looks`.
        number: format of the values at the ends of the lines.
    Returns:
        {arm: {(forwards, value): where it was drawn along the horizontal axis}}.
    """
    places, ends, colours, texts = {}, {}, {}, {}
    last = max(point[0] for points in arms.values() for point in points)
    look = looks(list(arms), highlight)
    coloured = [arm for arm in arms if look[arm]]
    for arm, points in arms.items():
        forwards, value, low, high = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        colour, mark, line = look[arm] or (GREY, ".", "-")
        aside = 1 + 0.012 * (coloured.index(arm) - (len(coloured) - 1) / 2) if look[arm] else 1
        beside = [steps * aside for steps in forwards]
        places[arm] = dict(zip(zip(forwards, value, strict=True), beside, strict=True))
        # An interval without width may miss the value by a rounding.
        below = [0 if a is None else max(0, v - a) for v, a in zip(value, low, strict=True)]
        above = [0 if b is None else max(0, b - v) for v, b in zip(value, high, strict=True)]
        axis.errorbar(
            beside, value, yerr=[below, above] if look[arm] else None, marker=mark, color=colour, linestyle=line,
            linewidth=1.8 if look[arm] else 0.9, elinewidth=0.9, markersize=5 if look[arm] else 3, capsize=2,
            zorder=3 if look[arm] else 2, label=arm,
        )  # fmt: skip
        ends[arm], colours[arm] = (beside[-1], value[-1]), colour
        early = f" at {forwards[-1]}" if forwards[-1] < last else ""
        texts[arm] = f"{arm}  {value[-1]:{number}}{early}"
    ticks = sorted({point[0] for points in arms.values() for point in points})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("forward passes")
    axis.set_ylim(*axis.get_ylim())
    axis.set_xlim(*axis.get_xlim())
    label_ends(axis, ends, colours, texts)
    return places


def success_figure(panels: dict, path: str | Path, highlight: list[str] | None = None) -> None:
    """Success against number of forward passes, a panel per puzzle set, a line per arm, bars for the intervals.

    Args:
        panels: {title: {arm: [(forwards, success, low, high), ...]}}; shares in [0, 1].
        path: PNG or SVG file to write; the other is written next to it.
        highlight: arms in colour; None for judge and repair, PRISM, self-confidence, MDLM. Others are grey, without
            their intervals.
    """
    with styled():
        figure, axes = new_figure(len(panels))
        for axis, (title, arms) in zip(axes, panels.items(), strict=True):
            percent = {
                arm: [(point[0], *(None if v is None else 100 * v for v in point[1:])) for point in points]
                for arm, points in arms.items()
            }
            axis.set(title=title, ylabel="solved (%)", ylim=(-3, 103))
            _arms(axis, percent, highlight, ".1f")
        save_figure(figure, path)


def _diagonal(axis: Axes, title: str, across: str) -> None:
    """Axes from 0 to 1 with the line on which what is claimed is what happens."""
    axis.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="calibrated")
    axis.set(title=title, xlabel=across, ylabel="share right", xlim=(0, 1), ylim=(0, 1))


def reliability_figure(curves: dict, path: str | Path) -> None:
    """Share of right tokens against claimed quality, a panel per set of states; larger marks hold more tokens.

    Args:
        curves: {title: [(mean quality, share right, n), ...]}, as `reliability` of `calibration_measures`.
        path: PNG or SVG file to write; the other is written next to it.
    """
    with styled():
        figure, axes = new_figure(len(curves), size=(4.2, 3.8))
        colour = ARM_LOOKS["PRISM"][0]
        for axis, (title, points) in zip(axes, curves.items(), strict=True):
            claimed, found, number = zip(*points, strict=True)
            _diagonal(axis, title, "quality claimed by the head")
            axis.plot(claimed, found, color=colour, clip_on=False)
            area = [20 + 180 * n / max(number) for n in number]
            axis.scatter(claimed, found, s=area, color=colour, edgecolor="white", zorder=3, clip_on=False)
        save_figure(figure, path)


def reliability_comparison_figure(panels: dict, path: str | Path) -> None:
    """Share of right tokens against the claimed probability, a panel per set of states, a line per score.

    Args:
        panels: {title: {score: [(mean claimed, share right, n), ...]}}, as `reliability` of `calibration_measures`.
        path: PNG or SVG file to write; the other is written next to it.
    """
    with styled():
        figure, axes = new_figure(len(panels), columns=3, size=(4.2, 3.8))
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            _diagonal(axis, title, "claimed probability")
            # The head first, in PRISM's colour; the others in theirs.
            look = looks(list(curves), list(curves)[:8])
            for label, points in curves.items():
                claimed, found, _ = zip(*points, strict=True)
                colour, mark, line = look[label] or (GREY, ".", "-")
                axis.plot(claimed, found, marker=mark, markersize=4, color=colour, linestyle=line, label=label)
        axes[0].legend(fontsize=8)
        save_figure(figure, path)


def pareto_figure(
    arms: dict,
    front: list,
    metric: str,
    path: str | Path,
    outside: Collection[str] = (),
    highlight: list[str] | None = None,
) -> None:
    """Quality against number of forward passes, a line per arm, bars for the intervals, rings on the Pareto front.

    Args:
        arms: {arm: [(forwards, value, low, high), ...]}; low and high None where there is no interval.
        front: (forwards, value) of the points that no other point beats.
        metric: label of the vertical axis.
        path: PNG or SVG file to write; the other is written next to it.
        outside: arms that are shown but not compared, so they are not on the front.
        highlight: as `success_figure`.
    """
    with styled():
        figure, (axis,) = new_figure(1, size=(7, 4.2))
        axis.set_ylabel(metric)
        best = {tuple(point) for point in front}
        rings = [
            (place, point[1])
            for arm, places in _arms(axis, arms, highlight, "#.3g").items()
            for point, place in places.items()
            if arm not in outside and point in best
        ]
        along, values = zip(*rings, strict=True)
        axis.scatter(along, values, s=130, facecolors="none", edgecolors="black", zorder=4, label="Pareto front")
        axis.set_title("Rings: no other arm is better in as few forward passes", fontsize=8, fontweight="normal")
        save_figure(figure, path)


def measures_figure(
    panels: dict, path: str | Path, marks: dict | None = None, highlight: list[str] | None = None
) -> None:
    """Several measures against number of forward passes, a panel per measure, a line per arm, bars for the intervals.

    Args:
        panels: {measure: {arm: [(forwards, value, low, high), ...]}}; low and high None where there is no interval.
        path: PNG or SVG file to write; the other is written next to it.
        marks: {measure: value of held-out text}, a dotted line.
        highlight: as `success_figure`.
    """
    with styled():
        figure, axes = new_figure(len(panels))
        for axis, (measure, arms) in zip(axes, panels.items(), strict=True):
            axis.set_title(measure)
            if marks and measure in marks:
                axis.axhline(marks[measure], color=GREY, linestyle=":", linewidth=1.2)
                axis.annotate(
                    "held-out text", (0.01, marks[measure]), xycoords=("axes fraction", "data"), fontsize=7.5,
                    color="#555555", va="bottom", backgroundcolor=(1, 1, 1, 0.6), zorder=1.5,
                )  # fmt: skip
            _arms(axis, arms, highlight, "#.3g")
        save_figure(figure, path)
