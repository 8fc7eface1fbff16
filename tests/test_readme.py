"""What README says is so: its numbers come from result files, its options exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import tables
from lightning_mat import MAT, Gate, MATCallback
from lightning_mat.gate import rules
from lightning_mat.units import Partition, Slice, Unit

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


def code_of(page: str) -> dict[str, object]:
    """Run the Python of a page; return what it defines."""
    text = (Path(__file__).parents[1] / "docs" / page).read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": page}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    return names


def test_the_policy_of_ones_own_decides() -> None:
    policy = code_of("policies.md")["Moving"]()  # type: ignore[operator]
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    mat = MAT(model, units="layers", policy=policy)
    for step in range(3):
        assert mat.update(torch.randn(8, 4), step=step).active.sum() == 2
    mat.close()


def test_the_rule_of_ones_own_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_entries", dict(rules._entries))
    scale = code_of("step.md")["Scale"](4)  # type: ignore[operator]
    units = [Unit(f"c{i}", "layer", "s", (Slice("weight", 0, 2 * i, 2 * i + 2),)) for i in (0, 1)]
    x = torch.randn(3, 4, requires_grad=True)
    with Gate(scale, Partition(units, scale)) as gate:
        gate.apply([False, False])
        scale(x).sum().backward()
        assert scale.weight.grad is None
        assert torch.equal(x.grad, scale.weight.detach().expand(3, 4))
        gate.apply([True, False])
        scale(x).sum().backward()
        assert torch.equal(scale.weight.grad, x.detach().sum(0) * torch.tensor([1.0, 1, 0, 0]))
        assert gate.in_full == ("weight",)
