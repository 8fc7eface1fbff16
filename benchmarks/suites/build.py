"""From a task's settings to its model and its data."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.suites.pretrained import pretrained_bert, pretrained_switch
from benchmarks.suites.spec import DATA_SETS, Task
from examples.data.cifar10 import Cifar10
from examples.data.corpus import read_directory
from examples.data.embedded import embedded_corpus
from examples.data.imdb import Imdb
from examples.data.locate import find_vocabulary, locate
from examples.data.masking import MaskedText
from examples.data.wordpiece import WordPieces, read_pieces
from examples.models.encoder import PACKAGED, freeze_lowest, load_tokenizer
from examples.models.images import VGGClassifier
from examples.models.mlm import BertMLM, SwitchMLM
from examples.models.sentiment import SentimentClassifier


def built(
    task: Task, steps: int, seed: int, data: Path | None
) -> tuple[L.LightningModule, L.LightningDataModule]:
    """Return the module, drawn from the global random stream, and its data.

    Args:
        task: What is trained.
        steps: Optimizer steps that the learning-rate schedule is for.
        seed: Of the data order, masks and dropout.
        data: Folder of the data sets; None downloads images and reviews. Text needs a folder.

    Raises:
        FileNotFoundError: If the folder lacks the data set, or it cannot be downloaded; the
            message names the set and ``--data``.
        ModuleNotFoundError: If a package is missing; the message names it.
    """
    settings = json.dumps([task.data, task.batch_size], sort_keys=True)
    read_data, make = MODELS[task.model]
    try:
        text = _data(read_data, settings, seed, data)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{task.model} {task.name} trains on {data_set(task)}: {error}"
        ) from error
    return make(dict(task.size), text, steps, seed), text


def data_set(task: Task) -> str:
    """Return the name of the data set that a task trains on."""
    name = {"vgg": Cifar10.name, "sentiment": Imdb.name}.get(task.model) or task.data["corpus"]
    return DATA_SETS[name]


def freeze_lower_half(module: L.LightningModule) -> float:
    """Freeze embeddings and lower half of the layers; return the share of layers that trains."""
    layers = len(module.encoder.encoder.layer)
    freeze_lowest(module.encoder, layers // 2)
    return 1 - (layers // 2) / layers


@lru_cache(maxsize=2)
def _data(
    read_data: Callable[..., Any], settings: str, seed: int, data: Path | None
) -> L.LightningDataModule:
    """Read a data set once for all methods of a seed."""
    arguments, batch_size = json.loads(settings)
    return read_data(arguments, batch_size, seed, data)


def _text(
    arguments: dict[str, Any], batch_size: int, seed: int, data: Path | None
) -> L.LightningDataModule:
    """Read masked text; ``corpus`` names it, ``pieces`` is the size of a trained vocabulary.

    ``pieces`` None takes BERT's own vocabulary.
    """
    name, pieces = arguments.pop("corpus"), arguments.pop("pieces")
    if name == "embedded":
        corpus = embedded_corpus()
    elif data is None:
        raise FileNotFoundError(
            f"name a folder by --data DIR that holds {name} (its three word-level token files) and "
            "BERT's vocabulary, vocab.txt or bert-base-uncased/vocab.txt"
        )
    else:
        corpus = read_directory(locate(data, name), name)
    vocabulary = None if pieces or data is None else find_vocabulary(data)
    if not pieces and vocabulary is None:
        raise FileNotFoundError(
            f"this scale needs BERT's vocabulary, and there is no vocab.txt in {data} nor in its "
            "bert-base-uncased: put it there and name the folder by --data"
        )
    words: WordPieces = read_pieces(vocabulary, corpus.train, pieces)
    return MaskedText(corpus, batch_size=batch_size, vocabulary=words, seed=seed, **arguments)


def _images(
    arguments: dict[str, Any], batch_size: int, seed: int, data: Path | None
) -> L.LightningDataModule:
    return Cifar10(data, batch_size, seed=seed, **arguments)


def _reviews(
    arguments: dict[str, Any], batch_size: int, seed: int, data: Path | None
) -> L.LightningDataModule:
    tokenizer = load_tokenizer(arguments.pop("encoder", PACKAGED))
    return Imdb(data, tokenizer, batch_size, seed=seed, **arguments)


def _bert(size: dict[str, Any], text: Any, steps: int, seed: int) -> L.LightningModule:
    """Make a BERT; ``pretrained`` is how many pretrained layers take the place of ``size``'s."""
    layers = size.pop("pretrained", 0)
    common = {"vocab_size": len(text.vocabulary), "max_steps": steps, "seed": seed}
    if not layers:
        return BertMLM(**common, **size)
    module = BertMLM("tiny", **common, **size)
    module.bert = pretrained_bert(layers, *_shape(module))
    return module


def _switch(size: dict[str, Any], text: Any, steps: int, seed: int) -> L.LightningModule:
    """Make a mixture; ``pretrained`` as for BERT."""
    layers = size.pop("pretrained", 0)
    common = {"vocab_size": len(text.vocabulary), "max_steps": steps, "seed": seed}
    if not layers:
        return SwitchMLM(**common, **size)
    module = SwitchMLM("tiny", **common, **size)
    module.switch = pretrained_switch(layers, *_shape(module))
    return module


def _shape(module: L.LightningModule) -> tuple[int, int, float]:
    """Return vocabulary, length and dropout of a text module."""
    h = module.hparams
    return h["vocab_size"], h["max_length"], h["dropout"]


def _vgg(size: dict[str, Any], text: Any, steps: int, seed: int) -> L.LightningModule:
    return VGGClassifier(max_steps=steps, seed=seed, **size)


def _sentiment(size: dict[str, Any], text: Any, steps: int, seed: int) -> L.LightningModule:
    return SentimentClassifier(max_steps=steps, seed=seed, **size)


#: Per kind of model: what reads its data, and what makes it.
MODELS: dict[str, tuple[Callable[..., Any], Callable[..., L.LightningModule]]] = {
    "bert": (_text, _bert),
    "switch": (_text, _switch),
    "vgg": (_images, _vgg),
    "sentiment": (_reviews, _sentiment),
}
