"""Embeddings: rows of the vocabulary and features rest, also in a table that is the decoder's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_mat.gate import Gate
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice, Unit
from tests.gate.cases import SavedBytes, assert_close, check, even, rows, some, unit
from tests.gate.test_other_layers import Tied

TOKENS = torch.tensor([[1, 2, 3, 9], [3, 0, 2, 3], [8, 8, 8, 0]])
OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "frequency": {"scale_grad_by_freq": True},
    "both": {"padding_idx": -1, "scale_grad_by_freq": True},
    "norm": {"max_norm": 0.5},
}
PATTERNS = {
    "rows": rows("weight", even(10, 10)),
    "runs of rows": rows("weight", even(10, 3)),
    "features": rows("weight", even(6, 6), 1),
    "rows and features": [unit("one", Slice("weight", 0, 2, 4), Slice("weight", 1, 1, 3))],
    "partly owned": rows("weight", [(1, 3), (8, 9)]),
    "whole": [unit("all", Slice("weight"))],
}
SKIPS = pytest.mark.parametrize("skip", ["weights", "units"])


@SKIPS
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_of_what_trains_are_the_plain_ones(pattern, options, skip):
    units = PATTERNS[pattern]
    for dtype in (torch.float64, torch.float32):
        for active in ([False] * len(units), some(len(units)), some(len(units), 3)):
            model = nn.Embedding(10, 6, dtype=dtype, **OPTIONS[options])
            gate = check(model, units, active, lambda m: m(TOKENS), skip=skip)
            assert gate.in_full == ()


def test_any_shape_of_tokens_and_any_integers():
    model = nn.Embedding(10, 6).double()
    for tokens in (torch.tensor(3), torch.zeros(0, dtype=torch.int64), TOKENS.int(), TOKENS.T):
        check(model, PATTERNS["rows"], some(10), lambda m, t=tokens: m(t)).remove()


def test_nothing_but_the_tokens_is_saved():
    model = nn.Embedding(10, 6)
    Gate(model, Partition(PATTERNS["rows"], model)).apply(some(10))
    with SavedBytes(model) as saved:
        model(TOKENS)
    assert saved.total == TOKENS.numel() * 8


def test_the_memory_of_the_gradient_is_that_of_the_step_before():
    model = nn.Embedding(10, 6)
    Gate(model, Partition(PATTERNS["rows"], model)).apply(some(10))
    addresses = set()
    for _ in range(3):
        model.weight.grad = None
        model(TOKENS).sum().backward()
        addresses.add(model.weight.grad.data_ptr())
    assert len(addresses) == 1


@SKIPS
@pytest.mark.parametrize("whole", [True, False])
def test_sparse_gradients_of_a_part_are_refused_with_the_reason(whole, skip):
    model = nn.Embedding(10, 6, sparse=True)
    units = PATTERNS["whole" if whole else "rows"]
    Gate(model, Partition(units, model), skip).apply(some(len(units) + 1)[1:])
    if whole:
        assert not model(TOKENS).requires_grad
        return
    with pytest.raises(TypeError, match="sparse=False"):
        model(TOKENS).sum().backward()


TIED = [unit("vocabulary", Slice("embed.weight", 0, 1, 4)), *rows("mix.weight", even(8, 2))]


@SKIPS
@pytest.mark.parametrize("units", [TIED, [unit("all", Slice("embed.weight"))]])
def test_a_table_that_is_also_the_decoders(units: list[Unit], skip):
    model = Tied().double()
    for active in ([False] * len(units), [i > 0 for i in range(len(units))]):
        check(model, units, active, lambda m: m(TOKENS % 6), skip=skip).remove()


@pytest.mark.parametrize("options", ["plain", "both"])
def test_one_graph_serves_all_decisions(options):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Embedding(10, 6, **OPTIONS[options]), nn.Linear(6, 3)).double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    units = rows("0.weight", even(10, 10))

    def gradients(run: nn.Module) -> list[Tensor]:
        model.zero_grad()
        run(TOKENS).square().sum().backward()
        return [param.grad for param in model.parameters()]

    with Gate(model, Partition(units, model)) as gate:
        for turn in range(3):
            gate.apply([i % 3 != turn for i in range(10)])
            for found, wanted in zip(gradients(compiled), gradients(model), strict=True):
                assert_close(found, wanted, 1e-10)
    assert counter.frame_count == 1
