"""Where the examples keep what takes long to make: unpacked images, trained tokenizers, text."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder(given: str | Path | None = None) -> Path:
    """Return the folder given, else ``$XDG_CACHE_HOME/lightning-mat`` or ``~/.cache/…``."""
    if given is not None:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-mat"


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a folder and what is in it; it appears whole or not at all.

    Args:
        folder: The folder.
        write: Writes the files into the folder that it is given.

    Raises:
        OSError: If nothing can be written there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch, "whole")
        whole.mkdir()
        write(whole)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been faster: its files are the same
                raise
