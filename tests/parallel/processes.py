"""Processes that stay for a whole test session, because starting them takes most of the time.

A test calls a function of a module in ``tests.parallel`` on all of them and gets all results.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Processes:
    """Ranks with gloo between them, as ``torchrun`` would start them.

    Args:
        size: How many.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._started: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """Return what a function returns on every rank; an exception is returned, not raised.

        Raises:
            TimeoutError: If a rank does not answer in so many seconds; all are ended then.
        """
        if not self._started:
            self._start()
        for _, pipe in self._started:
            pipe.send((function, args))
        results = []
        for process, pipe in self._started:
            if not pipe.poll(timeout):
                self.close()
                raise TimeoutError(f"process {process.name} does not answer: do ranks disagree?")
            results.append(pipe.recv())
        return results

    def close(self) -> None:
        """End the processes; the next call starts others."""
        for process, _ in self._started:
            process.kill()
            process.join()
        self._started = []

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, port, theirs), name=str(rank), daemon=True
            )
            process.start()
            self._started.append((process, ours))


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        NODE_RANK="0",
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(function(*args))
        except BaseException as error:
            error.add_note(traceback.format_exc()) if hasattr(error, "add_note") else None
            pipe.send(error)
