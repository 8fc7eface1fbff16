"""ConvPlan: which channels of a convolution's operands give the parts of its gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from torch import nn

from lightning_mat.gate.plan import (
    Passage,
    Plan,
    Term,
    passing_blocks,
    passing_entries,
    training_blocks,
    training_entries,
)
from lightning_mat.gate.rules import Rest
from lightning_mat.gate.selection import Selection
from lightning_mat.units.regions import Block, Run, merge_runs

Convolution = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)


@dataclass(frozen=True)
class ConvPlan(Plan):
    """A plan for a convolution, whose features are channels.

    Attributes:
        stride: One per spatial dimension, as are the next two.
        padding: Zeros added on both sides, after what :attr:`pad` adds.
        dilation: Distance between the taps of the kernel.
        groups: Groups of channels.
        transposed: The weight is ``[in, out / groups, ...]``, not ``[out, in / groups, ...]``.
        pad: What ``F.pad`` adds first, none for a layer that pads with zeros on both sides alike.
        pad_mode: Its mode.
        apart: Whether what reads the output next can go on with the channels that pass.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    pad: tuple[int, ...]
    pad_mode: str
    apart: bool
    _reading: dict[tuple[Run, ...], ConvPlan] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def reading(self, some: Selection) -> ConvPlan | None:
        """Return the plan for an input of which only these channels have gradients.

        None where they are not told apart: in groups, and where the input is padded first.
        """
        if self.groups != 1 or self.transposed or self.pad:
            return None
        if some.runs not in self._reading:
            before = self.passages
            if before is None:
                rows, columns = (s.like([(0, s.size)], s.size) for s in (self.out, self.into))
                before = (Passage(rows, rows, columns, columns, columns),)
            passages = []
            for passage in before:
                columns = passage.columns.meet(some)
                inputs = columns.within(some)
                if len(columns):
                    passages.append(replace(passage, columns=columns, inputs=inputs, inner=inputs))
            into = merge_runs(run for passage in passages for run in passage.columns.runs)
            self._reading[some.runs] = replace(
                self, passages=tuple(passages), into=self.into.like(into, self.into.size)
            )
        return self._reading[some.runs]


@dataclass(frozen=True)
class Piece:
    """A part of the weight that is a convolution of its own.

    Attributes:
        rows: Rows of the weight, which are also channels of the output (of the input, where the
            convolution is transposed).
        columns: Columns of the weight.
        channels: Channels of the other side that these columns stand for, in all its groups.
        groups: Groups with equally many of the rows.
    """

    rows: tuple[Run, ...]
    columns: tuple[Run, ...]
    channels: tuple[Run, ...]
    groups: int


def make_plan(layer: Convolution, rests: Mapping[str, Rest]) -> ConvPlan | None:
    """Return the plan of a convolution of which something rests.

    None where a slice cuts through a kernel: channels are the finest that can be left out.
    """
    weight, bias = layer.weight, layer.bias
    weight_rest, bias_rest = rests.get("weight"), rests.get("bias")
    trains = _pieces(layer, training_blocks(weight, weight_rest))
    passes = _pieces(layer, passing_blocks(weight, weight_rest))
    if trains is None or passes is None:
        return None
    device = weight.device

    def select(runs: Iterable[Run], size: int) -> Selection:
        return Selection(merge_runs(runs), size, device)

    def output(piece: Piece) -> tuple[Run, ...]:
        return piece.channels if layer.transposed else piece.rows

    def input(piece: Piece) -> tuple[Run, ...]:
        return piece.rows if layer.transposed else piece.channels

    n_out, n_in = layer.out_channels, layer.in_channels
    n_rows, n_columns = weight.shape[:2]
    passing = passing_entries(bias, bias_rest)
    out = select([*passing, *(run for piece in passes for run in output(piece))], n_out)
    into = select((run for piece in passes for run in input(piece)), n_in)
    kept = select((run for piece in trains for run in input(piece)), n_in)
    terms = tuple(
        Term(
            select(output(piece), n_out).within(out),
            select(input(piece), n_in).within(kept),
            select(piece.rows, n_rows),
            select(piece.columns, n_columns),
            piece.groups,
        )
        for piece in trains
    )
    passages = tuple(
        Passage(
            select(output(piece), n_out).within(out),
            select(piece.rows, n_rows),
            select(piece.columns, n_columns),
            select(input(piece), n_in),
            select(input(piece), n_in).within(into),
            piece.groups,
        )
        for piece in passes
    )
    entries = select(training_entries(bias, bias_rest), n_out)
    padding, pad, pad_mode = _padding(layer)
    return ConvPlan(
        terms=terms,
        kept=kept,
        bias=entries.within(out),
        bias_entries=entries,
        weight_rest=weight_rest,
        bias_rest=bias_rest,
        out=out,
        into=into,
        passages=None if weight_rest is None or weight_rest.passes else passages,
        stride=layer.stride,
        padding=padding,
        dilation=layer.dilation,
        groups=layer.groups,
        transposed=layer.transposed,
        pad=pad,
        pad_mode=pad_mode,
        apart=weight_rest is None or weight_rest.apart,
    )


def _pieces(layer: Convolution, blocks: Iterable[Block]) -> list[Piece] | None:
    """Return the convolutions that blocks of the weight make up, None if one cuts a kernel.

    Groups with equally many rows of a block make one grouped convolution together.
    """
    weight = layer.weight
    taps, width, height = weight[0, 0].numel(), weight.shape[1], len(weight) // layer.groups
    pieces = []
    for block in blocks:
        if any(edge % taps for run in block.columns for edge in run):
            return None
        columns = tuple((a // taps, b // taps) for a, b in block.columns)
        for groups, rows in _alike(block.rows, height):
            channels = merge_runs(
                (g * width + a, g * width + b) for g in groups for a, b in columns
            )
            pieces.append(Piece(merge_runs(rows), columns, channels, len(groups)))
    return pieces


def _alike(rows: Iterable[Run], height: int) -> Iterable[tuple[list[int], list[Run]]]:
    """Yield the groups that have equally many of some rows, with these rows."""
    by_group: dict[int, list[Run]] = {}
    for start, stop in rows:
        while start < stop:
            group = start // height
            end = min(stop, (group + 1) * height)
            by_group.setdefault(group, []).append((start, end))
            start = end
    by_count: dict[int, list[int]] = {}
    for group, runs in sorted(by_group.items()):
        by_count.setdefault(sum(b - a for a, b in runs), []).append(group)
    for groups in by_count.values():
        yield groups, [run for group in groups for run in by_group[group]]


def _padding(layer: Convolution) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Return (zeros on both sides, what ``F.pad`` adds before, its mode)."""
    none = (0,) * len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        return none, tuple(layer._reversed_padding_repeated_twice), layer.padding_mode
    if layer.padding == "valid":
        return none, (), "constant"
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        uneven = [value for t in reversed(total) for value in (0, t % 2)]
        return tuple(t // 2 for t in total), tuple(uneven) if any(uneven) else (), "constant"
    return cast("tuple[int, ...]", layer.padding), (), "constant"
