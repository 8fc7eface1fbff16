"""Tables of the suites that compare methods on one task."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.evidence.facts import Facts, sorted_facts
from benchmarks.evidence.words import NONE, counted, each, interval, listed, percent, plain, signed
from benchmarks.suites.results import Line
from benchmarks.suites.stats import best_point, estimate, reached
from benchmarks.tabular import markdown

#: Pairs that a sceptic asks for: the method, and what it has to beat.
PAIRS = (
    ("mat", "short"),
    ("mat", "random"),
    ("mat", "matched"),
    ("mat", "bottom"),
    ("mat", "multirate"),
    ("mat", "lower-half"),
    ("mat-units", "short-units"),
    ("mat-units", "random-units"),
    ("mat-auto", "mat-units"),
    ("mat-budget", "mat-units"),
    ("mat-loss", "short-loss"),
    ("mat-loss", "mat"),
)


def tables(lines: Sequence[Line]) -> str:
    """Return what every method reached and cost, and who beats whom, per task."""
    parts = []
    for facts in sorted_facts(lines):
        parts += [f"#### {facts.place}", sizes(facts)]
        parts += [results(facts), target(facts)]
        if facts.task["model"] == "vgg":
            parts.append(train_accuracy(facts))
        parts += [pairs(facts), who_rested(facts)]
    return "\n\n".join(part for part in parts if part)


def sizes(facts: Facts) -> str:
    """Return what was trained, in a line."""
    task = facts.task
    line = next(line for seeds in facts.lines.values() for line in seeds.values())
    corpus = ", ".join(f"{key} {value}" for key, value in line["corpus"].items())
    size = ", ".join(f"{key} {value}" for key, value in task["size"].items() if value is not None)
    steps = task["head_start"]
    start = f"; after a head start of {steps} plain steps" if steps else ""
    every = f"after {task['first']} {task['calendar']}, then every {task['every']}"
    return (
        f"{size}; {corpus}{start}; {task['steps']} steps of {task['batch_size']} samples, "
        f"{task['precision']}; units: {task['units']}, episodes {every}, "
        f"{task['n_samples']} samples per probe. {pairing(facts)}{temporal(facts)}"
    )


def temporal(facts: Facts) -> str:
    """Say so where the runs had too few probes for the paper's temporal rule."""
    probes = [
        line["probes"]
        for method, lines in facts.lines.items()
        if method == "mat" or method.startswith("mat-")
        for line in lines.values()
        if line["probes"]
    ]
    if not probes or max(probes) > 2:
        return ""
    return (
        f" With {max(probes):.0f} probes a run equation 6, which compares the third with those "
        "before, could not act: the thresholds are α's alone."
    )


def pairing(facts: Facts) -> str:
    """Return whether all methods of a seed started from the same weights, by their hashes."""
    starts: dict[int, set[str]] = {}
    for seeds in facts.lines.values():
        for seed, line in seeds.items():
            starts.setdefault(seed, set()).add(line["initial"])
    apart = [str(seed) for seed, found in sorted(starts.items()) if len(found) > 1]
    if apart:
        return f"Not paired: methods started from different weights with seed {listed(apart)}."
    for seed in starts:
        seen = [lines[seed].get("batches", []) for lines in facts.lines.values() if seed in lines]
        if any(len(set(same)) > 1 for same in zip(*filter(None, seen), strict=False)):
            return f"Not paired: methods saw different batches with seed {seed}."
    return (
        "All methods of a seed started from the same weights and saw the same first batches (by "
        "their checksums)."
    )


def results(facts: Facts) -> str:
    """Return test results and costs of all methods."""
    rows = []
    for method, seeds in facts.lines.items():
        difference = facts.versus(method, "full")
        own = method == "full"
        shares = [line["episode_seconds"] / line["seconds"] for line in seeds.values()]
        rows.append(
            [
                f"`{method}`",
                str(len(seeds)),
                plain(facts.mean(method, facts.result), 4),
                NONE if own else signed(difference),
                NONE if own else each(facts.differences(method, "full")),
                NONE if own else interval(difference),
                NONE if own else facts.says(method, "full"),
                percent(facts.ratio(method, "full", lambda line: line["seconds"]).mean),
                percent(facts.ratio(method, "full", lambda line: line["flops"]).mean),
                percent(facts.ratio(method, "full", lambda line: line["paper_flops"]).mean),
                percent(estimate(shares).mean, 1),
                percent(facts.mean(method, lambda line: line["trained_share"]).mean),
            ]
        )
    head = [
        *(
            "method",
            "seeds",
            f"test {facts.metric}",
            "− full",
            "per seed",
            "95% interval",
            "verdict",
        ),
        *("seconds", "FLOPs counted", "FLOPs, paper's rule", "probes and decisions"),
        "units trained",
    ]
    return markdown(head, rows)


