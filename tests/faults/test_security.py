"""Files that a run left behind are data: nothing in them is run, opened or fetched."""

from __future__ import annotations

import ast
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mat import policies
from lightning_mat.report.keeper import Keeper
from lightning_mat.report.page import report
from lightning_mat.report.store import SpectraStore, read
from tests.lightning_models import Small, data, mat, model, trainer

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "lightning_mat").rglob("*.py"))
BUILD = [ROOT / "setup.py", *sorted((ROOT / "build_tools").glob("*.py"))]

# What reads objects from files or strings, and what fetches.
LOADS = {"load", "loads", "unsafe_load", "full_load", "load_all", "fromfile", "memmap"}
RUNS = {"eval", "exec", "compile", "__import__"}
FETCHES = {
    "urllib", "requests", "http", "httpx", "socket", "ftplib", "datasets", "huggingface_hub",
    "pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml",
}  # fmt: skip


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call) for call in found]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).split(".")[0])
    return names


def test_every_load_in_the_package_refuses_pickle() -> None:
    loads = []
    for path in PACKAGE:
        for name, call in calls(path):
            assert name not in RUNS, f"{path}:{call.lineno}"
            if name.startswith(("np.", "numpy.", "torch.")) and name.split(".")[-1] in LOADS:
                safe = {
                    (k.arg, ast.unparse(k.value))
                    for k in call.keywords
                    if k.arg in ("allow_pickle", "weights_only")
                }
                assert safe & {("allow_pickle", "False"), ("weights_only", "True")}, path
                loads.append(name)
    assert loads.count("np.load") >= 2


def test_the_package_imports_nothing_that_fetches_or_unpickles() -> None:
    for path in PACKAGE:
        assert not imports(path) & FETCHES, path


def test_the_build_fetches_nothing() -> None:
    for path in BUILD:
        assert not imports(path) & FETCHES, path
        commands = [ast.unparse(call) for name, call in calls(path) if "subprocess" in name]
        assert not any(word in c for c in commands for word in ("curl", "wget", "git", "pip"))


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def finished(folder: Path) -> Path:
    """Return the spectra file of a run."""
    trainer(folder, mat()).fit(model(), data())
    return folder / "mat" / "spectra.npz"


def changed(path: Path, **arrays: Any) -> None:
    with np.load(path, allow_pickle=False) as archive:
        stored = {name: archive[name] for name in archive.files}
    np.savez(path, **(stored | arrays))


