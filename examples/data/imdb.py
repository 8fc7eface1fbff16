"""IMDB film reviews with their sentiment, as rows of word pieces.

Source:
    Maas et al., "Learning Word Vectors for Sentiment Analysis" (ACL 2011).
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.data.loader import as_fetched
from examples.data.locate import contents, locate
from examples.data.splits import ThreeSplits
from examples.data.subset import check_size, draw_stratified

CLASSES = ("neg", "pos")

Batch = dict[str, Tensor]


class Tokenizer(Protocol):
    """What makes rows of texts, such as :class:`examples.data.wordpiece.WordPieces`."""

    def padded(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Return ``input_ids`` and ``attention_mask``, int64, both shape ``[N, length]``."""


class Reviews(NamedTuple):
    """Texts and their classes, int64, shape ``[N]``: 0 negative, 1 positive."""

    texts: list[str]
    labels: Tensor

    def take(self, places: Tensor) -> Reviews:
        """Return the reviews at some places."""
        return Reviews([self.texts[i] for i in places.tolist()], self.labels[places])


def read(data: str | Path | None) -> tuple[Reviews, Reviews]:
    """Return the official training and test splits; None downloads them through ``datasets``.

    A line of ``train.tsv`` and ``test.tsv``, or of the same in an xz stream, is the class (``pos``
    or ``neg``), a number, the rating and the text, separated by a TAB each; texts may hold more.

    Raises:
        FileNotFoundError: If a file is missing, or the download fails; the message names it.
        ValueError: If a line is none of a review.
        ModuleNotFoundError: If a download is asked for and ``datasets`` is not installed.
    """
    if data is None:
        return _download()
    folder = locate(data, "imdb")
    return _read_split(folder, "train"), _read_split(folder, "test")


def _read_split(folder: Path, split: str) -> Reviews:
    packed, plain = folder / f"{split}.tsv.xz", folder / f"{split}.tsv"
    path = plain if plain.is_file() else packed
    if not path.is_file():
        raise FileNotFoundError(
            f"data folder {folder} lacks {packed.name} (or {plain.name}); found "
            f"{contents(folder)}: put it there, or leave out --data to download it"
        )
    try:
        raw = lzma.decompress(path.read_bytes()) if path == packed else path.read_bytes()
        lines = raw.decode().split("\n")
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): get it anew") from error
    texts, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        fields = line.split("\t", 3)
        if len(fields) < 4 or fields[0] not in CLASSES:
            raise ValueError(
                f"line {number} of {path} begins with {line[:40]!r}: expected class (pos or neg), "
                "id, rating and text with a TAB between them"
            )
        texts.append(fields[3].replace("<br />", " "))
        labels.append(CLASSES.index(fields[0]))
    return Reviews(texts, torch.tensor(labels, dtype=torch.int64))


def _download() -> tuple[Reviews, Reviews]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "downloading IMDB needs the package `datasets`, which is not installed: "
            "pip install 'lightning-mat[data]', or pass --data DIR"
        ) from error
    try:
        loaded = datasets.load_dataset("stanfordnlp/imdb")
    except (OSError, RuntimeError) as error:  # no network, or a hub that has it no more
        raise FileNotFoundError(
            f"IMDB could not be downloaded ({error}): name a folder that holds train.tsv.xz and "
            "test.tsv.xz by --data DIR"
        ) from error
    train, test = (
        Reviews(
            [text.replace("<br />", " ") for text in loaded[split]["text"]],
            torch.tensor(loaded[split]["label"], dtype=torch.int64),
        )
        for split in ("train", "test")
    )
    return train, test


