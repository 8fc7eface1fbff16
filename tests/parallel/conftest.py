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
    return calling(processes)


@pytest.fixture(scope="module")
def on_four() -> Iterator[Callable[..., list[Any]]]:
    """Return what does so on four ranks."""
    four = Processes(4)
    yield calling(four)
    four.close()


def calling(processes: Processes) -> Callable[..., list[Any]]:
    def call(function: Callable[..., Any], *args: Any) -> list[Any]:
        results = processes.run(function, *args)
        for rank, result in enumerate(results):
            if isinstance(result, BaseException):
                notes = "\n".join(getattr(result, "__notes__", []))
                pytest.fail(f"process {rank}: {result!r}\n{notes}")
        return results

    return call
