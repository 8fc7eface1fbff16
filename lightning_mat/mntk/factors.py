r"""Per-sample gradients of one parameter, kept in the form in which a layer gives them.

A factor stands for G of shape [S, rows, columns], the gradient of S scalars with respect to one
parameter seen as a matrix, and yields any block of rows of it without holding all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_mat.units.unit import Rect


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

    def transposed(self) -> Factor:
        """Return the factor with rows and columns exchanged."""
        ...


@runtime_checkable
class TokenSum(Protocol):
    """A factor that is a sum of outer products over tokens, or can be written as one."""

    samples: int
    tokens: int
    rows: int
    columns: int

    def token_form(self) -> Outer:
        """Return the inputs and output gradients of all tokens."""
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

    def transposed(self) -> Outer:
        """Return the factor of the transposed parameter."""
        return Outer(self.b, self.a)

    def token_form(self) -> Outer:
        """Return itself."""
        return self


class Rows:
    """Gradients of an embedding: a few rows of the table per sample, without a one-hot matrix.

    Args:
        index: Row of each token, int64, shape ``[S, T]``; -1 where a token counts for nothing.
        values: Output gradient of each token, shape ``[S, T, columns]``.
        rows: Rows of the table.
    """

    def __init__(self, index: Tensor, values: Tensor, rows: int) -> None:
        self.index, self.values = index, values
        self.samples, _, self.columns = values.shape
        self.rows = rows
        self.flops_per_element = 0.0

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)`` of the table, dense."""
        out = self.values.new_zeros(self.samples, stop - start, self.columns)
        sample, token = ((self.index >= start) & (self.index < stop)).nonzero(as_tuple=True)
        row = self.index[sample, token] - start
        # index_put_ with accumulate adds in a fixed order; index_add_ uses atomics on the GPU
        return out.index_put_((sample, row), self.values[sample, token], accumulate=True)

    def transposed(self) -> Factor:
        """Return the factor of the transposed table."""
        return Transposed(self)

    def compact(self, rects: Sequence[Rect]) -> tuple[Rows, list[Rect]]:
        """Return the same gradients over the rows that occur, and where the rectangles lie there.

        Rows that no sample touches have a zero gradient and add nothing to a Gram.
        """
        present = self.index[self.index >= 0].unique()
        bounds = torch.tensor([[r.r0, r.r1] for r in rects], device=present.device)
        places = torch.searchsorted(present, bounds).tolist()
        index = torch.searchsorted(present, self.index).masked_fill(self.index < 0, -1)
        moved = [Rect(a, b, r.c0, r.c1) for (a, b), r in zip(places, rects, strict=True)]
        return Rows(index, self.values, len(present)), moved


class Dense:
    """Gradients that are small enough to hold: biases and norms' affines, [S, rows, columns]."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.samples, self.rows, self.columns = values.shape
        self.flops_per_element = 0.0

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``, a view."""
        return self.values[:, start:stop]

    def transposed(self) -> Dense:
        """Return the factor of the transposed parameter."""
        return Dense(self.values.transpose(1, 2))


class Transposed:
    """Any factor with rows and columns exchanged, at the price of forming all of it."""

    def __init__(self, inner: Factor) -> None:
        self.inner = inner
        self.samples, self.rows, self.columns = inner.samples, inner.columns, inner.rows
        self.flops_per_element = inner.flops_per_element

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``."""
        return self.inner.block(0, self.inner.rows)[:, :, start:stop].transpose(1, 2)

    def transposed(self) -> Factor:
        """Return the factor that was transposed."""
        return self.inner


class Zero:
    """The gradient of samples that did not use a parameter."""

    def __init__(self, samples: int, like: Factor) -> None:
        self.samples, self.rows, self.columns = samples, like.rows, like.columns
        self.like = like
        self.flops_per_element = 0.0

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``: zeros."""
        return self.like.block(start, start).new_zeros(self.samples, stop - start, self.columns)

    def transposed(self) -> Zero:
        """Return the zeros of the transposed parameter."""
        return Zero(self.samples, self.like.transposed())


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

    def transposed(self) -> Sum:
        """Return the sum of the transposed uses."""
        return Sum([use.transposed() for use in self.uses])


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

    def transposed(self) -> Stacked:
        """Return the transposed micro-batches."""
        return Stacked([part.transposed() for part in self.parts])


def add_uses(uses: Sequence[Factor]) -> Factor:
    """Return one factor for several uses of a parameter by the same samples."""
    if len(uses) == 1:
        return uses[0]
    outers = [use for use in uses if type(use) is Outer]
    if len(outers) == len(uses):
        # a sum of sums over tokens is one sum over all tokens
        return Outer(torch.cat([u.a for u in outers], 1), torch.cat([u.b for u in outers], 1))
    return Sum(uses)


class StackedOuter(Stacked):
    """Micro-batches of outer products, which are formed side by side without copying inputs."""

    def __init__(self, parts: Sequence[Outer]) -> None:
        super().__init__(parts)
        self.outers = parts
        self.tokens = max(part.tokens for part in parts)

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``."""
        out = self.outers[0].a.new_empty(self.samples, stop - start, self.columns)
        first = 0
        for part in self.outers:
            rows = part.b[:, :, start:stop].transpose(1, 2)
            torch.bmm(rows, part.a, out=out[first : first + part.samples])
            first += part.samples
        return out

    def transposed(self) -> StackedOuter:
        """Return the transposed micro-batches."""
        return StackedOuter([part.transposed() for part in self.outers])

    def token_form(self) -> Outer:
        """Return the inputs and output gradients of all tokens, padded to one length."""
        return Outer(
            torch.cat([_pad_tokens(part.a, self.tokens) for part in self.outers]),
            torch.cat([_pad_tokens(part.b, self.tokens) for part in self.outers]),
        )


def stack_samples(parts: Sequence[Factor]) -> Factor:
    """Return one factor for the micro-batches of a parameter."""
    if len(parts) == 1:
        return parts[0]
    outers = [part for part in parts if type(part) is Outer]
    return StackedOuter(outers) if len(outers) == len(parts) else Stacked(parts)


def _pad_tokens(values: Tensor, tokens: int) -> Tensor:
    """Append zero tokens, which add nothing to a sum of outer products."""
    if values.shape[1] == tokens:
        return values
    return torch.nn.functional.pad(values, (0, 0, 0, tokens - values.shape[1]))
