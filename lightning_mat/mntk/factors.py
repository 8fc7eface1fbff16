r"""Per-sample gradients of one parameter, kept in the form in which a layer gives them.

A factor stands for G of shape [S, rows, columns], the gradient of S scalars with respect to one
parameter seen as a matrix. It yields any block of rows of it without holding all of it (the eager
way), and names the tensors from which the fused operation forms it (:meth:`Factor.sources`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

KINDS = ("linear", "conv", "bias", "scale", "embedding", "dense")
"""Kinds of sources, in the order of their numbers in csrc/plan.h."""


class Geometry(NamedTuple):
    """How a convolution's weight meets its input, one entry per spatial dimension.

    Args:
        kernel: Size of the kernel.
        stride: Step of the kernel.
        dilation: Distance of the kernel's elements.
        padding: Zeros before the first element; after the last there are as many, or one more.
        groups: Groups of channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class Source:
    """Tensors that make the gradients of some samples, see csrc/plan.h for the kinds' shapes.

    Args:
        kind: One of :data:`KINDS`.
        a: What the layer took in; None for kinds that need none.
        b: The gradient of what it gave out.
        first: The first of its samples.
        adds: Whether these samples have other sources before.
        geometry: Of a convolution.
    """

    kind: str
    a: Tensor | None
    b: Tensor
    first: int = 0
    adds: bool = False
    geometry: Geometry | None = None

    @property
    def samples(self) -> int:
        """How many samples it has."""
        return self.b.shape[0]

    @property
    def positions(self) -> int:
        """Vectors that go in per sample: tokens, or elements of a convolution's channel."""
        if self.a is None:
            return self.tokens
        return prod([self.a.shape[1], *self.a.shape[3:]])

    @property
    def tokens(self) -> int:
        """Terms that a sample's gradient is summed over: tokens, or positions of a convolution."""
        if self.kind == "dense":
            return 1
        return prod([self.b.shape[1], *self.b.shape[3:]])


class Factor(Protocol):
    """Per-sample gradients of a parameter, [S, rows, columns], that are formed block by block."""

    samples: int
    rows: int
    columns: int
    flops_per_element: float
    """FLOPs per sample and element that the plain weight gradient costs in a training step."""

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)`` of every sample's gradient: [S, stop - start, columns]."""
        ...

    def sources(self) -> list[Source] | None:
        """Return the tensors that make it, or None where only :meth:`block` knows."""
        ...


class Outer:
    r"""Sums of outer products over tokens, :math:`G_s = \sum_t b_{st} a_{st}^\top`.

    Args:
        a: Inputs, shape ``[S, T, columns]``.
        b: Output gradients, shape ``[S, T, rows]``.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self.samples, self.tokens, self.columns = a.shape
        self.rows = b.shape[2]
        self.flops_per_element = 2.0 * self.tokens

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``, by one batched matrix product."""
        return torch.bmm(self.b[:, :, start:stop].transpose(1, 2), self.a)

    def sources(self) -> list[Source]:
        """Return the inputs and output gradients."""
        return [Source("linear", self.a, self.b)]


class Convolution:
    r"""Per-sample gradients of a convolution's weight, unfolding a few samples at a time.

    With patches :math:`P_s` of shape [C/g·k, positions] and output gradients :math:`B_s` of shape
    [O/g, positions], each group's gradient is :math:`G_s = B_s P_s^\top`.

    Args:
        geometry: Kernel, stride, dilation and groups.
        a: Inputs, shape ``[S, T, C, *size]``.
        b: Output gradients, shape ``[S, T, O, *out size]``.
    """

    # Bytes that the unfolded patches of some samples may take at a time.
    patch_bytes = 64 << 20

    def __init__(self, geometry: Geometry, a: Tensor, b: Tensor) -> None:
        self.geometry, self.a, self.b = geometry, a, b
        self.samples = a.shape[0]
        self.positions = prod(b.shape[3:])
        self.tokens = a.shape[1] * self.positions
        self.rows = b.shape[2]
        self.columns = a.shape[2] // geometry.groups * prod(geometry.kernel)
        self.flops_per_element = 2.0 * self.tokens

    def _patches(self, start: int, stop: int) -> Tensor:
        """Return the patches of some samples, shape ``[s, T, groups, C/g·k, positions]``."""
        geometry, out = self.geometry, self.b.shape[3:]
        pads: list[int] = []  # of the last dimension first
        for size, wanted, k, step, d, before in zip(
            self.a.shape[3:], out, *geometry[:4], strict=True
        ):
            reach = (wanted - 1) * step + (k - 1) * d + 1
            pads = [before, max(0, reach - before - size), *pads]
        x = torch.nn.functional.pad(self.a[start:stop], pads)
        strides = list(x.stride())
        window = x.as_strided(
            [*x.shape[:3], *geometry.kernel, *out],
            [
                *strides[:3],
                *(d * s for d, s in zip(geometry.dilation, strides[3:], strict=True)),
                *(step * s for step, s in zip(geometry.stride, strides[3:], strict=True)),
            ],
            x.storage_offset(),
        )
        return window.reshape(*x.shape[:2], geometry.groups, self.columns, self.positions)

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``: filters, of all samples."""
        groups = self.geometry.groups
        per_group = self.rows // groups
        first, last = start // per_group, -(-stop // per_group)
        bytes_per_sample = self.tokens * groups * self.columns * self.a.element_size()
        step = max(1, self.patch_bytes // max(1, bytes_per_sample))
        parts = []
        for s in range(0, self.samples, step):
            patches = self._patches(s, s + step)[:, :, first:last]
            grad = self.b[s : s + step].flatten(3).unflatten(2, (groups, per_group))
            whole = torch.einsum("stgop,stgdp->sgod", grad[:, :, first:last], patches).flatten(1, 2)
            parts.append(whole[:, start - first * per_group : stop - first * per_group])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def sources(self) -> list[Source]:
        """Return the inputs and output gradients."""
        return [Source("conv", self.a, self.b, geometry=self.geometry)]


class Summed:
    """Gradients of a bias: the sum over tokens.

    Args:
        b: Output gradients, shape ``[S, T, rows]``.
    """

    flops_per_element = 0.0
    columns = 1

    def __init__(self, b: Tensor) -> None:
        self.b = b
        self.samples, _, self.rows = b.shape

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``."""
        return self.b[:, :, start:stop].sum(1).unsqueeze(-1)

    def sources(self) -> list[Source]:
        """Return the output gradients."""
        return [Source("bias", None, self.b)]


