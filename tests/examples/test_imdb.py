"""IMDB: its files, its splits and its rows."""

import doctest
import lzma
import sys

import pytest
import torch

from examples.data import imdb
from examples.data.imdb import Imdb, read


class Letters:
    """Stands for a tokenizer: a row of letters' numbers."""

    def padded(self, texts, length):
        rows = torch.zeros(len(texts), length, dtype=torch.int64)
        mask = torch.zeros_like(rows)
        for row, text in enumerate(texts):
            letters = [ord(c) for c in text[:length]]
            rows[row, : len(letters)] = torch.tensor(letters, dtype=torch.int64)
            mask[row, : len(letters)] = 1
        return rows, mask


def lines(split, each):
    return "".join(
        f"{label}\t{i}\t{rating}\t{split[0]}{label[0]}{i:02d}<br />ok\ttail\n"
        for label, rating in (("pos", 9), ("neg", 2))
        for i in range(each)
    )


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "imdb"
    path.mkdir()
    for split in ("train", "test"):
        (path / f"{split}.tsv.xz").write_bytes(lzma.compress(lines(split, 20).encode()))
    return path


def test_doctests():
    assert doctest.testmod(imdb).failed == 0


def test_packed_and_plain_files_hold_the_same(folder):
    train, test = read(folder)
    assert train.texts[0] == "tp00 ok\ttail"  # a TAB in the text stays, a line break goes
    assert train.labels.tolist() == [1] * 20 + [0] * 20
    assert test.texts[-1].startswith("tn19")
    for split in ("train", "test"):
        path = folder / f"{split}.tsv.xz"
        (folder / f"{split}.tsv").write_bytes(lzma.decompress(path.read_bytes()))
        path.unlink()
    again, _ = read(folder.parent)
    assert again.texts == train.texts
    assert torch.equal(again.labels, train.labels)


def test_splits_hold_both_classes_and_share_nothing(folder):
    data = Imdb(folder, Letters(), 4, 8, valid_size=10, train_size=12, test_size=6, seed=1)
    assert data.describe() == {
        "name": "imdb",
        "seq_len": 8,
        "train_reviews": 12,
        "valid_reviews": 10,
        "test_reviews": 6,
    }
    for split, n in ((data.train, 6), (data.valid, 5), (data.test, 3)):
        assert split.labels.bincount().tolist() == [n, n]

    def names(split):
        return {"".join(map(chr, row[:4].tolist())) for row in split.input_ids}

    last = {f"t{label}{i}" for label in "pn" for i in range(15, 20)}
    assert names(data.valid) == last
    assert names(data.train).isdisjoint(last)
    other = Imdb(folder, Letters(), 4, 8, valid_size=10, train_size=12, seed=2)
    assert names(other.train) == names(data.train)
    assert len(other.test) == 40


def test_batches_keep_text_and_class_together(folder):
    data = Imdb(folder, Letters(), 4, 8, valid_size=10, seed=1)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    seen = []
    for batch in loader:
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 8)
        positive = (batch["input_ids"][:, 1] == ord("p")).long()
        assert torch.equal(batch["labels"], positive)
        assert batch["attention_mask"].all()
        seen += batch["input_ids"].tolist()
    assert len(seen) == 28  # 30 reviews, the incomplete batch left out
    assert len({tuple(row) for row in seen}) == 28
    one = data.train[len(data.train) + 3]  # as of another epoch
    assert torch.equal(one["input_ids"], data.train.input_ids[3])
    assert one["labels"].shape == ()


def test_another_seed_is_another_order(folder):
    first, wanted = (Imdb(folder, Letters(), 4, 8, valid_size=10, seed=s) for s in (1, 2))

    def orders(data):
        return [batch["input_ids"].tolist() for batch in data.train_dataloader()]

    assert orders(first.with_seed(2)) == orders(wanted) != orders(first)


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
    class Hub:
        @staticmethod
        def load_dataset(path):
            raise ConnectionError("couldn't reach it")

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    with pytest.raises(FileNotFoundError, match=r"IMDB could not.*couldn't reach it.*--data DIR"):
        read(None)


def test_unusable_files_and_sizes_are_named(folder, monkeypatch):
    for options, message in (
        ({"valid_size": 40}, r"valid_size must be from 1 to 39.*got 40"),
        ({"valid_size": 10, "train_size": 31}, r"train_size must be from 1 to 30.*got 31"),
        ({"valid_size": 10, "train_size": 3}, r"batch needs 4 reviews, but only 3"),
        ({"valid_size": 10, "seq_len": 2}, r"seq_len must be ≥ 3.*got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Imdb(folder, Letters(), 4, **{"seq_len": 8, **options})
    (folder / "test.tsv").write_text("good\t1\t9\tfine\n")
    with pytest.raises(ValueError, match=r"line 1 of .*test.tsv begins with 'good"):
        read(folder)
    (folder / "test.tsv").unlink()
    (folder / "test.tsv.xz").write_bytes(b"no xz stream")
    with pytest.raises(ValueError, match=r"test.tsv.xz is damaged"):
        read(folder)
    (folder / "test.tsv.xz").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks test.tsv.xz \(or test.tsv\); found train"):
        read(folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-mat\[data\]"):
        read(None)


def test_a_download_has_the_layout_of_the_files(monkeypatch):
    class Hub:
        @staticmethod
        def load_dataset(path):
            assert path == "stanfordnlp/imdb"
            part = {"text": ["bad<br />film", "good"], "label": [0, 1]}
            return {"train": part, "test": part}

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    train, _ = read(None)
    assert train.texts == ["bad film", "good"]
    assert train.labels.tolist() == [0, 1]
