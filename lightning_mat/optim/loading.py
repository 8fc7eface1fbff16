"""LoadingGroups: parameter groups that load pools one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_mat.optim.pool import Pool


class LoadingGroups(list[dict[str, Any]]):
    """Parameter groups, some of which hold a pool that is loaded only while it is stepped.

    Optimizers of ``torch.optim`` pass over their groups once. So all pools may share the memory of
    one, which stays in the caches: values and gradients travel once, as they would in place.

    Args:
        groups: The groups.
        pools: Index of a group → the pool that it holds.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], pools: Mapping[int, Pool]) -> None:
        """Remember the pools."""
        super().__init__(groups)
        self._pools = pools

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Load, yield, unload."""
        for index in range(len(self)):
            pool = self._pools.get(index)
            if pool is not None:
                pool.load()
            yield self[index]
            if pool is not None:
                pool.unload()
