"""The callback's events in any order keep what MAT promises.

Batches with and without a probe, probes in which memory runs out or which are interrupted, steps,
batches that accumulate or whose step loss scaling skips, errors, saves (in a probe, too), loads,
stops, fits anew.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from lightning_mat import MAT
from lightning_mat.mntk.probe import Probe
from lightning_mat.report.store import read
from tests.faults.stub import Trainer
from tests.faults.twins import (
    EVERY,
    Asked,
    Calendar,
    Drawn,
    batch,
    network,
    optimizer_of,
    same,
    stored,
    units_of,
)
from tests.reference.optim import SlabOracle

PROBES = ("whole", "saved", "saved when decided", "whole", "no memory", "interrupted")
"""What happens in the probe, if the batch begins with one."""
ENDS = (*["steps"] * 5, "accumulates", "accumulates", "scaling skips", "raises")
"""How a batch ends."""
seeds = st.integers(0, 2**16)
batches = st.tuples(seeds, st.booleans(), st.sampled_from(PROBES), st.sampled_from(ENDS))


class Machine(RuleBasedStateMachine):
    """One model, trained through the callback's hooks and by an optimizer per slab.

    ``stopped`` says that no fit runs: then the model is an ordinary one, which plain steps train.
    """

    @initialize(seed=seeds)
    def begin(self, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = network()
        self.plain = copy.deepcopy(self.net)
        self.folder = tempfile.TemporaryDirectory()
        self.saved: Any = None
        self.fit()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def fit(self, callback: Asked | None = None) -> None:
        """Begin a fit, with an optimizer of its own, as ``Trainer.fit`` does."""
        self.start(None, callback)
        self.oracle = SlabOracle(self.net, self.mat.part, lambda _, slabs: optimizer_of(slabs))
        self.plain.load_state_dict(self.net.state_dict())
        self.twin: torch.optim.Optimizer | None = optimizer_of(self.plain.parameters())
        self.calendar, self.sums = Calendar(), self.nothing(self.net)
        # The shares of the batches, the steps of the probes, and those in the spectra file.
        self.shares: list[float] = []
        self.probed: list[int] = []
        self.filed: list[int] = []

    def start(self, saved: Any, callback: Asked | None = None) -> None:
        options: dict[str, Any] = {"every_n_steps": EVERY, "warmup_epochs": 0, "n_samples": 5}
        callback = callback or Asked(units_of(self.net), policy=Drawn(), **options)
        optimizer = optimizer_of(self.net.parameters())
        self.trainer = Trainer(self.net, callback, optimizer, Path(self.folder.name))
        before = torch.get_rng_state()
        self.trainer.start(saved)
        assert torch.equal(torch.get_rng_state(), before)
        assert callback.mat is not None
        self.callback, self.mat, self.stopped = callback, callback.mat, False

    def everything(self) -> list[Tensor]:
        state = self.trainer.optimizers[0].state_dict()["state"]
        moments = [value for entry in state.values() for value in entry.values()]
        parameters = [p.detach() for p in self.net.parameters()]
        return [value.clone() for value in (*parameters, *moments, torch.get_rng_state())]

    def nothing(self, net: nn.Module) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) for name, p in net.named_parameters()}

    def gradients(self, net: nn.Module) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in net.named_parameters()
        }

    @precondition(lambda self: not self.stopped)
    @rule(several=st.lists(batches, min_size=2, max_size=6))
    def train(self, several: list[tuple[int, bool, str, str]]) -> None:
        for seed, asked, probe, end in several:
            if not self.stopped:
                self.batch(seed, asked, probe, end)

    def batch(self, seed: int, asked: bool, probe: str, end: str) -> None:
        x = batch(seed)
        self.callback.asked = asked
        if not self.begin_batch(x, asked, probe):
            return
        active = self.mat.active.tolist()
        self.backward(x, active)
        if end == "raises":
            self.fail(ValueError("mine"))
            return
        if end == "steps":
            self.step(active)
        elif end == "scaling skips":
            before = self.everything()
            self.zero_grad()
            assert all(map(torch.equal, before, self.everything()))
        self.trainer.global_step += end != "accumulates"
        self.calendar.stepped = end != "accumulates"
        self.trainer.end_batch(x)
        self.shares.append(sum(active) / len(active))

    def begin_batch(self, x: Tensor, asked: bool, probe: str) -> bool:
        """Let an episode begin where one is due; return False if that ended the fit."""
        step = self.trainer.global_step
        before, decision, counts = self.everything(), self.mat.decision, self.counts()
        begins = self.calendar.begins(step, asked)
        measure, apply = Probe._measure, MAT.apply

        def measured(*args: Any) -> Any:
            if probe == "no memory":
                raise MemoryError
            if probe == "interrupted":
                raise KeyboardInterrupt
            if probe == "saved":
                self.save()
            return measure(*args)

        def applied(*args: Any) -> None:
            if probe == "saved when decided":
                self.save()
            apply(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Probe, "_measure", measured)
            patch.setattr(MAT, "apply", applied)
            try:
                self.trainer.begin_batch(x)
            except KeyboardInterrupt as error:
                assert begins
                assert self.mat.decision is decision
                self.fail(error)
                return False
        assert all(map(torch.equal, before, self.everything()))
        skips = probe == "no memory"
        wanted = (begins and not skips, begins and skips)
        assert self.counts() == tuple(a + b for a, b in zip(counts, wanted, strict=True))
        if wanted[0]:
            self.probed.append(step)
            self.filed = [*(s for s in self.filed if s < step), step]
        else:
            assert self.mat.decision is decision
        if begins:
            self.calendar.decided_at, self.calendar.waiting = step, False
        return True

    def counts(self) -> tuple[int, int]:
        summary = self.callback.summary()
        return int(summary["probes"]), int(summary["skipped_probes"])

    def backward(self, x: Tensor, active: list[bool]) -> None:
        """Add a batch's gradients up, and compare them with the plain ones, cut."""
        plain = copy.deepcopy(self.net)
        plain.zero_grad()
        plain(x).square().sum().backward()
        for name, grad in self.gradients(plain).items():
            self.sums[name] += grad
        self.trainer.backward(self.net(x).square().sum())
        if self.twin is not None:
            self.plain(x).square().sum().backward()
        cut = {name: grad.clone() for name, grad in self.sums.items()}
        for unit, trains in zip(self.mat.part, active, strict=True):
            for piece in unit.slices:
                if not trains:
                    cut[piece.param][piece.start : piece.stop] = 0
        for name, grad in self.gradients(self.net).items():
            torch.testing.assert_close(grad, cut[name])

    def step(self, active: list[bool]) -> None:
        self.trainer.optimizers[0].step()
        self.oracle.step(dict(self.sums), active)
        if not all(active):
            self.twin = None
        if self.twin is not None:
            self.twin.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.trainer.optimizers[0].zero_grad()
        self.plain.zero_grad()
        self.sums = self.nothing(self.net)

    def fail(self, error: BaseException) -> None:
        self.trainer.fail(error)
        self.stopped = True
        self.zero_grad()

    @precondition(lambda self: not self.stopped)
    @rule()
    def stop(self) -> None:
        self.trainer.end()
        self.stopped = True
        self.zero_grad()

    @precondition(lambda self: self.stopped)
    @rule(seed=seeds)
    def plain_step(self, seed: int) -> None:
        everything = [True] * len(self.mat.part)
        self.net(batch(seed)).square().sum().backward()
        self.sums = self.gradients(self.net)
        if self.twin is not None:
            self.plain(batch(seed)).square().sum().backward()
        self.step(everything)

    @rule()
    def save(self) -> None:
        """Save between two batches, in a probe, or after an error."""
        twin = None if self.twin is None else (self.plain, self.twin)
        shadow = self.oracle, twin, self.calendar, self.shares, self.probed
        self.saved = stored(self.trainer.checkpoint()), copy.deepcopy(shadow)
        assert self.saved[0]["callback"]["mat"]["history"]["step"] == self.probed

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        checkpoint, shadow = copy.deepcopy(self.saved)
        self.net = network()
        self.start(checkpoint)
        self.oracle, twin, self.calendar, self.shares, self.probed = shadow
        self.twin = None
        if twin is not None:
            self.plain, self.twin = twin
        self.calendar.stepped = True  # gradients are not part of a checkpoint
        self.zero_grad()
        assert same(self.callback.state_dict(), copy.deepcopy(self.saved)[0]["callback"])
        step = self.trainer.global_step
        self.filed = [s for s in self.filed if s <= step] if step else self.steps_in_the_file()

    @precondition(lambda self: self.stopped)
    @rule(anew=st.booleans())
    def fit_again(self, anew: bool) -> None:
        self.fit(None if anew else self.callback)

    def steps_in_the_file(self) -> list[int]:
        path = Path(self.folder.name) / "mat" / "spectra.npz"
        return read(path).step.tolist() if path.exists() else []

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

    @invariant()
    def a_model_that_no_fit_trains_is_an_ordinary_one(self) -> None:
        if getattr(self, "stopped", False):
            assert not any("forward" in module.__dict__ for module in self.net.modules())
            assert self.net.training

    @invariant()
    def what_is_kept_and_counted_is_what_happened(self) -> None:
        if not hasattr(self, "filed"):
            return
        assert self.mat.history.step == self.probed
        assert self.steps_in_the_file() == self.filed
        share = self.callback.summary()["trained_share"]
        assert share == pytest.approx(sum(self.shares) / len(self.shares) if self.shares else 1)


def case(examples: int, steps: int, *, derandomize: bool) -> Any:
    """Return a test of so many random orders of so many events."""
    test = pytest.mark.filterwarnings("ignore")(type("Case", (Machine.TestCase,), {}))
    test.settings = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=derandomize
    )
    return test


# The same orders in every run; `make soak` searches for others.
TestMachine = case(12, 12, derandomize=True)
