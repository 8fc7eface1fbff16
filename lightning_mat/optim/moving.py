"""Loading the state of an optimizer whose units were others: what carries over, what begins anew.

Moments are elementwise and stay where they are. Step counts belong to slabs: a slab that was one
before keeps its own, and so does one whose parts all had the same. A slab of parts with different
step counts has no count that is right for its moments, and begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_mat.optim.slabs import History, Slab, latest, saved_histories
from lightning_mat.optim.waking import change_of, wake
from lightning_mat.units.unit import Rect

Anew = dict[int | None, int]


def map_histories(
    slabs: Sequence[Slab], packed: Mapping[str, Any]
) -> tuple[list[History], set[int | None]]:
    """Return histories for the slabs of one parameter from those of other slabs of it.

    Args:
        slabs: The slabs.
        packed: What :func:`~lightning_mat.optim.slabs.pack_histories` packed of the others.

    Returns:
        The histories, and the units of slabs that begin anew, for :func:`begin_anew`.
    """
    saved = saved_histories(packed)
    histories, anew = [], set()
    for slab in slabs:
        parts = {
            history
            for rects, history in saved.items()
            if any(_overlap(a, b) for a in rects for b in slab.rects)
        }
        if len(parts) != 1:
            anew.add(slab.unit)
        histories.append(parts.pop() if len(parts) == 1 else latest(list(parts)))
    return histories, anew


def begin_anew(
    inner: Optimizer,
    slabs: Mapping[Tensor, Sequence[Slab]],
    histories: dict[Tensor, list[History]],
    anew: Mapping[Tensor, set[int | None]],
) -> None:
    """Let slabs of some parameters have no state, as if they had never been stepped.

    Args:
        inner: The optimizer, its state loaded; changed in place.
        slabs: All slabs of the parameters.
        histories: Of the slabs; changed in place.
        anew: Parameter → units of the slabs to forget.
    """
    reset = change_of("reset", inner)
    assert reset is not None
    for group in inner.param_groups:
        for param in group["params"]:
            if not anew.get(param):
                continue
            units: Anew = dict.fromkeys(anew[param], 1)
            state = inner.state[param]
            if not wake(param, state, slabs[param], histories[param], units, partial(reset, group)):
                del histories[param]


def _overlap(a: Rect, b: Rect) -> bool:
    """Return whether two rectangles share an element."""
    return a.r0 < b.r1 and b.r0 < a.r1 and a.c0 < b.c1 and b.c0 < a.c1
