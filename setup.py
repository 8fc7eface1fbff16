"""Compiles csrc/; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_tools"))

from extension import configure

setup(**configure())
