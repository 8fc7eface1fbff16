"""A gate beside what else people do with their models: wrappers, subclasses, exchanged weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mat.gate import Gate
from lightning_mat.units import partition
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice, Unit
from tests.gate.cases import assert_close, even, rows, unit
from tests.gate.mixtures import WIDTH, Stack
from tests.gate.test_experts import Detached


def gradients(run: Callable[[], Tensor], model: nn.Module, *others: Tensor) -> list[Tensor | None]:
    """Return the gradients of a model's parameters, and of other tensors."""
    wanted = [*model.parameters(), *others]
    return list(torch.autograd.grad(run().square().sum(), wanted, allow_unused=True))


class Tenfold(Tensor):
    """A weight that is ten times what its memory holds, as quantised ones may be."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            plain = [a.as_subclass(Tensor) * 10 if isinstance(a, Tenfold) else a for a in args]
            return func(*plain, **(kwargs or {}))


def test_weights_of_other_subclasses_are_asked() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)
            self.scale = torch.ones(3, 4).as_subclass(Tenfold)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.relu(self.fc(x)), self.scale)

    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(2, 4, dtype=torch.float64)
    model.scale = torch.ones(3, 4, dtype=torch.float64).as_subclass(Tenfold)
    plain = model(x)
    with Gate(model, Partition(rows("fc.weight", even(4, 2)), model), skip="units") as gate:
        gate.apply([True, False])
        assert_close(model(x), plain, 1e-12)
        model(x).sum().backward()
    assert model.fc.weight.grad is not None
    assert not model.fc.weight.grad[2:].any()


def test_a_layer_in_part_before_stacked_experts_that_rest() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.fc = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
            self.experts = Detached(biases=False, turned=False)
            self.experts.active = [True] * 4

        def forward(self, x: Tensor, cut: bool = False) -> Tensor:
            index = torch.arange(2 * len(x)).view(-1, 2) % 4
            x = self.fc(self.below(x))
            if cut:  # of the layer the second half, of the experts all but one
                x = torch.cat([x[:, : WIDTH // 2], x[:, WIDTH // 2 :].detach()], 1)
            self.experts.active = [True, *[not cut] * 3]
            return self.experts(x, index, torch.ones(len(x), 2).to(x))

    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(8, WIDTH, dtype=torch.float64)
    experts = partition(model, "experts").units
    part = Partition([*experts, *rows("fc.weight", even(WIDTH, 2))], model)
    active = [True, False, False, False, True, False]
    with Gate(model, part, skip="units") as gate:
        gate.apply(active)
        found = gradients(lambda: model(x), model.below)
    expected = gradients(lambda: model(x, cut=True), model.below)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-12)


class Mixed(nn.Module):
    """Experts as modules, behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Linear(4, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        return self.experts[0](x) + self.experts[1](x)


class Attends(nn.Module):
    """Attention that owns no parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))
        self.num_heads = 2
        self.checkpointed = False

    def core(self, *projected: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in projected)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.checkpointed:
            return self.out_proj(checkpoint(self.core, *projected, use_reentrant=False))
        return self.out_proj(self.core(*projected))


@pytest.mark.parametrize("make", [Mixed, Attends])
def test_exchanged_parameters_are_not_gated_inside_experts_and_attention(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": make().double()})
    x = torch.randn(2, 3, 8 if make is Attends else 4, dtype=torch.float64)
    others = {n: p.detach().clone().requires_grad_() for n, p in model["one"].named_parameters()}

    def run() -> list[Tensor | None]:
        out = torch.func.functional_call(model["one"], others, (x,))
        return list(torch.autograd.grad(out.square().sum(), list(others.values())))

    plain = run()
    kind = "heads" if make is Attends else "experts"
    with Gate(model["one"], partition(model["one"], kind), skip="units") as gate:
        gate.apply([True, False])
        for found, expected in zip(run(), plain, strict=True):
            assert_close(found, expected, 1e-12)
        model["one"](x).sum().backward()  # with its own parameters it is
    resting = model["one"].experts[1][0] if make is Mixed else model["one"].q_proj
    grad = resting.weight.grad
    assert grad is None if make is Mixed else not grad[4:].any()


def test_attention_that_checkpoints_its_core_is_cut_all_the_same() -> None:
    torch.manual_seed(0)
    model = Attends().double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for model.checkpointed in (False, True):
        with Gate(model, partition(model, "heads"), skip="units") as gate:
            gate.apply([True, False])
            found.append(gradients(lambda: model(x), model, x))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-12)


class Functional(nn.Module):
    """A feed-forward network that may use its weights without calling their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
        self.calls = False

    def forward(self, x: Tensor) -> Tensor:
        if self.calls:
            return self.fc2(F.gelu(self.fc1(x)))
        x = F.gelu(F.linear(x, self.fc1.weight, self.fc1.bias))
        return F.linear(x, self.fc2.weight, self.fc2.bias)


@pytest.mark.parametrize("whole", [False, True])
def test_a_weight_used_outside_of_its_layer_is_refused_where_gradients_should_be_cut(
    whole: bool,
) -> None:
    model = Functional()
    halves = [(0, 4), (4, 8)]
    units = [
        unit(f"ffn.{i}", Slice("fc1.weight", 0, a, b), Slice("fc2.weight", 1, a, b))
        for i, (a, b) in enumerate(halves)
    ]
    part = Partition(units, model)
    active = [False, False] if whole else [True, False]
    with Gate(model, part, skip="units") as gate:
        gate.apply(active)
        with pytest.raises(RuntimeError, match=r"'fc..weight' is used outside of its module's"):
            model(torch.ones(1, 4)).sum().backward()
        model.calls = True
        gate.apply(active)
        model(torch.ones(1, 4)).sum().backward()
        model.calls = False
    with Gate(model, part) as gate:
        gate.apply(active)
        model(torch.ones(1, 4)).sum().backward()  # right, but in full


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_wrapper_around_a_gated_forward_stays_and_leads_to_the_gate(
    wraps: bool, whole: bool
) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    first = [unit("first", Slice("0.weight"))] if whole else rows("0.weight", even(4, 2))
    part = Partition([*first, unit("second", Slice("1.weight"))], model)
    decisions = [[on] * len(first) + [True] for on in (False, True)] if whole else [
        [True, False, True], [False, True, True]
    ]  # fmt: skip
    plain = model(x)
    gate = Gate(model, part)
    gate.apply(decisions[0])
    inner = model[0].forward

    def threefold(*args: Any) -> Tensor:
        return 3 * inner(*args)

    model[0].forward = functools.wraps(inner)(threefold) if wraps else threefold
    for active in (*decisions, *decisions):
        gate.apply(active)
        model.zero_grad()
        out = model(x)
        assert_close(out, 3 * plain, 1e-12)
        with torch.no_grad():
            assert_close(model(x), 3 * plain, 1e-12)
        out.sum().backward()
        grad = model[0].weight.grad
        trained = [] if grad is None else grad.view(len(first), -1).any(1).tolist()
        assert trained == ([] if not any(active[:-1]) else active[:-1])
    gate.remove()
    assert_close(model(x), 3 * plain, 1e-12)


class Stop(torch.autograd.Function):
    """Passes nothing on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_gradients_that_never_come_are_none() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    with Gate(layer, partition(layer, "heads")) as gate:
        gate.apply([True, False])
        out = layer(x, y, y, need_weights=False)[0]
        (Stop.apply(out).sum() + layer.out_proj.bias.sum()).backward()
    assert layer.in_proj_weight.grad is None

    mixture = nn.ModuleDict({"experts": Stack(biases=False, turned=False)})
    index = torch.arange(8).view(4, 2) % 4
    with Gate(mixture, partition(mixture, "experts")) as gate:
        gate.apply([True, False, True, False])
        out = mixture["experts"](torch.randn(4, WIDTH), index, torch.ones(4, 2))
        (Stop.apply(out).sum() + torch.ones((), requires_grad=True)).backward()
    assert all(p.grad is None for p in mixture.parameters())


def test_scripted_layers_may_be_anywhere() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.ReLU()))
    for skip in ("weights", "units"):
        with Gate(model, Partition(rows("0.weight", even(4, 2)), model), skip=skip) as gate:
            gate.apply([True, False])
            model.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
        grad = model[0].weight.grad
        assert grad is not None
        assert not grad[2:].any()


def test_attention_with_parametrized_weights_rests_in_full() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    nn.utils.parametrizations.spectral_norm(layer.out_proj)
    units = [
        unit(f"{i}", *(Slice("in_proj_weight", 0, a, a + 4) for a in (4 * i, 8 + 4 * i)))
        for i in (0, 1)
    ]
    with Gate(layer, Partition(units, layer)) as gate:
        gate.apply([True, False])
        assert gate.in_full == ("in_proj_weight",)
        layer(*[torch.randn(2, 3, 8)] * 3)[0].sum().backward()
    assert layer.in_proj_weight.grad is not None
    assert not layer.in_proj_weight.grad[4:8].any()


def test_a_chunk_of_channels_that_all_rest_is_a_constant() -> None:
    conv = nn.Conv2d(3, 4, 3, bias=False)
    filters = [Unit(f"{i}", "filter", "", (Slice("weight", 0, 2 * i, 2 * i + 2),)) for i in (0, 1)]
    with Gate(conv, Partition(filters, conv), skip="units") as gate:
        gate.apply([True, False])
        first, second = conv(torch.randn(2, 3, 8, 8)).chunk(2, 1)
        pooled = F.max_pool2d(second, 2)
        assert not pooled.requires_grad
        (F.max_pool2d(first, 2).sum() + pooled.sum()).backward()
    assert conv.weight.grad is not None
    assert not conv.weight.grad[2:].any()


@pytest.mark.parametrize("skip", ["weights", "units"])
def test_norms_take_their_input_by_the_name_of_their_class(skip: str) -> None:
    for norm, name in ((nn.RMSNorm(4), "x"), (nn.LayerNorm(4), "input")):
        with Gate(norm, Partition([unit("n", Slice("weight", 0, 0, 2))], norm), skip=skip) as gate:
            gate.apply([False])
            norm(**{name: torch.randn(2, 4)}).sum().backward()
        assert norm.weight.grad is not None
        assert not norm.weight.grad[:2].any()


def test_forward_mode_derivatives_are_those_of_the_plain_model() -> None:
    model = nn.Linear(4, 4).double()
    x, direction = torch.randn(2, 2, 4, dtype=torch.float64).unbind()
    with Gate(model, Partition(rows("weight", even(4, 2)), model)) as gate:
        gate.apply([True, False])
        with torch.autograd.forward_ad.dual_level():
            out = model(torch.autograd.forward_ad.make_dual(x, direction))
            slope = torch.autograd.forward_ad.unpack_dual(out).tangent
    assert_close(slope, direction @ model.weight.T, 1e-12)


def test_nested_tensors_have_gradients_in_full_or_are_refused() -> None:
    model = nn.Linear(4, 4)
    ragged = [torch.randn(n, 4) for n in (2, 5)]

    def run() -> Tensor:
        x = torch.nested.nested_tensor(ragged, layout=torch.jagged)
        return model(x).values().sum()

    part = Partition(rows("weight", even(4, 2)), model)
    with Gate(model, part) as gate:
        gate.apply([True, False])
        run().backward()
    assert model.weight.grad is not None
    assert_close(model.weight.grad[:2], torch.cat(ragged).sum(0).expand(2, 4), 1e-6)
    assert not model.weight.grad[2:].any()
    with Gate(model, part, skip="units") as gate:
        gate.apply([True, False])
        with pytest.raises(RuntimeError, match='nested tensor: use skip="weights"'):
            run()
