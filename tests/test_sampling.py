"""Samples for a probe: different ones each time, the same for the same seed, and no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
)

from lightning_mat.mntk.samples import count_samples, take_samples, to_device
from lightning_mat.sampling import check_loader, draw


class Augmented(Dataset[Tensor]):
    """Uses all three random number streams."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        noise = torch.rand(()) + random.random() + np.random.rand()
        return torch.tensor([float(index), float(noise)])


def test_draws_depend_on_seed_and_number_alone() -> None:
    loader: DataLoader[Any] = DataLoader(Augmented(), batch_size=4)
    first = draw(loader, 8, seed=1, number=0)
    torch.manual_seed(5)
    random.seed(5)
    assert torch.equal(first, draw(loader, 8, seed=1, number=0))
    assert not torch.equal(first, draw(loader, 8, seed=1, number=1))
    assert not torch.equal(first, draw(loader, 8, seed=2, number=0))
    assert len(set(first[:, 0].tolist())) == 8


def test_drawing_leaves_the_random_streams_alone() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    draw(DataLoader(Augmented()), 4, seed=0, number=0)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()


def test_loaders_without_samples_to_draw_are_refused() -> None:
    with pytest.raises(ValueError, match="no training dataloader"):
        check_loader(None, 4)
    with pytest.raises(ValueError, match="n_samples is 21, but the training dataset has 20"):
        check_loader(DataLoader(Augmented()), 21)
    assert check_loader(DataLoader(Augmented()), 20) is not None


def test_samples_of_nested_batches() -> None:
    batch = {"a": torch.arange(6).view(3, 2), "b": (torch.arange(3), [torch.tensor(1.0), "text"])}
    assert count_samples(batch) == 3
    taken = take_samples(batch, 1, 3)
    assert taken["a"].tolist() == [[2, 3], [4, 5]]
    assert taken["b"][0].tolist() == [1, 2]
    assert taken["b"][1][1] == "text"
    assert to_device(batch, torch.device("cpu"))["a"] is batch["a"]


def test_drawing_does_not_seed_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    draw(DataLoader(Augmented()), 4, seed=0, number=0)
    assert not seeded


def test_a_subset_sampler_is_respected() -> None:
    loader = DataLoader(Augmented(), sampler=SubsetRandomSampler([3, 5, 7, 9]))
    drawn = draw(check_loader(loader, 4), 4, seed=0, number=0)
    assert sorted(drawn[:, 0].tolist()) == [3, 5, 7, 9]
    with pytest.raises(ValueError, match="n_samples is 5, but the training dataset has 4"):
        check_loader(loader, 5)
    batches = BatchSampler(SubsetRandomSampler([3, 5, 7, 9]), 2, drop_last=False)
    drawn = draw(DataLoader(Augmented(), batch_sampler=batches), 4, seed=0, number=0)
    assert sorted(drawn[:, 0].tolist()) == [3, 5, 7, 9]


def test_streams_and_datasets_of_batches_are_refused() -> None:
    class Stream(IterableDataset[Tensor]):
        def __len__(self) -> int:
            return 20

        def __iter__(self) -> Any:
            return iter([])

    with pytest.raises(ValueError, match="Stream has no length or no index"):
        check_loader(DataLoader(Stream()), 4)
    with pytest.raises(ValueError, match="batch_size=None"):
        check_loader(DataLoader(Augmented(), batch_size=None), 4)
