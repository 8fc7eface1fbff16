"""kill -9 at moments of every kind: the run that goes on ends as one that was never killed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.soak.moments import MOMENTS
from tests.soak.runs import STEPS, check_equal, check_files, run


def killed_and_resumed(tmp_path: Path, kills: list[tuple[str, int]], steps: int) -> None:
    whole, often = tmp_path / "whole", tmp_path / "often"
    assert not run(whole, steps=steps)
    for moment, number in kills:
        assert run(often, moment, number, steps), f"{moment}: over before call {number}"
        check_files(often)
    assert not run(often, steps=steps)
    check_files(often)
    check_equal(often, whole)


def test_three_kills_leave_the_same_weights(tmp_path: Path) -> None:
    kills = [("half a checkpoint", 5), ("in a probe, at a product", 2), ("half a spectra file", 1)]
    killed_and_resumed(tmp_path, kills, steps=24)


@pytest.mark.soak
def test_twenty_kills_leave_the_same_weights(tmp_path: Path) -> None:
    draw = random.Random(20)
    kills = [(moment, draw.randint(1, 3)) for moment in MOMENTS]
    kills += [(draw.choice(list(MOMENTS)), draw.randint(1, 5)) for _ in range(20 - len(kills))]
    draw.shuffle(kills)
    killed_and_resumed(tmp_path, kills, steps=3 * STEPS)
