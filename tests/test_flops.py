"""FLOPs are those of the operations that ran, against sums on paper."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_mat import flops


def test_a_linear_step_is_three_products():
    model = nn.Linear(6, 4)
    x = torch.randn(5, 6, requires_grad=True)
    with flops.count() as counter:
        model(x).sum().backward()
    product = 2 * 5 * 6 * 4
    assert counter.total == 3 * product
    assert counter.by_operation == {"aten.addmm": product, "aten.mm": 2 * product}


def test_a_convolution_step():
    model = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    with flops.count() as counter:
        model(x).sum().backward()
    assert counter.total == 3 * (2 * 2 * 25 * 4 * 3 * 9)


def test_fused_attention_on_the_cpu_is_counted():
    q, k, v = (torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(3))
    with flops.count() as forward:
        out = F.scaled_dot_product_attention(q, k, v)
    product = 2 * 2 * 4 * 16 * 16 * 8
    assert forward.total == 2 * product
    assert "flash_attention" in next(iter(forward.by_operation))
    with flops.count() as backward:
        out.sum().backward()
    # The scores again, and two products for each of the two forward ones.
    assert backward.total == 5 * product


def test_heads_that_share_keys_and_values_are_counted():
    q = torch.randn(2, 8, 5, 4, requires_grad=True)
    k, v = (torch.randn(2, 2, 7, 4, requires_grad=True) for _ in range(2))
    with flops.count() as counter:
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True).sum().backward()
    product = 2 * 2 * 8 * 5 * 7 * 4
    # PyTorch's formula counts the scores once more in the backward pass.
    assert counter.total in (6 * product, 7 * product)
    for name in ("flash_attention", "efficient_attention", "cudnn_attention"):
        shapes = (2, 8, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4)
        forward = flops._OWN[getattr(torch.ops.aten, f"_scaled_dot_product_{name}")]
        backward = flops._OWN[getattr(torch.ops.aten, f"_scaled_dot_product_{name}_backward")]
        assert forward(*shapes) == 2 * product
        assert backward(shapes[0], *shapes) == 5 * product


def test_grouped_products_of_experts_are_counted():
    x = torch.randn(12, 16, requires_grad=True)
    experts = torch.randn(3, 16, 24, requires_grad=True)
    ends = torch.tensor([3, 6, 12], dtype=torch.int32)
    with flops.count() as counter:
        y = F.grouped_mm(x.bfloat16(), experts.bfloat16(), offs=ends)
        y.backward(torch.randn_like(y))
    assert counter.total == 3 * (2 * 12 * 16 * 24)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((7, 3), (7, 3, 5), 2 * 7 * 3 * 5),
        ((4, 7), (7, 5), 2 * 4 * 7 * 5),
        ((2, 4, 3), (3, 7), 2 * 4 * 3 * 7),
        ((2, 4, 3), (2, 3, 5), 2 * 2 * 4 * 3 * 5),
    ],
)
def test_the_formula_of_grouped_products(a, b, expected):
    assert flops._grouped_mm(a, b, None) == expected


def test_attention_formulas_for_versions_of_pytorch_that_lack_them():
    shape = (2, 4, 16, 8)
    product = 2 * 2 * 4 * 16 * 16 * 8
    assert flops._sdpa(shape, shape, shape) == 2 * product
    assert flops._sdpa_backward(shape, shape, shape, shape) == 5 * product


def test_compiled_models_count_as_eager_ones_and_stay_compiled():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    x = torch.randn(5, 6)
    with flops.count() as eager:
        model(x).sum().backward()
    with flops.count() as counter:
        compiled(x).sum().backward()
    assert graphs == []
    assert counter.total == eager.total == 2 * 5 * (2 * 6 * 4 + 3 * 4 * 2)
    compiled(x)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_counts_that_close_in_the_order_of_opening_leave_compiled_models_compiled():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(nn.Linear(3, 2), backend=backend)
    first, second = flops.count(), flops.count()
    counts = [first.__enter__(), second.__enter__()]
    compiled(torch.ones(4, 3))
    assert [c.total for c in counts] == [48, 48]
    first.__exit__(None, None, None)
    compiled(torch.ones(4, 3))
    assert graphs == []
    second.__exit__(None, None, None)
    compiled(torch.ones(4, 3))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_counting_ends_with_an_error():
    with pytest.raises(ValueError, match="inside"), flops.count():
        raise ValueError("inside")
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_formula_of_ones_own_is_counted_and_none_is_replaced():
    @torch.library.custom_op("mat_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    flops.register(torch.ops.mat_test.double, lambda shape, **_: 10 * shape[0])
    flops.register(torch.ops.mat_test.double, lambda shape, **_: 0)
    with flops.count() as counter:
        double(torch.ones(3))
    assert counter.total == 30


def test_the_papers_rule():
    assert flops.paper_flops(10.0, 1.0) == 30.0
    assert flops.paper_flops(10.0, 0.0) == 10.0
    with pytest.raises(ValueError, match=r"trained_share must be in \[0, 1\], got 1.5"):
        flops.paper_flops(10.0, 1.5)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_counts_are_those_of_pytorchs_own_counter(mode):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.Conv1d(3, 8, 3), nn.Flatten(2), nn.Linear(6, 8), layer)

    def run():
        out = net(torch.ones(2, 3, 8)).matmul(torch.ones(8, 4)).square().sum()
        if out.requires_grad:
            out.backward()

    with mode():
        with FlopCounterMode(display=False) as expected:
            run()
        with flops.count() as found:
            run()
    assert found.total == expected.get_total_flops() > 0
