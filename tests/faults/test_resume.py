"""Runs that end early in every way Lightning knows go on as if nothing had happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_mat import MATCallback, policies
from lightning_mat.checkpoint import AtomicCheckpointIO
from lightning_mat.ledger import Ledger
from lightning_mat.mntk.passes import Passes
from lightning_mat.report.store import read
from lightning_mat.schedule import Schedule
from tests.lightning_models import Small, Watch, data, mat, model, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS: dict[str, Any] = {"every_n_steps": 4}


class Memory(Logger):
    """Keeps what is logged: (step, name) → value."""

    name, version = "memory", 0

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.found: dict[tuple[int, str], float] = {}

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            # Lightning numbers its own metrics by batches, one off after an error in a batch.
            if name.startswith("mat/") and "seconds" not in name:
                self.found[step or 0, name] = value


class Stop(pl.Callback):
    """Calls a function once a step is reached, at one of the hooks."""

    def __init__(self, hook: str, step: int, action: Callable[[pl.Trainer], None]) -> None:
        def act(trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == step:
                action(trainer)

        setattr(self, hook, act)


class Redo(pl.Callback):
    """Lets the loader's state say which batches are done.

    Lightning saves a stateful loader's state as it is, which counts the batch in hand as done. A
    run that goes on after an error in the middle of a batch would train without it, with MAT or
    without.
    """

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        batches = loop["epoch_loop.batch_progress"]["current"]
        if batches["processed"] < batches["ready"]:
            done = batches["processed"] * trainer.train_dataloader.batch_size
            loop["state_dict"]["combined_loader"][0]["samples"] = done


class EndedError(Exception):
    """Ends a run."""


def end(_: Any = None) -> None:
    raise EndedError


class Whole:
    """A run that was never stopped."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.callback, self.module = mat(**(SETTINGS | options)), model()
        self.folder, self.log = folder, Memory(folder)
        trainer(folder, self.callback, logger=self.log).fit(self.module, data())

    def check(self, log: Memory, module: Small, callback: MATCallback) -> None:
        """Check that another run ended as this one: weights, decisions, logs and files."""
        mine, other = self.callback.mat, callback.mat
        assert mine is not None
        assert other is not None
        assert all(map(torch.equal, weights(self.module), weights(module)))
        assert mine.decision == other.decision
        assert mine.history.step == other.history.step
        assert torch.equal(mine.history.lambda_max, other.history.lambda_max)
        assert self.callback.summary()["flops"] == callback.summary()["flops"]
        assert log.found == self.log.found
        one, two = (
            read(folder / "memory" / "version_0" / "mat" / "spectra.npz")
            for folder in (self.folder, log.folder)
        )
        for key in ("step", "epoch", "lambda_max", "active", "eigenvalues"):
            assert (getattr(one, key) == getattr(two, key)).all(), key


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


def fit(folder: Path, log: Memory, *callbacks: pl.Callback, **options: Any) -> Any:
    """Begin or go on with a run; return its model and callback."""
    module, callback = model(), mat(**SETTINGS)
    settings = {"logger": log, "enable_checkpointing": True}
    ckpt_path = options.pop("ckpt_path", None)
    run = trainer(folder, callback, Redo(), *callbacks, **(settings | options))
    run.fit(module, data(), ckpt_path=ckpt_path, weights_only=True)
    return log, module, callback


HOOKS = [
    ("on_train_batch_start", 13),
    ("on_train_batch_start", 12),  # the first batch of an epoch
    ("on_before_backward", 13),
    ("on_before_optimizer_step", 13),
    ("on_train_batch_end", 13),
    ("on_train_epoch_end", 12),
    ("in a probe", 14),
    ("half begun", 14),
    ("just begun", 6),
]


# The first pass looks at the model; episodes begin at steps 6, 10 and 14.
INSIDE = {
    "in a probe": (Passes, "run", 4),
    "half begun": (Schedule, "decided", 3),
    "just begun": (Ledger, "switch", 1),
}


