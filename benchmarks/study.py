"""One model's training step, measured: gated, and under what a user would pick instead."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.activations import saved_bytes
from benchmarks.common import interleaved, peak_memory, ratio, summary
from benchmarks.counted import split_seconds
from benchmarks.models import Workload
from benchmarks.rivals import RIVALS
from lightning_mat import flops
from lightning_mat.gate import Gate
from lightning_mat.optim import MATOptimizer
from lightning_mat.policies import History, Random, UnitTable
from lightning_mat.units import Partition, partition

#: What products run in: None for the parameters' own precision.
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16}


def choose(part: Partition, share: float) -> Tensor:
    """Return which units train: a share of every layer and kind, at least one."""
    if share == 1:
        return torch.ones(len(part), dtype=torch.bool)
    table = UnitTable(part.names, part.kinds, part.layers, torch.zeros(len(part)))
    return Random(share, seed=0).decide(History(), table, 0).active


@dataclass(frozen=True)
class Setting:
    """How everything is measured.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        rounds: Timed steps of each way.
        skips: Ways of skipping, see :class:`lightning_mat.Gate`.
        precision: One of :data:`PRECISIONS`.
        quick: Tiny sizes.
        batch_size: Samples of a step; None for the model's own.
        dropout: Probability; None for the model's own.
    """

    device: str
    rounds: int
    skips: Sequence[str]
    precision: str = "float32"
    quick: bool = False
    batch_size: int | None = None
    dropout: float | None = None


@dataclass
class Way:
    """One way to train: a model, its optimizer, and what to do before a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[nn.Module], Tensor]
    before: Callable[[], None] = lambda: None
    compiled: nn.Module | None = None
    run_compiled: bool = False

    def compile(self, wanted: bool) -> None:
        """Run compiled, or not, from now on."""
        self.run_compiled = wanted
        if wanted and self.compiled is None:
            self.compiled = torch.compile(self.model)

    def step(self) -> None:
        """Run one training step."""
        self.before()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.compiled if self.run_compiled else self.model).backward()
        self.optimizer.step()

    def forward(self) -> Tensor:
        """Return the loss, not compiled."""
        self.before()
        return self.loss(self.model)


