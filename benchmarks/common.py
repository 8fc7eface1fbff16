"""What every benchmark shares: interleaved timing, peak memory, results with their environment."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_mat.report.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"


#: glibc's settings under which a process keeps the memory that it has freed.
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def keep_freed_memory() -> None:
    """Begin this process anew, once, with glibc told to keep freed memory at hand.

    By default it hands large blocks back to the system, and the next step that asks for them waits
    until the system has cleared every page: the most uneven part of a step. Settings of
    ``MALLOC_MMAP_MAX_`` that are there already stay. Without glibc it changes nothing.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
        again = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **KEEPING})


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 11,
    warmup: int = 2,
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Return the seconds of each function, one value per round.

    Every round runs every function once, in turning order, so that a machine that slows down or is
    shared slows all of them: compare within rounds, see :func:`ratio`.

    Args:
        functions: Name → what to time; it must leave nothing behind that changes the next call.
        rounds: Timed calls of each.
        warmup: Calls of each that are not timed.
        device: Device on which they work; its queue is drained around each call.

    Raises:
        ValueError: If there is nothing to time.
    """
    if not functions or rounds < 1:
        raise ValueError(
            f"need at least one function and one round, got {len(functions)} and {rounds}"
        )
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            _drain(device)
            start = time.perf_counter()
            functions[name]()
            _drain(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
        _progress(turn + warmup + 1, rounds + warmup)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Return the median over the rounds of ``seconds[name] / seconds[base]``.

    Example:
        >>> ratio({"a": [2.0, 3.0, 40.0], "b": [1.0, 1.0, 10.0]}, "a", "b")
        3.0
    """
    pairs = zip(seconds[name], seconds[base], strict=True)
    return statistics.median(a / b for a, b in pairs)


def summary(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float | int]]:
    """Return median, least and greatest seconds and the rounds of every name."""
    return {
        name: {
            "median_seconds": statistics.median(values),
            "min_seconds": min(values),
            "max_seconds": max(values),
            "rounds": len(values),
        }
        for name, values in seconds.items()
    }


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """Return the bytes that a call needs at its peak on top of what was held before it.

    On CUDA these are the bytes of torch's allocator. On the CPU they are the resident pages of the
    process, allocators' overhead among them; None where the system does not tell (not Linux).
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        _drain(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        _drain(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # Give freed pages back first: reused ones would not show.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


def write_result(
    name: str,
    content: Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
) -> Path:
    """Write ``<folder>/<name>.json``: the content and its environment; return the path.

    The folder is ``benchmarks/results`` if none is given.

    Raises:
        ValueError: If the content has a NaN or an infinity, which JSON has no word for.
    """
    result = {"schema": 1, **content, "environment": environment(device)}
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _drain(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rround {done} of {total}", end=end, file=sys.stderr, flush=True)
