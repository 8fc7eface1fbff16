"""AtomicModelParallelStrategy: sharded checkpoints that are whole or not there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from lightning_mat.folders import aside_of, put_folder, remove

# What torch raises on all processes when one cannot write its file is no Exception.
_FAILURES = (Exception, CheckpointException)


def _is_foreign(name: str) -> bool:
    """Return whether a file in the folder of a checkpoint is none of the checkpoint's."""
    return name not in (".metadata", "meta.pt") and not name.endswith(".distcp")


class AtomicModelParallelStrategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy``, which writes a sharded checkpoint aside and swaps it.

    A sharded checkpoint is a folder with a file of each process. Lightning writes these into the
    folder that is there: a kill leaves a ``last.ckpt`` of which some files are of another step
    than the others, and which loads. Here it is written into a folder beside, flushed to the disk,
    and put in the place of the old one; what else lies in that folder stays. See
    :func:`lightning_mat.folders.put_folder` for what that is worth on which file system. It takes
    the disk space of a second checkpoint meanwhile.

    With ``save_distributed_checkpoint=False`` a checkpoint is one file, and it takes
    ``plugins=[AtomicCheckpointIO()]`` to write that in the same way.

    Args:
        options: Those of ``ModelParallelStrategy``.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | Path,
        storage_options: Any | None = None,
    ) -> None:
        """Write a checkpoint; a collective.

        Args:
            checkpoint: As Lightning makes it.
            filepath: The folder, or the file; folders on the way are made.
            storage_options: As in Lightning, must be None.

        Raises:
            CheckpointException, OSError: On the first process, if the disk is full or the folder
                cannot be written. A checkpoint that was there is then unchanged.
            RuntimeError: On the others then.
        """
        if not self._save_distributed_checkpoint or storage_options is not None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        # As in Lightning: all write to the first process' path.
        path = Path(self.broadcast(filepath))
        aside = aside_of(path)
        self._on_first(partial(remove, aside))
        failed: BaseException | None = None
        try:
            super().save_checkpoint(checkpoint, aside)
        except _FAILURES as error:
            failed = error

        def finish() -> None:
            # The files of all are there by now: the first process writes the last one.
            if failed is not None:
                remove(aside)
                raise failed
            put_folder(path, stays=_is_foreign)

        self._on_first(finish)

    def _on_first(self, function: Callable[[], None]) -> None:
        """Call a function on the first process; an error there is one on all."""
        failed: BaseException | None = None
        if self.is_global_zero:
            try:
                function()
            except _FAILURES as error:
                failed = error
        said = self.broadcast(None if failed is None else f"{type(failed).__name__}: {failed}")
        if failed is not None:
            raise failed
        if said is not None:
            raise RuntimeError(f"the first process could not write a checkpoint: {said}")
