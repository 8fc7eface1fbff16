"""The probe: one forward and one backward pass that measure the mNTK of every unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_mat.mntk import ops
from lightning_mat.mntk.collect import Collector
from lightning_mat.mntk.head import collapsed, same_scalars, watching_outputs
from lightning_mat.mntk.layout import CrossSampleError, Layout, find_layout, row_ids, sketch
from lightning_mat.mntk.memory import SavedBytes, is_out_of_memory
from lightning_mat.mntk.outputs import (
    Forward,
    Output,
    check_output,
    default_forward,
    logits_of,
    project,
    sample_losses,
    targets_of,
)
from lightning_mat.mntk.plan import MIN_WORKSPACE, Footprint, make_plan
from lightning_mat.mntk.quiet import PRECISIONS, quiet
from lightning_mat.mntk.rules import explicit_forward, layer_rule
from lightning_mat.mntk.rules.norm import NO_STATISTICS
from lightning_mat.mntk.samples import count_samples, take_samples, to_device
from lightning_mat.mntk.spectra import Spectra
from lightning_mat.mntk.tape import Call, Tape, linked_modules, tracked_modules
from lightning_mat.units.core import Partition

Layouts = dict[tuple[str, int], Layout | None]


class IrregularError(Exception):
    """A layer's rows are not laid out as they were when the model was first looked at."""


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

    Raises:
        ValueError: If an argument is none of those, the partition has no units, or a layer
            normalises over the samples of a batch.
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
    ) -> None:
        check_output(output)
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
        if memory != "auto" and (not isinstance(memory, int) or memory <= 0):
            raise ValueError(f'memory must be "auto" or a positive number of bytes, got {memory!r}')
        if not len(part):
            raise ValueError("the partition has no units: there is nothing to measure")
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                raise ValueError(f"layer {name!r} ({type(module).__name__}): {NO_STATISTICS}")
        self.model, self.part, self.output = model, part, output
        self.forward = forward or default_forward
        self.precision, self.backend, self.seed = precision, backend, seed
        self.memory = None if memory == "auto" else int(memory)
        self.step_samples, self.keep_gram = step_samples, keep_gram
        self.modules, self.names = tracked_modules(model, tuple(part.owners), part.aliases)
        self._head: str | None = None
        self._layouts: Layouts | None = None
        self._routed = False
        self._activations = 0
        self._captured: dict[tuple[str, ...], int] = {}

    def measure(self, batch: Any) -> Spectra:
        """Return the spectra over the samples of one batch; leaves no trace in the model.

        Args:
            batch: Nested dicts, lists or tuples of tensors, the S ≥ 2 samples in dimension 0.

        Raises:
            ValueError: If there are fewer than two samples, the output cannot be computed, or a
                layer has no per-sample gradient; the message names it.
            RuntimeError: If not even one sample fits the memory.
        """
        samples = count_samples(batch)
        if samples < 2:
            raise ValueError(
                f"n_samples must be ≥ 2, got {samples}: an mNTK needs at least two samples"
            )
        device = next(self.model.parameters()).device
        batch = to_device(batch, device)
        with quiet(self.model, self.precision):
            if self._layouts is None:
                self._look(take_samples(batch, 0, 2))
            micro = samples
            while True:
                try:
                    grams, cost = self._measure(batch, samples, micro)
                    break
                except IrregularError:
                    self._routed = True
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if micro == 1:
                        raise RuntimeError(
                            "a probe of one sample at a time does not fit the memory: lower "
                            "n_samples or the length of the samples"
                        ) from error
                    micro = max(1, micro // 2)
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
        values = ops.gram_eigenvalues(grams, backend=self.backend).cpu().clamp_min(0)
        return Spectra(self.part.names, values, cost, grams.cpu() if self.keep_gram else None)

    def _measure(self, batch: Any, samples: int, micro: int) -> tuple[Tensor, Tensor]:
        """Return the Grams ``[L, S, S]`` and the costs ``[L]``."""
        first = next(self.model.parameters())
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        trainable = [p for n, p in self.model.named_parameters() if n not in self.part.frozen]
        gram_bytes = len(self.part) * samples**2 * dtype.itemsize
        gradients = sum(p.numel() * p.element_size() for p in trainable)
        footprint = Footprint(self._activations, self._captured, gradients, gram_bytes)
        plan = make_plan(samples, self.step_samples or samples, footprint, self.memory, micro)
        workspace = max(MIN_WORKSPACE, plan.workspace * micro // samples)
        grams = torch.zeros(len(self.part), samples, samples, dtype=dtype, device=first.device)
        cost = torch.zeros(len(self.part), dtype=torch.float64)
        for group in plan.groups:
            collector = Collector(self.part.owners, grams, cost, workspace, self.backend)
            modules = {name: self.modules[name] for name in group}
            starts = range(0, samples, plan.micro)
            for start in starts:
                part = take_samples(batch, start, min(start + plan.micro, samples))
                self._pass(part, modules, collector, last=start == starts[-1])
            collector.finish()
        return grams, cost

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

        hooked = {name: module for name, module in modules.items() if name != self._head}
        tape = Tape(hooked, self.names, arrived, samples)
        with tape.recording(), self._collapsed(tape, modules):
            scalars = self._scalars(batch, samples)
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
        routed = {id(call): call.grads.pop(0) for call in waiting if call.rule is not None}
        weighted: dict[int, Tensor] = {}

        def arrived(call: Call) -> None:
            grad = call.grads.popitem()[1]
            if id(call) in routed:
                weighted[id(call)] = sketch(grad, call.row_dims(grad))

        tape.arrived = arrived
        tape.backward(scalars, torch.arange(1, samples + 1, device=scalars.device))
        for call in [call for call in waiting if call.rule is not None]:
            first = routed.pop(id(call))
            plain = sketch(first, call.row_dims(first))
            ids = _ids(call, plain, weighted[id(call)], samples)
            call.grads = {0: first}
            collector.add_routed(call, ids.flatten(), samples)

    def _layout(self, call: Call, samples: int) -> Layout | None:
        """Return the layout of a call's rows, or None where they are routed."""
        assert self._layouts is not None
        layout = self._layouts.get(call.key)
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

    def _scalars(self, batch: Any, samples: int) -> Tensor:
        """Return z, shape ``[S]``.

        Raises:
            ValueError: If a callable output returns another shape.
        """
        if callable(self.output):
            scalars = self.output(self.model, batch)
            if not isinstance(scalars, Tensor) or scalars.shape != (samples,):
                found = list(scalars.shape) if isinstance(scalars, Tensor) else type(scalars)
                raise ValueError(
                    f"output must return one scalar per sample, a tensor of shape [{samples}], "
                    f"got {found}"
                )
            return scalars
        result = self.forward(self.model, batch)
        logits = logits_of(result, samples)
        if self.output == "loss":
            return sample_losses(self.model, logits, targets_of(batch))
        if self._head is not None:
            return logits.flatten(1).sum(1)
        return project(self.output, logits, self.seed)

    @contextmanager
    def _collapsed(self, tape: Tape, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        if self._head is None or callable(self.output):
            yield
            return
        module = self.model.get_submodule(self._head)
        assert isinstance(module, nn.Linear)
        report = tape if self._head in modules else None
        with collapsed(module, self._head, self.output, self.seed, report):
            yield

    def _look(self, batch: Any) -> None:
        """Learn layouts, memory and the head from two samples."""
        samples = count_samples(batch)
        sketches: dict[int, list[Tensor]] = {}
        held = dict.fromkeys(self.modules, 0)

        def arrived(call: Call) -> None:
            grad = call.grads.popitem()[1]
            found = sketches.setdefault(id(call), [])
            if not found or found[0].shape[:-1] == grad.shape[: call.row_dims(grad)]:
                found.append(sketch(grad, call.row_dims(grad)))
            held[call.site.split(":")[0]] += grad.numel() * grad.element_size()

        tape = Tape(self.modules, self.names, arrived, samples)
        saved = SavedBytes(self.model)
        with ExitStack() as stack:
            stack.enter_context(saved)
            # first, so that it tells a person's own hooks from the tape's
            head_of = stack.enter_context(watching_outputs(self.model))
            stack.enter_context(tape.recording())
            scalars, head = self._look_forward(batch, samples, head_of)
        saved.add(call.x for call in tape.calls if isinstance(call.x, Tensor))
        weights = torch.arange(1, samples + 1, device=scalars.device)
        tape.backward(scalars, keep=True)
        captured = {name: count // samples for name, count in held.items()}
        plain = {key: found[0] for key, found in sketches.items()}
        sketches.clear()
        tape.backward(scalars, weights)
        layouts: Layouts = {}
        for call in tape.calls:
            if id(call) in plain:
                ids = _ids(call, plain[id(call)], sketches[id(call)][0], samples)
                layouts[call.key] = find_layout(ids, samples)
            if isinstance(call.x, Tensor):
                each = call.x.numel() * call.x.element_size() // samples
                captured[call.site.split(":")[0]] += each
        self._routed = any(layout is None for layout in layouts.values())
        self._captured = {
            layers: sum(captured[layer] for layer in layers)
            for layers in linked_modules(self.modules, self.names)
        }
        self._activations = saved.total // samples
        self._layouts = layouts
        self._head = self._try_head(batch, samples, head, scalars.detach())

    def _look_forward(
        self, batch: Any, samples: int, head_of: Callable[[Tensor], str | None]
    ) -> tuple[Tensor, str | None]:
        """Return z and the name of the linear layer that gave the logits, if one did."""
        if callable(self.output) or self.output == "loss":
            return self._scalars(batch, samples), None
        logits = logits_of(self.forward(self.model, batch), samples)
        return project(self.output, logits, self.seed), head_of(logits)

    def _replayed_around(self, name: str) -> bool:
        """Return whether a layer without a rule, which is run again later, contains another."""
        replayed = [
            outer
            for outer, module in self.modules.items()
            if layer_rule(module) is None and explicit_forward(module) is None
        ]
        return any(outer == "" or name.startswith(outer + ".") for outer in replayed)

    def _try_head(self, batch: Any, samples: int, head: str | None, expected: Tensor) -> str | None:
        """Return the head if z is the same without the logits, else None."""
        if head is None or callable(self.output):
            return None
        module = self.model.get_submodule(head)
        assert isinstance(module, nn.Linear)
        if module.out_features == 1 or self._replayed_around(head):
            return None
        with collapsed(module, head, self.output, self.seed), torch.no_grad():
            try:
                logits = logits_of(self.forward(self.model, batch), samples)
                same = same_scalars(expected, logits.flatten(1).sum(1))
            except (ValueError, RuntimeError, IndexError):
                # what follows the layer expects all logits
                return None
        return head if same else None


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
    )
    return probe.measure(batch)


def _ids(call: Call, plain: Tensor, weighted: Tensor, samples: int) -> Tensor:
    """Return the sample of every row of a call from the sketches of its gradients."""
    try:
        return row_ids(plain, weighted, plain.dim() - 1, samples)
    except CrossSampleError as error:
        raise ValueError(
            f"layer {call.site!r} ({type(call.module).__name__}) has no per-sample gradient: "
            f"{error}. A layer above it mixes the samples of a batch; leave the units below that "
            "layer out, or replace it"
        ) from None


def _images(call: Call) -> bool:
    """Return whether a call works on images, whose rows are samples and are never routed."""
    return bool(call.x.dim() > 2)
