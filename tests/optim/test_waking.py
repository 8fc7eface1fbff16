"""Waking: moments kept, reset or decayed, against slabs that are parameters of their own."""

from __future__ import annotations

import io
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from lightning_mat.optim import MATOptimizer, pieces
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice, Unit
from tests.optim.cases import (
    OPTIMIZERS,
    UNITS,
    Make,
    Model,
    gradients,
    set_gradients,
    units_of,
)
from tests.reference.optim import SlabOracle

Decisions = list[tuple[list[bool], int]]


class WakingOracle(SlabOracle):
    """Treats the state of a slab's own optimizer before its first step after a rest."""

    def __init__(self, waking: str, *args: Any) -> None:
        super().__init__(*args)
        self.waking = waking
        self.rested: dict[int, int] = {}

    def step(self, grads: dict[str, Tensor | None], active: Any) -> None:
        for *_, unit, _, slab, optimizer in self.slabs:
            if unit is not None and active[unit] and self.rested.get(unit, 0):
                if self.waking == "reset":
                    reset(slab, optimizer)
                else:
                    decay(slab, optimizer, self.rested[unit])
        super().step(grads, active)
        self.rested = {
            unit: 0 if on else self.rested.get(unit, 0) + 1 for unit, on in enumerate(active)
        }


def reset(slab: nn.Parameter, optimizer: Optimizer) -> None:
    optimizer.state.clear()
    if isinstance(optimizer, Adagrad):  # which makes its state at construction
        optimizer.state.update(Adagrad([slab], **optimizer.defaults).state)


def decay(slab: nn.Parameter, optimizer: Optimizer, rested: int) -> None:
    state, group = optimizer.state.get(slab, {}), optimizer.param_groups[0]
    for _ in range(rested):
        if state.get("momentum_buffer") is not None:
            state["momentum_buffer"] *= group["momentum"]
        if "exp_avg" in state:
            beta1, beta2 = group["betas"]
            state["exp_avg"] *= beta1
            for key in ("exp_avg_sq", "max_exp_avg_sq"):
                if key in state:
                    state[key] *= beta2
            weight = beta2 * (1 - beta2 ** float(state["step"]))
            state["step"].fill_(math.log(1 - weight) / math.log(beta2) if beta2 else 0.0)


def run(make: Make, waking: str, decisions: Decisions, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = Model()
    part = units_of(model)
    optimizer = MATOptimizer(make(model.parameters()), model, part, waking=waking)
    oracle = WakingOracle(waking, model, part, lambda _, params: make(params))
    for active, steps in decisions:
        optimizer.apply([not on for on in active])  # no step is made: it leaves no trace
        optimizer.apply(active)
        for _ in range(steps):
            grads = gradients(model, generator)
            set_gradients(model, grads)
            optimizer.step()
            oracle.step(grads, active)
            for name, param in model.named_parameters():
                torch.testing.assert_close(
                    param.detach(), oracle.params[name], rtol=1e-9, atol=1e-11, msg=name
                )


decisions = st.lists(
    st.tuples(st.lists(st.booleans(), min_size=UNITS, max_size=UNITS), st.integers(1, 3)),
    min_size=3,
    max_size=6,
)
searched = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CASES = [(name, waking) for name in OPTIMIZERS for waking in ("reset", "decay")]


@pytest.mark.parametrize(("name", "waking"), CASES)
@searched
@given(decisions=decisions, seed=st.integers(0, 99), pack_below=st.sampled_from([0, 16_384]))
def test_waking_slabs_equal_parameters_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    waking: str,
    decisions: Decisions,
    seed: int,
    pack_below: int,
) -> None:
    monkeypatch.setattr(pieces, "PACK_BELOW", pack_below)
    run(OPTIMIZERS[name], waking, decisions, seed)


@pytest.mark.parametrize(
    "make",
    [
        partial(Adagrad, initial_accumulator_value=0.5),
        partial(RMSprop, momentum=0.9),
        NAdam,
        partial(SGD, lr=0.1, momentum=0.9, fused=True),
        partial(AdamW, fused=True, amsgrad=True),
    ],
    ids=["adagrad", "rmsprop", "nadam", "fused sgd", "fused amsgrad"],
)
def test_any_state_can_be_reset(make: Make) -> None:
    some, others = [True, False] * 2 + [True], [False, True] * 2 + [False]
    run(make, "reset", [([True] * 5, 2), (some, 2), (others, 1), ([False] * 5, 1), ([True] * 5, 2)])


