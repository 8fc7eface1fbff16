"""A probe stays within the memory of a training step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from examples.models.bert import Bert, preset
from lightning_mat import mntk, partition
from lightning_mat.mntk.plan import MIN_WORKSPACE, Footprint, make_plan
from lightning_mat.mntk.probe import Probe


@given(
    samples=st.integers(2, 128),
    step=st.integers(1, 128),
    activations=st.integers(1, 10**7),
    captured=st.lists(st.integers(0, 10**7), max_size=8),
    gradients=st.integers(0, 10**9),
)
def test_every_layer_is_in_exactly_one_group(
    samples: int, step: int, activations: int, captured: list[int], gradients: int
) -> None:
    layers = {(f"{i}a", f"{i}b"): each for i, each in enumerate(captured)}
    foot = Footprint(activations, layers, gradients, 100)
    plan = make_plan(samples, step, foot, None, samples)
    named = [name for group in plan.groups for name in group]
    assert sorted(named) == sorted(name for pair in layers for name in pair)
    assert 1 <= plan.micro <= samples
    assert plan.micro <= max(step, 1)
    if len(plan.groups) > 1:
        for group in plan.groups:
            held = samples * sum(each for pair, each in layers.items() if pair[0] in group)
            room = step * activations + gradients - plan.workspace - 100
            assert held + plan.micro * activations <= room or len(group) == 2


def test_one_pass_where_a_step_is_as_large_as_the_probe() -> None:
    foot = Footprint(1000, {("a",): 10, ("b",): 10}, 10**8, 0)
    assert make_plan(64, 64, foot, None, 64).groups == (("a", "b"),)
    assert make_plan(64, 64, foot, None, 64).micro == 64
    assert make_plan(64, 64, foot, None, 16).micro <= 16
    assert make_plan(64, 8, foot, None, 64).micro <= 8
    assert make_plan(64, 64, foot, MIN_WORKSPACE, 64).micro < 64


def peak(function: object) -> int:
    """Return the most bytes that torch's allocator held above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()  # type: ignore[operator]
    held = most = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize(("samples", "step_samples"), [(32, 32), (32, 8), (16, 2)])
def test_peak_memory_is_below_that_of_a_training_step(samples: int, step_samples: int) -> None:
    torch.manual_seed(0)
    model = Bert(preset("tiny", vocab_size=2000, max_length=64, dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters())
    words = torch.randint(0, 2000, (samples, 64))
    masked = torch.arange(10).expand(samples, 10)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = model(words[:step_samples], masked[:step_samples])
        target = words[:step_samples, :10]
        nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        optimizer.step()

    step()  # the optimizer's state is there from now on
    optimizer.zero_grad(set_to_none=True)
    training = peak(step)
    optimizer.zero_grad(set_to_none=True)
    part = partition(model, "heads+ffn")
    probe = Probe(model, part, step_samples=step_samples)
    batch = {"input_ids": words, "masked_positions": masked}
    probing = peak(lambda: probe.measure(batch))
    assert probing <= training
    expected = mntk(model, batch, part)
    found = probe.measure(batch)
    assert torch.allclose(found.eigenvalues[:, 0], expected.eigenvalues[:, 0], rtol=1e-4)
