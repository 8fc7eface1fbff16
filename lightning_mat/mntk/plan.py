"""How a probe fits into the memory of a training step: micro-batches and groups of layers.

With B samples in a training step, a bytes of activations per sample and g bytes of gradients, a
step peaks at about ``B·a + g`` above the parameters and the optimizer's state. A probe of S ≤ B
samples runs in one pass, in which a layer's tensors are used and freed as the backward pass comes
by. For S > B the tensors of a layer have to wait for the other micro-batches, so that only as many
layers are kept in a pass as fit beside the activations of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MAX_WORKSPACE = 24 << 20
MIN_WORKSPACE = 256 << 10


@dataclass(frozen=True)
class Plan:
    """How to run one probe.

    Args:
        micro: Samples per forward pass.
        groups: Names of the layers whose tensors are kept in each pass over all samples.
        workspace: Bytes for the blocks of per-sample gradients.
    """

    micro: int
    groups: tuple[tuple[str, ...], ...]
    workspace: int


@dataclass(frozen=True)
class Footprint:
    """What a forward and backward pass holds, in bytes.

    Args:
        activations: Saved for the backward pass, per sample.
        captured: Inputs and output gradients of tracked layers, per sample; layers that share a
            parameter are one entry, for its uses have to be added up before its Gram.
        gradients: Of all trainable parameters.
        grams: Grams of all units, for the samples of the probe.
    """

    activations: int
    captured: Mapping[tuple[str, ...], int]
    gradients: int
    grams: int


def make_plan(
    samples: int,
    step_samples: int,
    footprint: Footprint,
    budget: int | None,
    micro: int,
    most: int = MAX_WORKSPACE,
) -> Plan:
    """Choose micro-batches and groups.

    Args:
        samples: S, samples of the probe.
        step_samples: B, samples of a training step.
        footprint: What the passes hold.
        budget: Bytes above the parameters; None for those of a training step.
        micro: Most samples per forward pass; lowered after an out-of-memory error.
        most: Bytes that the workspace may take at most: what the device's cache holds.
    """
    step = step_samples * footprint.activations + footprint.gradients
    limit = step if budget is None else budget
    workspace = min(most, max(MIN_WORKSPACE, footprint.gradients // 2, limit // 16))
    largest = max(footprint.captured.values(), default=0)
    fixed = workspace + footprint.grams
    one_pass = samples * (footprint.activations + largest) + fixed
    if samples <= micro and (samples <= step_samples if budget is None else one_pass <= limit):
        everything = tuple(name for names in footprint.captured for name in names)
        return Plan(samples, (everything,), workspace)
    # Smaller micro-batches leave more room for what has to wait, down to one sample at a time.
    largest_micro = max(1, min(micro, samples, step_samples))
    sizes = [largest_micro >> k for k in range(largest_micro.bit_length())]
    grouped = {size: _group(samples, footprint, limit - fixed, size) for size in sizes}
    fitting = [s for s in sizes if _fits(samples, footprint, limit - fixed, s)] or [1]
    size = min(fitting, key=lambda size: (_passes(grouped[size], samples, size), -size))
    return Plan(size, grouped[size], workspace)


# A micro-batch below this many samples keeps the processor less busy.
_SMALL = 4


def _passes(groups: tuple[tuple[str, ...], ...], samples: int, size: int) -> float:
    """Return what a plan costs, in passes over all samples."""
    return len(groups) * (1.0 if size >= min(_SMALL, samples) else 1.5)


def _fits(samples: int, footprint: Footprint, budget: int, size: int) -> bool:
    """Return whether the largest layer fits beside a micro-batch's activations."""
    largest = max(footprint.captured.values(), default=0)
    return samples * largest + size * footprint.activations <= budget


def _group(
    samples: int, footprint: Footprint, budget: int, size: int
) -> tuple[tuple[str, ...], ...]:
    """Return the layers in groups whose tensors fit beside a micro-batch's activations."""
    room = budget - size * footprint.activations
    groups: list[list[str]] = [[]]
    held = 0
    for names, each in footprint.captured.items():
        need = samples * each
        if groups[-1] and held + need > room:
            groups.append([])
            held = 0
        groups[-1].extend(names)
        held += need
    return tuple(tuple(group) for group in groups)
