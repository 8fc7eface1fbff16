"""The probe: one forward and one backward pass that measure the mNTK of every unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_mat.mntk.accumulate import Accumulator, Solved, default_workspace
from lightning_mat.mntk.alignment import check_alignment, loss_alignment
from lightning_mat.mntk.collect import Collector, GradientSum
from lightning_mat.mntk.head import collapsed
from lightning_mat.mntk.layout import Layout, sketch
from lightning_mat.mntk.look import Look, look, sample_ids
from lightning_mat.mntk.memory import (
    ProbeMemoryError,
    free_memory,
    is_out_of_memory,
    memory_errors,
)
from lightning_mat.mntk.outputs import Forward, Output, check_output, default_forward
from lightning_mat.mntk.plan import MIN_WORKSPACE, Footprint, make_plan
from lightning_mat.mntk.quiet import PRECISIONS, quiet
from lightning_mat.mntk.rules.norm import NO_STATISTICS
from lightning_mat.mntk.samples import count_samples, take_samples, to_device
from lightning_mat.mntk.scalars import Scalars
from lightning_mat.mntk.spectra import Spectra
from lightning_mat.mntk.tape import Call, Tape, tracked_modules
from lightning_mat.mntk.words import piece_table
from lightning_mat.units.core import Partition

TOO_LARGE = (
    "a probe of one or two samples at a time does not fit the memory: lower n_samples or the "
    "length of the samples"
)
AROUND_TOO_LARGE = (
    "memory ran out before a probe's first pass or after its last one: the probe does not fit "
    "beside the model; lower n_samples or the length of the samples"
)


class IrregularError(Exception):
    """A layer's rows are not laid out as they were when the model was first looked at."""


