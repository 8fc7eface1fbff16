"""What a training step costs with all, half, a quarter and the least of the units trained.

    python benchmarks/step.py [--preset small] [--batch-size 16] [--length 128] [--rounds 9]

Forward, backward and AdamW of BERT on random words (medians of interleaved rounds), through the
gate and the wrapped optimizer, against the same step without either. Units rest at random, the
same share in every layer. With F counted and t measured,

    efficiency = (1 - t / t_full) / (1 - F / F_full)

is the part of the promised saving that is kept. Writes
``benchmarks/results/step-<preset>-<device>.json``.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import interleaved, peak_memory, ratio, summary, write_result
from benchmarks.probe import make_batch
from examples.models.bert import Bert, preset
from lightning_mat import flops
from lightning_mat.gate import Gate
from lightning_mat.optim import MATOptimizer
from lightning_mat.policies import History, Random, UnitTable
from lightning_mat.units import Partition, partition


def step(model: Bert, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """Run one training step."""
    optimizer.zero_grad(set_to_none=True)
    logits = model(batch["input_ids"], batch["masked_positions"])
    F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    optimizer.step()


def choose(part: Partition, share: float) -> Tensor:
    """Return which units train: a share of every layer and kind, at least one."""
    if share == 1:
        return torch.ones(len(part), dtype=torch.bool)
    table = UnitTable(part.names, part.kinds, part.layers, torch.zeros(len(part)))
    return Random(max(share, 1e-9), seed=0).decide(History(), table, 0).active


def main() -> None:
    """Time, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=30_522)
    parser.add_argument("--units", default="heads+ffn")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    size = preset(args.preset, vocab_size=args.vocabulary, max_length=args.length, dropout=0.1)
    plain = Bert(size).to(args.device)
    batch = make_batch(args.batch_size, args.length, args.vocabulary, args.device)
    part = partition(plain, args.units)

    ways: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, model: Bert, optimizer: torch.optim.Optimizer, trained: float) -> None:
        ways[name] = lambda: step(model, optimizer, batch)
        with flops.count() as counter:
            ways[name]()
        rows[name] = {"flops": counter.total, "trained_share": trained}
        rows[name]["peak_bytes"] = peak_memory(ways[name], args.device)

    add("plain", plain, torch.optim.AdamW(plain.parameters(), 1e-4), 1.0)
    for share in args.shares:
        model = copy.deepcopy(plain)
        optimizer = MATOptimizer(torch.optim.AdamW(model.parameters(), 1e-4), model, part)
        active = choose(part, share)
        Gate(model, part).apply(active)
        optimizer.apply(active)
        add(f"mat {share:.0%}", model, optimizer, float(active.double().mean()))

    seconds = interleaved(ways, rounds=args.rounds, device=args.device)
    full = rows["plain"]["flops"]
    for name, row in rows.items():
        row["time_ratio"] = ratio(seconds, name, "plain")
        row["flops_ratio"] = row["flops"] / full
        promised = 1 - row["flops_ratio"]
        row["efficiency"] = (1 - row["time_ratio"]) / promised if promised > 0.01 else None
    device = args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    write_result(
        f"step-{args.preset}-{device.replace(' ', '-')}",
        {
            "settings": vars(args) | {"unit_count": len(part)},
            "seconds": summary(seconds),
            "steps": rows,
        },
        device=args.device,
    )
    print(f"BERT-{args.preset}, {args.batch_size} × {args.length} words, {len(part)} units")
    print(f"{'':10}{'trained':>9}{'seconds':>9}{'t/t_full':>10}{'F/F_full':>10}{'efficiency':>12}")
    for name, row in rows.items():
        kept = "" if row["efficiency"] is None else f"{row['efficiency']:.0%}"
        median = summary(seconds)[name]["median_seconds"]
        print(
            f"{name:10}{row['trained_share']:9.0%}{median:9.3f}{row['time_ratio']:10.3f}"
            f"{row['flops_ratio']:10.3f}{kept:>12}"
        )


if __name__ == "__main__":
    main()
