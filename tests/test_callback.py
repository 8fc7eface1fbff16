"""MATCallback: the calendar, what is saved and logged, and what it refuses."""

from __future__ import annotations

import copy
import csv
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_mat import MAT, MATCallback, policies
from lightning_mat.report.store import read
from tests.lightning_models import Points, Small, Watch, data, mat, model, trainer, weights


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("options", [{"policy": policies.Full()}, {"dry_run": True}])
def test_everything_active_is_plain_training(
    tmp_path: Path, optimizer: str, options: dict[str, Any]
) -> None:
    plain, adaptive = model(optimizer=optimizer), model(optimizer=optimizer)
    trainer(tmp_path / "a").fit(plain, data())
    trainer(tmp_path / "b", mat(**options)).fit(adaptive, data())
    assert all(map(torch.equal, weights(plain), weights(adaptive)))


def test_only_the_deciding_units_move(tmp_path: Path) -> None:
    callback = mat()
    watch = Watch(callback)
    trainer(tmp_path, callback, watch).fit(model(), data())
    assert watch.active[0] == [True, True, True]
    assert any(not all(active) for active in watch.active)
    assert watch.moved == watch.active


def test_episodes_follow_the_epochs(tmp_path: Path) -> None:
    callback = mat(warmup_epochs=2, every_n_epochs=3)
    trainer(tmp_path, callback, max_epochs=9).fit(model(), data(32))
    assert callback.mat is not None
    assert callback.mat.history.epoch == [2, 5, 8]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_episodes_follow_the_optimizer_steps(tmp_path: Path, accumulate: int) -> None:
    callback = mat(warmup_epochs=0, every_n_steps=2)
    fit = trainer(tmp_path, callback, accumulate_grad_batches=accumulate, max_epochs=2)
    fit.fit(model(), data(96))
    assert callback.mat is not None
    assert callback.mat.history.step == list(range(0, 12 // accumulate, 2))


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole_callback, whole = mat(every_n_steps=4), model()
    fit = trainer(tmp_path / "whole", whole_callback)
    fit.fit(whole, data())
    for stop in (9, 12, 16):  # inside an episode, at the end of an epoch, at a probe
        first = model()
        save = ModelCheckpoint(tmp_path / f"{stop}", save_last=True, every_n_train_steps=1)
        half = trainer(
            tmp_path / f"half{stop}",
            mat(every_n_steps=4),
            save,
            max_steps=stop,
            enable_checkpointing=True,
        )
        half.fit(first, data())
        callback, resumed = mat(every_n_steps=4), Small()
        trainer(tmp_path / f"half{stop}", callback).fit(
            resumed, data(), ckpt_path=tmp_path / f"{stop}" / "last.ckpt", weights_only=True
        )
        assert all(map(torch.equal, weights(whole), weights(resumed)))
        assert callback.mat is not None
        assert whole_callback.mat is not None
        assert callback.mat.decision == whole_callback.mat.decision
        assert torch.equal(callback.mat.history.lambda_max, whole_callback.mat.history.lambda_max)
        files = [read(tmp_path / f / "mat/spectra.npz") for f in ("whole", f"half{stop}")]
        assert files[0].step.tolist() == files[1].step.tolist()
        assert (files[0].lambda_max == files[1].lambda_max).all()
        assert callback.summary()["flops"] == whole_callback.summary()["flops"]


def test_checkpoints_load_without_the_callback_and_into_it(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, mat(), save, max_epochs=2, enable_checkpointing=True).fit(model(), data())
    plain = Small()
    trainer(tmp_path / "b").fit(plain, data(), ckpt_path=tmp_path / "last.ckpt")
    save = ModelCheckpoint(tmp_path / "c", save_last=True)
    trainer(tmp_path / "c", save, max_epochs=2, enable_checkpointing=True).fit(model(), data())
    adaptive, callback = Small(), mat()
    trainer(tmp_path / "d", callback).fit(adaptive, data(), ckpt_path=tmp_path / "c/last.ckpt")
    assert callback.summary()["probes"] == 2


def test_another_partition_is_refused_at_resume(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, mat(), save, max_epochs=2, enable_checkpointing=True).fit(model(), data())
    other = mat(units=lambda m: [])
    with pytest.raises(ValueError, match="unit"):
        trainer(tmp_path / "b", other).fit(Small(), data(), ckpt_path=tmp_path / "last.ckpt")


def test_the_model_is_an_ordinary_one_afterwards(tmp_path: Path) -> None:
    module = model()
    before = {name: set(m.__dict__) for name, m in module.net.named_modules()}
    trainer(tmp_path, mat()).fit(module, data())
    assert {name: set(m.__dict__) for name, m in module.net.named_modules()} == before
    assert all(p.requires_grad for p in module.parameters())
    module.zero_grad()
    module(torch.randn(4, 6)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module.net)))
    assert torch.equal(copied(torch.ones(1, 6)), module.net(torch.ones(1, 6)))


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_an_ordinary_model(
    tmp_path: Path, error: type[BaseException]
) -> None:
    class Broken(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 9:
                raise error("mine")
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module, callback = Broken(), mat()
    with pytest.raises((error, SystemExit)):
        trainer(tmp_path, callback).fit(module, data())
    module(torch.randn(4, 6)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert not any("forward" in m.__dict__ for m in module.modules())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_what_is_logged_and_kept(tmp_path: Path) -> None:
    callback = mat()
    fit = trainer(tmp_path, callback)
    fit.fit(model(), data())
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    probes = [row for row in rows if row["mat/probe_seconds"]]
    assert len(probes) == callback.summary()["probes"] == 3
    last = probes[-1]
    assert float(last["mat/layer/units"]) == 3
    assert float(last["mat/layer/lambda_max_q0"]) <= float(last["mat/layer/lambda_max_q100"])
    steps = [row for row in rows if row["mat/step_flops"]]
    assert float(steps[0]["mat/step_flops"]) == float(steps[0]["mat/full_step_flops"])
    assert float(steps[1]["mat/step_flops"]) < float(steps[1]["mat/full_step_flops"])
    stored = read(tmp_path / "mat" / "spectra.npz")
    assert stored.step.tolist() == [6, 12, 18]
    assert stored.names == callback.mat.part.names  # type: ignore[union-attr]
    share = callback.mat.active.double().mean()  # type: ignore[union-attr]
    assert fit.progress_bar_metrics["trained"] == pytest.approx(float(share))


def test_counted_flops_are_what_the_step_costs(tmp_path: Path) -> None:
    callback = mat(policy=policies.Full())
    trainer(tmp_path, callback, max_epochs=1).fit(model(), data())
    # forward: three products; backward: weights of all, inputs of all but the first
    forward = 2 * (6 * 16 + 16 * 16 + 16 * 3)
    backward = forward + 2 * (16 * 16 + 16 * 3)
    assert callback.summary()["full_step_flops"] == forward + backward
    assert callback.summary()["flops"] == 96 * (forward + backward)


FULL = Path("/dev/full")  # every write to it fails with ENOSPC
needs_full = pytest.mark.skipif(not FULL.exists(), reason=f"{FULL} is Linux's")


def fill(path: Path) -> None:
    """Let a file be on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(FULL)


def no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("spectra.npz.part", marks=needs_full),
        pytest.param("spectra.eigenvalues/000001.npy.part", marks=needs_full),
        "fsync",
    ],
)
def test_a_full_disk_costs_one_warning(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "fsync":
        monkeypatch.setattr(os, "fsync", no_space)
    else:
        fill(tmp_path / "mat" / place)
    callback = mat()
    with pytest.warns(UserWarning, match="No space left") as caught:
        trainer(tmp_path, callback).fit(model(), data())
    assert sum("No space left" in str(w.message) for w in caught) == 1
    assert callback.summary()["probes"] == 3
    # What was written before is whole.
    stored = tmp_path / "mat" / "spectra.npz"
    assert (read(stored).step.tolist() if stored.exists() else []) == [6][: "000001" in place]


@pytest.mark.parametrize("resumed", [False, pytest.param(True, marks=needs_full)])
def test_a_disk_that_is_full_at_the_start_costs_one_warning(
    resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    trainer(tmp_path, mat(), save, enable_checkpointing=True).fit(model(), data())
    if resumed:  # the probes after the checkpoint are dropped
        fill(tmp_path / "mat" / "spectra.npz.part")
    else:  # the earlier run's folder is renamed
        monkeypatch.setattr(Path, "rename", no_space)
    callback = mat()
    with pytest.warns(UserWarning, match="No space left") as caught:
        trainer(tmp_path, callback).fit(
            model(), data(), ckpt_path=tmp_path / "step=7.ckpt" if resumed else None
        )
    assert sum("No space left" in str(w.message) for w in caught) == 1
    assert callback.summary()["probes"] == 3
    assert read(tmp_path / "mat" / "spectra.npz").step.tolist() == [6, 12, 18]


@needs_full
def test_a_logger_on_a_full_disk_costs_one_warning(tmp_path: Path) -> None:
    fill(tmp_path / "metrics.csv")

    class Room(pl.Callback):
        """Somebody makes room before Lightning flushes its logger, which would raise."""

        def on_train_end(self, *_: Any) -> None:
            (tmp_path / "metrics.csv").unlink()

    # Of the rows, MAT's two of step 6 alone are written at once.
    logger = CSVLogger(str(tmp_path), name="", version="", flush_logs_every_n_steps=7)
    fit = trainer(tmp_path, mat(), Room(), logger=logger, log_every_n_steps=1000)
    with pytest.warns(UserWarning, match="No space left") as caught:
        fit.fit(model(), data())
    said = [str(w.message) for w in caught if "No space left" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("CSVLogger cannot log what MAT measures")
    assert fit.global_step == 24
    with (tmp_path / "metrics.csv").open() as file:
        assert sum(bool(row["mat/probe_seconds"]) for row in csv.DictReader(file)) == 3


@needs_full
@pytest.mark.parametrize("adaptive", [False, True])
def test_lightnings_own_logging_on_a_full_disk_ends_a_run(adaptive: bool, tmp_path: Path) -> None:
    fill(tmp_path / "metrics.csv")
    logger = CSVLogger(str(tmp_path), name="", version="", flush_logs_every_n_steps=9)
    module, fit = model(), trainer(tmp_path, *[mat()] * adaptive, logger=logger)
    with pytest.raises(OSError, match="No space left"):
        fit.fit(module, data())
    assert not any("forward" in m.__dict__ for m in module.modules())


def test_nan_keeps_the_previous_decision(tmp_path: Path) -> None:
    class Poisoned(MATCallback):
        def _samples_for_probe(self, trainer: pl.Trainer) -> Any:
            x, y = super()._samples_for_probe(trainer)
            return (x * float("nan"), y) if trainer.current_epoch == 2 else (x, y)

    callback = Poisoned(units="layers", alpha="auto", n_samples=8)
    watch = Watch(callback)
    with pytest.warns(UserWarning, match="NaN or Inf; keeping the previous decision"):
        trainer(tmp_path, callback, watch).fit(model(), data())
    assert watch.active[12] == watch.active[11] != [True] * 3
    assert callback.mat is not None
    assert callback.mat.history.epoch == [1, 3]


def test_training_data_and_random_streams_are_undisturbed(tmp_path: Path) -> None:
    class Seen(Small):
        def __init__(self) -> None:
            super().__init__()
            self.order: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.order += [*batch[0][:, 0].tolist(), float(torch.rand(()))]
            return super().training_step(batch, batch_idx)

    runs = []
    for callbacks in ((), (mat(dry_run=True),)):
        torch.manual_seed(0)
        module = Seen()
        loader = DataLoader(Points(96), batch_size=16, shuffle=True)
        trainer(tmp_path, *callbacks).fit(module, loader)
        runs.append(module.order)
    assert runs[0] == runs[1]


def test_given_by_the_module_and_by_a_config(tmp_path: Path) -> None:
    class Own(Small):
        def configure_callbacks(self) -> list[pl.Callback]:
            return [mat()]

    torch.manual_seed(0)
    fit = trainer(tmp_path)
    fit.fit(Own(), data())
    assert any(isinstance(c, MATCallback) for c in fit.callbacks)  # type: ignore[attr-defined]


def test_named_in_a_lightning_cli_config(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  accelerator: cpu\n  callbacks:\n"
        "    - class_path: lightning_mat.MATCallback\n"
        "      init_args:\n        units: layers\n"
        "        policy:\n          class_path: lightning_mat.policies.Random\n"
        "          init_args: {fraction: 0.25}\n"
    )
    cli = LightningCLI(Small, run=False, args=["--config", str(config)], save_config_callback=None)
    found = [c for c in cli.trainer.callbacks if isinstance(c, MATCallback)]  # type: ignore[attr-defined]
    assert len(found) == 1
    assert found[0].policy == policies.Random(0.25)


class Stream(IterableDataset[Any]):
    """Data without length or index."""

    def __iter__(self) -> Any:
        return iter([Points(8)[i] for i in range(8)])


class Muonic(Small):
    """An optimizer that works on whole matrices."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 1}, "n_samples must be ≥ 2, got 1"),
        ({"n_samples": 4.5}, "n_samples must be a whole number"),
        ({"skip": "layers"}, "skip must be one of"),
        ({"precision": "int4"}, "precision must be one of"),
        ({"memory": 0}, "memory must be"),
        ({"policy": policies.Full(), "alpha": 0.2}, "belong to the default policy"),
        ({"every_n_epochs": 2, "every_n_steps": 5}, "two calendars"),
        ({"alpha": 1.0}, "alpha"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": "automatic"}, "alpha"),
        ({"beta": -1.0}, "beta"),
        ({"every_n_epochs": 0}, "every_n_epochs must be a whole number ≥ 1, got 0"),
        ({"every_n_steps": 0}, "every_n_steps must be a whole number ≥ 1, got 0"),
        ({"warmup_epochs": -1}, "warmup_epochs must be a whole number ≥ 0, got -1"),
        ({"output": "logits"}, "output must be one of"),
        ({"n_samples": True}, "n_samples must be a whole number"),
        ({"every_n_epochs": True}, "every_n_epochs must be a whole number ≥ 1, got True"),
        ({"seed": -1}, "seed must be a whole number ≥ 0, got -1"),
        ({"seed": True}, "seed must be a whole number ≥ 0, got True"),
        ({"seed": 1.0}, "seed must be a whole number ≥ 0, got 1.0"),
        ({"protect": "no"}, "protect must be True or False, got 'no'"),
        ({"dry_run": 1}, "dry_run must be True or False, got 1"),
        ({"freeze_bn": None}, "freeze_bn must be True or False, got None"),
        ({"keep_eigenvalues": "all"}, "keep_eigenvalues must be True or False, got 'all'"),
    ],
)
def test_bad_arguments_are_named_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MATCallback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 97}, "n_samples is 97, but the training dataset has 96"),
        ({"units": "heads"}, "heads"),
        ({"units": "neurons"}, "neurons"),
        ({"alpha": {"haed": 0.1}}, "haed"),
        ({"policy": policies.MAT(budget=0.8), "warmup_epochs": 0}, "set warmup_epochs to at"),
        ({"probe_data": [1]}, "is a list, not one DataLoader"),
    ],
)
def test_bad_arguments_are_named_at_the_start(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    module = model()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, mat(**options)).fit(module, data())
    assert not any("forward" in m.__dict__ for m in module.modules())


