"""Checkpoints of other units, models that change, steps that are skipped, fits in a row."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_mat import MAT, MATOptimizer, Partition, Slice, Unit, mntk, partition, policies
from lightning_mat.mapping import marks_of, unit_diff
from lightning_mat.report.store import read
from tests.lightning_models import Small, Watch, data, mat, model, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Experiment logs")


def halves(net: nn.Module, *layers: int) -> Partition:
    """Return units of half a hidden layer each, of 16 neurons."""
    units = [
        Unit(f"net.{layer}.{side}", "layer", f"net.{layer}", slices)
        for layer in layers
        for side, a, b in (("low", 0, 8), ("high", 8, 16))
        for slices in [tuple(Slice(f"net.{layer}.{p}", 0, a, b) for p in ("weight", "bias"))]
    ]
    return Partition(units, net)


def saved(folder: Path, **options: Any) -> Path:
    """Return the checkpoint of a run of two epochs."""
    save = ModelCheckpoint(folder, save_last=True)
    fit = trainer(folder, mat(**options), save, max_epochs=2, enable_checkpointing=True)
    fit.fit(model(), data())
    return folder / "last.ckpt"


def test_a_checkpoint_holds_tensors_and_plain_types_alone(tmp_path: Path) -> None:
    state = torch.load(saved(tmp_path), weights_only=True)
    plain = Small()
    trainer(tmp_path / "b", max_epochs=3).fit(
        plain, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    before = state["state_dict"].values()
    assert not any(map(torch.equal, before, weights(plain)))  # all of them went on training


def test_a_checkpoint_of_other_units_is_refused_with_the_difference(tmp_path: Path) -> None:
    path = saved(tmp_path)
    module = Small()
    message = (
        r"1 only in the saved run \('net.4'\), 0 only in this one\. Resume .*on_partition_change"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "b", mat(units=lambda m: [u for u in units_of(m)[:2]])).fit(
            module, data(), ckpt_path=path
        )
    assert not any("forward" in m.__dict__ for m in module.modules())


def units_of(module: nn.Module) -> list[Unit]:
    return list(partition(module, "layers"))


def test_the_difference_lists_ten_names_of_each() -> None:
    words = unit_diff([f"old.{i}" for i in range(12)], [f"new.{i}" for i in range(10)])
    assert words.startswith("12 only in the saved run ('old.0', ")
    assert "'old.9', ...), 10 only in this one" in words
    assert "old.10" not in words
    assert words.endswith("'new.9')")


def test_a_checkpoint_of_other_units_is_mapped_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path, units=lambda m: units_of(m)[:2])
    old = torch.load(path, weights_only=True)["callbacks"]["MATCallback"]["mat"]
    callback = mat(on_partition_change="map")
    watch = Watch(callback)
    fit = trainer(tmp_path / "b", callback, watch, max_epochs=4)
    with pytest.warns(UserWarning, match=r"mapped by their names.*1 only in this one \('net.4'\)"):
        fit.fit(Small(), data(), ckpt_path=path)
    assert watch.moved == watch.active
    assert callback.mat is not None
    history = callback.mat.history
    assert history.step == [6, 12, 18]
    assert torch.equal(history.lambda_max[:1, :2], old["history"]["lambda_max"])
    assert history.lambda_max.isnan().tolist() == [[False, False, True]] + [[False] * 3] * 2
    assert read(tmp_path / "b/mat/spectra.npz").step.tolist() == [12, 18]


def test_decisions_go_by_name_and_new_units_train() -> None:
    module = Small()
    policy = policies.MAT("auto", protect=False)
    old = MAT(module, (), halves(module, 0), policy)
    rates = torch.tensor([2.0, 3.0])
    reasons = ("temporal", "full")
    active = torch.tensor([False, True])
    old.decision = policies.Decision(active, reasons, {"layer": 1.0}, ("layer",) * 2, rates)
    state = old.state_dict()
    old.close()
    new = MAT(module, (), halves(module, 2, 0), policy, on_partition_change="map")
    with pytest.warns(UserWarning, match=r"2 only in this one \('net.2.low', 'net.2.high'\)"):
        new.load_state_dict(state)
    assert new.active.tolist() == [True, True, False, True]
    assert new.decision.reasons == ("full", "full", "temporal", "full")
    assert new.rates is not None
    assert new.rates.tolist() == [1.0, 1.0, 2.0, 3.0]
    new.close()
    with pytest.raises(ValueError, match="on_partition_change must be one of"):
        MAT(module, on_partition_change="ignore")


def shifted(net: nn.Module, *layers: int) -> Partition:
    """Return units of the names of :func:`halves`, cut elsewhere."""
    units = [
        Unit(f"net.{layer}.{side}", "layer", f"net.{layer}", slices)
        for layer in layers
        for side, a, b in (("low", 0, 4), ("high", 8, 16))
        for slices in [tuple(Slice(f"net.{layer}.{p}", 0, a, b) for p in ("weight", "bias"))]
    ]
    return Partition(units, net)


def test_units_of_a_known_name_with_other_slices_are_new(tmp_path: Path) -> None:
    policy = policies.Random(0.5, seed=1)
    path = saved(tmp_path, units=lambda m: list(halves(m, 0, 2)), policy=policies.MAT(0.9))
    old = torch.load(path, weights_only=True)["callbacks"]["MATCallback"]["mat"]
    assert len(old["slices"]) == 4
    refused = r"1 with other slices \('net.0.low'\)\. Resume .*on_partition_change=\"map\""

    def units(net: nn.Module) -> list[Unit]:
        return [shifted(net, 0).units[0], *halves(net, 0, 2).units[1:]]

    with pytest.raises(ValueError, match=refused):
        trainer(tmp_path / "b", mat(units=units)).fit(Small(), data(), ckpt_path=path)
    callback = mat(units=units, on_partition_change="map")
    fit = trainer(tmp_path / "c", callback, max_epochs=4)
    with pytest.warns(UserWarning, match=r"mapped by their names: 1 with other slices \('net.0.l"):
        fit.fit(Small(), data(), ckpt_path=path)
    assert callback.mat is not None
    history = callback.mat.history
    assert history.lambda_max[0].isnan().tolist() == [True, False, False, False]
    assert torch.equal(history.lambda_max[0, 1:], old["history"]["lambda_max"][0, 1:])

    module = Small()
    state = MAT(module, (), halves(module, 0), policy).state_dict()
    state["decision"]["active"] = torch.tensor([False, False])
    state["decision"]["reasons"] = ["not drawn"] * 2
    del state["slices"]  # as in states of earlier versions: names alone count
    new = MAT(module, (), shifted(module, 0), policy)
    new.load_state_dict(state)
    assert new.active.tolist() == [False, False]
    new.close()
    state["slices"] = MAT(module, (), halves(module, 0), policy).state_dict()["slices"]
    new = MAT(module, (), shifted(module, 0), policy, on_partition_change="map")
    with pytest.warns(UserWarning, match="1 with other slices"):
        new.load_state_dict(state)
    assert new.active.tolist() == [True, False]
    assert new.decision.reasons == ("full", "not drawn")
    new.close()


def test_slices_that_say_the_same_otherwise_are_the_same() -> None:
    """What counts is the elements that a unit owns."""
    net = Small()

    def of(*slices: Slice) -> list[str]:
        return marks_of(Partition([Unit("a", "layer", "", slices)], net))

    whole = of(Slice("net.2.weight"), Slice("net.2.bias"))
    assert whole == of(Slice("net.2.bias"), Slice("net.2.weight", 0, 0, 16))
    assert whole == of(
        Slice("net.2.weight", 1, 8), Slice("net.2.bias"), Slice("net.2.weight", 1, 0, 8)
    )
    assert whole != of(Slice("net.2.weight"))
    assert whole != of(Slice("net.2.weight", 0, 0, 15), Slice("net.2.bias"))


def test_optimizer_states_of_other_slabs_are_mapped() -> None:
    """Halves that are cut anew keep one step count, or begin anew where parts had several."""
    torch.manual_seed(0)
    module = Small()
    parts = halves(module, 2)
    optimizer = MATOptimizer(torch.optim.Adam(module.parameters(), 0.1), module, parts)
    for active in ([True, True], [True, False], [True, False]):
        module(torch.randn(4, 6)).square().sum().backward()
        optimizer.apply(torch.tensor(active))
        optimizer.step()
    state = optimizer.state_dict()
    optimizer.unwrap()

    def cut(*edges: int) -> Partition:
        slices = [Slice("net.2.weight", 0, a, b) for a, b in pairwise(edges)]
        units = [Unit(str(s.start), "layer", "net.2", (s,)) for s in slices]
        return Partition(units, module)

    def loaded(*edges: int) -> tuple[MATOptimizer, Tensor]:
        inner = torch.optim.Adam(module.parameters(), 0.1)
        other = MATOptimizer(inner, module, cut(*edges), on_partition_change="map")
        other.load_state_dict(state)
        other.unwrap()
        return other, other.state_dict()["state"][2]["exp_avg"]

    moments = state["state"][2]["exp_avg"]
    other, found = loaded(0, 4, 8, 16)
    assert torch.equal(found, moments)
    assert other.state_dict()["mat"]["net.2.weight"]["history"]["step"].tolist() == [3, 3, 1]
    other, found = loaded(0, 4, 12, 16)
    assert torch.equal(found[:4], moments[:4])
    assert torch.equal(found[12:], moments[12:])
    assert not found[4:12].any()
    steps = other.state_dict()["mat"]["net.2.weight"]["history"]["step"]
    assert steps.nan_to_num(0).tolist() == [3, 0, 1]


class Grown(Small):
    """Gets another layer in the middle of the run."""

    def grow(self) -> None:
        self.added = nn.Linear(3, 3)
        optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
        optimizer.add_param_group({"params": list(self.added.parameters())})

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return self.added(out) if hasattr(self, "added") else out


class Change(pl.Callback):
    """Changes the model before the epoch of the second probe."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch != 2:
            return
        if isinstance(module, Grown):
            module.grow()
            self.before = weights(module.added)
        else:
            module.net[2] = nn.Linear(16, 16)


