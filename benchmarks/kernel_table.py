"""The kernel's result as a table for the terminal."""

from __future__ import annotations

from typing import Any


def table(result: dict[str, Any]) -> str:
    """Return what was found, for people."""
    lines = [
        f"{'':20}{'L':>6}{'S':>5}{'T':>9}{'op ms':>10}{'on device':>11}{'layerwise':>11}{'vmap':>8}"
        f"{'floor ms':>10}{'÷ floor':>9}{'bound':>12}{'op MB':>8}{'layerwise MB':>14}"
    ]
    for name, row in result["workloads"].items():
        if "failed" in row:
            lines.append(f"{name:20}{row['failed']}")
            continue
        low, high = row["tokens"]
        tokens = f"{low}" if low == high else f"{low}–{high}"
        median = row["seconds"].get("op", {}).get("median_seconds")
        over = row.get("op_over_floor")
        lines.append(
            f"{name:20}{row['units']:6}{row['samples']:5}{tokens:>9}{_number(median, 1e3, 10)}"
            f"{_number(row.get('seconds_on_device'), 1e3, 11)}"
            f"{_times(row, 'layerwise', 11)}{_times(row, 'vmap', 8)}"
            f"{_number(row['floor']['seconds'], 1e3, 10)}{_number(over, 1, 9)}"
            f"{row['floor']['bound']:>12}{_number(row['peak_bytes'].get('op'), 1e-6, 8, 0)}"
            f"{_number(row['peak_bytes'].get('layerwise'), 1e-6, 14, 0)}"
        )
        lines += [f"  {key}: {why}" for key, why in row["not_timed"].items()]
    for name, row in result["eigen"].items():
        on_device = row.get("seconds_on_device")
        device = "" if on_device is None else f" ({on_device * 1e3:.3f} on the device)"
        median = row["seconds"].get("op", {}).get("median_seconds")
        rival = _times(row, "eigvalsh", 0).strip()
        double = _times(row, "eigvalsh in float64", 0).strip()
        lines.append(
            f"eigen-solve of {name} Grams of {row['samples']}×{row['samples']}: "
            f"{_number(median, 1e3, 0, 3)} ms{device}; eigvalsh {rival}, in float64 {double}"
        )
        lines += [f"  {key}: {why}" for key, why in row["not_timed"].items()]
    if result["probe"]:
        row = result["probe"]
        lines.append(
            f"probe of BERT-{row['preset']}, S = {row['samples']}, T = {row['length']}: "
            f"{row['probe_over_step']:.2f} of a forward and backward pass"
        )
    if result["left_out"]:
        lines.append(f"left out for want of time: {', '.join(result['left_out'])}")
    return "\n".join(lines)


def _number(value: float | None, scale: float, width: int, digits: int = 2) -> str:
    text = "–" if value is None else f"{value * scale:.{digits}f}"
    return f"{text:>{width}}"


def _times(row: dict[str, Any], key: str, width: int) -> str:
    value = row["times_op"].get(key)
    text = "–" if value is None else f"{value:.2f}×"
    return f"{text:>{width}}"
