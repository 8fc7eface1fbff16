"""Methods by name: the policies of the package, the controls, and their callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L

from benchmarks.suites.spec import Method, Task
from lightning_mat import MATCallback, policies

#: What a policy's record is for ``Matched``: per episode the units that train of each group.
Record = list[dict[tuple[str, str], int]]


def _bottom(
    *, fraction: float = 0.0, record: Record | None = None, seed: int = 0, **arguments: Any
) -> policies.Bottom:
    """Return Bottom with a share of the units, or with as many as a recorded run trained."""
    many = fraction if record is None else policies.Matched(record, seed)
    return policies.Bottom(many, **arguments)


#: Makers of policies; those that draw get a seed, ``matched`` the record of a run.
POLICIES: dict[str, Callable[..., Any]] = {
    "full": lambda: policies.Full(),
    "random": lambda **arguments: policies.Random(**arguments),
    "multirate": lambda **arguments: policies.Multirate(**arguments),
    "mat": lambda **arguments: policies.MAT(**arguments),
    "top": lambda **arguments: policies.Top(**arguments),
    "bottom": _bottom,
    "matched": lambda **arguments: policies.Matched(**arguments),
}
_DRAWN = ("random", "multirate", "matched")
#: Policies that train as many units as the run that a method is like.
FOLLOWING = ("matched", "bottom")

#: Thresholds of the paper per kind of model (appendix B.1): α and β.
PAPER: dict[str, dict[str, Any]] = {
    "bert": {"alpha": 0.1, "beta": 1e-3},
    "switch": {"alpha": {"head": 0.1, "expert": 0.2}, "beta": 1e-3},
    "vgg": {"alpha": 0.2, "beta": 1e-6},
    "sentiment": {"alpha": 0.1, "beta": 1e-3},
}


class StepCalendar(MATCallback):
    """MATCallback whose episodes begin after a number of steps, not epochs.

    At the small scales a run is not many epochs long, so that the warm-up has to be given in steps.

    Args:
        first: Steps before the first episode.
        every: Steps of an episode.
        options: Of MATCallback.
    """

    def __init__(self, first: int, every: int, **options: Any) -> None:
        """Check the steps."""
        if first < 1 or every < 1:
            raise ValueError(f"first and every must be ≥ 1 step, got {first} and {every}")
        # warmup_epochs=1 says that there is a warm-up: `should_probe` says how long.
        super().__init__(warmup_epochs=1, **options)
        self.first, self.every = first, every

    def should_probe(self, trainer: L.Trainer, batch_idx: int) -> bool:
        """Return whether an episode begins before this batch."""
        step = trainer.global_step
        every = getattr(self.policy, "every_n_steps", None) or self.every
        due = step >= self.first and (step - self.first) % every == 0
        return due and self.schedule.decided_at != step


def callback(
    task: Task, method: Method, seed: int, record: Record | None = None
) -> MATCallback | None:
    """Return the callback of a method; None for plain training.

    Args:
        task: What is trained.
        method: Who trains when.
        seed: Of the draws.
        record: Of the run that the method is like, for policies that follow one.

    Raises:
        ValueError: If the policy is unknown.
    """
    if method.policy is None:
        return None
    if method.policy not in POLICIES:
        raise ValueError(
            f"no policy {method.policy!r} for method {method.name!r}: choose from "
            f"{', '.join(POLICIES)}"
        )
    arguments = dict(method.arguments)
    if method.policy in _DRAWN:
        arguments["seed"] = seed
    if method.policy in FOLLOWING and method.like is not None:
        arguments["record"] = record
    options = {
        "units": task.units,
        "policy": POLICIES[method.policy](**arguments),
        "n_samples": task.n_samples,
        "seed": seed,
        "keep_eigenvalues": False,
        **method.callback,
    }
    if task.calendar == "epochs":
        if not getattr(options["policy"], "every_n_steps", None):
            options["every_n_epochs"] = task.every
        return MATCallback(warmup_epochs=task.first, **options)
    return StepCalendar(task.first, task.every, **options)


def comparison(model: str) -> list[Method]:
    """Return the methods of the paper's tables 1 to 3, and the controls.

    ``mat`` and what is compared with it skip as the paper does, weight gradients only;
    ``mat-units`` and ``random-units`` skip what flows through resting units too. ``bottom`` and
    ``matched`` train as many units as ``mat``; ``short`` and ``short-units`` cost what ``mat`` and
    ``mat-units`` do. ``mat-auto`` and ``mat-budget`` are other thresholds for what ``mat-units``
    does. Text models also have ``mat-loss``, which is ``mat`` by the kernel of the loss, and its
    ``short-loss``.
    """
    paper = PAPER[model]
    units = {"skip": "units"}
    by_loss = [
        Method("mat-loss", "mat", paper, {"output": "loss"}),
        Method("short-loss", plain="short", like="mat-loss"),
    ]
    return [
        Method("full"),
        Method("mat", "mat", paper),
        Method("mat-units", "mat", paper, units),
        Method("short", plain="short", like="mat"),
        Method("short-units", plain="short", like="mat-units"),
        Method("random", "random", {"fraction": 0.5}),
        Method("random-units", "random", {"fraction": 0.5}, units),
        Method("multirate", "multirate", {"k": 5, "fast": 0.5}),
        Method("bottom", "bottom", like="mat"),
        Method("matched", "matched", like="mat"),
        Method("mat-auto", "mat", {**paper, "alpha": "auto"}, units),
        Method("mat-budget", "mat", {"budget": 0.75}, units),
        *(by_loss if model in ("bert", "switch") else ()),
    ]
