"""The fused operation: every kind of layer, way, type, stride and partition against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from lightning_mat import _extension
from lightning_mat.mntk.accumulate import Accumulator, Slots
from lightning_mat.mntk.cost import choose_way, possible_ways
from lightning_mat.mntk.factors import Dense, Outer, Rows, Source, Stacked, Sum, Zero
from lightning_mat.mntk.kernel import (
    Geometry,
    Layer,
    Plan,
    mntk_spectra,
    mntk_spectra_reference,
)
from lightning_mat.mntk.words import piece_table, plan_words, read_words
from lightning_mat.units.unit import Rect

EXTENSION = _extension.load()
needs_extension = pytest.mark.skipif(bool(EXTENSION.error), reason=EXTENSION.error)
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif("cuda" not in EXTENSION.backends, reason="not compiled for CUDA"),
]
devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=needs_extension),
        pytest.param("cuda", marks=needs_gpu),
    ],
)
EMPTY = torch.empty(0)

# ---- a table of layers ------------------------------------------------------------------------

Owned = list[tuple[int, Rect]]


def rows(*bounds: int, columns: int) -> Owned:
    return [(u, Rect(*b, 0, columns)) for u, b in enumerate(itertools.pairwise(bounds))]


def columns(*bounds: int, rows: int) -> Owned:
    return [(u, Rect(0, rows, *b)) for u, b in enumerate(itertools.pairwise(bounds))]


def filters(count: int, width: int) -> Owned:
    return [(u, Rect(u, u + 1, 0, width)) for u in range(count)]


# name -> (layer, shape of a, shape of b), shapes without the samples
TABLE: dict[str, tuple[Layer, tuple[int, ...], tuple[int, ...]]] = {
    "linear rows": (Layer("linear", 13, 9, rows(0, 5, 13, columns=9)), (7, 9), (7, 13)),
    "linear columns": (Layer("linear", 13, 9, columns(0, 4, 9, rows=13)), (7, 9), (7, 13)),
    "linear both": (
        Layer(
            "linear",
            13,
            9,
            [(0, Rect(0, 5, 0, 5)), (1, Rect(5, 13, 5, 9)), (0, Rect(6, 8, 0, 3))],
        ),
        (7, 9),
        (7, 13),
    ),
    "linear in part": (Layer("linear", 13, 9, [(3, Rect(4, 6, 0, 9))]), (7, 9), (7, 13)),
    "linear, one token": (Layer("linear", 13, 9, rows(0, 1, 13, columns=9)), (1, 9), (1, 13)),
    "linear, two tokens": (Layer("linear", 13, 9, rows(0, 6, 13, columns=9)), (2, 9), (2, 13)),
    "linear, 77 tokens": (Layer("linear", 5, 3, rows(0, 2, 5, columns=3)), (77, 3), (77, 5)),
    "linear, no tokens": (Layer("linear", 5, 3, rows(0, 2, 5, columns=3)), (0, 3), (0, 5)),
    "linear, no rows": (Layer("linear", 0, 3, [(0, Rect(0, 0, 0, 3))]), (2, 3), (2, 0)),
    "linear, unowned": (Layer("linear", 5, 3, []), (2, 3), (2, 5)),
    "linear filters": (Layer("linear", 33, 9, filters(33, 9)), (4, 9), (4, 33)),
    "conv": (
        Layer("conv", 6, 27, filters(6, 27), Geometry((3, 3), (1, 1), (1, 1), (0, 0))),
        (3, 8, 9),
        (6, 6, 7),
    ),
    "conv, padded": (
        Layer("conv", 6, 27, filters(6, 27), Geometry((3, 3), (1, 1), (1, 1), (1, 1))),
        (3, 4, 5),
        (6, 4, 5),
    ),
    "conv, padded before": (
        Layer("conv", 6, 24, filters(6, 24), Geometry((4, 2), (2, 1), (1, 1), (2, 0))),
        (3, 4, 5),
        (6, 3, 5),
    ),
    "conv, stride and dilation": (
        Layer("conv", 6, 18, filters(6, 18), Geometry((2, 3), (2, 1), (1, 2), (0, 0))),
        (3, 8, 9),
        (6, 4, 5),
    ),
    "conv, groups": (
        Layer("conv", 6, 18, filters(6, 18), Geometry((3, 3), (1, 1), (2, 1), (0, 0), 2)),
        (4, 8, 9),
        (6, 4, 7),
    ),
    "conv, depthwise": (
        Layer("conv", 5, 9, filters(5, 9), Geometry((3, 3), (1, 1), (1, 1), (0, 0), 5)),
        (5, 5, 5),
        (5, 3, 3),
    ),
    "conv, one dimension": (
        Layer("conv", 4, 6, filters(4, 6), Geometry((3,), (1,), (1,), (0,))),
        (2, 8),
        (4, 6),
    ),
    "conv, three dimensions": (
        Layer("conv", 3, 16, filters(3, 16), Geometry((2, 2, 2), (1, 2, 1), (1, 1, 1), (0, 0, 0))),
        (2, 3, 4, 3),
        (3, 2, 2, 2),
    ),
    "conv, one position": (
        Layer("conv", 40, 18, filters(40, 18), Geometry((3, 3), (1, 1), (1, 1), (0, 0))),
        (2, 3, 3),
        (40, 1, 1),
    ),
    "conv, frames": (
        Layer("conv", 4, 18, filters(4, 18), Geometry((3, 3), (1, 1), (1, 1), (0, 0))),
        (3, 2, 5, 5),
        (3, 4, 3, 3),
    ),
    "conv, columns": (
        Layer("conv", 4, 27, columns(0, 9, 27, rows=4), Geometry((3, 3), (1, 1), (1, 1), (0, 0))),
        (3, 5, 5),
        (4, 3, 3),
    ),
    "bias": (Layer("bias", 6, 1, filters(6, 1)), (), (7, 6)),
    "scale": (Layer("scale", 6, 1, filters(6, 1)), (7, 6), (7, 6)),
    "embedding": (Layer("embedding", 20, 6, rows(0, 10, 20, columns=6)), (7,), (7, 6)),
    "dense": (
        Layer("dense", 7, 6, [(0, Rect(0, 3, 0, 6)), (1, Rect(3, 7, 0, 2))]),
        (),
        (7, 6),
    ),
}
tables = pytest.mark.parametrize("name", TABLE)


def tensors(name: str, samples: int, device: str = "cpu", dtype=torch.float32, seed: int = 0):
    layer, a_shape, b_shape = TABLE[name]
    generator = torch.Generator().manual_seed(seed)
    if layer.kind == "embedding":
        a = torch.randint(-1, layer.rows, (samples, *a_shape), generator=generator)
    elif layer.kind in ("bias", "dense"):
        a = EMPTY
    else:
        a = torch.randn(samples, *a_shape, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(samples, *b_shape, generator=generator, dtype=torch.float64).to(dtype)
    return layer, a.to(device), b.to(device)


def with_way(layer: Layer, way: str) -> Layer:
    return Layer(layer.kind, layer.rows, layer.columns, layer.owned, layer.geometry, way)


def definition(layer: Layer, a: Tensor, b: Tensor, units: int) -> Tensor:
    """Grams by differentiating the layer itself, once per sample, in float64."""
    weight = torch.zeros(layer.rows, layer.columns, dtype=torch.float64)
    a = a.cpu() if layer.kind == "embedding" else a.cpu().double()
    b = b.cpu().double()

    def scalar(w: Tensor, a_s: Tensor, b_s: Tensor) -> Tensor:
        if layer.kind == "linear":
            return ((a_s @ w.T) * b_s).sum()
        if layer.kind == "bias":
            return (w[:, 0] * b_s).sum()
        if layer.kind == "scale":
            return (w[:, 0] * a_s * b_s).sum()
        if layer.kind == "embedding":
            padded = torch.cat([w, torch.zeros(1, layer.columns, dtype=w.dtype)])  # -1: none
            return (padded[a_s] * b_s).sum()
        if layer.kind == "dense":
            return (w * b_s).sum()
        assert layer.geometry is not None
        g = layer.geometry
        conv = (torch.conv1d, torch.conv2d, torch.conv3d)[len(g.kernel) - 1]
        batched = a_s.dim() == len(g.kernel) + 2  # frames
        x = a_s if batched else a_s.unsqueeze(0)
        pads = []
        for size, out, k, step, d, p in zip(
            x.shape[2:], b_s.shape[-len(g.kernel) :], *g[:4], strict=True
        ):
            pads = [p, max(0, (out - 1) * step + (k - 1) * d + 1 - size - p), *pads]
        x = torch.nn.functional.pad(x, pads)
        shaped = w.view(layer.rows, -1, *g.kernel)
        y = conv(x, shaped, None, g.stride, 0, g.dilation, g.groups)
        return (y * (b_s if batched else b_s.unsqueeze(0))).sum()

    inputs = b if a.numel() == 0 and layer.kind in ("bias", "dense") else a
    g = torch.stack([grad(scalar)(weight, inputs[s], b[s]) for s in range(len(b))])
    grams = torch.zeros(units, len(b), len(b), dtype=torch.float64)
    for unit, (r0, r1, c0, c1) in layer.owned:
        v = g[:, r0:r1, c0:c1].flatten(1)
        grams[unit] += v @ v.T
    return grams


def error(found: Tensor, expected: Tensor) -> float:
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-300)
    return float((found.cpu().double() - expected).abs().max()) / scale if expected.numel() else 0.0


UNITS = 40


# ---- the reference is the definition, and every way is the reference ---------------------------


@tables
def test_the_reference_is_the_definition(name):
    layer, a, b = tensors(name, 3)
    found = mntk_spectra_reference([a], [b], Plan(UNITS, [layer]), keep_gram=True)
    expected = definition(layer, a, b, UNITS)
    assert error(found.grams, expected) < 1e-13
    eigenvalues = torch.linalg.eigvalsh(expected).flip(-1)
    assert error(found.eigenvalues, eigenvalues) < 1e-13


@devices
@tables
@pytest.mark.parametrize("way", ["staged", "ghost", "chip"])
@pytest.mark.parametrize("samples", [2, 3, 65])
def test_every_way_agrees_with_the_reference(name, way, samples, device):
    layer, a, b = tensors(name, samples, device)
    plan = Plan(UNITS, [with_way(layer, way)])
    found = mntk_spectra([a], [b], plan, keep_gram=True, backend="extension")
    expected = mntk_spectra_reference([a], [b], plan, keep_gram=True)
    assert error(found.grams, expected.grams.cpu()) < 1e-5
    assert error(found.eigenvalues, expected.eigenvalues.cpu()) < 1e-5


@devices
@pytest.mark.parametrize("samples", [2, 3, 16, 17, 33, 63, 64, 65, 130, 200])
@pytest.mark.parametrize("name", ["linear rows", "linear, one token", "conv"])
def test_any_number_of_samples(name, samples, device):
    layer, a, b = tensors(name, samples, device)
    found = mntk_spectra([a], [b], Plan(UNITS, [layer]), backend="extension")
    expected = mntk_spectra_reference([a], [b], Plan(UNITS, [layer]))
    assert error(found.eigenvalues, expected.eigenvalues.cpu()) < 1e-5


@devices
@tables
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_types_and_precisions(name, dtype, precision, device):
    layer, a, b = tensors(name, 5, device, dtype)
    plan = Plan(UNITS, [layer])
    found = mntk_spectra([a], [b], plan, precision=precision, keep_gram=True, backend="extension")
    expected = mntk_spectra_reference([a], [b], plan, keep_gram=True)
    bound = {"float32": 1e-5, "tf32": 2e-3, "bf16": 1e-2}[precision]
    if dtype == torch.float64:
        bound = 1e-12
    assert found.grams.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(found.eigenvalues[:, 0], expected.eigenvalues[:, 0].cpu()) < bound


@devices
def test_the_largest_sizes(device):
    """S = 1024 samples, and T = 4096 tokens."""
    generator = torch.Generator().manual_seed(0)
    for samples, tokens in ((1024, 1), (3, 4096)):
        a = torch.randn(samples, tokens, 5, generator=generator).to(device)
        b = torch.randn(samples, tokens, 6, generator=generator).to(device)
        plan = Plan(1, [Layer("linear", 6, 5, [(0, Rect(0, 6, 0, 5))])])
        found = mntk_spectra([a], [b], plan, backend="extension").eigenvalues.cpu()
        jacobian = torch.einsum("str,stc->src", b.cpu().double(), a.cpu().double()).flatten(1)
        rank = min(samples, 30)
        expected = torch.linalg.eigvalsh(jacobian @ jacobian.T).flip(-1)[:rank]
        assert error(found[0, :rank], expected) < 1e-5


def in_other_memory(t: Tensor, how: str) -> Tensor:
    """The same values, with other strides."""
    if t.numel() == 0:
        return t
    if how == "reversed":
        order = list(range(t.dim()))[::-1]
        return t.permute(order).contiguous().permute(order)
    if how == "padded":
        return torch.stack([t, t], -1)[..., 0]
    if how == "tokens first":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    raise ValueError(how)


@devices
@tables
@pytest.mark.parametrize("how", ["reversed", "padded", "tokens first"])
@pytest.mark.parametrize("way", ["staged", "auto"])
def test_any_strides(name, how, way, device):
    layer, a, b = tensors(name, 5, device)
    plan = Plan(UNITS, [with_way(layer, way)])
    found = mntk_spectra(
        [in_other_memory(a, how)], [in_other_memory(b, how)], plan, backend="extension"
    )
    expected = mntk_spectra_reference([a], [b], plan)
    assert error(found.eigenvalues, expected.eigenvalues.cpu()) < 1e-5


@devices
@pytest.mark.parametrize("way", ["staged", "ghost", "chip"])
def test_one_gradient_for_all_samples(way, device):
    """What a projection of the logits gives: the same output gradient everywhere, expanded."""
    layer, a, b = tensors("linear rows", 5, device)
    b = b[0, 0].expand_as(b)
    plan = Plan(UNITS, [with_way(layer, way)])
    found = mntk_spectra([a], [b], plan, backend="extension")
    expected = mntk_spectra_reference([a], [b], plan)
    assert error(found.eigenvalues, expected.eigenvalues.cpu()) < 1e-5


@devices
@tables
@pytest.mark.parametrize("workspace", [1, 1000, 5000])
def test_a_small_workspace_only_cuts_finer(name, workspace, device):
    layer, a, b = tensors(name, 5, device)
    plan = Plan(UNITS, [with_way(layer, "staged")])
    found = mntk_spectra([a], [b], plan, workspace=workspace, backend="extension")
    expected = mntk_spectra_reference([a], [b], plan)
    assert error(found.eigenvalues, expected.eigenvalues.cpu()) < 1e-5


def everything(device: str = "cpu", samples: int = 6) -> tuple[list[Tensor], list[Tensor], Plan]:
    """All layers of the table at once: units span several layers."""
    parts = [tensors(name, samples, device, seed=k) for k, name in enumerate(TABLE)]
    return [p[1] for p in parts], [p[2] for p in parts], Plan(UNITS, [p[0] for p in parts])


@devices
@pytest.mark.parametrize("keep_gram", [True, False])
def test_units_that_span_layers(keep_gram, device):
    a, b, plan = everything(device)
    found = mntk_spectra(a, b, plan, keep_gram=keep_gram, backend="extension")
    expected = mntk_spectra_reference(a, b, plan, keep_gram=True)
    assert error(found.eigenvalues, expected.eigenvalues.cpu()) < 1e-5
    assert (found.grams is None) == (not keep_gram)
    if found.grams is not None:
        assert error(found.grams, expected.grams.cpu()) < 1e-5
    by_hand = sum(
        definition(layer, a_i, b_i, UNITS)
        for layer, a_i, b_i in zip(plan.layers, a, b, strict=True)
    )
    assert error(expected.grams, by_hand) < 1e-12


def installments(a, b, plan: Plan, order: Sequence[int], **options) -> Tensor:
    accumulator = Accumulator(
        plan.remaining(), len(b[0]), device=b[0].device, backend="extension", **options
    )
    for k in order:
        layer = plan.layers[k]
        accumulator.add(layer.factor(a[k], b[k]), layer.pieces, layer.way)
    return accumulator.finish().eigenvalues


@devices
@pytest.mark.parametrize("workspace", [None, 2000])
def test_installments_give_the_same_bits(workspace, device):
    a, b, plan = everything(device)
    whole = mntk_spectra(a, b, plan, workspace=workspace, backend="extension").eigenvalues
    again = mntk_spectra(a, b, plan, workspace=workspace, backend="extension").eigenvalues
    parts = installments(a, b, plan, range(len(a)), workspace=workspace)
    assert torch.equal(whole, again)
    assert torch.equal(whole, parts)
    # in another order sums are rounded otherwise
    backwards = installments(a, b, plan, range(len(a))[::-1], workspace=workspace)
    assert error(backwards, whole.cpu()) < 1e-6


@devices
def test_a_unit_without_all_its_layers_is_solved_as_it_is(device):
    a, b, plan = everything(device)
    found = installments(a, b, plan, [0, 13])
    part = Plan(UNITS, [plan.layers[0], plan.layers[13]])
    expected = mntk_spectra_reference([a[0], a[13]], [b[0], b[13]], part)
    assert error(found, expected.eigenvalues.cpu()) < 1e-5


@devices
def test_nan_stays_within_its_unit(device):
    layer, a, b = tensors("linear rows", 5, device)
    clean = mntk_spectra([a], [b], Plan(2, [layer]), backend="extension").eigenvalues
    for bad in (torch.nan, torch.inf):
        spoilt = b.clone()
        spoilt[3, 2, 7] = bad  # a row of unit 1
        for way in ("staged", "chip", "ghost"):
            plan = Plan(2, [with_way(layer, way)])
            found = mntk_spectra([a], [spoilt], plan, backend="extension").eigenvalues
            assert found[1].isnan().all()
            assert error(found[0], clean[0].cpu()) < 1e-6


@devices
@pytest.mark.parametrize("how", ["rank one", "zero", "clustered", "spread"])
def test_adversarial_spectra(how, device):
    samples = 17
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))
    scale = {
        "rank one": torch.eye(1, 24).flatten().double(),
        "zero": torch.zeros(24).double(),
        "clustered": 1 + 1e-7 * torch.arange(24).double(),
        "spread": 10 ** (-8 * torch.arange(24).double() / 16),  # of the Gram: 1e16
    }[how]
    j = (torch.eye(samples, 24, dtype=torch.float64) * scale) @ q
    layer = Layer("dense", 4, 6, [(0, Rect(0, 4, 0, 6))])
    b = j.view(samples, 4, 6).to(device)
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        found = mntk_spectra([EMPTY], [b.to(dtype)], Plan(1, [layer]), backend="extension")
        covariance = torch.linalg.eigvalsh(j.T @ j).flip(-1)[:samples]
        assert error(found.eigenvalues[0], covariance) < bound


@devices
def test_the_spectrum_is_that_of_the_covariance(device):
    """J Jᵀ and Jᵀ J have the same eigenvalues, but for zeros."""
    layer, a, b = tensors("linear rows", 6, device, torch.float64)
    found = mntk_spectra([a], [b], Plan(2, [layer]), backend="extension").eigenvalues.cpu()
    jacobian = torch.einsum("str,stc->src", b.cpu(), a.cpu())
    for unit, (r0, r1, _, _) in layer.owned:
        j = jacobian[:, r0:r1].flatten(1)
        covariance = torch.linalg.eigvalsh(j.T @ j).flip(-1)[:6]
        assert error(found[unit], covariance) < 1e-12


@needs_extension
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_random_layers_agree_with_the_reference(data):
    samples = data.draw(st.integers(2, 9), label="samples")
    tokens = data.draw(st.sampled_from([1, 2, 3, 8]), label="tokens")
    row_cuts = sorted(data.draw(st.sets(st.integers(0, 14), min_size=2), label="rows"))
    column_cuts = sorted(data.draw(st.sets(st.integers(0, 11), min_size=2), label="columns"))
    cells = itertools.product(itertools.pairwise(row_cuts), itertools.pairwise(column_cuts))
    owned = [(data.draw(st.integers(0, 3)), Rect(*r, *c)) for r, c in cells]
    way = data.draw(st.sampled_from(["auto", "staged", "ghost"]), label="way")
    workspace = data.draw(st.sampled_from([300, 4000, 1 << 20]), label="workspace")
    kind = data.draw(st.sampled_from(["linear", "dense", "embedding"]), label="kind")
    layer = Layer(kind, 14, 11, owned, way=way)
    generator = torch.Generator().manual_seed(samples)
    if kind == "linear":
        a = torch.randn(samples, tokens, 11, generator=generator)
        b = torch.randn(samples, tokens, 14, generator=generator)
    elif kind == "dense":
        a, b = EMPTY, torch.randn(samples, 14, 11, generator=generator)
    else:
        a = torch.randint(-1, 14, (samples, tokens), generator=generator)
        b = torch.randn(samples, tokens, 11, generator=generator)
    plan = Plan(4, [layer])
    found = mntk_spectra([a], [b], plan, workspace=workspace, backend="extension")
    expected = mntk_spectra_reference([a], [b], plan)
    assert error(found.eigenvalues, expected.eigenvalues) < 1e-5


# ---- several sources of one parameter -----------------------------------------------------------


def outer(samples: int, tokens: int, seed: int) -> Outer:
    generator = torch.Generator().manual_seed(seed)
    return Outer(
        torch.randn(samples, tokens, 5, generator=generator),
        torch.randn(samples, tokens, 7, generator=generator),
    )


def table_rows(samples: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return Rows(
        torch.randint(-1, 7, (samples, 3), generator=generator),
        torch.randn(samples, 3, 5, generator=generator),
        7,
    )


class Hidden(Dense):
    """A factor that only yields blocks, as a replayed layer does."""

    def sources(self):
        return None


COMPOSED: dict[str, Callable[[], object]] = {
    "two uses": lambda: Sum([outer(6, 3, 0), outer(6, 4, 1)]),
    "tied to an embedding": lambda: Sum([outer(6, 3, 0), table_rows(6, 1)]),
    "micro-batches": lambda: Stacked([outer(2, 3, 0), outer(4, 3, 1)]),
    "of other lengths": lambda: Stacked([outer(2, 1, 0), outer(4, 2, 1)]),
    "one without tokens": lambda: Stacked([outer(2, 3, 0), Zero(4, outer(4, 3, 0))]),
    "nothing at all": lambda: Stacked([Zero(2, outer(2, 3, 0)), Zero(4, outer(4, 3, 0))]),
    "stacked embeddings": lambda: Stacked([table_rows(2, 0), table_rows(4, 1)]),
    "stacked sums": lambda: Stacked(
        [Sum([outer(2, 3, 0), outer(2, 3, 1)]), Sum([outer(4, 2, 2), table_rows(4, 3)])]
    ),
    "blocks only": lambda: Hidden(torch.randn(6, 7, 5)),
    "stacked blocks": lambda: Stacked([outer(2, 3, 0), Hidden(torch.randn(4, 7, 5))]),
}


@needs_extension
@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("way", ["auto", "staged", "ghost"])
@pytest.mark.parametrize("workspace", [400, 1 << 20])
def test_composed_factors(name, way, workspace):
    factor = COMPOSED[name]()
    pieces = piece_table([(0, Rect(0, 3, 0, 5)), (2, Rect(3, 6, 0, 5))])
    grams = {}
    for backend in ("extension", "eager"):
        accumulator = Accumulator(
            [1, 0, 1], 6, device="cpu", workspace=workspace, keep_gram=True, backend=backend
        )
        accumulator.add(factor, pieces, way)
        grams[backend] = accumulator.finish()
    assert error(grams["extension"].eigenvalues, grams["eager"].eigenvalues) < 1e-5
    g = factor.block(0, factor.rows).double()
    expected = torch.stack([v @ v.T for v in (g[:, :3].flatten(1), g[:, 3:6].flatten(1))])
    assert error(grams["eager"].grams[[0, 2]], expected) < 1e-12


# ---- what is chosen, counted and kept ------------------------------------------------------------


def test_the_cheapest_way_is_chosen():
    def way(samples, tokens, rows, columns, owned, on_gpu=False, workspace=16 << 20):
        a, b = torch.empty(samples, tokens, columns), torch.empty(samples, tokens, rows)
        layer = (samples, (rows, columns), [Source("linear", a, b)], piece_table(owned))
        ways = possible_ways(*layer, workspace=workspace, itemsize=4, on_gpu=on_gpu)
        return choose_way(*layer, ways)

    whole = [(0, Rect(0, 768, 0, 768))]
    halves = [(0, Rect(0, 768, 0, 384)), (1, Rect(0, 768, 384, 768))]
    assert way(64, 128, 768, 768, whole) == "staged"
    assert way(64, 1, 768, 768, whole) == "ghost"
    assert way(64, 1, 768, 768, whole, on_gpu=True) == "ghost"
    assert way(64, 1, 768, 768, halves) == "staged"  # no piece has all columns
    assert way(64, 1, 768, 768, halves, on_gpu=True) == "chip"
    assert way(64, 16, 768, 768, whole) == "ghost"
    assert way(64, 16, 768, 768, whole, workspace=1 << 20) == "staged"  # pairs need 8 MiB
    assert way(128, 2, 768, 768, halves, on_gpu=True) == "staged"  # two tiles: formed twice
    assert way(64, 4, 8, 8, [(0, Rect(0, 8, 0, 8))]) == "staged"


def flops_of(layer: Layer, a: Tensor, b: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        mntk_spectra([a], [b], Plan(UNITS, [layer]), backend="extension")
    return counter.get_total_flops()


@needs_extension
def test_operations_of_products_of_tokens():
    """All pairs at few tokens, 5/8 of them at many; a way that cannot be gone is not counted."""
    solve = 2 * 2 * 6**3
    owned = [(0, Rect(0, 13, 0, 9))]
    linear = Layer("linear", 13, 9, owned, way="ghost")
    a, b = torch.randn(6, 2, 9), torch.randn(6, 2, 13)
    assert flops_of(linear, a, b) == 2 * (6 * 2) ** 2 * (9 + 13) + solve
    a, b = torch.randn(6, 100, 9), torch.randn(6, 100, 13)
    assert flops_of(linear, a, b) == 2 * 600**2 * (9 + 13) * 0.625 + solve
    part = Layer("linear", 13, 9, [(0, Rect(0, 13, 0, 5)), (0, Rect(0, 6, 5, 9))], way="ghost")
    elements = 13 * 5 + 6 * 4
    assert flops_of(part, a, b) == 2 * (600 * elements + 36 * elements) + solve
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    conv = Layer("conv", 7, 18, [(0, Rect(0, 7, 0, 18))], geometry, way="ghost")
    a, b = torch.randn(6, 2, 2, 2), torch.randn(6, 7, 2, 2)
    assert flops_of(conv, a, b) == 2 * (6 * 4) ** 2 * (2 + 7) + solve
    bias = Layer("bias", 7, 1, [(0, Rect(0, 7, 0, 1))], way="ghost")
    assert flops_of(bias, EMPTY, torch.randn(6, 2, 7)) == 2 * 36 * 7 + solve


@needs_extension
def test_operations_cost_what_runs():
    a, b = torch.randn(6, 7, 9), torch.randn(6, 7, 13)
    layer = Layer("linear", 13, 9, rows(0, 5, 12, columns=9), way="staged")
    with FlopCounterMode(display=False) as counter:
        mntk_spectra([a], [b], Plan(3, [layer]), backend="extension")
    elements = 12 * 9
    assert counter.get_total_flops() == 2 * (6 * 7 * elements + 36 * elements + 2 * 2 * 6**3)
    with FlopCounterMode(display=False) as counter:
        installments([a], [b], Plan(3, [layer]), [0])
    assert counter.get_total_flops() == 2 * (6 * 7 * elements + 36 * elements + 2 * 2 * 6**3)


def test_places_of_solved_units_are_used_again():
    slots = Slots([1, 2, 1, 1], keep=False)
    first = slots.take(np.array([0, 1]))
    assert first.tolist() == [[0, 1, 0], [1, 1, -1]]
    slots.release(np.array([0, 1]))
    assert slots.take(np.array([1, 2])).tolist() == [[1, 0, 1], [0, 1, 2]]
    slots.release(np.array([1, 2]))
    assert slots.take(np.array([3])).tolist() == [[0, 1, 3]]
    assert slots.count == 2
    with pytest.raises(ValueError, match="unit 0 has had all"):
        slots.take(np.array([0]))


@needs_extension
def test_an_error_takes_nothing_back_and_gives_nothing_away():
    accumulator = Accumulator([1, 1], 3, device="cpu", backend="extension")
    bad = Outer(torch.zeros(3, 1, 5), torch.zeros(3, 2, 7))
    pieces = piece_table([(1, Rect(0, 7, 0, 5))])
    with pytest.raises(ValueError, match="tokens"):
        accumulator.add(bad, pieces)
    good = outer(3, 2, 0)
    accumulator.add(good, pieces)
    expected = good.block(0, 7).double().flatten(1)
    found = accumulator.finish().eigenvalues
    assert error(found[1, :1], torch.linalg.eigvalsh(expected @ expected.T)[-1:]) < 1e-5
    with pytest.raises(ValueError, match="unit 1 has had all"):
        accumulator.add(good, pieces)


@needs_extension
@pytest.mark.parametrize("kind", ["embedding", "linear", "conv"])
def test_several_threads_give_the_same_bits_every_time(kind):
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    b = torch.randn(32, 64, 96)
    if kind == "embedding":
        layer = Layer("embedding", 50, 96, [(0, Rect(0, 50, 0, 96))])
        a = torch.randint(0, 50, (32, 64))  # many tokens of each word
    elif kind == "linear":
        layer = Layer("linear", 96, 80, rows(0, 10, 96, columns=80))
        a = torch.randn(32, 64, 80)
    else:
        layer = Layer("conv", 64, 27, filters(64, 27), Geometry((3, 3), (1, 1), (1, 1), (1, 1)))
        a, b = torch.randn(32, 3, 8, 8), torch.randn(32, 64, 8, 8)
    plan = Plan(64, [layer])
    try:
        torch.set_num_threads(4)
        runs = [mntk_spectra([a], [b], plan, keep_gram=True, backend="extension") for _ in range(6)]
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert torch.equal(runs[0].grams, run.grams)
        assert torch.equal(runs[0].eigenvalues, run.eigenvalues)


@needs_extension
def test_the_process_settings_do_not_change_the_result():
    layer, a, b = tensors("linear rows", 5)
    plan = Plan(2, [layer])
    before = torch.get_float32_matmul_precision()
    exact = mntk_spectra([a], [b], plan, backend="extension").eigenvalues
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(mntk_spectra([a], [b], plan, backend="extension").eigenvalues, exact)
        assert torch.equal(installments([a], [b], plan, [0]), exact)
    finally:
        torch.set_float32_matmul_precision(before)


@needs_extension
def test_the_copies_for_a_convolution_stay_small():
    """The patches of one sample alone would take 118 MB."""
    from benchmarks.common import peak_memory

    layer = Layer(
        "conv", 16, 1152, [(0, Rect(0, 16, 0, 1152))], Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    )
    a, b = torch.randn(1, 128, 160, 160), torch.randn(1, 16, 160, 160)
    plan = Plan(1, [layer])
    mntk_spectra([a], [b], plan, backend="extension")
    peak = peak_memory(lambda: mntk_spectra([a], [b], plan, backend="extension"))
    if peak is None:
        pytest.skip("the system does not tell the peak")
    assert peak < 60 << 20


@needs_extension
def test_a_hundred_thousand_filters_keep_few_grams():
    """Grams of all filters would take 800 KB per layer of 2,000, and 40 MB in all."""
    layers, a, b = [], [], []
    for k in range(50):
        owned = [(2000 * k + u, Rect(u, u + 1, 0, 1)) for u in range(2000)]
        layers.append(Layer("bias", 2000, 1, owned))
        a.append(EMPTY)
        b.append(torch.randn(10, 1, 2000))
    plan = Plan(100_000, layers)
    accumulator = Accumulator(plan.remaining(), 10, device="cpu", backend="extension")
    for layer, a_i, b_i in zip(layers, a, b, strict=True):
        accumulator.add(layer.factor(a_i, b_i), layer.pieces)
    assert len(accumulator.grams) == 2000
    found = accumulator.finish().eigenvalues
    expected = torch.cat([b_i.double().square().sum((0, 1)) for b_i in b])
    assert error(found[:, 0], expected) < 1e-6
    assert float((found[:, 1:].abs().amax(1) / found[:, 0]).max()) < 1e-6


def test_words_are_read_back():
    layer, a, b = tensors("conv", 2)
    table = piece_table(layer.owned)
    source = Source("conv", a.unsqueeze(1), b.unsqueeze(1), geometry=layer.geometry)
    from lightning_mat.mntk.words import layer_words

    targets = np.array([[k, 1, k] for k in range(6)])
    words = layer_words((6, 27), "ghost", [(3, source)], targets, table)
    (record,) = read_words(plan_words([words]))
    assert (record.rows, record.columns, record.way) == (6, 27, "ghost")
    assert record.targets.tolist() == targets.tolist()
    assert record.pieces.tolist() == table.tolist()
    assert record.sources.tolist() == [[1, 3, 0, 0, 2, 0, 1, 2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1]]


# ---- registration ------------------------------------------------------------------------------


def raw_arguments(device: str = "cpu"):
    a, b, plan = everything(device)
    recorded = {}
    original = torch.ops.lightning_mat.mntk_spectra

    def record(*arguments):
        recorded["arguments"] = arguments
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.lightning_mat, "mntk_spectra", record)
        mntk_spectra(a, b, plan, backend="extension")
    return recorded["arguments"]


@devices
def test_opcheck(device):
    arguments = raw_arguments(device)
    torch.library.opcheck(torch.ops.lightning_mat.mntk_spectra.default, arguments)
    a, b, words, units, samples, slots, precision, workspace, _ = arguments
    grams = torch.zeros(slots, samples, samples, device=device)
    eigenvalues = torch.zeros(units, samples, dtype=torch.float64, device=device)
    torch.library.opcheck(
        torch.ops.lightning_mat.mntk_accumulate_.default,
        (grams, eigenvalues, a, b, words, precision, workspace),
    )


@needs_extension
def test_autocast_and_graphs_do_not_reach_into_the_operation():
    layer, a, b = tensors("linear rows", 5)
    plan = Plan(2, [with_way(layer, "ghost")])
    plain = mntk_spectra([a], [b], plan, backend="extension").eigenvalues
    with torch.autocast("cpu", torch.bfloat16):
        found = mntk_spectra([a.requires_grad_()], [b], plan, backend="extension").eigenvalues
    assert torch.equal(plain, found)
    assert not found.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_pass_is_captured_in_a_graph():
    arguments = raw_arguments("cuda")
    expected = torch.ops.lightning_mat.mntk_spectra(*arguments)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.ops.lightning_mat.mntk_spectra(*arguments)[0]
    found.zero_()
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_waits_for_the_device():
    a, b, plan = everything("cuda")
    mntk_spectra(a, b, plan, backend="extension")
    # an embedding that several units share has to be looked at
    keep = [k for k, layer in enumerate(plan.layers) if layer.kind != "embedding"]
    table = Layer("embedding", 20, 6, [(0, Rect(0, 20, 0, 6))])
    layers = [*(plan.layers[k] for k in keep), table]
    index, values = tensors("embedding", 6, "cuda")[1:]
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mntk_spectra(
            [*(a[k] for k in keep), index],
            [*(b[k] for k in keep), values],
            Plan(UNITS, layers),
            backend="extension",
        )
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_current_stream_is_used():
    """Inputs are written late on a stream of their own: on any other they are read too early."""
    arguments = raw_arguments("cuda")
    expected = torch.ops.lightning_mat.mntk_spectra(*arguments)[0]
    a, b, *rest = arguments
    late = [torch.full_like(t, torch.nan) for t in b]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for target, source in zip(late, b, strict=True):
            target.copy_(source)
        found = torch.ops.lightning_mat.mntk_spectra(a, late, *rest)[0]
    stream.synchronize()
    assert torch.equal(found, expected)


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layer("dance", 1, 1, []), "kind must be one of linear, conv"),
        (lambda: Layer("bias", 1, 1, [], way="fast"), "way must be one of auto, staged"),
        (lambda: Layer("conv", 1, 9, []), "needs Geometry"),
        (lambda: Layer("bias", 2, 1, [(0, Rect(0, 3, 0, 1))]), r"owns rows \[0, 3\)"),
        (
            lambda: Layer("conv", 2, 9, [], Geometry((3, 3), (1,), (1, 1), (0, 0))),
            "one entry for each",
        ),
        (
            lambda: Layer("conv", 3, 9, [], Geometry((3, 3), (1, 1), (1, 1), (0, 0), 2)),
            "multiple of the groups",
        ),
        (
            lambda: Layer("conv", 3, 9, [], Geometry((3, 3), (1, 0), (1, 1), (0, 0), 1)),
            "must be positive",
        ),
        (
            lambda: Layer("bias", 9, 1, [(0, Rect(0, 5, 0, 1)), (1, Rect(4, 9, 0, 1))]),
            r"disjoint: element \(4, 0\)",
        ),
        (lambda: Layer("bias", 2, 1, [(0, (0, 1))]), "pairs"),
        (lambda: Plan(-1, []), "must not be negative"),
        (lambda: Layer("conv", 2, 9, [], Geometry(3, 1, 1, 0)), "must be tuples"),
        (lambda: Plan(1, [Layer("bias", 2, 1, [(4, Rect(0, 1, 0, 1))])]), "unit 4"),
    ],
)
def test_layers_say_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


LINEAR = Layer("linear", 4, 3, [(0, Rect(0, 4, 0, 3))])


@needs_extension
@pytest.mark.parametrize(
    ("layer", "a", "b", "message"),
    [
        (LINEAR, torch.zeros(2, 5, 3), torch.zeros(2, 5, 5), r"takes a .* got .*\(2, 5, 5\)"),
        (LINEAR, torch.zeros(2, 5, 2), torch.zeros(2, 5, 4), "takes a"),
        (LINEAR, torch.zeros(2, 5), torch.zeros(2, 5, 4), "takes a"),
        (LINEAR, torch.zeros(2, 1, 3), torch.zeros(2, 5, 4), "a has 1 tokens and b has 5"),
        (
            Layer("scale", 4, 1, []),
            torch.zeros(2, 1, 4),
            torch.zeros(2, 5, 4),
            "a has 1 tokens and b has 5",
        ),
        (LINEAR, torch.zeros(2, 5, 3).long(), torch.zeros(2, 5, 4), "a has type Long"),
        (LINEAR, torch.zeros(2, 5, 3), torch.zeros(2, 5, 4).int(), "b has type Int"),
        (
            Layer("embedding", 4, 3, []),
            torch.zeros(2, 5),
            torch.zeros(2, 5, 3),
            "int64 rows of an embedding",
        ),
        (
            Layer("conv", 4, 9, [], Geometry((3, 3), (1, 1), (1, 1), (0, 0))),
            torch.zeros(2, 1, 4, 4),
            torch.zeros(2, 4, 4, 4),
            "does not give an output of 4",
        ),
        (
            Layer("conv", 4, 9, [], Geometry((3, 3), (1, 1), (1, 1), (0, 0))),
            torch.zeros(2, 2, 6, 6),
            torch.zeros(2, 4, 4, 4),
            "takes a",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(layer, a, b, message):
    plan = Plan(1, [Layer(layer.kind, layer.rows, layer.columns, [(0, Rect(0, 1, 0, 1))],
                          layer.geometry)])  # fmt: skip
    with pytest.raises(ValueError, match=message):
        mntk_spectra([a], [b], plan, backend="extension")


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:-1], "ends within layer|words too many"),
        (lambda w: torch.cat([w, w[:1]]), "1 words too many"),
        (lambda w: torch.cat([w[:1] + 1, w[1:]]), "another version"),
        (lambda w: w.int(), "int64"),
        (lambda w: torch.cat([w[:4], w[4:5] + 9, w[5:]]), "no known way"),
        (lambda w: torch.cat([w[:8], w[8:9] + 9, w[9:]]), "kind|known"),
        (lambda w: torch.cat([w[:11], w[11:12] * 0 + 2**63 - 1, w[12:]]), "samples from"),
    ],
)
def test_bad_words_are_refused(change, message):
    a, b, words, *rest = raw_arguments()
    with pytest.raises(ValueError, match=message):
        torch.ops.lightning_mat.mntk_spectra(a, b, change(words), *rest)


@pytest.mark.parametrize(
    ("a", "b", "precision", "message"),
    [
        ([], [], "float32", "needs as many a and b"),
        ([torch.zeros(2, 5, 3)], [torch.zeros(2, 4)], "float32", "takes a"),
        ([torch.zeros(2, 5, 3)], [torch.zeros(2, 5, 4)], "int8", "precision must be one of"),
        (torch.zeros(2, 5, 3), torch.zeros(2, 5, 4), "float32", "a must be a list of tensors"),
        ([None], [torch.zeros(2, 5, 4)], "float32", "a must be a list of tensors"),
    ],
)
def test_arguments_are_checked(a, b, precision, message):
    with pytest.raises(ValueError, match=message):
        mntk_spectra(a, b, Plan(1, [LINEAR]), precision=precision)


@pytest.mark.parametrize("workspace", [0, -1, True, 1.5, "1GB"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_workspace_that_is_none(workspace, backend):
    a, b = torch.zeros(2, 5, 3), torch.zeros(2, 5, 4)
    with pytest.raises(ValueError, match="workspace must be a positive number of bytes"):
        mntk_spectra([a], [b], Plan(1, [LINEAR]), workspace=workspace, backend=backend)


@needs_extension
def test_a_row_that_an_embedding_has_not():
    layer, a, b = tensors("embedding", 2)
    with pytest.raises(ValueError, match="20 rows was given row"):
        mntk_spectra([a.clamp_min(0) + 20], [b], Plan(2, [layer]), backend="extension")


@needs_extension
def test_nothing_is_changed_when_a_later_layer_does_not_fit():
    a, b, words, units, samples, slots, precision, workspace, _ = raw_arguments()
    grams = torch.full((slots, samples, samples), 7.0)
    eigenvalues = torch.full((units, samples), 7.0, dtype=torch.float64)
    b = [*b[:-1], b[-1][..., :-1]]
    with pytest.raises(ValueError, match="b must be"):
        torch.ops.lightning_mat.mntk_accumulate_(
            grams, eigenvalues, a, b, words, precision, workspace
        )
    assert (grams == 7).all()
    assert (eigenvalues == 7).all()


# ---- a whole model -------------------------------------------------------------------------------


@devices
def test_a_convolutional_network_layer_by_layer(device):
    """Captured by hooks, against vmap(grad) of the model."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(6 * 3 * 3, 5),
    ).to(device)
    x = torch.randn(7, 3, 8, 8, device=device)
    seen: dict[int, list[Tensor]] = {}
    for k in (0, 2, 4):

        def keep(module, inputs, output, k=k):
            seen[k] = [inputs[0].detach()]
            output.register_hook(lambda g, k=k: seen[k].append(g))

        model[k].register_forward_hook(keep)
    model(x).sum().backward()
    (a0, b0), (a2, b2), (a4, b4) = (seen[k] for k in (0, 2, 4))
    padded = torch.nn.functional.pad(a0, (1, 1, 1, 1))
    layers = [
        Layer("conv", 8, 27, filters(8, 27), Geometry((3, 3), (1, 1), (1, 1), (0, 0))),
        Layer("bias", 8, 1, filters(8, 1)),
        Layer(
            "conv",
            6,
            36,
            [(8 + u, r) for u, r in filters(6, 36)],
            Geometry((3, 3), (2, 2), (1, 1), (0, 0), 2),
        ),
        Layer("linear", 5, 54, [(14, Rect(0, 5, 0, 54))]),
    ]
    b_bias = b0.flatten(2).transpose(1, 2)
    none = torch.empty(0, device=device)
    found = mntk_spectra(
        [padded, none, a2, a4.unsqueeze(1)],
        [b0, b_bias, b2, b4.unsqueeze(1)],
        Plan(15, layers),
        backend="extension",
    )
    parameters = {n: p.detach().double() for n, p in model.named_parameters()}
    wide = model.double()
    jacobian = vmap(
        grad(lambda p, s: functional_call(wide, p, (s.unsqueeze(0),)).sum()), in_dims=(None, 0)
    )(parameters, x.double())
    parts = [
        torch.cat([jacobian["0.weight"][:, u].flatten(1), jacobian["0.bias"][:, u : u + 1]], 1)
        for u in range(8)
    ]
    parts += [jacobian["2.weight"][:, u].flatten(1) for u in range(6)]
    parts.append(jacobian["4.weight"].flatten(1))
    for unit, j in enumerate(parts):
        expected = torch.linalg.eigvalsh(j @ j.T).flip(-1).cpu()
        assert error(found.eigenvalues[unit], expected) < 1e-5, unit
    assert prod(found.eigenvalues.shape) == 15 * 7
