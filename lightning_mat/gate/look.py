"""FirstLook: whether gradients reach what was taken for heads at rest."""

from __future__ import annotations

import warnings

from torch import Tensor


class FirstLook:
    """Warns if gradients reach what was taken for heads at rest, where there should be none.

    It looks once, because looking waits for the device.

    Args:
        path: The attention module's name, for the message.
    """

    def __init__(self, path: str) -> None:
        self.path, self.done = path, False

    def at(self, grad: Tensor) -> None:
        """Look at the gradient of the heads at rest."""
        self.done = True
        if bool(grad.any()):
            warnings.warn(
                f"gradients reached what was taken for heads at rest in {self.path!r}, and were "
                "dropped: the attention's result is used beside its output projection, or the "
                'module multiplies something else of as many heads. Use skip="weights" if they '
                "matter",
                stacklevel=2,
            )
