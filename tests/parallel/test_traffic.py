"""With ddp_mat, what is sent is what trains; counted where it is sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
    bf16_compress_wrapper,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook

from lightning_mat import Slice, Unit
from lightning_mat.parallel import MATDDPStrategy
from lightning_mat.parallel.compact import Compact
from lightning_mat.parallel.hooks import DECISIONS, Reduction
from lightning_mat.units.core import Partition
from tests.parallel import cases


def traffic(folder: Path, plan: Any, options: dict[str, Any]) -> Any:
    """Return per step the bytes that all-reduces of gradients took, what was reported, who trained.

    Gradients are what is all-reduced in float64 while a backward pass runs.
    """
    counted: list[int] = []
    plain = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype == torch.float64 and kwargs.get("async_op"):
            counted.append(tensor.numel() * tensor.element_size())
        return plain(tensor, *args, **kwargs)

    per_step: list[int] = []

    class Count(cases.pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            per_step.append(sum(counted))
            counted.clear()

    dist.all_reduce = counting
    try:
        _, record, adaptive, trainer = cases.fit(folder, plan, callbacks=[Count()], **options)
    finally:
        dist.all_reduce = plain
    hook = trainer.strategy.reduction
    return per_step, record.sent, record.active, len(hook._tables), adaptive.mat.part


@pytest.mark.parametrize("cap", [25, 0.001])
def test_what_rests_does_not_travel(
    cap: float, tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    plan, options = ("ddp_mat", {"bucket_cap_mb": cap}), {"mat": {}, "max_epochs": 3}
    for counted, reported, active, _, part in on_both(traffic, tmp_path, plan, options):
        total = sum(shape.numel() for shape in part.shapes.values())
        for step, who in enumerate(active):
            resting = int(part.numel[~torch.tensor(who)].sum())
            assert counted[step] == reported[step] == 8 * (total - resting)
        assert len({tuple(who) for who in active}) > DECISIONS


def test_while_gradients_accumulate_nothing_travels(
    tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    options = {"mat": {}, "accumulate_grad_batches": 3}
    for counted, _, _, tables, _ in on_both(traffic, tmp_path, ("ddp_mat", {}), options):
        assert [bytes_ > 0 for bytes_ in counted] == [False, False, True] * 4
        assert tables == 0  # none is kept after the fit


def blocks_of(part: Partition, model: nn.Module, active: list[bool]) -> list[Any]:
    return [part.active_blocks(name, active) for name, _ in model.named_parameters()]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("active", [(0, 1, 0, 1), (0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 1)])
def test_compact_takes_what_trains_and_puts_it_back(
    layout: torch.memory_format, active: tuple[int, ...]
) -> None:
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(6, 8, 3), "norm": nn.BatchNorm2d(8), "fc": nn.Linear(40, 3)}
    ).to(memory_format=layout)
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    units = [
        Unit("rows", "filter", "a", (Slice("conv.weight", 0, 1, 3), Slice("conv.bias", 0, 1, 3))),
        Unit("more", "filter", "a", (Slice("conv.weight", 0, 5, 6), Slice("norm.weight"))),
        Unit("columns", "ffn", "b", (Slice("fc.weight", 1, 3, 30), Slice("scale"))),
        Unit("bias", "ffn", "c", (Slice("fc.bias", 0, 0, 2),)),
    ]
    part = Partition(units, model)
    flags = [bool(flag) for flag in active]
    params = list(model.parameters())
    compact = Compact(params, blocks_of(part, model, flags))
    # As DDP fills a bucket: each gradient laid out like its parameter.
    grads = [torch.randn_like(p) for p in params]
    for param, grad, blocks in zip(params, grads, blocks_of(part, model, flags), strict=True):
        mask = torch.zeros(param.shape[0] if param.dim() else 1, max(param.numel(), 1))
        mask = mask[:, : param.numel() // mask.shape[0]]
        for block in blocks:
            for rect in block.rects():
                mask[rect.r0 : rect.r1, rect.c0 : rect.c1] = 1
        grad.mul_(mask.view(param.shape))
    flat = [torch.as_strided(g, (g.numel(),), (1,)) for g in grads]
    buffer = torch.cat(flat)
    before = buffer.clone()
    taken = compact.gather(buffer)
    assert taken.numel() == compact.numel == sum(int((g != 0).sum()) for g in grads)
    compact.scatter(taken * 2, buffer)
    assert torch.equal(buffer, before * 2)


def test_compact_takes_columns_of_a_convolution() -> None:
    conv = nn.Conv2d(6, 8, 3)
    part = Partition([Unit("in", "ffn", "c", (Slice("weight", 1, 2, 5),))], conv)
    blocks = blocks_of(part, conv, [False])
    buffer = torch.cat([conv.weight.detach().flatten(), conv.bias.detach()])
    taken = Compact(list(conv.parameters()), blocks).gather(buffer)
    weight = conv.weight.detach()
    boxes = weight[:, :2].flatten(), weight[:, 5:].flatten(), conv.bias.detach()
    assert torch.equal(taken, torch.cat(boxes))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ddp_comm_hook": powerSGD_hook}, "powerSGD_hook"),
        ({"ddp_comm_wrapper": lambda hook: hook}, "ddp_comm_wrapper"),
        ({"ddp_comm_hook": bf16_compress_wrapper(allreduce_hook)}, "ddp_comm_hook is"),
        ({"ddp_comm_state": object()}, "ddp_comm_state"),
        ({"static_graph": True}, "static_graph"),
    ],
)
def test_hooks_that_it_does_not_know_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MATDDPStrategy(**options)


def test_the_type_that_travels_is_counted() -> None:
    assert Reduction(bf16_compress_hook)._dtype == torch.bfloat16
    assert Reduction(wrapper=bf16_compress_wrapper)._dtype == torch.bfloat16
    assert Reduction()._dtype is None
