"""Tables of benchmarks/ddp.py, with what the formulas of docs/scaling.md say beside them.

`python -m benchmarks.ddp_markdown` prints those of the committed result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.tabular import markdown, where

RESULT = Path(__file__).resolve().parent / "results" / "ddp-cpu.json"


def wire(run: Mapping[str, Any]) -> tuple[float, float]:
    """Return latency and seconds per byte of an all-reduce, fitted to bare ones.

    The smallest says the latency, the largest, above it, the rate.
    """
    smallest, *_, largest = run["all_reduce"]
    rate = (largest["seconds"] - smallest["seconds"]) / (largest["bytes"] - smallest["bytes"])
    return smallest["seconds"], max(rate, 0.0)


def buckets(elements: int) -> int:
    """Return how many buckets DDP makes at most of so many float32 gradients.

    The first is full with 1 MiB, the others with 25 MiB; each is closed when it is.

    Source:
        ``torch.nn.parallel.DistributedDataParallel``, ``bucket_cap_mb``.
    """
    return 1 + max(0, math.ceil((4 * elements / 2**20 - 1) / 25))


def predicted_step(result: Mapping[str, Any], run: Mapping[str, Any], row: Any) -> float:
    """Return a step's seconds in several processes from those in one and the bytes it sends.

    Nothing overlaps on a CPU whose cores all compute; more processes than cores take turns.
    """
    alone = result["runs"][0]
    same = next(r for r in alone["steps"] if (r["way"], r["share"]) == (row["way"], row["share"]))
    turns = max(1.0, run["processes"] / result["cores"])
    latency, rate = wire(run)
    sent = buckets(row["elements"]) * latency + rate * row["bytes"]
    return float(same["seconds"] * turns + sent)


def predicted_probe(result: Mapping[str, Any], run: Mapping[str, Any]) -> float:
    """Return a probe's seconds: a forward pass, the busiest rank's share, and the collectives."""
    alone, size = result["runs"][0]["probe"], run["processes"]
    forward = alone["forward_seconds"]
    rest = alone["seconds"] - forward
    busiest = forward + alone["busiest"][str(size)] * rest
    everyone = size * forward + alone["work"][str(size)] * rest
    latency, rate = wire(run)
    sent = alone["collectives"] * latency + rate * alone["gathered_bytes"]
    return float(max(busiest, everyone / result["cores"]) + sent)


def agreement(result: Mapping[str, Any]) -> str:
    """Return how far the measured seconds of several processes are from the formulas."""
    several = result["runs"][1:]
    kinds = {
        "steps": [
            row["seconds"] / predicted_step(result, run, row) - 1
            for run in several
            for row in run["steps"]
        ],
        "probes": [run["probe"]["seconds"] / predicted_probe(result, run) - 1 for run in several],
    }
    said = [
        f"of {len(off)} {kind} {sum(abs(o) <= 0.05 for o in off)} took what the formula says to "
        f"within 5%, and the differences are from {min(off):+.0%} to {max(off):+.0%}"
        for kind, off in kinds.items()
    ]
    return f"With several processes, {'; '.join(said)}."


def steps(result: Mapping[str, Any]) -> str:
    """Return the table of steps."""
    rows = []
    alone = result["runs"][0]
    for run in result["runs"]:
        for row in run["steps"]:
            rows.append(
                [
                    str(run["processes"]),
                    f"`{row['way']}`",
                    f"{row['share']:.0%}",
                    f"{row['trained_elements'] / row['elements']:.1%}",
                    f"{row['bytes'] / 1e6:.2f}",
                    f"{row['bytes'] / (4 * row['elements']):.1%}",
                    f"{row['seconds']:.3f}",
                    "" if alone is run else f"{predicted_step(result, run, row):.3f}",
                ]
            )
    head = (
        *("processes", "strategy", "units trained", "elements trained", "MB reduced per step"),
        *("of all", "seconds", "by the formula"),
    )
    return markdown(head, rows)


def probes(result: Mapping[str, Any]) -> str:
    """Return the table of probes, measured and counted."""
    first = result["runs"][0]["probe"]
    measured = {run["processes"]: run for run in result["runs"]}
    rows = []
    for size in sorted({*measured, *result["large"]}):
        run = measured.get(size)
        ring = 2 * (size - 1) / size
        rows.append(
            [
                f"{size:,}",
                f"{first['busiest'][str(size)]:.1%}",
                f"{ring * first['gathered_bytes'] / 1e3:.1f}",
                f"{first['decision_bytes'] / 1e3:.1f}",
                "" if run is None else f"{run['probe']['seconds']:.3f}",
                "" if run is None or size == 1 else f"{predicted_probe(result, run):.3f}",
            ]
        )
    head = (
        *("ranks", "backward pass and Grams of the busiest rank", "kB sent per rank"),
        *("kB of the decision", "seconds", "by the formula"),
    )
    return markdown(head, rows)


def traffic(result: Mapping[str, Any]) -> str:
    """Return what a step puts on the wire with many ranks, counted."""
    one = result["runs"][0]
    shares = sorted({row["share"] for row in one["steps"]}, reverse=True)
    by = {row["share"]: row["bytes"] for row in one["steps"] if row["way"] == "ddp_mat"}
    rows = [
        [f"{size:,}", *(f"{2 * (size - 1) / size * by[share] / 1e6:.2f}" for share in shares)]
        for size in result["large"]
    ]
    head = ("ranks", *(f"{share:.0%} of the units" for share in shares))
    return markdown(head, rows)


def page(result: Mapping[str, Any]) -> str:
    """Return what docs/scaling.md shows."""
    first = result["runs"][0]["probe"]
    says = (
        f"{result['title']}, {result['batch_size']} samples per rank and step, {first['units']} "
        f"units, {first['samples']} samples per probe; one thread per process, "
        f"{result['cores']} cores, medians of {result['rounds']} rounds."
    )
    tables = steps(result), probes(result), traffic(result)
    return "\n\n".join([says, *tables, agreement(result)])


def committed() -> str:
    """Return the tables of the committed result and where it was measured; "" without one."""
    if not RESULT.exists():
        return ""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    return f"{page(result)}\n\n*{where(result)}; `benchmarks/results/{RESULT.name}`*"


if __name__ == "__main__":
    print(committed())
