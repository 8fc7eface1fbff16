"""The five sentences that open BENCHMARKS.md, composed from the results by code."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.evidence.facts import NO_DIFFERENCE, Facts, sorted_facts
from benchmarks.evidence.overhead import step_ratio
from benchmarks.evidence.pareto import ranked, shares
from benchmarks.evidence.words import interval, listed, percent, plain, signed
from benchmarks.suites.results import Line
from benchmarks.suites.stats import Estimate

#: Suites whose tables answer the first two sentences.
_COMPARED = ("bert", "switch", "vgg", "finetune")
#: Who trains how much by λ_max, and the rivals at the same cost or share of units.
_OURS = ("mat", "mat-units")
_RIVALS = {"mat": ("short", "random", "matched"), "mat-units": ("short-units", "random-units")}


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
    found = []
    for facts in compared:
        for method in (m for m in _OURS if m in facts.lines):
            difference = facts.versus(method, "full")
            if not difference.n:
                continue
            seconds = facts.ratio(method, "full", lambda line: line["seconds"]).mean
            flops = facts.ratio(method, "full", lambda line: line["flops"]).mean
            found.append(
                f"{where(facts)}, `{method}` took {percent(seconds)} of the seconds and "
                f"{percent(flops)} of the counted FLOPs, {said(facts, method, difference)}"
            )
    if not found:
        return "What MAT gains over plain training has not been measured yet."
    return f"Beside plain training of as many steps: {'; '.join(found)}."


def rivals(compared: Sequence[Facts]) -> str:
    """Say whether MAT beats fewer steps, and random units."""
    words = {
        "better": "MAT's test result was better",
        "worse": "it was worse",
        NO_DIFFERENCE: "the 95% interval covers zero, no difference was seen",
        "one seed: no interval": "one seed shows nothing",
        "no pair": "no pair was finished",
        "": "one of the two rested nothing or left out no step, which compares nothing,",
    }
    groups: dict[str, list[str]] = {}
    for facts in compared:
        for method, bases in _RIVALS.items():
            for base in bases:
                difference = facts.versus(method, base)
                if difference.n:
                    pair = f"`{method}` beside `{base}` ({where(facts)})"
                    says = facts.says(method, base)
                    groups.setdefault(says if says in words else "", []).append(pair)
    if not groups:
        return "Whether MAT beats fewer steps or random units has not been measured yet."
    parts = [f"{words[v]} for {listed(groups[v])}" for v in words if v in groups]
    if "better" not in groups:
        parts.insert(0, "MAT's test result was better than none of its rivals'")
    return f"Against its rivals: {'; '.join(parts)}."


def same_cost(found: Sequence[Facts]) -> str:
    """Say who was best at the same share of units, and whether that is more than chance."""
    parts = []
    for facts in found:
        for share, methods in shares(facts).items():
            first = ranked(facts, methods)[0]
            rival = [b for b in ("random", "short") if f"{b}-{share}" not in (first,)]
            beside = [f"{facts.says(first, f'{b}-{share}')} beside `{b}-{share}`" for b in rival]
            flops = facts.ratio(first, "full", lambda line: line["flops"]).mean
            parts.append(
                f"with {share} of the units `{first}` had the best mean ({percent(flops)} of the "
                f"FLOPs; {listed(beside)}; {where(facts)})"
            )
    if not parts:
        return "Which criterion is best at the same cost has not been measured yet."
    return (
        f"Of all criteria, random units and fewer steps, {'; '.join(parts)}; the best of many "
        "means flatters itself, so only what is called better is one."
    )


def stability(found: Sequence[Facts]) -> str:
    """Say how stable the ranking by λ_max is."""
    parts = []
    for facts in found:
        runs = list(facts.lines["full"].values())
        points = [point for run in runs for point in run["ranking"]]
        by_size: dict[str, list[float]] = {}
        for point in points:
            for size, kinds in point["samples"]["sum_logits"].items():
                by_size.setdefault(size, []).extend(v for v in kinds.values() if v is not None)
        across = [
            value
            for point in points
            for value in point["outputs"]["sum_logits vs loss"].values()
            if value is not None
        ]
        texts = [
            f"{statistics.median(values):.2f} with {size} samples"
            for size, values in by_size.items()
            if values
        ]
        if texts and across:
            parts.append(
                f"{where(facts)} {listed(texts)}, and {statistics.median(across):.2f} between the "
                "sum of the logits and the loss"
            )
    if not parts:
        return "How stable the ranking by λ_max is has not been measured yet."
    return (
        "The median Spearman correlation of λ_max between probes of different samples is "
        f"{'; '.join(parts)}."
    )


def overhead(results: Mapping[str, Sequence[Line]]) -> str:
    """Say what probes and callback cost."""
    shares = {
        suite: [
            line["probe_seconds"] / line["seconds"]
            for line in lines
            if line.get("probes") and line.get("seconds") and line["scale"] != "test"
        ]
        for suite, lines in results.items()
    }
    means = {suite: statistics.fmean(values) for suite, values in shares.items() if values}
    if not means:
        return "What the probes cost has not been measured yet."
    most = max(means, key=lambda suite: means[suite])
    within = [suite for suite, value in means.items() if value <= 0.015]
    text = (
        f"Probes took {percent(min(means.values()), 1)} to {percent(means[most], 1)} of a run's "
        f"seconds in the mean of a suite, most in `{most}`, and at most 1.5% in {len(within)} of "
        f"{len(means)} suites"
    )
    steps = [
        f"{plain(step_ratio(list(f.lines['interleaved'].values()), 'active'), 3)} ({where(f)})"
        for f in sorted_facts(results.get("overhead", ()))
    ]
    if steps:
        text += f"; a step under the callback with everything active took {listed(steps)} of plain "
        text += "Lightning's"
    return f"{text}."


def where(facts: Facts) -> str:
    """Return the task, scale and device in brackets' words."""
    return f"{facts.title} at `{facts.scale}` on {facts.device}"


def said(facts: Facts, method: str, difference: Estimate) -> str:
    """Return what a method's difference to ``full`` in the test result says, with its interval."""
    verdict = facts.says(method, "full")
    return (
        f"test {facts.metric} {signed(difference, 3)}, {interval(difference, 3)} ({verdict})"
        if difference.n > 1
        else f"test {facts.metric} {signed(difference, 3)} ({verdict})"
    )
