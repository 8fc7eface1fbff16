"""Linear and Conv1D: what trains gets its plain gradient, what rests is neither made nor saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_mat import flops
from lightning_mat.gate import Gate
from lightning_mat.gate.linear import linear_rule
from lightning_mat.gate.plan import everything
from lightning_mat.gate.rules import Rest
from lightning_mat.units.core import Partition
from lightning_mat.units.regions import Block
from lightning_mat.units.unit import Slice, Unit
from tests.gate.cases import SavedBytes, assert_close, check, even, rows, some, unit

OUT, IN = 40, 24


def layer(kind: str, dtype: torch.dtype) -> nn.Module:
    """A layer of 24 inputs and 40 outputs; a Conv1D's weight is [in, out]."""
    torch.manual_seed(0)
    if kind == "conv1d":
        made = pytest.importorskip("transformers.pytorch_utils").Conv1D(OUT, IN)
        nn.init.normal_(made.bias)
    else:
        made = nn.Linear(IN, OUT, bias=kind == "linear")
    return made.to(dtype)


def patterns(shape: torch.Size, *, bias: bool) -> dict[str, list[Unit]]:
    """Slice patterns of a weight, with the entries of a bias along dimension 0 where it fits."""
    n, m = shape
    found = {
        "rows": rows("weight", even(n, 4)),
        "single rows": rows("weight", even(n, n)),
        "columns": rows("weight", even(m, 4), dim=1),
        "single columns": rows("weight", even(m, m), dim=1),
        "rows and columns of one unit": [
            unit(
                "other",
                Slice("weight", 0, 3, 9),
                Slice("weight", 1, 2, 5),
                Slice("weight", 1, 9, 10),
            )
        ],
        "partly owned": rows("weight", [(1, 3), (5, 20)]),
        "whole": [unit("weight", Slice("weight"))],
    }
    if bias:
        found["whole with bias"] = [unit("all", Slice("weight"), Slice("bias"))]
        found["bias alone"] = rows("bias", even(OUT, 5))
        found["weight whole, bias in part"] = [
            unit("weight", Slice("weight")),
            *rows("bias", [(0, 7), (9, 12)]),
        ]
        found["bias whole, weight in part"] = [
            unit("first", Slice("weight", 0, 0, 2)),
            unit("bias", Slice("bias")),
            *rows("weight", [(4, 12), (12, 20)]),
        ]
    return found


LAYERS = {"linear": (OUT, IN), "no bias": (OUT, IN), "conv1d": (IN, OUT)}
CASES = [
    pytest.param(kind, units, id=f"{kind}-{name}")
    for kind, shape in LAYERS.items()
    for name, units in patterns(torch.Size(shape), bias=kind != "no bias").items()
]