@pytest.mark.parametrize(
    ("module", "loader", "message"),
    [
        (Muonic, data, "LBFGS"),
        (Small, lambda: DataLoader(Stream(), batch_size=8), "Stream has no length or no index"),
        (Small, lambda: {"a": data(), "b": data()}, "not one DataLoader"),
    ],
)
def test_runs_it_cannot_work_with_are_refused(
    tmp_path: Path, module: type[Small], loader: Any, message: str
) -> None:
    torch.manual_seed(0)
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(tmp_path, mat()).fit(module(), loader())


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    class Another(MATCallback):
        """Lightning itself refuses two of the same class."""

    with pytest.raises(ValueError, match="2 MATCallbacks"):
        trainer(tmp_path, mat(), Another(units="layers")).fit(model(), data())
    with pytest.raises(RuntimeError, match="more than one stateful callback.*MATCallback"):
        trainer(tmp_path, mat(), mat())


def test_a_second_fit_begins_anew(tmp_path: Path) -> None:
    callback = mat(every_n_steps=5)
    trainer(tmp_path / "a", callback).fit(model(), data())
    first, second = weights_of(callback), model()
    trainer(tmp_path / "b", callback).fit(second, data())
    assert all(map(torch.equal, first, weights(second)))
    assert callback.mat is not None
    assert callback.mat.history.step == [6, 11, 16, 21]
    assert callback.summary()["probes"] == 4


