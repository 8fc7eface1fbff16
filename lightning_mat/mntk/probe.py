"""The probe: one forward and one backward pass that measure the mNTK of every unit."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_mat.mntk.accumulate import Accumulator, Solved, default_workspace
from lightning_mat.mntk.alignment import check_alignment, loss_alignment
from lightning_mat.mntk.collect import Collector
from lightning_mat.mntk.memory import (
    ProbeMemoryError,
    free_memory,
    is_out_of_memory,
    memory_errors,
)
from lightning_mat.mntk.outputs import Forward, Output, check_output, default_forward
from lightning_mat.mntk.passes import IrregularError, Passes, constant_output
from lightning_mat.mntk.plan import MIN_WORKSPACE, Footprint, make_plan
from lightning_mat.mntk.quiet import PRECISIONS, quiet
from lightning_mat.mntk.rules.norm import NO_STATISTICS
from lightning_mat.mntk.samples import count_samples, take_samples, to_device
from lightning_mat.mntk.scalars import Scalars
from lightning_mat.mntk.spectra import Spectra
from lightning_mat.mntk.tape import tracked_modules
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
        scalars = Scalars(model, output, forward or default_forward, seed)
        self._passes = Passes(scalars, self.modules, self.names)
        self._seen: list[tuple[str, nn.Module]] = []

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
                    self._passes.routed = True
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
        look = self._passes.look
        if look is not None and not look.unsure and layers == self._seen:
            return
        self._seen = layers
        owned = {n: p for n, p in self.model.named_parameters() if n in self.part.owners}
        try:
            self._passes.learn(take_samples(batch, 0, 2), owned)
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
        self._warn()

    def _warn(self) -> None:
        """Say which units cannot be measured, because what is measured does not depend on them."""
        reached = {
            int(unit)
            for name, pieces in self._owners.items()
            if name not in self._passes.unreached
            for unit in pieces[:, 0]
        }
        # No token of the first samples may have been routed to an expert.
        blind = [
            name
            for unit, (name, kind) in enumerate(zip(self.part.names, self.part.kinds, strict=True))
            if unit not in reached and kind != "expert"
        ]
        if blind:
            warnings.warn(
                f"{len(blind)} of {len(self.part)} units (first {blind[0]!r}) are not used on the "
                f"way to what {type(self.model).__name__} gives the probe: their λ_max is 0, and a "
                "threshold lets them rest for good. Pass forward=lambda model, batch: ... that "
                "uses them as training does, or leave them out of the units",
                stacklevel=2,
            )
        elif self._passes.constant and self._passes.output == "sum_logits":
            warnings.warn(constant_output(self.model), stacklevel=2)

    def _measure(self, batch: Any, samples: int, micro: int) -> tuple[Solved, Tensor]:
        """Return the eigenvalues and the costs ``[L]``."""
        first = next(self.model.parameters())
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        trainable = [p for n, p in self.model.named_parameters() if n not in self.part.frozen]
        gram_bytes = len(self.part) * samples**2 * dtype.itemsize
        gradients = sum(p.numel() * p.element_size() for p in trainable)
        known = self._passes.known
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
                self._passes.run(part, modules, collector, last=start == starts[-1])
            collector.finish()
        return accumulator.finish(), cost


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
