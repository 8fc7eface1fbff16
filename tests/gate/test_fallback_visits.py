"""The gate's hooks are called without a gradient, too: autograd visits what DDP waits for."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lightning_mat.gate import Gate
from lightning_mat.gate.fallback import _noted
from lightning_mat.parallel.ready import hand_nothing
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice, Unit


def test_a_visit_without_a_gradient_changes_and_notes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = nn.Linear(3, 4)
    units = [
        Unit("rows", "ffn", "", (Slice("weight", 0, 0, 2),)),
        Unit("bias", "ffn", "", (Slice("bias"),)),
    ]
    gate = Gate(layer, Partition(units, layer))
    gate.apply([False, False])
    _noted.discard("used outside: bias")
    loss = torch.ones(1, requires_grad=True).sum()
    with caplog.at_level(logging.INFO):
        hand_nothing(loss, list(layer.parameters()))
        loss.backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    assert "used outside" not in caplog.text
    gate.remove()
