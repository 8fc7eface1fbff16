"""What an optimizer step costs with all, half, a quarter and the least of the units trained.

    python benchmarks/optimizer.py [--quick] [--models bert-base vgg16] [--how loop foreach fused]

AdamW over the parameters of BERT (heads and FFN blocks as units) and VGG16 (its 4,224 filters),
with gradients that are filled once: there is no forward and no backward pass, and what is timed is
``step()`` (and ``zero_grad()`` apart). ``MATOptimizer`` is compared with plain ``AdamW`` over the
same parameters in medians of interleaved rounds. Units rest at random, the same share in every
layer and kind, after a few such decisions (``--decisions``), so that step counts differ.

``elements`` is the share of the model's parameters that is stepped: embeddings always train, so
that BERT-base at 25% of its units steps 42% of its parameters, below which no step comes whose time
is that of its memory traffic: a fused one's, whose plain step moves seven words for an element
(value and moments there and back, the gradient there). For what is stepped in a pool, values and
gradients are copied there and values back besides, in memory that stays in the cache. On a CPU a
plain step takes longer where malloc hands memory back to the system, so that this process keeps
it, see :func:`benchmarks.common.keep_freed_memory`. Writes
``benchmarks/results/optimizer-<device>.json``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import interleaved, keep_freed_memory, ratio, summary, write_result
from examples.models.bert import Bert, preset
from lightning_mat.optim import MATOptimizer
from lightning_mat.policies import History, Random, UnitTable
from lightning_mat.units import Partition, partition

HOW: dict[str, dict[str, bool]] = {
    "loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
VGG16 = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def vgg16() -> nn.Module:
    """Return VGG16's convolutions, and the small classifier of its versions for 32×32 images."""
    widths = (3, *VGG16)
    convolutions = [
        nn.Conv2d(inputs, outputs, 3, padding=1)
        for inputs, outputs in zip(widths, VGG16, strict=False)
    ]
    return nn.Sequential(*convolutions, nn.Linear(512, 10))


def build(name: str) -> tuple[nn.Module, Partition]:
    """Return a model with gradients, and its units."""
    torch.manual_seed(0)
    if name == "vgg16":
        model, units = vgg16(), "filters"
    else:
        model, units = Bert(preset(name.removeprefix("bert-"))), "heads+ffn"
    return model, partition(model, units)


def choose(part: Partition, share: float, seed: int) -> Tensor:
    """Return which units train: a share of every layer and kind, at least one."""
    if share == 1:
        return torch.ones(len(part), dtype=torch.bool)
    table = UnitTable(part.names, part.kinds, part.layers, torch.zeros(len(part)))
    return Random(max(share, 1e-9), seed=seed).decide(History(), table, seed).active


def zero_and_refill(optimizer: Optimizer, model: nn.Module, grads: list[Tensor]) -> None:
    """Call ``zero_grad``, and put the gradients back."""
    optimizer.zero_grad()
    for param, grad in zip(model.parameters(), grads, strict=True):
        param.grad = grad


def measure(
    model: nn.Module, part: Partition, how: str, share: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Return what a step costs at a share, beside a plain one."""
    ours = copy.deepcopy(model)
    grads = [torch.randn_like(p) for p in model.parameters()]
    for each in (model, ours):
        for param, grad in zip(each.parameters(), grads, strict=True):
            param.grad = grad
    plain = AdamW(model.parameters(), 1e-6, **HOW[how])
    optimizer = MATOptimizer(AdamW(ours.parameters(), 1e-6, **HOW[how]), ours, part)
    plain.step()
    for seed in range(1, args.decisions + 1 if share < 1 else 1):
        optimizer.apply(choose(part, share, seed))
        for _ in range(2):
            optimizer.step()
    active = choose(part, share, 0)
    optimizer.apply(active)
    seconds = interleaved(
        {"plain": plain.step, "mat": optimizer.step}, rounds=args.rounds, device=args.device
    )
    zeroing = interleaved(
        {
            "plain": lambda: zero_and_refill(plain, model, grads),
            "mat": lambda: zero_and_refill(optimizer, ours, grads),
        },
        rounds=args.rounds,
        device=args.device,
    )
    total = sum(p.numel() for p in model.parameters())
    return {
        "trained_share": float(active.double().mean()),
        "elements": 1 - int(part.numel[~active].sum()) / total,
        "time_ratio": ratio(seconds, "mat", "plain"),
        "zero_grad_ratio": ratio(zeroing, "mat", "plain"),
        "seconds": summary(seconds),
        "zero_grad_seconds": summary(zeroing),
    }


def main() -> None:
    """Time, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["bert-base", "vgg16"])
    parser.add_argument("--how", nargs="+", choices=list(HOW), default=list(HOW))
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.0])
    parser.add_argument(
        "--decisions", type=int, default=4, help="decisions before the one measured"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small models; writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.models, args.shares, args.rounds = ["bert-mini", "vgg16"], [1.0, 0.25], 3

    rows: dict[str, dict[str, dict[str, Any]]] = {}
    print(f"{'model':10} {'AdamW':8} {'trained':>8} {'elements':>9} {'seconds':>9} {'t/t_full':>9}")
    for name in args.models:
        model, part = build(name)
        model.to(args.device)
        for how in args.how:
            for share in args.shares:
                row = measure(model, part, how, share, args)
                rows.setdefault(name, {}).setdefault(how, {})[f"{share:.0%}"] = row
                median = row["seconds"]["mat"]["median_seconds"]
                print(
                    f"{name:10} {how:8} {row['trained_share']:8.0%} {row['elements']:9.1%} "
                    f"{median:9.5f} {row['time_ratio']:9.3f}",
                    flush=True,
                )
                gc.collect()
    if args.quick:
        return
    settings = vars(args) | {
        "threads": torch.get_num_threads(),
        "keeps_freed_memory": os.environ.get("MALLOC_MMAP_MAX_") == "0",
    }
    device = args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    write_result(
        f"optimizer-{device.replace(' ', '-')}",
        {"settings": settings, "models": rows},
        device=args.device,
    )


if __name__ == "__main__":
    keep_freed_memory()
    main()
