"""Experts of mixture layers as units.

Experts are kept in one of two ways, and a unit owns every parameter of its expert in both:

- one module each, in a ``ModuleList`` or ``ModuleDict`` (Switch Transformers): the whole of each
  parameter below the expert's module;
- stacked along the first dimension, as ``[E, ...]`` (Mixtral and most mixtures of Hugging Face):
  the slice [e, e+1) of every stacked weight, and of the biases that lie beside one.

The router and experts that every token visits (shared experts) belong to the remainder.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from torch import nn

from lightning_mat.units.lookup import Lookup, join, name_layers
from lightning_mat.units.patterns import EXPERT_CONTAINERS, EXPERT_COUNTS
from lightning_mat.units.unit import Slice, Unit


class Experts:
    """The experts of every container called ``experts``, or as registered.

    The names are :data:`~lightning_mat.units.patterns.EXPERT_CONTAINERS`.

    Example:
        >>> from lightning_mat.units import partition
        >>> class Mixture(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.router = nn.Linear(4, 2)
        ...         self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        >>> part = partition(Mixture(), Experts())
        >>> part.names, part.numel.tolist(), part.remainder
        (('expert.0', 'expert.1'), [20, 20], ('router.weight', 'router.bias'))
    """

    word = "experts"

    def find(self, model: nn.Module, taken: AbstractSet[str]) -> list[Unit]:
        """Return one unit per expert."""
        lookup = Lookup(model)
        mixtures: dict[str, list[tuple[Slice, ...]]] = {}
        for path, module in lookup:
            if path.rpartition(".")[2] not in EXPERT_CONTAINERS:
                continue
            experts = _separate(path, module) or _stacked(lookup, path, module)
            if experts and not any(s.param in taken for owned in experts for s in owned):
                mixtures[path] = experts
        layers = name_layers([path.rpartition(".")[0] for path in mixtures])
        return [
            Unit(join(layer, f"expert.{i}"), "expert", layer, owned)
            for layer, experts in zip(layers, mixtures.values(), strict=True)
            for i, owned in enumerate(experts)
        ]


def _separate(path: str, module: nn.Module) -> list[tuple[Slice, ...]]:
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return []
    experts = (
        tuple(Slice(join(path, f"{name}.{n}")) for n, _ in child.named_parameters())
        for name, child in module.named_children()
    )
    return [owned for owned in experts if owned]


def _stacked(lookup: Lookup, path: str, module: nn.Module) -> list[tuple[Slice, ...]]:
    holders = [lookup.own_parameters(join(path, name)) for name, _ in module.named_modules()]
    weights = [n for own in holders for n in own if len(lookup.shape(n)) >= 3]
    if not weights:
        return []
    stated = [n for name in EXPERT_COUNTS if isinstance(n := getattr(module, name, None), int)]
    number = stated[0] if stated else lookup.shape(weights[0])[0]
    # A router below the container is [E, d] too: only what lies beside a stacked weight counts.
    stacks = [
        name
        for own in holders
        if any(n in weights and lookup.shape(n)[0] == number for n in own)
        for name in own
        if lookup.shape(name)[:1] == (number,)
    ]
    if not stacks:
        return []
    return [tuple(Slice(name, 0, e, e + 1) for name in stacks) for e in range(number)]
