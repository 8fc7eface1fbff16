"""Markdown tables of what training steps cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tabular import markdown, number, percent, where
from lightning_mat.gate.gate import SKIPS


def joined(results: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return results of which those of compiled models stand with those of the eager ones.

    Args:
        results: By their files' names without the ending. Rows of
            ``step-<model>-compiled-<device>`` follow those of ``step-<model>-<device>``, where they
            were measured alike, and take the place of its rows of the same share and way.
    """
    found = dict(results)
    for name, result in results.items():
        model = result["model"]
        compiled_name = name.replace(f"step-{model}", f"step-{model}-compiled", 1)
        compiled = results.get(compiled_name)
        if compiled is None or _setting(compiled) != _setting(result):
            continue
        del found[compiled_name]
        anew = {_way(row) for row in compiled["steps"]}
        rows = [row for row in result["steps"] if _way(row) not in anew]
        found[name] = {
            **result,
            "steps": rows + compiled["steps"],
            "compiled": {compiled_name: compiled},
        }
    return found


def _setting(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a step was; how often it was timed makes no other."""
    return {key: value for key, value in result["settings"].items() if key != "rounds"}


def _way(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["share"], row["skip"], row["compiled"]


def overview(results: Mapping[str, dict[str, Any]]) -> str:
    """Return what a step costs with half and a quarter of the units trained, for all models.

    Args:
        results: By their files' names without the ending.
    """
    rows = []
    for result in results.values():
        for share in (0.5, 0.25):
            for skip in SKIPS:
                eager = _step_row(result, share, skip, compiled=False)
                compiled = _step_row(result, share, skip, compiled=True)
                if eager is None and compiled is None:
                    continue
                either = eager or compiled or {}
                rows.append(
                    [
                        _where_trained(result),
                        f"{share:.0%}",
                        f"`{skip}`",
                        number(either["flops_ratio"]),
                        number(eager and eager["time_ratio"]),
                        percent(eager and eager["efficiency"]),
                        number(compiled and compiled["time_ratio"]),
                        percent(compiled and compiled["efficiency"]),
                        percent(either["saved_ratio"]),
                    ]
                )
    head = [
        *("model", "trained", "`skip`", "F / F_full", "t / t_full", "efficiency"),
        *("compiled t / t_full", "compiled efficiency", "activations"),
    ]
    return markdown(head, rows) if rows else ""


def step_of(result: dict[str, Any]) -> str:
    """Return all that was measured of one model's steps."""
    rows = []
    for row in result["steps"]:
        rows.append(
            [
                f'`skip="{row["skip"]}"`{", compiled" if row["compiled"] else ""}',
                f"{row['trained_share']:.0%}",
                *_step_cells(row),
                number(row.get("counted_time_ratio")),
                number(row.get("rest_time_ratio")),
                number(row.get("optimizer_time_ratio"), 2),
            ]
        )
    head = [
        *("way", "trained", "ms", "full ms", "F / F_full", "t / t_full", "efficiency"),
        *("activations", "peak", "counted t", "rest t", "optimizer t / t_full"),
    ]
    return markdown(head, rows)


def rivals_of(result: dict[str, Any]) -> str:
    """Return what was measured of what a user would pick instead of the gate; "" if nothing."""
    rows = [
        [row["name"], f"{row['trained_share']:.0%}", *_step_cells(row)] for row in result["rivals"]
    ]
    head = [
        *("instead", "trained", "ms", "full ms", "F / F_full", "t / t_full", "efficiency"),
        *("activations", "peak"),
    ]
    return markdown(head, rows) if rows else ""


def page(results: Mapping[str, dict[str, Any]]) -> str:
    """Return the tables of docs/step.md: per model its ways of skipping, then its rivals."""
    parts = []
    what: dict[str, str] = {}
    for name, result in results.items():
        full, settings = result["full"], result["settings"]
        parts += [
            f"### {_where_trained(result)}",
            f"{settings['unit_count']:,} units ({settings['units']}), batch of "
            f"{settings['batch_size']}, {settings['precision']}{_dropout(settings)}; a full step "
            f"has {full['flops'] / 1e9:.4g} GFLOP and saves {full['saved_bytes'] / 1e6:.4g} MB of "
            f"activations. Operations that F counts take {percent(full.get('counted_share'))} of "
            "its time.",
            step_of(result) if result["steps"] else "",
            rivals_of(result),
            "\n".join(
                f"*{where(one)}; `benchmarks/results/{file}.json`*"
                for file, one in {name: result, **result.get("compiled", {})}.items()
            ),
        ]
        what |= {row["name"]: row["what"] for row in result["rivals"]}
    parts.append("\n".join(f"- *{name}*: {text}." for name, text in what.items()))
    return "\n\n".join(part for part in parts if part)


def _step_row(
    result: dict[str, Any], share: float, skip: str, *, compiled: bool
) -> dict[str, Any] | None:
    for row in result["steps"]:
        if _way(row) == (share, skip, compiled):
            return row
    return None


def _step_cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['seconds']['median_seconds'] * 1e3:.4g}",
        f"{row['plain_seconds']['median_seconds'] * 1e3:.4g}",
        number(row["flops_ratio"]),
        number(row["time_ratio"]),
        percent(row["efficiency"]),
        percent(row["saved_ratio"]),
        percent(row["peak_ratio"]),
    ]


def _dropout(settings: Mapping[str, Any]) -> str:
    return f", dropout {settings['dropout']}" if settings["dropout"] else ""


def _where_trained(result: dict[str, Any]) -> str:
    device = result["environment"]["device"]
    return result["title"] if device == "cpu" else f"{result['title']}, {device}"
