"""Matched: random units, as many per layer and episode as a recorded run trained."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from lightning_mat.policies.base import DRAWN, NOT_DRAWN, Decision, UnitTable
from lightning_mat.policies.history import History

Counts = Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class Matched:
    """Random units train, in each layer and episode as many as in a recorded run.

    The control that tells a policy's choice of units from its choice of how many train where and
    when: give the run the recorded one's calendar and warm-up. The draw depends on the seed, the
    episode and the units alone. Protection is what the recorded run had.

    Args:
        record: For each episode, how many units of each (layer, kind) train. Later episodes repeat
            the last entry.
        seed: Seed of the draws.

    Raises:
        ValueError: If the record is empty, or a count is no whole number ≥ 0.

    Example:
        >>> table = UnitTable(("a", "b", "c"), ("head",) * 3, ("x", "x", "y"), torch.zeros(3))
        >>> policy = Matched([{("x", "head"): 1, ("y", "head"): 1}])
        >>> print(policy.decide(History(), table, 0).summary())
        head: 2 of 3 train (1 not drawn)
    """

    record: Sequence[Counts]
    seed: int = 0

    needs_spectra: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the record; hold a copy."""
        object.__setattr__(self, "record", tuple(dict(counts) for counts in self.record))
        if not self.record:
            raise ValueError(
                "the record is empty: give one mapping (layer, kind) → count per episode"
            )
        for episode, counts in enumerate(self.record):
            for key, count in counts.items():
                if not isinstance(count, int) or count < 0:
                    raise ValueError(
                        f"episode {episode} of the record has {count!r} units of {key}: counts are "
                        "whole numbers ≥ 0"
                    )

    @classmethod
    def from_run(cls, path: str | Path, seed: int = 0) -> Matched:
        """Return the policy that matches a run of which the probes were written down.

        Args:
            path: The run's folder, or the file ``mat/spectra.npz`` in it.
            seed: Seed of the draws.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a spectra file, or holds no probe.
        """
        # Policies alone load no report, which loads NumPy.
        from lightning_mat.report.store import read

        path = Path(path)
        data = read(path / "mat" / "spectra.npz" if path.is_dir() else path)
        keys = list(zip(data.layers, data.kinds, strict=True))
        nobody = dict.fromkeys(keys, 0)
        record = []
        for row in data.active.tolist():
            trained = Counter(key for key, trains in zip(keys, row, strict=True) if trains)
            record.append({**nobody, **trained})
        return cls(record, seed)

    def check_units(self, units: UnitTable) -> None:
        """Check that the record is of the units' layers and kinds.

        Raises:
            ValueError: If an episode names another (layer, kind), leaves one out, or counts more
                units than there are.
        """
        groups = units.by_layer_and_kind()
        for episode, counts in enumerate(self.record):
            if counts.keys() != groups.keys():
                key = min(counts.keys() ^ groups.keys())
                where = "the record" if key in counts else "this run"
                raise ValueError(
                    f"{key} is in {where} only (episode {episode}): use the record of a run with "
                    "the same model and units"
                )
            for key, count in counts.items():
                if count > len(groups[key]):
                    raise ValueError(
                        f"episode {episode} of the record trains {count} units of {key}, of which "
                        f"there are {len(groups[key])}: use the record of a run with the same units"
                    )

    def decide(self, history: History, units: UnitTable, episode: int) -> Decision:
        """Return the draw of the episode; the history may be empty.

        Raises:
            ValueError: As :meth:`check_units`.
        """
        self.check_units(units)
        counts = self.record[min(episode, len(self.record) - 1)]
        # Seeding by a string hashes all of it: nearby seeds and episodes share no draws.
        generator = random.Random(f"lightning_mat matched {self.seed} {episode}")
        active = torch.zeros(len(units), dtype=torch.bool)
        for key, members in units.by_layer_and_kind().items():
            active[generator.sample(members, counts[key])] = True
        reasons = tuple(DRAWN if trains else NOT_DRAWN for trains in active.tolist())
        return Decision(active, reasons, {}, units.kinds)
