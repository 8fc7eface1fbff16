"""PEP 517 backend: setuptools, with the torch that is already installed in sight.

pip builds in an isolated environment, which would download a second torch and compile against
that one. This backend lets the build see the packages of the environment that is installed into,
after its own, and asks for torch only where there is none.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig

from setuptools import build_meta as _setuptools

# PEP 517 and PEP 660 hooks that need no change.
build_sdist = _setuptools.build_sdist
build_wheel = _setuptools.build_wheel
build_editable = _setuptools.build_editable
prepare_metadata_for_build_wheel = _setuptools.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _setuptools.prepare_metadata_for_build_editable


def _see_installed_packages() -> None:
    """Append the target environment's packages, and put its scripts (ninja) on PATH."""
    for kind in ("purelib", "platlib"):
        path = sysconfig.get_path(kind)
        if path not in sys.path:
            sys.path.append(path)
    # Without isolation nothing has put ninja on PATH unless the environment is activated.
    scripts = sysconfig.get_path("scripts")
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), scripts])


def _torch_if_missing(config_settings: dict[str, str] | None = None) -> list[str]:
    return [] if importlib.util.find_spec("torch") else ["torch>=2.10"]


_see_installed_packages()
get_requires_for_build_wheel = _torch_if_missing
get_requires_for_build_editable = _torch_if_missing


def get_requires_for_build_sdist(config_settings: dict[str, str] | None = None) -> list[str]:
    """An archive of the sources needs no torch."""
    return []
