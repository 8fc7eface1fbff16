"""LayerRule: how one type of layer gives per-sample gradients, and the registry of the rules.

A new layer type is one new file with one ``@register_layer_rule(Type)`` class, imported in
``rules/__init__.py``. Inputs and output gradients arrive in a canonical form, samples first:
``x`` is [S, T, *item] and ``grad`` is [S, T, *item], where T counts the rows (tokens, frames) of a
sample and an item is what the layer works on at once (a vector, an image).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from lightning_mat.mntk.factors import Factor


class LayerRule(Protocol):
    """Per-sample gradients of one layer type, from its input and its output's gradient."""

    def item_dims(self, module: nn.Module) -> tuple[int, int]:
        """Return how many trailing dimensions an input item and an output item have."""
        ...

    def factors(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Factor]:
        """Return the per-sample gradients of the module's own parameters, by attribute name.

        Args:
            module: The layer.
            x: Its input, shape ``[S, T, *input item]``.
            grad: The gradient of S scalars with respect to its output, ``[S, T, *output item]``.
        """
        ...


_RULES: dict[type[nn.Module], LayerRule] = {}
_FINDERS: list[tuple[Callable[[nn.Module], bool], LayerRule]] = []

R = TypeVar("R", bound=type)


def register_layer_rule(*types: type[nn.Module]) -> Callable[[R], R]:
    """Register a rule class for layer types and for subclasses that keep their ``forward``.

    Example:
        >>> from torch import nn
        >>> layer_rule(nn.Linear(2, 2)) is not None, layer_rule(nn.LSTM(2, 2)) is None
        (True, True)
    """

    def add(rule: R) -> R:
        instance: LayerRule = rule()
        for layer_type in types:
            _RULES[layer_type] = instance
        return rule

    return add


def register_layer_finder(matches: Callable[[nn.Module], bool]) -> Callable[[R], R]:
    """Register a rule class for modules that a predicate recognises (types not to be imported)."""

    def add(rule: R) -> R:
        _FINDERS.append((matches, rule()))
        return rule

    return add


def layer_rule(module: nn.Module) -> LayerRule | None:
    """Return the rule for a module, or None where only the fallback knows it.

    A subclass is known by its base's rule only if it inherits the base's ``forward``: with a
    forward of its own it may use its parameters in any way.
    """
    for layer_type in type(module).__mro__:
        rule = _RULES.get(layer_type)
        if rule is not None:
            same = getattr(type(module), "forward", None) is getattr(layer_type, "forward", None)
            return rule if same else None
    for matches, rule in _FINDERS:
        if matches(module):
            return rule
    return None


_EXPLICIT: dict[type[nn.Module], Callable[..., Any]] = {}
F = TypeVar("F", bound=Callable[..., Any])


def register_explicit_forward(layer_type: type[nn.Module]) -> Callable[[F], F]:
    """Register a forward that observes its own calls, for layers that hooks cannot see into.

    It is called as ``forward(module, tape, name, *args, **kwargs)`` in the place of the layer's
    own during a probe, and reports each product through ``tape.observe``.
    """

    def add(function: F) -> F:
        _EXPLICIT[layer_type] = function
        return function

    return add


def explicit_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the observing forward for a module, or None where hooks do."""
    for layer_type in type(module).__mro__:
        function = _EXPLICIT.get(layer_type)
        if function is not None and getattr(type(module), "forward", None) is getattr(
            layer_type, "forward", None
        ):
            return function
    return None
