"""Tables of the suite ``ranking``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.evidence.facts import Facts, sorted_facts
from benchmarks.evidence.words import NONE
from benchmarks.suites.results import Line
from benchmarks.tabular import markdown


def tables(lines: Sequence[Line]) -> str:
    """Return Spearman's correlations between disjoint probes, and between outputs."""
    facts = sorted_facts(lines)
    return "\n\n".join([between_samples(facts), between_outputs(facts)])


def between_samples(found: Sequence[Facts]) -> str:
    """Return correlations between disjoint sets of samples, means over the seeds."""
    points = [p for f in found for run in f.lines["full"].values() for p in run["ranking"]]
    sizes = sorted({s for p in points for by in p["samples"].values() for s in by}, key=int)
    rows = []
    for facts in found:
        runs = list(facts.lines["full"].values())
        for output, by_size in runs[0]["ranking"][0]["samples"].items():
            for kind in next(iter(by_size.values())):
                for i, point in enumerate(runs[0]["ranking"]):
                    cells = [
                        _mean(
                            [r["ranking"][i]["samples"][output].get(s, {}).get(kind) for r in runs]
                        )
                        for s in sizes
                    ]
                    rows.append([*_name(facts, kind), f"`{output}`", _step(facts, point), *cells])
    head = ["model", "units", "output", "after", *(f"{size} samples" for size in sizes)]
    return markdown(head, rows)


def between_outputs(found: Sequence[Facts]) -> str:
    """Return correlations between outputs over the same samples, means over the seeds."""
    rows, names = [], []
    for facts in found:
        runs = list(facts.lines["full"].values())
        names = list(runs[0]["ranking"][0]["outputs"])
        for kind in runs[0]["ranking"][0]["outputs"][names[0]]:
            for i, point in enumerate(runs[0]["ranking"]):
                cells = [
                    _mean([r["ranking"][i]["outputs"][name][kind] for r in runs]) for name in names
                ]
                rows.append([*_name(facts, kind), _step(facts, point), *cells])
    return markdown(["model", "units", "after", *names], rows)


def _name(facts: Facts, kind: str) -> list[str]:
    return [facts.place, kind]


def _step(facts: Facts, point: dict[str, object]) -> str:
    return f"{point['step']} of {facts.task['steps']} steps"


def _mean(values: Sequence[float | None]) -> str:
    there = [v for v in values if v is not None]
    return f"{statistics.fmean(there):.2f}" if there else NONE
