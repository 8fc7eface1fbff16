"""Collector: gathers a parameter's uses until all are there, then adds them to the Grams.

A parameter may be used by several layers (tied weights) or several times (a shared layer), and its
samples may come in micro-batches. Its per-sample gradient is the sum over the uses; its Gram needs
all samples at once. Whatever is complete is added at once and freed, while the backward pass of the
last micro-batch goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mat.mntk.accumulate import Accumulator
from lightning_mat.mntk.factors import (
    Dense,
    Factor,
    Scaled,
    Summed,
    Zero,
    add_uses,
    stack_samples,
)
from lightning_mat.mntk.fallback import fallback_factors
from lightning_mat.mntk.layout import Layout, Ragged
from lightning_mat.mntk.tape import Call
from lightning_mat.mntk.words import Words

# Per-sample gradients that the check forms at a time: little beside the plain gradients that it
# compares them with, and few operations.
CHECKED_BYTES = 4 << 20


class Collector:
    """Adds calls to the Grams of the units that own the parameters used.

    Args:
        accumulator: Takes complete parameters.
        owners: Who owns what of each parameter: rows ``(unit, r0, r1, c0, c1)``, sorted by unit.
        cost: FLOPs per sample of each unit's weight gradient, ``[L]``, modified in place.
    """

    def __init__(
        self, accumulator: Accumulator | None, owners: Mapping[str, Words], cost: Tensor
    ) -> None:
        self.accumulator, self.owners, self.cost = accumulator, owners, cost
        self._sizes: list[int] = []
        self._batches: dict[str, dict[int, Factor]] = {}
        self._uses: dict[str, list[Factor]] = {}
        self._missing: Counter[str] = Counter()
        self._last = False

    def begin(self, calls: Sequence[Call], samples: int, last: bool) -> None:
        """Announce the calls of a micro-batch, whose gradients are about to arrive."""
        self._close()
        self._sizes.append(samples)
        self._last = last
        self._missing = Counter(name for call in calls for name in call.names.values())

    def add(self, call: Call, layout: Layout | None, samples: int) -> None:
        """Take a call whose rows lie in a regular order."""
        if call.rule is None:
            factors = fallback_factors(call, layout, samples)
        else:
            assert layout is not None
            x = layout.to_samples(call.x, call.x_row_dims(), samples)
            grad = layout.to_samples(call.grads[0], call.row_dims(call.grads[0]), samples)
            factors = call.rule.factors(call.module, x, grad)
        self._take(call, factors)

    def add_routed(self, call: Call, ids: Tensor, samples: int) -> None:
        """Take a call whose rows belong to the samples ``ids`` (-1: to none)."""
        assert call.rule is not None
        rows = Ragged(ids)
        x = rows.to_samples(call.x, call.x_row_dims(), samples)
        grad = rows.to_samples(call.grads[0], call.row_dims(call.grads[0]), samples)
        factors = call.rule.factors(call.module, x, grad)
        padded = samples * x.shape[1]
        share = ids.numel() / padded if padded else 0.0
        for factor in factors.values():
            factor.flops_per_element *= share
        self._take(call, factors)

    def finish(self) -> None:
        """Add what is left: parameters some of whose uses had no gradient."""
        self._close()
        for name in list(self._batches):
            self._flush(name)

    def _take(self, call: Call, factors: Mapping[str, Factor]) -> None:
        call.x, call.inputs, call.outputs, call.grads = None, None, None, {}
        for attribute, name in call.names.items():
            use = factors[attribute]
            if not self._last and isinstance(use, Scaled | Summed):
                # what waits for other micro-batches waits as a sum over tokens, not as the tokens
                use = Dense(use.block(0, use.rows))
            self._uses.setdefault(name, []).append(use)
            self._missing[name] -= 1
            if self._last and self._missing[name] == 0:
                self._batch(name, self._uses.pop(name))
                self._flush(name)

    def _close(self) -> None:
        """Close a micro-batch: its uses of a parameter are one factor."""
        for name, uses in self._uses.items():
            self._batch(name, uses)
        self._uses = {}

    def _batch(self, name: str, uses: Sequence[Factor]) -> None:
        self._batches.setdefault(name, {})[len(self._sizes) - 1] = add_uses(uses)

    def _flush(self, name: str) -> None:
        found = self._batches.pop(name)
        like = next(iter(found.values()))
        # a micro-batch that never used the parameter (no token for an expert) still has samples
        factor = stack_samples(
            [found.get(i) or Zero(size, like) for i, size in enumerate(self._sizes)]
        )
        pieces = self.owners[name]
        assert self.accumulator is not None
        self.accumulator.add(factor, pieces)
        elements = (pieces[:, 2] - pieces[:, 1]) * (pieces[:, 4] - pieces[:, 3])
        units, share = torch.from_numpy(pieces[:, 0]), torch.from_numpy(elements)
        self.cost.index_add_(0, units, factor.flops_per_element * share.double())


class GradientSum(Collector):
    """Adds per-sample gradients up over the samples, to compare them with the plain gradient.

    Args:
        expected: The plain gradient of every owned parameter.
    """

    def __init__(self, expected: Mapping[str, Tensor]) -> None:
        super().__init__(None, {}, torch.empty(0))
        self.expected = dict(expected)
        self.sizes = {name: float(gradient.norm()) for name, gradient in expected.items()}
        self.errors = dict(self.sizes)

    def _flush(self, name: str) -> None:
        factor = stack_samples(list(self._batches.pop(name).values()))
        expected = self.expected.pop(name).view(factor.rows, factor.columns)
        rows = max(1, CHECKED_BYTES // (4 * factor.samples * max(factor.columns, 1)))
        squared = 0.0
        for start in range(0, factor.rows, rows):
            stop = min(start + rows, factor.rows)
            found = factor.block(start, stop).sum(0)
            squared += float((found - expected[start:stop]).square().sum())
        self.errors[name] = squared**0.5

    def check(self, tolerance: float) -> None:
        """Compare the sums.

        Raises:
            ValueError: If a parameter's gradient is not the sum of what its layers' calls gave.
        """
        # gradients that cancel (a key's bias) are rounding noise
        noise = 1e-2 * tolerance * max(self.sizes.values(), default=0.0)
        for name, error in self.errors.items():
            if error > tolerance * self.sizes[name] + noise:
                raise ValueError(
                    f"parameter {name!r} is used where no call of its layer shows it (through "
                    "its tensor, layer.forward(...), or a ParameterList), so that its per-sample "
                    "gradients would be incomplete: call the layer itself, or leave the parameter "
                    "out of the units"
                )
