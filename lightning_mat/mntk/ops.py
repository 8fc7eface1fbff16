r"""The extension's operations on Grams, each beside its float64 reference of the same signature.

For a unit u with per-sample gradients :math:`J_u` (S rows), the Gram is the unit's mNTK

.. math:: \Theta_u = J_u J_u^\top = \sum_k V_k V_k^\top,

where the :math:`V_k` are the parts of :math:`J_u` that one chunk of one parameter holds. The
operations accumulate all units' parts, and return all units' eigenvalues, at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_mat import _extension
from lightning_mat.mntk.cost import ghost_multiply_adds
from lightning_mat.mntk.factors import KINDS, Source
from lightning_mat.mntk.words import read_words

BACKENDS = ("auto", "extension", "eager")


def gram_accumulate(grams: Tensor, grad: Tensor, pieces: Tensor, *, backend: str = "auto") -> None:
    r"""Add the outer products of a chunk's per-sample gradients to the Grams that own them.

    .. math:: \Theta_u \mathrel{+}= \sum_{k:\,unit_k = u} V_k V_k^\top, \qquad
        V_k = grad[:, r_0:r_1, c_0:c_1]\ \text{as}\ [S, (r_1 - r_0)(c_1 - c_0)]

    The products are formed and summed in the type of ``grams``, in an order that depends on the
    shapes alone, so that two runs give the same bits.

    Args:
        grams: ``[L, S, S]``, float32 or float64, symmetric, contiguous; modified in place.
        grad: ``[S, R, C]``, float64, float32, bfloat16 or float16, any strides, same device.
        pieces: int64 ``[N, 5]`` on the CPU: rows ``(unit, r0, r1, c0, c1)`` in the coordinates of
            ``grad``, sorted by unit. They should be disjoint: what two pieces share counts twice.
        backend: ``"extension"``, ``"eager"`` (the reference), or ``"auto"``: the extension where
            it has kernels for the device, else the reference.

    Raises:
        ValueError: If a shape, type, device or piece does not fit.
        RuntimeError: If ``backend="extension"`` and it cannot be used on the device.

    Source:
        MAT paper, definition 1.

    Example:
        >>> grams = torch.zeros(2, 2, 2)
        >>> grad = torch.tensor([[[1.0, 2.0]], [[0.0, 3.0]]])  # 2 samples, 1 row, 2 columns
        >>> gram_accumulate(grams, grad, torch.tensor([[0, 0, 1, 0, 1], [1, 0, 1, 1, 2]]))
        >>> grams.tolist()
        [[[1.0, 0.0], [0.0, 0.0]], [[4.0, 6.0], [6.0, 9.0]]]
    """
    if use_extension(grams.device, backend):
        torch.ops.lightning_mat.gram_accumulate_(grams.detach(), grad.detach(), pieces)
    else:
        gram_accumulate_reference(grams, grad, pieces)


def gram_eigenvalues(grams: Tensor, *, backend: str = "auto") -> Tensor:
    r"""Return all eigenvalues of each Gram, descending.

    The extension runs Lanczos with full reorthogonalisation in float64; errors are a small
    multiple of :math:`S\,2^{-53}\lambda_{max}`. An eigenvalue that is zero in exact arithmetic can
    therefore be slightly negative.

    Args:
        grams: ``[L, S, S]``, float32 or float64, symmetric up to rounding (the mean of it and its
            transpose is taken).
        backend: See :func:`gram_accumulate`.

    Returns:
        ``[L, S]`` float64; NaN for a Gram with an entry that is not finite, and for it alone.

    Raises:
        ValueError: If the shape or the type does not fit.
        RuntimeError: If ``backend="extension"`` and it cannot be used on the device.

    Example:
        >>> gram_eigenvalues(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])).round(decimals=6).tolist()
        [[3.0, 1.0]]
    """
    if use_extension(grams.device, backend):
        result: Tensor = torch.ops.lightning_mat.gram_eigenvalues(grams.detach())
        return result
    return gram_eigenvalues_reference(grams)


def gram_extremes(grams: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    r"""Return the largest and the smallest eigenvalue of each Gram.

    Both are those of :func:`gram_eigenvalues`, without the eigenvalues between them.

    Args:
        grams: As in :func:`gram_eigenvalues`, with at least one sample.
        backend: See :func:`gram_accumulate`.

    Returns:
        ``(λ_max, λ_min)``, each ``[L]`` float64; NaN for a Gram with an entry that is not finite.

    Raises:
        ValueError: If the shape or the type does not fit.
        RuntimeError: If ``backend="extension"`` and it cannot be used on the device.

    Example:
        >>> largest, smallest = gram_extremes(torch.eye(3).expand(2, 3, 3) * 4)
        >>> largest.round(decimals=9).tolist(), smallest.round(decimals=9).tolist()
        ([4.0, 4.0], [4.0, 4.0])
    """
    if use_extension(grams.device, backend):
        largest, smallest = torch.ops.lightning_mat.gram_extremes(grams.detach())
        return largest, smallest
    return gram_extremes_reference(grams)


def gram_accumulate_reference(grams: Tensor, grad: Tensor, pieces: Tensor) -> None:
    """Accumulate as :func:`gram_accumulate` does: eager, in float64, one piece after another."""
    _check_grams(grams)
    if grad.dim() != 3 or grad.shape[0] != grams.shape[1] or grad.device != grams.device:
        raise ValueError(
            f"grad must be [samples, rows, columns] with the {grams.shape[1]} samples of grams on "
            f"{grams.device}, got shape {tuple(grad.shape)} on {grad.device}"
        )
    if pieces.dim() != 2 or pieces.shape[1] != 5 or pieces.dtype != torch.int64:
        raise ValueError(
            "pieces must be an int64 tensor [pieces, 5] with the columns (unit, r0, r1, c0, c1), "
            f"got shape {tuple(pieces.shape)} of type {pieces.dtype}"
        )
    rows, columns = grad.shape[1:]
    wide = widen(grad)
    sums = widen(grams)
    for k, (unit, r0, r1, c0, c1) in enumerate(pieces.tolist()):
        fits = 0 <= r0 <= r1 <= rows and 0 <= c0 <= c1 <= columns
        if not (fits and 0 <= unit < grams.shape[0]):
            raise ValueError(
                f"pieces[{k}] = {(unit, r0, r1, c0, c1)} does not fit {grams.shape[0]} units and "
                f"a gradient of {rows} rows and {columns} columns"
            )
        part = wide[:, r0:r1, c0:c1].flatten(1)
        sums[unit] += part @ part.T
    grams.detach().copy_(sums)


def gram_eigenvalues_reference(grams: Tensor) -> Tensor:
    """Return what :func:`gram_eigenvalues` does, by LAPACK's dense solver in float64."""
    _check_grams(grams)
    wide = widen(grams)
    finite = wide.isfinite().all(-1).all(-1)
    wide = torch.where(finite[:, None, None], wide, 0.0)
    # Halves first, so that the sum of two huge entries stays finite.
    eigenvalues = torch.linalg.eigvalsh(0.5 * wide + 0.5 * wide.mT).flip(-1)
    return torch.where(finite[:, None], eigenvalues, torch.nan).to(grams.device)


