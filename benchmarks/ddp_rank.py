"""What one process of benchmarks/ddp.py measures: steps, probes and plain all-reduces."""

from __future__ import annotations

import copy
import gc
import pickle
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.models import WORKLOADS
from benchmarks.study import choose
from lightning_mat.engine import MAT
from lightning_mat.parallel import Ranks, Ready
from lightning_mat.parallel.hooks import Reduction, reduce_bucket
from lightning_mat.parallel.shares import share_of_probe, share_out
from lightning_mat.policies import Decision

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        model: Name of a workload of benchmarks/step.py.
        shares: Shares of the units that train.
        batch_size: Samples of a step on each rank.
        samples: S of a probe.
        rounds: Timed calls of everything.
        quick: Tiny sizes.
        ranks: Numbers of ranks for which loads and bytes are counted.
    """

    model: str
    shares: tuple[float, ...]
    batch_size: int
    samples: int
    rounds: int
    quick: bool
    ranks: tuple[int, ...]


class Step:
    """A training step of one way: plain DDP, DDP with resting units, or sending what trains."""

    def __init__(self, model: nn.Module, job: Job, units: str, share: float, way: str) -> None:
        self.model = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4)
        self.ddp = DistributedDataParallel(self.model)
        self.mat = MAT(self.model, optimizer, units)
        self.ready = Ready(self.ddp, self.mat)
        self.reduction = Reduction()
        if way == "ddp_mat":
            self.ddp.register_comm_hook(self.reduction, reduce_bucket)
            self.reduction.follow(self.mat)
        active = choose(self.mat.part, share)
        count = len(active)
        self.mat.decision = Decision(active, ("drawn",) * count, {}, self.mat.part.kinds)
        self.mat.apply()
        self.workload = WORKLOADS[job.model]

    def __call__(self, batch: Any) -> None:
        """Make one step."""
        self.mat.optimizers[0].zero_grad()
        loss = self.workload.loss(self.ddp, batch)
        self.ready.before_backward(loss)
        loss.backward()
        self.ready.after_backward()
        self.mat.optimizers[0].step()

    def close(self) -> None:
        """Give the model back."""
        self.ready.close()
        self.mat.close()


def sizes_of(job: Job) -> dict[str, int]:
    """Return the sizes of model and data."""
    workload = WORKLOADS[job.model]
    return dict(workload.quick if job.quick else workload.full)


def measure(rank: int, size: int, address: str, job: Job) -> dict[str, Any]:
    """Return what rank 0 measured with so many ranks; all must call it.

    Args:
        rank: This process's.
        size: Number of processes.
        address: ``tcp://...`` where they meet.
        job: What to measure.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    workload, sizes = WORKLOADS[job.model], sizes_of(job)
    torch.manual_seed(0)
    model = workload.make(0.0, **sizes)
    batch = workload.draw(job.batch_size, "cpu", **sizes)
    rows = [
        _step_row(Step(model, job, workload.units, share, way), way, share, batch, job.rounds)
        for share in job.shares
        for way in ("ddp", "ddp_mat")
    ]
    found = {
        "processes": size,
        "steps": rows,
        "probe": _probe(model, job),
        "all_reduce": [_all_reduce(4 << power, job.rounds) for power in (8, 16, 20, 22, 24)],
    }
    gc.collect()  # reducers have to go before their group
    dist.destroy_process_group()
    return found


def _step_row(step: Step, way: str, share: float, batch: Any, rounds: int) -> dict[str, Any]:
    part = step.mat.part
    resting = int(part.numel[~step.mat.active].sum())
    total = sum(p.numel() for p in step.model.parameters())
    row = {
        "way": way,
        "share": share,
        "seconds": _seconds(lambda: step(batch), rounds),
        "elements": total,
        "trained_elements": total - resting,
        "bytes": step.reduction.bytes_reduced if way == "ddp_mat" else 4 * total,
    }
    step.close()
    return row


def _probe(model: nn.Module, job: Job) -> dict[str, Any]:
    """Return seconds of a shared probe, of a forward pass alone, and what scaling needs."""
    workload, sizes = WORKLOADS[job.model], sizes_of(job)
    torch.manual_seed(1)
    samples = workload.draw(job.samples, "cpu", **sizes)
    mat = MAT(model, units=workload.units, ranks=Ranks(CPU), step_samples=job.samples)
    seconds = _seconds(lambda: mat.measure(samples), job.rounds)

    def forward() -> None:
        with torch.no_grad():
            workload.loss(model, samples)

    cost = mat.probe.measure(samples).cost
    buffers = sum(1 for buffer in model.buffers() if buffer.numel())
    loads = {n: share_of_probe(mat.part, cost, share_out(mat.part, cost, n)) for n in job.ranks}
    return {
        "seconds": seconds,
        "forward_seconds": _seconds(forward, job.rounds),
        "units": len(mat.part),
        "samples": job.samples,
        "busiest": {str(n): max(load) for n, load in loads.items()},
        "work": {str(n): sum(load) for n, load in loads.items()},
        # A flag, the samples (two), the numbers; where there are buffers, a flag and each of them.
        "collectives": 4 + (1 + buffers if buffers else 0),
        "gathered_bytes": 8 * len(mat.part) * (job.samples + 2),
        "decision_bytes": len(pickle.dumps(mat.decision.state_dict())),
        "cost_per_sample": float(cost.sum()),
    }


def _all_reduce(count: int, rounds: int) -> dict[str, float]:
    tensor = torch.zeros(count // 4)

    def reduce() -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    return {"bytes": float(tensor.numel() * 4), "seconds": _seconds(reduce, rounds)}


def _seconds(function: Callable[[], object], rounds: int) -> float:
    """Return the median over some calls, after two that are not timed; all ranks start together."""
    times = []
    for turn in range(-2, rounds):
        dist.barrier()
        start = time.perf_counter()
        function()
        dist.barrier()
        if turn >= 0:
            times.append(time.perf_counter() - start)
    return statistics.median(times)
