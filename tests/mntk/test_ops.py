"""Gram accumulation and eigenvalues: extension and eager reference against NumPy and each other."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_mat import _extension
from lightning_mat.mntk import ops

EXTENSION = _extension.load()
needs_extension = pytest.mark.skipif(bool(EXTENSION.error), reason=EXTENSION.error)
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif("cuda" not in EXTENSION.backends, reason="not compiled for CUDA"),
]
# (device, backend): each must agree with NumPy.
PLACES = [
    pytest.param("cpu", "eager", id="cpu-eager"),
    pytest.param("cpu", "extension", id="cpu-extension", marks=needs_extension),
    pytest.param("cuda", "eager", id="cuda-eager", marks=needs_gpu),
    pytest.param("cuda", "extension", id="cuda-extension", marks=needs_gpu),
]
places = pytest.mark.parametrize(("device", "backend"), PLACES)

# name -> (rows, columns, units, pieces in the chunk's coordinates)
LAYOUTS: dict[str, tuple[int, int, int, list[tuple[int, int, int, int, int]]]] = {
    "whole": (5, 7, 1, [(0, 0, 5, 0, 7)]),
    "rows": (9, 7, 3, [(0, 0, 3, 0, 7), (1, 3, 6, 0, 7), (2, 6, 9, 0, 7)]),
    "uneven rows": (9, 7, 3, [(0, 0, 1, 0, 7), (1, 1, 6, 0, 7), (2, 6, 9, 0, 7)]),
    "columns": (5, 9, 3, [(0, 0, 5, 0, 3), (1, 0, 5, 3, 6), (2, 0, 5, 6, 9)]),
    "single columns": (5, 3, 3, [(u, 0, 5, u, u + 1) for u in range(3)]),
    "filters": (33, 27, 33, [(u, u, u + 1, 0, 27) for u in range(33)]),
    "every second filter": (9, 3, 12, [(2 * u + 1, 2 * u, 2 * u + 1, 0, 3) for u in range(5)]),
    "biases": (33, 1, 33, [(u, u, u + 1, 0, 1) for u in range(33)]),
    "reversed": (9, 7, 3, [(0, 6, 9, 0, 7), (1, 3, 6, 0, 7), (2, 0, 3, 0, 7)]),
    "several per unit": (
        9,
        7,
        4,
        [(1, 0, 2, 0, 7), (1, 4, 6, 0, 3), (1, 8, 9, 6, 7), (3, 2, 4, 1, 6), (3, 5, 8, 4, 5)],
    ),
    "overlapping steps": (6, 8, 2, [(0, 0, 4, 0, 4), (1, 2, 6, 4, 8)]),
    "empty pieces": (5, 7, 2, [(0, 2, 2, 0, 7), (0, 0, 1, 3, 3), (1, 0, 5, 0, 7)]),
    "no pieces": (5, 7, 2, []),
    "no rows": (0, 7, 1, [(0, 0, 0, 0, 7)]),
    "no columns": (5, 0, 1, [(0, 0, 5, 0, 0)]),
    "no units": (5, 7, 0, []),
}


def numpy_grams(grams: Tensor, grad: Tensor, pieces: Tensor) -> np.ndarray:
    """The definition, element by element of the Gram, in float64."""
    values = grad.cpu().double().numpy()
    result = grams.cpu().double().numpy().copy()
    for unit, r0, r1, c0, c1 in pieces.tolist():
        part = values[:, r0:r1, c0:c1]
        for i, j in itertools.product(range(len(values)), repeat=2):
            result[unit, i, j] += np.sum(part[i] * part[j])
    return result


def chunk(samples: int, layout: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    rows, columns, units, pieces = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(samples)
    grad = torch.randn(samples, rows, columns, generator=generator, dtype=torch.float64)
    grams = torch.randn(units, samples, samples, generator=generator)
    grams = grams + grams.mT
    return grams.to(device), grad.to(device, dtype), torch.tensor(pieces).long().reshape(-1, 5)


def assert_grams(found: Tensor, expected: np.ndarray, tolerance: float) -> None:
    scale = max(np.abs(expected).max(initial=0.0), 1e-300)
    np.testing.assert_allclose(
        found.cpu().double().numpy() / scale, expected / scale, atol=tolerance
    )


@places
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("samples", [2, 3])
def test_accumulate_adds_each_piece_to_its_unit(samples, layout, device, backend):
    grams, grad, pieces = chunk(samples, layout, torch.float32, device)
    expected = numpy_grams(grams, grad, pieces)
    ops.gram_accumulate(grams, grad, pieces, backend=backend)
    assert_grams(grams, expected, 1e-6)


@places
@pytest.mark.parametrize("samples", [1, 16, 17, 33, 63, 64, 65, 200])
def test_accumulate_takes_any_number_of_samples(samples, device, backend):
    grams, grad, pieces = chunk(samples, "several per unit", torch.float32, device)
    expected = grams.cpu().double()
    ops.gram_accumulate_reference(expected, grad.cpu().double(), pieces)
    ops.gram_accumulate(grams, grad, pieces, backend=backend)
    assert_grams(grams, expected.numpy(), 1e-6)


@places
@pytest.mark.parametrize("layout", ["several per unit", "columns", "filters"])
@pytest.mark.parametrize("gram_type", [torch.float32, torch.float64])
@pytest.mark.parametrize("grad_type", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_accumulate_computes_in_the_type_of_the_grams(
    grad_type, gram_type, layout, device, backend
):
    grams, grad, pieces = chunk(5, layout, grad_type, device)
    grams = grams.to(gram_type)
    expected = numpy_grams(grams, grad, pieces)
    ops.gram_accumulate(grams, grad, pieces, backend=backend)
    assert_grams(grams, expected, 1e-14 if gram_type == torch.float64 else 1e-6)


def strided(grad: Tensor, name: str) -> Tensor:
    """The same values in another layout in memory."""
    samples, rows, columns = grad.shape
    if name == "expanded":
        return grad[:, :1].expand(samples, rows, columns)
    if name == "padded":
        return torch.stack([grad, -grad], dim=-1)[..., 0]
    if name == "offset":
        return torch.cat([grad, grad], dim=2)[:, :, columns:]
    order = [int(c) for c in name]
    inverse = [order.index(d) for d in range(3)]
    return grad.permute(order).contiguous().permute(inverse)


@places
@pytest.mark.parametrize("layout", ["whole", "rows", "columns", "filters", "several per unit"])
@pytest.mark.parametrize(
    "strides", ["021", "102", "120", "201", "210", "expanded", "padded", "offset"]
)
def test_accumulate_reads_any_strides(strides, layout, device, backend):
    grams, grad, pieces = chunk(6, layout, torch.float32, device)
    view = strided(grad, strides)
    expected = numpy_grams(grams, view, pieces)
    ops.gram_accumulate(grams, view, pieces, backend=backend)
    assert_grams(grams, expected, 1e-6)


@needs_extension
@pytest.mark.parametrize(
    "piece", [(0, 0, 20, 0, 230), (0, 0, 1, 0, 2000), (0, 0, 1500, 3, 5)], ids=str
)
def test_accumulate_copies_in_bounded_parts(piece):
    """Half types and pieces with gaps are copied, and a large one in several parts."""
    samples = 1100  # 2 Mi elements per copy: fewer than 2000 of every sample's
    grad = torch.randn(1, piece[2], piece[4] + 1, dtype=torch.bfloat16).expand(samples, -1, -1)
    grams = torch.zeros(1, samples, samples)
    ops.gram_accumulate(grams, grad, torch.tensor([piece]), backend="extension")
    _, r0, r1, c0, c1 = piece
    expected = grad[0, r0:r1, c0:c1].double().square().sum().item()
    torch.testing.assert_close(grams, torch.full_like(grams, expected), rtol=1e-5, atol=0)


@needs_extension
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_accumulate_agrees_with_the_reference_on_random_partitions(data):
    samples = data.draw(st.integers(1, 9))
    row_cuts = sorted(data.draw(st.sets(st.integers(0, 12), min_size=2)))
    column_cuts = sorted(data.draw(st.sets(st.integers(0, 12), min_size=2)))
    cells = itertools.product(itertools.pairwise(row_cuts), itertools.pairwise(column_cuts))
    units = data.draw(st.integers(1, 4))
    pieces = sorted((data.draw(st.integers(0, units - 1)), *r, *c) for r, c in cells)
    grad = torch.randn(samples, 12, 12).permute(data.draw(st.permutations([0, 1, 2])))
    grad = grad[:12].movedim(int(np.argmin(grad.shape)), 0)
    expected = torch.zeros(units, samples, samples, dtype=torch.float64)
    grams = expected.float()
    ops.gram_accumulate_reference(expected, grad, torch.tensor(pieces))
    ops.gram_accumulate(grams, grad, torch.tensor(pieces), backend="extension")
    torch.testing.assert_close(grams.double(), expected, rtol=1e-4, atol=1e-4)


@places
def test_accumulate_gives_the_same_bits_every_time(device, backend):
    grad = torch.randn(64, 40, 130, device=device)
    pieces = torch.tensor([[u, 10 * u, 10 * u + 10, 0, 130] for u in range(4)])
    runs = [torch.zeros(4, 64, 64, device=device) for _ in range(3)]
    for grams in runs:
        ops.gram_accumulate(grams, grad, pieces, backend=backend)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@places
def test_accumulate_leaves_no_graph(device, backend):
    grams = torch.zeros(1, 3, 3, device=device)
    grad = torch.randn(3, 2, 2, device=device, requires_grad=True)
    ops.gram_accumulate(grams, grad, torch.tensor([[0, 0, 2, 0, 2]]), backend=backend)
    assert grams.grad_fn is None
    assert grams.count_nonzero() == 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_accumulate_names_both_devices_when_they_differ():
    with pytest.raises(ValueError, match="cuda"):
        ops.gram_accumulate(
            torch.zeros(1, 2, 2), torch.zeros(2, 1, 1, device="cuda"), torch.zeros(0, 5).long()
        )


@pytest.mark.parametrize("backend", ["eager", pytest.param("extension", marks=needs_extension)])
@pytest.mark.parametrize(
    ("grams", "grad", "pieces", "message"),
    [
        ((1, 2, 3), (2, 4, 4), [(0, 0, 1, 0, 1)], r"grams must be \[units, samples, samples\]"),
        ((1, 2, 2), (3, 4, 4), [(0, 0, 1, 0, 1)], "2 samples"),
        ((1, 2, 2), (2, 4), [(0, 0, 1, 0, 1)], r"grad must be \[samples, rows, columns\]"),
        ((1, 2, 2), (2, 4, 4), [(0, 0, 1, 0)], r"pieces must be"),
        ((1, 2, 2), (2, 4, 4), [(0, 0, 5, 0, 1)], r"pieces\[0\]"),
        ((1, 2, 2), (2, 4, 4), [(0, 0, 1, 3, 2)], r"pieces\[0\]"),
        ((1, 2, 2), (2, 4, 4), [(0, -1, 1, 0, 1)], r"pieces\[0\]"),
        ((1, 2, 2), (2, 4, 4), [(0, 0, 1, 0, 1), (1, 0, 1, 0, 1)], r"pieces\[1\]"),
        ((1, 2, 2), (2, 4, 4), [(-1, 0, 1, 0, 1)], r"pieces\[0\]"),
    ],
)
def test_accumulate_names_what_does_not_fit(grams, grad, pieces, message, backend):
    before = torch.ones(grams)
    with pytest.raises(ValueError, match=message):
        ops.gram_accumulate(before, torch.zeros(grad), torch.tensor(pieces), backend=backend)
    assert torch.equal(before, torch.ones(grams))


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grams": torch.zeros(1, 2, 2).half()}, "grams has type Half"),
        ({"grams": torch.zeros(2, 2, 2).movedim(2, 0)}, "contiguous"),
        ({"grad": torch.zeros(2, 4, 4).long()}, "grad has type Long"),
        ({"pieces": torch.zeros(1, 5)}, "int64"),
        ({"pieces": torch.tensor([[1, 0, 1, 0, 1], [0, 1, 2, 0, 1]])}, "sort the pieces by unit"),
    ],
    ids=["half grams", "strided grams", "integer grad", "float pieces", "unsorted pieces"],
)
def test_extension_says_what_it_needs(change, message):
    arguments = {
        "grams": torch.zeros(2, 2, 2),
        "grad": torch.zeros(2, 4, 4),
        "pieces": torch.tensor([[0, 0, 1, 0, 1]]),
    } | change
    with pytest.raises(ValueError, match=message):
        ops.gram_accumulate(**arguments, backend="extension")


# ---- eigenvalues ----------------------------------------


def with_spectrum(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A dense Gram with the given eigenvalues."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * eigenvalues) @ q.T


def spectra(n: int) -> dict[str, Tensor]:
    """Hard and degenerate Grams of n samples."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    ones = torch.ones(n, dtype=torch.float64)
    first = torch.zeros(n, dtype=torch.float64)
    first[0] = 1.0
    return {
        "generic": with_spectrum(0.1 + ramp),
        "spread of 1e16": with_spectrum(10 ** (16 * (ramp - 1))),
        "all equal": with_spectrum(3 * ones),
        "pairs": with_spectrum(torch.floor(ramp * (n // 2)) + 1),
        "near pairs": with_spectrum(torch.floor(ramp * (n // 2)) + 1 + 1e-9 * ramp),
        "one large, the rest equal": with_spectrum(ones + 1e8 * first),
        "one small, the rest equal": with_spectrum(ones - first + 1e-7 * first),
        "low rank": with_spectrum(torch.where(ramp > 0.6, 1 + ramp, 0.0)),
        "rank one": torch.outer(ramp + 1, ramp + 1),
        "all ones": torch.ones(n, n, dtype=torch.float64),
        "single entry": torch.outer(first, first),
        "zero": torch.zeros(n, n, dtype=torch.float64),
        "identity": torch.eye(n, dtype=torch.float64),
        "diagonal": torch.diag(10 ** (-12 * ramp)),
        "blocks": torch.block_diag(
            torch.ones(n - n // 2, n - n // 2), 2 * torch.ones(n // 2, n // 2)
        ),
        "tiny": with_spectrum(1e-30 * (0.1 + ramp)),
        "huge": with_spectrum(1e30 * (0.1 + ramp)),
        "subnormal": with_spectrum(ones + ramp) * 1e-310,
        "near overflow": with_spectrum(1 + ramp) * 4e307,
    }


def assert_eigenvalues(found: Tensor, grams: Tensor, tolerance: float) -> None:
    """Absolute errors, relative to each Gram's largest eigenvalue."""
    expected = np.linalg.eigvalsh(grams.cpu().double().numpy() / 2)[:, ::-1]
    scale = np.maximum(np.abs(expected).max(axis=1, keepdims=True), 1e-320)
    np.testing.assert_allclose(
        found.cpu().numpy() / 2 / scale, expected / scale, rtol=0, atol=tolerance
    )


@places
@pytest.mark.parametrize("n", [2, 3, 17, 64])
@pytest.mark.parametrize("name", spectra(2))
def test_eigenvalues_of_hard_spectra(name, n, device, backend):
    gram = spectra(n)[name][None].to(device)
    tolerance = 1e-13 if name != "subnormal" else 1e-10
    found = ops.gram_eigenvalues(gram, backend=backend)
    assert found.dtype == torch.float64
    assert (found[:, :-1] >= found[:, 1:]).all()
    assert_eigenvalues(found, gram, tolerance)


@places
@pytest.mark.parametrize("n", [2, 3, 17, 64])
@pytest.mark.parametrize("name", spectra(2))
def test_extremes_of_hard_spectra(name, n, device, backend):
    gram = spectra(n)[name][None].to(device)
    largest, smallest = ops.gram_extremes(gram, backend=backend)
    expected = np.linalg.eigvalsh(gram.cpu().numpy() / 2)
    scale = max(expected[0, -1], 1e-320)
    tolerance = 2e-12 if name != "subnormal" else 1e-10
    assert abs(largest.item() / 2 - expected[0, -1]) <= tolerance * scale
    assert abs(smallest.item() / 2 - expected[0, 0]) <= tolerance * scale


@places
@pytest.mark.parametrize("n", [1, 2, 63, 65, 130])
def test_all_units_are_solved_at_once(n, device, backend):
    j = torch.randn(7, n, n // 2 + 3, device=device)
    grams = j @ j.mT
    found = ops.gram_eigenvalues(grams, backend=backend)
    assert found.shape == (7, n)
    assert_eigenvalues(found, grams, 1e-6)
    largest, smallest = ops.gram_extremes(grams, backend=backend)
    scale = found[:, :1]
    assert ((largest - found[:, 0]).abs() <= 2e-12 * scale[:, 0]).all()
    assert ((smallest - found[:, -1]).abs() <= 2e-12 * scale[:, 0]).all()


@places
def test_eigenvalues_of_the_symmetric_part_are_returned(device, backend):
    """float32 products leave a Gram symmetric up to rounding only; both triangles count."""
    gram = torch.tensor([[[2.0, 1.5], [0.5, 2.0]]], device=device)
    assert_close = torch.testing.assert_close
    expected = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    assert_close(ops.gram_eigenvalues(gram, backend=backend).cpu(), expected)


@places
def test_grams_need_not_be_contiguous(device, backend):
    gram = with_spectrum(torch.arange(1.0, 6.0).double()).to(device)
    grams = torch.stack([gram, 2 * gram], dim=-1).movedim(-1, 0)
    assert not grams.is_contiguous()
    assert_eigenvalues(ops.gram_eigenvalues(grams, backend=backend), grams, 1e-13)


@places
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gram_that_is_not_finite_fails_alone(dtype, bad, device, backend):
    grams = torch.stack([with_spectrum(torch.arange(1.0, 10.0).double())] * 3).to(device, dtype)
    good = ops.gram_eigenvalues(grams, backend=backend)
    grams[1, 4, 7] = bad
    found = ops.gram_eigenvalues(grams, backend=backend)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], good[[0, 2]])
    for end in ops.gram_extremes(grams, backend=backend):
        assert end.isnan().tolist() == [False, True, False]


@places
def test_eigenvalues_are_the_same_bits_every_time(device, backend):
    j = torch.randn(20, 33, 50, device=device)
    grams = j @ j.mT
    runs = [ops.gram_eigenvalues(grams, backend=backend) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@needs_extension
def test_eigenvalues_do_not_depend_on_the_units_solved_beside_them(device):
    j = torch.randn(20, 33, 50, device=device)
    grams = j @ j.mT
    together = ops.gram_eigenvalues(grams, backend="extension")
    assert torch.equal(ops.gram_eigenvalues(grams[7:8], backend="extension"), together[7:8])


@places
def test_no_units_have_no_eigenvalues(device, backend):
    empty = torch.zeros(0, 5, 5, device=device)
    assert ops.gram_eigenvalues(empty, backend=backend).shape == (0, 5)
    assert [end.shape for end in ops.gram_extremes(empty, backend=backend)] == [(0,), (0,)]
    assert ops.gram_eigenvalues(torch.zeros(3, 0, 0, device=device), backend=backend).shape == (
        3,
        0,
    )
    with pytest.raises(ValueError, match="at least one sample"):
        ops.gram_extremes(torch.zeros(3, 0, 0, device=device), backend=backend)


@needs_extension
@settings(max_examples=100, deadline=None)
@given(
    exponents=st.lists(st.integers(-16, 0), min_size=1, max_size=24),
    scale=st.integers(-30, 30),
    seed=st.integers(0, 1000),
)
def test_eigenvalues_of_random_spectra_with_repetitions(exponents, scale, seed):
    eigenvalues = 10.0 ** torch.tensor(exponents, dtype=torch.float64)
    gram = with_spectrum(eigenvalues, seed)[None] * 10.0**scale
    found = ops.gram_eigenvalues(gram, backend="extension")
    assert_eigenvalues(found, gram, 2e-13)
    largest, smallest = ops.gram_extremes(gram, backend="extension")
    tolerance = 2e-12 * found[0, 0].item()
    assert abs(largest.item() - found[0, 0].item()) <= tolerance
    assert abs(smallest.item() - found[0, -1].item()) <= tolerance


@pytest.mark.parametrize("backend", ["eager", pytest.param("extension", marks=needs_extension)])
def test_eigenvalues_refuse_what_is_no_stack_of_grams(backend):
    for solve in (ops.gram_eigenvalues, ops.gram_extremes):
        with pytest.raises(ValueError, match=r"\[units, samples, samples\]"):
            solve(torch.zeros(3, 3), backend=backend)
        with pytest.raises(ValueError, match="float32 or float64"):
            solve(torch.zeros(1, 3, 3, dtype=torch.float16), backend=backend)


# ---- torch's own view of the operations ----------------------------------------


@needs_extension
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("layout", ["rows", "several per unit"])
def test_operations_pass_opcheck(layout, device):
    grams, grad, pieces = chunk(5, layout, torch.float32, device)
    torch.library.opcheck(torch.ops.lightning_mat.gram_accumulate_.default, (grams, grad, pieces))
    torch.library.opcheck(torch.ops.lightning_mat.gram_eigenvalues.default, (grams,))
    torch.library.opcheck(torch.ops.lightning_mat.gram_extremes.default, (grams,))


@needs_extension
def test_operations_cost_what_runs():
    grams, grad, pieces = chunk(6, "several per unit", torch.float32, "cpu")
    elements = 14 + 6 + 1 + 10 + 3
    with FlopCounterMode(display=False) as counter:
        ops.gram_accumulate(grams, grad, pieces, backend="extension")
    assert counter.get_total_flops() == 2 * 6 * 6 * elements
    with FlopCounterMode(display=False) as reference:
        ops.gram_accumulate(grams, grad, pieces, backend="eager")
    assert reference.get_total_flops() == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        ops.gram_eigenvalues(grams, backend="extension")
        ops.gram_extremes(grams, backend="extension")
    assert counter.get_total_flops() == 2 * 4 * len(grams) * 6**3


# ---- which backend runs ----------------------------------------


@pytest.fixture
def missing(monkeypatch):
    """As if the library had never been compiled."""
    found = _extension.Extension({}, "it is missing")
    monkeypatch.setattr(_extension, "load", lambda: found)
    monkeypatch.setattr(ops, "_warned", set())


@pytest.mark.usefixtures("missing")
def test_without_the_extension_the_reference_is_used_with_one_warning(recwarn):
    for _ in range(3):
        found = ops.gram_eigenvalues(torch.eye(2)[None])
    assert found.tolist() == [[1.0, 1.0]]
    messages = [str(w.message) for w in recwarn if w.category is RuntimeWarning]
    assert len(messages) == 1
    assert "it is missing" in messages[0]
    assert "lightning-mat doctor" in messages[0]
    assert recwarn.list[0].filename == __file__
    assert ops.backend_in_use("cpu") == ("eager", "it is missing")


@pytest.mark.usefixtures("missing")
def test_asking_for_a_missing_extension_is_an_error_that_says_how_to_get_it():
    with pytest.raises(RuntimeError, match=r"it is missing.*pip install"):
        ops.gram_eigenvalues(torch.eye(2)[None], backend="extension")


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="auto, extension, eager, got 'gpu'"):
        ops.gram_eigenvalues(torch.eye(2)[None], backend="gpu")


@needs_extension
def test_a_device_without_kernels_uses_the_reference():
    name, why = ops.backend_in_use("xpu")
    assert name == "eager"
    assert "no kernels for xpu" in why
    assert ops.backend_in_use("cpu")[0] == "extension"
