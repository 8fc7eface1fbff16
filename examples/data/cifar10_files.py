"""CIFAR-10's files: the official binary version, two packed halves, or a download.

In the binary version a row is 3073 bytes: the class, then 1024 red, 1024 green and 1024 blue values
in row order. The packed halves hold the same rows compressed without loss: each is an xz stream of
the classes followed by what the median edge detector leaves of the images' planes, the residuals
modulo 256: green's, red's less green's, blue's less green's.

Source:
    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009). The predictor is
    that of Weinberger et al., "The LOCO-I Lossless Image Compression Algorithm" (2000).
"""

from __future__ import annotations

import contextlib
import hashlib
import lzma
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.data.cache import cache_folder, publish
from examples.data.locate import contents, locate

TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = "test_batch"
HALVES = {
    "cifar10-a.med.xz": ("data_batch_1", "data_batch_2", "data_batch_3"),
    "cifar10-b.med.xz": ("data_batch_4", "data_batch_5", "test_batch"),
}
_ROW = 1 + 3 * 32 * 32


class Split(NamedTuple):
    """Images, uint8, shape ``[N, 3, 32, 32]``, and their classes, int64, shape ``[N]``."""

    images: Tensor
    labels: Tensor


def read(data: str | Path | None, cache: str | Path | None = None) -> tuple[Split, Split]:
    """Return the official training and test splits in their order.

    Args:
        data: Folder that holds the files, or whose folder ``cifar-10`` does; None downloads them.
        cache: Where to keep what was unpacked (ten seconds) or downloaded, see
            :func:`examples.data.cache.cache_folder`. Where the unpacked form cannot be written, it
            is unpacked each time.

    Raises:
        FileNotFoundError: If files are missing, or the download fails; the message names them.
        ValueError: If a file is damaged.
        ModuleNotFoundError: If a download is asked for and torchvision is not installed.
    """
    if data is None:
        return _download(cache_folder(cache))
    folder = locate(data, "cifar-10")
    names = [f"{name}.bin" for name in (*TRAIN, TEST)]
    lacking = [name for name in names if not (folder / name).is_file()]
    packed = [name for name in HALVES if not (folder / name).is_file()]
    if lacking and packed:
        fewer = min(lacking, packed, key=len)
        raise FileNotFoundError(
            f"data folder {folder} lacks {', '.join(fewer)}; found {contents(folder)}: put the six "
            f"files of CIFAR-10's binary version there ({', '.join(names)}), or both packed halves "
            f"({', '.join(HALVES)})"
        )
    rows = _read_binary(folder) if not lacking else _read_packed(folder, cache_folder(cache))
    parts = [_split(rows[name]) for name in (*TRAIN, TEST)]
    train = Split(*(torch.cat(tensors) for tensors in zip(*parts[:-1], strict=True)))
    return train, parts[-1]


def unpack(stream: bytes, batches: int) -> list[NDArray[np.uint8]]:
    """Return the rows of the batches in one half, each uint8, shape ``[N, 3073]``.

    Args:
        stream: What the xz stream holds.
        batches: Batches in it, of equally many images.

    Raises:
        ValueError: If the length does not fit.
    """
    raw = np.frombuffer(stream, np.uint8)
    n, left = divmod(len(raw), _ROW)
    if left or n % batches:
        raise ValueError(
            f"a packed half of {len(raw)} bytes does not hold {batches} batches of rows of {_ROW} "
            "bytes: it is damaged; get it anew"
        )
    images = _predicted(raw[n:].reshape(n, 3, 32, 32)).reshape(n, -1)
    return np.split(np.concatenate([raw[:n, None], images], 1), batches)


def _predicted(residuals: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo the prediction, ``[N, 3, 32, 32]``: residuals as they are stored to red, green, blue."""
    green, red, blue = (residuals[:, i] for i in range(3))
    # (plane, row, column, image): every step below works on all images at once.
    planes = np.stack([red + green, green, blue + green]).transpose(0, 2, 3, 1)
    steps = np.ascontiguousarray(planes).astype(np.int16)
    out = np.zeros_like(steps)
    for i in range(32):
        for j in range(32):
            if i and j:
                left, above, corner = out[:, i, j - 1], out[:, i - 1, j], out[:, i - 1, j - 1]
                high, low = np.maximum(left, above), np.minimum(left, above)
                # The median of left, above and left + above - corner.
                guess = np.clip(left + above - corner, low, high)
            elif i or j:
                guess = out[:, i, j - 1] if j else out[:, i - 1, j]
            else:
                guess = np.int16(0)
            out[:, i, j] = (steps[:, i, j] + guess) & 255
    return out.transpose(3, 0, 1, 2).astype(np.uint8)


def _read_binary(folder: Path) -> dict[str, NDArray[np.uint8]]:
    rows = {}
    for name in (*TRAIN, TEST):
        path = folder / f"{name}.bin"
        raw = np.fromfile(path, np.uint8)
        if len(raw) == 0 or len(raw) % _ROW:
            raise ValueError(
                f"{path} has {len(raw)} bytes, which is no multiple of the {_ROW} of a row: it is "
                "damaged or not of CIFAR-10's binary version; get it anew"
            )
        rows[name] = raw.reshape(-1, _ROW)
    return rows


def _read_packed(folder: Path, root: Path) -> dict[str, NDArray[np.uint8]]:
    packed = {name: (folder / name).read_bytes() for name in HALVES}
    key = hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in packed.values())).hexdigest()
    kept = root / f"cifar-10-1-{key[:16]}"
    if kept.is_dir():
        return _read_binary(kept)
    rows: dict[str, NDArray[np.uint8]] = {}
    for half, names in HALVES.items():
        try:
            stream = lzma.decompress(packed[half])
        except lzma.LZMAError as error:
            raise ValueError(f"{folder / half} is damaged ({error}): get it anew") from error
        rows |= zip(names, unpack(stream, len(names)), strict=True)

    def write(whole: Path) -> None:
        for name, values in rows.items():
            values.tofile(whole / f"{name}.bin")

    with contextlib.suppress(OSError):  # unpacked anew each time then
        publish(kept, write)
    return rows


def _split(rows: NDArray[np.uint8]) -> Split:
    whole = torch.from_numpy(np.ascontiguousarray(rows))
    return Split(whole[:, 1:].reshape(-1, 3, 32, 32), whole[:, 0].long())


def _download(root: Path) -> tuple[Split, Split]:
    try:
        from torchvision.datasets import CIFAR10
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "downloading CIFAR-10 needs the package `torchvision`, which is not installed: "
            "pip install 'lightning-mat[vision]', or pass --data DIR"
        ) from error
    try:
        train, test = (CIFAR10(str(root), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:  # no network, or another checksum
        raise FileNotFoundError(
            f"CIFAR-10 could not be downloaded to {root} ({error}): name a folder that holds it "
            "by --data DIR (the six files of its binary version)"
        ) from error
    return tuple(  # type: ignore[return-value]
        Split(
            torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(d.targets, dtype=torch.int64),
        )
        for d in (train, test)
    )
