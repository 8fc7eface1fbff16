"""``lightning-mat doctor`` tells what is there, what is used, and what computes wrong."""

from __future__ import annotations

import pytest
import torch

from lightning_mat import _extension, cli, doctor
from lightning_mat.mntk import ops

EXTENSION = _extension.load()
needs_extension = pytest.mark.skipif(bool(EXTENSION.error), reason=EXTENSION.error)


def test_doctor_reports_versions_devices_and_backends(capsys):
    assert cli.main(["doctor"]) == 0
    report = capsys.readouterr().out
    for expected in (torch.__version__, "lightning-mat", "Compiled extension", "In use", "cpu"):
        assert expected in report
    assert report.rstrip().endswith("All self-checks passed.")


@needs_extension
def test_doctor_checks_every_operation_of_every_backend():
    checks = doctor.self_check("cpu", "extension") + doctor.self_check("cpu", "eager")
    assert {(c.operation, c.backend) for c in checks} == {
        (operation, backend) for operation in doctor.TOLERANCE for backend in ("extension", "eager")
    }
    assert all(check.passed for check in checks)
    assert "mntk_spectra" in doctor.TOLERANCE


@needs_extension
def test_doctor_fails_when_an_operation_computes_wrong(monkeypatch, capsys):
    right = ops.gram_eigenvalues
    monkeypatch.setattr(ops, "gram_eigenvalues", lambda *a, **k: right(*a, **k) * 1.001)
    assert cli.main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert "FAILED beyond rounding" in report
    assert "A SELF-CHECK FAILED" in report


def test_doctor_reports_an_operation_that_raises_and_goes_on(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no kernel image is available\nand a long trace")

    monkeypatch.setattr(ops, "gram_extremes", broken)
    assert cli.main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert "FAILED no kernel image is available" in report
    assert "long trace" not in report
    assert "gram_accumulate" in report


def test_doctor_says_how_to_get_a_missing_extension(monkeypatch, capsys):
    found = _extension.Extension({}, "the compiled extension cannot be imported (no such file)")
    monkeypatch.setattr(_extension, "load", lambda: found)
    assert cli.main(["doctor"]) == 0  # the reference works
    report = capsys.readouterr().out
    assert "no such file" in report
    assert "pip install" in report
    assert "eager: the compiled extension cannot be imported" in report


def test_doctor_says_how_to_get_cuda_kernels_where_there_is_a_device(monkeypatch):
    info = {"backends": "cpu", "reason": "no nvcc", "torch": "2.15.0", "compiler": "c++ 12"}
    monkeypatch.setattr(_extension, "load", lambda: _extension.Extension(info, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lines = "\n".join(doctor._compiled())
    assert "no nvcc" in lines
    assert "LIGHTNING_MAT_CUDA=1" in lines


def test_a_missing_package_is_reported(monkeypatch):
    def missing(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    assert any("not installed" in line for line in doctor._versions())


def test_the_command_line_needs_a_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "required: COMMAND" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert "doctor" in capsys.readouterr().out