def target(facts: Facts) -> str:
    """Return what it took to reach the full run's best validation result."""
    rows = []
    for method, seeds in facts.lines.items():
        cells = [f"`{method}`"]
        for cost in ("seconds", "flops", "paper_flops"):
            found = facts.until_target(method, cost)
            there = [100 * share for share in found.values() if share is not None]
            # The mean of those that got there alone would flatter the method.
            text = plain(estimate(there), 0, "%") if len(there) == len(found) else NONE
            cells.append(_absolute(facts, cost) if method == "full" else text)
        found = facts.until_target(method, "step")
        cells.append(f"{sum(v is not None for v in found.values())} of {len(seeds)}")
        for cost in ("seconds", "flops"):
            equal = facts.at_equal(cost, method)
            cells.append(NONE if method == "full" else signed(equal))
        rows.append(cells)
    head = [
        *("until the full run's best validation result", "seconds", "FLOPs counted"),
        *("FLOPs, paper's rule", "runs that got there"),
        f"validation {facts.metric} at equal seconds − full",
        "at equal counted FLOPs − full",
    ]
    return markdown(head, rows)


def _absolute(facts: Facts, cost: str) -> str:
    """Return what the full run itself needed, the 100% of the other rows."""
    needed = [
        point[cost]
        for line in facts.lines["full"].values()
        if (point := best_point(line["curve"], facts.metric, more=facts.more)) is not None
    ]
    found = estimate(needed)
    return f"{plain(found, 1)} s" if cost == "seconds" else counted(found)


def train_accuracy(facts: Facts) -> str:
    """Return what it took to a train accuracy of 95% and 99%, over an epoch."""
    rows = []
    for method in facts.lines:
        cells = [f"`{method}`"]
        for goal in (0.95, 0.99):
            for cost in ("seconds", "flops"):
                found = [
                    reached_accuracy(line, goal, cost) for line in facts.lines[method].values()
                ]
                there = estimate([value for value in found if value is not None])
                if there.n < len(found):
                    cells.append(f"{there.n} of {len(found)} got there")
                else:
                    cells.append(plain(there, 1) if cost == "seconds" else counted(there))
        rows.append(cells)
    head = [
        "until train accuracy",
        *("95%: seconds", "95%: FLOPs", "99%: seconds", "99%: FLOPs"),
    ]
    return markdown(head, rows)


def reached_accuracy(line: Line, goal: float, cost: str) -> float | None:
    """Return the cost at which the train accuracy of an epoch first reaches a goal."""
    return reached(line["curve"], "train_accuracy", goal, cost, more=True)


def pairs(facts: Facts) -> str:
    """Return who beats whom in the test result."""
    rows = []
    for method, base in PAIRS:
        difference = facts.versus(method, base)
        if difference.n:
            rows.append(
                [
                    f"`{method}` − `{base}`",
                    str(difference.n),
                    signed(difference),
                    interval(difference),
                    facts.says(method, base),
                    percent(facts.ratio(method, base, lambda line: line["flops"]).mean),
                    percent(facts.ratio(method, base, lambda line: line["seconds"]).mean),
                ]
            )
    head = [
        *(f"test {facts.metric}", "pairs", "difference", "95% interval", "verdict"),
        *("FLOPs ÷ rival's", "seconds ÷ rival's"),
    ]
    return markdown(head, rows) if rows else ""


def who_rested(facts: Facts) -> str:
    """Return why units trained or rested, as shares of all units, means over episodes and seeds."""
    found = {}
    for method, seeds in facts.lines.items():
        episodes = [
            {reason: count / line["units"] for reason, count in noted["reasons"].items()}
            for line in seeds.values()
            for noted in line["episodes"]
        ]
        if method.startswith("mat") and episodes:
            found[method] = episodes
    reasons = sorted({reason for episodes in found.values() for e in episodes for reason in e})
    rows = [
        [
            f"`{method}`",
            *(percent(estimate([e.get(r, 0.0) for e in episodes]).mean) for r in reasons),
        ]
        for method, episodes in found.items()
    ]
    return markdown(["why units train or rest", *reasons], rows) if rows else ""
