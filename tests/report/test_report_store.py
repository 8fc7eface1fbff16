"""SpectraStore: whole at every moment, the same after a resume, plain to read."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_mat import policies
from lightning_mat.report import SpectraStore, files, read
from lightning_mat.report.files import write_whole

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def folder(path):
    """Return the contents of every file below a folder."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_what_is_read_is_what_was_appended(run, tmp_path):
    store, probes = SpectraStore(tmp_path / "logs" / "mat" / "spectra.npz"), run(4)
    for probe in probes:
        store.append(probe)
    data = read(store.path)
    assert data.names == probes[0].units.names
    assert (data.kinds, data.layers) == (probes[0].units.kinds, probes[0].units.layers)
    assert data.step.tolist() == [10, 20, 30, 40]
    assert data.epoch.tolist() == [0, 1, 2, 3]
    assert data.seconds.tolist() == [0.5, 1.5, 2.5, 3.5]
    assert data.eigenvalues.shape == (4, 8, 3)
    for p, probe in enumerate(probes):
        for series in ("lambda_max", "lambda_min", "trace", "effective_rank"):
            assert getattr(data, series)[p].tolist() == getattr(probe.spectra, series).tolist()
        assert data.active[p].tolist() == probe.decision.active.tolist()
        assert data.reasons[p] == probe.decision.reasons
        assert np.array_equal(data.eigenvalues[p], probe.spectra.eigenvalues.numpy())
        for kind, threshold in probe.decision.thresholds.items():
            assert data.thresholds[kind][p] == threshold
    assert data.by_kind() == probes[0].units.by_kind()


def test_the_file_is_read_without_pickle(run, tmp_path):
    store = SpectraStore(tmp_path / "spectra.npz")
    store.append(run(1)[0])
    with np.load(store.path, allow_pickle=False) as archive:
        assert archive["names"].tolist() == [f"u{i}" for i in range(8)]
        assert archive["reason_names"][archive["reason"][0, 7]] == "λ_max ≥ λ_α"


def test_a_policy_without_thresholds_leaves_them_nan(run, tmp_path):
    store = SpectraStore(tmp_path / "spectra.npz")
    store.append(run(1, policy=policies.Random())[0])
    assert np.isnan(store.read().thresholds["head"]).all()


def test_eigenvalues_can_be_left_out(run, tmp_path):
    store = SpectraStore(tmp_path / "spectra.npz", keep_eigenvalues=False)
    for probe in run(2):
        store.append(probe)
    assert list(folder(tmp_path)) == ["spectra.npz"]
    assert store.read().eigenvalues is None


def test_probes_of_other_sample_counts_are_padded_with_nan(run, tmp_path):
    store = SpectraStore(tmp_path / "spectra.npz")
    store.append(run(1, samples=2)[0])
    store.append(run(2, samples=4)[1])
    eigenvalues = store.read().eigenvalues
    assert eigenvalues.shape == (2, 8, 4)
    assert np.isnan(eigenvalues[0, :, 2:]).all()
    assert np.isfinite(eigenvalues[0, :, :2]).all()


