"""The five sentences that open BENCHMARKS.md, composed from the results by code."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.evidence.facts import NO_DIFFERENCE, Facts, sorted_facts
from benchmarks.evidence.overhead import step_ratio
from benchmarks.evidence.pareto import shares
from benchmarks.evidence.words import listed, percent
from benchmarks.suites.results import Line

#: Suites whose tables answer the first two sentences.
_COMPARED = ("bert", "switch", "vgg", "finetune")
#: Who trains how much by λ_max, and the pairs of it and its rivals, in words.
_OURS = ("mat", "mat-units")
_RIVALS = {
    (("mat", "short"), ("mat-units", "short-units")): "plain training cut to its FLOPs",
    (("mat", "random"), ("mat-units", "random-units")): "half of the units, drawn at random",
    (("mat", "matched"),): "as many random units of each layer",
}


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
    pairs = [(f, m) for f in compared for m in _OURS if f.versus(m, "full").n]
    if not pairs:
        return "What MAT gains over plain training has not been measured yet."
    costs = {
        cost: [f.ratio(m, "full", lambda line, cost=cost: line[cost]).mean for f, m in pairs]
        for cost in ("seconds", "flops")
    }
    places = listed(list(dict.fromkeys(f.place for f, _ in pairs)))
    return (
        f"MAT with the paper's thresholds took {span(costs['seconds'])} of the seconds and "
        f"{span(costs['flops'])} of the counted FLOPs of plain training of as many steps, and its "
        f"test result was {tally([f.says(m, 'full') for f, m in pairs])} ({places}; with both "
        "ways of skipping)."
    )


def rivals(compared: Sequence[Facts]) -> str:
    """Say whether MAT beats fewer steps, and random units."""
    parts = []
    for base, words in _RIVALS.items():
        verdicts = [
            f.says(ours, rival) for f in compared for ours, rival in base if f.versus(ours, rival).n
        ]
        if verdicts:
            parts.append(f"beside {words} it was {tally(verdicts)}")
    if not parts:
        return "Whether MAT beats fewer steps or random units has not been measured yet."
    return f"Its rivals cost less to build: {'; '.join(parts)}."


def same_cost(found: Sequence[Facts]) -> str:
    """Say whether rankings of the units beat chance and fewer steps at the same share."""
    parts = []
    for facts in found:
        for share, methods in shares(facts).items():
            random, short = f"random-{share}", f"short-{share}"
            ours = [m for m in methods if m.startswith("top-") and "weights" not in m]
            flops = facts.ratio(random, "full", lambda line: line["flops"]).mean
            won = [sum(facts.says(m, base) == "better" for m in ours) for base in (random, short)]
            told = [
                f"λ_max of {words} {_told(facts, f'top-lambda_max-{output}-{share}', random)}"
                for output, words in (("sum_logits", "the summed logits"), ("loss", "the loss"))
                if f"top-lambda_max-{output}-{share}" in methods
            ]
            parts.append(
                f"with {share} of the units ({percent(flops)} of the FLOPs, {facts.place}) "
                f"{listed(told)}; of {len(ours)} rankings {won[0] or 'none'} beat `{random}` and "
                f"{won[1] or 'none'} beat plain training of as many FLOPs"
            )
    if not parts:
        return "Which ranking is best at the same cost has not been measured yet."
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]} (each by its own interval, however many were tried)."


def _told(facts: Facts, method: str, base: str) -> str:
    says = facts.says(method, base)
    if says not in ("better", "worse", NO_DIFFERENCE):
        return "has too few seeds to say"
    return f"was no different from `{base}`" if says == NO_DIFFERENCE else f"was {says}"


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
        f"Probes and decisions took {span(list(means.values()), 1)} of a run's seconds in the mean "
        f"of a suite, most in `{most}`"
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


def tally(verdicts: Sequence[str]) -> str:
    """Return how many comparisons say what, in words.

    Example:
        >>> tally(["better", "worse", "no difference seen", "worse"])
        'better in 1, worse in 2 of 4 comparisons; no difference was seen in 1'
        >>> tally(["better"])
        'better in 1, worse in none of 1 comparison'
    """
    compared = [v for v in verdicts if v in ("better", "worse", NO_DIFFERENCE)]
    better, worse, even = (compared.count(v) for v in ("better", "worse", NO_DIFFERENCE))
    text = (
        f"better in {better or 'none'}, worse in {worse or 'none'} of {len(compared)} "
        f"comparison{'s' if len(compared) != 1 else ''}"
    )
    if even:
        text += f"; no difference was seen in {even}"
    if left := len(verdicts) - len(compared):
        text += f"; {left} compared nothing"
    return text


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
