"""Checks of plain settings: whole numbers, switches."""

from __future__ import annotations


def check_whole(name: str, value: object, least: int) -> None:
    """Raise a ValueError unless a setting is a whole number that is large enough.

    Example:
        >>> check_whole("seed", True, 0)
        Traceback (most recent call last):
            ...
        ValueError: seed must be a whole number ≥ 0, got True
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number ≥ {least}, got {value!r}")


def check_switches(**switches: object) -> None:
    """Raise a ValueError unless every setting is True or False: "no" would count as True.

    Example:
        >>> check_switches(protect=True, dry_run="no")
        Traceback (most recent call last):
            ...
        ValueError: dry_run must be True or False, got 'no'
    """
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
