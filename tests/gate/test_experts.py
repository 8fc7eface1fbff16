"""Experts at rest: stacked in one tensor or kept as modules, in every way a mixture runs them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mat import flops
from lightning_mat.gate import Gate, register_gate_rule, rules
from lightning_mat.gate.experts import stacked_rule
from lightning_mat.gate.grouped import Chosen
from lightning_mat.units import partition
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice
from tests.gate.cases import SavedBytes, assert_close, check, unit
from tests.gate.mixtures import (
    DECISIONS,
    INNER,
    SKIPS,
    TOKENS,
    WIDTH,
    Holder,
    Stack,
    mixtral_experts,
    routed,
)
from tests.reference.gate import detached, expected_gradients
from tests.reference.models import mixture
from tests.units.architectures import switch


class Detached(Stack):
    """The same with the outputs of resting experts detached, written down."""

    active: list[bool]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for e in range(4):
            token, place = torch.where(top_k_index == e)
            b = (None, None) if self.up_bias is None else (self.up_bias[e], self.down_bias[e])
            h = F.gelu(self.product(hidden_states[token], self.up_proj[e], b[0]))
            y = self.product(h, self.down_proj[e], b[1])
            y = y if self.active[e] else y.detach()
            out.index_add_(0, token, y * top_k_weights[token, place, None])
        return out


def assert_same(leaf: Tensor, expected: Tensor | None, tolerance: float) -> None:
    """Compare a leaf's gradient, where none is as good as zeros, and drop it."""
    zeros = torch.zeros_like(leaf)
    found, leaf.grad = leaf.grad, None
    assert_close(
        zeros if found is None else found, zeros if expected is None else expected, tolerance
    )


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_experts_taken_out_one_by_one_rest(biases, turned, skip):
    torch.manual_seed(0)
    model = Holder(Stack(biases, turned)).double()
    twin = copy.deepcopy(model)
    part = partition(model, "experts")
    x, index, weights = routed(torch.float64, unused=2)
    for active in DECISIONS:
        twin.experts.__class__ = Detached if skip == "units" else Stack
        twin.experts.active = active
        expected = expected_gradients(
            twin, part, active, lambda: twin(x, index, weights).square().sum()
        )
        wanted = [t.grad for t in (x, weights)]
        x.grad = weights.grad = None
        with Gate(model, part, skip=skip) as gate:
            gate.apply(active)
            out = model(x, index, weights)
            out.square().sum().backward()
            assert gate.in_full == ()
        assert torch.equal(out, twin(x, index, weights))
        for name, param in model.named_parameters():
            assert_close(param.grad, expected[name], 1e-10)
            param.grad = None
        for tensor, grad in zip((x, weights), wanted, strict=True):
            assert_same(tensor, grad, 1e-10)


def test_the_gradient_of_a_stack_is_written_once():
    """Where a plain backward pass adds up a full-size tensor for each expert."""
    model = Holder(Stack(False, False))
    part = partition(model, "experts")
    x, index, weights = routed(torch.float32)
    with Gate(model, part) as gate:
        gate.apply(DECISIONS[0])
        model(x, index, weights).sum().backward()
        address = model.experts.up_proj.grad.data_ptr()
        model.zero_grad()
        model(x, index, weights).sum().backward()
        assert model.experts.up_proj.grad.data_ptr() == address
        assert not model.experts.up_proj.grad[1::2].any()


def test_counted_operations_fall_with_the_experts_at_rest():
    model = Holder(Stack(False, False))
    part = partition(model, "experts")
    x, index, weights = routed(torch.float32)
    sizes = torch.bincount(index.flatten(), minlength=4).tolist()
    product = 2 * 2 * WIDTH * INNER  # both layers, each token
    for active in DECISIONS:
        rested = sum(n for n, on in zip(sizes, active, strict=True) if not on)
        for skip, parts in (("weights", 2), ("units", 1)):
            with Gate(model, part, skip=skip) as gate, flops.count() as counter:
                gate.apply(active)
                model(x, index, weights).sum().backward()
            skipped = 3 * 2 * TOKENS * product - counter.total
            assert skipped == rested * product * (3 - parts)


