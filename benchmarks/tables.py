"""Markdown tables of the committed results: `python -m benchmarks.tables` prints all of them.

A test checks that README and docs/kernel.md show exactly these, so that no number there lacks a
file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def load(name: str) -> dict[str, Any]:
    """Return a result by its file's name without the ending."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(result: dict[str, Any]) -> str:
    """Return the machine and the versions of a result, in a line."""
    e = result.get("environment") or result["environments"]["mat"]
    return f"{e['cpu']}, {e['threads']} threads, torch {e['torch']}, {e['time'][:10]}"


def probe() -> str:
    """Return what a probe costs beside other ways to the same kernels."""
    rows = []
    for positions in ("all", "masked"):
        result = load(f"probe-mini-{positions}-cpu")
        median = {name: row["median_seconds"] for name, row in result["seconds"].items()}
        peak = {name: f"{count / 1e6:.0f} MB" for name, count in result["peak_bytes"].items()}
        for name, text in (
            ("probe", "the probe"),
            ("step", "one forward and backward pass"),
            ("vmap", "`vmap(grad)` in chunks"),
            ("loop", "a loop over samples"),
        ):
            ratio = f"{result['times_probe'][name]:.2f}×"
            rows.append([positions, text, f"{median[name]:.2f} s", ratio, peak[name]])
    head = (
        "logits at positions",
        "BERT-mini, 64 samples of 128 words",
        "median",
        "÷ probe",
        "peak",
    )
    return markdown(head, rows)


def step() -> str:
    """Return what a step costs by the share of the units that trains."""
    result = load("step-small-cpu")
    rows = []
    for name, row in result["steps"].items():
        kept = "" if row["efficiency"] is None else f"{row['efficiency']:.0%}"
        median = result["seconds"][name]["median_seconds"]
        rows.append(
            [
                "plain" if name == "plain" else f"{row['trained_share']:.0%} trained",
                f"{median:.2f} s",
                f"{row['time_ratio']:.3f}",
                f"{row['flops_ratio']:.3f}",
                kept,
            ]
        )
    head = ("step of BERT-small, 16 × 128 words", "median", "t / t_full", "F / F_full", "kept")
    return markdown(head, rows)


def job() -> str:
    """Return the main job on WikiText-2."""
    result = load("bert-mini-wikitext2-cpu")
    rows = [
        [
            row["method"],
            f"{row['test_loss']:.3f}",
            str(row["steps"]),
            f"{row['flops'] / 1e15:.4g}",
            f"{row['seconds']:.0f}",
            f"{row['probe_seconds'] / row['seconds']:.1%}",
            f"{row['trained_share']:.0%}",
        ]
        for row in result["rows"]
    ]
    head = ("BERT-mini", "test loss", "steps", "PFLOPs", "seconds", "probes", "units trained")
    return markdown(head, rows)


KERNEL_WORKLOADS = {
    "bert-heads-128": "BERT-base heads",
    "bert-heads-512": "BERT-base heads",
    "bert-heads-ffn-128": "BERT-base heads and FFN blocks",
    "vgg-filters": "VGG16 filters, 32 × 32",
    "switch-experts": "Switch-Transformer experts",
    "llama-layer": "one Llama-7B-shaped layer",
    "mlp": "MLP, one token",
}


def kernel() -> str:
    """Return what the fused operation costs beside two usual ways and its floor."""
    rows = []
    for name, row in load("kernel-cpu")["workloads"].items():
        low, high = row["tokens"]
        seconds = row["seconds"]["op"]["median_seconds"]
        memory = {key: f"{count / 1e6:.0f} MB" for key, count in row["peak_bytes"].items()}
        times = {key: f"{ratio:.2f}×" for key, ratio in row["times_op"].items()}
        rows.append(
            [
                KERNEL_WORKLOADS[name],
                f"{row['units']:,}",
                str(row["samples"]),
                f"{low}" if low == high else f"{low}–{high}",
                f"{seconds:.3f} s",
                times["layerwise"],
                times["vmap"],
                f"{row['op_over_floor']:.2f}×",
                memory["op"],
                memory["layerwise"],
                f"{row['difference_of_lambda_max']['op']:.0e}",
            ]
        )
    head = [
        *("workload", "L", "S", "T", "op", "layer by layer ÷ op", "`vmap(grad)` ÷ op"),
        *("op ÷ floor", "op peak", "layer by layer peak", "λ_max differs by"),
    ]
    return markdown(head, rows)


def eigen() -> str:
    """Return what the eigen-solve costs beside LAPACK's."""
    rows = []
    for row in load("kernel-cpu")["eigen"].values():
        rows.append(
            [
                f"{row['units']:,} of {row['samples']} × {row['samples']}",
                f"{row['seconds']['op']['median_seconds'] * 1e3:.1f} ms",
                f"{row['times_op']['eigvalsh']:.2f}×",
                f"{row['times_op']['eigvalsh in float64']:.2f}×",
            ]
        )
    head = ("Grams", "op", "`eigvalsh` in float32 ÷ op", "`eigvalsh` in float64 ÷ op")
    return markdown(head, rows)


def whole_probe() -> str:
    """Return how a whole probe of BERT-base compares with one training pass, in a sentence."""
    row = load("kernel-cpu")["probe"]
    return (
        f"A whole probe of BERT-{row['preset']} ({row['samples']} samples of {row['length']} "
        f"words, {row['units']} units, logits at 15% of the positions) takes "
        f"{row['probe_over_step']:.2f} of one forward and backward pass over the same samples."
    )


def kernel_page() -> str:
    """Return what docs/kernel.md shows."""
    source = f"*{where(load('kernel-cpu'))}; `benchmarks/results/kernel-cpu.json`*"
    return "\n\n".join([kernel(), eigen(), whole_probe(), source])


def main() -> str:
    """Return all tables, each with its machine."""
    parts = []
    for table, name, files in (
        (probe(), "probe-mini-all-cpu", "probe-mini-*-cpu"),
        (step(), "step-small-cpu", "step-small-cpu"),
        (job(), "bert-mini-wikitext2-cpu", "bert-mini-wikitext2-cpu"),
    ):
        parts.append(f"{table}\n\n*{where(load(name))}; `benchmarks/results/{files}.json`*")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(main())
    print()
    print(kernel_page())
