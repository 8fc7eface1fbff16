"""Outermost: tells a step of an optimizer from one within it.

PyTorch hooks the ``step`` of a class, and of its base once a plain one of that was made: a subclass
whose step calls its base's then runs the hooks twice.
"""

from __future__ import annotations

import sys
from types import FrameType


class Outermost:
    """Knows the step that is in progress by its frame: an error ends it without a word to hooks.

    Example:
        >>> outermost = Outermost()
        >>> def step(inner=None):
        ...     begun = outermost.begins()
        ...     if inner is not None:
        ...         inner()
        ...     return begun, outermost.ends()
        >>> seen = []
        >>> step(lambda: seen.append(step())), seen
        ((True, True), [(False, False)])
    """

    def __init__(self) -> None:
        """No step is in progress."""
        self._frame: FrameType | None = None

    def begins(self, depth: int = 1) -> bool:
        """Return whether the caller, or who called it so deep, begins a step within none."""
        frame = None if self._frame is None else sys._getframe()
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        if frame is not None:
            return False
        self._frame = sys._getframe(depth)
        return True

    def ends(self, depth: int = 1) -> bool:
        """Return whether the caller, or who called it so deep, ends that step."""
        if self._frame is not sys._getframe(depth):
            return False
        self._frame = None
        return True