class Scaled:
    """Gradients of a scale, the affine weight of a norm: the sum over tokens of products.

    Args:
        a: What is scaled (normalised inputs), shape ``[S, T, rows]``.
        b: Output gradients, the same shape.
    """

    flops_per_element = 0.0
    columns = 1

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self.samples, _, self.rows = b.shape

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``."""
        return (self.a[:, :, start:stop] * self.b[:, :, start:stop]).sum(1).unsqueeze(-1)

    def sources(self) -> list[Source]:
        """Return what is scaled and the output gradients."""
        return [Source("scale", self.a, self.b)]


class Rows:
    """Gradients of an embedding: a few rows of the table per sample, without a one-hot matrix.

    Args:
        index: Row of each token, int64, shape ``[S, T]``; -1 where a token counts for nothing.
        values: Output gradient of each token, shape ``[S, T, columns]``.
        rows: Rows of the table.
    """

    flops_per_element = 0.0

    def __init__(self, index: Tensor, values: Tensor, rows: int) -> None:
        self.index, self.values = index, values
        self.samples, _, self.columns = values.shape
        self.rows = rows

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)`` of the table, dense."""
        out = self.values.new_zeros(self.samples, stop - start, self.columns)
        sample, token = ((self.index >= start) & (self.index < stop)).nonzero(as_tuple=True)
        row = self.index[sample, token] - start
        # index_put_ with accumulate adds in a fixed order; index_add_ uses atomics on the GPU
        return out.index_put_((sample, row), self.values[sample, token], accumulate=True)

    def sources(self) -> list[Source]:
        """Return the rows and their gradients."""
        return [Source("embedding", self.index, self.values)]


class Dense:
    """Gradients that are small enough to hold, [S, rows, columns]."""

    flops_per_element = 0.0

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.samples, self.rows, self.columns = values.shape

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``, a view."""
        return self.values[:, start:stop]

    def sources(self) -> list[Source]:
        """Return the gradients themselves."""
        return [Source("dense", None, self.values)]


class Zero:
    """The gradient of samples that did not use a parameter."""

    flops_per_element = 0.0

    def __init__(self, samples: int, like: Factor) -> None:
        self.samples, self.rows, self.columns = samples, like.rows, like.columns
        self.like = like

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``: zeros."""
        return self.like.block(start, start).new_zeros(self.samples, stop - start, self.columns)

    def sources(self) -> list[Source]:
        """Return nothing: samples without a source have no gradient."""
        return []


class Sum:
    """The sum of a parameter's uses: a tied weight's, or a layer's that is called twice."""

    def __init__(self, uses: Sequence[Factor]) -> None:
        self.uses = uses
        first = uses[0]
        self.samples, self.rows, self.columns = first.samples, first.rows, first.columns
        self.flops_per_element = sum(use.flops_per_element for use in uses)

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``."""
        total = self.uses[0].block(start, stop)
        for use in self.uses[1:]:
            total = total + use.block(start, stop)
        return total

    def sources(self) -> list[Source] | None:
        """Return the uses' sources: each after the first adds to what was there."""
        found: list[Source] = []
        for use in self.uses:
            own = use.sources()
            if own is None:
                return None
            found += [replace(source, adds=bool(found)) for source in own]
        return found


class Stacked:
    """Micro-batches one after the other along the samples."""

    def __init__(self, parts: Sequence[Factor]) -> None:
        self.parts = parts
        self.samples = sum(part.samples for part in parts)
        self.rows, self.columns = parts[0].rows, parts[0].columns
        weights = [part.flops_per_element * part.samples for part in parts]
        self.flops_per_element = sum(weights) / self.samples

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``."""
        return torch.cat([part.block(start, stop) for part in self.parts])

    def sources(self) -> list[Source] | None:
        """Return the micro-batches' sources, each at its samples' place."""
        found: list[Source] = []
        first = 0
        for part in self.parts:
            own = part.sources()
            if own is None:
                return None
            found += [replace(source, first=first + source.first) for source in own]
            first += part.samples
        return found


def add_uses(uses: Sequence[Factor]) -> Factor:
    """Return one factor for several uses of a parameter by the same samples."""
    if len(uses) == 1:
        return uses[0]
    outers = [use for use in uses if type(use) is Outer]
    if len(outers) == len(uses):
        # a sum of sums over tokens is one sum over all tokens
        return Outer(torch.cat([u.a for u in outers], 1), torch.cat([u.b for u in outers], 1))
    return Sum(uses)


def stack_samples(parts: Sequence[Factor]) -> Factor:
    """Return one factor for the micro-batches of a parameter."""
    return parts[0] if len(parts) == 1 else Stacked(parts)
