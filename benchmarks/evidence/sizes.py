"""Table of the suite ``sizes``."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.evidence.facts import sorted_facts
from benchmarks.evidence.words import counted, percent, signed
from benchmarks.suites.results import Line
from benchmarks.tabular import markdown


def table(lines: Sequence[Line]) -> str:
    """Return what MAT saves and what its probes cost, one row per size."""
    rows = []
    for facts in sorted_facts(lines):
        saved = facts.ratio("mat", "full", lambda line: line["flops"])
        paper = facts.ratio("mat", "full", lambda line: line["paper_flops"])
        seconds = facts.ratio("mat", "full", lambda line: line["seconds"])
        rows.append(
            [
                facts.place,
                f"{facts.task['steps']}",
                counted(facts.mean("full", lambda line: line["flops"])),
                counted(facts.mean("mat", lambda line: line["flops"])),
                counted(facts.mean("mat", lambda line: line["probe_flops"])),
                percent(1 - saved.mean, 1),
                percent(1 - paper.mean, 1),
                percent(1 - seconds.mean, 1),
                percent(
                    facts.mean("mat", lambda line: line["episode_seconds"] / line["seconds"]).mean,
                    1,
                ),
                signed(facts.versus("mat", "full")),
            ]
        )
    head = [
        *("size", "steps", "full, FLOPs", "MAT, FLOPs", "of them probes"),
        *("FLOPs saved", "paper's rule saves", "seconds saved", "probes of the seconds"),
        "test loss − full",
    ]
    return markdown(head, rows)
