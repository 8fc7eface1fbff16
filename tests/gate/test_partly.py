"""Partly: what a resting neuron does not pass on is neither saved nor computed, nor seen."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples.models.bert import BertConfig, SelfAttention
from lightning_mat.gate import Gate
from lightning_mat.gate.partly import Partly
from lightning_mat.gate.reshaping import _features
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
    "cut into heads and joined": lambda m, h: F.gelu(h).unflatten(-1, (4, 4)).flatten(-2),
    "heads in front": lambda m, h: (
        F.gelu(h.view(3, 4, 4, 4).transpose(1, 2)).permute(0, 2, 1, 3).reshape(3, 4, HIDDEN)
    ),
    "heads of a head": lambda m, h: F.gelu(h.view(3, 4, 2, 2, 4)).reshape(3, 4, HIDDEN),
    "heads that cut through blocks": lambda m, h: F.gelu(h.unflatten(-1, (2, 8))).flatten(-2),
    "heads inside": lambda m, h: F.gelu(h.view(3, 4, 4, 4).transpose(2, 3)).mT.flatten(2),
    "tokens in one": lambda m, h: F.gelu(h.flatten(0, 1).view(1, 12, HIDDEN)).view(3, 4, HIDDEN),
    "a view, then changed in place": lambda m, h: (
        (v := h.unflatten(-1, (4, 4))),
        h.mul_(2),
        F.gelu(v).flatten(-2),
    )[-1],
    "a view that is changed in place": lambda m, h: (h.unflatten(-1, (4, 4)).mul_(2), F.gelu(h))[1],
    "a part of a view changed in place": lambda m, h: (
        ((v := h.unflatten(-1, (4, 4)).transpose(0, 1)), v[:, :1].mul_(2), F.gelu(v))[-1]
        .transpose(0, 1)
        .flatten(-2)
    ),
    "bits read as another type": lambda m, h: h.view(torch.int64).view(torch.float64),
    "its memory, changed behind autograd": lambda m, h: (
        (v := h.unflatten(-1, (4, 4))),
        h.data.mul_(2),
        F.gelu(v).flatten(-2),
    )[-1],
    "dropout that is off": lambda m, h: torch.dropout(F.gelu(h), p=0.5, train=False),
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


@pytest.mark.parametrize(
    ("old", "new", "axis", "expected"),
    [
        ((2, 12), (2, 3, 4), 1, ([(1, 2)], 1)),
        ((2, 12), (2, 6, 2), 1, ([(2, 4)], 1)),
        ((2, 12), (2, 2, 6), 1, None),
        ((2, 12), (1, 2, 1, 12, 1), 1, ([(4, 8)], 3)),
        ((2, 12), (24,), 1, None),
        ((12, 2), (24,), 0, ([(8, 16)], 0)),
        ((2, 12, 5), (2, 60), 1, ([(20, 40)], 1)),
        ((2, 1, 12), (2, 12), 1, None),
        ((12, 4), (6, 8), 0, None),
        ((3, 4, 12), (2, 6, 12), 2, ([(4, 8)], 2)),
    ],
)
def test_features_in_another_shape(old, new, axis, expected):
    """Rows 4 to 7 of 12 are followed, or nothing is claimed."""
    runs = [(0, 1)] if old[axis] == 1 else [(4, 8)]
    found = _features(Selection(runs, old[axis], X.device), old, axis, new)
    assert expected == (None if found is None else (list(found[0].runs), found[1]))
    if found is not None:
        marks = torch.zeros(old)
        marks.narrow(axis, 4, 4).fill_(1)
        marks = marks.view(new).movedim(found[1], 0)
        chosen = torch.zeros(len(marks))
        found[0].put(torch.ones(len(found[0])), chosen, 0)
        assert torch.equal(marks, chosen.view(-1, *[1] * (marks.dim() - 1)).expand_as(marks))


def test_heads_reach_attention_and_its_projection_without_a_copy_of_all():
    """Nothing is merged, and no gradient has the size of all heads."""
    attention = SelfAttention(BertConfig(1, 256, 10, 8, 0.0)).double()
    units = [
        Unit(
            f"head.{i}",
            "head",
            "",
            (
                *(
                    Slice(f"{name}.{p}", 0, 64 * i, 64 * i + 64)
                    for name in ("query", "key", "value")
                    for p in ("weight", "bias")
                ),
                Slice("out.weight", 1, 64 * i, 64 * i + 64),
            ),
        )
        for i in range(4)
    ]
    x = torch.linspace(-1, 1, 2 * 5 * 256, dtype=torch.float64).sin().view(2, 5, 256)
    x.requires_grad_()
    check(
        attention, units, [False, True, False, False], lambda m: m(x), [x], skip="units", floor=1e-2
    ).remove()
    with Gate(attention, Partition(units, attention), skip="units") as gate:
        gate.apply([False, True, False, False])
        out = attention(x)
        names, seen = set(), [out.grad_fn]
        while seen:
            node = seen.pop()
            names.add(type(node).__name__)
            seen += [n for n, _ in node.next_functions if n is not None]
    assert "PartialLinearBackward" in names
    assert names.isdisjoint({"MergeBackward", "TakeHeadsBackward"})


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


def test_the_gradient_of_what_was_used_is_refused_and_of_a_view_is_whole():
    model, _ = gated_network()
    hidden = model.first(X)
    heads = hidden.view(3, 4, 4, 4).transpose(1, 2)
    hidden.register_hook(lambda grad: None)  # a view alone has used nothing
    loss = model.second(F.gelu(heads).transpose(1, 2).flatten(-2)).sum() + hidden.mean()
    (found,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (expected,) = torch.autograd.grad(loss, hidden.merged())
    assert torch.equal(found, expected)
    assert found[..., :4].all()

    other = model.first(X)
    loss = model.second(F.gelu(other.view(3, 4, 4, 4)).flatten(-2)).sum()
    with pytest.raises(RuntimeError, match="grad on the output of a gated layer"):
        torch.autograd.grad(loss, other)
    with pytest.raises(RuntimeError, match="before the tensor is used"):
        other.register_hook(lambda grad: None)


class Stop(torch.autograd.Function):
    """Passes no gradient on, which is not the same as zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("skip", ["weights", "units"])
def test_no_gradient_is_none_for_a_gated_layer_too(skip):
    model = Network(lambda m, h: h).double()
    with Gate(model, Partition(blocks(model), model), skip=skip) as gate:
        gate.apply([True, False, False, True])
        Stop.apply(model(X)).sum().backward()
        Stop.apply(model.first(X)).sum().backward()
    assert model.second.weight.grad is None
    assert model.first.weight.grad is None


def test_a_checkpoint_may_read_a_part_in_both_ways():
    """Recomputation takes the way that the first pass took."""
    model, _ = gated_network()

    def scaled(q: Tensor) -> Tensor:
        return q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1)

    gradients = []
    for around in (False, True):
        model.zero_grad()
        q = model.first(X).view(3, 4, 4, 4).transpose(1, 2)
        out = checkpoint(scaled, q, use_reentrant=False) if around else scaled(q)
        out.sum().backward()
        gradients.append(model.first.weight.grad)
    torch.testing.assert_close(*gradients)


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
