"""Whether every thread of this process has a core of its own.

The CPUs of a virtual machine may for seconds or minutes be threads of one core, as its host places
them. Arithmetic then takes up to twice as long, and what waits for memory does not, so that a ratio
of the two moves by more than what a benchmark wants to tell: an optimizer that works block by block
in the caches takes twice its share of one that streams whole tensors through memory.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

#: Elements that one thread works on alone, fewer than torch divides; so many times as many are
#: divided evenly among as many threads.
ALONE = 32_000

#: Above it, threads share cores. With cores of their own it is 1, with half a core each 2.
SHARED_ABOVE = 1.3


def slowdown(repeats: int = 9) -> float:
    """Return how much longer all threads take for as much arithmetic each as one of them alone."""
    one = torch.ones(ALONE)
    every = torch.ones(ALONE * torch.get_num_threads())
    alone, together = [], []
    for _ in range(repeats):
        alone.append(_seconds(one))
        together.append(_seconds(every))
    return statistics.median(together) / statistics.median(alone)


def apart() -> bool:
    """Return whether every thread has a core of its own now; it takes some milliseconds."""
    return torch.get_num_threads() == 1 or slowdown() < SHARED_ABOVE


def wait(limit: float = 60.0) -> bool:
    """Wait until every thread has a core of its own, so many seconds at most; return whether."""
    stop = time.monotonic() + limit
    while not (found := apart()) and time.monotonic() < stop:
        time.sleep(1)
    return found


def _seconds(tensor: Tensor) -> float:
    start = time.perf_counter()
    torch.digamma(tensor)  # much arithmetic for each element, and it is divided among threads
    return time.perf_counter() - start