def gram_extremes_reference(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :func:`gram_extremes` does, by LAPACK's dense solver in float64."""
    eigenvalues = gram_eigenvalues_reference(grams)
    if eigenvalues.shape[1] == 0:
        raise ValueError(
            f"grams of shape {tuple(grams.shape)} have no eigenvalues: measure at least one sample"
        )
    return eigenvalues[:, 0].clone(), eigenvalues[:, -1].clone()


def backend_in_use(device: torch.device | str) -> tuple[str, str]:
    """Return what ``backend="auto"`` uses on a device, and why.

    Example:
        >>> backend_in_use("meta")[0]
        'eager'
    """
    kind = torch.device(device).type
    extension = _extension.load()
    if extension.error:
        return "eager", extension.error
    if kind in extension.backends:
        return "extension", f"compiled for {kind} against torch {extension.info['torch']}"
    return "eager", f"no kernels for {kind} were compiled: {extension.info['reason']}"


def use_extension(device: torch.device, backend: str) -> bool:
    """Return whether the extension computes on a device, if the backend asked for lets it.

    Raises:
        ValueError: If the backend is none.
        RuntimeError: If the extension is asked for and cannot be used on the device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "eager":
        return False
    name, why = backend_in_use(device)
    if name == "extension":
        return True
    if backend == "extension":
        raise RuntimeError(
            f"backend='extension' cannot run on {device}: {why}; {_extension.REMEDY}, or pass "
            "backend='auto'"
        )
    _warn_once(why)
    return False


_warned: set[str] = set()


def _warn_once(why: str) -> None:
    if why not in _warned:
        _warned.add(why)
        warnings.warn(
            f"lightning_mat measures with the slower eager reference: {why}. "
            "`lightning-mat doctor` says how to fix it.",
            RuntimeWarning,
            stacklevel=4,
        )


def _check_grams(grams: Tensor) -> None:
    if grams.dim() != 3 or grams.shape[1] != grams.shape[2]:
        raise ValueError(f"grams must be [units, samples, samples], got shape {tuple(grams.shape)}")
    if grams.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"grams has type {grams.dtype}: Grams are float32 or float64, whatever the gradients"
        )


def widen(values: Tensor) -> Tensor:
    """Return a float64 copy, on the CPU where the device has no float64 (MPS)."""
    device = "cpu" if values.device.type == "mps" else values.device
    return values.detach().to(device=device, dtype=torch.float64, copy=True)


def _fake_accumulate(grams: Tensor, grad: Tensor, pieces: Tensor) -> None:
    """Modify nothing that a shape could show."""


def _fake_eigenvalues(grams: Tensor) -> Tensor:
    return grams.new_empty(grams.shape[:2], dtype=torch.float64)


def _fake_extremes(grams: Tensor) -> tuple[Tensor, Tensor]:
    shape = grams.shape[:1]
    return (
        grams.new_empty(shape, dtype=torch.float64),
        grams.new_empty(shape, dtype=torch.float64),
    )


def _fake_spectra(
    a: list[Tensor],
    b: list[Tensor],
    plan: Tensor,
    units: int,
    samples: int,
    slots: int,
    precision: str,
    workspace: int,
    keep_grams: bool,
) -> tuple[Tensor, Tensor]:
    wide = all(t.dtype == torch.float64 for t in b)
    dtype = torch.float64 if wide else torch.float32
    count = slots if keep_grams else 0
    return (
        b[0].new_empty(units, samples, dtype=torch.float64),
        b[0].new_empty(count, samples, samples, dtype=dtype),
    )


def _fake_installment(
    grams: Tensor,
    eigenvalues: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    plan: Tensor,
    precision: str,
    workspace: int,
) -> None:
    """Modify nothing that a shape could show."""


def _accumulate_flops(grams: Tensor, grad: Tensor, pieces: Tensor, **_: object) -> int:
    """2 S² operations per element of a piece: what runs, on either device."""
    corners: list[list[int]] = pieces.tolist()
    elements = sum((r1 - r0) * (c1 - c0) for _, r0, r1, c0, c1 in corners)
    return 2 * int(grams.shape[1]) ** 2 * elements


def _pass_flops(samples: int, a: Sequence[Tensor], b: Sequence[Tensor], plan: Tensor) -> int:
    """What the ways of a plan's layers cost (:mod:`~lightning_mat.mntk.cost`), and the solves."""
    total = 0.0
    for layer in read_words(plan):
        heights, widths = (
            layer.pieces[:, 2] - layer.pieces[:, 1],
            layer.pieces[:, 4] - layer.pieces[:, 3],
        )
        elements = int((heights * widths).sum())
        summed = [
            (int(n), Source(KINDS[kind], a[index], b[index], geometry=None), int(np.prod(kernel)))
            for kind, index, _, _, n, _, _, _, *kernel in layer.sources[:, :11].tolist()
        ]
        summed = [entry for entry in summed if entry[1].kind in ("linear", "conv")]
        if layer.way == "ghost" and summed:
            _, source, kernel = max(summed, key=lambda entry: entry[1].tokens)
            positions = source.positions if source.kind == "conv" else None
            inputs = layer.columns // kernel
            rows = int(heights.sum())
            total += ghost_multiply_adds(samples, source.tokens, rows, inputs, positions)
        else:
            total += sum(n * source.tokens * elements for n, source, _ in summed)
            total += samples**2 * elements
        total += 2 * int((layer.targets[:, 2] >= 0).sum()) * samples**3
    return int(2 * total)


def _spectra_flops(
    a: Sequence[Tensor], b: Sequence[Tensor], plan: Tensor, *rest: int, **_: object
) -> int:
    return _pass_flops(rest[1], a, b, plan)


def _installment_flops(
    grams: Tensor,
    values: object,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    plan: Tensor,
    *_: object,
    **__: object,
) -> int:
    return _pass_flops(grams.shape[1], a, b, plan)


def _spectrum_flops(grams: Sequence[int], **_: object) -> int:
    """Leading terms of S Lanczos steps.

    S products of the Gram with a vector (2 S³), and step k's vector made orthogonal to k others
    (2 S³ in all, as long as once is enough).
    """
    units, samples, _samples = grams
    return 4 * units * samples**3


def _register() -> None:
    """Tell torch the operations' shapes (for tracing) and costs (for counting)."""
    ops = torch.ops.lightning_mat
    torch.library.register_fake("lightning_mat::gram_accumulate_", _fake_accumulate)
    torch.library.register_fake("lightning_mat::gram_eigenvalues", _fake_eigenvalues)
    torch.library.register_fake("lightning_mat::gram_extremes", _fake_extremes)
    torch.library.register_fake("lightning_mat::mntk_spectra", _fake_spectra)
    torch.library.register_fake("lightning_mat::mntk_accumulate_", _fake_installment)
    register_flop_formula(ops.mntk_spectra, get_raw=True)(_spectra_flops)
    register_flop_formula(ops.mntk_accumulate_, get_raw=True)(_installment_flops)
    register_flop_formula(ops.gram_accumulate_, get_raw=True)(_accumulate_flops)
    register_flop_formula([ops.gram_eigenvalues, ops.gram_extremes])(_spectrum_flops)


if not _extension.load().error:
    _register()
