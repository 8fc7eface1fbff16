"""Tables of the suite ``pareto``: who is best at the same share of units."""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.evidence.comparison import sizes
from benchmarks.evidence.facts import Facts, sorted_facts
from benchmarks.evidence.words import interval, percent, plain, signed
from benchmarks.suites.results import Line
from benchmarks.tabular import markdown


def shares(facts: Facts) -> dict[str, list[str]]:
    """Return the methods of each share, the largest share first."""
    found: dict[str, list[str]] = {}
    for method in facts.lines:
        share = re.search(r"-(\d+%)$", method)
        if share:
            found.setdefault(share[1], []).append(method)
    return dict(sorted(found.items(), key=lambda item: -int(item[0][:-1])))


def ranked(facts: Facts, methods: Sequence[str]) -> list[str]:
    """Return methods by their mean test result, the best first, those without one last."""
    sign = -1 if facts.more else 1

    def place(method: str) -> tuple[bool, float]:
        mean = facts.mean(method, facts.result)
        return mean.n == 0, sign * mean.mean if mean.n else 0.0

    return sorted(methods, key=place)


def tables(lines: Sequence[Line]) -> str:
    """Return one table per task and share."""
    parts = []
    for facts in sorted_facts(lines):
        parts += [f"#### {facts.place}", sizes(facts)]
        full = facts.mean("full", facts.result)
        parts.append(f"`full`: test {facts.metric} {plain(full, 4)}, {full.n} seeds.")
        for share, methods in shares(facts).items():
            by_weights = [m for m in methods if "-weights-" in m]
            by_units = [m for m in methods if m not in by_weights]
            parts.append(share_table(facts, share, by_units, f"random-{share}", f"short-{share}"))
            if by_weights:
                parts.append(
                    f'At {share} with `skip="weights"`, which leaves more FLOPs and has no `short` '
                    "of its own:"
                )
                parts.append(share_table(facts, share, by_weights, f"random-weights-{share}"))
    return "\n\n".join(parts)


def share_table(facts: Facts, share: str, methods: Sequence[str], *rivals: str) -> str:
    """Return what competes at one share, the best mean first, beside each of its rivals."""
    rows = []
    for method in ranked(facts, methods):
        rows.append(
            [
                f"`{method}`",
                str(len(facts.lines[method])),
                plain(facts.mean(method, facts.result), 4),
                percent(facts.ratio(method, "full", lambda line: line["flops"]).mean),
                percent(facts.ratio(method, "full", lambda line: line["seconds"]).mean),
                signed(facts.versus(method, "full")),
                *(cell for rival in rivals for cell in _cells(facts, method, rival)),
            ]
        )
    head = [
        *(f"{share} of the units", "seeds", f"test {facts.metric}", "FLOPs", "seconds", "− full"),
        *(cell for rival in rivals for cell in (f"− `{rival}`", "95% interval", "verdict")),
    ]
    return markdown(head, rows)


def _cells(facts: Facts, method: str, base: str) -> list[str]:
    if method == base:
        return ["", "", ""]
    difference = facts.versus(method, base)
    return [signed(difference), interval(difference), facts.says(method, base)]
