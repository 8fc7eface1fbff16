"""The model of the state machine, its units and policy, and what it is compared with."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mat import MATCallback, Partition, Slice, Unit
from lightning_mat.policies import Decision, History, UnitTable
from tests.faults.stub import Module

EVERY = 2
"""Steps per episode."""


class Drawn:
    """Any units may train, also all or none: a pure function of what was measured last."""

    needs_spectra = True

    def decide(self, history: History, units: UnitTable, episode: int) -> Decision:
        draw = random.Random(f"machine {history.lambda_max[-1].tolist()}")
        share = draw.choice([0.0, 0.5, 0.5, 1.0])
        active = torch.tensor([draw.random() < share for _ in units.names])
        return Decision(active, ("random",) * len(units), {}, units.kinds)


class Asked(MATCallback):
    """A calendar of one's own beside the callback's."""

    asked = False

    def should_probe(self, trainer: Any, batch_idx: int) -> bool:
        own = self.asked and self.schedule.decided_at != trainer.global_step
        return own or super().should_probe(trainer, batch_idx)


def network() -> Module:
    return Module(
        nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
    ).double()


def optimizer_of(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.05, weight_decay=0.1)


def units_of(net: nn.Module) -> Partition:
    """Return halves of layers, and a whole one; the last belongs to no unit and always trains."""
    units = [Unit("2", "layer", "2", (Slice("2.weight"), Slice("2.bias")))]
    for layer in ("0", "3"):
        for start in (0, 2):
            slices = tuple(Slice(f"{layer}.{p}", 0, start, start + 2) for p in ("weight", "bias"))
            units.append(Unit(f"{layer}.{start}", "layer", layer, slices))
    return Partition(units, net)


def stored(state: Any) -> Any:
    """Return what a checkpoint of a state loads as."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def batch(seed: int, samples: int = 5) -> Tensor:
    return torch.randn(samples, 3, dtype=torch.float64, generator=generator(seed))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a: Any, b: Any) -> bool:
    """Return whether two states of tensors and plain types are equal, to the bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Calendar:
    """When an episode begins, said once more: in so many steps, or when asked; between steps."""

    def __init__(self) -> None:
        self.decided_at, self.waiting, self.stepped = -EVERY, False, True

    def begins(self, step: int, asked: bool) -> bool:
        """Return whether an episode begins before a batch after so many steps."""
        due = asked and self.decided_at != step
        self.waiting = self.waiting or due or step - self.decided_at >= EVERY
        return self.waiting and self.stepped
