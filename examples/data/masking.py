"""Masked language modelling: blocks of words, some of which are replaced by a mask."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import copy

import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.data.corpus import Corpus
from examples.data.splits import ThreeSplits
from examples.data.subset import draw
from examples.data.vocabulary import Vocabulary
from examples.data.wordpiece import WordPieces


class MaskedBlocks(Dataset[dict[str, Tensor]]):
    """Running text cut into blocks of T words; each block has M = round(0.15 T) masked.

    The masked positions are drawn uniformly from (seed, epoch, block) alone: every run with the
    same seed sees the same masks, in whatever order it reads the blocks. Index ``epoch · n + i``
    is block ``i`` with the masks of that epoch; plain indices have those of epoch 0.

    Args:
        words: Numbers of the words, int64, shape ``[N]``; what does not fill a block is left out.
        length: Block length, T.
        mask: Number of the mask word.
        share: Part of a block that is masked.
        seed: Seed of the masks.

    Raises:
        ValueError: If the text does not fill one block.

    Example:
        >>> blocks = MaskedBlocks(torch.arange(40), length=20, mask=99)
        >>> sample = blocks[0]
        >>> len(blocks), sample["labels"].shape, (sample["input_ids"] == 99).sum().item()
        (2, torch.Size([3]), 3)
    """

    def __init__(
        self, words: Tensor, length: int, mask: int, *, share: float = 0.15, seed: int = 0
    ) -> None:
        """Cut the text into blocks."""
        if words.numel() < length:
            raise ValueError(
                f"a block needs {length} words, but the split has only {words.numel()}: "
                "lower --seq-len or give more text"
            )
        self.blocks = words[: words.numel() // length * length].view(-1, length)
        self.mask = mask
        self.n_masked = max(1, round(share * length))
        self.seed = seed

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids`` ``[T]``, ``masked_positions`` ``[M]`` and ``labels`` ``[M]``.

        Raises:
            IndexError: If the index is negative.
        """
        if index < 0:
            raise IndexError(f"index of a block must be ≥ 0, got {index}")
        epoch, i = divmod(index, len(self))
        input_ids = self.blocks[i].clone()
        draw = random.Random(f"{self.seed} {epoch} {i}")
        positions = torch.tensor(sorted(draw.sample(range(len(input_ids)), self.n_masked)))
        labels = input_ids[positions]
        input_ids[positions] = self.mask
        return {"input_ids": input_ids, "masked_positions": positions, "labels": labels}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Iterate once over all blocks, with the masks of epoch 0."""
        return (self[i] for i in range(len(self)))


class MaskedText(ThreeSplits):
    """The three splits of a corpus as masked blocks; validation and test masks never change.

    Args:
        corpus: Text.
        length: Block length, T.
        batch_size: Samples in a batch; an incomplete last training batch is left out.
        vocab_size: Words to keep, None for all of the training split.
        vocabulary: What numbers the text, for instance word pieces
            (:class:`examples.data.wordpiece.WordPieces`); by default the training split's words.
        seed: Seed of the order and of the masks.
        num_workers: Processes that prepare batches.
        train_size: Training blocks to use, None for all; the same ones for every seed.
        valid_size: Validation blocks to use, in the same way.
        test_size: Test blocks to use, in the same way.

    Raises:
        ValueError: If a split is too short for a block, training for a batch, or a size too large,
            or if both a vocabulary and its size are given.
    """

    def __init__(
        self,
        corpus: Corpus,
        length: int = 128,
        batch_size: int = 32,
        *,
        vocab_size: int | None = None,
        vocabulary: Vocabulary | WordPieces | None = None,
        seed: int = 0,
        num_workers: int = 0,
        train_size: int | None = None,
        valid_size: int | None = None,
        test_size: int | None = None,
    ) -> None:
        """Build the vocabulary and encode the splits."""
        super().__init__()
        if vocabulary is not None and vocab_size is not None:
            raise ValueError(
                f"the vocabulary has {len(vocabulary)} entries, but vocab_size={vocab_size} was "
                "given, too: leave out one of the two"
            )
        self.source = corpus.name
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.vocabulary = vocabulary or Vocabulary.build(corpus.train, vocab_size)

        def blocks(split: str, size: int | None, seed: int) -> MaskedBlocks:
            words = self.vocabulary.encode(getattr(corpus, split))
            found = MaskedBlocks(words, length, self.vocabulary.mask, seed=seed)
            found.blocks = found.blocks[draw(len(found), size, f"{split}_size")]
            return found

        self.train = blocks("train", train_size, seed)
        # Other seeds than training's, so that equal block numbers do not get equal masks.
        self.valid = blocks("valid", valid_size, seed + 1)
        self.test = blocks("test", test_size, seed + 2)
        if len(self.train) < batch_size:
            raise ValueError(
                f"a batch needs {batch_size} blocks of {length} words, but the training split "
                f"fills only {len(self.train)}: lower --batch-size or --seq-len"
            )

    def with_seed(self, seed: int) -> MaskedText:
        """Return the same blocks with another order and other masks, without encoding them anew."""
        other = copy(self)
        other.seed = seed
        for split, its_seed in (("train", seed), ("valid", seed + 1), ("test", seed + 2)):
            blocks = copy(getattr(self, split))
            blocks.seed = its_seed
            setattr(other, split, blocks)
        return other

    def describe(self) -> dict[str, int | str]:
        """Return name, kind and size of the vocabulary, and blocks per split."""
        return {
            "name": self.source,
            "tokens": self.vocabulary.kind,
            "vocabulary": len(self.vocabulary),
            "train_blocks": len(self.train),
            "valid_blocks": len(self.valid),
            "test_blocks": len(self.test),
        }