def check_settings(precision: str, memory: str | int) -> None:
    """Raise a ValueError if a precision or a memory bound is none."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if memory != "auto" and (not isinstance(memory, int) or memory <= 0):
        raise ValueError(f'memory must be "auto" or a positive number of bytes, got {memory!r}')


class Probe:
    """Measures spectra again and again; looks at the model once.

    The first measurement runs two samples through the model to learn where each layer holds the
    samples, how much memory a pass takes, and whether the last layer is linear.

    Args:
        model: The model.
        part: Its units.
        output: The scalar per sample, see :mod:`lightning_mat.mntk.outputs`.
        forward: ``(model, batch) -> logits``; by default the model is called with the batch's
            inputs.
        precision: ``"float32"``, ``"tf32"`` or ``"bf16"``.
        memory: Bytes that a probe may take above the model, or ``"auto"``: as much as a training
            step on ``step_samples`` samples.
        backend: ``"auto"``, ``"extension"`` or ``"eager"``, see :mod:`lightning_mat.mntk.ops`.
        step_samples: Samples of a training step on this device; by default those of the probe.
        keep_gram: Keep the mNTKs themselves.
        seed: Of ``output="random"``.
        alignment: Also measure ``Spectra.alignment``, which exists for ``output="loss"``.

    Raises:
        ValueError: If an argument is none of those, the partition has no units, a layer
            normalises over the samples of a batch, or the output has no alignment.
    """

    def __init__(
        self,
        model: nn.Module,
        part: Partition,
        *,
        output: Output = "sum_logits",
        forward: Forward | None = None,
        precision: str = "float32",
        memory: str | int = "auto",
        backend: str = "auto",
        step_samples: int | None = None,
        keep_gram: bool = False,
        seed: int = 0,
        alignment: bool = False,
    ) -> None:
        check_output(output)
        check_settings(precision, memory)
        if alignment:
            check_alignment(output)
        if not len(part):
            raise ValueError("the partition has no units: there is nothing to measure")
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                raise ValueError(f"layer {name!r} ({type(module).__name__}): {NO_STATISTICS}")
        self.model, self.part = model, part
        self.precision, self.backend = precision, backend
        self.memory = None if memory == "auto" else int(memory)
        self.step_samples, self.keep_gram = step_samples, keep_gram
        self.alignment = alignment
        self.modules, self.names = tracked_modules(model, tuple(part.owners), part.aliases)
        self._owners = {name: piece_table(owned) for name, owned in part.owners.items()}
        self._remaining = np.zeros(len(part), dtype=np.int64)
        for pieces in self._owners.values():
            self._remaining[np.unique(pieces[:, 0])] += 1
        self._parameters = {n: p for n, p in model.named_parameters() if n in part.owners}
        self._scalars = Scalars(model, output, forward or default_forward, seed)
        self._look: Look | None = None
        self._seen: list[tuple[str, nn.Module]] = []
        self._routed = False

    @memory_errors(AROUND_TOO_LARGE)
    def measure(self, batch: Any) -> Spectra:
        """Return the spectra over the samples of one batch; leaves no trace in the model.

        Args:
            batch: Nested dicts, lists or tuples of tensors, the S ≥ 2 samples in dimension 0.

        Raises:
            ValueError: If there are fewer than two samples, the output cannot be computed, or a
                layer has no per-sample gradient, or a unit's layer was replaced since the probe was
                made; the message names it.
            ProbeMemoryError: If not even one sample fits the memory, or what is there before and
                after the passes does not.
        """
        self._check_model()
        samples = count_samples(batch)
        if samples < 2:
            raise ValueError(
                f"n_samples must be ≥ 2, got {samples}: an mNTK needs at least two samples"
            )
        device = next(self.model.parameters()).device
        batch = to_device(batch, device)
        with quiet(self.model, self.precision):
            self._prepare(batch)
            micro = samples
            while True:
                try:
                    solved, cost = self._measure(batch, samples, micro)
                    break
                except IrregularError:
                    self._routed = True
                    continue
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if micro == 1:
                        raise ProbeMemoryError(TOO_LARGE) from error
                micro = max(1, micro // 2)
                free_memory(device)
        grams = None if solved.grams is None else solved.grams.cpu()
        alignment = loss_alignment(grams) if self.alignment and grams is not None else None
        if not self.keep_gram:
            grams = None
        values = solved.eigenvalues.cpu().clamp_min(0)
        return Spectra(self.part.names, values, cost, grams, alignment)

    @memory_errors(AROUND_TOO_LARGE)
    def prepare(self, batch: Any) -> None:
        """Look at the model, as the first measurement does, to find early what cannot be measured.

        Args:
            batch: At least two samples.

        Raises:
            ValueError: As :meth:`measure`.
            ProbeMemoryError: Likewise.
        """
        batch = to_device(batch, next(self.model.parameters()).device)
        with quiet(self.model, self.precision):
            self._prepare(batch)

    def _check_model(self) -> None:
        """Raise a ValueError if the units' layers and parameters are no longer the model's."""
        layers, parameters = dict(self.model.named_modules()), dict(self.model.named_parameters())
        gone = [name for name, known in self.modules.items() if layers.get(name) is not known]
        gone += [n for n, known in self._parameters.items() if parameters.get(n) is not known]
        if gone:
            raise ValueError(
                f"{len(gone)} layers and parameters of units are no longer in the model (first "
                f"{gone[0]!r}): they were replaced after the units were found, and could not be "
                "measured any more. Replace layers before the training starts, or leave their "
                "parameters out of the units"
            )

    def _prepare(self, batch: Any) -> None:
        layers = list(self.model.named_modules())
        # A layer that was added may come after the one that was the last.
        if self._look is not None and not self._look.unsure and layers == self._seen:
            return
        self._seen = layers
        two = take_samples(batch, 0, 2)
        try:
            self._look = look(self._scalars, self.modules, self.names, two)
            self._routed = self._look.routed
            self._verify(two)
        except (TypeError, NotImplementedError) as error:
            raise ValueError(
                f"the probe cannot call {type(self.model).__name__} with a batch of type "
                f"{type(batch).__name__} ({error}): pass forward=lambda model, batch: ... that "
                "returns the logits"
            ) from error
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise ProbeMemoryError(TOO_LARGE) from error
            raise

    def _verify(self, batch: Any) -> None:
        """Compare the layers' per-sample gradients, added up, with the plain gradient.

        Raises:
            ValueError: If a parameter is used where no layer's call shows it.
        """
        samples = count_samples(batch)
        owned = {name: p for name, p in self.model.named_parameters() if name in self.part.owners}
        for parameter in owned.values():
            parameter.requires_grad_(True)
        try:
            total = self._scalars(batch, samples).sum()
            plain = torch.autograd.grad(
                total, list(owned.values()), allow_unused=True, materialize_grads=True
            )
        finally:
            for parameter in owned.values():
                parameter.requires_grad_(False)
        expected = dict(zip(owned, plain, strict=True))
        collector = GradientSum(expected)
        while True:
            try:
                self._pass(batch, self.modules, collector, last=True)
                break
            except IrregularError:
                self._routed = True
                collector = GradientSum(expected)
        collector.finish()
        collector.check(1e-3 if total.dtype in (torch.float32, torch.float64) else 5e-2)

    def _measure(self, batch: Any, samples: int, micro: int) -> tuple[Solved, Tensor]:
        """Return the eigenvalues and the costs ``[L]``."""
        first = next(self.model.parameters())
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        trainable = [p for n, p in self.model.named_parameters() if n not in self.part.frozen]
        gram_bytes = len(self.part) * samples**2 * dtype.itemsize
        gradients = sum(p.numel() * p.element_size() for p in trainable)
        known = self._known()
        footprint = Footprint(known.activations, known.captured, gradients, gram_bytes)
        most = default_workspace(first.device)
        step_samples = self.step_samples or samples
        plan = make_plan(samples, step_samples, footprint, self.memory, micro, most)
        accumulator = Accumulator(
            self._remaining,
            samples,
            device=first.device,
            dtype=dtype,
            precision=self.precision,
            workspace=max(MIN_WORKSPACE, plan.workspace * micro // samples),
            keep_gram=self.keep_gram or self.alignment,
            backend=self.backend,
        )
        cost = torch.zeros(len(self.part), dtype=torch.float64)
        for group in plan.groups:
            collector = Collector(accumulator, self._owners, cost)
            modules = {name: self.modules[name] for name in group}
            starts = range(0, samples, plan.micro)
            for start in starts:
                part = take_samples(batch, start, min(start + plan.micro, samples))
                self._pass(part, modules, collector, last=start == starts[-1])
            collector.finish()
        return accumulator.finish(), cost

    def _pass(
        self, batch: Any, modules: Mapping[str, nn.Module], collector: Collector, last: bool
    ) -> None:
        """Run one micro-batch forward and backward, handing calls over as they complete."""
        samples = count_samples(batch)
        layouts: dict[int, Layout | None] = {}
        waiting: list[Call] = []

        def arrived(call: Call) -> None:
            layout = layouts[id(call)]
            if layout is not None and call.rule is not None:
                collector.add(call, layout, samples)
            elif not any(call is other for other in waiting):
                waiting.append(call)

        head = self._known().head
        hooked = {name: module for name, module in modules.items() if name != head}
        tape = Tape(hooked, self.names, arrived, samples)
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
        layout = self._known().layouts.get(call.key)
        if call.rule is None:
            return layout
        dims = call.x_row_dims()
        if self._routed and dims == 1 and not call.known and not _images(call):
            return None
        if layout is None or not layout.fits(call.x.shape[:dims], samples):
            if not self._routed:
                raise IrregularError
            return None
        return layout

    @contextmanager
    def _collapsed(self, tape: Tape, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Let the last layer give z itself where it can, reporting its call if it is tracked."""
        head, output = self._known().head, self._scalars.output
        if head is None or not isinstance(output, str):
            yield
            return
        module = self.model.get_submodule(head)
        assert isinstance(module, nn.Linear)
        report = tape if head in modules else None
        with collapsed(module, head, output, self._scalars.seed, report):
            yield

    def _known(self) -> Look:
        assert self._look is not None
        return self._look


