"""Blocks of hidden neurons of feed-forward networks as units.

For y = W₂ φ(W₁x + b₁) + b₂ with h hidden neurons, a unit owns the neurons [a, b): rows [a, b) of
W₁ and b₁, and columns [a, b) of W₂. In a gated network, y = W₂ (φ(W_g x) ∘ W_u x), it owns the same
rows of W_g and W_u. The output bias b₂ is shared and belongs to the remainder.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import nn

from lightning_mat.units.lookup import LinearMap, Lookup, join, name_layers
from lightning_mat.units.patterns import FFN_PATTERNS
from lightning_mat.units.unit import Slice, Unit

# Networks of so few inputs and many neurons map coordinates to position biases (Swin V2), once for
# all samples.
COORDINATES = 3


def default_width(hidden: int) -> int:
    """Return the hidden neurons per unit: a sixteenth, within 64 and 128, at most a quarter.

    Sixteen blocks or more keep the choice fine; 64 to 128 neurons, as wide as attention heads,
    keep the sliced matrix products efficient; and a small network still has four blocks.

    Example:
        >>> [default_width(h) for h in (32, 512, 1024, 2048, 3072, 11008)]
        [8, 64, 64, 128, 128, 128]
    """
    return min(max(hidden // 16, 64), 128, -(-hidden // 4))


@dataclass(frozen=True)
class Network:
    """A feed-forward network taken apart: maps that make the hidden neurons, and their reader."""

    path: str
    first: tuple[LinearMap, ...]
    second: LinearMap

    @property
    def parameters(self) -> set[str]:
        """Names of the parameters that the blocks share out."""
        names = {m.weight for m in (*self.first, self.second)} | {m.bias for m in self.first}
        return {name for name in names if name}

    def block(self, start: int, stop: int) -> tuple[Slice, ...]:
        """Return what the hidden neurons ``[start, stop)`` own."""
        rows = [s for m in self.first for s in m.outputs(start, stop)]
        return (*rows, *self.second.inputs(start, stop))


class FFN:
    """Blocks of hidden neurons: rows of the first linear layer, columns of the second.

    Works on every module in which one of :data:`~lightning_mat.units.patterns.FFN_PATTERNS` is
    found and the widths fit, and on every ``nn.Sequential`` with exactly two linear layers and
    otherwise nothing but layers without parameters.

    Args:
        block_width: Hidden neurons per unit; the last unit of a network has what is left. None:
            :func:`default_width`.

    Raises:
        ValueError: If ``block_width`` is not a positive integer.

    Example:
        >>> from lightning_mat.units import partition
        >>> mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
        >>> part = partition(mlp, FFN(block_width=4))
        >>> part.names, part.numel.tolist(), part.remainder
        (('ffn.0', 'ffn.1'), [28, 14], ('2.bias',))
    """

    word = "ffn"

    def __init__(self, block_width: int | None = None) -> None:
        if block_width is not None and (
            not isinstance(block_width, int) or isinstance(block_width, bool) or block_width < 1
        ):
            raise ValueError(
                f"block_width must be an integer ≥ 1 (hidden neurons per unit) or None, "
                f"got {block_width!r}"
            )
        self.block_width = block_width

    def find(self, model: nn.Module, taken: AbstractSet[str]) -> list[Unit]:
        """Return the blocks of every feed-forward network of which nothing is taken."""
        lookup = Lookup(model)
        networks = [n for n in _networks(lookup) if n.parameters.isdisjoint(taken)]
        units = []
        for network, layer in zip(networks, name_layers([n.path for n in networks]), strict=True):
            hidden = network.second.n_in
            width = self.block_width or default_width(hidden)
            units += [
                Unit(
                    join(layer, f"ffn.{i}"),
                    "ffn",
                    layer,
                    network.block(start, min(start + width, hidden)),
                )
                for i, start in enumerate(range(0, hidden, width))
            ]
        return units


def _networks(lookup: Lookup) -> Iterator[Network]:
    for path, module in lookup:
        used: set[str] = set()
        for pattern in FFN_PATTERNS:
            maps = [lookup.linear(path, name) for name in (*pattern.first, pattern.second)]
            network = _network(path, maps)
            # A gated pattern comes before the plain one whose names it contains.
            if network is not None and network.parameters.isdisjoint(used):
                used |= network.parameters
                yield network
        if isinstance(module, nn.Sequential):
            children = [lookup.find(path, name) for name, _ in module.named_children()]
            full = [c for c in children if c and next(c[1].parameters(), None) is not None]
            if len(full) == 2:
                network = _network(path, [lookup.as_linear(*child) for child in full])
                if network is not None and network.parameters.isdisjoint(used):
                    yield network


def _network(path: str, maps: list[LinearMap | None]) -> Network | None:
    *first, second = maps
    if second is None:
        return None
    hidden = second.n_in
    inputs = max((linear.n_in for linear in first if linear is not None), default=0)
    if inputs <= COORDINATES and hidden > 16 * inputs:
        return None
    parts: list[LinearMap] = []
    for linear in first:
        if linear is None or linear.n_out not in (hidden, 2 * hidden):
            return None
        parts += linear.split(*[hidden] * (linear.n_out // hidden))
    return Network(path, tuple(parts), second)
