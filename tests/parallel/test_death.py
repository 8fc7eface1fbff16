"""A rank that dies or stalls while it probes: the others end with an error, and do not hang."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from lightning_mat import policies
from lightning_mat.engine import MAT
from lightning_mat.parallel.ranks import Ranks

dist.init_process_group("gloo", timeout=timedelta(seconds=120))
group = dist.new_group(timeout=timedelta(seconds=float(sys.argv[2])))
torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
policy = policies.Top(0.5, protect=False)
mat = MAT(model, units="layers", policy=policy, ranks=Ranks(torch.device("cpu"), group))
mat.update(torch.randn(4, 8), step=0)
if dist.get_rank() == 1:
    end = {"dies": lambda: os._exit(9), "stalls": lambda: os.kill(os.getpid(), signal.SIGSTOP)}
    model[0].register_forward_hook(lambda *_: end[sys.argv[1]]())
start = time.monotonic()
try:
    mat.update(torch.randn(4, 8), step=1)
except RuntimeError:
    waited = time.monotonic() - start
    decided = mat.decision.active.tolist()
    model(torch.randn(4, 8)).sum().backward()
    gated = [any(bool(p.grad is not None and p.grad.any()) for p in m.parameters()) for m in model]
    mat.close()
    model(torch.randn(4, 8)).sum().backward()
    whole = all(bool(p.grad.any()) for p in model.parameters())
    print(json.dumps([waited, gated == decided, whole]), flush=True)
    os._exit(3)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("end", "timeout", "longest"),
    [
        # The connection is closed, and the others know at once.
        ("dies", 60.0, 60.0),
        # The connection stays open: the process group's timeout alone ends the waiting. A minute is
        # what a busy machine may lose; torch's own timeout would be half an hour.
        ("stalls", 4.0, 64.0),
    ],
)
def test_the_others_end_with_an_error_within_the_timeout(
    end: str, timeout: float, longest: float
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, end, str(timeout)],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = ranks[0].communicate(timeout=180)[0]
        assert ranks[0].returncode == 3, said
        if end == "dies":
            assert ranks[1].wait(timeout=60) == 9
        else:
            assert ranks[1].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    waited, gated, whole = json.loads(said.splitlines()[-1])
    assert waited < longest
    assert gated
    assert whole
