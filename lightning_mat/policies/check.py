"""Whether a policy is one, and whether what it returns is a decision about the units there are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning_mat.policies.base import Decision, Policy, UnitTable

DEFAULTS: Mapping[str, Any] = {"alpha": None, "beta": 1e-3, "protect": True}
"""Settings of the default policy that a callback takes, too."""


def check_policy(policy: object) -> None:
    """Check that an object can decide who trains.

    Raises:
        TypeError: If it is a class, or lacks ``decide`` or ``needs_spectra``.

    Example:
        >>> check_policy("random")
        Traceback (most recent call last):
            ...
        TypeError: policy must be a policy such as lightning_mat.policies.Random(), got the str
        'random', which has no decide(history, units, episode)
    """
    if isinstance(policy, type):
        raise TypeError(
            f"policy must be a policy, got the class {policy.__name__}: make one of it, "
            f"{policy.__name__}(...)"
        )
    found = (
        "policy must be a policy such as lightning_mat.policies.Random(), got the "
        f"{type(policy).__name__} {policy!r}, "
    )
    if not callable(getattr(policy, "decide", None)):
        raise TypeError(f"{found}which has no decide(history, units, episode)")
    needs = getattr(policy, "needs_spectra", None)
    if not isinstance(needs, bool):
        state = "has none" if needs is None else f"has {needs!r} there"
        raise TypeError(
            f"{found}which must say in the bool needs_spectra whether a probe comes before each "
            f"decision, and {state}: set needs_spectra = True or False in the class"
        )


def check_decision(decision: object, policy: Policy, units: UnitTable) -> Decision:
    """Return what a policy decided, if it is a decision about the units.

    Raises:
        TypeError: If it is no decision.
        ValueError: If it is about another number of units.
    """
    name = type(policy).__name__
    if not isinstance(decision, Decision):
        raise TypeError(
            f"{name}.decide must return a lightning_mat.policies.Decision, got "
            f"{type(decision).__name__}: return Decision(active, reasons, thresholds, units.kinds)"
        )
    if len(decision) != len(units):
        raise ValueError(
            f"{name}.decide returned a decision about {len(decision)} units, but was asked about "
            f"{len(units)}: decide about every unit of units.names, in their order"
        )
    return decision


def check_thresholds(policy: object, **given: Any) -> None:
    """Check that settings of the default policy do not come with another policy.

    Args:
        policy: The other policy.
        given: Values of :data:`DEFAULTS`.

    Raises:
        ValueError: If one is not its default. The message says which of them the policy takes.
    """
    changed = [name for name, value in given.items() if value != DEFAULTS[name]]
    if not changed:
        return
    name = type(policy).__name__
    takes = inspect.signature(type(policy)).parameters
    theirs = [setting for setting in changed if setting in takes]
    others = [setting for setting in changed if setting not in takes]
    remedies = [f"pass {_words(theirs)} to {name}(...)"] if theirs else []
    remedies += [f"drop {_words(others)}, which {name} does not take"] if others else []
    raise ValueError(
        "alpha, beta and protect belong to the default policy, but policy= is given, too: "
        + ", and ".join(remedies)
    )


def _words(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
