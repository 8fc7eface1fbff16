"""GroupPlan: what one parameter group steps at one rate until the next decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_mat.optim.cohort import Cohort, pools_of
from lightning_mat.optim.pool import Pool


@dataclass
class GroupPlan:
    """What one parameter group steps at one rate: whole parameters, and cohorts of sliced ones.

    Attributes:
        index: Of the group.
        rate: The factor of its learning rate.
    """

    index: int
    rate: float = 1.0
    whole: list[Tensor] = field(default_factory=list)
    sliced: list[tuple[Tensor, list[Cohort]]] = field(default_factory=list)
    pools: list[Pool] | None = None
    pooled_with: list[bool] = field(default_factory=list)

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return the group itself, or a copy with the learning rate of this plan."""
        return group if self.rate == 1 else {**group, "lr": group["lr"] * self.rate}

    def with_gradient(self) -> list[bool]:
        """Return which of the sliced parameters have a gradient."""
        return [param.grad is not None for param, _ in self.sliced]

    def make_pools(
        self, states: Mapping[Tensor, dict[str, Any]], *, share_room: bool, fused: bool
    ) -> None:
        """Pool the small pieces of the parameters that have a gradient now.

        Args:
            states: Of the parameters, read only.
            share_room: See :func:`~lightning_mat.optim.cohort.pools_of`.
            fused: See there.
        """
        self.pooled_with = self.with_gradient()
        cohorts = [c for param, own in self.sliced if param.grad is not None for c in own]
        self.pools = pools_of(cohorts, states, share_room=share_room, fused=fused)
