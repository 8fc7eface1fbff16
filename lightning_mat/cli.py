"""``lightning-mat``: one command, with a subcommand per question."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_mat import doctor, inspect
from lightning_mat.report import command as report

# Each has add_parser(commands), which adds its options and sets ``run``: arguments -> exit code.
COMMANDS = (doctor, inspect, report)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every command registered."""
    parser = argparse.ArgumentParser(
        prog="lightning-mat",
        description="Modular Adaptive Training: measure a network's units, train what still learns",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: Arguments without the program's name; the process's own by default.
    """
    arguments = build_parser().parse_args(argv)
    code: int = arguments.run(arguments)
    return code
