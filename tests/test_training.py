"""What people train with beside MATCallback: scalers, schedules, averages, freezing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_mat import MATCallback, policies
from lightning_mat.report.store import read
from tests.lightning_models import Points, Small, Watch, data, mat, model, trainer, weights


class OneCycle(Small):
    """A schedule that changes momentum, too, at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=24)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Plateau(Small):
    """A schedule that looks at the loss."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=0, threshold=10.0
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "train_loss"},
        }


class Frozen(Small):
    """The first layer's weight and the last's bias are the user's own to freeze."""

    def __init__(self, optimizer: str = "adamw", width: int = 16) -> None:
        super().__init__(optimizer, width)
        self.net[0].weight.requires_grad_(False)
        self.net[4].bias.requires_grad_(False)


class Manual(Small):
    """Manual optimization with two optimizers, each stepped every ``accumulate`` batches."""

    accumulate = 1

    def __init__(self, optimizer: str = "adamw", width: int = 16) -> None:
        super().__init__(optimizer, width)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            for optimizer in self.optimizers():
                self.clip_gradients(optimizer, 0.5)
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        first, rest = list(self.net[:2].parameters()), list(self.net[2:].parameters())
        return [torch.optim.AdamW(first, 1e-2), torch.optim.SGD(rest, 0.1, momentum=0.9)]


class ManualAccumulating(Manual):
    """A step every four batches, six batches per epoch: steps fall where epochs do not begin."""

    accumulate = 4

    def __init__(self, optimizer: str = "adamw", width: int = 16) -> None:
        super().__init__(optimizer, width)
        self.batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, self.batches)
        self.batches += 1


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


COMPANIONS: dict[str, Any] = {
    "one cycle": (OneCycle, dict),
    "plateau": (Plateau, dict),
    "frozen": (Frozen, dict),
    "manual": (Manual, dict),
    "manual, accumulating": (ManualAccumulating, dict),
    "fp16 with a scaler": (Small, lambda: {"plugins": [scaled()]}),
    "manual, fp16": (Manual, lambda: {"plugins": [scaled()]}),
    "accumulated, clipped": (
        Small,
        lambda: {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1},
    ),
    "ema": (Small, lambda: {"callbacks": [EMAWeightAveraging(decay=0.9)]}),
    "swa": (
        Small,
        lambda: {"callbacks": [StochasticWeightAveraging(1e-2, swa_epoch_start=2)]},
    ),
}


def fit(
    name: str, folder: Path, *callbacks: pl.Callback, **options: Any
) -> tuple[Small, pl.Trainer]:
    """Train the model of a case; the same model, whatever the callbacks."""
    make, settings = COMPANIONS[name]
    settings = settings() | options
    callbacks = (*callbacks, *settings.pop("callbacks", ()))
    torch.manual_seed(0)
    module = make()
    run = trainer(folder, *callbacks, **settings)
    run.fit(module, data())
    return module, run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPANIONS)
def test_everything_active_is_plain_training(name: str, tmp_path: Path) -> None:
    plain, _ = fit(name, tmp_path / "a")
    adaptive, _ = fit(name, tmp_path / "b", mat(policy=policies.Full()))
    assert all(map(torch.equal, weights(plain), weights(adaptive)))
    assert not all(map(torch.equal, weights(plain), weights(model())))


class Alternating(policies.Policy):
    """Rests the middle unit in even episodes, the first in odd ones."""

    needs_spectra = False

    def decide(self, history: Any, units: Any, episode: int) -> policies.Decision:
        active = torch.ones(len(units), dtype=torch.bool)
        active[1 - episode % 2] = False
        return policies.Decision(active, ("test",) * len(units), {}, units.kinds)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPANIONS)
def test_resting_units_do_not_move_and_the_others_do(name: str, tmp_path: Path) -> None:
    callback = mat(policy=Alternating(), warmup_epochs=1)
    watch = Watch(callback)
    fit(name, tmp_path, callback, watch)
    moved = {tuple(active): [False] * 3 for active in watch.active}
    assert len(moved) == 3
    for active, flags in zip(watch.active, watch.moved, strict=True):
        seen = moved[tuple(active)]
        moved[tuple(active)] = [a or b for a, b in zip(seen, flags, strict=True)]
    frozen = [name == "frozen", False, False]
    for active, flags in moved.items():
        assert flags == [on and not stuck for on, stuck in zip(active, frozen, strict=True)]


