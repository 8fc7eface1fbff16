"""Batched experts in a compiled model: one graph whatever the decision, without breaks."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from lightning_mat import flops
from lightning_mat.gate import Gate, experts
from lightning_mat.gate.grouped import Chosen, keep, row_gradient, weight_gradient
from lightning_mat.units import partition
from tests.gate.cases import assert_close
from tests.gate.mixtures import (
    DECISIONS,
    INNER,
    SKIPS,
    WIDTH,
    Fallen,
    Gathering,
    Holder,
    Mixed,
    Own,
    Stack,
    Turned,
    mixtral_experts,
    routed,
)

# Hugging Face compiles grouped products of other formats by an operation of its own.
CASES = [
    ("grouped_mm", torch.float64, 1e-10),
    ("grouped_mm", torch.float32, 1e-5),
    pytest.param(
        "grouped_mm",
        torch.bfloat16,
        2e-2,
        marks=pytest.mark.skipif(
            torch.torch_version.TorchVersion(torch.__version__) < (2, 11),
            reason="Hugging Face's own code breaks the graph, to look at addresses",
        ),
    ),
    ("batched_mm", torch.float64, 1e-10),
]


Gradients = dict[str, Tensor | None]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(
    run: Callable[..., Tensor], model: nn.Module, inputs: tuple[Tensor, ...]
) -> Gradients:
    """Return the gradients of parameters and leaves, and drop them."""
    leaves = {**dict(model.named_parameters()), "x": inputs[0], "weights": inputs[2]}
    run(*inputs).square().sum().backward()
    found = {name: leaf.grad for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return found


def assert_alike(found: Gradients, wanted: Gradients, tolerance: float) -> None:
    """Compare gradients, where none is as good as zeros."""
    for name, expected in wanted.items():
        grad = found[name]
        if grad is None:
            assert expected is None or not expected.any()
        else:
            zeros = torch.zeros_like(grad)
            assert_close(grad, zeros if expected is None else expected, tolerance)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize(("implementation", "dtype", "tolerance"), CASES)
def test_a_hundred_decisions_take_one_graph_without_breaks(implementation, dtype, tolerance, skip):
    """The oracle is the gate of the loop over the experts, which test_experts.py tests."""
    model = mixtral_experts(implementation, dtype)
    loop = mixtral_experts("eager", dtype)
    part = partition(model, "experts")
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    inputs = routed(dtype)
    gradients(compiled, model, inputs)
    assert frames.frame_count == 1
    draw = random.Random(0)
    with Gate(model, part, skip=skip) as gate, Gate(loop, part, skip=skip) as other:
        for turn in range(100):
            active = [draw.random() < 0.5 for _ in range(4)]
            if turn % 10 and dtype == torch.float64:
                gate.apply(active)
                gradients(compiled, model, inputs)
                continue
            if turn % 50 and dtype != torch.float64:
                continue
            for each in (gate, other):
                each.apply(active)
            wanted = gradients(loop, loop, inputs)
            assert_alike(gradients(compiled, model, inputs), wanted, tolerance)
    assert frames.frame_count == 2


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_default_compiler_gives_the_same_gradients(implementation):
    model = mixtral_experts(implementation, torch.float32)
    twin = copy.deepcopy(model)
    part = partition(model, "experts")
    inputs = routed(torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    with Gate(model, part, skip="units") as gate, Gate(twin, part, skip="units") as other:
        for active in DECISIONS:
            for each in (gate, other):
                each.apply(active)
            found = gradients(compiled, model, inputs)
            assert_alike(found, gradients(twin, twin, inputs), 1e-5)


# Rows of each expert, and rows of nobody behind them.
SIZES = [([3, 0, 5, 2], 0), ([1], 0), ([0, 0, 4], 3), ([7, 1], 2)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("sizes", "beyond"), SIZES)
def test_both_kinds_of_product_have_the_same_gradients(sizes, beyond, turned):
    """In one operation for all experts, and expert by expert; what rests costs nothing in both."""
    torch.manual_seed(0)
    count, rows = len(sizes), sum(sizes) + beyond
    offs = torch.tensor(sizes).cumsum(0, dtype=torch.int32)
    x, grad = torch.randn(rows, WIDTH), torch.randn(rows, INNER)
    weight = torch.randn(count, *((INNER, WIDTH) if turned else (WIDTH, INNER)))
    for bits in range(1, 2**count):
        chosen = Chosen([e for e in range(count) if bits >> e & 1], count, x.device)
        found, costs = [], []
        for loop in (False, True):
            with flops.count() as counter:
                kept = keep(x, offs, chosen, loop=loop)

                def zeros(dtype: torch.dtype) -> Tensor:
                    return torch.zeros(weight.shape, dtype=dtype)

                one = weight_gradient(grad, kept, chosen, zeros, turned=turned, loop=loop)
                two = row_gradient(grad, weight, offs, chosen, turned=turned, loop=loop)
            found.append((one, two[: sum(sizes)]))
            costs.append(counter.total)
        for one, two in zip(*found, strict=True):
            assert_close(one, two, 1e-5)
        trained = sum(sizes[e] for e in chosen.numbers)
        assert costs[1] == 2 * 2 * trained * WIDTH * INNER
        # What is counted of one operation goes by its shape, with the rows of nobody.
        assert costs[0] == costs[1] or (chosen.all and beyond)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("kind", [Own, Turned, Gathering, Mixed, Stack])
def test_a_mixture_of_ones_own(kind, skip):
    """Where it goes through its experts one by one, it may break the graph, but is right."""
    torch.manual_seed(0)
    model = Holder(kind(kind is Turned, kind is Turned)).bfloat16()
    twin = copy.deepcopy(model)
    part = partition(model, "experts")
    inputs = routed(torch.bfloat16)
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=frames, fullgraph=kind is Turned)
    counts = []
    with Gate(model, part, skip=skip) as gate, Gate(twin, part, skip=skip) as other:
        for active in (*DECISIONS[:2], [True, True, False, False], [False, False, True, True]):
            for each in (gate, other):
                each.apply(active)
            wanted = gradients(twin, twin, inputs)
            assert_alike(gradients(compiled, model, inputs), wanted, 2e-2)
            counts.append(frames.frame_count)
    # What one of its forwards does is found out once.
    assert len(set(counts[kind in (Mixed, Stack) :])) == 1


def test_products_that_the_compiler_does_not_show_are_not_traced(monkeypatch):
    """As with a compiler whose list of functions is no set any more: right, with a graph break."""
    torch.manual_seed(0)
    model = Holder(Turned(True, True)).bfloat16()
    twin = copy.deepcopy(model)
    part = partition(model, "experts")
    inputs = routed(torch.bfloat16)
    compiled = torch.compile(model, backend="aot_eager")
    monkeypatch.setattr("lightning_mat.gate.experts.show_products", lambda: None)
    shown = torch._dynamo.variables.torch.get_overridable_functions()
    shown.discard(torch._grouped_mm)
    with Gate(model, part, skip="units") as gate, Gate(twin, part, skip="units") as other:
        for each in (gate, other):
            each.apply(DECISIONS[0])
        wanted = gradients(twin, twin, inputs)
        assert_alike(gradients(compiled, model, inputs), wanted, 2e-2)
    assert experts._mixtures[model.experts].opaque


def test_what_else_is_done_with_a_parameter_trains_it_too():
    """The default compiler adds such gradients up in the memory of ours, and no version tells."""
    model = mixtral_experts("grouped_mm", torch.float32)
    twin = copy.deepcopy(model)
    part = partition(model, "experts")
    inputs = routed(torch.float32)

    def loss_of(model: nn.Module) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return model(*inputs).square().sum() + 1e-1 * penalty

    compiled = torch.compile(lambda: loss_of(model))
    for skip in SKIPS:
        with Gate(model, part, skip=skip) as gate, Gate(twin, part, skip="weights") as other:
            for each in (gate, other):
                each.apply(DECISIONS[0])
            for run, m in ((compiled, model), (lambda: loss_of(twin), twin)):
                m.zero_grad()
                run().backward()
            for found, wanted in zip(model.parameters(), twin.parameters(), strict=True):
                assert not found.grad[1::2].any()
                if skip == "weights":
                    assert_close(found.grad, wanted.grad, 1e-5)


@pytest.mark.parametrize("skip", SKIPS)
def test_a_whole_model_with_checkpoints_has_one_graph(skip):
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_local_experts=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = modeling.MixtralForCausalLM(config).double().train()
    model.set_experts_implementation("grouped_mm")
    twin = copy.deepcopy(model)
    twin.set_experts_implementation("eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    part = partition(model, "heads+experts")
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    draw = random.Random(0)
    with Gate(model, part, skip=skip) as gate, Gate(twin, part, skip=skip) as other:
        for length in (5, 5, 5, 8, 9):
            tokens = torch.randint(11, (2, length))
            active = [draw.random() < 0.5 for _ in range(len(part))]
            for each in (gate, other):
                each.apply(active)
            for run, m in ((compiled, model), (twin, twin)):
                m.zero_grad()
                for _ in range(2):  # accumulated
                    run(tokens, labels=tokens).loss.backward()
            found = {name: p.grad for name, p in model.named_parameters()}
            assert_alike(found, {name: p.grad for name, p in twin.named_parameters()}, 1e-10)
    # One for a length, one for all.
    assert frames.frame_count == 2


def test_mixed_precision_is_that_of_the_plain_model():
    model = mixtral_experts("grouped_mm", torch.float32)
    part = partition(model, "experts")
    inputs = routed(torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def lowered(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return compiled(*inputs)

    wanted = gradients(lowered, model, inputs)
    with Gate(model, part, skip="units") as gate:
        gate.apply([True, True, True, False])
        found = gradients(lowered, model, inputs)
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert torch.equal(found[name][:3], wanted[name][:3])
        assert not found[name][3].any()


def test_layers_that_are_compiled_apart_share_a_graph():
    layers = nn.ModuleList(mixtral_experts("grouped_mm", torch.float32) for _ in range(5))
    part = partition(layers, "experts")
    x, index, weights = routed(torch.float32)
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for layer in layers:
        layer.compile(backend=frames)

    def run() -> Tensor:
        h = x
        for layer in layers:
            h = h + layer(h, index, weights)
        return h.square().sum()

    run().backward()
    plain = frames.frame_count
    with Gate(layers, part, skip="units") as gate:
        for seed in range(3):
            draw = random.Random(seed)
            gate.apply([draw.random() < 0.5 for _ in range(len(part))])
            run().backward()
    assert frames.frame_count == 2 * plain


def test_a_gate_that_is_made_leaves_one_that_is_on_alone():
    model = mixtral_experts("grouped_mm", torch.float32)
    part = partition(model, "experts")
    inputs = routed(torch.float32)
    with Gate(model, part, skip="units") as gate:
        gate.apply(DECISIONS[0])
        wanted = gradients(model, model, inputs)
        other = Gate(model, part, skip="units")
        with pytest.raises(RuntimeError, match="a gate is on it already"):
            other.apply([True, True, False, False])
        assert_alike(gradients(model, model, inputs), wanted, 0.0)


@pytest.mark.parametrize("skip", SKIPS)
def test_products_expert_by_expert_skip_those_at_rest(skip):
    pytest.importorskip("transformers.integrations.moe")
    torch.manual_seed(0)
    loop, model = (Holder(kind(False, False)).double() for kind in (Stack, Fallen))
    model.load_state_dict(loop.state_dict())
    part = partition(loop, "experts")
    inputs = routed(torch.float64, unused=2)
    sizes = torch.bincount(inputs[1].flatten(), minlength=4).tolist()
    with Gate(model, part, skip=skip) as gate, Gate(loop, part, skip=skip) as other:
        for active in DECISIONS:
            for each in (gate, other):
                each.apply(active)
            wanted = gradients(loop, loop, inputs)
            with flops.count() as counter:
                found = gradients(model, model, inputs)
            assert_alike(found, wanted, 1e-10)
            trained = sum(n for n, on in zip(sizes, active, strict=True) if on)
            through = sum(sizes) if skip == "weights" else trained
            # The forward product has no formula: it is an operation of transformers' own.
            assert counter.total == 2 * 2 * WIDTH * INNER * (trained + through)
