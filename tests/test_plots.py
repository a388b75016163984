"""Figures show every arm: none hides another, rings sit on the points that they mark, the legend covers no data."""

import pytest
from matplotlib.figure import Figure

from prism_pipelines.evaluation import plots

ARMS = {
    "MDLM": [(32, 0.5, 0.4, 0.6), (16, 0.4, None, None)],
    "PRISM": [(16, 0.7, 0.6, 0.8), (32, 0.8, 0.7, 0.9)],
    "random": [(16, 0.7, 0.6, 0.8), (32, 0.75, 0.7, 0.8)],
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


def test_a_ring_sits_on_the_point_it_marks_and_arms_stand_beside_each_other(drawn, tmp_path):
    arms = ARMS | {"apart (outside)": [(16, 0.7, 0.6, 0.8), (32, 0.8, 0.8 + 1e-17, 0.8 - 1e-16)]}
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
def test_the_legend_is_outside_the_axes_and_names_every_arm(drawn, tmp_path, name):
    getattr(plots, name)({"one": ARMS, "two": ARMS}, tmp_path / "a.png")
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == list(ARMS)
    assert not any(axis.get_window_extent().overlaps(legend.get_window_extent()) for axis in drawn[0].axes)
