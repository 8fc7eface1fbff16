"""Several processes: every rank decides the same, and what rests does not travel."""

from typing import TYPE_CHECKING, Any

from lightning_mat.parallel.ranks import Ranks
from lightning_mat.parallel.ready import Ready

if TYPE_CHECKING:
    from lightning_mat.parallel.strategy import MATDDPStrategy

__all__ = ["MATDDPStrategy", "Ranks", "Ready"]


def __getattr__(name: str) -> Any:
    # The engine needs this package, and no Lightning.
    if name == "MATDDPStrategy":
        from lightning_mat.parallel.strategy import MATDDPStrategy

        return MATDDPStrategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
