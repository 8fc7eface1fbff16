"""What goes wrong in a probe costs the probe, and not the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mat import MATCallback, mntk, partition, policies
from lightning_mat.mntk import passes, probe, quiet
from lightning_mat.mntk.accumulate import Accumulator
from lightning_mat.mntk.collect import Collector
from lightning_mat.mntk.memory import ProbeMemoryError
from lightning_mat.mntk.probe import Probe
from lightning_mat.mntk.scalars import Scalars
from lightning_mat.mntk.tape import Tape
from lightning_mat.report.store import read
from tests.lightning_models import Points, Small, Watch, data, mat, model, trainer

CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ...")
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

HALVED = {
    "forward": (Scalars, "collapsed"),
    "backward": (Tape, "backward"),
    "product": (Collector, "_take"),
    "Gram": (Accumulator, "add"),
    "eigenvalues": (Accumulator, "finish"),
}
# What takes as much memory for one sample at a time as for all.
AROUND = {
    "samples to the device": (probe, "to_device"),
    "copies of the buffers": (quiet, "_kept_buffers"),
    "first look": (passes, "look"),
    "alignment": (probe, "loss_alignment"),
}
STAGES = {**HALVED, **AROUND}


def failing(
    monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception, fails: Callable[[int], bool]
) -> list[int]:
    """Let a stage of a probe fail in the calls that a function of their number names."""
    owner, name = STAGES[stage]
    function = getattr(owner, name)
    calls: list[int] = []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if fails(calls[-1]):
            raise error
        return function(*args, **options)

    monkeypatch.setattr(owner, name, failing)
    return calls


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("error", [CPU, GPU, MemoryError()])
@pytest.mark.parametrize("stage", HALVED)
def test_out_of_memory_halves_the_samples_per_pass(
    stage: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = net(), torch.randn(8, 6)
    part = partition(module, "layers")
    expected = mntk(module, x, part)
    measuring = Probe(module, part)
    measuring.prepare(x)
    failing(monkeypatch, stage, error, lambda call: call < 2)
    sizes: list[int] = []
    measure = Probe._measure
    monkeypatch.setattr(
        Probe, "_measure", lambda p, b, s, micro: sizes.append(micro) or measure(p, b, s, micro)
    )
    found = measuring.measure(x)
    assert sizes == [8, 4, 2]
    torch.testing.assert_close(found.lambda_max, expected.lambda_max, rtol=1e-4, atol=0)
    assert all(p.requires_grad for p in module.parameters())
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize("error", [CPU, GPU])
@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_to_the_last_sample_skips_the_probe(
    stage: str, error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = False
    calls = failing(monkeypatch, stage, error, lambda call: started)

    class Shrinking(MATCallback):
        """Memory runs out in the second of three probes."""

        def _begin_episode(self, trainer: Any, pl_module: Any, batch: Any) -> None:
            nonlocal started
            started = trainer.current_epoch == 2
            if stage == "first look" and self.mat is not None:
                self.mat.probe._passes.look = None  # as if a layer had been added
            super()._begin_episode(trainer, pl_module, batch)

    policy = policies.MAT("auto", criterion="trainability") if stage == "alignment" else None
    options = {"alpha": "auto"} if policy is None else {"policy": policy, "output": "loss"}
    callback = Shrinking(units="layers", n_samples=8, **options)
    watch = Watch(callback)
    with pytest.warns(UserWarning, match="probe at step 12.*does not fit") as caught:
        trainer(tmp_path, callback, watch).fit(model(), data())
    assert sum("skipping this probe" in str(w.message) for w in caught) == 1
    assert callback.summary()["probes"] == 2
    assert callback.summary()["skipped_probes"] == 1
    assert callback.mat is not None
    assert callback.mat.history.step == read(tmp_path / "mat/spectra.npz").step.tolist() == [6, 18]
    assert watch.active[11] == watch.active[12] != [True] * 3
    assert watch.moved == watch.active
    assert calls


def test_out_of_memory_at_the_first_look_is_an_error_at_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing(monkeypatch, "backward", CPU, lambda call: True)
    module = model()
    with pytest.raises(ProbeMemoryError, match="lower n_samples"):
        trainer(tmp_path, mat()).fit(module, data())
    assert not any("forward" in m.__dict__ for m in module.modules())


class Unreadable(Points):
    """Some samples cannot be read, from the n-th read on."""

    def __init__(self, error: Exception, reads: int, bad: range = range(96)) -> None:
        super().__init__(96)
        self.error, self.reads, self.bad = error, reads, bad

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads -= 1
        if self.reads < 0 and index % 96 in self.bad:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "error", [OSError("no such image"), ValueError("bad text"), KeyError("label"), MemoryError()]
)
def test_samples_that_cannot_be_read_skip_the_probe_again_and_again(
    error: Exception, tmp_path: Path
) -> None:
    # Readable at the start and in the first probe.
    probe_data = DataLoader(Unreadable(error, 16), batch_size=8)
    callback = mat(probe_data=probe_data)
    with pytest.warns(UserWarning, match=f"{type(error).__name__}.*skipping") as caught:
        trainer(tmp_path, callback).fit(model(), data())
    steps = [w for w in caught if "skipping this probe" in str(w.message)]
    assert ["step 12" in str(w.message) for w in steps] == [True, False]
    summary = callback.summary()
    assert (summary["probes"], summary["skipped_probes"]) == (1, 2)


def test_after_a_bad_sample_other_samples_are_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    drawn = mat(n_samples=48)
    trainer(tmp_path / "a", drawn).fit(model(), data())
    probe_data = DataLoader(Unreadable(OSError("bad"), 96, range(3)), batch_size=8)
    callback = mat(n_samples=48, probe_data=probe_data, every_n_steps=1)
    with pytest.warns(UserWarning, match="skipping"):
        trainer(tmp_path / "b", callback).fit(model(), data())
    assert callback.summary()["probes"] > 1
    assert callback.summary()["skipped_probes"] > 1


@pytest.mark.parametrize("error", [TypeError, AttributeError, NotImplementedError, NameError])
def test_mistakes_in_a_data_set_are_raised(error: type[Exception], tmp_path: Path) -> None:
    probe_data = DataLoader(Unreadable(error("mine"), 16), batch_size=8)
    module = model()
    with pytest.raises(error, match="mine"):
        trainer(tmp_path, mat(probe_data=probe_data)).fit(module, data())
    assert not any("forward" in m.__dict__ for m in module.modules())


@pytest.mark.parametrize("error", [TypeError, ValueError, RuntimeError])
def test_what_a_forward_of_the_users_raises_is_not_swallowed(
    error: type[Exception], tmp_path: Path
) -> None:
    probing = False

    def forward(module: Small, batch: Any) -> Tensor:
        if probing and module.trainer.current_epoch == 2:
            raise error("mine")
        return module(batch[0])

    callback = mat(forward=forward)
    probing = True
    with pytest.raises(error, match="mine"):
        trainer(tmp_path, callback).fit(model(), data())


def test_a_data_set_that_shrinks_below_n_samples_skips_the_probe(tmp_path: Path) -> None:
    loader = DataLoader(Points(12), batch_size=4)
    callback = mat(probe_data=loader)

    class Shrink(Watch):
        def on_train_epoch_start(self, *_: Any) -> None:
            loader.dataset.x = loader.dataset.x[:7]  # type: ignore[attr-defined]

    with pytest.warns(UserWarning, match="n_samples is 8.*has 7 samples.*skipping"):
        trainer(tmp_path, callback, Shrink(callback)).fit(model(), data())
    assert callback.summary()["probes"] == 0


def test_an_interrupted_probe_leaves_a_model_without_gates(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, callback = model(), mat()
    before = {name: set(m.__dict__) for name, m in module.net.named_modules()}
    backward, fit = Tape.backward, trainer(tmp_path, callback)

    def interrupted(*args: Any, **options: Any) -> None:
        if fit.global_step == 12:  # in the second probe, with units at rest
            raise KeyboardInterrupt
        backward(*args, **options)

    monkeypatch.setattr(Tape, "backward", interrupted)
    with pytest.raises(SystemExit):
        fit.fit(module, data())
    assert callback.summary()["probes"] == 1
    assert {name: set(m.__dict__) for name, m in module.net.named_modules()} == before
    assert all(p.requires_grad for p in module.parameters())
    assert module.training
    module.zero_grad()
    module(torch.randn(4, 6)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
