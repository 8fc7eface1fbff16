"""The suites' command line.

    python -m benchmarks SUITE|all --scale cpu|gpu|paper|test [--data DIR] [--time-limit 9m]
    python -m benchmarks list|calibrate [--scale cpu]
    python -m benchmarks report [--results DIR] [--out DIR]

A suite stops at its time limit, with exit status 0, and goes on with the same command; a run that
failed is told, tried again the next time, and makes the exit status 1. Results append to
``benchmarks/results/SUITE-DEVICE.jsonl``; a run that is there is not run again. ``list`` names
every suite's methods. ``--scale test`` takes seconds and needs no data; some suites have none.
``report`` writes BENCHMARKS.md and docs/figures of the project from its own results; from other
results it writes BENCHMARKS.md and figures into their folder.
"""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.devices import device_argument, device_name
from benchmarks.evidence.page import home, write
from benchmarks.suites import calibration
from benchmarks.suites.registry import SUITES
from benchmarks.suites.results import RESULTS
from benchmarks.suites.runner import Place, go
from benchmarks.suites.scales import SCALES
from benchmarks.suites.spec import Run, chosen

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line names.

    Returns:
        0, also when the time limit came first; 1 if a run failed.

    Raises:
        SystemExit: With status 2 and a message if the command line or the data is unusable.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.what == "report":
            return _report(args)
        if args.out is not None:
            raise ValueError("--out is where `report` writes: results go to the folder --results")
        args.device = args.device or _device(args)
        runs = _runs(args)
        if args.what == "list":
            print(calibration.listing(runs, _place(args)))
            print(f"\n{_methods(runs, args.scale)}")
            return 0
        _quiet()
        if args.what == "calibrate":
            print(calibration.calibrate(runs, _place(args)))
            return 0
        return _go(runs, args)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        parser.error(str(error))


def _go(runs: dict[str, list[Run]], args: argparse.Namespace) -> int:
    deadline = None if args.time_limit is None else time.monotonic() + args.time_limit
    found = [go(part, SUITES[name].train, _place(args), deadline) for name, part in runs.items()]
    left = sum(outcome.left for outcome in found)
    failed = [label for outcome in found for label in outcome.failed]
    if failed:
        print(f"{len(failed)} runs failed, see above: {', '.join(failed)}; {left} are left")
        return 1
    if left:
        print(f"time is up with {left} runs left: continue with the same command")
    else:
        where = "" if args.results == RESULTS else f" --results {shlex.quote(str(args.results))}"
        print(f"all runs are done: `python -m benchmarks report{where}` writes BENCHMARKS.md")
    return 0


def _report(args: argparse.Namespace) -> int:
    if not args.results.is_dir():
        raise FileNotFoundError(
            f"there is no folder of results {str(args.results)!r}: run a suite with the same "
            "--results first"
        )
    for path in write(args.results, args.out or home(args.results)):
        print(f"wrote {path}")
    return 0


def _runs(args: argparse.Namespace) -> dict[str, list[Run]]:
    """Return the runs of every suite that is asked for."""
    names = [args.what] if args.what in SUITES else list(SUITES)
    found = {name: SUITES[name].runs(args.scale, range(args.seeds)) for name in names}
    if not any(found.values()):
        own = [scale for scale in SCALES if SUITES[names[0]].runs(scale, [0])]
        raise ValueError(
            f"the suite {names[0]} has no runs at --scale {args.scale}: choose from "
            f"{', '.join(own)}"
        )
    if args.methods:
        if len(names) > 1:
            raise ValueError("--methods needs one suite: its methods are not those of the others")
        found = {name: chosen(runs, args.methods) for name, runs in found.items()}
    return {name: runs for name, runs in found.items() if runs}


def _methods(runs: dict[str, list[Run]], scale: str) -> str:
    """Return the names of every suite's methods, and the suites without runs at a scale."""
    lines = [
        f"methods of {name}: {', '.join(dict.fromkeys(run.method.name for run in part))}"
        for name, part in runs.items()
    ]
    without = [name for name in SUITES if not SUITES[name].runs(scale, [0])]
    if without:
        lines.append(f"no runs at --scale {scale}: {', '.join(without)}")
    return "\n".join(lines)


def _device(args: argparse.Namespace) -> str:
    """Return the device that a scale is made for."""
    if args.scale not in ("gpu", "paper"):
        return "cpu"
    if args.what == "list":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return device_argument("cuda")
    except argparse.ArgumentTypeError as error:
        raise ValueError(
            f"--scale {args.scale} is for a GPU, or say --device cpu: {error}"
        ) from None


def _place(args: argparse.Namespace) -> Place:
    name = device_name(args.device)
    return Place(args.device, name, args.data, args.work, args.results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    what = [*SUITES, "all", "list", "calibrate", "report"]
    add("what", choices=what, metavar="SUITE|all|list|calibrate|report", help=", ".join(what))
    add("--scale", choices=SCALES, default="cpu", help="sizes of the runs (default cpu)")
    add("--data", type=_folder, metavar="DIR", help="folder of the data sets")
    add("--seeds", type=_positive, default=3, metavar="N", help="seeds 0 to N - 1 (default 3)")
    add("--time-limit", type=_duration, metavar="9m", help="stop after so long: 90s, 9m, 2h")
    usual = "default: a GPU for the scales gpu and paper, else cpu"
    add("--device", type=device_argument, help=f"cpu or cuda ({usual})")
    add("--work", type=Path, default=Path("runs/bench"), help="folder of unfinished runs")
    add("--methods", nargs="+", default=[], metavar="METHOD", help="only these of the suite")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")
    add("--out", type=Path, metavar="DIR", help="where `report` writes page and figures")
    return parser


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return path


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number ≥ 1, got {text!r}")
    return int(text)


def _duration(text: str) -> float:
    """Return seconds.

    Example:
        >>> _duration("9m"), _duration("90"), _duration("1.5h")
        (540.0, 90.0, 5400.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 90s, 9m or 2h")
    return float(found[1]) * _SECONDS[found[2]]


def _quiet() -> None:
    """Leave out Lightning's advice that a comparison cannot follow."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in ("does not have many workers", "isinstance.treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{message}.*")


if __name__ == "__main__":
    sys.exit(main())