@pytest.mark.parametrize(
    ("name", "options", "calendar"),
    [
        ("manual, accumulating", {}, {"every_n_epochs": 1}),
        ("manual, accumulating", {}, {"every_n_steps": 2}),
        ("plateau", {"accumulate_grad_batches": 4}, {"every_n_epochs": 1}),
        ("plateau", {"accumulate_grad_batches": 4}, {"every_n_steps": 1}),
        (
            "plateau",
            {"callbacks": [GradientAccumulationScheduler({0: 2, 2: 3})]},
            {"every_n_steps": 1},
        ),
    ],
)
def test_decisions_change_between_optimizer_steps_only(
    name: str, options: Any, calendar: dict[str, int], tmp_path: Path
) -> None:
    class Often(MATCallback):
        """Asks for an episode before every batch."""

        def should_probe(self, trainer: pl.Trainer, batch_idx: int) -> bool:
            return True

    for kind in (MATCallback, Often):
        callback = kind("layers", Alternating(), warmup_epochs=0, **calendar)
        watch, steps = Watch(callback), Steps()
        settings = {key: value for key, value in options.items() if key != "callbacks"}
        others = options.get("callbacks", [])
        fit(name, tmp_path / kind.__name__, callback, watch, steps, *others, **settings)
        pairs = zip(watch.active[1:], watch.active, steps.stepped, strict=False)
        changes = [stepped for now, before, stepped in pairs if now != before]
        assert changes, "no decision ever changed"
        assert all(changes)


class Steps(pl.Callback):
    """Notes in which batches an optimizer stepped."""

    def __init__(self) -> None:
        self.stepped: list[bool] = []
        self.count = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.stepped.append(trainer.global_step > self.count)
        self.count = trainer.global_step


def test_an_episode_that_waits_survives_a_checkpoint() -> None:
    callback = mat()
    callback.schedule.end_batch(stepped=False)
    assert not callback.schedule.ready(True)
    state = callback.schedule.state_dict()
    resumed = mat()
    resumed.schedule.load_state_dict(state)
    assert resumed.schedule.ready(False)


@pytest.mark.parametrize("options", [{"waking": "reset"}, {"waking": "decay"}])
def test_waking_reaches_the_optimizers_and_resumes(options: Any, tmp_path: Path) -> None:
    def callback() -> MATCallback:
        return mat(policy=Alternating(), every_n_steps=4, **options)

    whole, kept = model(), model()
    trainer(tmp_path / "a", callback()).fit(whole, data())
    trainer(tmp_path / "b", mat(policy=Alternating(), every_n_steps=4)).fit(kept, data())
    assert not all(map(torch.equal, weights(whole), weights(kept)))
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    half = trainer(tmp_path / "c", callback(), save, max_steps=13, enable_checkpointing=True)
    half.fit(model(), data())
    resumed = Small()
    trainer(tmp_path / "d", callback()).fit(
        resumed, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert all(map(torch.equal, weights(whole), weights(resumed)))


def test_unknown_waking_is_named_at_construction_and_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="waking must be one of"):
        mat(waking="sleep")

    class Rms(Small):
        def configure_optimizers(self) -> Any:
            return torch.optim.RMSprop(self.parameters())

    with pytest.raises(ValueError, match="not that of RMSprop"):
        trainer(tmp_path, mat(waking="decay")).fit(Rms(), data())


def test_frozen_parameters_belong_to_no_unit_and_are_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    module, callback = Frozen(), mat(units="layers")
    before = weights(module)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        trainer(tmp_path, callback).fit(module, data())
    assert "2 parameters are frozen (first 'net.0.weight')" in caplog.text
    part = callback.mat.part  # type: ignore[union-attr]
    assert part.frozen == ("net.0.weight", "net.4.bias")
    assert {piece.param for unit in part for piece in unit.slices}.isdisjoint(part.frozen)
    assert "net.0.bias" in part.units[0].slices[0].param  # the other slice is kept
    assert "(frozen by you)" in part.describe()
    assert torch.equal(module.net[0].weight, before[0])
    assert torch.equal(module.net[4].bias, before[5])
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == list(part.frozen)


class Thaw(BaseFinetuning):
    """Freezes the first layer, and lets it train from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch >= 2:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.1)


class Tuned(Small):
    """Gives its optimizer what is not frozen."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize("order", [1, -1])
