"""Word pieces: BERT's vocabulary from a file, or one trained on the training split."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from examples.data.cache import cache_folder, publish

if TYPE_CHECKING:
    from tokenizers import BertWordPieceTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

#: Size of a vocabulary that is trained, unless said otherwise.
TRAINED_SIZE = 8192

#: WikiText writes 1 @,@ 000 for 1,000.
_JOINED = re.compile(r" @([-,.])@ ")
#: Most characters that a trained vocabulary knows.
_ALPHABET = 1000
_CHUNK = 1000


class WordPieces:
    """A lower-case word-piece tokenizer; stands where a word-level vocabulary may stand, too.

    Args:
        vocabulary: A ``vocab.txt``: one piece a line, among them :data:`SPECIAL`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file lacks a special piece.
        ModuleNotFoundError: If ``tokenizers`` is not installed.
    """

    kind = "word pieces"

    def __init__(self, vocabulary: str | Path) -> None:
        """Read the vocabulary."""
        path = Path(vocabulary)
        if not path.is_file():
            raise FileNotFoundError(
                f"vocabulary file {path} does not exist: name a vocab.txt of one word piece a "
                "line, or leave it out to have one trained"
            )
        lines = path.read_text(encoding="utf-8").split("\n")
        numbers = {piece.rstrip("\r"): i for i, piece in enumerate(lines) if piece}
        missing = [piece for piece in SPECIAL if piece not in numbers]
        if missing:
            raise ValueError(
                f"vocabulary file {path} lacks {', '.join(missing)}: it must be a BERT vocab.txt, "
                "one word piece a line"
            )
        self._tokenizer = _tokenizer(numbers)
        self.padding, self.unknown, self.start, self.end, self.mask = map(numbers.get, SPECIAL)
        self.size = max(numbers.values()) + 1

    @classmethod
    def trained(
        cls, lines: Sequence[str], size: int | None = None, cache: str | Path | None = None
    ) -> WordPieces:
        """Return a tokenizer trained on some lines; the same lines are trained on once only.

        Args:
            lines: Text of the training split.
            size: Pieces, the special ones among them; :data:`TRAINED_SIZE` by default.
            cache: Folder to keep it in, see :func:`examples.data.cache.cache_folder`.

        Raises:
            ValueError: If the size leaves no room for pieces.
            OSError: If the cache cannot be written.
            ModuleNotFoundError: If ``tokenizers`` is not installed.
        """
        size = TRAINED_SIZE if size is None else size
        if size <= len(SPECIAL):
            raise ValueError(
                f"vocabulary size must be above {len(SPECIAL)} (the special pieces), got {size}"
            )
        text = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        folder = cache_folder(cache) / f"pieces-1-{size}-{text}"

        if not folder.is_dir():
            publish(folder, lambda whole: _train(lines, size, whole))
        return cls(folder / "vocab.txt")

    def __len__(self) -> int:
        """Return the number of pieces, V."""
        return self.size

    def encode(self, lines: Sequence[str]) -> Tensor:
        """Return the numbers of all pieces, each line closed by ``[SEP]``, int64, shape ``[N]``.

        Lines without a word are left out.
        """
        numbers = array("q")
        texts = [text for line in lines if (text := plain(line))]
        for i in range(0, len(texts), _CHUNK):  # an encoding holds much besides its numbers
            for found in self._tokenizer.encode_batch(
                texts[i : i + _CHUNK], add_special_tokens=False
            ):
                numbers.extend(found.ids)
                numbers.append(self.end)
        return torch.tensor(numbers, dtype=torch.int64)

    def padded(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Return texts as rows ``[CLS] … [SEP]``, cut or padded to a length.

        Returns:
            ``input_ids`` and ``attention_mask``, int64, both shape ``[N, length]``.
        """
        numbers = torch.full((len(texts), length), self.padding, dtype=torch.int64)
        mask = torch.zeros_like(numbers)
        self._tokenizer.enable_truncation(length)
        try:
            for i in range(0, len(texts), _CHUNK):
                for row, found in enumerate(self._tokenizer.encode_batch(texts[i : i + _CHUNK]), i):
                    numbers[row, : len(found.ids)] = torch.tensor(found.ids)
                    mask[row, : len(found.ids)] = 1
        finally:
            self._tokenizer.no_truncation()
        return numbers, mask


def plain(line: str) -> str:
    """Return a line of WikiText as one would write it, as far as pieces are concerned.

    Example:
        >>> plain(" 1 @,@ 000 role @-@ playing <unk> ")
        '1,000 role-playing [UNK]'
    """
    return _JOINED.sub(r"\1", line).replace("<unk>", "[UNK]").strip()


def _tokenizer(numbers: dict[str, int] | None) -> BertWordPieceTokenizer:
    try:
        from tokenizers import BertWordPieceTokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "word pieces need the package `tokenizers`, which is not installed: "
            "pip install 'lightning-mat[data]', or use whole words"
        ) from error
    return BertWordPieceTokenizer(numbers)


def _train(lines: Iterable[str], size: int, folder: Path) -> None:
    """Train a vocabulary and write it to ``folder/vocab.txt``; the same lines give the same one."""
    tokenizer = _tokenizer(None)
    texts = [tokenizer.normalize(plain(line).replace("[UNK]", " ")) for line in lines]
    counts = Counter(character for text in texts for character in text if character != " ")
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    alphabet = sorted(ranked[: min(_ALPHABET, (size - len(SPECIAL)) // 2)])
    # The trainer numbers the characters inside of words, and drops rare ones, in random order, and
    # the numbers decide between pairs of equal frequency. Named beforehand, they are in order.
    tokenizer.train_from_iterator(
        texts,
        vocab_size=size,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[*SPECIAL, *(f"##{character}" for character in alphabet)],
        show_progress=False,
    )
    tokenizer.save_model(str(folder))


def read_pieces(
    vocabulary: str | Path | None, lines: Iterable[str], size: int | None = None
) -> WordPieces:
    """Return the tokenizer of a vocabulary file, or without one a trained one.

    Raises:
        ValueError: If both a file and a size are given.
    """
    if vocabulary is None:
        return WordPieces.trained(tuple(lines), size)
    if size is not None:
        raise ValueError(
            f"the vocabulary {vocabulary} has its own size, but {size} was asked for: leave out "
            "one of the two"
        )
    return WordPieces(vocabulary)
