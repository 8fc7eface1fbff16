"""Slice patterns, and the one check that every gate test ends in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_mat.gate import Gate
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice, Unit
from tests.reference.gate import detached, expected_gradients, resting

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def unit(name: str, *slices: Slice) -> Unit:
    return Unit(name, "ffn", "layer", slices)


def rows(param: str, runs: Iterable[tuple[int, int]], dim: int = 0) -> list[Unit]:
    """One unit per run of rows (or of dimension 1)."""
    return [unit(f"{param}.{dim}.{a}", Slice(param, dim, a, b)) for a, b in runs]


def even(size: int, parts: int) -> list[tuple[int, int]]:
    """Cut [0, size) into runs, the last one longer where it does not come out even."""
    return list(pairwise([*(i * (size // parts) for i in range(parts)), size]))


def some(length: int, every: int = 2) -> list[bool]:
    """Let every n-th unit train."""
    return [i % every == 0 for i in range(length)]


def assert_close(
    found: Tensor | None, expected: Tensor | None, tolerance: float, floor: float = 1e-300
) -> None:
    """Compare relative to the largest entry, or to ``floor``; None only equals None."""
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        scale = max(float(expected.abs().max()), floor) if expected.numel() else 1.0
        error = float((found - expected).abs().max()) if expected.numel() else 0.0
        assert error <= tolerance * scale, f"{error / scale:.2e} > {tolerance:.0e}"


def check(
    model: nn.Module,
    units: Sequence[Unit] | Partition,
    active: Sequence[bool],
    run: Callable[[nn.Module], Tensor],
    inputs: Sequence[Tensor] = (),
    tolerance: float | None = None,
    *,
    exact: bool = True,
    skip: str = "weights",
    floor: float = 1e-300,
) -> Gate:
    """Assert that a gated backward pass keeps the promise; return the gate, still applied.

    Args:
        model: The model.
        units: Its units, or a partition.
        active: Which train.
        run: Returns an output whose weighted sum is the loss.
        inputs: Leaves whose gradients must equal the plain ones too.
        tolerance: Relative to the largest entry; by default that of the parameters' dtype.
        exact: The output must have the same bits. PyTorch's product of a strided input rounds
            differently where the weight is a constant: some layers at rest cannot promise it.
        skip: What the gate skips; ``"units"`` is compared with the detached model.
        floor: The smallest scale of a tolerance, where true gradients are zero: of a key's bias,
            which no softmax can see, only rounding is left.
    """
    part = units if isinstance(units, Partition) else Partition(units, model)
    if tolerance is None:
        tolerance = TOLERANCE[next(model.parameters()).dtype]
    outputs: list[Tensor] = []

    def loss() -> Tensor:
        torch.manual_seed(0)  # dropout draws the same in both passes
        out = run(model)
        outputs.append(out.detach().clone())
        # Of one sign, so that sums over tokens do not cancel and tolerances can be relative.
        weights = torch.linspace(0.5, 2.5, out.numel(), dtype=torch.float64).sin().view(out.shape)
        return (out * weights.to(out.dtype)).sum()

    buffers = copy.deepcopy(dict(model.named_buffers()))
    with detached(model, part, active) if skip == "units" else nullcontext():
        expected = expected_gradients(model, part, active, loss)
    expected_inputs = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    for name, buffer in model.named_buffers():
        buffer.data.copy_(buffers[name])

    masks = resting(model, part, active)
    gate = Gate(model, part, skip=skip)
    gate.apply(torch.tensor(active))
    gated = loss()
    if gated.requires_grad:
        gated.backward()
    if exact:
        assert torch.equal(outputs[0], outputs[1]), "a gate must not change the output"
    else:
        assert_close(outputs[1], outputs[0], tolerance)
    if skip == "units":  # of a constant, autograd gives no gradient where hooks give zeros
        for tensor, wanted in [(p, expected[n]) for n, p in model.named_parameters()] + [
            *zip(inputs, expected_inputs, strict=True)
        ]:
            if tensor.grad is None and wanted is not None and not wanted.any():
                tensor.grad = torch.zeros_like(tensor)
    for name, param in model.named_parameters():
        assert_close(param.grad, expected[name], tolerance, floor)
        if param.grad is not None and expected[name] is not None:
            assert bool((param.grad[masks[name]] == 0).all()), f"{name} moves where it rests"
        param.grad = None
    for x, wanted in zip(inputs, expected_inputs, strict=True):
        assert_close(x.grad, wanted, tolerance)
        x.grad = None
    return gate


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd saves, each storage and layout once, parameters not."""

    def __init__(self, model: nn.Module) -> None:
        self.total = 0
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self._seen:
            self._seen.add(pointer)
            self.total += tensor.untyped_storage().nbytes()
        return tensor
