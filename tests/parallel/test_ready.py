"""Gradients that come after all: DDP is told what gets none, and nothing that comes is lost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mat import MAT, Partition
from lightning_mat.parallel import Ranks, Ready
from tests.parallel import cases


class Routed(nn.Module):
    """Two blocks that units own, and two experts of which each call uses some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([cases.Block(), cases.Block()])
        self.experts = nn.ModuleList([nn.Linear(cases.WIDTH, 1) for _ in range(2)])
        self.double()

    def forward(self, x: Tensor, uses: str) -> Tensor:
        x = self.blocks[1](self.blocks[0](x))
        return sum((self.experts[int(i)](x) for i in uses), x.sum()).square().mean()


# Each step's backward passes; of each, which experts the ranks use, and whether it synchronises.
# The first pass is the first after a decision.
ORDERS: dict[str, list[list[tuple[tuple[str, str], bool]]]] = {
    "in a later step": [[(("0", "0"), True)], [(("01", "01"), True)], [(("0", "0"), True)]],
    "in a later step on one rank": [[(("0", "0"), True)], [(("0", "01"), True)]],
    "in a second pass": [[(("0", "0"), True), (("01", "01"), True)], [(("0", "0"), True)]],
    "in a first pass": [[(("0", "0"), True)], [(("01", "01"), True), (("0", "0"), True)]],
    "without synchronising": [[(("01", "01"), False), (("0", "0"), True)], [(("0", "0"), True)]],
    "on one rank without synchronising": [
        [(("0", "01"), False), (("0", "0"), True)],
        [(("01", "0"), False), (("0", "0"), True)],
    ],
}


def gradients(steps: Any, views: bool, wrapped: bool) -> list[list[Tensor | None]]:
    """Return all gradients of each step, of this rank's passes or of all ranks' in one process."""
    model = Routed()
    mat = MAT(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        Partition(cases.units(model), model),
        cases.Cycle(),
        skip="units",
        ranks=Ranks(torch.device("cpu")) if wrapped else None,
    )
    mat.update(None, step=0)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=views) if wrapped else None
    ready = None if ddp is None else Ready(ddp, mat)
    x = torch.arange(2.0 * cases.WIDTH, dtype=torch.float64).view(2, cases.WIDTH) / 10
    found = []
    for number, step in enumerate(steps):
        for uses, synchronises in step:
            with ExitStack() as stack:
                if ddp is None or ready is None:
                    sum(model(x + number + r, uses[r]) / 2 for r in range(2)).backward()
                    continue
                stack.enter_context(nullcontext() if synchronises else ddp.no_sync())
                rank = dist.get_rank()
                loss = ddp(x + number + rank, uses[rank])
                ready.before_backward(loss)
                loss.backward()
                ready.after_backward()
        found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    mat.close()
    assert ready is None or not any(p._backward_hooks for p in model.parameters())
    return found


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("name", ORDERS)
def test_a_gradient_that_comes_after_all_is_kept(
    name: str, views: bool, on_both: Callable[..., list[Any]]
) -> None:
    alone = gradients(ORDERS[name], views, wrapped=False)
    assert any(step[-1] is not None for step in alone)  # the second expert's
    for mine in on_both(gradients, ORDERS[name], views, True):
        for step, expected in zip(mine, alone, strict=True):
            assert [g is None for g in step] == [g is None for g in expected]
            for grad, one in zip(step, expected, strict=True):
                if grad is not None:
                    torch.testing.assert_close(grad, one, rtol=1e-10, atol=1e-12)
