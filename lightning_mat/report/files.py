"""Writing a file so that nobody ever reads half of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object], aside: Path | None = None) -> None:
    """Write a file aside, flush it to the disk, and put it in the place of the old one.

    A process that dies at any moment leaves the old file or the new one, never a part. One process
    writes to a path at a time.

    Args:
        path: The file. Folders on the way are made.
        write: Called with a binary stream to write the contents to.
        aside: The file to write first, in the same folder; by default with ``.part`` added to the
            name. A process that dies leaves it behind, and the next one writes over it.

    Raises:
        OSError: If the disk is full or the folder cannot be written; ``filename`` is ``path``. The
            old file is then unchanged.
    """
    aside = path.with_name(path.name + ".part") if aside is None else aside
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _flush_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _flush_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut, on systems where folders can be flushed."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Some network file systems refuse; the file itself is whole and in place by now.
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
