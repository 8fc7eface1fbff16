"""``lightning-mat report RUN_DIR``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lightning_mat.report.page import find_spectra, report
from lightning_mat.report.plot import active_map, lambda_max_plot
from lightning_mat.report.store import read


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "report",
        help="write a page about a run",
        description="Write one HTML page about a run, with its pictures and tables.",
    )
    add_arguments(parser)
    parser.set_defaults(run=report_command)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        help="log folder of a run (the one that holds mat/spectra.npz), or that file",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the page; default: report.html beside spectra.npz"
    )
    parser.add_argument(
        "--png", action="store_true", help="also write lambda_max.png and active.png beside it"
    )


def report_command(args: argparse.Namespace) -> int:
    """Write the page, print the paths of what was written, and return the exit status.

    What a person can put right (no run there, several runs, no matplotlib, a full disk) is told in
    one message on the standard error, with exit status 1.
    """
    try:
        page = report(args.run_dir, args.output)
        written = [page]
        if args.png:
            data = read(find_spectra(args.run_dir))
            written.append(lambda_max_plot(data, page.with_name("lambda_max.png")))
            written.append(active_map(data, page.with_name("active.png")))
    except (OSError, ValueError, ImportError) as error:
        print(f"lightning-mat report: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0
