"""Passes: micro-batches forward and backward through a model, and what its layers see of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mat.mntk.collect import Collector, GradientSum
from lightning_mat.mntk.head import collapsed
from lightning_mat.mntk.layout import CrossSampleError, Layout, sketch
from lightning_mat.mntk.look import Look, look, sample_ids
from lightning_mat.mntk.outputs import Output
from lightning_mat.mntk.samples import count_samples
from lightning_mat.mntk.scalars import Scalars
from lightning_mat.mntk.tape import Call, Tape


class IrregularError(Exception):
    """A layer's rows are not laid out as they were when the model was first looked at."""


def constant_output(model: nn.Module) -> str:
    """Return what is wrong where the sum of a model's outputs is a constant."""
    return (
        f"the sum of what {type(model).__name__} returns hardly depends on its parameters, as that "
        "of a softmax does not: λ_max would be rounding noise. Return logits, or measure another "
        "output (output='random' or 'loss')"
    )


class Passes:
    """Runs micro-batches through a model, and hands over what its layers saw of each sample.

    Args:
        scalars: What is differentiated, and of which model.
        modules: The tracked layers, by name.
        names: The tracked parameters' names, by ``id``.

    Attributes:
        look: What two samples told about the model, None before :meth:`learn`.
        unreached: Parameters that owners have and no operation uses on the way to what is measured.
        constant: Whether what is measured hardly depends on any other of them.
        routed: Whether some layer's rows are in no regular order.
    """

    def __init__(
        self, scalars: Scalars, modules: Mapping[str, nn.Module], names: Mapping[int, str]
    ) -> None:
        self._scalars, self._modules, self._names = scalars, modules, names
        self.look: Look | None = None
        self.routed = False
        self.unreached: frozenset[str] = frozenset()
        self.constant = False
        self._tolerance = 0.0

    @property
    def output(self) -> Output:
        """What is differentiated."""
        return self._scalars.output

    @property
    def known(self) -> Look:
        """What two samples told about the model."""
        assert self.look is not None, "learn() comes first"
        return self.look

    def learn(self, batch: Any, owned: Mapping[str, nn.Parameter]) -> None:
        """Look at the model with a few samples, and check what its layers show against autograd.

        Args:
            batch: The samples, at least two.
            owned: The parameters that units own, by name.

        Raises:
            ValueError: If a layer mixes the samples, or a parameter is used where no layer's call
                shows it; the message names it.
        """
        with self._naming_constants():
            try:
                self.look = look(self._scalars, self._modules, self._names, batch)
            except CrossSampleError:
                self._differentiate(batch, owned)  # to tell noise from samples that are mixed
                raise
        self.routed = self.look.routed
        try:
            with self._naming_constants():
                self._verify(batch, self._differentiate(batch, owned))
        except BaseException:
            self.look = None  # what was not checked is looked at again
            raise

    def _differentiate(self, batch: Any, owned: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the plain gradient of every owned parameter."""
        for parameter in owned.values():
            parameter.requires_grad_(True)
        try:
            total = self._scalars(batch, count_samples(batch)).sum()
            found: Sequence[Tensor | None] = [None] * len(owned)
            if total.requires_grad:
                found = torch.autograd.grad(total, list(owned.values()), allow_unused=True)
        finally:
            for parameter in owned.values():
                parameter.requires_grad_(False)
        self._tolerance = 1e-3 if total.dtype in (torch.float32, torch.float64) else 5e-2
        plain = dict(zip(owned, found, strict=True))
        self.unreached = frozenset(name for name, grad in plain.items() if grad is None)
        grads = {n: torch.zeros_like(owned[n]) if g is None else g for n, g in plain.items()}
        # How much of the total hangs on a parameter, to first order; one that is zero so far, as
        # LoRA's are, counts as one of ordinary size.
        effects = [
            float(grad.norm()) * max(float(owned[name].norm()), 1e-2 * grad.numel() ** 0.5)
            for name, grad in grads.items()
        ]
        size = float(total.detach().abs())
        self.constant = max(effects, default=0.0) < 1e-2 * self._tolerance * size
        return grads

    @contextmanager
    def _naming_constants(self) -> Iterator[None]:
        """Name what is wrong with a model's output where its noise looks like mixed samples."""
        try:
            yield
        except CrossSampleError as error:
            if self.constant and self.output == "sum_logits":
                raise ValueError(constant_output(self._scalars.model)) from error
            raise

    def _verify(self, batch: Any, expected: Mapping[str, Tensor]) -> None:
        """Compare the layers' per-sample gradients, added up, with the plain gradient."""
        collector = GradientSum(expected)
        while True:
            try:
                self.run(batch, self._modules, collector, last=True)
                break
            except IrregularError:
                self.routed = True
                collector = GradientSum(expected)
        collector.finish()
        if not self.constant:  # rounding noise adds up to nothing
            collector.check(self._tolerance)

    def run(
        self, batch: Any, modules: Mapping[str, nn.Module], collector: Collector, last: bool
    ) -> None:
        """Run one micro-batch forward and backward, handing calls over as they complete.

        Args:
            batch: Its samples.
            modules: The layers whose calls are wanted.
            collector: Takes them.
            last: Whether it is the last micro-batch of the probe.

        Raises:
            IrregularError: If rows are laid out otherwise than at the first look, unless
                :attr:`routed`.
        """
        samples = count_samples(batch)
        layouts: dict[int, Layout | None] = {}
        waiting: list[Call] = []

        def arrived(call: Call) -> None:
            layout = layouts[id(call)]
            if layout is not None and call.rule is not None:
                collector.add(call, layout, samples)
            elif not any(call is other for other in waiting):
                waiting.append(call)

        head = self.known.head
        hooked = {name: module for name, module in modules.items() if name != head}
        tape = Tape(hooked, self._names, arrived, samples)
        with tape.recording(), self._collapsed(tape, modules):
            compute = self._scalars if head is None else self._scalars.collapsed
            scalars = compute(batch, samples)
        collector.begin(tape.calls, samples, last)
        layouts.update((id(call), self._layout(call, samples)) for call in tape.calls)
        ragged = any(call.rule and layouts[id(call)] is None for call in tape.calls)
        for call in [call for call in tape.calls if call.known]:
            arrived(call)
        tape.backward(scalars, keep=ragged)
        if ragged:
            with self._naming_constants():
                self._find_rows(tape, scalars, waiting, collector, samples)
        for call in [call for call in waiting if call.rule is None]:
            collector.add(call, layouts[id(call)], samples)

    def _find_rows(
        self,
        tape: Tape,
        scalars: Tensor,
        waiting: list[Call],
        collector: Collector,
        samples: int,
    ) -> None:
        """Learn the samples of routed rows from a second backward pass with weights s + 1."""
        calls = [call for call in waiting if call.rule is not None]
        first = {id(call): call.grads.pop(0) for call in calls}
        plain = {
            id(call): sketch(first[id(call)], call.row_dims(first[id(call)])) for call in calls
        }
        weighted: dict[int, Tensor] = {}

        def arrived(call: Call) -> None:
            grad = call.grads.popitem()[1]
            if id(call) in plain:
                weighted[id(call)] = sketch(grad, call.row_dims(grad))

        tape.arrived = arrived
        exact = all(grad.dtype in (torch.float32, torch.float64) for grad in first.values())
        ids: dict[int, Tensor] = {}
        for weights, place, count in _weights(samples, exact):
            tape.backward(scalars, weights.to(scalars.device), keep=True)
            for call in calls:
                found = sample_ids(call, plain[id(call)], weighted[id(call)], count)
                # a row without a gradient, or with NaN, is negative in every pass
                before = ids.get(id(call), torch.zeros_like(found))
                ids[id(call)] = torch.where(found < 0, found, before + place * found)
        for call in calls:
            call.grads = {0: first.pop(id(call))}
            collector.add_routed(call, ids[id(call)].flatten(), samples)

    def _layout(self, call: Call, samples: int) -> Layout | None:
        """Return the layout of a call's rows, or None where they are routed."""
        layout = self.known.layouts.get(call.key)
        if call.rule is None:
            return layout
        dims = call.x_row_dims()
        if self.routed and dims == 1 and not call.known and not _images(call):
            return None
        if layout is None or not layout.fits(call.x.shape[:dims], samples):
            if not self.routed:
                raise IrregularError
            return None
        return layout

    @contextmanager
    def _collapsed(self, tape: Tape, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Let the last layer give z itself where it can, reporting its call if it is tracked."""
        head, output = self.known.head, self._scalars.output
        if head is None or not isinstance(output, str):
            yield
            return
        module = self._scalars.model.get_submodule(head)
        assert isinstance(module, nn.Linear)
        report = tape if head in modules else None
        with collapsed(module, head, output, self._scalars.seed, report):
            yield


def _weights(samples: int, exact: bool) -> Iterator[tuple[Tensor, int, int]]:
    """Yield (weights, place value, how many values) of the passes that tell the samples apart.

    One pass with weights 1 … S where products are exact enough; else one pass per binary digit of
    the sample's number, with weights 1 and 2, which no floating-point format rounds.
    """
    number = torch.arange(samples)
    if exact:
        yield number + 1, 1, samples
        return
    for bit in range(max(1, (samples - 1).bit_length())):
        yield 1 + ((number >> bit) & 1), 1 << bit, 2


def _images(call: Call) -> bool:
    """Return whether a call works on images, whose rows are samples and are never routed."""
    return bool(call.x.dim() > 2)
