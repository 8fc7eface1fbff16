"""Partly: what a resting neuron does not pass on is neither saved nor computed, nor seen."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mat.gate import Gate
from lightning_mat.gate.partly import Partly
from lightning_mat.gate.selection import Selection
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice, Unit
from tests.gate.cases import SavedBytes, check

IN, HIDDEN, BLOCKS = 5, 16, 4
X = torch.linspace(-2, 2, 3 * 4 * IN, dtype=torch.float64).sin().view(3, 4, IN)


class Network(nn.Module):
    """A feed-forward network with any function between its two layers."""

    def __init__(self, between, factor: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(IN, factor * HIDDEN)
        self.second = nn.Linear(HIDDEN, IN)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, HIDDEN))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, self.first(x)))


class Gated(nn.Module):
    """A gated network: the product of two layers' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(IN, HIDDEN, bias=False)
        self.first = nn.Linear(IN, HIDDEN)
        self.second = nn.Linear(HIDDEN, IN)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.gate(x)) * self.first(x))


def blocks(model: nn.Module) -> list[Unit]:
    width = HIDDEN // BLOCKS
    found = []
    for i in range(BLOCKS):
        a, b = i * width, (i + 1) * width
        slices = [Slice("second.weight", 1, a, b)]
        for start in range(0, model.first.out_features, HIDDEN):
            slices += [Slice(f"first.{p}", 0, start + a, start + b) for p in ("weight", "bias")]
        if isinstance(model, Gated):
            slices.append(Slice("gate.weight", 0, a, b))
        found.append(Unit(f"ffn.{i}", "ffn", "net", tuple(slices)))
    return found


def halves(model, h):
    gate, value = h.chunk(2, dim=-1)
    return F.gelu(gate) * value