def test_layers_that_another_callback_adds_always_train(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback, change = Grown(optimizer="sgd"), mat(), Change()
    trainer(tmp_path, change, callback).fit(module, data())
    assert callback.summary()["probes"] == 3
    assert not any(map(torch.equal, change.before, weights(module.added)))
    assert callback.mat is not None
    assert callback.mat.spectra is not None
    callback.mat.close()
    x = callback._samples_for_probe(module.trainer)
    expected = mntk(module, x, callback.mat.part)
    again = callback.mat.measure(x)
    torch.testing.assert_close(again.lambda_max, expected.lambda_max)


def test_layers_that_another_callback_replaces_are_named(tmp_path: Path) -> None:
    module = model()
    with pytest.raises(ValueError, match=r"first 'net.2'\): they were replaced after the units"):
        trainer(tmp_path, Change(), mat()).fit(module, data())
    assert not any("forward" in m.__dict__ for m in module.modules())


def test_a_step_that_loss_scaling_skips_moves_nothing(tmp_path: Path) -> None:
    class Overflow(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if self.global_step in (13, 18) else loss

    torch.manual_seed(0)
    module, callback = Overflow(), mat(every_n_steps=4)
    watch = Watch(callback)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    trainer(tmp_path, callback, watch, plugins=plugins).fit(module, data())
    skipped = [i for i, moved in enumerate(watch.moved) if not any(moved)]
    assert skipped == [13, 18]
    assert all(
        moved == active
        for i, (moved, active) in enumerate(zip(watch.moved, watch.active, strict=True))
        if i not in skipped
    )
    assert callback.mat is not None
    assert callback.mat.history.step == [6, 10, 14, 18, 22]
    steps = callback.mat.optimizers[0].state_dict()["state"][0]["step"]
    assert steps == sum(active[0] for i, active in enumerate(watch.active) if i not in skipped)


class Checked(Small):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step


def test_one_trainer_fits_checks_and_fits_on(tmp_path: Path) -> None:
    """Two fits of two epochs, with checks in between, equal one fit of four."""
    runs = []
    for parts in ((4,), (2, 4)):
        torch.manual_seed(0)
        module, callback = Checked(optimizer="sgd"), mat(policy=policies.Random(0.5))
        fit = trainer(tmp_path / str(len(parts)), callback, enable_checkpointing=True)
        for epochs in parts:
            fit.fit_loop.max_epochs = epochs
            path = tmp_path / "between.ckpt"
            fit.fit(module, data(), data(), ckpt_path=path if epochs != parts[0] else None)
            fit.validate(module, data(), verbose=False)
            fit.test(module, data(), verbose=False)
            fit.save_checkpoint(path)
        runs.append((weights(module), callback.mat.decision))  # type: ignore[union-attr]
    assert all(map(torch.equal, runs[0][0], runs[1][0]))
    assert runs[0][1] == runs[1][1]


def test_a_run_that_ends_inside_an_episode_goes_on_in_it(tmp_path: Path) -> None:
    whole, module = model(), model()
    trainer(tmp_path / "a", mat(every_n_steps=5)).fit(whole, data())
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=13)
    fit = trainer(
        tmp_path / "b", mat(every_n_steps=5), save, max_steps=13, enable_checkpointing=True
    )
    fit.fit(module, data())
    assert not any("forward" in m.__dict__ for m in module.modules())
    callback, resumed = mat(every_n_steps=5), Small()
    trainer(tmp_path / "c", callback).fit(resumed, data(), ckpt_path=tmp_path / "last.ckpt")
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    assert callback.mat is not None
    assert callback.mat.history.step == [6, 11, 16, 21]


def test_a_decision_that_leaves_nothing_to_train_is_named(tmp_path: Path) -> None:
    callback = mat(units="layers", policy=policies.Random(0.0, protect=False), warmup_epochs=1)
    module = model()
    with pytest.raises(RuntimeError, match=r"no unit trains in this episode.*protect=True"):
        trainer(tmp_path, callback, max_epochs=2).fit(module, data())
    assert all("forward" not in vars(m) for m in module.modules())
