"""AtomicCheckpointIO: checkpoints that are whole or not there."""

from __future__ import annotations

import os
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_mat.report.files import write_whole


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint aside in its own folder, flushes it to the disk, and renames it.

    A process that is killed at any moment, or a machine that loses power, leaves the old checkpoint
    or the new one. Lightning's own writes into the system's temporary folder and moves the file
    from there without flushing it: where that folder lies on another disk, moving is copying, and a
    kill leaves half of ``last.ckpt`` in the place of the old one.

    Paths that are not on a local disk are left to Lightning.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu")
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What ``torch.save`` can save.
            path: The file; folders on the way are made.
            storage_options: As in Lightning, must be None.

        Raises:
            OSError: If the disk is full or the folder cannot be written. A checkpoint that was
                there is then unchanged.
        """
        if storage_options is not None or not isinstance(get_filesystem(path), LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        local = Path(LocalFileSystem._strip_protocol(os.fspath(path)))
        # Lightning looks for checkpoints by parts of their names: this one has none of them.
        aside = local.with_name(f".{zlib.crc32(local.name.encode()):08x}.part")
        write_whole(local, partial(torch.save, checkpoint), aside)
