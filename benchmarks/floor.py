"""The floor of the Gram stage: what it must compute and move, and how fast the device does so.

Operations are counted per layer for the cheaper of the direct and the ghost way, bytes as if every
input were read once and the eigenvalues written once. The ceilings are the fastest of some large
copies and matrix products, measured here and now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import interleaved
from benchmarks.workloads import Inputs
from lightning_mat.mntk.kernel import Layer

# What torch calls the same precision of float32 matrix products.
TORCH_PRECISION = {"float32": "highest", "tf32": "high", "bf16": "medium"}


class Count(NamedTuple):
    """What the Gram stage must do at least."""

    flops: int
    bytes: int


class Ceilings(NamedTuple):
    """What the device does at most: bytes per second copied, FLOP per second multiplied."""

    bandwidth: float
    peak: dict[str, float]  # per precision


def tokens_of(layer: Layer, b: Tensor) -> int:
    """Return T: tokens of a sample, or output positions of a convolution."""
    return prod(b.shape[2:]) if layer.kind == "conv" else b.shape[1]


def layer_flops(layer: Layer, a: Tensor, b: Tensor) -> int:
    """Return the operations of a layer's cheaper way to its Grams (DESIGN, section 6).

    With E owned elements, direct is 2·S·T·E + S²·E: form the gradients, then half of the symmetric
    products at two operations each. Ghost is S²·T²·(d + p), for d columns and p owned rows, and
    stands open to slabs of full width, or in the same way of full height; a convolution's patches
    need not be formed for it: their products are sums of kernel² products of the P elements of a
    channel, S²·P²·channels + S²·T²·(kernel² + p). Per-sample gradients of vectors take an operation
    per token and row, two with a normalised input.
    """
    samples, tokens = len(b), tokens_of(layer, b)
    rects = [r for _, r in layer.owned]
    elements = sum(r.numel for r in rects)
    if layer.kind in ("bias", "scale"):
        return (1 + (layer.kind == "scale")) * samples * tokens * elements + samples**2 * elements
    ways = [2 * samples * tokens * elements + samples**2 * elements]
    pairs = (samples * tokens) ** 2
    if layer.kind == "conv" and layer.geometry.groups == 1:
        taps, positions = prod(layer.geometry.kernel), prod(a.shape[2:])
        of_inputs = (samples * positions) ** 2 * a.shape[1] + pairs * taps
    else:
        of_inputs = pairs * layer.columns
    if all(r.c0 == 0 and r.c1 == layer.columns for r in rects):
        rows = sum(r.r1 - r.r0 for r in rects)
        ways.append(of_inputs + pairs * rows)
    if layer.kind == "linear" and all(r.r0 == 0 and r.r1 == layer.rows for r in rects):
        columns = sum(r.c1 - r.c0 for r in rects)
        ways.append(pairs * (columns + layer.rows))
    return min(ways)


def count(inputs: Inputs) -> Count:
    """Return the fewest operations, and the bytes of inputs and eigenvalues, each moved once."""
    flops = sum(
        layer_flops(layer, a, b)
        for layer, a, b in zip(inputs.plan.layers, inputs.a, inputs.b, strict=True)
    )
    return Count(flops, inputs.bytes + 8 * inputs.plan.units * len(inputs.b[0]))


def floor(counted: Count, ceilings: Ceilings, precision: str) -> dict[str, Any]:
    """Return the floor in seconds, and which of operations and bytes sets it."""
    # The CPU has one precision for float32: float32.
    operations = counted.flops / ceilings.peak.get(precision, ceilings.peak["float32"])
    bandwidth = counted.bytes / ceilings.bandwidth
    found = {
        "flops": counted.flops,
        "bytes": counted.bytes,
        "seconds_of_operations": operations,
        "seconds_of_bytes": bandwidth,
        "seconds": max(operations, bandwidth),
        "bound": "operations" if operations > bandwidth else "bytes",
    }
    if precision == "float32" and "tf32" in ceilings.peak:
        # Matrix units reach float32's accuracy with three TF32 products, often sooner.
        best = max(ceilings.peak["float32"], ceilings.peak["tf32"] / 3)
        found["seconds_with_three_tf32_terms"] = max(counted.flops / best, bandwidth)
    return found


def measure_ceilings(device: str, quick: bool = False) -> Ceilings:
    """Return the fastest of five large copies and of five large matrix products per precision."""
    cuda = device != "cpu"
    bytes_ = 1 << 20 if quick else min(4 << 30, _memory(device) // 16) if cuda else 512 << 20
    bandwidth = _bandwidth(bytes_, device)
    n = 128 if quick else 8192 if cuda else 3072
    peak = {}
    for precision in TORCH_PRECISION if cuda else ("float32",):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        with matmul_precision(TORCH_PRECISION[precision]):
            seconds = _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
        peak[precision] = 2 * n**3 / seconds
    return Ceilings(bandwidth, peak)


def cache_bytes(device: str) -> int:
    """Return the bytes of the last-level cache, 64 MiB where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [
        int(text[:-1]) * units[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in units
    ]
    return max(sizes, default=64 << 20)


def sets_needed(bytes_: int, cache: int) -> int:
    """Return how many input sets keep the cache out: four caches' worth, one if it is huge.

    Example:
        >>> [sets_needed(n << 20, 32 << 20) for n in (1, 40, 100, 512)]
        [128, 4, 2, 1]
    """
    if bytes_ >= 16 * cache:
        return 1
    return min(128, max(2, -(-4 * cache // bytes_)))


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """How torch multiplies float32 matrices, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _fastest(function: Callable[[], object], device: str) -> float:
    return min(interleaved({"it": function}, rounds=5, warmup=2, device=device)["it"])


def _bandwidth(bytes_: int, device: str) -> float:
    """Return the bytes read and written per second by a copy."""
    source = torch.randn(bytes_ // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _memory(device: str) -> int:
    return torch.cuda.get_device_properties(device).total_memory
