"""The examples are not installed: make them importable from the project's root."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture
def data_dir(tmp_path):
    """A folder with three small token files whose lines say which split they are from."""
    folder = tmp_path / "small"
    folder.mkdir()
    for split, lines in (("train", 120), ("valid", 12), ("test", 12)):
        text = "".join(f"{split} has word{i % 7} and word{i % 5} <unk> .\n" for i in range(lines))
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    return folder
