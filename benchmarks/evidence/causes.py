"""Why MAT helps or does not: which units rested, and how unequal their λ_max are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.evidence.facts import Facts, sorted_facts
from benchmarks.evidence.words import NONE, percent, signed
from benchmarks.suites.results import Line
from benchmarks.tabular import markdown

TITLE = "Which units rest, and what thresholds change"

#: Methods whose decisions follow λ_max.
METHODS = ("mat", "mat-units", "mat-auto", "mat-budget", "mat-loss")
_SUITES = ("bert", "switch", "vgg", "finetune", "optimizers")

READING = """\
Equation 4 puts the threshold a share α of the way from the smallest eigenvalue of a kind of units
to the largest. Where the largest is many times the median, nearly all units lie below it, and what
they would have learned is missing. The table says how far the largest λ_max is from the median (the
median of the episodes and seeds), and how much of the lower, middle and upper layers trained
(means). `mat-auto` and `mat-budget` skip as `mat-units` does, `mat-loss` as `mat`, and are compared
with its rivals."""


def section(results: Mapping[str, Sequence[Line]]) -> str:
    """Return the table of all suites that compare MAT with its rivals; empty without one."""
    rows = [
        row
        for suite in _SUITES
        for facts in sorted_facts(results.get(suite, ()))
        for method in METHODS
        for row in _rows(facts, method)
    ]
    head = [
        *("task", "method", "units", "largest λ_max ÷ median", "lower layers trained"),
        *("middle", "upper", "FLOPs ÷ `full`'s", "test − `full`", "verdict", "beside `short`"),
        *("beside `matched`", "beside random units"),
    ]
    return "\n\n".join([f"## {TITLE}", READING, markdown(head, rows)]) if rows else ""


def _rows(facts: Facts, method: str) -> list[list[str]]:
    """Return a row per kind of units; what is said of the whole run stands in the first."""
    episodes = [e for line in facts.lines.get(method, {}).values() for e in line["episodes"]]
    if not episodes:
        return []
    suffix = "" if method in ("mat", "mat-loss") else "-units"
    flops = facts.ratio(method, "full", lambda line: line["flops"]).mean
    run = [percent(flops), signed(facts.versus(method, "full")), _says(facts, method, "full")]
    # Only they cost the same.
    shorts = {"mat": "short", "mat-units": "short-units", "mat-loss": "short-loss"}
    run.append(_says(facts, method, shorts[method]) if method in shorts else NONE)
    run.append(_says(facts, method, "matched") if method == "mat" else NONE)
    run.append(_says(facts, method, f"random{suffix}"))
    rows = []
    for kind in dict.fromkeys(key.split("|")[1] for key in episodes[0]["trained"]):
        name = ["", ""] if rows else [f"{facts.title} ({facts.suite})", f"`{method}`"]
        said = [""] * len(run) if rows else run
        rows.append([*name, kind, _skew(episodes, kind), *_thirds(episodes, kind), *said])
    return rows


def _says(facts: Facts, method: str, base: str) -> str:
    return facts.says(method, base) if facts.versus(method, base).n else NONE


def _skew(episodes: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Return the largest λ_max of a kind over its median, the median of the episodes."""
    found = [e["skew"][kind] for e in episodes if e.get("skew", {}).get(kind) is not None]
    return f"{statistics.median(found):.3g}" if found else NONE


def _thirds(episodes: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    """Return the share of the units that trained in the lower, middle and upper layers."""
    keys = [key for key in episodes[0]["trained"] if key.split("|")[1] == kind]
    cuts = [round(len(keys) * i / 3) for i in range(4)]
    shares = []
    for a, b in pairwise(cuts):
        pairs = [e["trained"][key] for e in episodes for key in keys[a:b]]
        total = sum(of for _, of in pairs)
        shares.append(percent(sum(trained for trained, _ in pairs) / total) if total else NONE)
    return shares
