"""The first look at a model: layouts, memory and head, from two of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mat.mntk.head import collapsed, same_scalars, watching_outputs
from lightning_mat.mntk.layout import CrossSampleError, Layout, find_layout, row_ids, sketch
from lightning_mat.mntk.memory import SavedBytes
from lightning_mat.mntk.rules import explicit_forward, layer_rule
from lightning_mat.mntk.samples import count_samples
from lightning_mat.mntk.scalars import Scalars
from lightning_mat.mntk.tape import Call, Tape, linked_modules


@dataclass(frozen=True)
class Look:
    """What two samples tell about a model.

    Args:
        layouts: How each call's rows are laid out; None where they are routed.
        activations: Bytes per sample that a pass saves.
        captured: Bytes per sample of the inputs and output gradients of tracked layers, which
            share an entry where they share a parameter.
        unsure: Whether some layer had no gradient at all (an output initialised to zero), so that
            nothing was learned about its rows.
        head: Name of the linear layer whose output is the logits, if z can do without them.
    """

    layouts: dict[tuple[str, int], Layout | None]
    activations: int
    captured: dict[tuple[str, ...], int]
    head: str | None
    unsure: bool

    @property
    def routed(self) -> bool:
        """Whether some layer's rows are in no regular order."""
        return any(layout is None for layout in self.layouts.values())


def look(
    scalars: Scalars, modules: Mapping[str, nn.Module], names: Mapping[int, str], batch: Any
) -> Look:
    """Run a few samples forward once and backward twice, with weights 1 and with weights s + 1.

    Args:
        scalars: What is differentiated.
        modules: The tracked layers, by name.
        names: The tracked parameters' names, by ``id``.
        batch: The samples, at least two.

    Raises:
        ValueError: If a layer mixes the samples; the message names it.
    """
    samples = count_samples(batch)
    model = scalars.model
    sketches: dict[int, list[Tensor]] = {}
    held = dict.fromkeys(modules, 0)

    def arrived(call: Call) -> None:
        grad = call.grads.popitem()[1]
        found = sketches.setdefault(id(call), [])
        if not found:
            found.append(sketch(grad, call.row_dims(grad)))
        held[call.layer] += grad.numel() * grad.element_size()

    tape = Tape(modules, names, arrived, samples)
    saved = SavedBytes(model)
    head: str | None = None
    with ExitStack() as stack:
        stack.enter_context(saved)
        # first, so that it tells a person's own hooks from the tape's
        head_of = stack.enter_context(watching_outputs(model))
        stack.enter_context(tape.recording())
        if scalars.projects:
            logits = scalars.logits(batch, samples)
            z, head = scalars.project(logits), head_of(logits)
        else:
            z = scalars(batch, samples)
    saved.add(call.x for call in tape.calls if isinstance(call.x, Tensor))

    tape.backward(z, keep=True)
    plain = {key: found[0] for key, found in sketches.items()}
    captured = {layer: count // samples for layer, count in held.items()}
    sketches.clear()
    tape.backward(z, torch.arange(1, samples + 1, device=z.device))
    layouts: dict[tuple[str, int], Layout | None] = {}
    unsure = False
    for call in tape.calls:
        if id(call) in plain:
            ids = sample_ids(call, plain[id(call)], sketches[id(call)][0], samples)
            if (ids < 0).all():
                unsure = True
            else:
                layouts[call.key] = find_layout(ids, samples)
    # Layers that read one input (query, key and value) keep it once, and together.
    readers: dict[int, set[str]] = {}
    for call in tape.calls:
        if isinstance(call.x, Tensor):
            where = call.x.untyped_storage().data_ptr()
            if where not in readers:
                captured[call.layer] += call.x.numel() * call.x.element_size() // samples
            readers.setdefault(where, set()).add(call.layer)
    return Look(
        layouts,
        saved.total // samples,
        {
            layers: sum(captured[layer] for layer in layers)
            for layers in linked_modules(modules, names, readers.values())
        },
        head if _dispensable(head, scalars, modules, batch, z.detach()) else None,
        unsure,
    )


def sample_ids(call: Call, plain: Tensor, weighted: Tensor, samples: int) -> Tensor:
    """Return the sample of every row of a call, from the sketches of its gradients.

    Raises:
        ValueError: If rows depend on several samples; the message names the layer.
    """
    try:
        return row_ids(plain, weighted, plain.dim() - 1, samples)
    except CrossSampleError as error:
        layer = f"layer {call.site!r} ({type(call.module).__name__}) has no per-sample gradient: "
        if isinstance(call.x, Tensor) and call.x.dim() and len(call.x) % samples:
            raise CrossSampleError(
                f"{layer}it runs once for all samples, on an input of shape {tuple(call.x.shape)}; "
                "choose units that leave it out (see docs/units.md)"
            ) from None
        raise CrossSampleError(
            f"{layer}{error}. A layer above it mixes the samples of a batch; leave the units below "
            "that layer out, or replace it"
        ) from None


def _dispensable(
    head: str | None,
    scalars: Scalars,
    modules: Mapping[str, nn.Module],
    batch: Any,
    expected: Tensor,
) -> bool:
    """Return whether z is the same without the logits that the head would build."""
    if head is None or not isinstance(scalars.output, str) or _replayed_around(head, modules):
        return False
    module = scalars.model.get_submodule(head)
    assert isinstance(module, nn.Linear)
    if module.out_features == 1:
        return False
    with collapsed(module, head, scalars.output, scalars.seed), torch.no_grad():
        try:
            return same_scalars(expected, scalars.collapsed(batch, len(expected)))
        except (ValueError, RuntimeError, IndexError):
            # what follows the layer expects all logits
            return False


def _replayed_around(head: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a layer without a rule, which is run again later, contains the head."""
    replayed = [
        name
        for name, module in modules.items()
        if layer_rule(module) is None and explicit_forward(module) is None
    ]
    return any(name == "" or head.startswith(name + ".") for name in replayed)
