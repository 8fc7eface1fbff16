"""Where text comes from, and its vocabulary."""

import doctest
import sys

import pytest
import torch

from examples.data import corpus, embedded, vocabulary
from examples.data.corpus import SPLITS, read_directory, read_hub
from examples.data.embedded import docstrings, documents, embedded_corpus, split
from examples.data.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(cache):
    return embedded_corpus(cache)


@pytest.mark.parametrize("module", [corpus, embedded, vocabulary])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def test_directory_is_read_by_either_naming(data_dir):
    plain = read_directory(data_dir)
    for name in SPLITS:
        (data_dir / f"{name}.txt").rename(data_dir / f"wiki.{name}.tokens")
    assert read_directory(data_dir) == plain
    assert plain.name == "small"
    assert plain.test[1] == "test has word1 and word1 <unk> ."


def test_only_line_feeds_end_a_line(data_dir):
    (data_dir / "test.txt").write_text("a \u2028 b\x85c\n\nd\n", encoding="utf-8")
    assert read_directory(data_dir).test == ("a \u2028 b\x85c", "", "d")


def test_missing_files_are_all_named(data_dir):
    (data_dir / "valid.txt").unlink()
    (data_dir / "test.txt").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        read_directory(data_dir)
    message = str(caught.value)
    assert "valid.txt (or wiki.valid.tokens), test.txt (or wiki.test.tokens)" in message
    assert "found train.txt" in message
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_directory(data_dir / "nowhere")


def test_hub_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-mat\[data\]"):
        read_hub()
    with pytest.raises(ValueError, match=r"unknown hub corpus 'pile'.*wikitext-103"):
        read_hub("pile")


def test_hub_splits_become_a_corpus(monkeypatch):
    class Hub:
        @staticmethod
        def load_dataset(path, name):
            assert (path, name) == ("Salesforce/wikitext", "wikitext-2-v1")
            return {s: {"text": [f" {s} \n", ""]} for s in ("train", "validation", "test")}

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    loaded = read_hub()
    assert (loaded.train, loaded.valid, loaded.test) == (
        (" train ", ""),
        (" validation ", ""),
        (" test ", ""),
    )


def test_embedded_corpus_is_read_back_from_its_cache(built, cache, monkeypatch):
    monkeypatch.setattr(embedded, "documents", None)  # so that it cannot be built
    assert embedded_corpus(cache) == built


def test_embedded_corpus_is_the_same_built_anew_where_nothing_can_be_written(built, tmp_path):
    (tmp_path / "file").write_text("")
    assert embedded_corpus(tmp_path / "file") == built


def test_embedded_corpus_is_large_and_held_out_parts_are_near_five_percent(built):
    words = {s: sum(len(line.split()) for line in getattr(built, s)) for s in SPLITS}
    total = sum(words.values())
    assert total > 100_000
    assert 0.05 <= words["test"] / total < 0.08
    assert 0.05 <= words["valid"] / total < 0.08


def test_split_keeps_documents_whole_and_apart():
    found = [(f"document {i}", (f"{i} " * 99 + str(i),) * 3) for i in range(200)]
    parts = split(found)
    sets = [{line.split()[0] for line in getattr(parts, name)} for name in SPLITS]
    assert sum(len(s) for s in sets) == len(set.union(*sets)) == 200
    assert sum(len(getattr(parts, name)) for name in SPLITS) == 600
    assert split(found[::-1]) == parts  # the order in which documents are found does not matter


def test_a_python_without_documentation_is_told_to_pass_data(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    (tmp_path / "a.py").write_text('"Only this."')
    found = list(documents(tmp_path))
    assert found == [("a.py", ("only this .",))]
    with pytest.raises(FileNotFoundError, match=r"only 3 words.*--data DIR"):
        split(found)


def test_tests_and_unreadable_sources_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    for folder in ("test", "package/tests", "package"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "module.py").write_text(f'"Text of {folder}."')
    (tmp_path / "broken.py").write_text("def:")
    assert [name for name, _ in documents(tmp_path)] == ["package/module.py"]
    assert docstrings(b"\xff\xfe\x00") == []


def test_vocabulary_keeps_the_most_frequent_words_of_training():
    words = Vocabulary.build(["b b c a <unk> <unk> <unk>"], size=5)
    assert words.words == ("<unk>", "<eos>", "<mask>", "b", "a")
    assert words.encode(["c b", ""]).tolist() == [0, 3, 1, 1]
    assert words.encode([]).dtype == torch.int64
    with pytest.raises(ValueError, match=r"above 3.*got 3"):
        Vocabulary.build(["a"], size=3)
