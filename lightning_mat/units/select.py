"""partition(): which rules find the units of a model."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import TypeAlias, cast

from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_mat.units.core import Partition
from lightning_mat.units.experts import Experts
from lightning_mat.units.ffn import FFN
from lightning_mat.units.filters import Filters
from lightning_mat.units.heads import Heads
from lightning_mat.units.layers import Layers
from lightning_mat.units.rules import Rule, make_rule, register_rule, rule_words
from lightning_mat.units.unit import Slice, Unit

UnitFinder: TypeAlias = Callable[[nn.Module], Iterable[Unit]]
Units: TypeAlias = str | Rule | UnitFinder | Sequence[str | Rule | UnitFinder]

# Applied from the last to the first: experts before the FFNs that they consist of, layers last.
register_rule("layers", Layers)
register_rule("filters", Filters)
register_rule("ffn", FFN)
register_rule("heads", Heads)
register_rule("experts", Experts)


def partition(model: nn.Module, units: Units = "auto") -> Partition:
    """Return the disjoint units of a model, and the remainder that always trains.

    Args:
        model: Any module with initialised parameters: a LightningModule, a compiled model, a part
            of one. Its parameters are named as in ``model.named_parameters()``. Frozen parameters
            (``requires_grad=False``) are left out; a unit with nothing left vanishes.
        units: What trains or rests on its own:

            - ``"auto"``: experts and heads for a mixture, heads and ffn for another transformer,
              filters for a convolutional network, layers otherwise;
            - ``"heads"``, ``"experts"``, ``"filters"``, ``"ffn"``, ``"layers"``, or a registered
              word; several joined by ``"+"``, in any order: ``"heads+ffn"``;
            - a rule with options, e.g. ``FFN(block_width=128)``, or one of the user's own;
            - a callable ``model -> iterable of Unit``;
            - a list of these.

            Words and built-in rules pass over parameters that something before them owns: first
            the user's rules and callables, then experts, heads, ffn, filters, layers.

    Returns:
        The partition.

    Raises:
        ValueError: If a word is unknown, a rule finds nothing, the model has no parameters or
            lazy ones without a shape, or the units overlap or name what does not exist.
        TypeError: If ``model`` is no module, or ``units`` or what a callable returns is of no
            type listed above.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
        >>> partition(layer).names
        ('head.0', 'head.1', 'ffn.0', 'ffn.1', 'ffn.2', 'ffn.3')
        >>> partition(layer, ["heads", FFN(block_width=8)]).names
        ('head.0', 'head.1', 'ffn.0', 'ffn.1')
    """
    _check_model(model)
    if isinstance(units, str) and units.strip() == "auto":
        return Partition(_automatic(model), model)
    rules = _rules(units)
    collected = _collect(rules, model)
    for rule, (found, kept) in zip(rules, collected, strict=True):
        if not kept:
            raise ValueError(_nothing_found(rule, found, model))
    return Partition([unit for _, kept in collected for unit in kept], model)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"partition needs a torch.nn.Module, got {type(model).__name__}")
    lazy = [
        name
        for name, p in (*model.named_parameters(), *model.named_buffers())
        if isinstance(p, (UninitializedParameter, UninitializedBuffer))
    ]
    if lazy:
        raise ValueError(
            f"{lazy[0]!r} of {type(model).__name__} has no shape yet (a lazy layer): run one "
            "forward pass before partition"
        )
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"{type(model).__name__} has no parameters: there is nothing that could train or rest"
        )


def _rules(units: Units) -> list[Rule]:
    """Return rules in the order in which they are applied."""
    if isinstance(units, str):
        rules = [make_rule(word.strip()) for word in units.split("+")]
    elif isinstance(units, Sequence):
        rules = [rule for item in units for rule in _rules(_listed(item))]
        if not rules:
            raise ValueError("units is an empty list: name at least one rule, e.g. 'heads'")
    elif isinstance(units, Rule):
        rules = [units() if inspect.isclass(units) else units]
    elif callable(units):
        rules = [_Finder(units)]
    else:
        raise TypeError(
            f"units must be a word such as 'heads', a rule, a callable model -> iterable of Unit, "
            f"or a list of these, got {type(units).__name__}"
        )
    place = {word: i for i, word in enumerate(rule_words())}
    return sorted(rules, key=lambda rule: place.get(rule.word, -1))


def _listed(item: object) -> Units:
    if isinstance(item, Unit):
        raise TypeError(
            f"units lists a Unit ({item.name!r}) where a rule was expected: pass a callable that "
            "returns the units, or build Partition(units, model)"
        )
    if isinstance(item, str) and item.strip() == "auto":
        raise ValueError("'auto' chooses all units itself: it cannot stand in a list")
    return cast(Units, item)


class _Finder:
    """A user's callable as a rule."""

    def __init__(self, function: UnitFinder) -> None:
        self.function = function
        self.word = f"units by {getattr(function, '__name__', type(function).__name__)}"

    def find(self, model: nn.Module, taken: AbstractSet[str]) -> Iterable[Unit]:
        return self.function(model)


