"""The ranges of pyproject.toml: bounded, without known bad releases, with those that are tested."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

tomllib: Any = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
LISTS = {
    "build": PROJECT["build-system"]["requires"],
    "run": PROJECT["project"]["dependencies"],
    **PROJECT["project"]["optional-dependencies"],
}
ALL = [
    pytest.param(requirement, id=f"{where}: {requirement.name}")
    for where, listed in LISTS.items()
    for requirement in map(Requirement, listed)
    if requirement.name != PROJECT["project"]["name"]
]

BAD = {
    # Malicious uploads: GHSA-w37p-236h-pfx3.
    "lightning": ["2.6.2", "2.6.3"],
    # torch.load(weights_only=True) runs code: CVE-2025-32434 (to 2.5.1), CVE-2026-24747 (to 2.9.1).
    "torch": ["2.5.1", "2.9.1"],
    # Code from configurations and checkpoints: CVE-2026-1839 (to 5.0.0rc2), CVE-2026-4372.
    "transformers": ["4.57.1", "5.0.0rc2", "5.2.0"],
    # The last that runs scripts of data sets.
    "datasets": ["3.6.0"],
    # Writes outside of its folder: CVE-2025-47273.
    "setuptools": ["78.1.0"],
}


@pytest.mark.parametrize("requirement", ALL)
def test_every_range_has_two_ends(requirement: Requirement) -> None:
    operators = {each.operator for each in requirement.specifier}
    assert ">=" in operators
    assert "<" in operators


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name in BAD for bad in BAD[name]])
def test_known_bad_releases_are_outside(name: str, bad: str) -> None:
    ours = [param.values[0] for param in ALL if param.values[0].name == name]
    assert ours
    assert not any(requirement.specifier.contains(bad, prereleases=True) for requirement in ours)


@pytest.mark.parametrize("requirement", ALL)
def test_what_is_installed_is_inside(requirement: Requirement) -> None:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        pytest.skip(f"{requirement.name} is not installed")
    # Of torch, a nightly build counts as the release that it leads to.
    assert requirement.specifier.contains(Version(found).base_version), found
