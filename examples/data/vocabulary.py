"""A word-level vocabulary, taken from the training split."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

UNKNOWN, END, MASK = SPECIAL = ("<unk>", "<eos>", "<mask>")


class Vocabulary:
    """The words of a corpus, numbered: the special ones first, then by falling frequency.

    Blocks are cut from running text, so there is no padding word.

    Args:
        words: All words in order, beginning with :data:`SPECIAL`.

    Example:
        >>> vocabulary = Vocabulary.build(["a b a", "c a"], size=5)
        >>> vocabulary.words
        ('<unk>', '<eos>', '<mask>', 'a', 'b')
        >>> vocabulary.encode(["a c b"])
        tensor([3, 0, 4, 1])
    """

    kind = "words"

    def __init__(self, words: Iterable[str]) -> None:
        """Number the words."""
        self.words = tuple(words)
        self._index = {word: i for i, word in enumerate(self.words)}
        self.unknown, self.end, self.mask = (self._index[word] for word in SPECIAL)

    @classmethod
    def build(cls, lines: Iterable[str], size: int | None = None) -> Vocabulary:
        """Return the most frequent words of some lines; words of equal frequency by alphabet.

        Args:
            lines: Words separated by blanks.
            size: Most words to keep, the special ones among them; None keeps all.

        Raises:
            ValueError: If ``size`` leaves no room for a word.
        """
        if size is not None and size <= len(SPECIAL):
            raise ValueError(
                f"vocabulary size must be above {len(SPECIAL)} (the special words), got {size}"
            )
        counts = Counter(word for line in lines for word in line.split())
        for word in SPECIAL:
            counts.pop(word, None)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([*SPECIAL, *ranked][:size])

    def __len__(self) -> int:
        """Return the number of words, V."""
        return len(self.words)

    def encode(self, lines: Iterable[str]) -> Tensor:
        """Return the numbers of all words, each line closed by ``<eos>``, int64, shape ``[N]``."""
        numbers = array("q")
        for line in lines:
            numbers.extend(self._index.get(word, self.unknown) for word in line.split())
            numbers.append(self.end)
        return torch.tensor(numbers, dtype=torch.int64)
