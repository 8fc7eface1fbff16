"""A rank that dies while it probes: the others end with an error, they do not wait for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import os, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from lightning_mat.engine import MAT
from lightning_mat.parallel.ranks import Ranks

dist.init_process_group("gloo", timeout=timedelta(seconds=30))
torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
mat = MAT(model, units="layers", ranks=Ranks(torch.device("cpu")))
mat.update(torch.randn(4, 8), step=0)
if dist.get_rank() == 1:
    model[0].register_forward_hook(lambda *_: os._exit(9))
try:
    mat.update(torch.randn(4, 8), step=1)
except RuntimeError as error:
    model(torch.randn(4, 8)).sum().backward()
    ungated = all(param.grad is not None for param in model.parameters())
    print("ended", ungated, flush=True)
    os._exit(3)
os._exit(0)
"""


def test_the_others_end_with_an_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=90)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [3, 9], said
    assert "ended" in said[0]
