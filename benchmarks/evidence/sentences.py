"""The five sentences that open BENCHMARKS.md, composed from the results by code."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.evidence.facts import VERDICTS, Facts, sorted_facts
from benchmarks.evidence.overhead import step_ratio
from benchmarks.evidence.pareto import shares
from benchmarks.evidence.words import interval, listed, percent
from benchmarks.suites.results import Line

#: Suites whose tables answer the first two sentences.
_COMPARED = ("bert", "switch", "vgg", "finetune")
#: Who trains how much by λ_max, and the pairs of it and its rivals, in words.
_OURS = ("mat", "mat-units")
_RIVALS = {
    (("mat", "short"), ("mat-units", "short-units")): "plain training cut to the same counted "
    "FLOPs",
    (("mat", "matched"),): "as many random units of each layer",
    (("mat", "bottom"),): "as many units with the smallest λ_max",
    (("mat", "random"), ("mat-units", "random-units")): "half of the units, drawn at random",
    (("mat", "lower-half"),): "the lower half of the layers frozen",
}
#: Rivals whose cost is not MAT's: it is said.
_OTHER_COST = ("random", "random-units", "lower-half")

#: A comparison: the facts, the method, and what it is compared with.
Case = tuple[Facts, str, str]


def sentences(results: Mapping[str, Sequence[Line]]) -> list[str]:
    """Return the sentences.

    Args:
        results: The finished runs of each suite.
    """
    compared = [f for suite in _COMPARED for f in sorted_facts(results.get(suite, ()))]
    return [
        gain(compared),
        rivals(compared),
        same_cost(sorted_facts(results.get("pareto", ()))),
        stability(sorted_facts(results.get("ranking", ()))),
        overhead(results),
    ]


def gain(compared: Sequence[Facts]) -> str:
    """Say what MAT cost and reached beside plain training."""
    cases = [(f, m, "full") for f in compared for m in _OURS if f.versus(m, "full").n]
    if not cases:
        return "What MAT gains over plain training has not been measured yet."
    costs = {
        cost: [f.ratio(m, "full", lambda line, cost=cost: line[cost]).mean for f, m, _ in cases]
        for cost in ("seconds", "flops")
    }
    places = listed(list(dict.fromkeys(f.place for f, *_ in cases)))
    return (
        f"Trained with the paper's α and β ({places}), MAT took {span(costs['flops'])} of the "
        f"counted FLOPs and {span(costs['seconds'])} of the seconds of plain training of as many "
        f"steps, and its test result was {tally(cases)}."
    )


def rivals(compared: Sequence[Facts]) -> str:
    """Say whether MAT beats what costs less to build."""
    parts, beyond, left = [], [], 0
    for pairs, words in _RIVALS.items():
        cases = [(f, m, base) for f in compared for m, base in pairs if f.versus(m, base).n]
        told = [(f.side(m, base), f.says(m, base)) for f, m, base in cases]
        there = [(side, says) for side, says in told if says in VERDICTS]
        left += len(told) - len(there)
        if not there:
            continue
        worse = sum(side < 0 for side, _ in there)
        cost = ""
        if pairs[0][1] in _OTHER_COST:
            costs = [f.ratio(base, m, lambda line: line["flops"]).mean for f, m, base in cases]
            cost = f" ({span(costs)} of its FLOPs)"
        parts.append(f"in {worse or 'none'} of {len(there)} with {words}{cost}")
        for name in ("worse", "better"):
            if count := sum(says == name for _, says in there):
                beyond.append(f"{name} than {words} in {count}")
    if not parts:
        return "Whether MAT beats fewer steps or random units has not been measured yet."
    few = f"; {left} more rested too little to say, or had too few seeds" if left else ""
    return (
        f"Compared with what costs less to build, its test result was on average worse "
        f"{listed(parts)}; beyond the 95% interval it was {listed(beyond) or 'neither'}{few}."
    )


def same_cost(found: Sequence[Facts]) -> str:
    """Say whether rankings of the units beat chance and fewer steps at the same share."""
    parts: list[str] = []
    outcomes: dict[str, list[str]] = {"random": [], "short": []}
    metric = ""
    for facts in found:
        for share, methods in shares(facts).items():
            ranked = [m for m in methods if m.startswith("top-") and "-weights-" not in m]
            ours = distinct(facts, ranked)
            for rival, says in outcomes.items():
                says += [facts.says(m, f"{rival}-{share}") for m in ours]
            told = [
                f"{_told(facts, f'top-lambda_max-{output}-{share}', share)} ({words})"
                for output, words in (
                    ("sum_logits", "of the summed logits"),
                    ("loss", "the loss's"),
                )
                if f"top-lambda_max-{output}-{share}" in methods
            ]
            flops = facts.ratio(f"random-{share}", "full", lambda line: line["flops"]).mean
            metric = facts.metric
            parts.append(
                f"by {listed(told)} with {share} of the units ({percent(flops)} of the FLOPs)"
            )
    if not parts:
        return "Which ranking is best at the same cost has not been measured yet."
    places = listed(list(dict.fromkeys(f.place for f in found)))
    random, short = (says.count("better") or "none" for says in outcomes.values())
    return (
        f"At the same share of units ({places}), choosing by λ_max moved the test {metric} from "
        f"that of random units {listed(parts)}; of {len(outcomes['random'])} rankings {random} "
        f"beat random units and {short} plain training of as many FLOPs beyond the 95% interval, "
        "taken one by one."
    )


def distinct(facts: Facts, methods: Sequence[str]) -> list[str]:
    """Return methods without those that gave the very same results as an earlier one."""
    found: dict[tuple[tuple[int, float | None], ...], str] = {}
    for method in methods:
        found.setdefault(tuple(sorted(facts.values(method, facts.result).items())), method)
    return list(found.values())


def _told(facts: Facts, method: str, share: str) -> str:
    difference = facts.versus(method, f"random-{share}")
    if difference.n < 2:
        return "an unknown amount, with too few seeds,"
    return f"{difference.mean:+.3f} {interval(difference, 3)}"


def stability(found: Sequence[Facts]) -> str:
    """Say how stable the ranking by λ_max is: least and largest of all that was measured."""
    apart: dict[int, list[float]] = {}
    across: list[float] = []
    for facts in found:
        for point in (p for run in facts.lines["full"].values() for p in run["ranking"]):
            for size, kinds in point["samples"]["sum_logits"].items():
                apart.setdefault(int(size), []).extend(v for v in kinds.values() if v is not None)
            kinds = point["outputs"]["sum_logits vs loss"]
            across += [v for v in kinds.values() if v is not None]
    apart = {size: values for size, values in sorted(apart.items()) if values}
    if not apart or not across:
        return "How stable the ranking by λ_max is has not been measured yet."
    sizes = [
        f"{number_span(values)} (median {statistics.median(values):.2f}) with {size} samples"
        for size, values in apart.items()
    ]
    return (
        "Spearman's correlation of λ_max between probes of different samples is "
        f"{listed(sizes)}; between the sum of the logits, which the paper measures, and the loss, "
        f"which is trained, it is {number_span(across)} (median {statistics.median(across):.2f})."
    )


def overhead(results: Mapping[str, Sequence[Line]]) -> str:
    """Say what probes and callback cost."""
    shares = {
        suite: [
            line["episode_seconds"] / line["seconds"]
            for line in lines
            if line.get("probes") and line.get("seconds") and line["scale"] != "test"
        ]
        for suite, lines in results.items()
    }
    means = {suite: statistics.fmean(values) for suite, values in shares.items() if values}
    if not means:
        return "What the probes cost has not been measured yet."
    most = max(means, key=lambda suite: means[suite])
    text = (
        f"Probes and decisions took {span(list(means.values()), 1)} of a run's seconds, on average "
        f"per suite, most in `{most}`"
    )
    steps = [
        step_ratio(list(f.lines["interleaved"].values()), "active").mean
        for f in sorted_facts(results.get("overhead", ()))
    ]
    if steps:
        text += (
            f", and a step under the callback with everything active took {number_span(steps)} of "
            "plain Lightning's"
        )
    return f"{text}."


def tally(cases: Sequence[Case]) -> str:
    """Return on which side some comparisons lie, and how many beyond their interval, in words."""
    told = [(f.side(m, base), f.says(m, base)) for f, m, base in cases]
    compared = [(side, says) for side, says in told if says in VERDICTS]
    left = len(told) - len(compared)
    few = f"{left} rested too little to say, or had too few seeds" if left else ""
    if not compared:
        return f"not compared ({few})"
    words = []
    for name, sign in (("worse", -1), ("better", 1)):
        there = sum(side * sign > 0 for side, _ in compared)
        beyond = sum(says == name for _, says in compared)
        inside = f" ({beyond or 'none'} beyond the 95% interval)" if there else ""
        words.append((there or "none", inside))
    (worse, of_worse), (better, of_better) = words
    plural = "s" if len(compared) != 1 else ""
    text = (
        f"on average worse in {worse} of {len(compared)} comparison{plural}{of_worse}, better in "
        f"{better}{of_better}"
    )
    return f"{text}; {few}" if few else text


def span(values: Sequence[float], digits: int = 0) -> str:
    """Return the least and the largest share, in percent.

    Example:
        >>> span([0.9, 0.5]), span([0.5])
        ('50% to 90%', '50%')
    """
    texts = [percent(value, digits) for value in (min(values), max(values))]
    return " to ".join(dict.fromkeys(texts))


def number_span(values: Sequence[float]) -> str:
    """Return the least and the largest number.

    Example:
        >>> number_span([0.85, 0.991])
        '0.85 to 0.99'
    """
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))
