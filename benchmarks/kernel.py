"""What the fused kernel costs: against the usual ways, its own floor, and a training step.

    python benchmarks/kernel.py [--workload NAME ...] [--device cpu] [--rounds 5] [--quick]

For every workload (see :mod:`benchmarks.workloads`), over the same random inputs and timed in turn:

* ``op``: :func:`lightning_mat.mntk.kernel.mntk_spectra`, eigenvalues included;
* ``layerwise``: ``einsum`` per layer, ``bmm`` into Grams, one batched ``torch.linalg.eigvalsh``;
* ``vmap``: ``vmap(grad)`` of each layer's own product, then the same ``bmm`` and ``eigvalsh``.

Beside them the floor of the Gram stage: the larger of operations ÷ peak and bytes ÷ bandwidth, see
:mod:`benchmarks.floor`.

Two more parts: ``eigen`` is the eigen-solve alone against ``eigvalsh``, and ``probe`` the whole
probe of BERT-base against one forward and backward pass over the same samples.

Nothing is timed before its λ_max agrees with the first baseline's at full precision; what disagrees
is not timed, and the command fails. Calls draw on several input sets in turn, so many that a set
has left the cache when its turn comes; where one set is sixteen times the last-level cache or more,
it evicts itself and stays alone.

Writes ``kernel-<device>.json`` after every part, and prints a table.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.baselines import by_vmap, draw_weights, layerwise
from benchmarks.common import RESULTS, interleaved, peak_memory, ratio, summary, write_result
from benchmarks.devices import device_argument, device_name
from benchmarks.floor import (
    TORCH_PRECISION,
    Ceilings,
    cache_bytes,
    count,
    floor,
    matmul_precision,
    measure_ceilings,
    sets_needed,
    tokens_of,
)
from benchmarks.kernel_table import table
from benchmarks.probe import make_batch, training_step
from benchmarks.workloads import WORKLOADS, Inputs
from examples.models.bert import Bert, preset
from lightning_mat.mntk import Probe, ops
from lightning_mat.mntk.kernel import mntk_spectra
from lightning_mat.mntk.memory import is_out_of_memory
from lightning_mat.report.environment import environment
from lightning_mat.units import partition

Way = Callable[[], Tensor]

# Largest relative difference of λ_max from the baseline in full float32.
TOLERANCE = {"float32": 1e-4, "tf32": 3e-3, "bf16": 2e-2}
# Grams, their size: all heads of BERT-base, all filters of VGG16.
EIGEN = {"cpu": [(144, 64), (4224, 64)], "cuda": [(144, 64), (4224, 64)], "quick": [(3, 8)]}
PROBE = {
    "cpu": {"preset": "base", "samples": 16, "length": 128, "vocabulary": 30_522},
    "cuda": {"preset": "base", "samples": 64, "length": 128, "vocabulary": 30_522},
    "quick": {"preset": "tiny", "samples": 3, "length": 12, "vocabulary": 50},
}
PARTS = (*WORKLOADS, "eigen", "probe")


class Setting(NamedTuple):
    """How everything is measured."""

    device: str
    size: str  # "cpu", "cuda" or "quick"
    precision: str
    rounds: int
    ceilings: Ceilings

    @property
    def warmup(self) -> int:
        """On the CPU the comparison and the measurement of memory have warmed everything up."""
        return 2 if self.device != "cpu" else 0


def draw_sets(draw: Callable[[], Inputs], device: str) -> list[Inputs]:
    """Return the input sets of a workload, the first of which always draws the same numbers."""
    torch.manual_seed(0)
    first = draw()
    return [first, *(draw() for _ in range(sets_needed(first.bytes, cache_bytes(device)) - 1))]


def measure(name: str, sets: Sequence[Inputs], setting: Setting) -> dict[str, Any]:
    """Compare all ways to a workload's spectra, time those that agree, and count the floor."""
    turn: Iterator[Inputs] = itertools.cycle(sets)
    weights = draw_weights(sets[0])

    def op(i: Inputs) -> Tensor:
        return mntk_spectra(i.a, i.b, i.plan, precision=setting.precision).eigenvalues

    ways: dict[str, Callable[[Inputs], Tensor]] = {
        "op": op,
        "layerwise": layerwise,
        "vmap": lambda i: by_vmap(i, weights),
    }
    found = {key: _attempt(lambda way=way: way(sets[0])) for key, way in ways.items()}
    exact = found["layerwise"]
    if setting.precision != "float32":
        with matmul_precision("highest"):
            exact = _attempt(lambda: layerwise(sets[0]))
    tokens = {
        tokens_of(layer, b)
        for layer, b in zip(sets[0].plan.layers, sets[0].b, strict=True)
        if layer.kind in ("linear", "conv")
    }
    result: dict[str, Any] = {
        "units": sets[0].plan.units,
        "samples": len(sets[0].b[0]),
        "tokens": [min(tokens), max(tokens)],
        "input_sets": len(sets),
        "bytes_per_set": sets[0].bytes,
        "floor": floor(count(sets[0]), setting.ceilings, setting.precision),
    }
    bound = {key: lambda way=way: way(next(turn)) for key, way in ways.items()}
    result |= _compare_and_time(name, found, exact, bound, setting)
    if "op" in result["seconds"]:
        median = result["seconds"]["op"]["median_seconds"]
        result["op_over_floor"] = median / result["floor"]["seconds"]
    return result


