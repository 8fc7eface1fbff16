"""Ledgers: what a run's training and its probes have cost so far, counted and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_mat import flops

if TYPE_CHECKING:
    from lightning_mat.parallel.ranks import Ranks

_SUMS = ("flops", "seconds", "shares", "batches")


class Ledger:
    """Adds up FLOPs, seconds and the share of units trained, batch by batch.

    Counting operations slows a batch down, and a batch of the same episode costs the same per
    sample: only the first batch after :meth:`switch` is counted, with a backward pass. One without,
    whose training step returned None, is counted for itself.

    Args:
        remember: Whether a decision that was counted once is not counted again, for policies that
            decide in every step and come back to a few decisions.

    Attributes:
        flops_per_sample: Of a batch with the decision that holds.
    """

    def __init__(self, *, remember: bool = False) -> None:
        self.flops_per_sample = 0.0
        self._remember = remember
        self._known: dict[str, float] = {}
        self._sums = dict.fromkeys(_SUMS, 0.0)
        self._due = True
        self._counting = ExitStack()
        self._counter: flops.FlopCount | None = None
        self._start = 0.0
        self._backward = False
        self.running = False

    def switch(self, active: Tensor) -> None:
        """Count the next batch, in which other units train, unless its cost is remembered."""
        known = self._known.get(_key(active))
        self._due = known is None
        if known is not None:
            self.flops_per_sample = known

    def begin(self) -> None:
        """Note the beginning of a batch."""
        self.close()
        self.running = True
        if self._due:
            self._counter = self._counting.enter_context(flops.count())
        self._backward = False
        self._start = time.perf_counter()

    def backward(self) -> None:
        """Note that the batch has a backward pass."""
        self._backward = True

    def end(self, samples: int, active: Tensor) -> bool:
        """Note the end of a batch.

        Args:
            samples: Of the batch.
            active: Which units trained, bool, shape ``[L]``.

        Returns:
            Whether this batch was counted, and the others of its episode cost the same.
        """
        self.running = False
        seconds = time.perf_counter() - self._start
        counter, self._counter = self._counter, None
        counted = counter is not None and self._backward
        spent = self.flops_per_sample * samples
        if counter is not None:
            self._counting.close()
            spent = float(counter.total)
        if counted:
            self.flops_per_sample = spent / samples
            self._due = False
            if self._remember:
                self._known[_key(active)] = self.flops_per_sample
        share = float(active.double().mean())
        batch = (spent, seconds, share, 1.0)
        for name, value in zip(_SUMS, batch, strict=True):
            self._sums[name] += value
        return counted

    def close(self) -> None:
        """Stop counting, also in the middle of a batch."""
        self.running = False
        self._counter = None
        self._counting.close()

    @property
    def flops(self) -> int:
        """FLOPs of all batches."""
        return round(self._sums["flops"])

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all batches."""
        return self._sums["seconds"]

    @property
    def trained_share(self) -> float:
        """Mean share of the units that trained, over the batches; 1.0 before the first."""
        batches = self._sums["batches"]
        return self._sums["shares"] / batches if batches else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and what was counted last, plain numbers."""
        counted = None if self._due else self.flops_per_sample
        return {**self._sums, "flops_per_sample": counted, "known": dict(self._known)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from saved sums, and without counting again what was counted."""
        self._sums = {name: float(state[name]) for name in _SUMS}
        counted = state.get("flops_per_sample")
        self._due = counted is None
        self.flops_per_sample = 0.0 if counted is None else float(counted)
        self._known = {key: float(value) for key, value in state.get("known", {}).items()}


def _key(active: Tensor) -> str:
    """Return what tells units that train from others."""
    return active.numpy().tobytes().hex()


class ProbeLedger:
    """Adds up FLOPs and seconds of probes.

    Counting slows a probe down, and probes of the same units cost the same: one is counted. The
    look at the model that comes before it is charged with it. A resumed run looks once more, and is
    charged as one that was never stopped.

    Args:
        ranks: The processes that probe together. FLOPs are the mean over them: what one of them
            saves goes for all.

    Attributes:
        flops: Of all probes.
        seconds: Wall clock, also of probes that failed.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.flops, self.seconds = 0, 0.0
        self._ranks = ranks
        self._of_one: int | None = None
        self._look: tuple[int, float] | None = None

    @property
    def lacks_look(self) -> bool:
        """Whether the next probe is counted, and no look came before it."""
        return self._of_one is None and self._look is None

    @contextmanager
    def look(self) -> Iterator[None]:
        """Count and time a look at the model, which the next probe that is counted is charged."""
        start = time.perf_counter()
        with flops.count() as counter:
            yield
        self._look = self._mean(counter.total), time.perf_counter() - start

    @contextmanager
    def probe(self, *, lasts: bool) -> Iterator[None]:
        """Time a probe, and count it unless its cost is known.

        Args:
            lasts: Whether the probes that follow cost the same.
        """
        counting: AbstractContextManager[flops.FlopCount | None]
        counting = flops.count() if self._of_one is None else nullcontext()
        start = time.perf_counter()
        try:
            with counting as counter:
                yield
        finally:
            self.seconds += time.perf_counter() - start
        of_one = self._of_one or 0
        if counter is not None:
            of_one = self._mean(counter.total)
            if self._look is not None:
                self.flops += self._look[0]
                self.seconds += self._look[1]
                self._look = None
        self.flops += of_one
        self._of_one = of_one if lasts else None

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {
            "probe_flops": self.flops,
            "probe_seconds": self.seconds,
            "flops_of_one": self._of_one,
            "processes": self._processes,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, others: bool = False) -> None:
        """Go on from saved sums, and without counting again what was counted.

        Args:
            state: Of :meth:`state_dict`.
            others: Whether it is of other units.
        """
        self.flops, self.seconds = int(state["probe_flops"]), float(state["probe_seconds"])
        known = not others and state.get("processes") == self._processes
        self._of_one = state.get("flops_of_one") if known else None

    @property
    def _processes(self) -> int:
        return 1 if self._ranks is None else self._ranks.size

    def _mean(self, count: int) -> int:
        if self._ranks is None:
            return count
        return int(self._ranks.sum(torch.tensor(count))) // self._ranks.size
