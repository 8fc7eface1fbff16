"""Whole parameters of any layer rest; parts that no rule knows are right, if not cheap."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mat import flops
from lightning_mat.gate import Gate, fallback, register_gate_rule, rules
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice
from tests.gate.cases import SavedBytes, check, even, rows, some, unit

X = torch.linspace(-1, 1, 2 * 5 * 8, dtype=torch.float64).view(2, 5, 8)
IMAGE = torch.linspace(-1, 1, 2 * 4 * 36, dtype=torch.float64).sin().view(2, 4, 6, 6)
TOKENS = torch.tensor([[1, 2, 3], [3, 0, 2]])

WHOLE = {
    "layernorm": (lambda: nn.LayerNorm(8), X, ["weight", "bias"]),
    "rmsnorm": (lambda: nn.RMSNorm(8), X, ["weight"]),
    "batchnorm": (lambda: nn.BatchNorm2d(4), IMAGE, ["weight", "bias"]),
    "groupnorm": (lambda: nn.GroupNorm(2, 4), IMAGE, ["weight", "bias"]),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), IMAGE, ["weight", "bias"]),
    "prelu": (lambda: nn.PReLU(), X, ["weight"]),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3), IMAGE, ["weight", "bias"]),
    "embedding": (lambda: nn.Embedding(6, 8, padding_idx=0), TOKENS, ["weight"]),
    "lstm": (lambda: nn.LSTM(8, 6), X, ["weight_ih_l0", "bias_hh_l0"]),
    "bilinear": (lambda: nn.Bilinear(8, 8, 3), X, ["weight"]),
}


def first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def call(model: nn.Module, x: Tensor) -> Tensor:
    return first(model(x, x) if isinstance(model, nn.Bilinear) else model(x))


# Layers with a gate rule: gradients through a part of them can be cut.
RULED = ("layernorm", "rmsnorm", "batchnorm", "groupnorm", "transposed", "embedding", "convolution")


@pytest.mark.parametrize("name", WHOLE)
def test_whole_parameters_of_any_layer_rest(name):
    build, x, names = WHOLE[name]
    model = build().double()
    units = [unit(n, Slice(n)) for n in names]
    x = x.clone().requires_grad_(x.is_floating_point())
    inputs = [x] if x.requires_grad else []
    for active in ([False] * len(units), [i == 0 for i in range(len(units))]):
        check(model, units, active, lambda m: call(m, x), inputs).remove()


@pytest.mark.parametrize("name", WHOLE)
def test_parts_of_any_layer_rest(name):
    build, x, names = WHOLE[name]
    model = build().double()
    size = dict(model.named_parameters())[names[0]].shape[0]
    units = rows(names[0], even(size, size))
    gate = check(model, units, [i == 1 for i in range(size)], lambda m: call(m, x))
    assert gate.in_full == ((names[0],) if size > 1 and name not in RULED else ())


@pytest.mark.parametrize("name", ["lstm", "bilinear"])
def test_gradients_through_a_part_of_an_unknown_layer_cannot_be_cut(name):
    build, _, names = WHOLE[name]
    model = build()
    size = dict(model.named_parameters())[names[0]].shape[0]
    with pytest.raises(ValueError, match="no gate rule knows"):
        Gate(model, Partition(rows(names[0], even(size, size)), model), "units")
    assert "forward" not in model.__dict__


def test_what_a_rule_declines_is_refused_before_training():
    model = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    units = [unit("head.0", Slice("in_proj_weight", 0, 0, 4)), unit("rest", Slice("bias_k"))]
    with pytest.raises(ValueError, match="in_proj_weight.*MultiheadAttention"):
        Gate(model, Partition(units, model), "units")
    assert "forward" not in model.__dict__


class Scaled(nn.Module):
    """A path around a parameter that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * x.tanh()


def test_a_module_that_no_rule_knows_is_not_taken_for_a_constant():
    model = Scaled()
    part = Partition([unit("all", Slice("scale"))], model)
    with pytest.raises(ValueError, match="Scaled"):
        Gate(model, part, "units")


