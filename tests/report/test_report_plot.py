"""Pictures: what is drawn is what was stored."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from lightning_mat import policies
from lightning_mat.policies.base import PROTECTED, TEMPORAL
from lightning_mat.report import active_map, lambda_max_plot
from lightning_mat.report.plot import active_figure, lambda_max_figure

matplotlib = pytest.importorskip("matplotlib")
pyplot = pytest.importorskip("matplotlib.pyplot")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def panels(figure):
    """Return the panels of a figure, the colour bar apart."""
    return [axes for axes in figure.axes if axes.get_title(loc="left")]


def stretches(axes, label):
    """Return the lines of a label, each as [points, 2]."""
    (found,) = [c for c in axes.collections if c.get_label() == label]
    return found.get_segments()


def test_every_unit_is_drawn_from_probe_to_probe_as_it_trained_or_rested(stored):
    data = stored(5)
    for axes, (kind, members) in zip(
        panels(lambda_max_figure(data)), data.by_kind().items(), strict=True
    ):
        assert axes.get_title(loc="left") == f"{kind}: 4 units"
        assert axes.get_yscale() == "log"
        for label, state in (("trains", True), ("rests", False)):
            drawn = sum(len(s) - 1 for s in stretches(axes, label))
            assert drawn == int((data.active[:-1, members] == state).sum())
        drawn = {tuple(p) for c in ("trains", "rests") for s in stretches(axes, c) for p in s}
        assert drawn == {
            (step, data.lambda_max[p, i]) for p, step in enumerate(data.step) for i in members
        }


def test_the_threshold_is_drawn_per_kind(stored):
    data = stored(4)
    for axes, kind in zip(panels(lambda_max_figure(data)), data.by_kind(), strict=True):
        (line,) = axes.get_lines()
        assert line.get_xdata().tolist() == data.step.tolist()
        assert line.get_ydata().tolist() == data.thresholds[kind].tolist()


def legend(figure):
    """Return the texts of a figure's legend."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_no_threshold_is_drawn_where_the_policy_has_none(stored):
    figure = lambda_max_figure(stored(3, policy=policies.Random()))
    assert all(not axes.get_lines() for axes in panels(figure))
    assert legend(figure) == ["trains", "rests"]


def test_units_of_a_layer_share_a_colour_and_layers_differ(stored):
    data = stored(2)
    axes = panels(lambda_max_figure(data))[0]
    colour = {}
    for label in ("trains", "rests"):
        (lines,) = [c for c in axes.collections if c.get_label() == label]
        for segment, rgba in zip(lines.get_segments(), lines.get_colors(), strict=True):
            unit = data.lambda_max[0].tolist().index(segment[0][1])
            colour.setdefault(data.layers[unit], set()).add(tuple(rgba[:3]))
    assert [len(shades) for shades in colour.values()] == [1, 1]
    assert len(set.union(*colour.values())) == 2


def test_a_single_probe_is_drawn_as_points(stored):
    data = stored(1)
    axes = panels(lambda_max_figure(data))[0]
    points = [float(c.get_offsets()[0, 1]) for c in axes.collections]
    assert points == data.lambda_max[0, data.by_kind()["head"]].tolist()
    hollow = [not len(c.get_facecolor()) for c in axes.collections]
    assert hollow == (~data.active[0, data.by_kind()["head"]]).tolist()


def test_units_without_an_eigenvalue_do_not_break_the_logarithmic_axis(stored, tmp_path):
    data = stored(3)
    data.lambda_max[:, 0] = 0.0
    path = lambda_max_plot(data, tmp_path / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert panels(lambda_max_figure(data))[0].get_ylim()[0] > 1e6
    assert len(panels(lambda_max_figure(replace(data, step=data.step[:1])))) == 2


def test_the_map_has_a_cell_per_unit_and_episode_that_says_what_it_did(stored):
    data = stored(5)
    assert {PROTECTED, TEMPORAL} <= {r for row in data.reasons for r in row}
    for axes, members in zip(panels(active_figure(data)), data.by_kind().values(), strict=True):
        (mesh,) = axes.collections
        cells = np.asarray(mesh.get_array()).reshape(len(members), 5)
        for row, unit in enumerate(members):  # units come layer by layer already
            for p in range(5):
                trains, why = data.active[p, unit], data.reasons[p][unit]
                state = int(why == PROTECTED) if trains else 2 if why == TEMPORAL else 3
                assert cells[row, p] == state


def test_the_map_puts_units_of_one_layer_together(stored):
    data = stored(2)
    mixed = replace(data, layers=("b", "b", "a", "a", "c", "b", "a", "c"))
    for axes in panels(active_figure(mixed)):
        shown = [t.get_text() for t in axes.get_yticklabels()]
        assert len(shown) == len(set(shown))


def test_the_legend_names_only_what_is_on_the_map(stored):
    full = stored(2, policy=policies.Full())
    assert legend(active_figure(full)) == ["trains"]


def test_pictures_are_written_and_leave_no_trace_in_pyplot(stored, tmp_path):
    data = stored(3)
    before = dict(matplotlib.rcParams)
    lambda_max_plot(data, tmp_path / "new" / "l.png")
    active_map(data, tmp_path / "a.png")
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before
    for picture in (tmp_path / "new" / "l.png", tmp_path / "a.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_thousands_of_units_are_drawn_finer(stored):
    data = stored(2)
    many = replace(
        data,
        kinds=("filter",) * 800,
        layers=data.layers * 100,
        names=tuple(f"u{i}" for i in range(800)),
        **{k: np.tile(getattr(data, k), 100) for k in ("lambda_max", "active")},
        reasons=tuple(row * 100 for row in data.reasons),
    )

    def width(figure):
        (lines,) = [c for c in panels(figure)[0].collections if c.get_label() == "trains"]
        return lines.get_linewidth()[0]

    assert width(lambda_max_figure(many)) < width(lambda_max_figure(data))


def test_without_matplotlib_the_error_names_the_extra(stored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-mat\[report\]"'):
        active_map(stored(2), tmp_path / "picture.png")


def test_nothing_to_draw_is_a_clear_error(stored):
    data = stored(2)
    empty = replace(data, step=data.step[:0])
    with pytest.raises(ValueError, match="no probe to draw"):
        lambda_max_figure(empty)
