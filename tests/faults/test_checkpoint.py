"""AtomicCheckpointIO: a checkpoint is whole or not there."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mat.checkpoint import AtomicCheckpointIO
from tests.lightning_models import data, mat, model, trainer


def test_it_writes_what_lightning_writes(tmp_path: Path) -> None:
    for folder, plugins in (("plain", []), ("atomic", [AtomicCheckpointIO()])):
        save = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_train_steps=2)
        fit = trainer(
            tmp_path / folder, mat(), save, max_epochs=2, enable_checkpointing=True, plugins=plugins
        )
        fit.fit(model(), data())
    plain, atomic = (sorted(p.name for p in (tmp_path / f).glob("*")) for f in ("plain", "atomic"))
    assert plain == atomic
    one, two = (
        torch.load(tmp_path / f / "last.ckpt", weights_only=True)["state_dict"]
        for f in ("plain", "atomic")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("as_path", [str, Path, lambda p: f"file://{p}"])
def test_a_full_disk_leaves_the_old_checkpoint(
    as_path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, path = AtomicCheckpointIO(), tmp_path / "new" / "last.ckpt"
    plugin.save_checkpoint({"step": 1}, as_path(path))
    save = torch.save

    def full(checkpoint: Any, stream: Any) -> None:
        buffer = io.BytesIO()
        save(checkpoint, buffer)
        stream.write(buffer.getvalue()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left") as error:
        plugin.save_checkpoint({"step": 2}, as_path(path))
    assert error.value.filename == str(path)
    assert plugin.load_checkpoint(path, weights_only=True) == {"step": 1}
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_what_a_kill_leaves_beside_it_is_no_checkpoint_to_lightning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise KilledError

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    for name in ("last.ckpt", "hpc_ckpt_3.ckpt"):
        with pytest.raises(KilledError):
            AtomicCheckpointIO().save_checkpoint({"step": 2}, tmp_path / name)
    monkeypatch.undo()
    assert len(os.listdir(tmp_path)) == 2
    fit = trainer(tmp_path, ModelCheckpoint(tmp_path), enable_checkpointing=True)
    assert fit._checkpoint_connector._hpc_resume_path is None
    assert not fit.checkpoint_callback._find_last_checkpoints(fit)  # type: ignore[union-attr]


def test_other_places_and_options_are_left_to_lightning() -> None:
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"step": 3}, "memory://folder/last.ckpt")
    assert plugin.load_checkpoint("memory://folder/last.ckpt", weights_only=True) == {"step": 3}
    with pytest.raises(TypeError, match="storage_options"):
        plugin.save_checkpoint({}, "last.ckpt", storage_options={})
