"""Per-sample gradients of any layer, by differentiating it once per sample: slower, exact.

For a layer without a rule the tape keeps its inputs, outputs and output gradients. The gradient of
sample s is that of ⟨layer(inputs of s), gradient of s⟩, taken with ``torch.func`` for many samples
at a time, or one by one where the layer's control flow depends on the data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_mat.mntk.factors import Factor
from lightning_mat.mntk.layout import Layout
from lightning_mat.mntk.memory import is_out_of_memory
from lightning_mat.mntk.tape import Call, own_parameters
from lightning_mat.units.unit import matrix_shape

log = logging.getLogger(__name__)
_logged: set[type[nn.Module]] = set()

# Bytes that the whole gradients of the samples of one step may take.
_STEP_BYTES = 32 << 20


class Replayed:
    """Per-sample gradients of one parameter of a layer, recomputed for each block of rows."""

    def __init__(self, replay: Replay, attribute: str) -> None:
        self.replay, self.attribute = replay, attribute
        self.samples = replay.samples
        parameter = replay.parameters[attribute]
        self.rows, self.columns = matrix_shape(parameter.shape)
        # what a step pays for it cannot be told from outside of the layer
        self.flops_per_element = 0.0

    def block(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)`` of every sample's gradient."""
        return self.replay.gradient(self.attribute, start, stop)

    def sources(self) -> None:
        """Return None: there are no tensors that hold it."""


class Replay:
    """A layer's call, taken apart into samples.

    Args:
        call: The call, with inputs, outputs and gradients.
        layout: Which rows of its tensors belong to which sample; sample-major.
        samples: S.

    Raises:
        ValueError: If the layer's tensors do not hold the samples along one dimension, or the
            layer, given one sample, returns something else than within the batch.
    """

    def __init__(self, call: Call, layout: Layout, samples: int) -> None:
        assert call.inputs is not None
        assert call.outputs is not None
        self.call, self.samples = call, samples
        self.parameters: dict[str, Tensor] = {
            attribute: parameter.detach()
            for attribute, parameter in own_parameters(call.module).items()
            if attribute in call.names
        }
        first = next(iter(call.grads.values()))
        self.dim, size = layout.dim, first.shape[layout.dim]
        leaves, self.structure = tree_flatten(call.inputs)
        self.leaves = [self._split(leaf, size) for leaf in leaves]
        self.grads = {
            i: self._split(g, size) for i, g in call.grads.items() if _batched(g, self.dim, size)
        }
        if len(self.grads) != len(call.grads):
            raise ValueError(_advice(call, "not all of its outputs have the samples in one place"))
        self._check(size)

    def _split(self, leaf: Any, size: int) -> Any:
        """Return [S, ...] for tensors that hold the samples, with each sample's rows in place."""
        if not _batched(leaf, self.dim, size):
            return leaf
        return _Samples(leaf.unflatten(self.dim, (self.samples, -1)).movedim(self.dim, 0))

    def _check(self, size: int) -> None:
        """Compare one sample's output with its part of the batch's."""
        assert self.call.outputs is not None
        with torch.no_grad():
            out = self._outputs(self.parameters, [_pick(leaf, 0) for leaf in self.leaves])
        for i in self.grads:
            expected = self._split(self.call.outputs[i], size).values[0]
            if out[i].shape != expected.shape or not torch.allclose(
                out[i], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
            ):
                raise ValueError(
                    _advice(self.call, "given one sample alone, it returns something else")
                )

    def _outputs(self, parameters: dict[str, Tensor], leaves: list[Any]) -> list[Any]:
        args, kwargs = tree_unflatten(leaves, self.structure)
        result = functional_call(self.call.module, parameters, args, kwargs)
        return tree_flatten(result)[0]

    def gradient(self, attribute: str, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)`` of one parameter's per-sample gradients."""
        target = self.parameters[attribute]
        others = {name: p for name, p in self.parameters.items() if name != attribute}
        mapped = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, _Samples)]

        def scalar(parameter: Tensor, inputs: list[Tensor], grads: dict[int, Tensor]) -> Tensor:
            leaves = list(self.leaves)
            for i, value in zip(mapped, inputs, strict=True):
                leaves[i] = value
            out = self._outputs({**others, attribute: parameter}, leaves)
            return torch.stack([(out[i] * g).sum() for i, g in grads.items()]).sum()

        inputs = [self.leaves[i].values for i in mapped]
        grads = {i: g.values for i, g in self.grads.items()}
        step = max(1, _STEP_BYTES // max(1, target.numel() * target.element_size()))
        parts = []
        for s in range(0, self.samples, step):
            some = [value[s : s + step] for value in inputs]
            some_grads = {i: g[s : s + step] for i, g in grads.items()}
            whole = _per_sample(scalar, target, some, some_grads)
            parts.append(whole.reshape(len(whole), *matrix_shape(target.shape))[:, start:stop])
        return torch.cat(parts)


class _Samples:
    """A tensor that holds the samples in dimension 0."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


def _pick(leaf: Any, sample: int) -> Any:
    return leaf.values[sample] if isinstance(leaf, _Samples) else leaf


def _batched(leaf: Any, dim: int, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == size


def _per_sample(
    scalar: Callable[..., Tensor], target: Tensor, inputs: list[Tensor], grads: dict[int, Tensor]
) -> Tensor:
    """Return the gradients of some samples, [s, *parameter]."""
    try:
        batched = vmap(grad(scalar), in_dims=(None, 0, 0), randomness="same")
        gradients: Tensor = batched(target, inputs, grads)
        return gradients
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # a layer that vmap cannot batch: a recurrent one, or one whose control flow depends on data
    parameter = target.clone().requires_grad_()
    rows = []
    for s in range(len(next(iter(grads.values())))):
        out = scalar(parameter, [v[s] for v in inputs], {i: g[s] for i, g in grads.items()})
        rows.append(torch.autograd.grad(out, parameter, materialize_grads=True)[0])
    return torch.stack(rows)


def fallback_factors(call: Call, layout: object, samples: int) -> dict[str, Factor]:
    """Return the per-sample gradients of a call of a layer that no rule knows.

    Raises:
        ValueError: If the samples cannot be taken apart; the message names the layer.
    """
    if not isinstance(layout, Layout) or not layout.major:
        raise ValueError(_advice(call, "its rows are not in the order of the samples"))
    if type(call.module) not in _logged:
        _logged.add(type(call.module))
        log.info(
            "no per-sample gradient rule for %s (layer %r): using torch.func, slower and exact",
            type(call.module).__name__,
            call.site,
        )
    replay = Replay(call, layout, samples)
    factors: dict[str, Factor] = {a: Replayed(replay, a) for a in replay.parameters}
    return factors


def _advice(call: Call, why: str) -> str:
    return (
        f"layer {call.site!r} ({type(call.module).__name__}) has no rule for per-sample gradients, "
        f"and {why}: leave it out of the units, or register a rule with register_layer_rule"
    )
