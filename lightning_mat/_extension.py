"""The compiled library: loads it once, or says why it cannot be used."""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import torch

REMEDY = "compile it against the installed torch: pip install --no-deps --force-reinstall -e ."


class Extension(NamedTuple):
    """The compiled library as it was found.

    Attributes:
        info: What it was built with (``torch``, ``cuda``, ``arch_list``, ``compiler``,
            ``backends``, ``reason``, ``parallel``, ``version``); empty where it cannot be used.
        error: Why it cannot be used; empty where it can.
    """

    info: dict[str, str]
    error: str

    @property
    def backends(self) -> tuple[str, ...]:
        """Device types that it has kernels for."""
        return tuple(filter(None, self.info.get("backends", "").split(",")))


@functools.cache
def load() -> Extension:
    """Load the library and register its operations with torch; the first call decides.

    Importing fails where it was never compiled, or where it was compiled for CUDA and torch is a
    CPU build. A library compiled against another torch may import and then misbehave, so it is
    not used either.
    """
    try:
        library = importlib.import_module("lightning_mat._C")
    except ImportError as error:
        return Extension({}, f"the compiled extension cannot be imported ({error})")
    info: dict[str, str] = library.build_info()
    built, running = info["torch"], str(torch.__version__)
    if built != running:
        return Extension(
            {}, f"the extension was compiled against torch {built}, but torch {running} is running"
        )
    return Extension(info, "")
