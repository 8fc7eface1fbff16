"""kill -9 at moments of every kind: the run that goes on ends as one that was never killed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.soak.moments import FOLDERS, MOMENTS
from tests.soak.runs import STEPS, Die, check_equal, check_files, run

# Files are written by the first process.
OF_ALL = [name for name in MOMENTS if "file" not in name and "checkpoint" not in name]
OF_ALL.append("half a shard")
OF_ALL.remove("eigenvalues without their row")
OF_ALL.remove("spectra cut back, not yet the eigenvalues")


def killed_and_resumed(
    tmp_path: Path, kills: list[Die], steps: int, ranks: int = 1, shards: bool = False
) -> None:
    whole, often = tmp_path / "whole", tmp_path / "often"
    assert not run(whole, None, steps, ranks, shards)
    for kill in kills:
        assert run(often, kill, steps, ranks, shards), f"{kill}: over before"
        check_files(often)
    assert not run(often, None, steps, ranks, shards)
    check_files(often)
    for rank in range(ranks):
        check_equal(often, whole, rank)


def test_three_kills_leave_the_same_weights(tmp_path: Path) -> None:
    moments = [
        ("half a checkpoint", 5),
        ("in a probe, at a product", 2),
        ("half a spectra file", 1),
    ]
    killed_and_resumed(tmp_path, [Die(*moment) for moment in moments], steps=24)


def test_kills_of_one_of_two_processes_leave_the_same_weights(tmp_path: Path) -> None:
    kills = [
        Die("half a checkpoint", 3),
        Die("in a probe, at a product", 2, rank=1),
        Die("in a step, before the optimizer", 2, rank=1),
    ]
    killed_and_resumed(tmp_path, kills, steps=18, ranks=2)


def test_kills_while_a_sharded_checkpoint_is_written_leave_the_same_weights(
    tmp_path: Path,
) -> None:
    kills = [
        Die("half a shard", 20, rank=1),
        Die("half of what is beside the shards", 4),
        Die("a whole folder beside the old one", 2),
    ]
    killed_and_resumed(tmp_path, kills, steps=18, ranks=2, shards=True)


def drawn(seed: int, count: int, ranks: int = 1, shards: bool = False) -> list[Die]:
    """Return kills at every moment, and at more that are drawn, in an order that is drawn."""
    draw = random.Random(seed)
    names = list(MOMENTS)
    if shards:
        names = [name for name in MOMENTS if "checkpoint" not in name] + list(FOLDERS)
    moments = [(name, draw.randint(1, 3)) for name in names]
    moments += [(draw.choice(names), draw.randint(1, 5)) for _ in range(count - len(names))]
    draw.shuffle(moments)
    return [Die(n, i, draw.randrange(ranks) if n in OF_ALL else 0) for n, i in moments]


@pytest.mark.soak
@pytest.mark.parametrize(("ranks", "shards"), [(1, False), (2, False), (4, False), (2, True)])
def test_twenty_kills_leave_the_same_weights(ranks: int, shards: bool, tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, drawn(20, 20, ranks, shards), 3 * STEPS, ranks, shards)