class Rows(Dataset[Batch]):
    """Tokenised reviews, read in batches at once; an index ``epoch · n + i`` is review ``i``.

    Args:
        reviews: Texts and classes.
        tokenizer: Makes rows of the texts.
        length: Pieces in a row.
    """

    def __init__(self, reviews: Reviews, tokenizer: Tokenizer, length: int) -> None:
        """Tokenise."""
        self.input_ids, self.attention_mask = tokenizer.padded(reviews.texts, length)
        self.labels = reviews.labels

    def __len__(self) -> int:
        """Return the number of reviews."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """Return one review: ``input_ids`` and ``attention_mask`` ``[T]``, ``labels`` ``[]``."""
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return several: ``input_ids`` and ``attention_mask`` ``[S, T]``, ``labels`` ``[S]``."""
        places = torch.tensor(indices) % len(self)
        return {
            "input_ids": self.input_ids[places],
            "attention_mask": self.attention_mask[places],
            "labels": self.labels[places],
        }


class Imdb(ThreeSplits):
    """IMDB's training, validation and test reviews as rows of equal length.

    Validation has the last reviews of each class of the official training split, training is drawn
    from the others; subsets keep the shares of the classes and are the same for every seed.
    A batch is a dict of ``input_ids`` and ``attention_mask`` ``[S, T]`` and ``labels`` ``[S]``.

    Args:
        data: Folder of the files, see :func:`read`; None downloads.
        tokenizer: Makes rows of texts: :class:`examples.data.wordpiece.WordPieces`, or
            :func:`examples.models.encoder.load_tokenizer` for a pretrained encoder.
        batch_size: Reviews in a batch; an incomplete last training batch is left out.
        seq_len: Pieces in a row, T; longer reviews are cut, shorter ones padded.
        seed: Seed of the order.
        train_size: Training reviews to use, None for all.
        valid_size: Reviews of the training split that are kept for validation.
        test_size: Test reviews to use, None for all.
        num_workers: Processes that prepare batches.

    Raises:
        FileNotFoundError: If a file is not there; the message names it.
        ValueError: If a size does not fit.
    """

    name = "imdb"
    classes = 2
    collate = staticmethod(as_fetched)

    def __init__(
        self,
        data: str | Path | None,
        tokenizer: Tokenizer,
        batch_size: int = 32,
        seq_len: int = 128,
        *,
        seed: int = 0,
        train_size: int | None = None,
        valid_size: int = 2500,
        test_size: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """Read the reviews, choose those that are used and tokenise them."""
        super().__init__()
        if seq_len < 3:
            raise ValueError(
                f"seq_len must be ≥ 3 (a piece between two special ones), got {seq_len}"
            )
        train, test = read(data)
        check_size(len(train.labels) - 1, valid_size, "valid_size")
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.seq_len = seq_len
        valid_places, rest_places = _last_of_each_class(train.labels, valid_size)
        rest = train.take(rest_places)
        parts = (
            rest.take(draw_stratified(rest.labels, train_size, "train_size")),
            train.take(valid_places),
            test.take(draw_stratified(test.labels, test_size, "test_size")),
        )
        if len(parts[0].labels) < batch_size:
            raise ValueError(
                f"a batch needs {batch_size} reviews, but only {len(parts[0].labels)} are used for "
                "training: lower batch_size or raise train_size"
            )
        self.train, self.valid, self.test = (Rows(part, tokenizer, seq_len) for part in parts)

    def with_seed(self, seed: int) -> Imdb:
        """Return the same reviews in another order, without tokenising them anew."""
        other = copy(self)
        other.seed = seed
        return other

    def describe(self) -> dict[str, int | str]:
        """Return name, pieces in a row, and reviews per split."""
        return {
            "name": self.name,
            "seq_len": self.seq_len,
            "train_reviews": len(self.train),
            "valid_reviews": len(self.valid),
            "test_reviews": len(self.test),
        }


def _last_of_each_class(labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the places of the last samples, the same share of each class, and of the others.

    The files are sorted by class, so that the end of the whole would hold one class alone.
    """
    from_end = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        from_end[members] = torch.arange(len(members), 0, -1).double() / len(members)
    order = from_end.argsort(stable=True)
    return order[:size].sort().values, order[size:].sort().values
