r"""The fused operation on its own: from captured tensors to the spectra of all units.

Give it, for every parameter, what its layer took in (:math:`A_i`) and the gradient of what it gave
out (:math:`B_i`), and a plan that says who owns what; it returns all eigenvalues of

.. math:: \Theta_u = \sum_{i, k:\,unit_k = u} V_{ik} V_{ik}^\top,

with :math:`V_{ik}` unit u's part of parameter i's per-sample gradients, read once and never held as
a whole. The probe uses the same operation in installments (:mod:`~lightning_mat.mntk.accumulate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mat.mntk import ops
from lightning_mat.mntk.accumulate import (
    Accumulator,
    Slots,
    Solved,
    check_workspace,
    fused_layer,
)
from lightning_mat.mntk.factors import (
    KINDS,
    Convolution,
    Dense,
    Factor,
    Geometry,
    Outer,
    Rows,
    Scaled,
    Summed,
)
from lightning_mat.mntk.quiet import PRECISIONS
from lightning_mat.mntk.words import WAYS, Words, piece_table, plan_words
from lightning_mat.units.unit import Rect

# Grams that are few enough to be kept apart until the end, in bytes.
_FEW_GRAMS = 64 << 20

__all__ = ["Geometry", "Layer", "Plan", "Solved", "mntk_spectra", "mntk_spectra_reference"]


@dataclass(frozen=True)
class Layer:
    r"""One parameter of a plan: how its two tensors make its gradient, and who owns it.

    ========== ================================== ===================================
    kind       a                                  b
    ========== ================================== ===================================
    linear     inputs [S, T, columns]             output gradients [S, T, rows]
    conv       inputs [S, (T,) C, \*size]         output gradients [S, (T,) rows, \*out]
    bias       empty                              output gradients [S, T, rows]
    scale      normalised inputs [S, T, rows]     output gradients [S, T, rows]
    embedding  int64 rows of the table [S, T]     output gradients [S, T, columns]
    dense      empty                              the gradients [S, rows, columns]
    ========== ================================== ===================================

    Everything is samples first and channels last, but for convolutions, whose positions come last:
    their bias takes ``b.flatten(2).mT``. A token of an embedding that trains no row (padding) has
    row -1.

    Args:
        kind: One of these.
        rows: Rows of the parameter seen as a matrix.
        columns: Its columns.
        owned: ``(unit, rectangle)`` pairs, disjoint.
        geometry: Of a convolution.
        way: ``"staged"``, ``"chip"``, ``"ghost"``, or ``"auto"`` for the one that is counted to be
            cheapest. A way that the layer or the device cannot go is staged.

    Raises:
        ValueError: If the kind, the way or a rectangle is none, or a convolution has no geometry.
    """

    kind: str
    rows: int
    columns: int
    owned: Sequence[tuple[int, Rect]]
    geometry: Geometry | None = None
    way: str = "auto"

    def __post_init__(self) -> None:
        """Check what can be checked without tensors."""
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.way not in ("auto", *WAYS):
            raise ValueError(f"way must be one of auto, {', '.join(WAYS)}, got {self.way!r}")
        if (self.kind == "conv") != (self.geometry is not None):
            raise ValueError(
                f"a layer of kind {self.kind!r} has geometry {self.geometry}: a convolution needs "
                "Geometry(kernel, stride, dilation, padding, groups), others need none"
            )
        if self.geometry is not None:
            _check_geometry(self.geometry, self.rows)
        if any(len(entry) != 2 or len(entry[1]) != 4 for entry in self.owned):
            raise ValueError("owned must be a sequence of (unit, Rect(r0, r1, c0, c1)) pairs")
        for unit, (r0, r1, c0, c1) in self.owned:
            if not (0 <= r0 <= r1 <= self.rows and 0 <= c0 <= c1 <= self.columns and unit >= 0):
                raise ValueError(
                    f"unit {unit} owns rows [{r0}, {r1}) and columns [{c0}, {c1}) of a parameter "
                    f"of {self.rows} rows and {self.columns} columns"
                )
        shared = _overlap(self.pieces)
        if shared is not None:
            raise ValueError(
                f"the rectangles of a layer must be disjoint: element {shared} is owned twice"
            )

    @cached_property
    def pieces(self) -> Words:
        """Rows ``(unit, r0, r1, c0, c1)``, sorted by unit."""
        return piece_table(self.owned)

    def shapes(self, a: Tensor) -> tuple[tuple[int | None, ...] | None, tuple[int | None, ...]]:
        """Return the shapes of a and b without the samples: None for any size, or for no a."""
        if self.geometry is not None:
            size = (None,) * len(self.geometry.kernel)
            frames = (None,) if a.dim() == len(size) + 3 else ()
            channels = self.columns // prod(self.geometry.kernel) * self.geometry.groups
            return (*frames, channels, *size), (*frames, self.rows, *size)
        return {
            "linear": ((None, self.columns), (None, self.rows)),
            "bias": (None, (None, self.rows)),
            "scale": ((None, self.rows), (None, self.rows)),
            "embedding": ((None,), (None, self.columns)),
            "dense": (None, (self.rows, self.columns)),
        }[self.kind]

    def factor(self, a: Tensor, b: Tensor) -> Factor:
        """Return the per-sample gradients that its tensors make."""
        if self.kind == "linear":
            return Outer(a, b)
        if self.kind == "bias":
            return Summed(b)
        if self.kind == "scale":
            return Scaled(a, b)
        if self.kind == "embedding":
            return Rows(a, b, self.rows)
        if self.kind == "dense":
            return Dense(b)
        assert self.geometry is not None
        if a.dim() == len(self.geometry.kernel) + 2:
            a, b = a.unsqueeze(1), b.unsqueeze(1)
        return Convolution(self.geometry, a, b)


def _overlap(pieces: Words) -> tuple[int, int] | None:
    """Return an element that two rectangles share, or None."""
    pieces = pieces[(pieces[:, 1] < pieces[:, 2]) & (pieces[:, 3] < pieces[:, 4])]
    rows, r = np.unique(pieces[:, 1:3], return_inverse=True)
    columns, c = np.unique(pieces[:, 3:5], return_inverse=True)
    r, c = r.reshape(-1, 2), c.reshape(-1, 2)
    # how often each cell between neighbouring bounds is owned: sums of +1 and -1 at the corners
    count = np.zeros((len(rows) + 1, len(columns) + 1), dtype=np.int32)
    for i, j, sign in ((0, 0, 1), (0, 1, -1), (1, 0, -1), (1, 1, 1)):
        np.add.at(count, (r[:, i], c[:, j]), sign)
    twice = np.argwhere(count.cumsum(0).cumsum(1) > 1)
    return (int(rows[twice[0, 0]]), int(columns[twice[0, 1]])) if len(twice) else None


def _check_geometry(geometry: Geometry, rows: int) -> None:
    kernel, stride, dilation, padding, groups = geometry
    if not all(isinstance(sizes, tuple | list) for sizes in geometry[:4]):
        raise ValueError(f"kernel, stride, dilation and padding must be tuples, got {geometry}")
    sizes = {len(kernel), len(stride), len(dilation), len(padding)}
    if len(sizes) > 1 or len(kernel) not in (1, 2, 3):
        raise ValueError(
            f"kernel, stride, dilation and padding need one entry for each of one to three "
            f"dimensions, got {geometry}"
        )
    if min(*kernel, *stride, *dilation, groups) < 1 or min(padding) < 0 or rows % groups:
        raise ValueError(
            f"kernel, stride, dilation and groups must be positive, padding at least 0, and the "
            f"{rows} rows a multiple of the groups, got {geometry}"
        )


@dataclass(frozen=True)
class Plan:
    """Who owns what of all layers.

    Args:
        units: L. One that owns nothing has zero eigenvalues.
        layers: One for every pair of tensors, in the order in which Grams are summed.

    Raises:
        ValueError: If a layer names a unit that there is not.
    """

    units: int
    layers: Sequence[Layer]

    def __post_init__(self) -> None:
        """Check the units."""
        if self.units < 0:
            raise ValueError(f"units must not be negative, got {self.units}")
        for k, layer in enumerate(self.layers):
            if len(layer.pieces) and layer.pieces[-1, 0] >= self.units:
                raise ValueError(
                    f"layer {k} gives a piece to unit {layer.pieces[-1, 0]}, but the plan has "
                    f"{self.units} units"
                )

    def remaining(self) -> Words:
        """Return how many layers own a part of each unit, ``[L]``."""
        counts = np.zeros(self.units, dtype=np.int64)
        for layer in self.layers:
            counts[np.unique(layer.pieces[:, 0])] += 1
        return counts


def mntk_spectra(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    plan: Plan,
    *,
    precision: str = "float32",
    workspace: int | None = None,
    keep_gram: bool = False,
    backend: str = "auto",
) -> Solved:
    r"""Return the spectra of all units from what a backward pass captured.

    Args:
        a: What each layer took in, see :class:`Layer`. Any strides; float64, float32, bfloat16 or
            float16; one device.
        b: The gradients of what each layer gave out, S samples first.
        plan: Who owns what.
        precision: Of products: ``"float32"`` (relative error of :math:`\lambda_{max}` ≤ 1e-5),
            ``"tf32"`` or ``"bf16"`` (≤ 1e-2). A CPU always computes in float32. Where all tensors
            are float64 everything is.
        workspace: Bytes of gradients that are formed at a time; by default what a cache holds.
        keep_gram: Return the Grams, too.
        backend: ``"auto"``, ``"extension"`` or ``"eager"`` (the float64 reference).

    Raises:
        ValueError: If a tensor does not fit its layer, or an argument is out of range.
        RuntimeError: If ``backend="extension"`` and it cannot be used on the device.

    Source:
        Shi et al. (NeurIPS 2023), definition 1.

    Example:
        >>> layer = Layer("linear", 1, 2, [(0, Rect(0, 1, 0, 1)), (1, Rect(0, 1, 1, 2))])
        >>> a = torch.tensor([[[1.0, 2.0]], [[0.0, 3.0]]])  # 2 samples of 1 token
        >>> b = torch.ones(2, 1, 1)
        >>> mntk_spectra([a], [b], Plan(2, [layer])).eigenvalues[:, 0].round(decimals=5).tolist()
        [1.0, 13.0]
    """
    samples, device = _check(a, b, plan, precision)
    workspace = check_workspace(workspace, device)
    if not ops.use_extension(device, backend):
        return mntk_spectra_reference(a, b, plan, workspace=workspace, keep_gram=keep_gram)
    itemsize = 8 if all(t.dtype == torch.float64 for t in b) else 4
    # A place that is used again splits a launch: on a GPU only where Grams would take much memory.
    all_grams = plan.units * samples**2 * itemsize
    slots = Slots(
        plan.remaining(), keep_gram or (device.type == "cuda" and all_grams <= _FEW_GRAMS)
    )
    layers: list[Words] = []
    left: list[Tensor] = []
    right: list[Tensor] = []
    for layer, a_i, b_i in zip(plan.layers, a, b, strict=True):
        units, owner = np.unique(layer.pieces[:, 0], return_inverse=True)
        targets = slots.take(units)
        sources = layer.factor(a_i, b_i).sources()
        assert sources is not None
        words, more_a, more_b = fused_layer(
            (layer.rows, layer.columns),
            sources,
            targets,
            np.concatenate([owner[:, None], layer.pieces[:, 1:]], 1),
            layer.way,
            samples=samples,
            workspace=workspace,
            itemsize=itemsize,
            first_index=len(left),
        )
        slots.release(units)
        layers.append(words)
        left += more_a
        right += more_b
    with allowed_tf32(precision, device):
        eigenvalues, grams = torch.ops.lightning_mat.mntk_spectra(
            left,
            right,
            plan_words(layers),
            plan.units,
            samples,
            slots.count,
            precision,
            workspace,
            keep_gram,
        )
    return Solved(eigenvalues, grams if keep_gram else None)


def mntk_spectra_reference(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    plan: Plan,
    *,
    precision: str = "float32",
    workspace: int | None = None,
    keep_gram: bool = False,
) -> Solved:
    """Return what :func:`mntk_spectra` does: eager, in float64, a block of rows at a time."""
    samples, device = _check(a, b, plan, precision)
    accumulator = Accumulator(
        plan.remaining(),
        samples,
        device=device,
        dtype=torch.float64,
        workspace=workspace,
        keep_gram=keep_gram,
        backend="eager",
    )
    for layer, a_i, b_i in zip(plan.layers, a, b, strict=True):
        index = a_i.detach().to(accumulator.grams.device)
        wide = index if layer.kind == "embedding" else ops.widen(a_i)
        accumulator.add(layer.factor(wide, ops.widen(b_i)), layer.pieces)
    return accumulator.finish()


@contextmanager
def allowed_tf32(precision: str, device: torch.device) -> Iterator[None]:
    """Let a GPU's library use TF32 within the block, if it is asked for."""
    if precision != "tf32" or device.type != "cuda":
        yield
        return
    setting: Any = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _check(
    a: Sequence[Tensor], b: Sequence[Tensor], plan: Plan, precision: str
) -> tuple[int, torch.device]:
    """Return the number of samples and the device."""
    for name, tensors in (("a", a), ("b", b)):
        listed = isinstance(tensors, list | tuple)
        if not listed or not all(isinstance(t, Tensor) for t in tensors):
            raise ValueError(
                f"{name} must be a list of tensors, one for each layer of the plan, got "
                f"{type(tensors).__name__}"
            )
    if not len(a) == len(b) == len(plan.layers):
        raise ValueError(
            f"a plan of {len(plan.layers)} layers needs as many a and b, got {len(a)} and {len(b)}"
        )
    if not plan.layers:
        raise ValueError("the plan has no layers: there is nothing to measure")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    samples, device = (b[0].shape[0] if b[0].dim() else 0), b[0].device
    if samples < 1:
        raise ValueError("there are no samples: an mNTK needs at least one, a probe two")
    for k, (layer, a_k, b_k) in enumerate(zip(plan.layers, a, b, strict=True)):
        wanted_a, wanted_b = layer.shapes(a_k)
        if not (
            _fits(b_k, wanted_b, samples) and (wanted_a is None or _fits(a_k, wanted_a, samples))
        ):
            raise ValueError(
                f"layer {k} is {layer.kind} with {layer.rows} rows and {layer.columns} columns and "
                f"takes a {_text(wanted_a, samples)} and b {_text(wanted_b, samples)}, got "
                f"{tuple(a_k.shape)} and {tuple(b_k.shape)}"
            )
        if b_k.device != device or (wanted_a is not None and a_k.device != device):
            raise ValueError(f"the tensors of layer {k} are not on {device}, where b[0] is")
    return samples, device


def _fits(tensor: Tensor, wanted: tuple[int | None, ...], samples: int) -> bool:
    """Return whether a shape is [samples, *wanted], None standing for any size."""
    if tensor.dim() != len(wanted) + 1 or tensor.shape[0] != samples:
        return False
    return all(w in (None, size) for w, size in zip(wanted, tensor.shape[1:], strict=True))


def _text(wanted: tuple[int | None, ...] | None, samples: int) -> str:
    if wanted is None:
        return "(unused)"
    return "[" + ", ".join(["·" if w is None else str(w) for w in (samples, *wanted)]) + "]"
