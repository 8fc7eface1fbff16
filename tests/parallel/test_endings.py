"""Runs of two processes that end early go on as if nothing had happened, sharded or not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import nn

from lightning_mat.report.store import read
from lightning_mat.shards import reshard
from tests.faults.test_resume import INSIDE, EndedError, Memory, Redo, Stop, end, inside
from tests.lightning_models import Small, data, mat, trainer
from tests.parallel import cases, sharded
from tests.soak import runs

pytestmark = pytest.mark.filterwarnings("ignore")

# How a run ends, and at which step; in a probe at that of its number, see INSIDE.
ENDINGS = {
    "exception in a step": ("on_before_optimizer_step", 13),
    "exception before a backward pass": ("on_before_backward", 13),
    "exception in a probe": ("in a probe", 0),
    "SIGTERM": ("on_before_backward", 15),
    "requeued by SLURM": ("on_before_backward", 15),
}


class RedoAll(Redo):
    """Lets the loader's state say which batches are done, by the samples of all processes."""

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        loader = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
        before = loader["samples"]
        super().on_save_checkpoint(trainer, module, checkpoint)
        if loader["samples"] != before:
            loader["samples"] *= trainer.world_size


def fit(
    folder: Path,
    shards: bool,
    *callbacks: Any,
    ckpt_path: Path | None = None,
    slurm: bool = False,
) -> Any:
    """Train; return what a run leaves, or what it has left when an error ended it."""
    log, callback = Memory(folder), mat(every_n_steps=4)
    run = trainer(
        folder,
        callback,
        RedoAll(),
        *callbacks,
        logger=log,
        enable_checkpointing=True,
        strategy=runs.strategy(2, shards),
        devices=2,
        plugins=[SLURMEnvironment(auto_requeue=True)] if slurm else [],
    )
    torch.manual_seed(0)
    module: nn.Module = runs.Sharded() if shards else Small()
    ended = ""
    try:
        batches = data(ranks=2, rank=dist.get_rank())
        run.fit(module, batches, ckpt_path=ckpt_path, weights_only=True)
    except (EndedError, SystemExit) as error:
        ended = type(error).__name__
    found = {"ended": ended, "log": log.found, "step": run.global_step}
    if not ended:
        found["weights"] = [runs.whole(p) for p in module.parameters()]
        found["decision"] = callback.mat.decision.digest()
        found["history"] = callback.mat.history.state_dict()
    return found


@cache
def never_stopped(folder: Path, shards: bool) -> Any:
    return fit(folder, shards)