def mntk(
    model: nn.Module,
    batch: Any,
    part: Partition,
    *,
    output: Output = "sum_logits",
    forward: Forward | None = None,
    precision: str = "float32",
    memory: str | int = "auto",
    backend: str = "auto",
    keep_gram: bool = False,
    seed: int = 0,
    alignment: bool = False,
) -> Spectra:
    r"""Return the spectra of the modular neural tangent kernels of all units of a model.

    :math:`\Theta^l = J_l J_l^\top`, with :math:`J_l` the Jacobian of one scalar per sample with
    respect to everything that unit l owns: weights, biases, norms. The model is unchanged
    afterwards, to the bit.

    Args:
        model: Any module; put in eval mode while it is measured.
        batch: The S ≥ 2 samples, as nested dicts, lists or tuples of tensors, samples first.
        part: The units, from :func:`lightning_mat.partition`.
        output: The scalar: ``"sum_logits"`` (the paper's), ``"random"``, ``"loss"``, or a callable
            ``(model, batch) -> [S]``.
        forward: ``(model, batch) -> logits [S, ...]`` where the default, calling the model with the
            batch's inputs, does not fit.
        precision: ``"float32"``, ``"tf32"`` or ``"bf16"``: of the passes and the products; Grams
            are accumulated in float32 (float64 for a float64 model), eigenvalues in float64.
        memory: Bytes that the probe may take above the model; ``"auto"`` for those of a training
            step on these samples.
        backend: ``"auto"``, ``"extension"`` or ``"eager"``.
        keep_gram: Also return the mNTKs, ``Spectra.gram``.
        seed: Of ``output="random"``.
        alignment: Also return ``Spectra.alignment``, which exists for ``output="loss"``.

    Raises:
        ValueError: For bad arguments, fewer than two samples, or a layer without per-sample
            gradients, named in the message.

    Source:
        Shi et al. (NeurIPS 2023), definition 1.
    """
    probe = Probe(
        model,
        part,
        output=output,
        forward=forward,
        precision=precision,
        memory=memory,
        backend=backend,
        keep_gram=keep_gram,
        seed=seed,
        alignment=alignment,
    )
    return probe.measure(batch)


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
