"""The state that parameters which have never trained get in a sharded checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_mat.optim import beside
from tests.optim.cases import OPTIMIZERS, OTHERS, Make

# Adagrad has its state from the start; SGD begins with the gradient itself, see `complete`.
NOT = ("sgd", "momentum", "adagrad")
EVERY = {name: make for name, make in {**OPTIMIZERS, **OTHERS}.items() if name not in NOT}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(), (4, 3), (5,)]  # the first one may not show what is elementwise
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients() -> list[Tensor]:
    return [torch.randn(5, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.mark.parametrize("name", EVERY)
def test_a_run_without_the_callback_goes_on_as_if_they_were_new(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Make = EVERY[name]
    monkeypatch.setattr(beside, "is_sharded", lambda param: param.dim() > 0)
    saved = parameters()
    optimizer = make(saved)
    for _ in range(20):
        for param in saved[:2]:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert beside.without_state(optimizer) == [2]
    state = optimizer.state_dict()
    beside.complete(optimizer, state)
    assert state["state"][2].keys() == state["state"][1].keys()

    resumed, fresh = parameters(), parameters()
    goes_on, anew = make(resumed), make(fresh)
    goes_on.load_state_dict(state)
    for grad in gradients():
        resumed[2].grad, fresh[2].grad = grad.clone(), grad.clone()
        goes_on.step()
        anew.step()
        torch.testing.assert_close(resumed[2], fresh[2], rtol=1e-12, atol=0)


def test_without_any_state_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "is_sharded", lambda param: True)
    optimizer = torch.optim.Adam(parameters())
    state = optimizer.state_dict()
    beside.complete(optimizer, state)
    assert state["state"] == {}
