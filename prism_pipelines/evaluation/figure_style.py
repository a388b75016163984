"""One style for every figure: few colours that colour-blind readers can tell apart; names and values at line ends."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, by what is drawn, so that a rule looks the same in every figure; marks tell them apart too.
ARM_LOOKS = {  # beginning of an arm's name: colour, mark, line
    "judge and repair": ("#D55E00", "D", "-"),
    "PRISM": ("#0072B2", "s", "-"),
    "self-confidence": ("#009E73", "^", "--"),
    "MDLM": ("#000000", "o", "-."),
}
SPARE = [("#CC79A7", "v", "-"), ("#E69F00", "P", "--"), ("#56B4E9", "X", "-."), ("#5D4A00", "*", ":")]
GREY, PALE, INK = "#8C8C8C", "#DDDDDD", "#222222"
MOST = 4  # arms in colour

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a figure is the same everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "prism-pipelines",  # the same figure is the same file
}


def need_matplotlib() -> None:
    """Raise ImportError, with the command that installs it, if matplotlib is missing. Call this before long work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "prism-pipelines[eval]"') from error


def styled() -> AbstractContextManager:
    """A context in which figures are made and saved in this style."""
    need_matplotlib()
    import matplotlib

    return matplotlib.rc_context(STYLE)


def new_figure(panels: int, columns: int = 2, size: tuple[float, float] = (5.6, 3.7)) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, at most `columns` in a row. Made without pyplot, so no global state changes.

    Args:
        panels: how many axes.
        columns: how many of them in a row.
        size: of one panel, inches.
    """
    from matplotlib.figure import Figure

    columns = min(panels, columns)
    rows = -(-panels // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[panels:]:
        axis.remove()
    return figure, axes[:panels]


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to `path`, and next to it as SVG (as PNG if `path` is the SVG). No file is ever half written."""
    for form, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
        with atomic_file(Path(path).with_suffix(f".{form}"), "wb") as file:
            figure.savefig(file, format=form, **options)


def looks(names: list[str], highlight: list[str] | None = None) -> dict[str, tuple[str, str, str] | None]:
    """Colour, mark and line of each arm; None for one that stays grey.

    Args:
        names: all arms.
        highlight: those in colour; None for judge and repair, PRISM, self-confidence and MDLM, and where these are
            fewer than `MOST`, others in their order.
    Raises:
        ValueError: an unknown arm in `highlight`.
    """
    if unknown := sorted(set(highlight or ()) - set(names)):
        raise ValueError(f"`highlight` names {', '.join(unknown)}; the arms are {', '.join(names)}.")
    found: dict[str, tuple[str, str, str] | None] = dict.fromkeys(names)
    if highlight is None:
        highlight = [name for name in ARM_LOOKS if name in names]
        highlight += [name for name in names if name not in highlight][: max(0, MOST - len(highlight))]
    spare = iter(SPARE * (1 + len(highlight) // len(SPARE)))
    for name in highlight:
        found[name] = ARM_LOOKS.get(name) or next(spare)
    return found


def spread(values: list[float], least: float, low: float, high: float) -> list[float]:
    """Heights of labels: close to `values`, at least `least` apart, and in [low, high] if there is room."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list] = []  # [sum of wished first heights, number]; neighbours that touch are one group
    for i in order:
        groups.append([values[i], 1])
        while len(groups) > 1 and groups[-1][0] / groups[-1][1] < _end(groups[-2], least):
            total, number = groups.pop()
            before = groups[-1]
            before[0] += total - least * before[1] * number
            before[1] += number
    placed = []
    for total, number in groups:
        placed += [total / number + least * k for k in range(number)]
    for k in range(len(placed)):  # from below, then from above: inside the axes where there is room
        placed[k] = max(placed[k], low + least * k)
    for k in range(len(placed)):
        placed[-1 - k] = min(placed[-1 - k], high - least * k)
    heights = [0.0] * len(values)
    for i, height in zip(order, placed, strict=True):
        heights[i] = height
    return heights


def _end(group: list, least: float) -> float:
    """Where the label after a group of `spread` may stand."""
    return group[0] / group[1] + least * group[1]


def label_ends(axis: Axes, ends: dict, colours: dict, texts: dict) -> None:
    """Write the text of every line to the right of the axes, one above the other, each joined to its line's end.

    Args:
        axis: axes whose limits are set.
        ends: {name: (x, y) of the last point, in data units}.
        colours: {name: colour}; texts in `GREY` are smaller.
        texts: {name: text}, such as the name and the last value.
    """
    from matplotlib.transforms import blended_transform_factory

    figure: Any = axis.figure
    figure.draw_without_rendering()  # places the axes, which says how tall a line of text is in them
    height = axis.get_window_extent().height
    least = 8.5 * 1.25 * figure.dpi / 72 / height
    low, high = axis.get_ylim()
    part = {name: (y - low) / (high - low) for name, (_, y) in ends.items()}
    heights = dict(zip(part, spread(list(part.values()), least, 0.0, 1.0), strict=True))
    right = axis.get_xlim()[1]
    for name, (x, _) in ends.items():
        strong = colours[name] != GREY
        axis.annotate(
            texts[name], (1.03, heights[name]), xycoords="axes fraction", va="center", ha="left", annotation_clip=False,
            fontsize=8.5 if strong else 7.5, fontweight="bold" if strong else "normal",
            color=colours[name] if strong else "#6B6B6B",
        )  # fmt: skip
        across = blended_transform_factory(axis.transData, axis.transAxes)
        leader = [(x, part[name]), (right, heights[name])]
        axis.plot(*zip(*leader, strict=True), transform=across, color=colours[name], linewidth=0.6, clip_on=False,
                  linestyle=":", zorder=1)  # fmt: skip
