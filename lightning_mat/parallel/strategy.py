"""MATDDPStrategy: Lightning's DDP, in which what rests does not travel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.nn.parallel import DistributedDataParallel

from lightning_mat.parallel.hooks import Reduction, reduce_bucket
from lightning_mat.parallel.refusals import check_static_graph

if TYPE_CHECKING:
    from lightning_mat.engine import MAT

NAME = "ddp_mat"


class MATDDPStrategy(DDPStrategy):
    """DDP whose all-reduces carry what trains; ``Trainer(strategy="ddp_mat")``.

    Gradients are those of ``strategy="ddp"``. DDP, its buckets and its overlap with the backward
    pass are as they were: a communication hook packs what trains of each bucket into one tensor.
    At a change of decision it makes new tables, and nothing else. Without a
    :class:`~lightning_mat.MATCallback` everything is sent.

    Args:
        options: Those of ``DDPStrategy``. ``ddp_comm_hook`` may be ``allreduce_hook``,
            ``fp16_compress_hook`` or ``bf16_compress_hook``, ``ddp_comm_wrapper`` one of the two
            compressing wrappers of torch: what trains is compressed, then sent.

    Attributes:
        reduction: Sends the buckets; counts what it sends.

    Raises:
        ValueError: For another communication hook, and for ``static_graph=True``.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        check_static_graph(self)
        state = self._ddp_comm_state
        if state is not None:
            raise ValueError(
                f"ddp_comm_state is a {type(state).__name__}, but the hooks that ddp_mat knows "
                'have no state: leave it out, or use strategy="ddp"'
            )
        self.reduction = Reduction(self._ddp_comm_hook, self._ddp_comm_wrapper)

    @property
    def bytes_reduced(self) -> int:
        """Bytes that this rank gave to all-reduces in the newest step that synchronised."""
        return self.reduction.bytes_reduced

    def follow(self, mat: MAT | None) -> None:
        """Leave out what rests by an engine's decisions; None to send everything again."""
        self.reduction.follow(mat)

    def _register_ddp_hooks(self) -> None:
        # On the CPU, too, where Lightning registers none.
        assert isinstance(self.model, DistributedDataParallel)
        self.reduction.group = self.model.process_group  # of the options, or all processes
        self.model.register_comm_hook(self.reduction, reduce_bucket)

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Register the strategy under its name."""
        strategy_registry.register(
            NAME, cls, description="DDP in which the gradients of resting units do not travel"
        )


if NAME not in StrategyRegistry.available_strategies():
    MATDDPStrategy.register_strategies(StrategyRegistry)