@pytest.mark.parametrize("skip", ["weights", "units"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kind", "units"), CASES)
def test_gradients_of_what_trains_are_the_plain_or_the_detached_ones(kind, units, dtype, skip):
    model = layer(kind, dtype)
    x = torch.randn(5, 3, IN, dtype=dtype, requires_grad=True)
    for active in ([False] * len(units), some(len(units)), some(len(units), 3)):
        gate = check(model, units, active, lambda m: m(x), [x], skip=skip)
        assert gate.in_full == ()
        gate.remove()


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize(("kind", "units"), CASES)
def test_autocast_to_bfloat16_equals_plain_autocast(kind, units, backward_inside):
    model = layer(kind, torch.float32)
    x = torch.randn(6, IN, requires_grad=True)
    part = Partition(units, model)

    def gradients() -> tuple[Tensor, list[Tensor | None]]:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            assert out.dtype == torch.bfloat16
            loss = (out.float() * torch.linspace(-1, 1, OUT)).sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        found = [x.grad, *(p.grad for p in model.parameters())]
        x.grad = None
        model.zero_grad()
        return out, found

    plain_out, plain = gradients()
    with Gate(model, part) as gate:
        gate.apply(some(len(units)))
        out, gated = gradients()
    assert torch.equal(out, plain_out)
    for g, p in zip(gated, plain, strict=True):
        if g is not None:
            assert p is not None
            assert_close(g, torch.where(g == 0, torch.zeros_like(p), p), 2e-2)


def test_autocast_leaves_float64_alone():
    model = layer("linear", torch.float64)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)

    def run(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x)

    check(model, rows("weight", even(OUT, 4)), some(4), run, [x])


INPUTS = {
    "one token": lambda: torch.randn(IN),
    "tokens": lambda: torch.randn(7, IN),
    "four dimensions": lambda: torch.randn(2, 3, 4, IN),
    "no token": lambda: torch.randn(0, 3, IN),
    "transposed": lambda: torch.randn(4, 3, IN).transpose(0, 1),
    "strided features": lambda: torch.randn(4, 3, 2 * IN)[..., ::2],
    "expanded": lambda: torch.randn(1, 3, IN).expand(4, 3, IN),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", INPUTS)
def test_every_shape_of_input_works_and_gives_the_same_bits(name, dim, needs_grad, bias):
    model = nn.Linear(IN, OUT, bias=bias)
    x = INPUTS[name]()
    leaf = x.detach().requires_grad_(needs_grad)
    units = rows("weight", even(model.weight.shape[dim], 4), dim)
    gate = check(model, units, some(4), lambda m: m(leaf), [leaf] if needs_grad else [])
    strange = x  # the layout that the leaf may have lost
    gated = model(strange)
    gate.remove()
    assert torch.equal(gated, model(strange))


def test_blocks_with_different_columns_are_separate_products():
    model = nn.Linear(IN, OUT).double()
    blocks = (Block(((0, 3), (5, 6)), ((1, 4),)), Block(((10, 30),), ((2, 3), (8, 20))))
    run = linear_rule(model, {"weight": Rest(model.weight, blocks, (everything(model.weight),))})
    assert run is not None
    x = torch.randn(6, IN).double()
    run(x).square().sum().backward()
    found = model.weight.grad
    model.weight.grad = None
    model(x).square().sum().backward()
    expected = torch.zeros_like(model.weight)
    for block in blocks:
        for r in block.rects():
            expected[r.r0 : r.r1, r.c0 : r.c1] = model.weight.grad[r.r0 : r.r1, r.c0 : r.c1]
    assert_close(found, expected, 1e-12)


def test_a_weight_frozen_after_the_partition_stays_frozen():
    model = nn.Linear(IN, OUT)
    part = Partition(rows("weight", even(OUT, 4)), model)
    model.weight.requires_grad_(False)
    Gate(model, part).apply(some(4))
    model(torch.randn(3, IN)).sum().backward()
    assert model.weight.grad is None
    assert model.bias.grad is not None


def test_differentiating_twice_is_refused_with_a_reason():
    model = nn.Linear(IN, OUT)
    Gate(model, Partition(rows("weight", even(OUT, 4)), model)).apply(some(4))
    x = torch.randn(3, IN, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize(("dim", "trained"), [(0, 10), (1, 6)])
def test_operations_are_those_of_the_slices_that_train(dim, trained):
    tokens = 30
    model = nn.Linear(IN, OUT)
    gate = Gate(model, Partition(rows("weight", even(model.weight.shape[dim], 4), dim), model))
    gate.apply([True, False, False, False])
    x = torch.randn(tokens, IN, requires_grad=True)
    with flops.count() as counter:
        model(x).sum().backward()
    product = 2 * tokens * IN * OUT
    share = trained * (IN if dim == 0 else OUT)
    assert counter.total == 2 * product + 2 * tokens * share


@pytest.mark.parametrize(
    ("units", "features"),
    [
        (rows("weight", even(OUT, 4)), IN),
        (rows("weight", even(IN, 4), 1), IN // 4),
        (rows("weight", even(IN, IN), 1), 1),
        ([unit("weight", Slice("weight")), unit("none", Slice("bias"))], 0),
    ],
    ids=["rows", "columns", "single columns", "whole"],
)
def test_saved_bytes_are_those_that_the_slices_need(units, features):
    tokens = 16
    model = nn.Linear(IN, OUT)
    gate = Gate(model, Partition(units, model))
    gate.apply([i == (1 if features == 0 else 0) for i in range(len(units))])
    x = torch.randn(tokens, IN, requires_grad=True)
    with SavedBytes(model) as saved:
        model(x)
    assert saved.total == tokens * features * 4


def test_everything_resting_below_an_input_without_gradient_leaves_no_graph():
    model = nn.Linear(IN, OUT)
    units = [unit("all", Slice("weight"), Slice("bias"))]
    Gate(model, Partition(units, model)).apply([False])
    assert not model(torch.randn(3, IN)).requires_grad


def test_a_subclass_with_its_own_forward_is_not_mistaken_for_a_linear_layer():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Renamed(nn.Linear):
        pass

    units = rows("weight", even(OUT, 4))
    x = torch.randn(3, IN)
    assert check(Doubled(IN, OUT), units, some(4), lambda m: m(x)).in_full == ("weight",)
    assert check(Renamed(IN, OUT), units, some(4), lambda m: m(x)).in_full == ()


def test_a_conv1d_with_parameters_of_its_own_gets_its_gradient_in_full():
    model = layer("conv1d", torch.float64)
    model.extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    units = [*rows("weight", even(IN, 2)), unit("extra", Slice("extra"))]
    gate = Gate(model, Partition(units, model))
    gate.apply([True, False, False])
    assert gate.in_full == ("weight",)


def test_complex_weights_get_their_gradient_in_full():
    model = nn.Linear(IN, OUT, dtype=torch.complex64)
    gate = Gate(model, Partition(rows("weight", even(OUT, 4)), model))
    gate.apply(some(4))
    assert gate.in_full == ("weight",)
    model(torch.randn(3, IN, dtype=torch.complex64)).abs().sum().backward()
    assert not model.weight.grad[10:20].any()
    assert model.weight.grad[:10].any()