def measure_eigen(units: int, samples: int, setting: Setting) -> dict[str, Any]:
    """Compare and time the eigen-solve of many Grams with torch's batched solver."""

    def draw() -> Tensor:
        j = torch.randn(units, samples, samples + samples // 2, device=setting.device)
        return j @ j.mT

    torch.manual_seed(0)
    first = draw()
    sets = [first]
    sets += [draw() for _ in range(sets_needed(first.nbytes, cache_bytes(setting.device)) - 1)]
    turn = itertools.cycle(sets)
    ways = {
        "op": ops.gram_eigenvalues,
        "eigvalsh": torch.linalg.eigvalsh,
        "eigvalsh in float64": lambda g: torch.linalg.eigvalsh(g.double()),
    }
    found = {key: _attempt(lambda way=way: way(first)) for key, way in ways.items()}
    bound = {key: lambda way=way: way(next(turn)) for key, way in ways.items()}
    result = {"units": units, "samples": samples, "input_sets": len(sets)}
    exact = found["eigvalsh in float64"]
    return result | _compare_and_time(f"eigen-{units}", found, exact, bound, setting)


def measure_probe(setting: Setting) -> dict[str, Any]:
    """Time a whole probe of BERT against one forward and backward pass over the same samples.

    Both make logits at 15% of the positions only, as masked-language training does.
    """
    size = PROBE[setting.size]
    torch.manual_seed(0)
    config = preset(
        size["preset"], vocab_size=size["vocabulary"], max_length=size["length"], dropout=0.1
    )
    model = Bert(config).to(setting.device)
    part = partition(model, "heads+ffn")
    batch = make_batch(size["samples"], size["length"], size["vocabulary"], setting.device)
    inputs = {key: batch[key] for key in ("input_ids", "masked_positions")}
    probe = Probe(model, part, precision=setting.precision)
    ways: dict[str, Callable[[], object]] = {
        "step": lambda: training_step(model, batch),
        "probe": lambda: probe.measure(inputs),
    }
    for way in ways.values():
        way()  # the first probe also looks at the model once
    model.zero_grad(set_to_none=True)
    memory = {key: peak_memory(way, setting.device) for key, way in ways.items()}
    seconds = interleaved(ways, rounds=setting.rounds, warmup=setting.warmup, device=setting.device)
    return {
        **size,
        "units": len(part),
        "seconds": summary(seconds),
        "peak_bytes": memory,
        "probe_over_step": ratio(seconds, "probe", "step"),
    }


def _compare_and_time(
    name: str,
    found: dict[str, Tensor | None],
    exact: Tensor | None,
    ways: dict[str, Way],
    setting: Setting,
) -> dict[str, Any]:
    """Time the ways whose λ_max agrees with the exact one's; say why the others are left out."""
    result: dict[str, Any] = {"difference_of_lambda_max": {}, "not_timed": {}}
    # A NaN is neither below the tolerance nor a word of JSON.
    for key, eigenvalues in found.items():
        if eigenvalues is None or exact is None:
            what = key if eigenvalues is None else "the baseline to compare with"
            result["not_timed"][key] = f"{what} ran out of memory"
            continue
        difference = largest_difference(eigenvalues, exact)
        result["difference_of_lambda_max"][key] = difference if difference < 1e30 else None
        if not difference <= TOLERANCE[setting.precision]:
            result["not_timed"][key] = f"disagrees: λ_max differs by {difference:.1e}"
            print(f"{name}: {key} disagrees by {difference:.1e} in λ_max", file=sys.stderr)
    found.clear()
    ways = {key: way for key, way in ways.items() if key not in result["not_timed"]}
    result["peak_bytes"] = {key: peak_memory(way, setting.device) for key, way in ways.items()}
    result |= {"seconds": {}, "times_op": {}}
    if not ways:
        return result
    seconds = interleaved(ways, rounds=setting.rounds, warmup=setting.warmup, device=setting.device)
    result["seconds"] = summary(seconds)
    if "op" in ways:
        result["times_op"] = {key: ratio(seconds, key, "op") for key in ways}
        if setting.device != "cpu":
            result["seconds_on_device"] = statistics.median(queued(ways["op"], setting.rounds))
    return result


def largest_difference(eigenvalues: Tensor, exact: Tensor) -> float:
    """Return the largest relative difference of the units' λ_max; NaN if there is any."""
    x, y = (e.double().amax(-1).cpu() for e in (eigenvalues, exact))
    return float(((x - y).abs() / y.abs().clamp_min(torch.finfo(y.dtype).tiny)).max())


def queued(function: Way, calls: int) -> list[float]:
    """Return the seconds of calls between two events each, without a wait between the calls.

    Where the host launches faster than the device works, the launches cost nothing here.
    """
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, stop in pairs:
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen parts, write the result and print a table; 1 if a way disagrees."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--workload",
        choices=PARTS,
        nargs="+",
        default=PARTS,
        metavar="NAME",
        help=f"parts to measure: {', '.join(PARTS)} (default: all)",
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=device_argument, default=default, help="cpu or cuda (default: a GPU)"
    )
    parser.add_argument("--rounds", type=int, help="timed calls (default: 5, on a GPU 15)")
    parser.add_argument("--precision", choices=tuple(TOLERANCE), default="float32")
    parser.add_argument("--layers", type=int, help="layers of the workloads that have any")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no part after so many seconds"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    args = parser.parse_args(arguments)

    begin = time.monotonic()
    kind = torch.device(args.device).type
    size = "quick" if args.quick else kind
    rounds = args.rounds or (1 if args.quick else 5 if kind == "cpu" else 15)
    device = device_name(args.device)
    name = f"kernel-{device.replace(' ', '-')}"
    with matmul_precision(TORCH_PRECISION[args.precision]):
        ceilings = measure_ceilings(args.device, args.quick)
        setting = Setting(args.device, size, args.precision, rounds, ceilings)
        result: dict[str, Any] = {
            # A copy of the sources without their history can be told by the variable.
            "commit": environment(args.device)["commit"] or os.environ.get("COMMIT"),
            "settings": {
                "device": args.device,
                "precision": args.precision,
                "rounds": rounds,
                "quick": args.quick,
                "cache_bytes": cache_bytes(args.device),
            },
            "ceilings": {"bytes_per_second": ceilings.bandwidth, "flops": ceilings.peak},
            "workloads": {},
            "eigen": {},
            "probe": None,
            "left_out": [],
        }
        for part in args.workload:
            if time.monotonic() - begin > args.seconds:
                result["left_out"].append(part)
                continue
            _measure_part(part, result, setting, args.layers)
            _release(args.device)
            path = write_result(name, result, device=args.device, folder=args.out)
    if result["left_out"]:
        path = write_result(name, result, device=args.device, folder=args.out)
    print(f"{device}, {args.precision}, medians of {rounds} rounds; {path}")
    print(table(result))
    rows = [*result["workloads"].values(), *result["eigen"].values()]
    reasons = [why for row in rows for why in row.get("not_timed", {}).values()]
    return int(any(why.startswith("disagrees") for why in reasons))


def _measure_part(part: str, result: dict[str, Any], setting: Setting, layers: int | None) -> None:
    if part == "eigen":
        for units, samples in EIGEN[setting.size]:
            result["eigen"][str(units)] = measure_eigen(units, samples, setting)
        return
    if part == "probe":
        result["probe"] = measure_probe(setting)
        return
    workload = WORKLOADS[part]
    sizes = dict(getattr(workload, setting.size))
    if layers is not None and "layers" in sizes:
        sizes["layers"] = layers
    sets = _attempt(
        lambda: draw_sets(lambda: workload.draw(setting.device, **sizes), setting.device)
    )
    if sets is None:
        result["workloads"][part] = {"sizes": sizes, "failed": "no memory for the inputs"}
    else:
        result["workloads"][part] = {"sizes": sizes, **measure(part, sets, setting)}


def _attempt(way: Callable[[], Any]) -> Any:
    """Return what a way returns; None where memory runs out."""
    try:
        return way()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None


def _release(device: str) -> None:
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
