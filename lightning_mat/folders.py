"""Putting a whole folder in the place of an old one, so that nobody ever finds a mix of both."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

# Of Linux's renameat2: names are relative to the current folder; swap the two.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# What a system or a file system says that cannot swap, NFS for instance.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def aside_of(path: Path) -> Path:
    """Return the folder to write first: beside the other, and no checkpoint by its name.

    Example:
        >>> aside_of(Path("run/last.ckpt")).as_posix()
        'run/.669b62c0.part'
    """
    return path.with_name(f".{_mark(path)}.part")


def old_of(path: Path) -> Path:
    """Return where the old folder is for a moment where two cannot be swapped.

    ``Trainer.fit(ckpt_path="last")`` finds it, should the process die in that moment.

    Example:
        >>> old_of(Path("run/last.ckpt")).as_posix()
        'run/last.669b62c0.old.ckpt'
    """
    return path.with_name(f"{path.stem}.{_mark(path)}.old{path.suffix}")


def put_folder(path: Path, stays: Callable[[str], bool] = lambda name: False) -> None:
    """Flush the folder that was written aside and put it in the place of the old one.

    On Linux two names are swapped in one step where the file system can do so (ext4, XFS, Btrfs,
    tmpfs): a process that dies at any moment leaves the old folder or the new one. Elsewhere the
    old one is renamed first, to :func:`old_of`: between the two renames nothing has the name.

    Args:
        path: The folder; what is to be there lies at :func:`aside_of` it.
        stays: Whether something in the old folder, by its name, is none of what is replaced, and
            moves over to the new one.

    Raises:
        OSError: If the folder cannot be written; the old one is then unchanged.
    """
    aside, old = aside_of(path), old_of(path)
    for file in aside.iterdir():
        _flush(file)
    _flush(aside)
    if not os.path.lexists(path):
        os.rename(aside, path)
    else:
        try:
            exchange(aside, path)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            remove(old)
            os.rename(path, old)
            os.rename(aside, path)
    for former in (aside, old):
        if former.is_dir() and not former.is_symlink():
            for file in former.iterdir():
                if stays(file.name) and not os.path.lexists(path / file.name):
                    os.rename(file, path / file.name)
    _flush(path.parent)
    remove(aside)
    remove(old)


def exchange(one: Path, other: Path) -> None:
    """Swap two names in one step.

    Raises:
        OSError: If that failed; ``errno`` says whether the system cannot do it at all.
    """
    call = None
    if sys.platform == "linux":
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, "this system swaps no names", str(one))
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    here, there = os.fsencode(one), os.fsencode(other)
    if call(_AT_FDCWD, here, _AT_FDCWD, there, _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _mark(path: Path) -> str:
    return f"{zlib.crc32(path.name.encode()):08x}"


def _flush(path: Path) -> None:
    """Make a file or the names in a folder survive a power cut, where that can be asked for."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems refuse to flush folders.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
