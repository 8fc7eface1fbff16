"""What all Markdown tables of results share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(result: dict[str, Any]) -> str:
    """Return the machine and the versions of a result, in a line."""
    e = result.get("environment") or result["environments"]["mat"]
    return f"{e['cpu']}, {e['threads']} threads, torch {e['torch']}, {e['time'][:10]}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number, or "" for None."""
    return "" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """Return a share in percent, or "" for None."""
    return "" if value is None else f"{value:.0%}"
