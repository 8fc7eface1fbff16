"""Run: what is trained, by which method, from which seed; its key names all of that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

#: Metric that decides for each kind of model, and whether more of it is better.
METRICS = {
    "bert": ("loss", False),
    "switch": ("loss", False),
    "vgg": ("accuracy", True),
    "sentiment": ("accuracy", True),
}
#: Data sets as the examples name them, and as one writes them.
DATA_SETS = {
    "wikitext-2": "WikiText-2",
    "wikitext-103": "WikiText-103",
    "cifar-10": "CIFAR-10",
    "imdb": "IMDB",
    "embedded": "the embedded corpus",
}


@dataclass(frozen=True)
class Task:
    """What is trained and how, whatever the method.

    Args:
        name: Short name, unique in a suite.
        model: A key of :data:`METRICS`.
        size: Arguments of the model.
        data: Arguments of the data module.
        steps: Optimizer steps.
        batch_size: Samples in a batch.
        units: What can rest.
        first: Steps (or epochs) before the first episode, in which everything trains.
        every: Steps (or epochs) of an episode.
        calendar: ``"steps"`` or ``"epochs"``.
        n_samples: Samples of a probe.
        points: Validations of a run, the last one after the last step.
        precision: Of the Trainer.
        head_start: Plain steps that all runs begin after, see :mod:`benchmarks.suites.start`.
    """

    name: str
    model: str
    size: Mapping[str, Any]
    data: Mapping[str, Any]
    steps: int
    batch_size: int
    units: str
    first: int
    every: int
    n_samples: int
    calendar: str = "steps"
    points: int = 12
    precision: str = "32-true"
    head_start: int = 0

    @property
    def metric(self) -> str:
        """The metric that decides: ``"loss"`` or ``"accuracy"``."""
        return METRICS[self.model][0]


@dataclass(frozen=True)
class Method:
    """Who trains when.

    Args:
        name: Short name, unique in a suite.
        policy: A key of :data:`benchmarks.suites.methods.POLICIES`; None for training without
            MATCallback.
        arguments: Of the policy.
        callback: Options of MATCallback.
        like: Method of the same task and seed whose result is needed first: its cost (``short``)
            or its record (``matched``).
        plain: What a method without a policy does differently: ``"short"`` trains as many steps as
            have the cost of ``like``; ``"lower-half"`` freezes the lower half of the encoder.
    """

    name: str
    policy: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    callback: Mapping[str, Any] = field(default_factory=dict)
    like: str | None = None
    plain: str = ""


@dataclass(frozen=True)
class Run:
    """One line of results.

    Args:
        suite: Name of the suite.
        scale: ``"cpu"``, ``"gpu"``, ``"paper"`` or ``"test"``.
        task: What is trained.
        method: Who trains when.
        seed: Of weights, data order, masks, dropout and draws.
        needs: Run whose result this one needs first.
    """

    suite: str
    scale: str
    task: Task
    method: Method
    seed: int
    needs: Run | None = None

    @property
    def key(self) -> str:
        """Readable name and a hash of all settings: a changed setting is another run.

        Example:
            >>> from dataclasses import replace
            >>> task = Task("t", "bert", {}, {}, 6, 2, "heads", 1, 1, 2)
            >>> run = Run("bert", "test", task, Method("full"), 0)
            >>> run.key == replace(run, task=replace(task, steps=7)).key
            False
        """
        text = json.dumps(self.settings(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.label}-{digest}"

    @property
    def label(self) -> str:
        """Readable name."""
        return f"{self.suite}-{self.scale}-{self.task.name}-{self.method.name}-s{self.seed}"

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the result, as JSON values."""
        own = {name: value for name, value in vars(self).items() if name != "needs"}
        settings = {**own, "task": asdict(self.task), "method": asdict(self.method)}
        settings["needs"] = self.needs.key if self.needs else None
        return json.loads(json.dumps(settings))


def paired(
    suite: str, scale: str, tasks: Iterable[Task], methods: Sequence[Method], seeds: Iterable[int]
) -> list[Run]:
    """Return the runs of all methods, all methods of a seed before the next seed.

    A suite that is cut off so has whole pairs.

    Raises:
        ValueError: If a method needs one that does not stand before it.
    """
    runs: list[Run] = []
    tasks = list(tasks)
    for seed in seeds:
        for task in tasks:
            made: dict[str, Run] = {}
            for method in methods:
                if method.like is not None and method.like not in made:
                    raise ValueError(
                        f"method {method.name!r} needs the result of {method.like!r}: list that "
                        "one before it"
                    )
                needs = made[method.like] if method.like else None
                made[method.name] = Run(suite, scale, task, method, seed, needs)
            runs += made.values()
    return runs


def chosen(runs: Sequence[Run], methods: Sequence[str]) -> list[Run]:
    """Return the runs of some methods, and those that they need.

    Raises:
        ValueError: If no run has a method of that name.
    """
    known = list(dict.fromkeys(run.method.name for run in runs))
    for name in methods:
        if name not in known:
            raise ValueError(f"no method {name!r} here: choose from {', '.join(known)}")
    wanted = {run.key for run in runs if run.method.name in methods}
    for run in reversed(runs):
        if run.key in wanted and run.needs is not None:
            wanted.add(run.needs.key)
    return [run for run in runs if run.key in wanted]
