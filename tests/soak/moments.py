"""Moments at which a process kills itself with SIGKILL, which nothing can catch or clean up after.

A moment is a function and the number of its call. Python offers no way to die at a given time and
have the same again in the next run, so the clock plays no part.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from lightning_mat import MAT, folders
from lightning_mat.mntk.accumulate import Accumulator
from lightning_mat.mntk.passes import Passes
from lightning_mat.optim import MATOptimizer
from lightning_mat.report.store import SpectraStore


class Moment(NamedTuple):
    """Where to die: before the call of ``owner.name``, after it, or with half of its bytes written.

    ``path`` is what the file's name must hold, for functions that write or rename several files.
    """

    owner: Any
    name: str
    when: str = "before"
    path: str = ""


MOMENTS: dict[str, Moment] = {
    "in a probe, before a pass": Moment(Passes, "run"),
    "in a probe, at a product": Moment(Accumulator, "add"),
    "in a probe, all measured": Moment(Accumulator, "finish", "after"),
    "decided, not applied": Moment(MAT, "apply"),
    "in a step, before the optimizer": Moment(MATOptimizer, "step"),
    "in a step, after the optimizer": Moment(MATOptimizer, "step", "after"),
    "half a checkpoint": Moment(torch, "save", "half"),
    "a whole checkpoint beside the old one": Moment(os, "replace", path=".ckpt"),
    "a new checkpoint": Moment(os, "replace", "after", ".ckpt"),
    "half a spectra file": Moment(np, "savez", "half"),
    "a whole spectra file beside the old one": Moment(os, "replace", path=".npz"),
    "a new spectra file": Moment(SpectraStore, "append", "after"),
    "half a file of eigenvalues": Moment(np, "save", "half"),
    "eigenvalues without their row": Moment(os, "replace", "after", ".npy"),
    "spectra cut back, not yet the eigenvalues": Moment(SpectraStore, "_remove_eigenvalues"),
}

# Of a checkpoint that is a folder, in the order in which they come.
FOLDERS: dict[str, Moment] = {
    "half a shard": Moment(torch, "save", "half"),
    "shards without their index": Moment(FileSystem, "rename", path=".metadata"),
    "half of what is beside the shards": Moment(torch, "save", "half", "meta.pt"),
    "a whole folder beside the old one": Moment(folders, "exchange"),
    "a new folder, the old one beside it": Moment(folders, "exchange", "after"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: Moment, number: int) -> None:
    """Let this process die at the n-th call, n ≥ 1, of the moment's function."""
    function: Callable[..., Any] = getattr(moment.owner, moment.name)
    calls = 0

    def fatal(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += moment.path in str(args[-1])
        if calls < number or moment.path not in str(args[-1]):
            return function(*args, **options)
        if moment.when == "half":
            _write_half(function, args, options)
        if moment.when == "after":
            function(*args, **options)
        die()

    setattr(moment.owner, moment.name, fatal)


def _write_half(function: Callable[..., Any], args: tuple[Any, ...], options: Any) -> None:
    """Write the first half of what a function would write to the stream or file it is given."""
    given = [a for a in args if hasattr(a, "write") or isinstance(a, Path)]
    assert len(given) == 1
    buffer = io.BytesIO()
    function(*(buffer if a is given[0] else a for a in args), **options)
    stream = given[0].open("wb") if isinstance(given[0], Path) else given[0]
    stream.write(buffer.getvalue()[: buffer.tell() // 2])
    stream.flush()
