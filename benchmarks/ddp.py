"""What several processes cost: bytes per step, seconds of steps and probes, beside the formulas.

    python benchmarks/ddp.py [--processes 1 2 4] [--model NAME] [--shares 1 .5 .25]
                             [--batch-size 4] [--samples 16] [--rounds 7] [--quick]

Every process has one thread and a batch of its own; gloo is between them. A step is zero_grad,
forward, loss, backward with its all-reduces, and AdamW, through DDP with resting units ("ddp") and
with the hook that sends what trains ("ddp_mat"). Bytes are those that a rank gives to all-reduces.
A probe is the engine's, its units shared out over the ranks. Bare all-reduces of several sizes say
what the wire takes. The load of the busiest rank and the bytes of a probe are counted for 8, 64 and
1,024 ranks, too: docs/scaling.md has the formulas.

Writes ``ddp-cpu.json``.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write_result
from benchmarks.ddp_markdown import page
from benchmarks.ddp_rank import Job, measure
from benchmarks.models import WORKLOADS

LARGE = (8, 64, 1024)


def run(size: int, job: Job) -> dict[str, Any]:
    """Return what a run with so many processes measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (size, address, job, queue), size)
    found: dict[str, Any] = queue.get()
    return found


def _rank(rank: int, size: int, address: str, job: Job, queue: Any) -> None:
    found = measure(rank, size, address, job)
    if rank == 0:
        queue.put(found)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--model", choices=list(WORKLOADS), default="bert-small")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--batch-size", type=int, default=4, help="samples of a step on each rank")
    parser.add_argument("--samples", type=int, default=16, help="samples of a probe")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument(
        "--folder", type=Path, help="of the result; benchmarks/results if not given"
    )
    args = parser.parse_args(arguments)
    ranks = tuple(sorted({*args.processes, *LARGE}))
    job = Job(
        args.model,
        tuple(args.shares),
        args.batch_size,
        args.samples,
        args.rounds,
        args.quick,
        ranks,
    )
    result = {
        "model": args.model,
        "title": WORKLOADS[args.model].title,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "cores": len(os.sched_getaffinity(0)),
        "large": list(LARGE),
        "runs": [run(size, job) for size in args.processes],
    }
    write_result("ddp-cpu", result, folder=args.folder)
    print(page(result))
    return result


if __name__ == "__main__":
    main()
