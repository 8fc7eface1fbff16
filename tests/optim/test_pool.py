"""Small pieces are stepped in pools, and each as if it were a parameter of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from lightning_mat.optim import MATOptimizer, pieces
from lightning_mat.optim import optimizer as module
from lightning_mat.optim.loading import LoadingGroups
from lightning_mat.optim.pool import Pool
from tests.optim.cases import HOW, Make, Model, gradients, set_gradients, units_of
from tests.optim.test_oracle import run_against_oracle

SOME, OTHERS = [True, False, True, False, True], [False, True, True, True, False]
MISSING = [None, "rows", None, "conv", "columns", "both", None]


@pytest.fixture(params=["few", "many"])
def pools(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Few pools are loaded before a step, many one after the other."""
    if request.param == "many":
        monkeypatch.setattr(pieces, "chunk_of", lambda _: 7)
        monkeypatch.setattr(pieces, "FUSED_CHUNK", 9)
    return request.param


def pools_of(optimizer: MATOptimizer) -> list[Pool]:
    plans = optimizer._slicer._plan
    assert plans is not None
    return [pool for plan in plans for pool in plan.pools or ()]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("make", [partial(AdamW, lr=0.1), partial(SGD, lr=0.1, momentum=0.9)])
def test_a_parameter_without_a_gradient_leaves_its_pool_for_the_step(
    make: Make, how: str, pools: str
) -> None:
    make = partial(make, **HOW[how])
    decisions = [(SOME if i < 4 else OTHERS, 1, name) for i, name in enumerate(MISSING)]
    run_against_oracle(make, decisions)


def test_pieces_of_all_parameters_with_one_history_are_one_tensor() -> None:
    model = Model()
    optimizer = MATOptimizer(Adam(model.parameters()), model, units_of(model))
    optimizer.apply(SOME)
    for seed in range(3):
        set_gradients(model, gradients(model, torch.Generator().manual_seed(seed)))
        optimizer.step()
    (pool,) = pools_of(optimizer)
    assert {id(param) for param in pool.params} == {
        id(p) for p in (model.rows, model.bias, model.columns, model.both, model.conv)
    } | {id(model.conv_last)}


def test_many_pools_share_the_memory_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "chunk_of", lambda _: 40)
    model = Model()
    optimizer = MATOptimizer(Adam(model.parameters()), model, units_of(model))
    optimizer.apply(SOME)
    set_gradients(model, gradients(model, torch.Generator()))
    optimizer.step()
    optimizer.step()
    tensors = [pool.tensor() for pool in pools_of(optimizer)]
    assert len(tensors) > 2
    grads = [t.grad for t in tensors if t.grad is not None]
    assert len(grads) == len(tensors)
    assert len({t.data_ptr() for t in tensors}) == 1
    end = tensors[0].data_ptr() + Pool.room_for(max(map(len, tensors))) * tensors[0].element_size()
    for tensor, grad in zip(tensors, grads, strict=True):
        assert tensor.data_ptr() + tensor.nbytes <= grad.data_ptr()
        assert grad.data_ptr() + grad.nbytes <= end
    assert not isinstance(optimizer.param_groups, LoadingGroups)
    assert len(optimizer.param_groups) == 1


class TwoPasses(SGD):
    """Looks at all groups before it steps the first."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for param in params:
            param -= 0.1 * param.grad


def test_an_optimizer_that_passes_over_its_groups_twice(
    pools: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ELEMENTWISE", [*module._ELEMENTWISE, TwoPasses])
    run_against_oracle(partial(TwoPasses, lr=0.1), [(SOME, 2, None), (OTHERS, 2, "rows")])


def test_a_step_that_fails_does_not_bring_old_values_back(pools: str) -> None:
    model = Model()
    optimizer = MATOptimizer(SGD(model.parameters(), lr=0.1), model, units_of(model))
    optimizer.apply(SOME)
    set_gradients(model, gradients(model, torch.Generator()))
    optimizer.step()
    with torch.no_grad():
        model.conv.zero_()

    def closure() -> Tensor:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(closure)
    assert not model.conv.any()
    assert type(optimizer.param_groups) is list
    grad = torch.ones_like(model.conv)
    model.conv.grad = grad
    optimizer.step()
    assert torch.equal(model.conv[0], -0.1 * grad[0])


def test_gradients_and_states_in_another_layout(pools: str) -> None:
    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    optimizers = [MATOptimizer(Adam(m.parameters()), m, units_of(m)) for m in (model, twin)]
    for step in range(4):
        grads = gradients(model, torch.Generator().manual_seed(step))
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.apply(SOME if step < 2 else OTHERS)
            set_gradients(each, grads)
            if each is twin:
                each.rows.grad = grads["rows"].t().contiguous().t()
                each.conv.grad = grads["conv"].to(memory_format=torch.channels_last)
                for key in ("exp_avg", "exp_avg_sq") if step == 2 else ():
                    state = optimizer.state[each.conv]
                    state[key] = state[key].contiguous(memory_format=torch.channels_last)
            optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_thread_copies_what_it_computes_with(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    param = torch.randn(12, 10)
    boxes = [(slice(a, a + 1), slice(0, 10)) for a in range(12)]
    pool = Pool([(param, boxes)], (), [{}], None)
    elements = torch.empty(len(param) * 10)
    place = 0
    shares: list[list[int]] = [[] for _ in range(threads)]
    for _, _, _, rows, run, flat in pool._boxes_of_both.tolist():
        # The operation divides what the table lists evenly, torch the tensor.
        thread = place * threads // (2 * len(elements))
        start = flat if flat < pool._grads_at else flat - pool._grads_at
        shares[thread].append(start * threads // len(elements))
        place += rows * run
    assert shares == [[thread] * (2 * 12 // threads) for thread in range(threads)]