@pytest.mark.parametrize("name", ["names", "format", "lambda_max", "reason_names"])
def test_pickled_arrays_are_refused(name: str, tmp_path: Path) -> None:
    path, mark = finished(tmp_path), tmp_path / "mark"
    changed(path, **{name: np.array([Bomb(mark)], dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle"):
        read(path)
    with pytest.raises(ValueError, match="allow_pickle"):
        policies.Matched.from_run(tmp_path)
    assert not mark.exists()


def test_pickled_eigenvalues_are_refused(tmp_path: Path) -> None:
    path, mark = finished(tmp_path), tmp_path / "mark"
    values = np.array([[Bomb(mark)]], dtype=object)
    np.save(path.with_suffix(".eigenvalues") / "000000.npy", values, allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        read(path)
    assert not mark.exists()


def test_a_run_with_a_malicious_file_in_its_folder_goes_on_without_it(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, save_last=True)
    fit = trainer(tmp_path, mat(), save, max_epochs=2, enable_checkpointing=True)
    fit.fit(model(), data())
    mark = tmp_path / "mark"
    changed(tmp_path / "mat" / "spectra.npz", step=np.array([Bomb(mark)], dtype=object))
    callback = mat()
    with pytest.warns(UserWarning, match="training goes on without"):
        trainer(tmp_path, callback).fit(Small(), data(), ckpt_path=tmp_path / "last.ckpt")
    assert callback.summary()["probes"] == 3
    assert not mark.exists()


def cut_short(path: Path) -> None:
    """Leave an archive out of one array, as another program might."""
    with np.load(path, allow_pickle=False) as archive:
        stored = {name: archive[name] for name in archive.files if name != "step"}
    np.savez(path, **stored)


def bits_flipped(path: Path) -> None:
    """Change the contents of an array, so that its checksum no longer fits."""
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("trace.npy").header_offset + 200
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "an array is missing": cut_short,
    "a checksum does not fit": bits_flipped,
    "an array is compressed in an unknown way": lambda path: path.write_bytes(
        # The method's number follows the signature, two versions and the flags.
        re.sub(rb"(PK\x01\x02.{6})\0\0", rb"\1c\0", path.read_bytes(), flags=re.DOTALL)
    ),
    "a step is text": lambda path: changed(path, step=np.array(["one"] * 3)),
    "a probe is missing": lambda path: changed(path, seconds=np.array([1.0])),
    "a reason is none": lambda path: changed(path, reason=np.full((3, 3), 99, dtype=np.uint16)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    save = ModelCheckpoint(folder, save_last=True)
    fit = trainer(folder, mat(), save, max_epochs=4, enable_checkpointing=True)
    fit.fit(model(), data())
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "mat", tmp_path / "mat")
    path = tmp_path / "mat" / "spectra.npz"
    DAMAGES[damage](path)
    with pytest.raises(ValueError, match="is not a spectra file of format 1: it is damaged"):
        read(path)
    with pytest.warns(UserWarning, match="training goes on without"):
        Keeper(tmp_path).begin(12, 2)


@pytest.mark.parametrize("damage", list(DAMAGES)[:2])
def test_a_run_with_a_damaged_file_goes_on_without_it(
    damage: str, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "mat", tmp_path / "mat")
    DAMAGES[damage](tmp_path / "mat" / "spectra.npz")
    callback = mat()
    fit = trainer(tmp_path, callback, max_epochs=6)
    with pytest.warns(UserWarning, match="training goes on without"):
        fit.fit(Small(), data(), ckpt_path=whole / "last.ckpt")
    assert callback.summary()["probes"] == 5


@pytest.mark.parametrize("values", [None, np.zeros(3), np.zeros((2, 8)), np.zeros((3, 8), int)])
def test_damaged_eigenvalues_are_named(values: Any, tmp_path: Path) -> None:
    path = finished(tmp_path)
    file = path.with_suffix(".eigenvalues") / "000001.npy"
    file.write_bytes(b"") if values is None else np.save(file, values)
    with pytest.raises(ValueError, match=f"{file.name} (is empty|does not hold)"):
        read(path)


def test_names_in_a_file_are_shown_and_never_opened(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = finished(tmp_path / "run")
    evil = ["../../evil", "/etc/evil", "<script>alert(1)</script>"]
    changed(path, names=np.array(evil), layers=np.array(evil), kinds=np.array(["layer"] * 3))
    before = {file for file in tmp_path.rglob("*")}
    page = report(tmp_path / "run")
    assert {file for file in tmp_path.rglob("*")} - before == {page}
    text = page.read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "http" not in text.replace("http-equiv", "")
    store = SpectraStore(path)
    store.truncate(0)
    assert not (tmp_path / "evil").exists()


def test_files_among_the_eigenvalues_that_are_not_theirs_are_left_alone(tmp_path: Path) -> None:
    path = finished(tmp_path)
    others = [path.with_suffix(".eigenvalues") / name for name in ("notes.txt", "notes.npy")]
    for other in others:
        other.write_text("mine")
    SpectraStore(path).truncate(0)
    assert sorted(path.with_suffix(".eigenvalues").iterdir()) == sorted(others)


def test_a_checkpoint_names_no_path_to_write_to(tmp_path: Path) -> None:
    """Strings in the callback's state are words of its own and names of units."""
    save = ModelCheckpoint(tmp_path / "a", save_last=True)
    fit = trainer(tmp_path / "a", mat(), save, max_epochs=2, enable_checkpointing=True)
    fit.fit(model(), data())
    path = tmp_path / "a" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    assert str(tmp_path) not in repr(state["callbacks"]["MATCallback"])
    assert str(tmp_path) not in repr(state["optimizer_states"])
    for field in ("folder", "path", "log_dir"):
        state["callbacks"]["MATCallback"][field] = str(tmp_path / "elsewhere")
    torch.save(state, path)
    trainer(tmp_path / "b", mat()).fit(Small(), data(), ckpt_path=path, weights_only=True)
    assert (tmp_path / "b" / "mat" / "spectra.npz").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_opens_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    finished(tmp_path)
    assert read(tmp_path / "mat" / "spectra.npz").step.tolist() == [6, 12, 18]