@pytest.mark.parametrize("skip", ["weights", "units"])
@pytest.mark.parametrize("name", RULED)
def test_checkpoints_copies_and_pickles_work_with_every_rule(name, skip):
    build, x, names = WHOLE[name]
    model = build().double()
    size = dict(model.named_parameters())[names[0]].shape[0]
    units = rows(names[0], even(size, size))
    x = x.clone().requires_grad_(x.is_floating_point())

    def run(m: nn.Module) -> Tensor:
        return checkpoint(m, x, use_reentrant=False)

    gate = check(model, units, some(size), run, [x] if x.requires_grad else [], 1e-9, skip=skip)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    gate.remove()
    for m in (model, *twins):
        m(x).square().sum().backward()
    for twin in twins:  # which carry no gate
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)


def test_what_rests_whole_is_not_computed():
    model = nn.ConvTranspose2d(4, 3, 3)
    gate = Gate(model, Partition([unit("all", Slice("weight"))], model))
    x = torch.randn(2, 4, 6, 6, requires_grad=True)

    def counted(active: bool) -> int:
        gate.apply([active])
        with flops.count() as counter:
            model(x).sum().backward()
        return counter.total

    assert counted(False) * 3 == counted(True) * 2


def test_what_rests_whole_saves_no_input():
    model = nn.Bilinear(8, 8, 3)
    gate = Gate(model, Partition([unit("all", Slice("weight"))], model))
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    gate.apply([False])
    with SavedBytes(model) as saved:
        model(a, b)
    assert saved.total == 0


ATTENTION = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]


@pytest.mark.parametrize("resting", [ATTENTION, ATTENTION[:1], ATTENTION[2:], ATTENTION[1:3]])
def test_packed_attention_rests_whole(resting):
    model = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = X.clone().requires_grad_()
    units = [unit(name, Slice(name)) for name in ATTENTION]
    active = [n not in resting for n in ATTENTION]
    check(model, units, active, lambda m: m(x, x, x)[0], [x], exact=False)


def test_packed_attention_at_rest_computes_input_gradients_only():
    model = nn.MultiheadAttention(8, 2, batch_first=True).double()
    gate = Gate(model, Partition([unit("all", *map(Slice, ATTENTION))], model))
    x = X.clone().requires_grad_()

    def counted(active: bool) -> int:
        gate.apply([active])
        with flops.count() as counter:
            model(x, x, x, need_weights=False)[0].sum().backward()
        return counter.total

    assert counted(True) - counted(False) == 2 * 10 * 4 * 8 * 8


def test_heads_of_packed_attention_are_right():
    model = nn.MultiheadAttention(8, 2, batch_first=True).double()
    heads = [
        unit(
            f"head.{h}",
            *(Slice("in_proj_weight", 0, i + 4 * h, i + 4 * h + 4) for i in (0, 8, 16)),
            Slice("out_proj.weight", 1, 4 * h, 4 * h + 4),
        )
        for h in range(2)
    ]
    x = X.clone().requires_grad_()
    gate = check(model, heads, [False, True], lambda m: m(x, x, x)[0], [x])
    assert gate.in_full == ()
    assert "forward" not in model.out_proj.__dict__  # which nobody would call


class Tied(nn.Module):
    """An embedding whose weight is the decoder's, and a linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.mix = nn.Linear(8, 8)
        self.decode = nn.Linear(8, 6)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(self.mix(self.mix(self.embed(tokens)).tanh()))


@pytest.mark.parametrize(
    "active", [[False, False, True], [True, False, False], [False, True, False]]
)
def test_tied_weights_and_shared_modules_sum_both_uses(active):
    model = Tied().double()
    units = [
        unit("vocabulary", Slice("decode.weight", 0, 1, 4)),
        *rows("mix.weight", even(8, 2)),
    ]
    check(model, units, active, lambda m: m(TOKENS))


def test_tied_weights_rest_whole_in_every_module():
    model = Tied().double()
    units = [unit("all", Slice("embed.weight")), unit("mix", Slice("mix.weight", 1, 0, 3))]
    gate = check(model, units, [False, False], lambda m: m(TOKENS))
    with SavedBytes(model) as saved:
        F.linear(X.requires_grad_(False), model.decode.weight.detach())
    assert saved.total == 0
    assert gate.in_full == ()


class Outside(nn.Module):
    """Uses the weight of a submodule without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        out = F.linear(x, self.fc.weight) * self.scale
        return out + self.fc(x) if both else out


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(
    "units", [rows("fc.weight", even(6, 3)), [unit("all", Slice("fc.weight"))]]
)
def test_parameters_used_outside_of_their_module_rest_too(units, both):
    check(Outside().double(), units, some(len(units) + 1)[1:], lambda m: m(X, both))


