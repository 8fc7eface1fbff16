"""A training run in a process of its own, which may die, and what it leaves on the disk."""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mat.checkpoint import AtomicCheckpointIO
from lightning_mat.report.store import read
from tests.lightning_models import Small, data, mat, trainer, weights
from tests.soak.moments import MOMENTS, die_at

STEPS = 60
_context = multiprocessing.get_context("forkserver")
# Imported once; every run is a fork of that process.
_context.set_forkserver_preload(["tests.soak.runs"])


def train(folder: Path, steps: int, moment: str | None, number: int) -> None:
    """Train from the last checkpoint, or from the beginning, and write the result."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if moment is not None:
        die_at(MOMENTS[moment], number)
    save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=2, save_top_k=1)
    callback = mat(every_n_steps=3)
    fit = trainer(
        folder,
        callback,
        save,
        max_epochs=-1,
        max_steps=steps,
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
    )
    torch.manual_seed(0)
    module = Small()
    last = folder / "last.ckpt"
    fit.fit(module, data(), ckpt_path=last if last.exists() else None, weights_only=True)
    assert callback.mat is not None
    result = {
        "weights": weights(module),
        "history": callback.mat.history.state_dict(),
        "decision": callback.mat.decision.state_dict(),
        "summary": {k: v for k, v in callback.summary().items() if "seconds" not in k},
    }
    torch.save(result, folder / "result.pt")


def run(folder: Path, moment: str | None = None, number: int = 0, steps: int = STEPS) -> bool:
    """Run :func:`train` in a new process; return whether it was killed."""
    process: Any = _context.Process(target=train, args=(folder, steps, moment, number))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def check_files(folder: Path) -> None:
    """Check that everything that looks like a whole file is one."""
    for checkpoint in folder.glob("*.ckpt"):
        assert torch.load(checkpoint, weights_only=True)["global_step"] > 0
    spectra = folder / "mat" / "spectra.npz"
    if spectra.exists():
        stored = read(spectra)
        assert stored.eigenvalues is not None
        assert (stored.eigenvalues[:, :, 0] == stored.lambda_max).all()


def check_equal(folder: Path, whole: Path) -> None:
    """Check that a run ended as another one did, to the bit."""
    one, other = (torch.load(f / "result.pt", weights_only=True) for f in (folder, whole))
    assert all(map(torch.equal, one["weights"], other["weights"]))
    assert torch.equal(one["decision"]["active"], other["decision"]["active"])
    assert one["decision"]["reasons"] == other["decision"]["reasons"]
    assert one["summary"] == other["summary"]
    for key in ("lambda_max", "lambda_min", "trace", "effective_rank"):
        assert torch.equal(one["history"][key], other["history"][key])
    ours, theirs = (read(f / "mat" / "spectra.npz") for f in (folder, whole))
    assert ours.reasons == theirs.reasons
    for key in ("step", "epoch", "lambda_max", "trace", "active", "eigenvalues"):
        assert (getattr(ours, key) == getattr(theirs, key)).all(), key
