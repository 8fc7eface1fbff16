"""What README says is so: its numbers come from result files, its options exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from benchmarks import tables
from lightning_mat import MATCallback

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_result_files() -> None:
    for block in tables.main().split("\n\n"):
        assert block in README


def test_the_kernels_numbers_are_those_of_the_result_file() -> None:
    page = (Path(__file__).parents[1] / "docs" / "kernel.md").read_text(encoding="utf-8")
    for block in tables.kernel_page().split("\n\n"):
        assert block in page


def test_the_steps_numbers_are_those_of_the_result_files() -> None:
    page = (Path(__file__).parents[1] / "docs" / "step.md").read_text(encoding="utf-8")
    for block in tables.step_page().split("\n\n"):
        assert block in page


def test_options_are_the_callbacks() -> None:
    options = inspect.signature(MATCallback).parameters
    listed = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\S+)", README, re.MULTILINE)
    named = [name for cells, _ in listed for name in re.findall(r"`(\w+)`", cells)]
    assert set(named) <= set(options)
    assert set(options) == set(named)
    for cells, default in listed:
        name = cells.split("`")[1]
        written = default.strip("`,")
        if written in {str(options[name].default), repr(options[name].default).replace("'", '"')}:
            continue
        assert options[name].default in (None, 1e-3), name


def test_files_that_are_linked_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (Path(__file__).parents[1] / target).exists(), target
