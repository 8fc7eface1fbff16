"""From a task's settings to its model and its data."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.suites.spec import Task


def made(
    task: Task, steps: int, seed: int, data: Path | None
) -> tuple[L.LightningModule, L.LightningDataModule]:
    """Return the module, from the global random stream, and its data.

    Args:
        task: What is trained.
        steps: Optimizer steps that the learning-rate schedule is for.
        seed: Of the data order, masks and dropout.
        data: Folder of the data sets; None for what the data module has without one.

    Raises:
        FileNotFoundError: If the folder lacks the data set.
    """
    settings = json.dumps([task.data, task.batch_size, task.model], sort_keys=True)
    text = _data(settings, seed, data)
    return MODULES[task.model](dict(task.size), text, steps, seed), text


@lru_cache(maxsize=2)
def _data(settings: str, seed: int, data: Path | None) -> L.LightningDataModule:
    """Read a data set once for all methods of a seed."""
    arguments, batch_size, model = json.loads(settings)
    return DATA[model](arguments, batch_size, seed, data)


def _text(arguments: dict[str, Any], batch_size: int, seed: int, data: Path | None) -> Any:
    from examples.data.corpus import read_directory
    from examples.data.embedded import embedded_corpus
    from examples.data.masking import MaskedText

    corpus = embedded_corpus() if data is None else read_directory(data)
    return MaskedText(corpus, batch_size=batch_size, seed=seed, **arguments)


def _bert(size: dict[str, Any], text: Any, steps: int, seed: int) -> L.LightningModule:
    from examples.models.mlm import BertMLM

    return BertMLM(vocab_size=len(text.vocabulary), max_steps=steps, seed=seed, **size)


def freeze_lower_half(module: L.LightningModule) -> None:
    """Freeze the embeddings and the lower half of the encoder's layers."""
    raise NotImplementedError


DATA: dict[str, Callable[..., Any]] = {"bert": _text}
MODULES: dict[str, Callable[..., L.LightningModule]] = {"bert": _bert}