def test_experts_at_rest_save_no_activations():
    model = Holder(Stack(False, False))
    part = partition(model, "experts")
    x, index, weights = routed(torch.float32)
    with Gate(model, part, skip="units") as gate:
        gate.apply([False] * 4)
        with SavedBytes(model) as saved:
            model(x, index, weights.detach())
        assert saved.total <= 2 * 2 * TOKENS * 8  # which tokens it were, for input and routing


class Whole(Stack):
    """Uses all experts at once."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        up = torch.einsum("td,efd->tef", hidden_states, self.up_proj)
        return torch.einsum("tef,edf->td", up, self.down_proj)


def test_what_uses_all_experts_at_once_is_right_or_refused():
    torch.manual_seed(0)
    model = Holder(Whole(False, False)).double()
    part = partition(model, "experts")
    inputs = routed(torch.float64)
    check(model, part, DECISIONS[0], lambda m: m(*inputs), [inputs[0]]).remove()
    with Gate(model, part, skip="units") as gate:
        gate.apply(DECISIONS[0])
        with pytest.raises(RuntimeError, match="grouped_mm"):
            model(*inputs)
    assert isinstance(model.experts.up_proj, nn.Parameter)


def test_units_of_another_kind_rest_but_pass_gradients_on():
    torch.manual_seed(0)
    model = Holder(Stack(True, False)).double()
    experts = partition(model, "experts").units
    part = Partition([unit(u.name, *u.slices) for u in experts], model)
    layers = Partition([type(u)(u.name, "layer", "", u.slices) for u in part.units], model)
    inputs = routed(torch.float64)
    leaves = [inputs[0], inputs[2]]
    gate = Gate(model, layers, skip="units")
    expected = expected_gradients(
        model, layers, DECISIONS[0], lambda: model(*inputs).square().sum()
    )
    wanted = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    with gate:
        gate.apply(DECISIONS[0])
        model(*inputs).square().sum().backward()
    for name, param in model.named_parameters():
        assert_close(param.grad, expected[name], 1e-10)
    for t, grad in zip(leaves, wanted, strict=True):
        assert_close(t.grad, grad, 1e-10)


def test_a_mixture_of_ones_own_can_be_registered():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 4, 4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x @ self.table[e].T for e in range(3)])

    torch.manual_seed(0)
    model = Holder(Own())
    part = partition(model, "experts")
    x = torch.randn(5, 4, dtype=torch.float64).requires_grad_()
    register_gate_rule(Own, stacked_rule, always=True)
    try:
        for skip in SKIPS:
            gate = Gate(model, part, skip=skip)
            gate.apply([True, False, False])
            (model(x) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)).sum().backward()
            gate.remove()
            ones = torch.ones(5, 4, dtype=torch.float64)
            table = model.experts.table.detach()
            through = [(e + 1.0) * ones @ table[e] for e in range(3 if skip == "weights" else 1)]
            assert_close(x.grad, sum(through), 1e-10)
            assert_close(model.experts.table.grad[0], ones.T @ x.detach(), 1e-10)
            assert not model.experts.table.grad[1:].any()
            model.zero_grad()
            x.grad = None
    finally:
        del rules._entries[Own.forward]


def test_copies_and_pickles_hold_the_parameters():
    model = Holder(Stack(True, True))
    with Gate(model, partition(model, "experts")) as gate:
        gate.apply(DECISIONS[0])
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert isinstance(twin.experts.up_proj, nn.Parameter)
            assert not getattr(twin.experts.forward.__self__, "on", False)


# ---- Hugging Face's implementations --------------------------------------------------------------


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("unused", [None, 0, 3])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_implementations_of_hugging_face(implementation, unused, skip):
    """The oracle runs the loop: its products can be detached one by one."""
    dtype = torch.float64 if implementation == "eager" else torch.float32
    model, loop = (mixtral_experts(name, dtype) for name in (implementation, "eager"))
    part = partition(model, "experts")
    x, index, weights = routed(dtype, unused)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for active in DECISIONS:
        if skip == "weights":
            expected = expected_gradients(
                loop, part, active, lambda: loop(x, index, weights).square().sum()
            )
        else:
            with detached(loop, part, active):
                expected = expected_gradients(
                    loop, part, active, lambda: loop(x, index, weights).square().sum()
                )
        wanted = [t.grad for t in (x, weights)]
        x.grad = weights.grad = None
        plain = model(x, index, weights).detach()
        with Gate(model, part, skip=skip) as gate:
            gate.apply(active)
            out = model(x, index, weights)
            out.square().sum().backward()
        assert torch.equal(out, plain)
        for name, param in model.named_parameters():
            assert_close(param.grad, expected[name], tolerance)
            param.grad = None
        for tensor, grad in zip((x, weights), wanted, strict=True):
            assert_same(tensor, grad, tolerance)


def test_grouped_products_skip_the_experts_at_rest():
    model = mixtral_experts("grouped_mm", torch.float32)
    part = partition(model, "experts")
    x, index, weights = routed(torch.float32)
    sizes = torch.bincount(index.flatten(), minlength=4).tolist()
    product = 2 * 3 * WIDTH * INNER  # gate, up and down
    for skip, parts in (("weights", 1), ("units", 2)):
        with Gate(model, part, skip=skip) as gate, flops.count() as counter:
            gate.apply(DECISIONS[0])
            model(x, index, weights).sum().backward()
        rested = sizes[1] + sizes[3]
        assert 3 * 2 * TOKENS * product - counter.total == rested * product * parts


def test_rows_of_chosen_experts_are_found_without_counting():
    chosen = Chosen([1, 3], 4, torch.device("cpu"))
    offs = torch.tensor([2, 5, 5, 7], dtype=torch.int32)
    order, ends = chosen.rows(offs, 9)  # the last two rows belong to nobody
    assert order.tolist() == [2, 3, 4, 5, 6]
    assert ends.tolist() == [3, 5]


# ---- experts that are modules --------------------------------------------------------------------


@pytest.mark.parametrize("skip", SKIPS)
def test_experts_that_are_modules_rest(skip):
    torch.manual_seed(0)
    case = mixture()
    model = case.model.double()
    part = partition(model, "experts")
    for active in ([True, False, True], [False, False, True], [False] * 3):
        check(model, part, active, case.logits, skip=skip).remove()


@pytest.mark.parametrize("skip", SKIPS)
def test_switch_transformers_rest(skip):
    pytest.importorskip("transformers")
    model, run = switch()
    part = partition(model, "experts")
    for active in ([True, False, False], [False] * 3):
        check(model, part, active, run, skip=skip, floor=1e-6).remove()


class Kernel(torch.autograd.Function):
    """A product with all experts at once that hears of no tensor subclass, as compiled ones do."""

    @staticmethod
    def forward(ctx, x, weights):
        ctx.save_for_backward(x, weights)
        return torch.einsum("ti,eoi->eto", x, weights)

    @staticmethod
    def backward(ctx, grad):
        x, weights = ctx.saved_tensors
        return torch.einsum("eto,eoi->ti", grad, weights), torch.einsum("eto,ti->eoi", grad, x)


class Fused(Stack):
    """A mixture whose first product is a kernel of its own."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return Kernel.apply(hidden_states, self.up_proj).square().sum((0, 2))


@pytest.mark.parametrize("active", DECISIONS[:2])
def test_a_kernel_that_hears_of_no_subclass_loses_no_gradient(active):
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Fused(biases=False, turned=False).double()})
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    index, weights = torch.zeros(TOKENS, 1, dtype=torch.long), torch.ones(TOKENS, 1).double()
    units = [unit(f"expert.{e}", Slice("experts.up_proj", 0, e, e + 1)) for e in range(4)]
    check(model, units, active, lambda m: m["experts"](x, index, weights), [x])
