"""The embedded corpus: English that every Python carries, so that examples need no download.

It is the language reference in ``pydoc_data.topics`` and the docstrings of the standard library,
read from its sources without importing them: some hundred thousand words. It depends on the
Python version alone, not on time, machine or environment.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from examples.data.cache import cache_folder, publish
from examples.data.corpus import SPLITS, Corpus, read_directory

#: Folders of the standard library that hold tests, programs or other people's packages.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "__pycache__"}
SKIPPED |= {"site-packages", "dist-packages"}
#: Part of the words that goes to the test split, and as much to the validation split.
HELD_OUT = 0.05

_WORD = re.compile(r"\w+|[^\w\s]")

Document = tuple[str, tuple[str, ...]]


def embedded_corpus(cache: str | Path | None = None) -> Corpus:
    """Return the embedded corpus; the first call reads the standard library (some seconds).

    Args:
        cache: Folder to keep it in, see :func:`examples.data.cache.cache_folder`. Where it cannot
            be written, the corpus is built each time.

    Raises:
        FileNotFoundError: If this Python has neither topics nor sources.
    """
    library = sysconfig.get_path("stdlib")
    key = hashlib.sha256(library.encode()).hexdigest()[:8]
    folder = cache_folder(cache) / f"embedded-1-{platform.python_version()}-{key}"
    if not folder.is_dir():
        corpus = split(list(documents(Path(library))))
        try:
            publish(folder, lambda whole: _write(corpus, whole))
        except OSError:
            return corpus
    return read_directory(folder, name="embedded")


def documents(library: Path) -> Iterator[Document]:
    """Yield ``(name, lines)``: one document per topic of the reference and per module.

    Args:
        library: Folder of the standard library's sources.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:  # some distributions ship it apart from the interpreter
        topics = {}
    for topic in sorted(topics):
        yield f"topic {topic}", tuple(_tokenise(topics[topic].split("\n\n")))
    sources = sorted(_sources(library))
    for path in tqdm(sources, desc="reading docstrings", unit="file", leave=False):
        lines = tuple(_tokenise(docstrings(path.read_bytes())))
        if lines:
            yield path.relative_to(library).as_posix(), lines


def docstrings(source: bytes) -> list[str]:
    r"""Return the docstrings in a module's source, the module's own first.

    Example:
        >>> docstrings(b'"A module."\ndef f():\n    "A function."')
        ['A module.', 'A function.']
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []  # a template or a file in an old encoding
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders))
    return [text for text in found if text]


def split(found: Sequence[Document]) -> Corpus:
    """Split by whole documents, in an order that depends on their names alone.

    Test gets the first documents until it holds :data:`HELD_OUT` of all words, validation the
    next, and training the others.

    Raises:
        FileNotFoundError: If there is next to no text.
    """
    sizes = {name: sum(line.count(" ") + 1 for line in lines) for name, lines in found}
    total = sum(sizes.values())
    if total < 10_000:
        raise FileNotFoundError(
            f"this Python carries only {total} words of documentation (no pydoc_data.topics and no "
            "standard library sources): pass --data DIR with WikiText-2's token files"
        )
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    filled = {"test": 0, "valid": 0}
    for name, lines in sorted(found, key=lambda d: hashlib.sha256(d[0].encode()).digest()):
        part = next((p for p, words in filled.items() if words < HELD_OUT * total), "train")
        if part in filled:
            filled[part] += sizes[name]
        parts[part] += lines
    return Corpus("embedded", *(tuple(parts[name]) for name in SPLITS))


def _tokenise(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        words = _WORD.findall(text.lower())
        if words:
            yield " ".join(words)


def _sources(library: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(library):
        folders[:] = [f for f in folders if f not in SKIPPED]
        yield from (Path(folder, file) for file in files if file.endswith(".py"))


def _write(corpus: Corpus, folder: Path) -> None:
    """Write the three token files."""
    for name in SPLITS:
        text = "".join(f"{line}\n" for line in getattr(corpus, name))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
