"""The long run, in small: that it shows what it says, and finds what grows."""

from __future__ import annotations

import doctest
import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from benchmarks import soak

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    pytest.mark.filterwarnings("ignore"),
]
ROOT = Path(__file__).parents[2]


class Leak(L.Callback):
    """Leaves a hook on the model, now and then."""

    def on_train_batch_start(self, trainer: L.Trainer, module: nn.Module, *_: Any) -> None:
        if trainer.global_step % 10 == 0:
            module.register_forward_hook(lambda *_: None)


def counts(looks: list[dict[str, int]]) -> list[dict[str, int]]:
    """Leave out what settles down in longer runs only."""
    names = ("resident_bytes", "python_objects", "open_files")
    return [{k: v for k, v in each.items() if k not in names} for each in looks]


def test_doctests() -> None:
    assert doctest.testmod(soak).failed == 0


def test_units_rest_at_every_look_and_nothing_is_left_behind() -> None:
    run = soak.train(60, 5, 10)
    assert (run["probes"], run["skipped"], run["trained_share"]) == (12, 0, 0.5)
    assert [each["step"] for each in run["looks"]] == [10, 20, 30, 40, 50, 60]
    assert soak.unshown(run) == []
    assert soak.grown(counts(run["looks"]), settled=10) == []
    # The folder is looked at: spectra with all eigenvalues, and the log.
    last = run["looks"][-1]
    assert last["spectra_bytes_per_probe"] > 8 * 16 * last["units_at_rest"] * 2
    assert last["log_bytes_per_probe"] > 0


def test_a_hook_that_is_left_behind_is_found() -> None:
    run = soak.train(30, 10, 10, Leak())
    found = soak.grown(counts(run["looks"]), settled=10)
    assert len(found) == 1
    assert found[0].startswith("hooks grew from")


def test_a_peak_between_two_looks_is_found() -> None:
    before = {"step": 1000, "resident_bytes": 1000, "hooks": 3}
    peak = {**before, "step": 1500, "resident_bytes": 1021}
    after = [{**before, "step": step} for step in (2000, 2500, 3000)]
    found = soak.grown([before, peak, *after])
    assert found == ["resident_bytes grew from 1000 at step 1000 to 1021 at step 1500"]
    # What comes before step 1,000 is not looked at.
    assert soak.grown([{**peak, "step": 500}, before, *after]) == []
    with pytest.raises(ValueError, match="two looks from step 1000 on, got 1"):
        soak.grown([before])


def test_a_run_in_which_nothing_rests_shows_nothing() -> None:
    looks = [{"step": 500, "gated_modules": 0, "units_at_rest": 0}]
    assert len(soak.unshown({"looks": looks, "skipped": 0})) == 2
    assert soak.unshown({"looks": [], "skipped": 2}) == ["2 probes were skipped"]


class Broken:
    """A gate that leaves a trace."""

    def __init__(self, model: nn.Module, part: Any, skip: str) -> None:
        self.model = model

    def apply(self, active: torch.Tensor) -> None:
        """Do nothing."""

    def remove(self) -> None:
        """Change a weight."""
        with torch.no_grad():
            next(self.model.parameters()).view(-1)[0] += 1


def test_a_gate_that_changes_a_weight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert soak.come_and_go(3) == []
    monkeypatch.setattr(soak, "Gate", Broken)
    assert soak.come_and_go(1) != []


def test_decisions_make_no_graphs() -> None:
    assert soak.graphs(4) == 2


def test_the_page_shows_the_result() -> None:
    result = json.loads((ROOT / "benchmarks/results/soak-cpu.json").read_text(encoding="utf-8"))
    assert result["complaints"] == []
    assert result["environment"]["modified"] is False
    assert soak.said(result) in (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
