"""Results: one file per suite and device, one JSON line per finished run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"

Line = dict[str, Any]


class Results:
    """Appends lines to ``<folder>/<suite>-<device>.jsonl`` and reads them back.

    A line is written whole and flushed to the disk. A last line that a crash left half-written is
    ignored when reading and cut off before the next one is appended. A key is never there twice.

    Args:
        suite: Name of the suite.
        device: Name of the device, ``"cpu"`` or a GPU's; turned into a file name.
        folder: ``benchmarks/results`` by default.
    """

    def __init__(self, suite: str, device: str, folder: Path | None = None) -> None:
        """Name the file; nothing is read or written yet."""
        self.path = (folder or RESULTS) / f"{suite}-{slug(device)}.jsonl"

    def read(self) -> dict[str, Line]:
        """Return all whole lines by their keys, in the order of the file.

        Raises:
            ValueError: If a line before the last one is damaged, or a key is there twice.
        """
        return read(self.path)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a finished run.

        Raises:
            ValueError: If its key is there already, or a value is NaN or infinite.
        """
        text = json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        if line["key"] in self.read():
            raise ValueError(f"{self.path} has a run {line['key']!r} already")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> dict[str, Line]:
    """Return the whole lines of a file by their keys; nothing where there is no file.

    Raises:
        ValueError: If a line before the last one is damaged, or a key is there twice.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    lines: dict[str, Line] = {}
    for number, raw in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            line = json.loads(raw)
            key = line["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {path} is no result ({error}): restore the file, or remove the "
                "line to run it again"
            ) from error
        if key in lines:
            raise ValueError(f"line {number} of {path} repeats the key {key!r}: remove one")
        lines[key] = line
    return lines


def slug(device: str) -> str:
    """Return a device's name as part of a file's name.

    Example:
        >>> slug("NVIDIA H200"), slug("cpu")
        ('nvidia-h200', 'cpu')
    """
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
