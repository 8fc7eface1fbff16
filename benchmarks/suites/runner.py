"""Runner: goes through a suite's runs until they are done or the time is up."""

from __future__ import annotations

import time
import traceback
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


@dataclass(frozen=True)
class Outcome:
    """What became of a suite's runs.

    Args:
        left: Runs without a result.
        failed: Labels of those that raised an error.
    """

    left: int
    failed: tuple[str, ...] = ()


def go(
    runs: Sequence[Run],
    train: Callable[..., Line | None],
    place: Place,
    deadline: float | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Train what has no result yet, in order.

    A run that fails is told and left out, as are those that need its result; the next call tries
    again. Missing data or packages end the suite.

    Args:
        runs: Of one suite.
        train: Trains a run, see :func:`benchmarks.suites.train.train`.
        place: Where.
        deadline: Moment of ``time.monotonic()`` at which to stop.
        say: Takes the lines of progress.
    """
    if not runs:
        return Outcome(0)
    results = Results(runs[0].suite, place.device_name, place.results)
    done = results.read()
    to_do = [run for run in runs if run.key not in done]
    say(f"{runs[0].suite}: {len(runs) - len(to_do)} of {len(runs)} runs done, {len(to_do)} to do")
    failed: list[str] = []
    left = len(to_do)
    for run in to_do:
        if deadline is not None and time.monotonic() >= deadline:
            break
        needed = done.get(run.needs.key) if run.needs else None
        if run.needs is not None and needed is None:
            say(f"  {run.label}: left out, {run.needs.label} has no result")
            continue
        begin = time.monotonic()
        try:
            line = train(
                run,
                needed,
                data=place.data,
                work=place.work,
                device=place.device,
                deadline=deadline,
            )
        except (FileNotFoundError, ModuleNotFoundError):
            raise
        except Exception:
            say(f"  {run.label}: failed\n{traceback.format_exc()}")
            failed.append(run.label)
            continue
        if line is None:
            say(f"  {run.label}: stopped in the middle, its checkpoint is kept")
            break
        results.append(line)
        done[run.key] = line
        left -= 1
        say(f"  {run.label}: {describe(line)}; {time.monotonic() - begin:.0f} s, {left} left")
    return Outcome(left, tuple(failed))


def describe(line: Line) -> str:
    """Return a finished run's result in a few words."""
    best = line.get("test_best")
    if not best:
        return "done"
    result = ", ".join(f"test {name} {value}" for name, value in best.items())
    share = line["flops"] / (line["full_step_flops"] * line["task"]["steps"])
    return f"{result}, {line['seconds']:.1f} s of training, {share:.0%} of the full run's FLOPs"