def _collect(rules: Sequence[Rule], model: nn.Module) -> list[tuple[int, list[Unit]]]:
    """Return, per rule, how many units it found and those of them that can train."""
    named = dict(model.named_parameters(remove_duplicate=False))
    by_id = {id(p): name for name, p in model.named_parameters()}
    first = {name: by_id[id(p)] for name, p in named.items()}
    taken: set[str] = set()
    seen: dict[frozenset[Slice], frozenset[Slice]] = {}
    collected = []
    for rule in rules:
        found = _checked(rule, rule.find(model, frozenset(taken)))
        kept = []
        for unit in found:
            live = [s for s in unit.slices if s.param not in named or named[s.param].requires_grad]
            # A unit whose parameters are all tied to those of an earlier one is that unit.
            untied = frozenset(replace(s, param=first.get(s.param, s.param)) for s in live)
            same_names = seen.setdefault(untied, frozenset(live)) == frozenset(live)
            if live and same_names:
                kept.append(replace(unit, slices=tuple(live)))
        owned = {first[s.param] for unit in kept for s in unit.slices if s.param in first}
        taken.update(name for name in first if first[name] in owned)
        collected.append((len(found), kept))
    return collected


def _checked(rule: Rule, found: object) -> list[Unit]:
    if not isinstance(found, Iterable) or isinstance(found, str):
        raise TypeError(f"{rule.word}: expected an iterable of Unit, got {type(found).__name__}")
    units = list(found)
    for unit in units:
        if not isinstance(unit, Unit):
            raise TypeError(
                f"{rule.word}: expected units, found {unit!r} of type {type(unit).__name__}: "
                "return Unit(name, kind, layer, slices)"
            )
    return units


def _automatic(model: nn.Module) -> list[Unit]:
    heads, why = _usable(Heads(), model)
    choices: list[list[Rule]] = [[Experts(), *heads], [*heads, FFN()], [Filters()], [Layers()]]
    found = [[unit for _, kept in _collect(rules, model) for unit in kept] for rules in choices]
    kinds = [{unit.kind for unit in units} for units in found]
    chosen = 0 if "expert" in kinds[0] else 1 if "head" in kinds[1] else 2
    # A transformer whose heads are not recognised, rather than a network of convolutions.
    if chosen == 2 and why and _size(found[1], model) > _size(found[2], model):
        chosen = 1
    if why:
        warnings.warn(f"units chosen without heads: {why}", stacklevel=3)
    if units := found[chosen] or found[3]:
        return units
    raise ValueError(
        f"all parameters of {type(model).__name__} are frozen (requires_grad=False): nothing could "
        "train or rest"
    )


def _usable(heads: Heads, model: nn.Module) -> tuple[list[Rule], str]:
    """Return the rule if it finds heads, and otherwise why a model with attention has none."""
    try:
        if heads.find(model, frozenset()):
            return [heads], ""
    except ValueError as error:
        return [], str(error)
    return [], heads.hint(model)


def _size(units: Sequence[Unit], model: nn.Module) -> int:
    """Return how many elements units have."""
    return int(Partition(units, model).numel.sum()) if units else 0


def _nothing_found(rule: Rule, found: int, model: nn.Module) -> str:
    what = f"partition found no {rule.word} in {type(model).__name__}"
    if found:
        return (
            f"{what} that could train: all {found} are frozen (requires_grad=False) or tied to "
            "earlier units: choose other units"
        )
    hint = rule.hint(model) if hasattr(rule, "hint") else ""
    others = [word for word in rule_words() if word != rule.word and _applies(word, model)]
    choice = f"choose from what it has ({', '.join(others)})" if others else "nothing else fits it"
    return f"{what}: {f'{hint}; or ' if hint else ''}{choice}, or pass a rule or a callable"


def _applies(word: str, model: nn.Module) -> bool:
    try:
        return bool(_collect([make_rule(word)], model)[0][1])
    except ValueError:
        return False
