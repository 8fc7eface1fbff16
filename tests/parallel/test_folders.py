"""A sharded checkpoint is whole or not there, on file systems that swap names and on others."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from lightning_mat import folders
from lightning_mat.folders import aside_of, put_folder
from lightning_mat.parallel.atomic import AtomicModelParallelStrategy, _is_foreign
from tests.lightning_models import trainer


class KilledError(BaseException):
    """The process ends here."""


def written(path: Path, text: str) -> None:
    """Write a folder aside."""
    aside = aside_of(path)
    aside.mkdir(parents=True)
    (aside / "meta.pt").write_text(text)


def found(path: Path) -> str:
    return (path / "meta.pt").read_text()


def cannot(code: int) -> Callable[..., None]:
    def exchange(one: Path, other: Path) -> None:
        raise OSError(code, os.strerror(code))

    return exchange


@pytest.mark.parametrize("code", [None, errno.EINVAL, errno.ENOSYS])
def test_a_new_folder_takes_the_place_of_the_old_one(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code is not None:
        monkeypatch.setattr(folders, "exchange", cannot(code))
    path = tmp_path / "last.ckpt"
    for text in ("one", "two", "three"):
        written(path, text)
        put_folder(path)
        assert found(path) == text
        assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_it_takes_the_place_of_a_file_and_of_a_link(kind: str, tmp_path: Path) -> None:
    path, other = tmp_path / "last.ckpt", tmp_path / "other.ckpt"
    if kind == "file":
        path.write_text("one file")
    else:
        other.mkdir()
        (other / "meta.pt").write_text("linked")
        path.symlink_to(other)
    written(path, "new")
    put_folder(path)
    assert found(path) == "new"
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "other.ckpt"][: 1 + (kind == "link")]
    assert kind == "file" or found(other) == "linked"


def test_an_error_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    written(path, "one")
    put_folder(path)
    written(path, "two")
    monkeypatch.setattr(folders, "exchange", cannot(errno.EACCES))
    with pytest.raises(PermissionError):
        put_folder(path)
    assert found(path) == "one"


def test_between_two_renames_lightning_finds_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    written(path, "one")
    put_folder(path)
    written(path, "two")
    rename, calls = os.rename, []

    def killed(one: Path, other: Path) -> None:
        if calls:
            raise KilledError
        calls.append(rename(one, other))

    monkeypatch.setattr(folders, "exchange", cannot(errno.EINVAL))
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KilledError):
        put_folder(path)
    monkeypatch.setattr(os, "rename", rename)
    fit = trainer(tmp_path, ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    (last,) = fit.checkpoint_callback._find_last_checkpoints(fit)  # type: ignore[union-attr]
    assert found(Path(last)) == "one"
    folders.remove(aside_of(path))
    written(path, "three")
    put_folder(path)
    assert found(path) == "three"
    assert os.listdir(tmp_path) == ["last.ckpt"]


# ---- the strategy --------------------------------------------------------------------------


def plan() -> AtomicModelParallelStrategy:
    """Return a strategy whose processes are there already."""
    found = AtomicModelParallelStrategy(save_distributed_checkpoint=True)
    rank = dist.get_rank()
    found.cluster_environment = SimpleNamespace(  # type: ignore[assignment]
        global_rank=lambda: rank, local_rank=lambda: rank, world_size=dist.get_world_size
    )
    return found


def saved(folder: Path, where: str, rank: int) -> tuple[str, list[str]]:
    """Return what is said when one process cannot write a second checkpoint, and what is left."""
    strategy, path = plan(), folder / "last.ckpt"
    strategy.save_checkpoint({"state_dict": {"a": torch.ones(2)}, "step": 1}, path)
    save = torch.save

    def full(thing: Any, stream: Any, *args: Any, **options: Any) -> None:
        if isinstance(stream, Path) == (where == "meta"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(thing, stream, *args, **options)

    said = "nothing"
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(torch, "save", full)
        tensors = {f"of process {dist.get_rank()}": torch.ones(2)}
        try:
            strategy.save_checkpoint({"state_dict": tensors, "step": 2}, path)
        except (Exception, CheckpointException) as error:
            said = f"{type(error).__name__}: {error}"
    assert torch.load(path / "meta.pt", weights_only=True) == {"step": 1}
    return said, os.listdir(folder)


@pytest.mark.parametrize(("where", "rank"), [("a shard", 0), ("a shard", 1), ("meta", 0)])
def test_a_full_disk_is_an_error_on_all_and_leaves_the_old_folder(
    where: str, rank: int, tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    (first, left), (second, _) = on_both(saved, tmp_path, where, rank)
    assert "No space left" in first
    assert second.startswith("RuntimeError: the first process could not write a checkpoint")
    assert "No space left" in second
    assert left == ["last.ckpt"]


def test_one_file_is_left_to_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[Any] = []
    monkeypatch.setattr(
        ModelParallelStrategy, "save_checkpoint", lambda _, *args: passed.append(args)
    )
    strategy = AtomicModelParallelStrategy(save_distributed_checkpoint=False)
    strategy.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert passed == [({"step": 1}, tmp_path / "last.ckpt", None)]


@pytest.mark.parametrize("code", [None, errno.EINVAL])
def test_what_else_lies_in_the_folder_stays(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code is not None:
        monkeypatch.setattr(folders, "exchange", cannot(code))
    path = tmp_path / "run"
    (path / "last.ckpt").mkdir(parents=True)
    (path / "metrics.csv").write_text("loss")
    (path / "__1_0.distcp").write_text("of the former one")
    for text in ("one", "two"):
        written(path, text)
        put_folder(path, stays=_is_foreign)
        assert found(path) == text
        assert (path / "metrics.csv").read_text() == "loss"
    assert sorted(os.listdir(path)) == ["last.ckpt", "meta.pt", "metrics.csv"]
    assert os.listdir(tmp_path) == ["run"]
