"""Runner: goes through a suite's runs until they are done or the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.suites.results import Line, Results
from benchmarks.suites.spec import Run


@dataclass(frozen=True)
class Place:
    """Where runs take place and what they read and write.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        device_name: Name of the device in the results' file names.
        data: Folder of the data sets.
        work: Folder of unfinished runs.
        results: Folder of the results.
    """

    device: str
    device_name: str
    data: Path | None
    work: Path
    results: Path | None = None


def go(
    runs: Sequence[Run],
    train: Callable[..., Line | None],
    place: Place,
    deadline: float | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Train what has no result yet, in order.

    Args:
        runs: Of one suite.
        train: Trains a run, see :func:`benchmarks.suites.train.train`.
        place: Where.
        deadline: Moment of ``time.monotonic()`` at which to stop.
        say: Takes the lines of progress.

    Returns:
        How many runs are left.
    """
    if not runs:
        return 0
    results = Results(runs[0].suite, place.device_name, place.results)
    done = results.read()
    left = [run for run in runs if run.key not in done]
    say(f"{runs[0].suite}: {len(runs) - len(left)} of {len(runs)} runs done, {len(left)} to do")
    while left:
        if deadline is not None and time.monotonic() >= deadline:
            break
        run = left[0]
        begin = time.monotonic()
        line = train(
            run,
            done.get(run.needs.key) if run.needs else None,
            data=place.data,
            work=place.work,
            device=place.device,
            deadline=deadline,
        )
        if line is None:
            say(f"  {run.label}: stopped in the middle, its checkpoint is kept")
            break
        results.append(line)
        done[run.key] = line
        left.pop(0)
        say(f"  {run.label}: {describe(line)}; {time.monotonic() - begin:.0f} s, {len(left)} left")
    return len(left)


def describe(line: Line) -> str:
    """Return a finished run's result in a few words."""
    best = line.get("test_best")
    if not best:
        return "done"
    result = ", ".join(f"test {name} {value}" for name, value in best.items())
    share = line["flops"] / (line["full_step_flops"] * line["task"]["steps"])
    return f"{result}, {line['seconds']:.1f} s of training, {share:.0%} of the full run's FLOPs"