class Cube(torch.autograd.Function):
    """A function of one's own, which no tensor subclass hears of."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


BETWEEN = {
    "a function of one's own": lambda m, h: Cube.apply(h),
    "and read twice": lambda m, h: Cube.apply(h) + F.gelu(h) + h.sum(-1, keepdim=True),
    "changed in place in between": lambda m, h: F.gelu(h.mul_(2)) + h,
    "changed in place in the end": lambda m, h: F.gelu(h).add_(1),
    "gelu": lambda m, h: F.gelu(h),
    "gelu tanh": lambda m, h: F.gelu(h, approximate="tanh"),
    "relu": lambda m, h: F.relu(h),
    "relu in place": lambda m, h: F.relu(h, inplace=True),
    "relu_ whose result nobody takes": lambda m, h: (h.relu_(), h)[1],
    "module": lambda m, h: nn.SiLU()(h),
    "squared relu": lambda m, h: F.relu(h) ** 2,
    "nothing": lambda m, h: h,
    "dropout": lambda m, h: F.dropout(F.gelu(h), 0.5),
    "dropout in eval": lambda m, h: F.dropout(F.gelu(h), 0.5, training=False),
    "dropout in place": lambda m, h: F.dropout(F.gelu(h), 0.5, inplace=True),
    "scaled by a parameter": lambda m, h: F.gelu(h) * m.scale,
    "a number from the left": lambda m, h: 2.0 * torch.tanh(h) - 0.1,
    "swish by hand": lambda m, h: h * torch.sigmoid(1.702 * h),
    "normalised": lambda m, h: F.layer_norm(F.gelu(h), (HIDDEN,)),
    "read twice": lambda m, h: F.gelu(h) + h.mean(-1, keepdim=True),
    "turned": lambda m, h: F.gelu(h).transpose(0, 1).contiguous().transpose(0, 1),
    "through another layer's bias": lambda m, h: torch.add(h, m.first.bias),
    "sizes asked": lambda m, h: F.relu(h.view(*h.shape[:-1], h.size(-1))) / h.dim(),
}


@pytest.mark.parametrize("active", [[False, True, False, True], [True, False, False, False]])
@pytest.mark.parametrize("name", BETWEEN)
def test_any_function_between_the_layers(name, active):
    torch.manual_seed(0)
    model = Network(BETWEEN[name]).double()
    x = X.clone().requires_grad_()
    check(model, blocks(model), active, lambda m: m(x), [x], skip="units")


@pytest.mark.parametrize("name", BETWEEN)
def test_units_of_rows_alone_whose_result_somebody_else_reads(name):
    """No second layer cuts the same features: what is added or multiplied keeps its gradients."""
    torch.manual_seed(0)
    model = Network(BETWEEN[name]).double()
    width = HIDDEN // BLOCKS
    runs = [(i * width, (i + 1) * width) for i in range(BLOCKS)]
    units = [
        Unit(f"ffn.{a}", "ffn", "", (Slice("first.weight", 0, a, b), Slice("first.bias", 0, a, b)))
        for a, b in runs
    ]
    x = X.clone().requires_grad_()
    check(model, units, [True, False, False, True], lambda m: m(x), [x], skip="units")


def test_a_residual_path_keeps_its_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN)).double()
    units = [
        Unit(f"ffn.{i}", "ffn", "", (Slice("1.weight", 0, i, i + 1), Slice("1.bias", 0, i, i + 1)))
        for i in range(IN)
    ]
    x = X.clone().requires_grad_()
    active = [True, False, True, False, False]
    check(model, units, active, lambda m: m[0](x) + m(x), [x], skip="units").remove()
    check(model, units, active, lambda m: m(x) * m[0].weight.sum(), [x], skip="units")


def test_a_hook_that_would_see_a_part_is_refused():
    model, _ = gated_network()
    hidden = model.first(X)
    hidden.register_hook(lambda grad: None)
    model.second(F.gelu(hidden))
    other = model.first(X)
    model.second(F.gelu(other))
    with pytest.raises(RuntimeError, match="before the tensor is used"):
        other.retain_grad()


@pytest.mark.parametrize("active", [[False, True, False, True], [False, False, False, True]])
def test_gated_networks(active):
    torch.manual_seed(0)
    x = X.clone().requires_grad_()
    for model in (Gated().double(), Network(halves, factor=2).double()):
        check(model, blocks(model), active, lambda m: m(x), [x], skip="units")


def saved_between(model: nn.Module, active: list[bool]) -> int:
    with Gate(model, Partition(blocks(model), model), skip="units") as gate:
        gate.apply(active)
        with SavedBytes(model) as saved:
            model(X)
    return saved.total


@pytest.mark.parametrize("build", [lambda: Network(BETWEEN["gelu"]), Gated])
def test_activations_of_resting_neurons_are_not_saved(build):
    model = build().double()
    three, one = (saved_between(model, [i < n for i in range(BLOCKS)]) for n in (3, 1))
    per_neuron = X[..., 0].numel() * 8
    # The pre-activations and the second layer's input; of a gated network also both factors.
    tensors = 2 if isinstance(model, Network) else 4
    assert three - one == tensors * 2 * (HIDDEN // BLOCKS) * per_neuron


def gated_network(between=BETWEEN["gelu"]) -> tuple[Network, Gate]:
    model = Network(between).double()
    gate = Gate(model, Partition(blocks(model), model), skip="units")
    gate.apply([True, False, False, True])
    return model, gate


def test_hooks_see_tensors_and_their_gradients():
    model, _ = gated_network()
    seen = {}

    def keep(module, args, out):
        seen["out"] = out.detach().clone()
        out.register_hook(lambda grad: seen.setdefault("grad", grad))

    model.first.register_forward_hook(keep)
    model(X).sum().backward()
    assert type(seen["out"]) is Tensor
    assert torch.equal(seen["out"], F.linear(X, model.first.weight, model.first.bias))
    assert seen["grad"].shape == (3, 4, HIDDEN)
    assert not seen["grad"][..., 4:12].any()
    assert seen["grad"][..., :4].all()


def test_it_is_a_tensor_that_says_that_it_has_gradients():
    full, part = torch.zeros(2, 4), torch.zeros(2, 2, requires_grad=True)
    x = Partly.make(full, part, Selection([(1, 3)], 4, torch.device("cpu")))
    assert isinstance(x, Tensor)
    assert (x.shape, x.dim(), x.dtype, len(x), x.requires_grad) == ((2, 4), 2, full.dtype, 2, True)
    assert type(x + torch.ones(5, 2, 4)) is Partly
    assert type(x.sum()) is Tensor
    (grad,) = torch.autograd.grad((x * torch.arange(4.0)).sum(), part)
    assert grad.tolist() == [[1, 2], [1, 2]]
    assert type(copy.deepcopy(x.detach())) is Tensor


def test_without_gradients_it_is_an_ordinary_tensor():
    model, _ = gated_network(lambda m, h: (h.detach().clone(), F.gelu(h))[1])
    with torch.no_grad():
        assert type(model.first(X)) is Tensor
    assert Partly.make(X, X, Selection([(0, 1)], IN, X.device)) is X


@pytest.mark.parametrize("skip", ["weights", "units"])
def test_checkpointed_networks(skip):
    model = Network(BETWEEN["gelu"]).double()
    x = X.clone().requires_grad_()
    check(
        model,
        blocks(model),
        [True, False, False, True],
        lambda m: checkpoint(m, x, use_reentrant=False),
        [x],
        skip=skip,
    )


@pytest.mark.parametrize("skip", ["weights", "units"])
def test_reentrant_checkpoints_are_refused_with_the_reason(skip):
    model = Network(BETWEEN["gelu"]).double()
    with Gate(model, Partition(blocks(model), model), skip=skip) as gate:
        gate.apply([True, False, False, True])
        out = checkpoint(model, X.clone().requires_grad_(), use_reentrant=True)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            out.sum().backward()


def test_autocast_equals_plain_autocast():
    model = Network(BETWEEN["gelu"])
    x = X.float()

    def gradients() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.float().sum().backward()
        return out.detach(), model.first.weight.grad.clone()

    plain_out, plain = gradients()
    with Gate(model, Partition(blocks(model), model), skip="units") as gate:
        gate.apply([True, False, False, True])
        out, grad = gradients()
    assert torch.equal(out, plain_out)
    torch.testing.assert_close(grad[:4], plain[:4], rtol=2e-2, atol=1e-3)
    assert not grad[4:12].any()
