"""A step's result as a table for the terminal."""

from __future__ import annotations

from typing import Any


def table(result: dict[str, Any]) -> str:
    """Return what was found for one model, ways of skipping first, then rivals."""
    full = result["full"]
    lines = [
        f"{result['settings']['unit_count']} units, batch of {result['settings']['batch_size']}, "
        f"{full['flops'] / 1e9:.1f} GFLOP and {full['saved_bytes'] / 1e6:.1f} MB of saved "
        "activations in a full step",
        f"{'':34}{'trained':>9}{'ms':>10}{'full ms':>10}{'t/full':>9}{'F/full':>9}"
        f"{'efficiency':>12}{'saved':>8}{'peak':>8}{'optimizer':>11}",
    ]
    for row in result["steps"]:
        mode = "compiled" if row["compiled"] else "eager"
        lines.append(_line(f"{mode}, skip={row['skip']}, {row['share']:.0%}", row))
    lines += [_line(f"{row['name']}, {row['share']:.0%}", row) for row in result["rivals"]]
    compiled = [row for row in result["steps"] if row["compiled"]]
    if compiled:
        seconds = ", ".join(
            f"{row['skip']} {row['share']:.0%}: {row['first_step_seconds']:.1f}" for row in compiled
        )
        plain = compiled[0]["plain_first_step_seconds"]
        lines.append(f"seconds of the first step after a switch: plain {plain:.1f}, {seconds}")
    if result["left_out"]:
        lines.append(f"left out for want of time: {', '.join(result['left_out'])}")
    lines += [f"failed: {label}: {why}" for label, why in result["failed"].items()]
    return "\n".join(lines)


def _line(name: str, row: dict[str, Any]) -> str:
    times = f"{row['time_ratio']:9.3f}{row['flops_ratio']:9.3f}"
    return (
        f"{name:34}{row['trained_share']:9.0%}{row['seconds']['median_seconds'] * 1e3:10.1f}"
        f"{row['plain_seconds']['median_seconds'] * 1e3:10.1f}{times}"
        f"{_share(row['efficiency']):>12}{_share(row['saved_ratio']):>8}"
        f"{_share(row['peak_ratio']):>8}{_share(row.get('optimizer_time_ratio')):>11}"
    ).rstrip()


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