def ended_and_resumed(base: Path, folder: Path, shards: bool, name: str) -> Any:
    """Return the end of a run that was never stopped, and the parts of one that was."""
    hook, step = ENDINGS[name]
    whole = never_stopped(base, shards)
    with pytest.MonkeyPatch.context() as patch:
        if name == "requeued by SLURM":
            as_in_slurm(patch)
            first = fit(folder, shards, Stop(hook, step, requeued), slurm=True)
            # Lightning finds the newest of such checkpoints by itself.
            return whole, first, fit(folder, shards, slurm=True)
        keepers: list[Any] = [OnExceptionCheckpoint(folder, "one")]
        if hook in INSIDE:
            inside(patch, hook, end)
        elif name == "SIGTERM":
            keepers = [ModelCheckpoint(folder, filename="one", save_on_exception=True)]
            keepers.append(Stop(hook, step, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
        else:
            keepers.append(Stop(hook, step, end))
        first = fit(folder, shards, *keepers)
    return whole, first, fit(folder, shards, ckpt_path=folder / "one.ckpt")


def as_in_slurm(patch: pytest.MonkeyPatch) -> None:
    rank = str(dist.get_rank())
    job = {"JOB_ID": "7", "JOB_NAME": "train", "NODELIST": "here", "NODEID": "0"}
    tasks = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "PROCID": rank, "LOCALID": rank}
    for name, value in (job | tasks).items():
        patch.setenv(f"SLURM_{name}", value)
    patch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", lambda _: 0)


def requeued(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    raise EndedError  # SLURM ends the job soon after


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("shards", [False, True], ids=["ddp_mat", "fsdp2"])
def test_a_run_that_was_ended_goes_on_as_one_that_was_not(
    shards: bool, name: str, base: Path, tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    base = base / str(shards)
    both = on_both(ended_and_resumed, base, tmp_path, shards, name)
    for whole, first, second in both:
        assert not whole["ended"]
        assert not second["ended"]
        assert first["ended"] == ("SIGTERMException" if name == "SIGTERM" else "EndedError")
        assert 6 < first["step"] < whole["step"] == second["step"] == 24
        assert all(map(torch.equal, whole["weights"], second["weights"]))
        assert whole["decision"] == second["decision"] == both[0][0]["decision"]
        for key in ("lambda_max", "trace"):
            assert torch.equal(whole["history"][key], second["history"][key])
        assert len(whole["log"]) > 20
        assert first["log"] | second["log"] == whole["log"]
    one, two = (read(f / "memory" / "version_0" / "mat" / "spectra.npz") for f in (base, tmp_path))
    assert len(one.step) == 5
    for key in ("step", "epoch", "lambda_max", "active", "eigenvalues"):
        assert (getattr(one, key) == getattr(two, key)).all(), key


def two_and_one(folder: Path) -> None:
    """Leave a checkpoint of two processes inside an epoch and an episode."""
    save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    half = {"callbacks": [save], "enable_checkpointing": True, "max_steps": 7}
    cases.fit(folder, ("ddp_mat", {}), mat=MAT, **half)


# Decides at steps 0, 4 and 8.
MAT = {"alpha": "auto", "every_n_steps": 4, "skip": "units"}


def test_one_process_goes_on_with_the_decisions_of_two(
    tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    on_both(two_and_one, tmp_path)
    last = {"mat": MAT, "ckpt_path": tmp_path / "last.ckpt"}
    both = on_both(cases.gradients, tmp_path / "both", ("ddp_mat", {}), last)
    alone = cases.gradients(tmp_path / "alone", None, last)
    assert alone["active"] == both[0]["active"] == both[1]["active"]
    assert len(alone["active"]) == 5
    assert not all(map(all, alone["active"]))
    assert alone["history"]["step"] == both[0]["history"]["step"] == [0, 4, 8]
    for a, b in zip(alone["weights"], both[0]["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_checkpoint_of_ddp_mat_loads_without_the_callback(
    tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    on_both(two_and_one, tmp_path)
    last = tmp_path / "last.ckpt"
    alone = cases.gradients(tmp_path / "alone", None, {"ckpt_path": last})
    for name in ("ddp", "ddp_mat"):
        folder = tmp_path / name
        for mine in on_both(cases.gradients, folder, (name, {}), {"ckpt_path": last}):
            assert len(mine["grads"]) == 5
            assert all(g is not None for grads in mine["grads"] for g in grads)
            for a, b in zip(mine["weights"], alone["weights"], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def without_the_callback(folder: Path) -> Any:
    """Return step counts and weights before and after a sharded run goes on in plain Lightning."""
    save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    half = {"callbacks": [save], "enable_checkpointing": True, "max_steps": 3}
    # The first unit's parameters rest from the start: they have never trained.
    policy = sharded.Listed(["00 0111 1111"])
    trained, *_ = sharded.fit(folder / "half", mat={"policy": policy}, **half)
    reshard(trained)  # a validation at the end leaves what is outermost gathered
    before = [sharded.full(p) for p in trained.parameters()]
    counts = Counts()
    last = {"ckpt_path": folder / "last.ckpt", "max_steps": 5}
    module, *_ = sharded.fit(folder / "more", plain=True, callbacks=[counts], **last)
    reshard(module)
    names = [name for name, _ in module.net.named_parameters()]
    return names, before, counts.found, [sharded.full(p) for p in module.parameters()]


class Counts(pl.Callback):
    """Notes the optimizer's step counts, where training starts and after each step."""

    def __init__(self) -> None:
        self.found: list[list[int]] = []

    def note(self, trainer: Any, module: Any, *_: Any) -> None:
        state = trainer.optimizers[0].state
        self.found.append([int(sharded.full(state[p]["step"])) for p in module.parameters()])

    on_train_start = on_train_batch_end = note


def test_a_sharded_checkpoint_loads_without_the_callback(
    tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    for names, before, counts, after in on_both(without_the_callback, tmp_path):
        never = ("words.weight", "blocks.0.norm.weight", "blocks.0.norm.bias")
        assert counts[0] == [0 if name in never else 3 for name in names]
        assert counts[-1] == [count + 2 for count in counts[0]]
        for old, new in zip(before, after, strict=True):
            assert not torch.equal(old, new)
