"""Samples for a probe, drawn from the training set without disturbing the training's own order."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from lightning_mat.mntk.quiet import kept_random_streams


def check_loader(loader: object, n_samples: int) -> DataLoader[Any]:
    """Return the loader if samples can be drawn from its dataset by index.

    Raises:
        ValueError: If there is no loader, or its dataset has no length, or too few samples.
    """
    if loader is None:
        raise ValueError(
            "no training dataloader found, but MATCallback draws its probe from the training set: "
            "define train_dataloader, or pass MATCallback(probe_data=DataLoader(...))"
        )
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"the training data is a {type(loader).__name__}, not one DataLoader: pass "
            "MATCallback(probe_data=DataLoader(...)) to say what to draw the probe from"
        )
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise ValueError(
            f"the training dataset {type(dataset).__name__} has no length or no index, "
            "so that no samples can be drawn from it: pass MATCallback(probe_data=DataLoader(...)) "
            "over a dataset that has both"
        )
    if loader.batch_sampler is None:
        raise ValueError(
            "the training dataloader has batch_size=None: its dataset gives batches, not samples. "
            "Pass MATCallback(probe_data=DataLoader(...)) over single samples"
        )
    available = len(_indices(loader))
    if n_samples > available:
        raise ValueError(
            f"n_samples is {n_samples}, but the training dataset has {available} samples: "
            f"lower n_samples to at most {available}"
        )
    return loader


def _indices(loader: DataLoader[Any]) -> Sequence[int]:
    """Return the samples that training may see: a sampler's subset, else all."""
    # A loader that is given its batches has another sampler, which nobody asks.
    sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
    # Lightning deals a sampler out to several processes through a data set of its indices.
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
    if isinstance(sampler, SubsetRandomSampler):
        return sampler.indices
    return range(len(loader.dataset))  # type: ignore[arg-type]


def seed_of(seed: int, number: int) -> int:
    """Return the seed of what is random in one probe's samples.

    Args:
        seed: Of the run.
        number: Of the probe, from 0.
    """
    return seed * 1_000_003 + number


def draw(loader: DataLoader[Any], n_samples: int, seed: int, number: int) -> Any:
    """Return a collated batch of different samples.

    The draw depends on the seed and the number of the probe alone, and the random number streams
    (torch, Python, NumPy) are as before, also where the dataset augments its samples at random.

    Args:
        loader: Its dataset and its ``collate_fn`` are used; of its sampler only the subset of a
            ``SubsetRandomSampler``.
        n_samples: S.
        seed: Of the run.
        number: Of the probe, from 0.
    """
    seed = seed_of(seed, number)
    generator = torch.Generator().manual_seed(seed)
    dataset: Any = loader.dataset
    available = _indices(loader)
    order = torch.randperm(len(available), generator=generator)[:n_samples].tolist()
    index = [available[i] for i in order]
    with kept_random_streams(seed=seed):
        fetch = getattr(dataset, "__getitems__", None)
        samples = fetch(index) if fetch is not None else [dataset[i] for i in index]
        return loader.collate_fn(samples)
