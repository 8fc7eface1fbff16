"""Figures: curves over FLOPs and seconds, who trained when, and for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.evidence.facts import Facts, sorted_facts
from benchmarks.evidence.words import flops_unit
from benchmarks.suites.results import Line, slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Suites that have curves, and the methods that a picture has room for.
CURVES = ("bert", "switch", "vgg", "finetune")
SHOWN = ("full", "short", "random", "multirate", "mat", "mat-units", "lower-half")
#: Methods of which the episodes are drawn.
EPISODES = ("mat", "mat-units")


def names(results: Mapping[str, Sequence[Line]]) -> dict[str, str]:
    """Return {file name: what it shows} of the figures that some results give, in their order."""
    return {name: words for name, words, _ in _plan(results)}


def draw(results: Mapping[str, Sequence[Line]], folder: Path) -> list[Path]:
    """Draw all figures.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    paths = []
    for name, _, make in _plan(results):
        folder.mkdir(parents=True, exist_ok=True)
        figure = make()
        figure.savefig(folder / name, dpi=110, bbox_inches="tight", metadata={"Software": None})
        paths.append(folder / name)
    return paths


def _plan(results: Mapping[str, Sequence[Line]]) -> list[tuple[str, str, Any]]:
    """Return the name of every figure, what it shows, and what makes it."""
    plan: list[tuple[str, str, Any]] = []
    for suite in CURVES:
        for facts in sorted_facts(results.get(suite, ())):
            stem = f"{suite}-{facts.scale}-{slug(facts.device)}-{facts.task['name']}"
            words = f"validation {facts.metric} over FLOPs and seconds, {facts.title}"
            plan.append((f"{stem}-curves.png", words, lambda facts=facts: curves(facts)))
            for method in EPISODES:
                runs = facts.lines.get(method, {})
                line = runs[min(runs)] if runs else None
                if line and line["episodes"]:
                    of = f"{method}, seed {line['seed']}, {facts.title}"
                    words = f"share of each layer's units that train over the episodes, {of}"
                    plan.append(
                        (f"{stem}-{method}-share.png", words, lambda line=line: share(line))
                    )
                    words = f"share of the steps in which each unit trained, {of}"
                    plan.append(
                        (f"{stem}-{method}-trained.png", words, lambda line=line: histogram(line))
                    )
    return plan


def curves(facts: Facts) -> Figure:
    """Draw the validation result over counted FLOPs and over seconds: one line per seed."""
    figure, (left, right) = _figure(2)
    shown = [line for m in SHOWN for line in facts.lines.get(m, {}).values()]
    name, unit = flops_unit(max((line["flops"] for line in shown), default=0.0))
    for ax, cost, scale, label in (
        (left, "flops", unit, f"counted {name}, probes included"),
        (right, "seconds", 1.0, "seconds of training, probes included"),
    ):
        for i, method in enumerate(m for m in SHOWN if m in facts.lines):
            for line in facts.lines[method].values():
                first = line["seed"] == min(facts.lines[method])
                ax.plot(
                    [p[cost] / scale for p in line["curve"]],
                    [_nan(p[facts.metric]) for p in line["curve"]],
                    color=f"C{i}",
                    linewidth=1,
                    label=method if first else None,
                )
        ax.set_xlabel(label)
        ax.set_ylabel(f"validation {facts.metric}")
    right.legend(fontsize="small")
    figure.suptitle(f"{facts.place}: every seed a line")
    return figure


def share(line: Line) -> Figure:
    """Draw the share of each layer's units that train, over the episodes (figure 1b)."""
    figure, (ax,) = _figure(1)
    keys = list(line["episodes"][0]["trained"])
    rows = [[e["trained"][key][0] / e["trained"][key][1] for e in line["episodes"]] for key in keys]
    picture = ax.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="viridis", origin="lower")
    ax.set_yticks(range(len(keys)), [key.replace("|", " ") for key in keys], fontsize="x-small")
    ax.set_xticks(range(len(line["episodes"])), [e["step"] for e in line["episodes"]])
    ax.set_xlabel("first step of the episode")
    figure.colorbar(picture, label="share of the units that train")
    figure.suptitle(_name(line))
    return figure


def histogram(line: Line) -> Figure:
    """Draw how many units trained in which share of the steps (figure 5)."""
    figure, (ax,) = _figure(1)
    shares = {int(percent): count for percent, count in line["shares_trained"].items()}
    ax.hist(list(shares), bins=range(0, 105, 5), weights=list(shares.values()))
    ax.set_xlabel("share of the steps in which a unit trained, %")
    ax.set_ylabel("units")
    figure.suptitle(_name(line))
    return figure


def _figure(columns: int) -> tuple[Figure, Sequence[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the figures need matplotlib, which is not installed: "
            "pip install 'lightning-mat[report]'"
        ) from error
    figure = Figure(figsize=(5.5 * columns, 3.8), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def _name(line: Line) -> str:
    return f"{line['suite']} {line['task']['name']}: {line['method']['name']}, seed {line['seed']}"


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
