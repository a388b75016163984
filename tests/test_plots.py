"""Figures: few arms in colour, all with name and value at the end of their line, as PNG and SVG in one style."""

import itertools

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from prism_pipelines.evaluation import plots
from prism_pipelines.evaluation.figure_style import ARM_LOOKS, GREY, MOST, SPARE, looks, spread, styled

DATA = {
    "MDLM": [(32, 0.5, 0.4, 0.6), (16, 0.4, None, None)],
    "PRISM": [(16, 0.7, 0.6, 0.8), (32, 0.8, 0.7, 0.9)],
    "random": [(16, 0.7, 0.6, 0.8), (32, 0.75, 0.7, 0.8)],
}
MANY = {f"rule {n}": [(16, 0.5, 0.4, 0.6), (32, 0.6 + n / 1000, 0.5, 0.7)] for n in range(8)} | DATA
# How the three kinds of cones see a colour, for those who lack the first or the second (Viénot, Brettel, Mollon 1999).
BLIND = {
    "protan": [(0.1124, 0.8876, 0.0), (0.1124, 0.8876, 0.0), (0.0040, -0.0040, 1.0)],
    "deutan": [(0.2928, 0.7072, 0.0), (0.2928, 0.7072, 0.0), (-0.0223, 0.0223, 1.0)],
}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    original = Figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def labels(axis) -> dict:
    """Annotations beside the axes, by their text."""
    return {text.get_text(): text for text in axis.texts if text.xy[0] > 1}


def test_a_ring_sits_on_the_point_it_marks_and_arms_stand_beside_each_other(drawn, tmp_path):
    arms = DATA | {"apart (outside)": [(16, 0.7, 0.6, 0.8), (32, 0.8, 0.8 + 1e-17, 0.8 - 1e-16)]}
    front = [(16, 0.7), (32, 0.8)]
    plots.pareto_figure(arms, front, "share", tmp_path / "a.png", outside={"apart (outside)"})
    (axis,) = drawn[0].axes
    points = {tuple(point) for line in axis.containers for point in line.lines[0].get_xydata()}
    assert len(points) == 8  # arms have the same values
    rings = {tuple(point) for point in axis.collections[-1].get_offsets()}
    assert rings < points and sorted(value for _, value in rings) == [0.7, 0.7, 0.8]  # not those of the arm outside
    assert all(
        abs(x / steps - 1) < 0.05 for x, steps in zip(sorted(x for x, _ in points), [16] * 4 + [32] * 4, strict=True)
    )


@pytest.mark.parametrize("name", ["success_figure", "measures_figure"])
def test_every_arm_has_its_name_and_value_beside_the_axes_and_no_two_lie_on_each_other(drawn, tmp_path, name):
    getattr(plots, name)({"one": MANY, "two": DATA}, tmp_path / "a.png")
    figure, arms = drawn[0], (MANY, DATA)
    for axis, data in zip(figure.axes, arms, strict=True):
        found = labels(axis)
        scale, number = (100, ".1f") if name == "success_figure" else (1, "#.3g")
        assert set(found) == {f"{arm}  {scale * sorted(data[arm])[-1][1]:{number}}" for arm in data}
        boxes = [text.get_window_extent() for text in found.values()]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(box.x0 >= axis.get_window_extent().x1 for box in boxes)
        assert all(figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1) for box in boxes)


def test_a_line_that_ends_early_says_where(drawn, tmp_path):
    plots.measures_figure({"one": DATA | {"short": [(16, 0.1, None, None)]}}, tmp_path / "a.png", {"one": 0.3})
    assert "short  0.100 at 16" in labels(drawn[0].axes[0])


def test_at_most_four_arms_are_coloured_unless_they_are_named(drawn, tmp_path):
    plots.success_figure({"one": MANY}, tmp_path / "a.png")
    plots.success_figure({"one": MANY}, tmp_path / "a.png", highlight=["rule 3"])
    coloured = [
        {line.get_label() for line in figure.axes[0].containers if line.lines[0].get_color() != GREY}
        for figure in (drawn[0], drawn[2])
    ]
    assert len(coloured[0]) == MOST and {"PRISM", "MDLM"} < coloured[0] and coloured[1] == {"rule 3"}
    with pytest.raises(ValueError, match="`highlight` names nobody; the arms are MDLM, PRISM, random"):
        plots.success_figure({"one": DATA}, tmp_path / "a.png", highlight=["nobody"])


def test_an_arm_looks_the_same_whatever_stands_beside_it():
    assert looks(list(MANY))["PRISM"] == looks(["PRISM"])["PRISM"] == ARM_LOOKS["PRISM"]
    assert looks(["PRISM", "judge and repair"])["judge and repair"] == ARM_LOOKS["judge and repair"]


def test_arms_are_told_apart_without_colour_and_their_colours_by_colour_blind_readers():
    all_looks = [*ARM_LOOKS.values(), *SPARE]
    assert len({mark for _, mark, _ in all_looks}) == len(all_looks)
    assert len({line for _, _, line in ARM_LOOKS.values()}) >= 3
    linear = {
        c: [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(c)]
        for c, _, _ in ARM_LOOKS.values()
    }
    for kind in BLIND.values():
        seen = [[sum(a * b for a, b in zip(row, rgb, strict=True)) for row in kind] for rgb in linear.values()]
        seen = [[max(0.0, v) ** (1 / 2.4) for v in rgb] for rgb in seen]
        for a, b in itertools.combinations(seen, 2):
            assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 > 0.12


def test_png_and_svg_are_written_and_the_same_figure_is_the_same_file(tmp_path):
    for name in ("a.png", "b.svg"):
        plots.success_figure({"one": DATA}, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_style_is_left_with_the_figure(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    with styled():
        assert matplotlib.rcParams["axes.spines.top"] is False
    plots.reliability_figure({"one": [(0.2, 0.3, 10), (0.8, 0.7, 90)]}, tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("values", list(itertools.product([0.0, 0.05, 0.5, 1.0], repeat=4)))
def test_labels_stand_apart_in_order_and_near_their_lines(values):
    values = list(values)
    placed = spread(values, 0.1, 0.0, 1.0)
    order = sorted(range(4), key=lambda i: values[i])
    assert all(placed[b] - placed[a] >= 0.1 - 1e-9 for a, b in itertools.pairwise(order))
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in placed)
    assert all(abs(p - v) <= 0.3 + 1e-9 for p, v in zip(placed, values, strict=True))
    if all(b - a >= 0.1 for a, b in itertools.pairwise(sorted(values))):
        assert placed == pytest.approx(values)
