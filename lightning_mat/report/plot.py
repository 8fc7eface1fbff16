"""Pictures of a run: how trainable every unit was, and which units trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_mat.policies.base import PROTECTED, TEMPORAL
from lightning_mat.report.files import write_whole
from lightning_mat.report.layers import short_names
from lightning_mat.report.store import SpectraData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colour: TypeAlias = tuple[float, float, float, float]

_GREY, _INK = "#8a8f98", "#22262e"
_DASHES = (0, (5, 2))
# Colour-blind safe, and in falling order of lightness: dark trains, light rests.
_STATES = (
    ("trains", "#1d4e89"),
    ("trains, protected", "#7fa8d1"),
    ("rests, temporal", "#e9a15b"),
    ("rests", "#efe9df"),
)


def lambda_max_plot(data: SpectraData, path: str | Path) -> Path:
    """Write a PNG of every unit's λ_max over the run.

    One panel per kind, a logarithmic axis, a line per unit in its layer's colour: solid where the
    unit trained after the probe, dotted and faint where it rested, and the threshold λ_α dashed.
    Units with λ_max = 0 have no place on a logarithmic axis and are not drawn.

    Args:
        data: The probes, at least one.
        path: The file.

    Returns:
        The file's path.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is no probe.
        OSError: If the file cannot be written.
    """
    return _write(lambda_max_figure(data), path)


def active_map(data: SpectraData, path: str | Path) -> Path:
    """Write a PNG of who trained when: a row per unit, a column per episode, a panel per kind.

    Args:
        data: The probes, at least one.
        path: The file.

    Returns:
        The file's path.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If there is no probe.
        OSError: If the file cannot be written.
    """
    return _write(active_figure(data), path)


def lambda_max_figure(data: SpectraData) -> Figure:
    """Return the figure of :func:`lambda_max_plot`."""
    kinds = data.by_kind()
    figure, panels = _panels(data, [2.9] * len(kinds), "Principal eigenvalue λ_max of every unit")
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.lines import Line2D

    layers = short_names(data.layers)
    # Without the lightest end, which is lost on white.
    places = np.linspace(0.0, 0.88, max(len(layers), 2))[: len(layers)]
    colours: list[Colour] = [colormaps["viridis"](place) for place in places]
    of_layer = dict(zip(layers, colours, strict=True))
    for axes, (kind, members) in zip(panels, kinds.items(), strict=True):
        draw = _draw_points if len(data.step) == 1 else _draw_lines
        draw(axes, data, members, [of_layer[data.layers[i]] for i in members])
        axes.set_yscale("log")
        axes.set_ylabel("λ_max")
        axes.set_title(f"{kind}: {len(members)} units", loc="left", fontsize=10, color=_INK)
        threshold = data.thresholds.get(kind, np.full(len(data.step), np.nan))
        if len(data.step) == 1 and np.isfinite(threshold[0]):
            axes.axhline(threshold[0], color=_INK, lw=1.4, ls=_DASHES)
        elif np.isfinite(threshold).any():
            axes.plot(data.step, threshold, color=_INK, lw=1.4, ls=_DASHES)
    panels[-1].set_xlabel("optimizer steps")
    key = [
        Line2D([], [], color=_GREY, lw=2, label="trains"),
        Line2D([], [], color=_GREY, lw=1.4, ls=":", label="rests"),
    ]
    if any(np.isfinite(threshold).any() for threshold in data.thresholds.values()):
        key.append(Line2D([], [], color=_INK, lw=1.4, ls=_DASHES, label="threshold λ_α"))
    figure.legend(handles=key, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    if len(layers) > 1:
        norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
        shown = _thinned(len(layers), 16)
        bar = figure.colorbar(
            ScalarMappable(norm, ListedColormap(colours)),
            ax=panels,
            ticks=shown,
            pad=0.015,
            aspect=45,
        )
        bar.minorticks_off()
        bar.ax.set_yticklabels([list(layers.values())[i] for i in shown], fontsize=8)
        bar.ax.tick_params(length=0)
        bar.ax.invert_yaxis()  # the first layer on top, as in the map of active units
        bar.set_label("layer")
        bar.outline.set_visible(False)
    figure.align_ylabels()
    return figure


def active_figure(data: SpectraData) -> Figure:
    """Return the figure of :func:`active_map`."""
    kinds = data.by_kind()
    heights = [min(max(0.11 * len(members), 1.0), 5.0) + 0.5 for members in kinds.values()]
    figure, panels = _panels(data, heights, "Which units trained in each episode")
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    palette = ListedColormap([colour for _, colour in _STATES])
    states = _states(data)
    names = short_names(data.layers)
    count = len(data.step)
    for axes, (kind, members) in zip(panels, kinds.items(), strict=True):
        # Rows of one layer lie together, whatever the order of the units.
        order = list(names)
        rows = sorted(members, key=lambda i: order.index(data.layers[i]))
        cells = states[:, rows].T
        axes.pcolormesh(
            np.arange(count + 1) - 0.5,
            np.arange(len(rows) + 1),
            cells,
            cmap=palette,
            vmin=-0.5,
            vmax=len(_STATES) - 0.5,
            edgecolors="white",
            linewidth=0.4 if len(rows) <= 40 and count <= 100 else 0,
        )
        starts = [
            r for r, i in enumerate(rows) if r == 0 or data.layers[i] != data.layers[rows[r - 1]]
        ]
        ends = [*starts[1:], len(rows)]
        for start in starts[1:]:
            axes.axhline(start, color="white", lw=2.2 if len(starts) <= 12 else 0.8)
        shown = _thinned(len(starts), 16)
        axes.set_yticks([(starts[k] + ends[k]) / 2 for k in shown])
        axes.set_yticklabels([names[data.layers[rows[starts[k]]]] for k in shown], fontsize=8)
        axes.invert_yaxis()
        axes.set_ylabel("layer")
        share = data.active[:, members].mean()
        axes.set_title(
            f"{kind}: {len(members)} units, {share:.0%} trained on average",
            loc="left",
            fontsize=10,
            color=_INK,
        )
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    ticks = _thinned(count, 12)
    panels[-1].set_xticks(ticks)
    panels[-1].set_xticklabels([str(data.step[t]) for t in ticks])
    panels[-1].set_xlabel("optimizer step at which the episode begins")
    key = [
        Patch(color=colour, label=label)
        for state, (label, colour) in enumerate(_STATES)
        if (states == state).any()
    ]
    figure.align_ylabels()
    figure.legend(handles=key, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    return figure


def _panels(data: SpectraData, heights: list[float], title: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel per height in inches, stacked; pyplot is never touched."""
    if not len(data.step) or not heights:
        raise ValueError("there is no probe to draw: run at least one episode after the warm-up")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            'pictures need matplotlib: pip install "lightning-mat[report]"'
        ) from error
    figure = Figure(figsize=(9.0, sum(heights) + 0.9), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=_INK)
    grid = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    panels = list(grid[:, 0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.tick_params(colors=_INK, labelsize=9)
        axes.grid(axis="y", color="#e6e8eb", lw=0.7)
        axes.set_axisbelow(True)
    return figure, panels


def _draw_points(axes: Axes, data: SpectraData, members: list[int], colours: list[Colour]) -> None:
    """Draw the only probe: full circles train, hollow ones rest."""
    step = int(data.step[0])
    # Spread over a step's width, so that units of like λ_max stay apart.
    places = step + np.linspace(-0.4, 0.4, len(members))
    for place, unit, colour in zip(places, members, colours, strict=True):
        if data.lambda_max[0, unit] > 0:
            face = colour if data.active[0, unit] else "none"
            axes.scatter(place, data.lambda_max[0, unit], facecolor=face, edgecolor=colour, s=28)
    axes.set_xticks([step])


def _draw_lines(axes: Axes, data: SpectraData, members: list[int], colours: list[Colour]) -> None:
    """Draw the stretches between probes of each unit, those it trained and those it rested."""
    from matplotlib.collections import LineCollection

    value = np.where(data.lambda_max > 0, data.lambda_max, np.nan)[:, members]
    segments: dict[bool, list[NDArray[np.float64]]] = {True: [], False: []}
    tint: dict[bool, list[Colour]] = {True: [], False: []}
    for column, unit in enumerate(members):
        # The last decision is left out: no probe says where its episode ended.
        decisions = data.active[:-1, unit]
        starts = [0, *(np.flatnonzero(np.diff(decisions)) + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], len(decisions)], strict=True):
            stretch = slice(start, end + 1)
            trains = bool(decisions[start])
            segments[trains].append(np.column_stack([data.step[stretch], value[stretch, column]]))
            tint[trains].append(colours[column])
    # The more lines, the finer: thousands of filters still show where they are dense.
    width, strength = next(
        (width, strength)
        for most, width, strength in ((40, 1.9, 0.9), (400, 1.1, 0.9), (np.inf, 0.5, 0.45))
        if len(members) <= most
    )
    resting = LineCollection(
        segments[False],
        colors=tint[False],
        linewidths=0.7 * width,
        linestyles=":",
        alpha=0.6 * strength,
    )
    resting.set_label("rests")
    training = LineCollection(segments[True], colors=tint[True], linewidths=width, alpha=strength)
    training.set_label("trains")
    axes.add_collection(resting)
    axes.add_collection(training)
    axes.margins(x=0.015)
    axes.autoscale_view()


def _states(data: SpectraData) -> NDArray[np.int64]:
    """Return the index into ``_STATES`` of each unit in each episode, [P, L]."""
    reasons = np.array(data.reasons)
    return np.where(
        data.active,
        np.where(reasons == PROTECTED, 1, 0),
        np.where(reasons == TEMPORAL, 2, 3),
    )


def _thinned(count: int, most: int) -> list[int]:
    """Return at most ``most`` of the indices 0 ... count - 1, evenly spaced from 0."""
    return list(range(0, count, -(-count // most)))


def _write(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG."""
    path = Path(path)
    write_whole(path, partial(figure.savefig, format="png", facecolor="white"))
    return path
