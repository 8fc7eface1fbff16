"""Markdown tables of the committed results: `python -m benchmarks.tables` prints all of them.

Tests check that README and the pages under docs show exactly these, so that no number there lacks
a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import step_markdown
from benchmarks.models import WORKLOADS
from benchmarks.tabular import markdown, where

RESULTS = Path(__file__).resolve().parent / "results"


def load(name: str) -> dict[str, Any]:
    """Return a result by its file's name without the ending."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


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


def steps() -> dict[str, dict[str, Any]]:
    """Return the results of steps by their files' names without the ending, the CPU's first.

    Empty where none was measured; models stand in the order of the benchmark.
    """
    stems = sorted(path.stem for path in RESULTS.glob("step-*.json"))
    results = step_markdown.joined({stem: load(stem) for stem in stems})
    return {
        stem: result
        for on_cpu in (True, False)
        for model in WORKLOADS
        for stem, result in results.items()
        if result["model"] == model and stem.endswith("-cpu") == on_cpu
    }


def step_page() -> str:
    """Return the tables of docs/step.md; "" where no step was measured."""
    return step_markdown.page(steps())


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
        (job(), "bert-mini-wikitext2-cpu", "bert-mini-wikitext2-cpu"),
    ):
        parts.append(f"{table}\n\n*{where(load(name))}; `benchmarks/results/{files}.json`*")
    if found := steps():
        machines = dict.fromkeys(where(result) for result in found.values())
        source = f"*{'; '.join(machines)}; `benchmarks/results/step-*.json`*"
        parts.insert(1, f"{step_markdown.overview(found)}\n\n{source}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(main())
    print()
    print(kernel_page())
    print()
    print(step_page())
