"""Four processes, where it matters in which order gradients are added, and what DDP keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mat import MAT, Partition
from lightning_mat.parallel import Ranks, Ready
from lightning_mat.parallel.hooks import Reduction, reduce_bucket
from tests.parallel import cases

STEPS, STOP = 6, 3


class Noted(Reduction):
    """Notes which parameters lie in which bucket."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places = {id(p): i for i, p in enumerate(model.parameters())}
        self.buckets: list[list[int]] = []

    def __call__(self, bucket: Any) -> Any:
        self.buckets.append([self.places[id(p)] for p in bucket.parameters()])
        return super().__call__(bucket)


class Part:
    """A model, wrapped, and what follows its decisions."""

    def __init__(self, skip: str, order: list[str]) -> None:
        torch.manual_seed(0)
        model = nn.ModuleDict({"blocks": nn.ModuleList([cases.Block(), cases.Block()])})
        model.forward = lambda x: model["blocks"][1](model["blocks"][0](x))
        self.model, self.order = model, order
        self.ddp = DistributedDataParallel(model, bucket_cap_mb=0.0005)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        part = Partition(cases.units(model), model)
        ranks = Ranks(torch.device("cpu"))
        self.mat = MAT(model, optimizer, part, cases.Cycle(), skip=skip, ranks=ranks)
        self.noted = Noted(model)
        self.ddp.register_comm_hook(self.noted, reduce_bucket)
        self.ready = Ready(self.ddp, self.mat, order)
        self.noted.follow(self.mat)
        self.noted.buckets.clear()

    def step(self, number: int) -> list[list[int]]:
        """Train a step; return its buckets."""
        self.mat.update(None, step=number)
        generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
        loss = self.ddp(torch.randn(4, cases.WIDTH, generator=generator)).square().mean()
        self.ready.before_backward(loss)
        loss.backward()
        self.ready.after_backward()
        self.mat.optimizers[0].step()
        self.mat.optimizers[0].zero_grad()
        buckets, self.noted.buckets = self.noted.buckets, []
        return buckets

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def resumed(skip: str) -> Any:
    """Return weights and buckets of a run, and of one that was stopped and goes on."""
    whole, first = Part(skip, []), Part(skip, [])
    buckets = [whole.step(number) for number in range(STEPS)]
    for number in range(STOP):
        first.step(number)
    second = Part(skip, list(first.order))
    second.model.load_state_dict(first.model.state_dict())
    second.mat.optimizers[0].load_state_dict(first.mat.optimizers[0].state_dict())
    second.mat.load_state_dict(first.mat.state_dict())
    after = [second.step(number) for number in range(STOP, STEPS)]
    found = (whole.weights(), second.weights(), buckets, after)
    for part in (whole, first, second):
        part.ready.close()
        part.mat.close()
        assert not any(p._backward_hooks for p in part.model.parameters())
    return found


@pytest.mark.parametrize("skip", ["weights", "units"])
def test_a_resumed_run_adds_gradients_in_the_same_order(
    skip: str, on_four: Callable[..., list[Any]]
) -> None:
    for whole, second, buckets, after in on_four(resumed, skip):
        assert len(buckets[0]) == 1 < len(buckets[1])
        assert after == buckets[STOP:] == [buckets[1]] * (STEPS - STOP)
        assert all(map(torch.equal, whole, second))


class Wrapper(cases.pl.Callback):
    """Notes after each step what wraps the model."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, bool, str]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        ddp = trainer.strategy.model
        # DDP says what it has at a forward pass, which is not to be made here.
        ddp.logger.set_runtime_stats_and_log()
        sizes = ddp._get_ddp_logging_data().get("rebuilt_bucket_sizes", "")
        finds = ddp.find_unused_parameters
        self.found.append((id(ddp), id(ddp.reducer), finds, sizes))


def wrapped(folder: Path, name: str, mat: dict[str, Any]) -> Any:
    """Return the gradients of a run, and what wrapped the model in each step."""
    note = Wrapper()
    plan = (name, {"bucket_cap_mb": 0.001})
    return cases.gradients(folder, plan, {"mat": mat, "callbacks": [note]}), note.found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ddp", "ddp_mat"])
def test_decisions_change_no_wrapper_and_gradients_are_those_of_one_process(
    name: str, tmp_path: Path, on_four: Callable[..., list[Any]]
) -> None:
    mat = {"skip": "units", "policy": cases.Cycle(needs_spectra=True)}
    alone = cases.gradients(tmp_path / "alone", None, {"mat": mat})
    for mine, found in on_four(wrapped, tmp_path / "four", name, mat):
        assert mine["active"] == alone["active"]
        assert len(set(map(tuple, mine["active"]))) == 6
        for grads, expected in zip(mine["grads"], alone["grads"], strict=True):
            for a, e in zip(grads, expected, strict=True):
                assert (a is None) == (e is None)
                assert a is None or torch.allclose(a, e, rtol=1e-9, atol=1e-12)
        # DDP itself makes its final buckets once, before the second step.
        assert len(found) == 12
        assert len({(*who, finds) for *who, finds, _ in found}) == 1
        assert not any(finds for _, _, finds, _ in found)
        assert len({sizes for *_, sizes in found[1:]}) == 1
        assert found[1][-1].count(",") >= 2