def test_a_gradient_from_outside_after_one_from_the_rule_is_not_taken_for_clean():
    """Autograd may sum in place, into the very tensor that the rule delivered."""
    model = Outside().double()
    with Gate(model, Partition(rows("fc.weight", even(6, 3)), model)) as gate:
        gate.apply(some(3))
        for order in (0, 1):
            parts = [model.fc(X).sum(), F.linear(X, model.fc.weight).square().sum()]
            (parts[order] + parts[1 - order]).backward()
            assert not model.fc.weight.grad[2:4].any()
            assert bool(model.fc.weight.grad[:2].all())
            model.zero_grad()


def test_what_saves_nothing_is_logged_once(caplog):
    fallback._noted.clear()
    model = Outside().double()
    slopes = nn.ModuleList([nn.PReLU(4), nn.PReLU(4)])
    with caplog.at_level(logging.INFO, logger="lightning_mat"):
        for _ in range(2):
            check(model, [unit("all", Slice("fc.weight"))], [False], lambda m: m(X)).remove()
        units = rows("0.weight", even(4, 2)) + rows("1.weight", even(4, 2))
        Gate(slopes, Partition(units, slopes)).apply([True, False, True, False])
    messages = [record.getMessage() for record in caplog.records]
    assert sum("'fc.weight' rests, but a gradient arrived" in m for m in messages) == 1
    assert sum("no gate rule for a part of '0.weight' in PReLU" in m for m in messages) == 1
    assert len(messages) == 2


def test_exceptions_inside_forward_give_the_parameters_back():
    model = nn.LayerNorm(8)
    weight = model.weight
    Gate(model, Partition([unit("all", Slice("weight"))], model)).apply([False])
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 7))
    assert model.weight is weight


def test_a_parametrized_weight_rests_whole_and_in_part():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)).double()
    names = [n for n, _ in model.named_parameters()]
    assert "parametrizations.weight.original1" in names
    x = X.clone().requires_grad_()
    name = "parametrizations.weight.original1"
    for units in ([unit("all", Slice(name))], rows(name, even(6, 3))):
        check(model, units, some(len(units) + 1)[1:], lambda m: m(x), [x]).remove()


def test_a_rule_of_ones_own_is_used_and_may_decline():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    calls = []

    def rule(module, rests):
        if len(rests["weight"].blocks) != 1:
            return None

        def run(x: Tensor) -> Tensor:
            calls.append(x)
            ((start, stop),) = rests["weight"].blocks[0].rows
            fixed = module.weight.detach()
            parts = fixed[:start], module.weight[start:stop], fixed[stop:]
            return x * torch.cat(parts)

        return run

    register_gate_rule(Scale, rule)
    try:
        units = rows("weight", even(8, 4))
        check(Scale(), units, [False, True, True, False], lambda m: m(X)).remove()
        assert len(calls) == 1
        check(Scale(), [unit("all", Slice("weight"))], [False], lambda m: m(X))
        assert len(calls) == 1
    finally:
        del rules._entries[Scale.forward]


@pytest.mark.parametrize(
    ("layer", "rule", "message"),
    [
        (nn.Linear(2, 2), None, r"layer must be a class of layers, got one Linear: pass type"),
        (dict, None, "layer must be a class of torch.nn.Module, got dict"),
        (3, None, "layer must be a class, its full name or a function of a module, got 3"),
        (nn.Identity, "linear", r"rule must be a function rule\(module, rests\) or None, got 'lin"),
        (nn.Identity, nn.Linear, r"rule must be a function rule\(module, rests\) or None"),
    ],
)
def test_what_is_no_layer_and_what_is_no_rule_are_refused(layer, rule, message):
    before = dict(rules._entries), dict(rules._alike)
    with pytest.raises(TypeError, match=message):
        register_gate_rule(layer, rule)
    with pytest.raises(TypeError, match="static must be a lightning_mat"):
        register_gate_rule(nn.Identity, static="graph")
    assert (rules._entries, rules._alike) == before