def inside(monkeypatch: pytest.MonkeyPatch, where: str, action: Callable[[], None]) -> None:
    """Act while an episode begins."""
    owner, name, number = INSIDE[where]
    function = getattr(owner, name)
    calls = 0

    def interrupted(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        function(*args, **options)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(("hook", "step"), HOOKS)
def test_after_an_exception(
    hook: str, step: int, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Memory(tmp_path)
    keepers = (
        OnExceptionCheckpoint(tmp_path, "one"),
        ModelCheckpoint(tmp_path, filename="other", save_on_exception=True, save_top_k=-1),
    )
    stop = [] if hook in INSIDE else [Stop(hook, step, end)]
    with monkeypatch.context() as patch:
        if hook in INSIDE:
            inside(patch, hook, end)
        with pytest.raises(EndedError):
            fit(tmp_path, log, *keepers, *stop)
    for name in ("one", "other"):
        whole.check(*fit(tmp_path, log, ckpt_path=tmp_path / f"{name}.ckpt"))


@pytest.mark.parametrize("hook", ["on_before_backward", "on_before_optimizer_step"])
def test_after_an_exception_in_the_first_batch(hook: str, tmp_path: Path) -> None:
    """The probe before the first step is in the checkpoint of step 0, and stays in the file."""
    # Without a warm-up the cost of a full step is made up from the costs of the first probe.
    options = {"warmup_epochs": 0}
    whole, log = Whole(tmp_path / "whole", **options), Memory(tmp_path)
    for stop in ([OnExceptionCheckpoint(tmp_path, "stopped"), Stop(hook, 0, end)], []):
        module, callback = model(), mat(**SETTINGS, **options)
        fit = trainer(tmp_path, callback, Redo(), *stop, logger=log, enable_checkpointing=True)
        try:
            fit.fit(module, data(), ckpt_path=None if stop else tmp_path / "stopped.ckpt")
        except EndedError:
            assert stop
    whole.check(log, module, callback)


class EveryThird:
    """The last layer trains always, the others in every third step."""

    needs_spectra = False
    every_n_steps = 1

    def decide(self, history: Any, units: Any, episode: int) -> policies.Decision:
        active = torch.tensor([episode % 3 == 0] * (len(units) - 1) + [True])
        return policies.Decision(active, ("full",) * len(units), {}, units.kinds)


@pytest.mark.parametrize("where", ["at the end of a batch", "half begun", "just begun"])
def test_a_policy_of_every_step_goes_on_where_it_was(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes to the same decisions, and counts nothing again."""
    runs = []
    for stops in (False, True):
        log, save = Memory(tmp_path / str(stops)), OnExceptionCheckpoint(tmp_path)
        callback, module = mat(policy=EveryThird(), warmup_epochs=0), model()
        settings: dict[str, Any] = {"logger": log, "enable_checkpointing": True}
        path = None
        if stops:
            stop = [] if where in INSIDE else [Stop("on_train_batch_end", 9, end)]
            fit = trainer(tmp_path, callback, save, Redo(), *stop, **settings)
            with monkeypatch.context() as patch:
                if where in INSIDE:
                    inside(patch, where, end)
                with pytest.raises(EndedError):
                    fit.fit(module, data())
            callback, module = mat(policy=EveryThird(), warmup_epochs=0), model()
            path = tmp_path / "on_exception.ckpt"
        watch = Watch(callback)
        trainer(tmp_path, callback, watch, **settings).fit(module, data(), ckpt_path=path)
        assert callback.mat is not None
        runs.append((log.found, weights(module), callback.mat.episode, watch.active))
    whole, resumed = runs
    assert whole[0] == resumed[0]
    assert all(map(torch.equal, whole[1], resumed[1]))
    assert whole[2] == resumed[2] == 24
    assert whole[3][-len(resumed[3]) :] == resumed[3]


def test_after_sigterm(whole: Whole, tmp_path: Path) -> None:
    log = Memory(tmp_path)
    keeper = ModelCheckpoint(tmp_path, filename="stopped", save_on_exception=True)
    stop = Stop("on_before_backward", 15, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        fit(tmp_path, log, keeper, stop)
    whole.check(*fit(tmp_path, log, ckpt_path=tmp_path / "stopped.ckpt"))


@pytest.mark.parametrize("where", [*INSIDE, "in a step", "between epochs"])
def test_after_a_requeue_by_slurm(
    where: str, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    monkeypatch.setenv("SLURM_NODELIST", "here")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    requeued: list[list[str]] = []
    monkeypatch.setattr(
        "lightning.pytorch.trainer.connectors.signal_connector.call",
        lambda command: requeued.append(command) or 0,
    )
    log = Memory(tmp_path)
    plugins = [SLURMEnvironment(auto_requeue=True), AtomicCheckpointIO()]

    def requeue(_: Any = None) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise EndedError  # SLURM ends the job soon after

    hook, step = {"in a step": ("on_before_backward", 15)}.get(where, ("on_train_epoch_end", 12))
    stop = [] if where in INSIDE else [Stop(hook, step, requeue)]
    with monkeypatch.context() as patch:
        if where in INSIDE:
            inside(patch, where, requeue)
        with pytest.raises(EndedError):
            fit(tmp_path, log, *stop, plugins=plugins)
    assert requeued == [["scontrol", "requeue", "7"]]
    # Lightning finds the newest of such checkpoints by itself.
    assert [file.name for file in tmp_path.glob("hpc_ckpt_*")] == ["hpc_ckpt_1.ckpt"]
    whole.check(*fit(tmp_path, log, plugins=plugins))
