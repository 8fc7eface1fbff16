"""Numbers as the report writes them."""

from __future__ import annotations

import math

from benchmarks.suites.stats import Estimate

NONE = "–"


def plain(value: Estimate, digits: int = 3, unit: str = "") -> str:
    """Return mean ± standard error.

    Example:
        >>> plain(Estimate(3, 1.5, 0.25, 0.4, 2.6), 2), plain(Estimate(1, 1.5, *[math.nan] * 3), 1)
        ('1.50 ± 0.25', '1.5')
    """
    if value.n == 0:
        return NONE
    mean = f"{value.mean:.{digits}f}{unit}"
    return mean if value.n == 1 else f"{mean} ± {value.error:.{digits}f}{unit}"


def counted(value: Estimate) -> str:
    """Return FLOPs in the unit that fits, with their standard error.

    Example:
        >>> counted(Estimate(1, 4.127e10, *[math.nan] * 3)), counted(Estimate(2, 3e15, 2e13, 0, 0))
        ('41.27 GFLOPs', '3.00 ± 0.02 PFLOPs')
    """
    if value.n == 0:
        return NONE
    name, unit = flops_unit(value.mean)
    scaled = Estimate(
        value.n, *(x / unit for x in (value.mean, value.error, value.low, value.high))
    )
    return f"{plain(scaled, 2)} {name}"


def flops_unit(most: float) -> tuple[str, float]:
    """Return the unit for numbers of FLOPs up to some size, and how many FLOPs it is.

    Example:
        >>> flops_unit(2e13), flops_unit(3.0)
        (('TFLOPs', 1000000000000.0), ('FLOPs', 1.0))
    """
    units = {"EFLOPs": 1e18, "PFLOPs": 1e15, "TFLOPs": 1e12, "GFLOPs": 1e9, "MFLOPs": 1e6}
    return next(((name, unit) for name, unit in units.items() if most >= unit), ("FLOPs", 1.0))


def signed(value: Estimate, digits: int = 4) -> str:
    """Return a difference with its sign and its standard error.

    Example:
        >>> signed(Estimate(3, -0.5, 0.1, -0.9, -0.1), 2)
        '-0.50 ± 0.10'
    """
    if value.n == 0:
        return NONE
    mean = f"{value.mean:+.{digits}f}"
    return mean if value.n == 1 else f"{mean} ± {value.error:.{digits}f}"


def each(values: list[float], digits: int = 3) -> str:
    """Return every seed's difference.

    Example:
        >>> each([0.25, -1.0], 2), each([])
        ('+0.25, -1.00', '–')
    """
    return ", ".join(f"{value:+.{digits}f}" for value in values) or NONE


def interval(value: Estimate, digits: int = 4) -> str:
    """Return the 95% interval, or a dash where there is none.

    An end that is not zero has as many digits as it takes to see it.

    Example:
        >>> interval(Estimate(3, 0.5, 0.1, 0.1, 0.9), 1)
        '[+0.1, +0.9]'
        >>> interval(Estimate(3, 0.5, 0.1, 0.0004, 0.9), 1)
        '[+0.0004, +0.9000]'
    """
    if value.n < 2:
        return NONE
    while digits < 8 and any(round(end, digits) == 0 != end for end in (value.low, value.high)):
        digits += 1
    return f"[{value.low:+.{digits}f}, {value.high:+.{digits}f}]"


def percent(value: float | None, digits: int = 0) -> str:
    """Return a share in percent, or a dash.

    Example:
        >>> percent(0.5), percent(math.nan)
        ('50%', '–')
    """
    return NONE if value is None or not math.isfinite(value) else f"{value:.{digits}%}"


def listed(items: list[str]) -> str:
    """Return items as prose.

    Example:
        >>> listed(["a", "b", "c"]), listed(["a"])
        ('a, b and c', 'a')
    """
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
