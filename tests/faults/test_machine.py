"""Probes, steps, skipped steps, saves, loads and stops in any order keep what MAT promises."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from lightning_mat import MAT, Partition, Slice, Unit
from lightning_mat.mntk.probe import Probe
from lightning_mat.policies import Decision, History, UnitTable
from tests.reference.optim import SlabOracle

seeds = st.integers(0, 2**16)


class Drawn:
    """Any units may train, also all or none: a pure function of what was measured last."""

    needs_spectra = True

    def decide(self, history: History, units: UnitTable, episode: int) -> Decision:
        draw = random.Random(f"machine {history.lambda_max[-1].tolist()}")
        share = draw.choice([0.0, 0.5, 0.5, 1.0])
        active = torch.tensor([draw.random() < share for _ in units.names])
        return Decision(active, ("random",) * len(units), {}, units.kinds)


def network() -> nn.Sequential:
    return nn.Sequential(
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


class Machine(RuleBasedStateMachine):
    """One model, trained by MAT and by an optimizer per slab."""

    @initialize(seed=seeds)
    def begin(self, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = network()
        self.plain = copy.deepcopy(self.net)
        self.mat = self.engine(self.net)
        self.twin: torch.optim.Optimizer | None = optimizer_of(self.plain.parameters())
        self.oracle = SlabOracle(self.net, self.mat.part, lambda _, slabs: optimizer_of(slabs))
        self.stopped = False
        self.saved: Any = None
        self.steps = 0

    def engine(self, net: nn.Module) -> MAT:
        return MAT(net, optimizer_of(net.parameters()), units_of(net), Drawn(), seed=1)

    def everything(self) -> list[Tensor]:
        state = self.mat.optimizers[0].state_dict()["state"]
        moments = [value for entry in state.values() for value in entry.values()]
        parameters = [p.detach() for p in self.net.parameters()]
        return [value.clone() for value in (*parameters, *moments, torch.get_rng_state())]

    def gradients(self, net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        net.zero_grad()
        net(x).square().sum().backward()
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in net.named_parameters()
        }

    @precondition(lambda self: not self.stopped)
    @rule(seed=seeds)
    def probe(self, seed: int) -> None:
        before = self.everything()
        self.mat.update(batch(seed), step=self.steps)
        assert all(map(torch.equal, before, self.everything()))

    @precondition(lambda self: not self.stopped)
    @rule(seed=seeds)
    def probe_without_memory(self, seed: int) -> None:
        def fails(*_: Any) -> Any:
            raise MemoryError

        decision, skipped = self.mat.decision, self.mat.skipped
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Probe, "_measure", fails)
            with pytest.warns(UserWarning, match="skipping"):
                self.mat.update(batch(seed), step=self.steps)
        assert self.mat.decision is decision
        assert self.mat.skipped == skipped + 1

    @rule(seed=seeds)
    def step(self, seed: int) -> None:
        active = [True] * len(self.mat.part) if self.stopped else self.mat.active.tolist()
        x = batch(seed)
        expected = self.gradients(copy.deepcopy(self.net), x)
        found = self.gradients(self.net, x)
        cut = {name: grad.clone() for name, grad in expected.items()}
        for unit, trains in zip(self.mat.part, active, strict=True):
            for piece in unit.slices:
                if not trains:
                    cut[piece.param][piece.start : piece.stop] = 0
        for name, grad in cut.items():
            torch.testing.assert_close(found[name], grad)
        self.mat.optimizers[0].step()
        self.oracle.step(dict(expected), active)
        self.steps += 1
        if not all(active):
            self.twin = None
        if self.twin is not None:
            self.gradients(self.plain, x)
            self.twin.step()

    @rule(seed=seeds)
    def skipped_step(self, seed: int) -> None:
        before = self.everything()
        self.gradients(self.net, batch(seed))
        self.mat.optimizers[0].zero_grad()
        assert all(map(torch.equal, before, self.everything()))

    @rule()
    def save(self) -> None:
        state = self.mat.state_dict(), self.mat.optimizers[0].state_dict(), self.net.state_dict()
        twin = None if self.twin is None else (self.plain, self.twin)
        self.saved = stored(state), copy.deepcopy((self.oracle, twin)), self.steps
        self.check_round_trip()

    def check_round_trip(self) -> None:
        again = stored(self.mat.state_dict())
        assert again["decision"]["active"].tolist() == self.mat.decision.active.tolist()
        assert again["history"]["step"] == self.mat.history.step
        assert torch.equal(again["history"]["lambda_max"], self.mat.history.lambda_max)

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        (mat, optimizer, weights), (oracle, twin), steps = copy.deepcopy(self.saved)
        self.mat.close()
        self.net = network()
        self.net.load_state_dict(weights)
        self.mat = self.engine(self.net)
        self.mat.load_state_dict(mat)
        self.mat.optimizers[0].load_state_dict(optimizer)
        self.oracle, self.steps, self.stopped = oracle, steps, False
        if twin is None:
            self.twin = None
        else:
            self.plain, self.twin = twin

    @precondition(lambda self: not self.stopped)
    @rule()
    def stop(self) -> None:
        self.mat.close()
        self.stopped = True
        assert not any("forward" in module.__dict__ for module in self.net.modules())

    @precondition(lambda self: self.stopped)
    @rule()
    def go_on(self) -> None:
        self.mat.apply()
        self.stopped = False

    @invariant()
    def weights_are_those_of_an_optimizer_per_slab(self) -> None:
        if not hasattr(self, "net"):
            return
        for name, parameter in self.net.named_parameters():
            torch.testing.assert_close(parameter.detach(), self.oracle.params[name])
            assert parameter.requires_grad

    @invariant()
    def everything_active_is_plain_training(self) -> None:
        if getattr(self, "twin", None) is not None:
            assert all(map(torch.equal, self.net.parameters(), self.plain.parameters()))


def case(examples: int, steps: int, *, derandomize: bool) -> Any:
    """Return a test of so many random orders of so many events."""
    test = pytest.mark.filterwarnings("ignore")(type("Case", (Machine.TestCase,), {}))
    test.settings = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=derandomize
    )
    return test


# The same orders in every run; `make soak` searches for others.
TestMachine = case(10, 12, derandomize=True)
