"""Attention heads as units.

Head i of H owns what no other head's output depends on: its rows of the query, key and value
projections with their biases, and its columns of the output projection. The bias of the output
projection is shared by all heads and belongs to the remainder, as do norms inside the head and
relative position biases. Where a model couples its heads by what they share (a norm over all
queries in OLMo 2, talking heads in CaiT), the units are cut in the same way.

With grouped-query attention, the H query heads share G < H key-value heads. Training one query head
alone is then not possible without training the keys and values of its neighbours, so a unit is
one key-value head with its H/G query heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import nn

from lightning_mat.units.lookup import LinearMap, Lookup, join, name_layers
from lightning_mat.units.patterns import (
    ATTENTION_BIASES,
    ATTENTION_PATTERNS,
    BIASES_APART,
    HEAD_COUNTS,
    KEY_VALUE_HEAD_COUNTS,
    UNCALLED,
    UNCALLED_WITH_BIASES,
    AttentionPattern,
)
from lightning_mat.units.unit import Slice, Unit


@dataclass(frozen=True)
class Attention:
    """An attention module taken apart: every part divides evenly into ``groups``.

    Attributes:
        path: The module's name in the model.
        heads: Query heads; each group holds ``heads / groups`` of them, neighbours.
        groups: Key-value heads, each one unit with its query heads.
        inputs: Query, key and value projections.
        biases: Name and size of the biases that the module itself holds.
        out: The output projection.
    """

    path: str
    heads: int
    groups: int
    inputs: tuple[LinearMap, ...]
    biases: tuple[tuple[str, int], ...]
    out: LinearMap

    @property
    def parameters(self) -> set[str]:
        """Names of the parameters that the heads share out."""
        maps = {m.weight for m in (*self.inputs, self.out)} | {m.bias for m in self.inputs}
        return {name for name in maps if name} | {name for name, _ in self.biases}

    def head(self, group: int) -> tuple[Slice, ...]:
        """Return what one head, or one key-value group with its query heads, owns."""

        def share(size: int) -> tuple[int, int]:
            return group * size // self.groups, (group + 1) * size // self.groups

        slices = [s for m in self.inputs for s in m.outputs(*share(m.n_out))]
        slices += [Slice(name, 0, *share(size)) for name, size in self.biases]
        return (*slices, *self.out.inputs(*share(self.out.n_in)))


class Heads:
    """Attention heads: query, key, value rows and output-projection columns.

    Works on every module in which one of
    :data:`~lightning_mat.units.patterns.ATTENTION_PATTERNS` is found together with a head count:
    an integer attribute such as ``num_heads`` of the module, of the module that holds the query
    projection, or of the ``config`` of one of them.

    Example:
        >>> from lightning_mat.units import partition
        >>> part = partition(nn.MultiheadAttention(8, 2), Heads())
        >>> part.names, part.remainder
        (('head.0', 'head.1'), ('out_proj.bias',))
    """

    word = "heads"

    def find(self, model: nn.Module, taken: AbstractSet[str]) -> list[Unit]:
        """Return one unit per head, or per key-value group.

        Raises:
            ValueError: If a module looks like attention but its sizes do not divide into heads.
        """
        lookup = Lookup(model)
        found = [a for a in _found(lookup) if a.parameters.isdisjoint(taken)]
        layers = name_layers([a.path for a in found])
        return [
            Unit(join(layer, f"head.{i}"), "head", layer, attention.head(i))
            for attention, layer in zip(found, layers, strict=True)
            for i in range(attention.groups)
        ]

    def hint(self, model: nn.Module) -> str:
        """Name modules that seem to be attention but whose projections are not recognised."""
        lookup = Lookup(model)
        reasons = ((path, _handed_on(lookup, path, module)) for path, module in lookup)
        handed = [f"{path} ({why})" for path, why in reasons if why]
        if handed:
            return (
                "these modules use the weights of their projections without calling them, so that "
                f"they cannot be measured: {'; '.join(handed[:3])}"
            )
        suspects = [
            f"{path or 'the model'} ({type(module).__name__}: "
            f"{', '.join(n for n, _ in module.named_children()) or 'no layers'})"
            for path, module in lookup
            if (_count(HEAD_COUNTS, [module]) or "attention" in type(module).__name__.lower())
            and next(module.parameters(), None) is not None
        ]
        if not suspects:
            return ""
        return (
            f"these modules look like attention, but their projections or their head count have "
            f"unknown names: "
            f"{'; '.join(suspects[:3])}: call register_attention(AttentionPattern(...))"
        )


def find_attention(model: nn.Module) -> list[Attention]:
    """Return every attention module of a model whose projections and head count are recognised.

    Raises:
        ValueError: If a module looks like attention but its sizes do not divide into heads.

    Example:
        >>> (attention,) = find_attention(nn.MultiheadAttention(8, 2))
        >>> attention.heads, attention.out.weight
        (2, 'out_proj.weight')
    """
    return _found(Lookup(model))


def _found(lookup: Lookup) -> list[Attention]:
    return [
        a
        for path, m in lookup
        if not _handed_on(lookup, path, m) and (a := _attention(lookup, path, m)) is not None
    ]


def _handed_on(lookup: Lookup, path: str, module: nn.Module) -> str:
    """Return why no call of the projections of an attention shows their use; "" if calls do."""
    home = type(module).__module__
    if home in UNCALLED:
        return UNCALLED[home]
    why = UNCALLED_WITH_BIASES.get(home)
    if why is None:
        if getattr(module, BIASES_APART, True):
            return ""
        why = f"set its {BIASES_APART} = True, which computes the same by calling it"
    own = {name.rpartition(".")[2] for name in lookup.own_parameters(path)}
    return "" if own.isdisjoint(ATTENTION_BIASES) else why


def _count(names: Sequence[str], holders: Iterable[object]) -> int | None:
    """Return the first positive integer attribute among some names."""
    for holder in holders:
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _attention(lookup: Lookup, path: str, module: nn.Module) -> Attention | None:
    """Return the attention that a module is, by the first pattern that matches, or None."""
    for pattern in ATTENTION_PATTERNS:
        if not all(getattr(module, mark, None) for mark in pattern.marks):
            continue
        out = lookup.linear(path, pattern.out)
        maps = _projections(lookup, path, pattern)
        if out is None or maps is None:
            continue
        holders: list[object] = [module]
        below = pattern.inputs[0].rpartition(".")[0]
        if below and (holder := lookup.find(path, below)):
            holders.append(holder[1])
        holders += [c for h in holders if (c := getattr(h, "config", None)) is not None]
        heads = _count(HEAD_COUNTS, holders)
        if heads is None:
            continue
        where = f"attention module {path or '<root>'!r} ({type(module).__name__})"
        groups, inputs = _divide(where, pattern, heads, holders, maps, out)
        biases = tuple(
            (name, lookup.shape(name)[0])
            for name in lookup.own_parameters(path)
            if name.rpartition(".")[2] in ATTENTION_BIASES
        )
        return Attention(path, heads, groups, inputs, biases, out)
    return None


def _projections(
    lookup: Lookup, path: str, pattern: AttentionPattern
) -> tuple[LinearMap, ...] | None:
    maps: list[LinearMap] = []
    for name in pattern.inputs:
        found = lookup.linear(path, name)
        if found is None and pattern.bias:
            found = lookup.packed(path, name, pattern.bias, sum(m.n_out for m in maps))
        if found is None:
            return None
        maps.append(found)
    return tuple(maps)


def _divide(
    where: str,
    pattern: AttentionPattern,
    heads: int,
    holders: Sequence[object],
    maps: tuple[LinearMap, ...],
    out: LinearMap,
) -> tuple[int, tuple[LinearMap, ...]]:
    """Return the number of key-value groups, and projections that divide evenly into them.

    Raises:
        ValueError: If the sizes contradict the head count.
    """
    advice = (
        "choose other units, or register_attention a pattern, or register a rule, that knows "
        "this layout"
    )
    if pattern.packed:
        if out.n_in % heads:
            raise ValueError(
                f"{where} has {heads} heads, which do not divide the {out.n_in} inputs of "
                f"{out.weight!r}: {advice}"
            )
        width, outputs = out.n_in // heads, maps[0].n_out
        # The attribute of a shared config may describe another part of the model: the size decides.
        stated = _count(KEY_VALUE_HEAD_COUNTS, holders) or heads
        derived = (outputs // width - heads) // 2
        for groups in dict.fromkeys((derived,) if pattern.interleaved else (stated, heads)):
            if groups > 0 and (heads + 2 * groups) * width == outputs and heads % groups == 0:
                shared = groups * width
                parts = maps[0].split(out.n_in, shared, shared)
                return groups, maps if pattern.interleaved else parts
        raise ValueError(
            f"{where} packs queries, keys and values into the {outputs} outputs of "
            f"{maps[0].weight!r}, which do not fit {heads} heads of width {width}: {advice}"
        )
    query, *rest = maps
    key, value = rest[0].split(rest[0].n_out // 2, rest[0].n_out // 2) if len(rest) == 1 else rest
    if query.n_out % heads:
        raise ValueError(
            f"{where} has {heads} heads, which do not divide the {query.n_out} outputs of "
            f"{query.weight!r}: {advice}"
        )
    # A query and the key that it meets have the same width, so the key's size gives the groups.
    groups, left = divmod(key.n_out, query.n_out // heads)
    if left or not groups or heads % groups or value.n_out % groups:
        raise ValueError(
            f"{where} has {heads} heads and {query.n_out} query, {key.n_out} key and "
            f"{value.n_out} value outputs, which do not divide into key-value groups: {advice}"
        )
    if out.n_in != heads * (value.n_out // groups):
        raise ValueError(
            f"{where} has {heads} heads of {value.n_out // groups} value outputs, but "
            f"{out.weight!r} reads {out.n_in} inputs: {advice}"
        )
    return groups, (query, key, value)
