"""Text tables: runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

MISSING = "-"


class Column(NamedTuple):
    """One column of a table of runs."""

    key: str
    """Key of the value in a run's result."""
    title: str
    """Heading, with the unit of measurement."""
    show: Callable[[float], str]
    """How a number is written."""


def _percent(value: float) -> str:
    return f"{value:.1%}"


COLUMNS = (
    Column("method", "method", str),
    Column("test_loss", "test loss", "{:.4f}".format),
    Column("steps", "steps", "{:,.0f}".format),
    Column("pflops", "PFLOPs", "{:.4g}".format),
    Column("seconds", "seconds", "{:,.1f}".format),
    Column("probe_share", "probe share", _percent),
    Column("trained_share", "trained share", _percent),
)


def results_table(rows: Sequence[Mapping[str, object]], columns: Sequence[Column] = COLUMNS) -> str:
    """Return results of runs side by side, a row per run.

    Args:
        rows: Results by the keys of ``columns``: ``method``, ``test_loss``, ``steps`` (optimizer
            steps), ``pflops`` (counted, 10¹⁵ floating-point operations), ``seconds``,
            ``probe_share`` (of the seconds) and ``trained_share`` (of the units, over all steps).
            A value that is absent or None is shown as a dash; other keys are not shown.
        columns: What to show.

    Example:
        >>> print(results_table([
        ...     {"method": "full", "test_loss": 5.5, "steps": 300, "pflops": 1.25, "seconds": 90.0},
        ...     {"method": "mat", "test_loss": 5.4, "steps": 300, "pflops": 0.75, "seconds": 61.0,
        ...      "probe_share": 0.03, "trained_share": 0.4},
        ... ]))
        method  test loss  steps  PFLOPs  seconds  probe share  trained share
        ------  ---------  -----  ------  -------  -----------  -------------
        full       5.5000    300    1.25     90.0            -              -
        mat        5.4000    300    0.75     61.0         3.0%          40.0%
    """
    cells = [[_cell(row.get(column.key), column) for column in columns] for row in rows]
    return text_table([column.title for column in columns], cells)


def text_table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table in plain text, the first column to the left, the others to the right.

    Args:
        titles: Headings.
        cells: Rows of as many cells as there are headings.

    Raises:
        ValueError: If a row has another number of cells.
    """
    for row in cells:
        if len(row) != len(titles):
            raise ValueError(
                f"a row has {len(row)} cells under {len(titles)} headings: {list(row)}"
            )
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = [list(titles), ["-" * width for width in widths], *map(list, cells)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cell(value: object, column: Column) -> str:
    """Return a value as the column writes it; text as it is."""
    if value is None:
        return MISSING
    return column.show(value) if isinstance(value, int | float) else str(value)
