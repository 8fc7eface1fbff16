"""The processes of the tests of training in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.parallel.processes import Processes


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Two processes."""
    two = Processes(2)
    yield two
    two.close()


@pytest.fixture
def on_both(processes: Processes) -> Callable[..., list[Any]]:
    """Return what calls a function on both ranks; an exception on one is an error of the test."""

    def call(function: Callable[..., Any], *args: Any) -> list[Any]:
        results = processes.run(function, *args)
        for rank, result in enumerate(results):
            if isinstance(result, BaseException):
                notes = "\n".join(getattr(result, "__notes__", []))
                pytest.fail(f"process {rank}: {result!r}\n{notes}")
        return results

    return call