class Study:
    """The measurements of one model.

    Holds one plain model and one gated copy per way of skipping; decisions are switched between
    groups, outside of what is timed.
    """

    def __init__(self, workload: Workload, setting: Setting) -> None:
        """Make model and batch."""
        torch.manual_seed(0)
        self.workload, self.setting, self.device = workload, setting, setting.device
        self.kind = torch.device(setting.device).type
        self.sizes = dict(workload.quick if setting.quick else workload.full)
        usual = 3 if setting.quick else workload.batch_size[self.kind]
        self.batch_size = setting.batch_size or usual
        self.dropout = workload.dropout
        if setting.dropout is not None and self.dropout is not None:
            self.dropout = setting.dropout
        self.batch = workload.draw(self.batch_size, self.device, **self.sizes)
        model = workload.make(self.dropout, **self.sizes).to(self.device).train()
        self.part = partition(model, workload.units)
        self.plain = self.way(model)
        self.gated = {skip: self._gate(skip) for skip in setting.skips}
        self.rows: list[dict[str, Any]] = []
        self.rivals: list[dict[str, Any]] = []
        # What does not change between groups: counted FLOPs and saved bytes.
        self._counted: dict[object, dict[str, Any]] = {}
        self.full = self.count("plain", self.plain)
        counted, rest = split_seconds(self.plain.step, self.device)
        self.full["counted_share"] = counted / (counted + rest)

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of the batch."""
        dtype = PRECISIONS[self.setting.precision]
        with torch.autocast(self.kind, dtype, enabled=dtype is not None):
            return self.workload.loss(model, self.batch)

    def way(self, model: nn.Module) -> Way:
        """Return a way that trains a model with AdamW as torch has it by default."""
        return Way(model, torch.optim.AdamW(model.parameters(), 1e-4), self.loss)

    def _gate(self, skip: str) -> tuple[Gate, Way]:
        way = self.way(copy.deepcopy(self.plain.model))
        way.optimizer = MATOptimizer(way.optimizer, way.model, self.part)
        return Gate(way.model, self.part, skip=skip), way

    def count(self, key: object, way: Way, draws: int = 1) -> dict[str, Any]:
        """Return counted FLOPs and saved bytes of a step, the mean over some steps, run eagerly."""
        if key not in self._counted:
            compiled, way.run_compiled = way.run_compiled, False
            with flops.count() as counter:
                for _ in range(draws):
                    way.step()
            way.optimizer.zero_grad(set_to_none=True)
            saved = [saved_bytes(way.forward, way.model.parameters()) for _ in range(draws)]
            way.run_compiled = compiled
            self._counted[key] = {
                "flops": counter.total / draws,
                "saved_bytes": sum(s.activations for s in saved) / draws,
                "saved_weight_bytes": sum(s.weights for s in saved) / draws,
            }
        return dict(self._counted[key])

    def measure_share(self, share: float, compiled: bool) -> None:
        """Measure all ways of skipping at one share, beside the plain step."""
        active = choose(self.part, share)
        ways, rows = {"plain": self.plain}, {}
        self.plain.compile(compiled)
        for skip, (gate, way) in self.gated.items():
            way.compile(compiled)
            way.optimizer.zero_grad(set_to_none=True)
            gate.apply(active)
            way.optimizer.apply(active)
            ways[skip] = way
            rows[skip] = {
                "skip": skip,
                "compiled": compiled,
                "share": share,
                "trained_share": float(active.double().mean()),
                **self.count((skip, share), way),
            }
        # Steps after a switch may compile, and allocate what the decision needs.
        first = {name: _seconds(way.step, self.device) for name, way in ways.items()}
        self._time(ways, rows)
        if compiled:
            for name, row in rows.items():
                row["first_step_seconds"] = first[name]
                row["plain_first_step_seconds"] = first["plain"]
        else:
            steps = {name: way.optimizer.step for name, way in ways.items()}
            seconds = interleaved(steps, rounds=self.setting.rounds, warmup=1, device=self.device)
            spent = {name: split_seconds(way.step, self.device) for name, way in ways.items()}
            for name, row in rows.items():
                row["optimizer_time_ratio"] = ratio(seconds, name, "plain")
                row["counted_time_ratio"] = spent[name].counted / spent["plain"].counted
                row["rest_time_ratio"] = spent[name].rest / spent["plain"].rest
        self._peaks(ways, rows)
        self.rows += rows.values()

    def measure_rivals(self, share: float) -> None:
        """Measure what a user would pick instead at one share, beside the plain step."""
        active = choose(self.part, share)
        self.plain.compile(False)
        ways, rows = {"plain": self.plain}, {}
        for name, (make, what) in RIVALS.items():
            way = self.way(copy.deepcopy(self.plain.model))
            rival = make(self.workload, way.model, self.part, active, share)
            if rival is None:
                continue
            way.before = rival.before_step
            ways[name] = way
            rows[name] = {
                "name": name,
                "what": what,
                "share": share,
                "trained_share": rival.trained_share,
                **self.count((name, share), way, rival.draws),
            }
        self._time(ways, rows)
        self._peaks(ways, rows)
        self.rivals += rows.values()

    def _time(self, ways: Mapping[str, Way], rows: Mapping[str, dict[str, Any]]) -> None:
        steps = {name: way.step for name, way in ways.items()}
        # Until every way has its memory at hand.
        warmup = 1 if self.setting.quick else 3
        seconds = interleaved(steps, rounds=self.setting.rounds, warmup=warmup, device=self.device)
        found = summary(seconds)
        for name, row in rows.items():
            row["flops_ratio"] = row["flops"] / self.full["flops"]
            row["time_ratio"] = ratio(seconds, name, "plain")
            promised = 1 - row["flops_ratio"]
            row["efficiency"] = (1 - row["time_ratio"]) / promised if promised > 0.01 else None
            row["saved_ratio"] = row["saved_bytes"] / self.full["saved_bytes"]
            row["seconds"], row["plain_seconds"] = found[name], found["plain"]

    def _peaks(self, ways: Mapping[str, Way], rows: Mapping[str, dict[str, Any]]) -> None:
        """Measure peak memory: last, because it gives freed memory back to the system."""
        peak = {}
        for name, way in ways.items():
            way.optimizer.zero_grad(set_to_none=True)
            peak[name] = peak_memory(way.step, self.device)
        for name, row in rows.items():
            row["peak_bytes"], row["plain_peak_bytes"] = peak[name], peak["plain"]
            row["peak_ratio"] = peak[name] / peak["plain"] if peak["plain"] else None


def _seconds(function: Callable[[], object], device: str) -> float:
    return interleaved({"": function}, rounds=1, warmup=0, device=device)[""][0]
