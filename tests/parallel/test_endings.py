"""Runs of two processes that end early go on as if nothing had happened, sharded or not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from lightning_mat.mntk.probe import Probe
from lightning_mat.report.store import read
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
}


class RedoAll(Redo):
    """Lets the loader's state say which batches are done, by the samples of all processes."""

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        loader = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
        before = loader["samples"]
        super().on_save_checkpoint(trainer, module, checkpoint)
        if loader["samples"] != before:
            loader["samples"] *= trainer.world_size


def fit(folder: Path, shards: bool, *callbacks: Any, ckpt_path: Path | None = None) -> Any:
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
    keepers: list[Any] = [OnExceptionCheckpoint(folder, "one")]
    with pytest.MonkeyPatch.context() as patch:
        if hook in INSIDE:
            inside(patch, hook, end)
        elif name == "SIGTERM":
            keepers = [ModelCheckpoint(folder, filename="one", save_on_exception=True)]
            keepers.append(Stop(hook, step, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
        else:
            keepers.append(Stop(hook, step, end))
        first = fit(folder, shards, *keepers)
    second = fit(folder, shards, ckpt_path=folder / "one.ckpt")
    return never_stopped(base, shards), first, second


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
    one, two = (
        read(f / "memory" / "version_0" / "mat" / "spectra.npz") for f in (base, tmp_path)
    )
    assert len(one.step) == 5
    for key in ("step", "epoch", "lambda_max", "active", "eigenvalues"):
        assert (getattr(one, key) == getattr(two, key)).all(), key
