"""Figures of the benchmarks, as PNG files. Needs matplotlib, which the extra `eval` installs."""

from __future__ import annotations


def _figure(columns: int):
    """A figure with one row of `columns` axes; drawn without pyplot, so no display and no global state is touched."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "prism-pipelines[eval]"') from error
    figure = Figure(figsize=(5.2 * columns, 4.2), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _arms(axis, arms: dict, scale: float = 1.0) -> dict:
    """One line an arm against the number of forwards, bars for the intervals.

    Arms stand a little beside each other, or their bars would hide one another; PRISM is drawn in black.

    Args:
        arms: {arm: [(forwards, value, low, high), ...]}; low and high None where there is no interval.
        scale: of the values.
    Returns:
        {arm: {(forwards, value): where it was drawn along the horizontal axis}}.
    """
    places = {}
    for k, (arm, points) in enumerate(arms.items()):
        forwards, value, low, high = zip(*sorted(points), strict=True)
        beside = [steps * (1 + 0.012 * (k - (len(arms) - 1) / 2)) for steps in forwards]
        places[arm] = dict(zip(zip(forwards, value, strict=True), beside, strict=True))
        axis.errorbar(
            beside,
            [scale * v for v in value],
            yerr=[
                # An interval without width may miss the value by a rounding.
                [0 if a is None else max(0, scale * (v - a)) for v, a in zip(value, low, strict=True)],
                [0 if b is None else max(0, scale * (b - v)) for v, b in zip(value, high, strict=True)],
            ],
            marker="osD^vPX*<>"[k % 10],
            color="black" if arm == "PRISM" else f"C{k % 10}",
            linestyle="-" if k < 10 else "--",
            linewidth=2 if arm == "PRISM" else 1.2,
            elinewidth=1,
            markersize=5,
            capsize=2,
            label=arm,
        )
    ticks = sorted({point[0] for points in arms.values() for point in points})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("forward passes")
    axis.grid(alpha=0.3)
    return places


def _legend(figure, axis) -> None:
    """The legend of one of the axes, beside them all: inside it would hide data."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def success_figure(panels: dict, path) -> None:
    """Success against number of forwards, one panel a puzzle set, one line an arm, bars for the intervals.

    Args:
        panels: {title: {arm: [(forwards, success, low, high), ...]}}; shares in [0, 1].
        path: PNG file to write.
    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(len(panels))
    for axis, (title, arms) in zip(axes, panels.items(), strict=True):
        _arms(axis, arms, scale=100)
        axis.set(title=title, ylabel="solved (%)", ylim=(-3, 103))
    _legend(figure, axes[-1])
    figure.savefig(path, dpi=150)


def reliability_figure(curves: dict, path) -> None:
    """Share of right tokens against claimed quality, one panel a set of states.

    Args:
        curves: {title: [(mean quality, share right, n), ...]}, as `reliability` of `calibration`.
        path: PNG file to write.
    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(len(curves))
    for axis, (title, points) in zip(axes, curves.items(), strict=True):
        claimed, found, _ = zip(*points, strict=True)
        axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
        axis.plot(claimed, found, marker="o")
        axis.set(title=title, xlabel="quality claimed by the head", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def reliability_comparison_figure(panels: dict, path) -> None:
    """Share of right tokens against the claimed probability, one panel a set of states, one line a score.

    Args:
        panels: {title: {score: [(mean claimed, share right, n), ...]}}, as `reliability` of `calibration`.
        path: PNG file to write.
    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(len(panels))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
        for k, (label, points) in enumerate(curves.items()):
            claimed, found, _ = zip(*points, strict=True)
            axis.plot(claimed, found, marker="osD^"[k % 4], markersize=4, label=label)
        axis.set(title=title, xlabel="claimed probability", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def pareto_figure(arms: dict, front: list, metric: str, path, outside=()) -> None:
    """Quality against number of forwards, one line an arm, bars for the intervals, rings on the Pareto front.

    Args:
        arms: {arm: [(forwards, value, low, high), ...]}; low and high None where there is no interval.
        front: (forwards, value) of the points that no other point beats.
        metric: label of the vertical axis.
        path: PNG file to write.
        outside: arms that are no part of the front.
    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, (axis,) = _figure(1)
    best = {tuple(point) for point in front}
    rings = [
        (along, point[1])
        for arm, places in _arms(axis, arms).items()
        for point, along in places.items()
        if arm not in outside and point in best
    ]
    axis.scatter(*zip(*rings, strict=True), s=130, facecolors="none", edgecolors="black", label="Pareto front")
    axis.set_ylabel(metric)
    _legend(figure, axis)
    figure.savefig(path, dpi=150)


def measures_figure(panels: dict, path, marks: dict | None = None) -> None:
    """Several measures against number of forwards, one panel a measure, one line an arm, bars for the intervals.

    Args:
        panels: {measure: {arm: [(forwards, value, low, high), ...]}}; low and high None where there is no interval.
        path: PNG file to write.
        marks: {measure: value of held-out text}, a dotted line.
    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(len(panels))
    for axis, (measure, arms) in zip(axes, panels.items(), strict=True):
        _arms(axis, arms)
        if marks and measure in marks:
            axis.axhline(marks[measure], color="grey", linestyle=":", label="held-out text")
        axis.set_title(measure)
    _legend(figure, axes[-1])
    figure.savefig(path, dpi=130)
