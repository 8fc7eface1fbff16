"""Word pieces: from a file, trained, as blocks and as padded rows."""

import doctest
import sys

import pytest
import torch

from examples.bert_wikitext2 import _read
from examples.data import locate as places
from examples.data import subset, wordpiece
from examples.data.corpus import read_directory
from examples.data.masking import MaskedText
from examples.data.subset import draw, draw_stratified
from examples.data.wordpiece import SPECIAL, WordPieces, plain, read_pieces
from examples.options import parse

pytest.importorskip("tokenizers")
PIECES = (*SPECIAL, "play", "##ing", "##ed", "role", "-", "1", ",", "000", ".")


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in PIECES), encoding="utf-8")
    return path


@pytest.mark.parametrize("module", [wordpiece, subset, places])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def numbers(*pieces):
    return [PIECES.index(piece) for piece in pieces]


def test_words_fall_into_the_longest_pieces_and_wikitexts_marks_are_understood(vocabulary):
    pieces = WordPieces(vocabulary)
    assert len(pieces) == len(PIECES)
    found = pieces.encode([" Role @-@ playing <unk> ", " ", "1 @,@ 000 Xyz ."])
    first = numbers("role", "-", "play", "##ing", "[UNK]", "[SEP]")
    assert found.tolist() == first + numbers("1", ",", "000", "[UNK]", ".", "[SEP]")
    assert found.dtype == torch.int64


def test_rows_are_closed_cut_and_padded(vocabulary):
    pieces = WordPieces(vocabulary)
    rows, mask = pieces.padded(["played", "role role role role", ""], 4)
    assert rows.tolist() == [
        numbers("[CLS]", "play", "##ed", "[SEP]"),
        numbers("[CLS]", "role", "role", "[SEP]"),
        numbers("[CLS]", "[SEP]", "[PAD]", "[PAD]"),
    ]
    assert mask.tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    # Cutting rows does not go on to cut lines.
    assert len(pieces.encode(["role " * 9])) == 10


def test_rows_equal_those_of_transformers(vocabulary):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer(str(vocabulary))
    texts = ["Role-playing, 1.000 played!", "rôle PLAYING playingplayed", "play " * 20]
    found = theirs(texts, truncation=True, max_length=9, padding="max_length", return_tensors="pt")
    rows, mask = WordPieces(vocabulary).padded(texts, 9)
    assert torch.equal(rows, found["input_ids"])
    assert torch.equal(mask, found["attention_mask"])


LINES = tuple(f"the cat number {i} sat on mat {i % 13} in wintertime <unk> ." for i in range(300))


def test_trained_pieces_are_the_same_each_time_and_kept(tmp_path, monkeypatch):
    first = WordPieces.trained(LINES, 90, tmp_path / "a")
    again = WordPieces.trained(LINES, 90, tmp_path / "b")
    texts = [path.read_text() for path in tmp_path.glob("*/*/vocab.txt")]
    assert len(texts) == 2
    assert texts[0] == texts[1]
    assert tuple(texts[0].split()[:5]) == SPECIAL
    assert 60 < len(first) <= 90
    assert torch.equal(first.encode(LINES), again.encode(LINES))
    assert "wintertime" in texts[0].split()  # frequent: one piece
    unknown = (first.encode(LINES) == first.unknown).sum()
    assert unknown == len(LINES)  # the corpus's own <unk> alone
    monkeypatch.setattr(wordpiece, "_train", None)  # so that nothing can be trained
    assert len(WordPieces.trained(LINES, 90, tmp_path / "a")) == len(first)
    with pytest.raises(ValueError, match=r"above 5.*got 5"):
        WordPieces.trained(LINES, 5, tmp_path)


def test_unusable_vocabularies_are_named(vocabulary, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"nothing.txt does not exist.*vocab.txt"):
        WordPieces(vocabulary.with_name("nothing.txt"))
    with pytest.raises(ValueError, match=r"own size, but 90 was asked"):
        read_pieces(vocabulary, LINES, 90)
    vocabulary.write_text("[PAD]\n[UNK]\nplay\n")
    with pytest.raises(ValueError, match=r"lacks \[CLS\], \[SEP\], \[MASK\]"):
        WordPieces(vocabulary)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-mat\[data\]"):
        WordPieces.trained(("a b c",), 20, vocabulary.parent)


def test_plain_keeps_marks_that_join_nothing():
    assert plain("a @ b @-@ c") == "a @ b-c"


def test_masked_text_of_pieces(data_dir, vocabulary):
    corpus, pieces = read_directory(data_dir), WordPieces(vocabulary)
    text = MaskedText(corpus, length=8, batch_size=4, vocabulary=pieces)
    described = text.describe()
    assert described["tokens"] == "word pieces"
    assert described["vocabulary"] == len(PIECES)
    sample = text.train[0]
    assert (sample["input_ids"] == PIECES.index("[MASK]")).sum() == 1
    with pytest.raises(ValueError, match=r"has 14 entries, but vocab_size=9"):
        MaskedText(corpus, length=8, batch_size=4, vocabulary=pieces, vocab_size=9)


def test_sizes_take_the_same_blocks_for_every_seed(data_dir):
    corpus = read_directory(data_dir)

    def make(**options):
        return MaskedText(corpus, length=8, batch_size=4, **options)

    one, two = (make(train_size=20, test_size=3, seed=s) for s in (1, 2))
    assert (len(one.train), len(one.test)) == (20, 3)
    assert torch.equal(one.train.blocks, two.train.blocks)
    whole = [tuple(block) for block in make().train.blocks.tolist()]
    assert all(tuple(block) in whole for block in one.train.blocks.tolist())
    with pytest.raises(ValueError, match=r"train_size must be from 1 to \d+.*got 100000"):
        make(train_size=100_000)


def test_subsets_are_fixed_spread_and_stratified():
    assert torch.equal(draw(1000, 100, "size"), draw(1000, 100, "size"))
    found = draw(1000, 100, "size")
    assert len(found.unique()) == 100
    assert 300 < found.double().mean() < 700
    assert (found.diff() > 0).all()
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    chosen = labels[draw_stratified(labels, 50, "size")]
    assert chosen.bincount().tolist() == [30, 15, 5]
    with pytest.raises(ValueError, match=r"size must be from 1 to 10.*got 0"):
        draw(10, 0, "size")


def test_the_main_job_finds_the_vocabulary_beside_the_text(data_dir, vocabulary):
    def read(*options):
        _, args = parse(["--data", str(data_dir), "--seq-len", "8", "--batch-size", "4", *options])
        return _read(args).describe()

    assert read()["tokens"] == "words"
    beside = data_dir.parent / "bert-base-uncased"
    beside.mkdir()
    vocabulary.rename(beside / "vocab.txt")
    assert read("--tokens", "pieces")["vocabulary"] == len(PIECES)
    assert read("--vocab", str(beside / "vocab.txt"))["tokens"] == "word pieces"
    # The whole tree may be named, too.
    data_dir.rename(data_dir.with_name("wikitext-2"))
    _, args = parse(["--data", str(beside.parent), "--seq-len", "8", "--batch-size", "4"])
    assert _read(args).describe()["name"] == "wikitext-2"


def test_the_main_job_trains_pieces_where_none_lie(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ["--data", str(data_dir), "--seq-len", "8", "--batch-size", "4"]
    _, args = parse([*command, "--tokens", "pieces", "--vocab-size", "60"])
    described = _read(args).describe()
    assert described["tokens"] == "word pieces"
    assert described["vocabulary"] <= 60
    assert list((tmp_path / "cache").glob("lightning-mat/pieces-*/vocab.txt"))
