"""Facts: the finished runs of one task on one machine, and what is compared between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.suites.results import Line
from benchmarks.suites.spec import METRICS
from benchmarks.suites.stats import (
    Estimate,
    best_point,
    differences,
    estimate,
    reached,
    value_at,
)

NO_DIFFERENCE = "no difference seen"
#: What is said of a difference that has an interval.
VERDICTS = ("better", "worse", NO_DIFFERENCE)
#: A method that trained more of the units, all in all, rested too little to be compared.
TRAINED_ALL = 0.99
Value = Callable[[Line], float | None]


@dataclass(frozen=True)
class Facts:
    """Runs of one suite, device, scale and task.

    Args:
        suite: Name of the suite.
        device: Of the runs.
        scale: Of the runs.
        task: Their settings.
        lines: The finished runs by method and seed.
    """

    suite: str
    device: str
    scale: str
    task: dict[str, Any]
    lines: dict[str, dict[int, Line]]

    @property
    def metric(self) -> str:
        """What decides: ``"loss"`` or ``"accuracy"``."""
        return METRICS[self.task["model"]][0]

    @property
    def more(self) -> bool:
        """Whether more of it is better."""
        return METRICS[self.task["model"]][1]

    @property
    def title(self) -> str:
        """The task in a few words."""
        names = {"bert": "BERT", "switch": "Switch", "vgg": "VGG16", "sentiment": "sentiment"}
        return f"{names[self.task['model']]} {self.task['name']}"

    @property
    def place(self) -> str:
        """The task, and where it ran."""
        device = "" if self.device == self.scale else f" on {self.device}"
        return f"{self.title} at `{self.scale}`{device}"

    def values(self, method: str, value: Value) -> dict[int, float | None]:
        """Return a value of each seed's run of a method."""
        return {seed: value(line) for seed, line in self.lines.get(method, {}).items()}

    def mean(self, method: str, value: Value) -> Estimate:
        """Return the mean of a value over the seeds that have one."""
        return estimate([v for v in self.values(method, value).values() if v is not None])

    def versus(self, method: str, base: str, value: Value | None = None) -> Estimate:
        """Return method − base, paired by seed; of the test result by default."""
        return estimate(self.differences(method, base, value))

    def differences(self, method: str, base: str, value: Value | None = None) -> list[float]:
        """Return method − base of every seed that both have, in their order."""
        value = value or self.result
        return differences(self.values(method, value), self.values(base, value))

    def result(self, line: Line) -> float | None:
        """Return the test result with the weights of the best validation."""
        return line["test_best"].get(self.metric)

    def ratio(self, method: str, base: str, value: Value) -> Estimate:
        """Return method / base, paired by seed."""
        ours, theirs = self.values(method, value), self.values(base, value)
        pairs = [(ours[s], theirs.get(s)) for s in sorted(ours)]
        return estimate([a / b for a, b in pairs if a is not None and b])

    def until_target(self, method: str, cost: str, base: str = "full") -> dict[int, float | None]:
        """Return the cost at which each seed's run reaches the base's best validation result.

        It is a share of what the base itself needed; None for a run that never gets there.
        """
        found: dict[int, float | None] = {}
        for seed, line in self.lines.get(method, {}).items():
            other = self.lines.get(base, {}).get(seed)
            best = best_point(other["curve"], self.metric, more=self.more) if other else None
            if other is None or best is None:
                continue
            target = best[self.metric]
            own = reached(other["curve"], self.metric, target, cost, more=self.more)
            needed = reached(line["curve"], self.metric, target, cost, more=self.more)
            found[seed] = needed / own if needed is not None and own else None
        return found

    def at_equal(self, cost: str, method: str, base: str = "full") -> Estimate:
        """Return method − base in the best validation result by a cost that both have had.

        Args:
            cost: ``"seconds"``, ``"flops"`` or ``"paper_flops"``.
            method: Name of the method.
            base: Name of the method that it is compared with.
        """
        found = []
        for seed, line in sorted(self.lines.get(method, {}).items()):
            other = self.lines.get(base, {}).get(seed)
            if other is None:
                continue
            until = min(line["curve"][-1][cost], other["curve"][-1][cost])
            ours, theirs = (
                value_at(one["curve"], self.metric, cost, until, more=self.more)
                for one in (line, other)
            )
            if ours is not None and theirs is not None:
                found.append(ours - theirs)
        return estimate(found)

    def spared(self, method: str) -> str | None:
        """Return in words that a method spared nothing in any run; None where it did, or may not.

        It trained all but 1% of the units, or ran all steps where it was to run fewer.
        """
        lines = list(self.lines.get(method, {}).values())
        if not lines:
            return None
        policy, plain = lines[0]["method"]["policy"], lines[0]["method"]["plain"]
        shares = [line["trained_share"] for line in lines]
        if policy not in (None, "full") and min(shares) >= TRAINED_ALL:
            rested = "nothing" if min(shares) == 1 else f"below {1 - TRAINED_ALL:.0%}"
            return f"`{method}` rested {rested}"
        if plain == "short" and all(line["steps"] == self.task["steps"] for line in lines):
            return f"`{method}` left out no step"
        return None

    def side(self, method: str, base: str) -> float:
        """Return by how much a method's mean test result is better than another's."""
        difference = self.versus(method, base).mean
        return difference if self.more else -difference

    def says(self, method: str, base: str, difference: Estimate | None = None) -> str:
        """Return what a difference of two methods says, of the test result by default.

        Where a method spared nothing, a difference is not one of what it does.
        """
        difference = self.versus(method, base) if difference is None else difference
        spared = [words for name in (method, base) if (words := self.spared(name))]
        return " and ".join(spared) if difference.n and spared else self.verdict(difference)

    def verdict(self, difference: Estimate) -> str:
        """Return what a difference of results says."""
        if difference.n == 0:
            return "no pair"
        if difference.n == 1:
            return "one seed: no interval"
        if difference.covers_zero:
            return NO_DIFFERENCE
        return "better" if (difference.mean > 0) == self.more else "worse"


def sorted_facts(lines: Iterable[Line]) -> list[Facts]:
    """Return the facts of each device, scale and task, in the order of the lines."""
    found: dict[tuple[str, ...], Facts] = {}
    for line in lines:
        task, device = line["task"], line["environment"]["device"]
        key = (line["suite"], device, line["scale"], task["name"])
        facts = found.setdefault(key, Facts(*key[:3], task, {}))
        facts.lines.setdefault(line["method"]["name"], {})[line["seed"]] = line
    return list(found.values())
