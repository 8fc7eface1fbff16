"""Partition: the disjoint units of a model, and the remainder that always trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_mat.units.regions import (
    Block,
    complement,
    disjoint,
    first_overlap,
    union,
)
from lightning_mat.units.unit import Rect, Unit, matrix_shape


class Partition:
    """The disjoint units of a model, by parameter name; holds no tensor and no module.

    Args:
        units: Units in the order in which spectra and decisions list them.
        model: The model whose parameters the units name. Tied parameters count once, under the
            first of their names. Parameters that the user froze (``requires_grad=False``) are not
            in the remainder, and slices of them are refused.

    Raises:
        ValueError: If a unit names a parameter that does not exist or is frozen, a slice does not
            fit, two units own the same element, or two units share a name. The message names them.

    Example:
        >>> from torch import nn
        >>> from lightning_mat.units.unit import Slice
        >>> model = nn.Linear(4, 6)
        >>> halves = [
        ...     Unit(f"half.{i}", "ffn", "fc", (Slice("weight", 0, 3 * i, 3 * i + 3),))
        ...     for i in range(2)
        ... ]
        >>> part = Partition(halves, model)
        >>> len(part), part.remainder
        (2, ('bias',))
        >>> part.active_blocks("weight", torch.tensor([False, True]))
        (Block(rows=((3, 6),), columns=((0, 4),)),)
    """

    def __init__(self, units: Iterable[Unit], model: nn.Module) -> None:
        self.units: tuple[Unit, ...] = tuple(units)
        self.shapes: dict[str, torch.Size] = {n: p.shape for n, p in model.named_parameters()}
        self.frozen: tuple[str, ...] = tuple(
            n for n, p in model.named_parameters() if not p.requires_grad
        )
        first_name = {id(p): n for n, p in model.named_parameters()}
        self.aliases: dict[str, str] = {
            n: first_name[id(p)] for n, p in model.named_parameters(remove_duplicate=False)
        }
        self._check_names()
        self.owners: dict[str, tuple[tuple[int, Rect], ...]] = self._own()

    def _check_names(self) -> None:
        seen: set[str] = set()
        for unit in self.units:
            if unit.name in seen:
                raise ValueError(f"two units are named {unit.name!r}: unit names must be unique")
            seen.add(unit.name)
            for piece in unit.slices:
                name = self.aliases.get(piece.param)
                if name is None:
                    raise ValueError(
                        f"unit {unit.name!r} owns a slice of {piece.param!r}, which is not a "
                        "parameter of the model: take names from model.named_parameters()"
                    )
                if name in self.frozen:
                    raise ValueError(
                        f"unit {unit.name!r} owns a slice of {piece.param!r}, which is frozen "
                        "(requires_grad=False): leave frozen parameters out of the units"
                    )

    def _own(self) -> dict[str, tuple[tuple[int, Rect], ...]]:
        slices: dict[str, list[tuple[int, Rect]]] = {}
        for index, unit in enumerate(self.units):
            for piece in unit.slices:
                name = self.aliases[piece.param]
                try:
                    rect = piece.rect(self.shapes[name])
                except ValueError as error:
                    raise ValueError(f"unit {unit.name!r}: {error}") from None
                slices.setdefault(name, []).append((index, rect))
        owners: dict[str, tuple[tuple[int, Rect], ...]] = {}
        for name, owned in slices.items():
            rects = [rect for _, rect in owned]
            clash = first_overlap(rects, [index for index, _ in owned])
            if clash is not None:
                first, second = (self.units[owned[i][0]].name for i in clash)
                raise ValueError(
                    f"units {first!r} and {second!r} both own elements of {name!r} "
                    f"({_describe(rects[clash[0]])} and {_describe(rects[clash[1]])}): "
                    "units must be disjoint"
                )
            by_unit: dict[int, list[Rect]] = {}
            for index, rect in owned:
                by_unit.setdefault(index, []).append(rect)
            owners[name] = tuple(
                sorted((i, rect) for i, rects in by_unit.items() for rect in disjoint(rects))
            )
        return owners

    def __len__(self) -> int:
        """Return L, the number of units."""
        return len(self.units)

    def __iter__(self) -> Iterator[Unit]:
        """Iterate over the units in order."""
        return iter(self.units)

    def __getstate__(self) -> dict[str, object]:
        """Pickle without the caches."""
        cached = {"names", "kinds", "layers", "remainder", "numel", "_free"}
        return {k: v for k, v in self.__dict__.items() if k not in cached}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the units, length L."""
        return tuple(unit.name for unit in self.units)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the units, length L."""
        return tuple(unit.kind for unit in self.units)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Layers of the units, length L."""
        return tuple(unit.layer for unit in self.units)

    @cached_property
    def remainder(self) -> tuple[str, ...]:
        """Names of the parameters of which no unit owns anything: they always train."""
        return tuple(n for n in self.shapes if n not in self.owners and n not in self.frozen)

    @cached_property
    def numel(self) -> Tensor:
        """Parameters (elements) owned by each unit, int64, shape ``[L]``."""
        count = torch.zeros(len(self.units), dtype=torch.int64)
        for owned in self.owners.values():
            for index, rect in owned:
                count[index] += rect.numel
        return count

    @cached_property
    def _free(self) -> dict[str, tuple[Block, ...]]:
        return {
            name: complement([rect for _, rect in owned], *matrix_shape(self.shapes[name]))
            for name, owned in self.owners.items()
        }

    def free_blocks(self, param: str) -> tuple[Block, ...]:
        """Return what no unit owns of a parameter that is partly owned (often nothing)."""
        return self._free[param]

    def active_blocks(self, param: str, active: Tensor | Sequence[bool]) -> tuple[Block, ...]:
        """Return disjoint blocks that cover all elements of a parameter that train.

        Args:
            param: Name of the parameter.
            active: Which units train, bool, shape ``[L]``.

        Returns:
            Blocks over the parameter seen as a matrix; empty when all of it rests or it is frozen,
            one block over the whole when all of it trains.
        """
        if param in self.frozen:
            return ()
        if param not in self.owners:
            rows, columns = matrix_shape(self.shapes[param])
            return union([Rect(0, rows, 0, columns)])
        on = active.tolist() if isinstance(active, Tensor) else list(active)
        rects = [rect for index, rect in self.owners[param] if on[index]]
        rects += [rect for block in self.free_blocks(param) for rect in block.rects()]
        return union(rects)

    def rests_whole(self, param: str, active: Tensor | Sequence[bool]) -> bool:
        """Return whether no element of the parameter trains."""
        return not self.active_blocks(param, active)

    def check_active(self, active: Tensor | Sequence[bool]) -> Tensor:
        """Return ``active`` as a bool tensor of shape ``[L]`` on the CPU.

        Raises:
            ValueError: If its length is not L or it is not boolean.
        """
        flags = torch.as_tensor(active)
        if flags.dtype != torch.bool or flags.shape != (len(self.units),):
            raise ValueError(
                f"active must be a bool tensor of shape [{len(self.units)}], one flag per unit, "
                f"got {flags.dtype} of shape {list(flags.shape)}"
            )
        return flags.cpu()

    def describe(self) -> str:
        """Return a table that a person can read: kind, layer, units, parameters, share."""
        total = sum(shape.numel() for shape in self.shapes.values())
        of_all = max(total, 1)
        groups: dict[tuple[str, str], list[int]] = {}
        for index, unit in enumerate(self.units):
            groups.setdefault((unit.kind, unit.layer), []).append(index)
        rows = [("kind", "layer", "units", "parameters", "share of model")]
        for (kind, layer), members in groups.items():
            count = int(self.numel[members].sum())
            rows.append((kind, layer, str(len(members)), f"{count:,}", f"{count / of_all:.1%}"))
        owned = int(self.numel.sum())
        stuck = sum(self.shapes[n].numel() for n in self.frozen)
        rest = total - owned - stuck
        rows.append(("(always trains)", "", "", f"{rest:,}", f"{rest / of_all:.1%}"))
        if stuck:
            rows.append(("(frozen by you)", "", "", f"{stuck:,}", f"{stuck / of_all:.1%}"))
        rows.append(("total", "", str(len(self.units)), f"{total:,}", "100.0%"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        left = (True, True, False, False, False)
        lines = [
            "  ".join(
                cell.ljust(w) if is_left else cell.rjust(w)
                for cell, w, is_left in zip(row, widths, left, strict=True)
            ).rstrip()
            for row in rows
        ]
        rule = "  ".join("-" * w for w in widths)
        return "\n".join([lines[0], rule, *lines[1:]])


def _describe(rect: Rect) -> str:
    return f"rows {rect.r0}:{rect.r1}, columns {rect.c0}:{rect.c1}"
