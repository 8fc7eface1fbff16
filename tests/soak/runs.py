"""A training run in a process of its own, which may die, and what it leaves on the disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_mat.checkpoint import AtomicCheckpointIO
from lightning_mat.parallel import MATDDPStrategy
from lightning_mat.parallel.atomic import AtomicModelParallelStrategy
from lightning_mat.report.store import read
from tests.lightning_models import Small, data, mat, trainer
from tests.soak.moments import FOLDERS, MOMENTS, die_at

STEPS = 60
_context = multiprocessing.get_context("forkserver")
# Imported once; every run is a fork of that process.
_context.set_forkserver_preload(["tests.soak.runs"])


class Die(NamedTuple):
    """At which call of which moment a process of which rank dies."""

    moment: str
    number: int
    rank: int = 0


class Sharded(Small):
    """The model with each layer sharded over all processes."""

    def configure_model(self) -> None:
        if isinstance(self.net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def strategy(ranks: int, shards: bool) -> Any:
    """Return the strategy of a run."""
    if shards:
        return AtomicModelParallelStrategy(
            data_parallel_size=ranks, tensor_parallel_size=1, process_group_backend="gloo"
        )
    return MATDDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto"


def train(
    folder: Path, steps: int, die: Die | None, shards: bool, rank: int, ranks: int, port: int
) -> None:
    """Train from the last checkpoint, or from the beginning, and write the result."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if die is not None and die.rank == rank:
        die_at((MOMENTS | FOLDERS)[die.moment], die.number)
    if ranks > 1:
        addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks}
        places = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0}
        os.environ |= {name: str(value) for name, value in (addresses | places).items()}
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
        strategy=strategy(ranks, shards),
        devices=ranks,
    )
    torch.manual_seed(0)
    module = Sharded() if shards else Small()
    last = folder / "last.ckpt"
    batches = data(ranks=ranks, rank=rank)
    fit.fit(module, batches, ckpt_path=last if last.exists() else None, weights_only=True)
    assert callback.mat is not None
    result = {
        "weights": [whole(p) for p in module.parameters()],
        "history": callback.mat.history.state_dict(),
        "decision": callback.mat.decision.state_dict(),
        "summary": {k: v for k, v in callback.summary().items() if "seconds" not in k},
    }
    torch.save(result, folder / f"result-{rank}.pt")


def whole(param: torch.Tensor) -> torch.Tensor:
    """Return a copy of a parameter, of all its rows where this process holds some."""
    param = param.detach()
    return param.full_tensor() if isinstance(param, DTensor) else param.clone()


def run(
    folder: Path,
    die: Die | None = None,
    steps: int = STEPS,
    ranks: int = 1,
    shards: bool = False,
) -> bool:
    """Run :func:`train` in new processes; return whether one was killed.

    As launchers do, it ends the others when one has died.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[Any] = [
        _context.Process(target=train, args=(folder, steps, die, shards, rank, ranks, port))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        waiting = set(processes)
        while waiting and not any(process.exitcode for process in processes):
            ended = wait([process.sentinel for process in waiting], timeout=120)
            assert ended, "the processes wait for each other"
            waiting = {process for process in waiting if process.exitcode is None}
        killed = [process.exitcode for process in processes if process.exitcode]
    finally:
        for process in processes:
            process.kill()
            process.join()
    # Those that saw the connection to the dead one break may have ended with an error themselves.
    assert not killed or -signal.SIGKILL in killed, killed
    return bool(killed)


def check_files(folder: Path) -> None:
    """Check that everything that looks like a whole file is one."""
    for checkpoint in folder.glob("*.ckpt"):
        file = checkpoint
        if checkpoint.is_dir():
            file = checkpoint / "meta.pt"
            index = FileSystemReader(checkpoint).read_metadata().storage_data
            for part in index.values():
                assert (checkpoint / part.relative_path).stat().st_size >= part.offset + part.length
        assert torch.load(file, weights_only=True)["global_step"] > 0
    spectra = folder / "mat" / "spectra.npz"
    if spectra.exists():
        stored = read(spectra)
        assert stored.eigenvalues is not None
        assert (stored.eigenvalues[:, :, 0] == stored.lambda_max).all()


def check_equal(folder: Path, whole: Path, rank: int = 0) -> None:
    """Check that a process' run ended as another one did, to the bit."""
    one, other = (torch.load(f / f"result-{rank}.pt", weights_only=True) for f in (folder, whole))
    assert all(map(torch.equal, one["weights"], other["weights"]))
    assert torch.equal(one["decision"]["active"], other["decision"]["active"])
    assert one["decision"]["reasons"] == other["decision"]["reasons"]
    for key in ("lambda_max", "lambda_min", "trace", "effective_rank"):
        assert torch.equal(one["history"][key], other["history"][key])
    ours, theirs = (read(f / "mat" / "spectra.npz") for f in (folder, whole))
    assert ours.reasons == theirs.reasons
    # Not the epoch: Lightning may count one twice, see docs/reliability.md.
    for key in ("step", "lambda_max", "trace", "active", "eigenvalues"):
        assert (getattr(ours, key) == getattr(theirs, key)).all(), key
    assert one["summary"] == other["summary"]