def test_parameters_that_are_unfrozen_later_always_train(order: int, tmp_path: Path) -> None:
    def run(folder: str, *callbacks: pl.Callback, **options: Any) -> Tuned:
        torch.manual_seed(0)
        module = Tuned()
        trainer(tmp_path / folder, *callbacks[::order], **options).fit(module, data())
        return module

    plain = run("a", Thaw())
    adaptive = run("b", Thaw(), mat(dry_run=True))
    assert all(map(torch.equal, weights(plain), weights(adaptive)))

    callback = mat()
    watch = Watch(callback)
    save = ModelCheckpoint(tmp_path, save_last=True)
    whole = run("c", Thaw(), callback, watch, save, enable_checkpointing=True)
    assert [flags[0] for flags in watch.moved] == [False] * 12 + [True] * 12
    assert [flags[1:] for flags in watch.moved] == watch.active
    assert any(not all(active) for active in watch.active)

    # A run that resumes after the thaw gets the groups of the saved one.
    half = ModelCheckpoint(tmp_path / "half", save_last=True)
    run("d", Thaw(), mat(), half, enable_checkpointing=True, max_epochs=3)
    resumed, options = Tuned(), {"ckpt_path": tmp_path / "half" / "last.ckpt"}
    trainer(tmp_path / "e", *[Thaw(), mat()][::order]).fit(resumed, data(), **options)
    assert all(map(torch.equal, weights(whole), weights(resumed)))


def test_without_a_logger_nothing_is_written(tmp_path: Path) -> None:
    callback = mat()
    for _ in range(2):
        trainer(tmp_path, callback, logger=False).fit(model(), data())
    assert list(tmp_path.iterdir()) == []
    assert callback.mat is not None
    assert len(callback.mat.history) == 3


def test_loggers_without_a_folder_of_their_own_get_one(tmp_path: Path) -> None:
    class Remote(Logger):
        """Draws somewhere else."""

        name, version, save_dir = "project", "a1", str(tmp_path)

        def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    trainer(tmp_path, mat(), logger=[Remote(), CSVLogger(tmp_path)]).fit(model(), data())
    assert len(read(tmp_path / "project" / "a1" / "mat" / "spectra.npz").step) == 3


class Residual(Small):
    """Two residual feed-forward networks, whose blocks of neurons are units."""

    def __init__(self, optimizer: str = "adamw", width: int = 16) -> None:
        super().__init__(optimizer, width)
        self.into = nn.Linear(6, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)) for _ in range(2)
        )
        self.net = nn.Sequential(nn.Linear(width, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.into(x)
        for block in self.blocks:
            h = h + block(h)
        return self.net(h)


@pytest.mark.parametrize("skip", ["weights", "units"])
def test_a_run_with_blocks_at_rest_learns_and_resumes_bit_by_bit(skip: str, tmp_path: Path) -> None:
    def run(folder: str, epochs: int, **fit_options: Any) -> tuple[Small, MATCallback]:
        torch.manual_seed(0)
        module = Residual()
        callback = mat(
            units="ffn", policy=policies.Random(0.5), skip=skip, every_n_steps=3, warmup_epochs=0
        )
        saved = ModelCheckpoint(tmp_path / folder, save_last=True)
        train = trainer(
            tmp_path / folder, callback, saved, max_epochs=epochs, enable_checkpointing=True
        )
        train.fit(module, data(), **fit_options)
        return module, callback

    whole, callback = run("whole", 4)
    run("part", 2)
    resumed, _ = run("rest", 4, ckpt_path=tmp_path / "part" / "last.ckpt")
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    assert 0 < callback.summary()["trained_share"] < 1
    x, y = Points(96)[torch.arange(96)]
    before = nn.functional.cross_entropy(Residual().eval()(x), y)
    assert nn.functional.cross_entropy(whole.eval()(x), y) < before


class WatchBlocks(pl.Callback):
    """Checks after every batch that no resting block of neurons has moved."""

    def __init__(self, callback: MATCallback) -> None:
        self.callback = callback
        self.seen = {True: False, False: False}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.before = {n: p.detach().clone() for n, p in module.named_parameters()}

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        assert self.callback.mat is not None
        for unit, on in zip(self.callback.mat.part, self.callback.mat.active, strict=True):
            for piece in unit.slices:
                dim = piece.dim or 0
                size = (piece.stop or module.get_parameter(piece.param).shape[dim]) - piece.start
                old, new = (
                    p.detach().narrow(dim, piece.start, size)
                    for p in (self.before[piece.param], module.get_parameter(piece.param))
                )
                moved = not torch.equal(old, new)
                assert bool(on) or not moved, unit.name
                self.seen[bool(on)] |= moved or not on


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("skip", ["weights", "units"])
@pytest.mark.parametrize("name", ["fp16 with a scaler", "accumulated, clipped", "ema", "swa"])
def test_blocks_at_rest_do_not_move_beside_companions(name: str, skip: str, tmp_path: Path) -> None:
    settings = COMPANIONS[name][1]()
    callback = mat(units="ffn", policy=policies.Random(0.5), skip=skip, every_n_steps=2)
    watch = WatchBlocks(callback)
    torch.manual_seed(0)
    module = Residual()
    run = trainer(tmp_path, callback, watch, *settings.pop("callbacks", ()), **settings)
    run.fit(module, data())
    assert watch.seen == {True: True, False: True}
