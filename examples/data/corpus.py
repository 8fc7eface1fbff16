"""Where text comes from: a directory of token files, the hub, or what every Python carries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples.data.locate import contents

#: Datasets that `--hub` can name: the path and the configuration at `datasets.load_dataset`.
HUB: dict[str, tuple[str, str]] = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-v1"),
}

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Corpus:
    """Word-level text in three disjoint splits; a line holds words separated by blanks.

    Args:
        name: Where it comes from.
        train: Lines of the training split.
        valid: Lines of the validation split.
        test: Lines of the test split.
    """

    name: str
    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]


def read_directory(directory: str | Path, name: str | None = None) -> Corpus:
    """Read WikiText's three token files: ``train.txt`` or ``wiki.train.tokens``, and so on.

    Args:
        directory: Folder that holds them.
        name: Name of the corpus; the folder's by default.

    Raises:
        FileNotFoundError: If the folder or a file is missing; the message names every one.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist")
    files: dict[str, Path] = {}
    missing = []
    for split in SPLITS:
        choices = (f"{split}.txt", f"wiki.{split}.tokens")
        found = next((folder / c for c in choices if (folder / c).is_file()), None)
        if found is None:
            missing.append(f"{choices[0]} (or {choices[1]})")
        else:
            files[split] = found
    if missing:
        raise FileNotFoundError(
            f"data folder {folder} lacks {', '.join(missing)}; found {contents(folder)}: put "
            "three word-level token files there, or name their folder by --data"
        )
    train, valid, test = (_lines(files[split]) for split in SPLITS)
    return Corpus(name or folder.resolve().name, train, valid, test)


def read_hub(name: str = "wikitext-2") -> Corpus:
    """Download WikiText through the ``datasets`` package (kept in its own cache).

    Raises:
        ValueError: If the name is unknown.
        ModuleNotFoundError: If ``datasets`` is not installed.
    """
    if name not in HUB:
        raise ValueError(f"unknown hub corpus {name!r}: choose one of {', '.join(HUB)}")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading a corpus from the hub needs the package `datasets`, which is not installed: "
            "pip install 'lightning-mat[data]', or pass --data DIR, or neither for the embedded "
            "corpus"
        ) from error
    loaded = datasets.load_dataset(*HUB[name])
    train, valid, test = (
        tuple(line.rstrip("\n") for line in loaded[split]["text"])
        for split in ("train", "validation", "test")
    )
    return Corpus(name, train, valid, test)


def _lines(path: Path) -> tuple[str, ...]:
    # Not str.splitlines, which also splits at characters that occur inside WikiText's words.
    with path.open(encoding="utf-8", newline="\n") as file:
        return tuple(line.rstrip("\n") for line in file)