@pytest.mark.parametrize("waking", ["keep", "reset", "decay"])
@pytest.mark.parametrize("make", [OPTIMIZERS["momentum"], OPTIMIZERS["amsgrad"]])
def test_a_resumed_run_equals_one_that_was_never_stopped_bit_for_bit(
    make: Make, waking: str
) -> None:
    choices = [[bool(k >> i & 1) for i in range(UNITS)] for k in (31, 20, 11, 7, 30, 31)]

    def train(model: Model, optimizer: MATOptimizer, first: int, last: int) -> None:
        for step in range(first, last):
            set_gradients(model, gradients(model, torch.Generator().manual_seed(step)))
            optimizer.apply(choices[step // 2])
            optimizer.step()

    model = Model()
    part = units_of(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, MATOptimizer(make(model.parameters()), model, part, waking), 0, 12)
    for stop in (3, 4, 7):
        killed = Model()
        killed.load_state_dict(start)
        optimizer = MATOptimizer(make(killed.parameters()), killed, part, waking)
        train(killed, optimizer, 0, stop)
        optimizer.apply([True] * UNITS)  # as a callback does at the end of a fit
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed = Model()
        resumed.load_state_dict(killed.state_dict())
        after = MATOptimizer(make(resumed.parameters()), resumed, part, waking)
        after.load_state_dict(torch.load(file, weights_only=True))
        train(resumed, after, stop, 12)
        for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(ours, theirs), stop


def first_update(waking: str, rest: int, before: int = 50, grad: float = 1.0) -> float:
    """Size of a unit's first update after a rest, relative to the learning rate."""
    model = nn.Linear(1, 2, bias=False)
    part = Partition(
        [Unit(str(i), "ffn", "", (Slice("weight", 0, i, i + 1),)) for i in (0, 1)], model
    )
    optimizer = MATOptimizer(Adam(model.parameters(), lr=0.1), model, part, waking)
    model.weight.grad = torch.ones_like(model.weight)
    for active, steps in (([True, True], before), ([False, True], rest)):
        optimizer.apply(active)
        for _ in range(steps):
            optimizer.step()
    optimizer.apply([True, True])
    model.weight.grad.fill_(grad)
    value = model.weight[0].item()
    optimizer.step()
    return (value - model.weight[0].item()) / 0.1


@pytest.mark.parametrize("before", [1, 50, 1000])
@pytest.mark.parametrize("rest", [1, 10, 400])
def test_no_first_update_is_too_large(before: int, rest: int) -> None:
    # Gradients stay as they were: a plain update is 1.
    assert first_update("keep", rest, before) == pytest.approx(1)
    assert first_update("reset", rest, before) == pytest.approx(1)
    assert 0 < first_update("decay", rest, before) <= 1 + 1e-7


def test_decayed_momentum_forgets_the_old_direction() -> None:
    # Where the gradient has turned, kept momentum first goes on uphill.
    assert first_update("keep", 100, grad=-1.0) > 0.5
    assert -1 <= first_update("decay", 100, grad=-1.0) < 0
    assert first_update("reset", 100, grad=-1.0) == pytest.approx(-1)


def test_a_reset_leaves_no_stale_numbers_in_a_checkpoint() -> None:
    model = Model()
    optimizer = MATOptimizer(Adam(model.parameters()), model, units_of(model), waking="reset")
    for active in ([True] * 5, [False, True, True, True, False], [True] * 5):
        optimizer.apply(active)
        set_gradients(model, gradients(model, torch.Generator(), "rows"))
        if active[0]:
            model.rows.grad = torch.ones_like(model.rows) if not optimizer.state else None
        optimizer.step()
    # Unit 0 has woken, but its rows had no gradient since.
    assert not optimizer.state[model.rows]["exp_avg"][:2].any()
    assert optimizer.state[model.rows]["exp_avg"][2:].all()
    assert optimizer.state_dict()["mat"]["rows"]["history"]["step"].isnan().tolist() == [
        True, False, False,
    ]  # fmt: skip


def test_slabs_that_are_reset_together_are_one_tensor_again() -> None:
    model = Model()
    optimizer = MATOptimizer(Adam(model.parameters()), model, units_of(model), waking="reset")
    set_gradients(model, gradients(model, torch.Generator()))
    for active in ([True] * 5, [True, False] * 2 + [True], [False] * 5, [True] * 5):
        optimizer.apply(active)
        optimizer.step()
    saved = optimizer.state_dict()
    assert "rows" not in saved["mat"]
    assert optimizer.state[model.rows]["step"] == 1
    assert optimizer.state[model.whole]["step"] == 1


def test_what_is_unknown_is_refused() -> None:
    model = Model()
    part = units_of(model)
    with pytest.raises(ValueError, match="waking must be one of .*'sleep'"):
        MATOptimizer(Adam(model.parameters()), model, part, waking="sleep")
    with pytest.raises(ValueError, match=r"not that of RMSprop.*waking='keep'"):
        MATOptimizer(RMSprop(model.parameters()), model, part, waking="decay")