def weights_of(callback: MATCallback) -> list[Tensor]:
    assert callback.mat is not None
    return weights(callback.mat.model)


def test_validation_between_and_after_fits_changes_nothing(tmp_path: Path) -> None:
    class Validated(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    torch.manual_seed(0)
    module = Validated()
    fit = trainer(tmp_path / "a", mat())
    fit.fit(module, data(), data())
    loss = fit.validate(module, data(), verbose=False)[0]["loss"]
    plain = model()
    trainer(tmp_path / "b", mat()).fit(plain, data())
    assert all(map(torch.equal, weights(module), weights(plain)))
    x, y = next(iter(data()))
    assert loss > 0
    assert torch.isfinite(nn.functional.cross_entropy(plain(x), y))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(tmp_path: Path, precision: Any) -> None:
    callback = mat()
    watch = Watch(callback)
    trainer(tmp_path, callback, watch, precision=precision).fit(model(), data())
    assert callback.summary()["probes"] == 3
    assert watch.moved == watch.active
    assert any(not all(active) for active in watch.active)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping_sees_the_active_units(tmp_path: Path, algorithm: str) -> None:
    callback = mat()
    watch = Watch(callback)
    trainer(
        tmp_path, callback, watch, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm
    ).fit(model(), data())
    assert watch.moved == watch.active


def test_several_optimizers_and_frozen_parameters(tmp_path: Path) -> None:
    class Two(Small):
        def __init__(self) -> None:
            super().__init__(width=8)
            self.net[0].bias.requires_grad_(False)

        def configure_optimizers(self) -> Any:
            # Lightning steps one optimizer automatically; its groups differ
            first, *others = [p for p in self.parameters() if p.requires_grad]
            groups = [{"params": [first], "lr": 0.1}, {"params": others}]
            return torch.optim.SGD(groups, 0.05, momentum=0.9)

    torch.manual_seed(0)
    module, callback = Two(), mat()
    frozen = module.net[0].bias.clone()
    trainer(tmp_path, callback).fit(module, data())
    assert torch.equal(frozen, module.net[0].bias)
    assert not module.net[0].bias.requires_grad
    assert callback.summary()["probes"] == 3


def test_resuming_a_finished_run_keeps_its_state(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, save_last=True)
    callback = mat()
    trainer(tmp_path / "a", callback, save, enable_checkpointing=True).fit(model(), data())
    again = mat()
    fit = trainer(tmp_path / "b", again)
    fit.fit(Small(), data(), ckpt_path=tmp_path / "last.ckpt")
    assert again.summary() == callback.summary()
    assert again.state_dict()["mat"]["units"] == callback.state_dict()["mat"]["units"]


def test_the_full_cost_is_known_without_a_warm_up(tmp_path: Path) -> None:
    counted, whole = mat(warmup_epochs=0), mat(policy=policies.Full())
    trainer(tmp_path / "a", counted).fit(model(), data())
    trainer(tmp_path / "b", whole).fit(model(), data())
    # a resting prefix saves input gradients, too, which nobody counted
    full = whole.summary()["full_step_flops"]
    assert 0.6 * full <= counted.summary()["full_step_flops"] <= full


def test_an_earlier_runs_file_is_moved_aside(tmp_path: Path) -> None:
    trainer(tmp_path, mat()).fit(model(), data())
    other = model(width=8)
    trainer(tmp_path, mat(warmup_epochs=2)).fit(other, data())
    assert read(tmp_path / "mat/spectra.npz").step.tolist() == [12, 18]
    assert read(tmp_path / "mat.1/spectra.npz").step.tolist() == [6, 12, 18]


def test_an_optimizer_may_be_kept_across_fits(tmp_path: Path) -> None:
    class Kept(Small):
        def configure_optimizers(self) -> Any:
            if not hasattr(self, "kept"):
                self.kept = torch.optim.SGD(self.parameters(), 0.05)
            return self.kept

    torch.manual_seed(0)
    module, callback = Kept(), mat()
    for turn in range(2):
        trainer(tmp_path / str(turn), callback).fit(module, data())
        assert callback.summary()["probes"] == 3


def test_what_cannot_be_probed_is_found_at_the_start(tmp_path: Path) -> None:
    class NoForward(Small):
        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.net(x) * scale

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0], 2.0).square().mean()

    torch.manual_seed(0)
    module = NoForward()
    before = weights(module)
    with pytest.raises(ValueError, match="cannot call NoForward.*pass forward="):
        trainer(tmp_path, mat(warmup_epochs=3)).fit(module, data())
    assert all(map(torch.equal, before, weights(module)))


def test_a_run_that_never_measured_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="MAT never measured.*Lower warmup_epochs"):
        trainer(tmp_path, mat(warmup_epochs=5), max_epochs=1).fit(model(), data())


def test_summary_before_a_fit_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"Trainer\.fit first"):
        mat().summary()


def test_the_engine_works_in_a_plain_loop() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    engine = MAT(
        net, torch.optim.SGD(net.parameters(), 0.1), "layers", policies.MAT("auto"), seed=1
    )
    x = torch.randn(32, 6)
    moved = []
    for step in range(6):
        if step % 2 == 0:
            decision = engine.update(x, step=step)
        before = weights(net)
        engine.optimizers[0].zero_grad()
        net(x).square().mean().backward()
        engine.optimizers[0].step()
        moved.append([not torch.equal(a, b) for a, b in zip(before, weights(net), strict=True)])
        assert moved[-1][::2] == decision.active.tolist()
    assert engine.probes == 3
    assert engine.probe_flops > 0
    state = engine.state_dict()
    engine.close()
    other = MAT(copy.deepcopy(net), (), "layers", policies.MAT("auto"), seed=1)
    other.load_state_dict(state)
    assert other.decision == engine.decision
    assert other.episode == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.close()
