"""What a training step costs by the share of the units that trains, and what rivals save.

    python benchmarks/step.py [--model NAME ...] [--skip weights units] [--compile no|yes|both]
                              [--shares 1 .75 .5 .25 .1 0] [--rounds 9] [--quick]

A step is zero_grad, forward, loss, backward and AdamW on random data, through the gate and the
wrapped optimizer, against the same step without either: medians of interleaved rounds, compared
within rounds. Units rest at random, the same share in every layer; at least one of each layer and
kind trains. With F counted and t measured,

    efficiency = (1 - t / t_full) / (1 - F / F_full)

is the part of the promised saving that is kept. The time of products, convolutions and attention,
whose FLOPs F counts, and that of the rest are shown apart, each relative to the plain step's. The
process keeps the memory that it frees, see :func:`benchmarks.common.keep_freed_memory`. Beside them
the same step under what a user would pick instead, see :mod:`benchmarks.rivals`. Memory is the peak
of a step, and the bytes of activations that its forward pass saves for the backward pass.

Writes ``step-<model>-<device>.json`` after every group of measurements, or, where the compiled
model alone is measured, ``step-<model>-compiled-<device>.json``, and prints a table.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, keep_freed_memory, write_result
from benchmarks.devices import device_argument, device_name
from benchmarks.models import ALL, WORKLOADS
from benchmarks.step_table import table
from benchmarks.study import PRECISIONS, Setting, Study
from lightning_mat.gate.gate import SKIPS
from lightning_mat.report.environment import environment

SHARES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)


class Limit:
    """The time that may be spent; a group that is unlikely to fit is not started."""

    def __init__(self, seconds: float) -> None:
        """Start."""
        self.stop = time.monotonic() + seconds
        self.longest: dict[object, float] = {}

    def run(self, kind: object, function: Callable[[], None]) -> bool:
        """Run a group unless the longest of its kind so far would not fit; return whether."""
        begin = time.monotonic()
        if begin + self.longest.get(kind, 0.0) >= self.stop:
            return False
        function()
        self.longest[kind] = max(self.longest.get(kind, 0.0), time.monotonic() - begin)
        return True


def measure_model(name: str, args: argparse.Namespace, limit: Limit) -> bool:
    """Measure one model, write its result and print a table; return whether nothing failed."""
    setting = Setting(
        args.device,
        args.rounds,
        tuple(args.skip),
        args.precision,
        args.quick,
        args.batch_size,
        args.dropout,
    )
    study = Study(WORKLOADS[name], setting)
    result: dict[str, Any] = {
        # A copy of the sources without their history can be told by the variable.
        "commit": environment(args.device)["commit"] or os.environ.get("COMMIT"),
        "model": name,
        "title": study.workload.title,
        "settings": {
            "units": study.workload.unit_names,
            "unit_count": len(study.part),
            "batch_size": study.batch_size,
            "sizes": study.sizes,
            "dropout": study.dropout,
            "precision": args.precision,
            "rounds": args.rounds,
            "device": args.device,
            "quick": args.quick,
            "keeps_freed_memory": os.environ.get("MALLOC_MMAP_MAX_") == "0",
        },
        "full": study.full,
        "steps": study.rows,
        "rivals": study.rivals,
        "left_out": [],
        "failed": {},
    }
    modes = {"no": (False,), "yes": (True,), "both": (False, True)}[args.compile]
    groups: list[tuple[str, object, Callable[[], None]]] = []
    for compiled in modes:
        for share in args.compiled_shares if compiled else args.shares:
            label = f"{'compiled' if compiled else 'eager'} {share:.0%}"
            groups.append((label, compiled, lambda s=share, c=compiled: study.measure_share(s, c)))
        if not compiled:
            for share in args.rivals:
                label = f"rivals {share:.0%}"
                groups.append((label, "rivals", lambda s=share: study.measure_rivals(s)))
    # The compiled model alone has a file of its own, beside that of the eager one.
    stem = f"step-{name}{'-compiled' if args.compile == 'yes' else ''}"
    stem += f"-{device_name(args.device).replace(' ', '-')}"
    for label, kind, function in groups:
        try:
            if not limit.run((name, kind), function):
                result["left_out"].append(label)
        except Exception as error:  # the other groups' numbers are not lost with this one's
            traceback.print_exc()
            result["failed"][label] = f"{type(error).__name__}: {error}".splitlines()[0]
        path = write_result(stem, result, device=args.device, folder=args.out)
    print(f"{study.workload.title}, {device_name(args.device)}, {args.precision}; {path}")
    print(table(result), flush=True)
    return not result["failed"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        choices=(*WORKLOADS, "all"),
        default=["all"],
        metavar="NAME",
        help=f"{', '.join(WORKLOADS)}, or all (the default) for all but bert-base and "
        "mixtral (which needs transformers)",
    )
    add("--skip", nargs="+", choices=SKIPS, default=list(SKIPS), help="ways of skipping")
    add("--compile", choices=("no", "yes", "both"), default="no", help="torch.compile the models")
    add("--shares", type=float, nargs="+", default=list(SHARES), help="shares of units that train")
    add(
        "--compiled-shares",
        type=float,
        nargs="+",
        help="shares for the compiled model (default: those of --shares)",
    )
    add(
        "--rivals",
        type=float,
        nargs="*",
        default=[0.5, 0.25],
        help="shares at which rivals are measured (none: nothing after --rivals)",
    )
    add("--rounds", type=int, help="timed steps of each (default: 9, on a GPU 21)")
    add("--batch-size", type=int, help="samples of a step (default: the model's)")
    add("--dropout", type=float, help="probability (default: the model's)")
    add("--precision", choices=tuple(PRECISIONS), default="float32", help="bf16: by autocast")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device_argument, default=default, help="cpu or cuda (default: a GPU)")
    add("--quick", action="store_true", help="tiny sizes: does everything run?")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    add(
        "--time-limit",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="leave out what would probably not end in time",
    )
    args = parser.parse_args(arguments)
    args.compiled_shares = args.compiled_shares or args.shares
    for share in (*args.shares, *args.compiled_shares, *args.rivals):
        if not 0 <= share <= 1:
            parser.error(f"shares must be in [0, 1], got {share:g}")
    cpu = torch.device(args.device).type == "cpu"
    args.rounds = args.rounds or (1 if args.quick else 9 if cpu else 21)
    models = [n for name in args.model for n in (ALL if name == "all" else (name,))]
    args.model = list(dict.fromkeys(models))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen models; 1 if a group of measurements failed."""
    args = parse(arguments)
    if args.compile != "no":
        # Plain and gated models of one class share a budget of compilations; what a switch costs
        # is recorded as the seconds of its first step.
        torch._dynamo.config.recompile_limit = 64
    limit = Limit(args.time_limit)
    good = []
    for name in args.model:
        good.append(measure_model(name, args, limit))
        # The next model needs the memory, which compiled code and cycles would hold.
        torch._dynamo.reset()
        gc.collect()
    return int(not all(good))


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