@pytest.mark.parametrize("resumed_at", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("told", [True, False])
def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(run, tmp_path, resumed_at, told):
    probes = run(5)
    straight = SpectraStore(tmp_path / "straight" / "spectra.npz")
    for probe in probes:
        straight.append(probe)
    broken = SpectraStore(tmp_path / "broken" / "spectra.npz")
    for probe in run(5, policy=policies.Random(0.3, seed=9)):  # what the killed run went on to
        broken.append(probe if probe.step > 10 * resumed_at else probes[probe.epoch])
    if told:
        broken.truncate(10 * resumed_at)
        assert len(broken.read().step) == resumed_at
    for probe in probes[resumed_at:]:
        broken.append(probe)
    if told or resumed_at < 5:
        assert folder(tmp_path / "broken") == folder(tmp_path / "straight")


def test_truncating_keeps_the_probe_of_the_step_itself(run, tmp_path):
    store = SpectraStore(tmp_path / "spectra.npz")
    for probe in run(3):
        store.append(probe)
    store.truncate(25)
    assert store.read().step.tolist() == [10, 20]
    assert sorted(folder(tmp_path)) == [
        "spectra.eigenvalues/000000.npy",
        "spectra.eigenvalues/000001.npy",
        "spectra.npz",
    ]
    store.truncate(20)
    assert store.read().step.tolist() == [10, 20]
    assert store.read().eigenvalues.shape[0] == 2


def test_truncating_before_the_first_probe_does_nothing(tmp_path):
    SpectraStore(tmp_path / "spectra.npz").truncate(5)
    assert folder(tmp_path) == {}


def test_a_new_run_in_the_same_folder_starts_over(run, tmp_path):
    store = SpectraStore(tmp_path / "spectra.npz")
    for probe in run(3):
        store.append(probe)
    store.append(run(1)[0])
    assert store.read().step.tolist() == [10]
    assert len(folder(tmp_path)) == 2


def test_probes_of_other_units_are_refused(run, tmp_path):
    store, (first, second) = SpectraStore(tmp_path / "spectra.npz"), run(2)
    store.append(first)
    units = replace(second.units, names=tuple(f"v{i}" for i in range(8)))
    before = folder(tmp_path)
    with pytest.raises(ValueError, match="probes of other units"):
        store.append(replace(second, units=units))
    assert folder(tmp_path) == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_names_it(run, tmp_path, monkeypatch, call):
    store, (first, second) = SpectraStore(tmp_path / "spectra.npz"), run(2)
    store.append(first)
    before = folder(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left") as caught:
        store.append(second)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in caught.value.filename
    assert folder(tmp_path) == before
    monkeypatch.undo()
    store.append(second)
    assert store.read().step.tolist() == [10, 20]


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_file(run, tmp_path):
    (tmp_path / "occupied").write_text("a file, not a folder")
    store = SpectraStore(tmp_path / "occupied" / "spectra.npz", keep_eigenvalues=False)
    with pytest.raises(OSError, match=r"occupied/spectra\.npz"):
        store.append(run(1)[0])


def test_a_process_that_dies_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "spectra.npz"
    write_whole(path, lambda stream: stream.write(b"old"))
    program = (
        "import os, runpy, sys; from pathlib import Path\n"
        "def half(stream):\n"
        "    stream.write(b'ne'); stream.flush(); os._exit(9)\n"
        "runpy.run_path(sys.argv[1])['write_whole'](Path(sys.argv[2]), half)"
    )
    command = [sys.executable, "-c", program, files.__file__, str(path)]
    assert subprocess.run(command, check=False).returncode == 9
    assert path.read_bytes() == b"old"
    write_whole(path, lambda stream: stream.write(b"new"))
    assert folder(tmp_path) == {"spectra.npz": b"new"}


def test_a_run_that_died_between_its_two_files_is_read_as_before_and_goes_on(run, tmp_path):
    store, (first, second) = SpectraStore(tmp_path / "spectra.npz"), run(2)
    store.append(first)
    before = (tmp_path / "spectra.npz").read_bytes()
    store.append(second)
    (tmp_path / "spectra.npz").write_bytes(before)  # the eigenvalues of the second are there
    data = store.read()
    assert data.step.tolist() == [10]
    assert data.eigenvalues.shape[0] == 1
    store.append(second)
    assert store.read().eigenvalues.shape[0] == 2


def test_no_file_and_a_strange_file_are_clear_errors(run, tmp_path):
    store = SpectraStore(tmp_path / "spectra.npz")
    with pytest.raises(FileNotFoundError, match="written at the first probe"):
        store.read()
    store.append(run(1)[0])
    whole = store.path.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        store.path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a spectra file of format 1"):
            store.read()
    np.savez(store.path, format=np.array(2))
    with pytest.raises(ValueError, match="not a spectra file of format 1"):
        store.append(run(1)[0])


def test_more_reasons_than_a_byte_can_number_are_kept_apart(run, tmp_path):
    store = SpectraStore(tmp_path / "spectra.npz")
    (probe,) = run(1)
    said = []
    for t in range(40):
        reasons = tuple(f"reason {t} {i}" for i in range(8))
        decision = policies.Decision(
            torch.ones(8, dtype=torch.bool), reasons, {}, probe.units.kinds
        )
        store.append(replace(probe, decision=decision, step=t))
        said.append(reasons)
    assert store.read().reasons == tuple(said)
