"""Heads at rest: nn.MultiheadAttention's packed products, and attention of some heads only."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mat import flops
from lightning_mat.gate import Gate
from lightning_mat.gate.heads import Split, SplitAttention
from lightning_mat.gate.look import FirstLook
from lightning_mat.units import partition
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice
from tests.gate.cases import SavedBytes, assert_close, check, even, rows, unit

SKIPS = ["weights", "units"]
DECISIONS = [[True, False, False, True], [False, False, True, False], [False] * 4]
X = torch.linspace(-1, 1, 2 * 5 * 8, dtype=torch.float64).sin().view(2, 5, 8)
Y = torch.linspace(-2, 1, 2 * 3 * 8, dtype=torch.float64).cos().view(2, 3, 8)
PADDING = torch.tensor([[False, True, False, False, False], [False, False, False, False, True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
PER_HEAD = torch.linspace(-1, 1, 8 * 25, dtype=torch.float64).view(8, 5, 5)


def attention(**kwargs: object) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 4, **{"batch_first": True, **kwargs}).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def both(out: tuple[Tensor, Tensor | None]) -> Tensor:
    return torch.cat([x.flatten() for x in out if x is not None])


CALLS = {
    "self": ({}, lambda m, x, y: m(x, x, x)),
    "no weights": ({}, lambda m, x, y: m(x, x, x, need_weights=False)),
    "no bias": ({"bias": False}, lambda m, x, y: m(x, x, x, need_weights=False)),
    "time first": ({"batch_first": False}, lambda m, x, y: m(x, x, x, need_weights=False)),
    "memory": ({}, lambda m, x, y: m(x, y, y)),
    "three inputs": ({}, lambda m, x, y: m(x, y, y.tanh(), need_weights=False)),
    "query is key": ({}, lambda m, x, y: m(x, x, x.tanh())),
    "own widths": ({"kdim": 6, "vdim": 5}, lambda m, x, y: m(x, y[..., :6], y[..., :5])),
    "unbatched": ({}, lambda m, x, y: m(x[0], x[0], x[0], key_padding_mask=PADDING[0])),
    "every head's weights": ({}, lambda m, x, y: m(x, x, x, average_attn_weights=False)),
    "padding": ({}, lambda m, x, y: m(x, x, x, key_padding_mask=PADDING)),
    "padding, no weights": (
        {},
        lambda m, x, y: m(x, x, x, key_padding_mask=PADDING, need_weights=False),
    ),
    "float padding": (
        {},
        lambda m, x, y: m(x, x, x, key_padding_mask=-PADDING.double(), need_weights=False),
    ),
    "causal": (
        {},
        lambda m, x, y: m(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=False),
    ),
    "causal with weights": ({}, lambda m, x, y: m(x, x, x, attn_mask=CAUSAL, is_causal=True)),
    "bool mask": ({}, lambda m, x, y: m(x, x, x, attn_mask=CAUSAL < 0, need_weights=False)),
    "mask of every head": ({}, lambda m, x, y: m(x, x, x, attn_mask=PER_HEAD, need_weights=False)),
    "mask of every head with weights": ({}, lambda m, x, y: m(x, x, x, attn_mask=PER_HEAD)),
    "both masks": (
        {},
        lambda m, x, y: m(x, x, x, key_padding_mask=PADDING.double(), attn_mask=PER_HEAD),
    ),
    "dropout of weights": ({"dropout": 0.4}, lambda m, x, y: m(x, x, x)),
}


WITH_MEMORY = ("memory", "three inputs", "own widths")


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("name", CALLS)
def test_heads_of_packed_attention_rest(name, skip):
    kwargs, call = CALLS[name]
    model = attention(**kwargs)
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    leaves = [x, y] if name in WITH_MEMORY else [x]
    for active in DECISIONS:
        gate = check(
            model,
            partition(model, "heads"),
            active,
            lambda m: both(call(m, x, y)),
            leaves,
            skip=skip,
            floor=1e-2,
        )
        assert gate.in_full == ()
        gate.remove()


@pytest.mark.parametrize("skip", SKIPS)
def test_other_slices_of_packed_attention_rest(skip):
    model = attention()
    units = [
        *rows("in_proj_weight", even(24, 5)),
        *rows("in_proj_bias", even(24, 2)),
        *rows("out_proj.weight", even(8, 2)),
        unit("out bias", Slice("out_proj.bias")),
    ]
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    for seed in range(4):
        active = (torch.rand(len(units), generator=torch.manual_seed(seed)) < 0.5).tolist()
        for call, leaves in ((lambda m: m(x, x, x)[0], [x]), (lambda m: m(x, y, y)[0], [x, y])):
            gate = check(model, units, active, call, leaves, skip=skip, floor=1e-2)
            assert gate.in_full == ()
            gate.remove()


@pytest.mark.parametrize("skip", SKIPS)
def test_a_transformer_encoder_layer_calls_its_gated_attention(skip):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True).double()
    part = partition(model)
    x = X.clone().requires_grad_()
    for training in (True, False):  # evaluation has a fast path, but not where gradients flow
        model.train(training)
        active = [i % 4 == 1 for i in range(len(part))]
        check(model, part, active, lambda m: m(x), [x], skip=skip, floor=1e-2).remove()
    with Gate(model.eval(), part, skip=skip) as gate, torch.no_grad():
        plain = model(X)
        gate.apply(active)
        assert torch.equal(model(X), plain)


def test_attention_with_extra_keys_is_computed_in_full_or_refused():
    model = attention(add_bias_kv=True)
    part = partition(model, "heads")
    gate = check(model, part, DECISIONS[0], lambda m: m(X, X, X)[0], floor=1e-2)
    assert "in_proj_weight" in gate.in_full
    gate.remove()
    with pytest.raises(ValueError, match="cannot cut"):
        Gate(model, part, skip="units").apply(DECISIONS[0])


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(need_weights, skip):
    model = attention().float()
    x = X.float().requires_grad_()

    def run(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x, x, x, need_weights=need_weights)[0].float()

    active = [True, False, True, False]
    check(model, partition(model, "heads"), active, run, [x], 3e-2, skip=skip, floor=0.1)


def test_copies_and_pickles_are_plain_and_nothing_is_kept():
    model = attention()
    with Gate(model, partition(model, "heads"), skip="units") as gate:
        gate.apply(DECISIONS[0])
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not getattr(twin.forward.__self__, "on", False)
            assert torch.equal(twin(X, X, X)[0], model(X, X, X)[0])
    assert "forward" not in model.__dict__
    seen = weakref.ref(model)
    del model, gate, twin
    gc.collect()
    assert seen() is None


def counted(model: nn.Module, active: list[bool], skip: str, run) -> dict[str, int]:
    with Gate(model, partition(model, "heads"), skip=skip) as gate:
        gate.apply(active)
        with flops.count() as counter:
            run(model).sum().backward()
    model.zero_grad()
    return counter.by_operation


def test_operations_of_packed_attention_fall_with_the_heads_at_rest():
    model = attention()
    x = X.clone().requires_grad_()

    def run(m: nn.Module) -> Tensor:
        return m(x, x, x, need_weights=False)[0]

    product = 2 * 10 * 8 * 8
    backward = "aten._scaled_dot_product_flash_attention_for_cpu_backward"
    full = counted(model, [True] * 4, "weights", run)
    quarter = counted(model, [False, True, False, False], "weights", run)
    assert full[backward] == quarter[backward] > 0
    assert sum(full.values()) - sum(quarter.values()) == 3 * product  # of four weight gradients
    quarter = counted(model, [False, True, False, False], "units", run)
    assert full[backward] == 4 * quarter[backward]
    below = sum(full.values()) - full[backward] - (sum(quarter.values()) - quarter[backward])
    assert below == 3 * product + 3 * product  # and of four input gradients


def test_operations_with_weights_wanted_fall_too():
    model = attention()
    x = X.clone().requires_grad_()
    full = counted(model, [True] * 4, "units", lambda m: m(x, x, x)[0])
    quarter = counted(model, [False, True, False, False], "units", lambda m: m(x, x, x)[0])
    forward = full["aten.bmm"] // 3
    assert quarter["aten.bmm"] == forward + (full["aten.bmm"] - forward) // 4


# ---- attention of some heads ---------------------------------------------------------------------


def split(heads: int, on: list[bool]) -> Split:
    look = FirstLook("attention")
    look.done = True  # these tests send gradients to resting heads to see them dropped
    return Split(heads, on, torch.device("cpu"), look)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


MASKS = {
    "none": None,
    "shared": (5, 7),
    "one for all heads": (2, 1, 5, 7),
    "one for each": (2, 4, 5, 7),
    "one for each, no batch": (4, 5, 7),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("on", [[True, False], [False, True], [False, False]])
def test_heads_attend_alone(groups, mask, on, dtype):
    """The same bits forward; gradients are those of the training heads, zero for the others."""
    flags = on * (groups // 2) if groups > 1 else on[:1]
    if all(flags):
        return
    shapes = [(2, 4, 5, 6), (2, groups, 7, 6), (2, groups, 7, 3)]
    q, k, v, *m = tensors(*shapes, *([MASKS[mask]] if MASKS[mask] else []), dtype=dtype)
    gqa = {"enable_gqa": True} if groups < 4 else {}
    plain = F.scaled_dot_product_attention(q, k, v, *m, **gqa)
    leaves = [q, k, v, *m]
    kept = torch.tensor(flags).repeat_interleave(4 // groups).view(4, 1, 1)
    expected = torch.autograd.grad((plain * kept).square().sum(), leaves)
    with SplitAttention(split(4, flags)):
        out = F.scaled_dot_product_attention(q, k, v, *m, **gqa)
    assert torch.equal(out, plain)
    if not any(flags):
        assert not out.requires_grad
        return
    for found, wanted in zip(
        torch.autograd.grad(out.square().sum(), leaves), expected, strict=True
    ):
        assert_close(found, wanted, 1e-10 if dtype == torch.float64 else 1e-5)


def test_repeated_keys_and_strided_tensors():
    q, k, v = tensors((2, 5, 4, 6), (2, 7, 2, 6), (2, 7, 2, 6))

    def run() -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            next(heads), *(x.repeat_interleave(2, 1) for x in heads), is_causal=True
        )

    plain = run()
    expected = torch.autograd.grad(plain[:, 2:].sum(), (q, k, v))
    with SplitAttention(split(4, [False, True])):
        out = run()
    assert torch.equal(out, plain)
    assert out.stride() == plain.stride()
    for found, wanted in zip(torch.autograd.grad(out.sum(), (q, k, v)), expected, strict=True):
        assert_close(found, wanted, 1e-10)


def test_products_written_out_are_split():
    q, k, v = tensors((2, 4, 5, 6), (2, 4, 7, 6), (2, 4, 7, 3))

    def run() -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1).matmul(v)

    plain = run()
    expected = torch.autograd.grad(plain[:, 1:2].square().sum(), (q, k, v))
    with SplitAttention(split(4, [False, True, False, False])), flops.count() as counter:
        out = run()
        forward = counter.total
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert torch.equal(out, plain)
    assert counter.total - forward == forward * 2 // 4
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-10)


def test_other_shapes_run_plainly():
    for shapes in ([(2, 3, 5, 6)] * 3, [(5, 6)] * 3, [(2, 4, 5, 6), (2, 3, 5, 6), (2, 3, 5, 6)]):
        q, k, v = tensors(*shapes)
        if shapes[0][-3:-2] != shapes[1][-3:-2]:
            k, v = (x[:, :1] for x in (k, v))  # broadcast over the heads
        with SplitAttention(split(4, [False, True])):
            out = F.scaled_dot_product_attention(q, k, v)
        found = torch.autograd.grad(out.square().sum(), q)[0]
        again = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), q)[0]
        assert torch.equal(found, again)
        assert found.any()


def test_windows_are_not_taken_for_heads():
    """Hiera has [batch, heads, windows, tokens, width], with as many windows as heads somewhere."""
    q, k, v = tensors(*[(2, 4, 4, 5, 6)] * 3)
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), q)[0]
    with SplitAttention(split(4, [False, True])):
        out = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(torch.autograd.grad(out.square().sum(), q)[0], wanted)


def test_only_what_trains_is_saved():
    q, k, v = tensors((1, 8, 16, 4), (1, 8, 16, 4), (1, 8, 16, 4))
    bytes_of = {}
    for trained in (4, 1):
        on = [i < trained for i in range(8)]
        with SavedBytes(nn.Identity()) as saved, SplitAttention(split(8, on)):
            out = F.scaled_dot_product_attention(q * 1, k * 1, v * 1)
        bytes_of[trained] = saved.total
        assert out.shape == q.shape
    assert bytes_of[1] * 4 <= bytes_of[4] * 1.01


def test_dropout_inside_attention_rests_with_its_heads():
    q, k, v = tensors((2, 4, 5, 6), (2, 4, 5, 6), (2, 4, 5, 6))
    with SplitAttention(split(4, [True, False, True, False])):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for grad in grads:
        assert not grad[:, 1::2].any()
        assert grad[:, ::2].any()


def test_one_compiled_graph_serves_all_decisions():
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True).double()
    twin = copy.deepcopy(layer)
    part = partition(layer)
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=frames, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    with Gate(layer, part, skip="units") as gate, Gate(twin, part, skip="units") as other:
        for step in range(6):
            active = (torch.rand(len(part), generator=generator) < 0.5).tolist()
            active[:4] = [True] * 4 if step == 3 else active[:4]
            for g in (gate, other):
                g.apply(active)
            for model in (layer, twin):
                model.zero_grad()
            compiled(X).square().sum().backward()
            twin(X).square().sum().backward()
            for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
                wanted = b.grad if b.grad is not None or a.grad is None else a.grad
                assert_close(a.grad, wanted, 1e-10, 1e-2)
    assert frames.frame_count == 1


def test_heads_that_are_no_attention_do_not_stop_a_gate():
    """A module that looks like attention, with sizes that contradict its head count."""
    model = nn.Module()
    model.num_heads = 3
    model.q_proj, model.k_proj, model.v_proj = (nn.Linear(8, 8) for _ in range(3))
    model.out_proj = nn.Linear(8, 8)
    units = rows("q_proj.weight", even(8, 2))
    with Gate(model, Partition(units, model), skip="units") as gate:
        gate.apply([True, False])


def test_a_gradient_that_is_dropped_is_said_once():
    q, k, v = tensors((2, 4, 5, 6), (2, 4, 5, 6), (2, 4, 5, 6))
    two = Split(4, [True, True, False, False], torch.device("cpu"), FirstLook("layers.0.attention"))
    with SplitAttention(two):
        out = F.scaled_dot_product_attention(q, k, v)
    with pytest.warns(UserWarning, match=r"layers\.0\.attention.*dropped"):
        out.sum().backward(retain_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out.sum().backward()
