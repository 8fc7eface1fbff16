"""The command line: inspect and report (doctor has its own tests)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from lightning_mat.cli import main
from tests.lightning_models import data, model, trainer
from tests.test_callback import mat

NET = nn.Linear(2, 2)


def test_inspect_shows_a_model_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "tests.test_cli:NET"]) == 0
    assert "layer" in capsys.readouterr().out


def test_inspect_prints_the_units(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = '{"d_model": 8, "nhead": 2, "dim_feedforward": 16}'
    assert main(["inspect", "torch.nn:TransformerEncoderLayer", "--arguments", arguments]) == 0
    table = capsys.readouterr().out
    assert "head" in table
    assert "ffn" in table
    assert "100.0%" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch.nn"], "MODULE:CALLABLE"),
        (["torch.nn:Nothing"], "Nothing"),
        (["no_such_package:Model"], "no_such_package"),
        (["torch:tensor", "--arguments", '{"data": 1}'], "not a torch.nn.Module"),
        (["torch.nn:Linear", "--arguments", "{"], "not JSON"),
        (["torch.nn:Linear", "--arguments", "[]"], "JSON object"),
        (
            [
                "torch.nn:Linear",
                "--arguments",
                '{"in_features": 2, "out_features": 2}',
                "--units",
                "heads",
            ],
            "heads",
        ),
    ],
)
def test_inspect_names_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_report_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    trainer(tmp_path, mat()).fit(model(), data())
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert "net.0" in page.read_text()
    assert main(["report", str(tmp_path / "nothing")]) == 1


def test_inspect_finds_modules_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nets_of_mine.py").write_text("from torch.nn import Linear\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = '{"in_features": 2, "out_features": 3}'
    assert main(["inspect", "nets_of_mine:Linear", "--arguments", arguments]) == 0
    assert "9" in capsys.readouterr().out
