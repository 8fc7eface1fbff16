"""Finds a data set below the folder that ``--data`` names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where a data set may lie.

    Args:
        folders: Names of its own folder below DIR; it may also lie in DIR itself.
        marks: Files, one of which tells that it lies in a folder.
        remedy: What to do if it is nowhere.
    """

    folders: tuple[str, ...]
    marks: tuple[str, ...]
    remedy: str


PLACES: dict[str, Place] = {
    "wikitext-2": Place(
        ("wikitext-2",),
        tuple(
            f.format(s) for s in ("train", "valid", "test") for f in ("{}.txt", "wiki.{}.tokens")
        ),
        "put WikiText-2's three word-level token files there, or name their folder by --data",
    ),
    "wikitext-103": Place(
        ("wikitext-103",),
        tuple(f"wiki.{split}.tokens" for split in ("train", "valid", "test")),
        "put WikiText-103's three word-level token files there, or name their folder by --data",
    ),
    "cifar-10": Place(
        ("cifar-10", "cifar-10-batches-bin"),
        ("data_batch_1.bin", "test_batch.bin", "cifar10-a.med.xz", "cifar10-b.med.xz"),
        "put the six files of CIFAR-10's binary version there, or leave out --data to download it",
    ),
    "imdb": Place(
        ("imdb",),
        ("train.tsv.xz", "test.tsv.xz", "train.tsv", "test.tsv"),
        "put train.tsv.xz and test.tsv.xz there (class TAB id TAB rating TAB text), or leave out "
        "--data to download it",
    ),
}


def locate(data: str | Path, name: str) -> Path:
    """Return the folder of a data set: DIR itself, or its own folder below DIR.

    It is enough that one of the set's files lies there; its reader names those that lack.

    Args:
        data: DIR.
        name: One of :data:`PLACES`.

    Raises:
        FileNotFoundError: If the set is in neither place; the message names what was looked for.
    """
    root, place = Path(data), PLACES[name]
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {root} does not exist")
    # Its own folder first: a token file of another corpus in DIR must not win.
    folders = [*(root / folder for folder in place.folders), root]
    for folder in folders:
        if any((folder / mark).is_file() for mark in place.marks):
            return folder
    raise FileNotFoundError(
        f"no {name} in {' nor '.join(map(str, folders))}: looked for {', '.join(place.marks)}; "
        f"{root} holds {contents(root)}: {place.remedy}"
    )


def find_vocabulary(data: str | Path) -> Path | None:
    """Return a word-piece vocabulary: DIR's own, or that of bert-base-uncased in or beside DIR."""
    root = Path(data)
    choices = (root, root / "bert-base-uncased", root.resolve().parent / "bert-base-uncased")
    return next((c / "vocab.txt" for c in choices if (c / "vocab.txt").is_file()), None)


def contents(folder: Path) -> str:
    """Return the first names in a folder, for an error message."""
    return ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
