"""FLOPs: what ran, counted from the operations themselves, and the paper's rule beside it.

A multiply-add counts as two. PyTorch's formulas count products, convolutions and attention; what
is elementwise, normalisation, softmax, an optimizer's update and recurrent kernels count as
nothing. Attention counts as dense, also under a causal mask, and padding as if it were input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils.flop_counter import (
    FlopCounterMode,
    _FlopCounterMode,
    conv_backward_flop,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)


class FlopCount:
    """What was counted; grows while :func:`count` is open."""

    def __init__(self, mode: FlopCounterMode) -> None:
        """Read from a counter."""
        self._mode = mode

    @property
    def total(self) -> int:
        """FLOPs of everything that ran."""
        return int(self._mode.get_total_flops())

    @property
    def by_operation(self) -> dict[str, int]:
        """FLOPs of each operation that ran and has a formula."""
        counts = self._mode.get_flop_counts().get("Global", {})
        return {str(operation): int(flops) for operation, flops in counts.items()}


class _Quick(_FlopCounterMode):
    """PyTorch's counter of operations, which spends nothing on those that cannot count.

    PyTorch's own asks every operation for a decomposition, inside of the mode: of a small model's
    first look, which has many short operations, that is a large part.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__(counter)
        self._passed: dict[object, bool] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and count it if there is a formula for it or for what it is made of."""
        passes = self._passed.get(func)
        if passes is None:
            passes = self._passed[func] = self._counts_nothing(func)
        # Other tensors than PyTorch's own may have operations of theirs inside.
        if passes and not types:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _counts_nothing(self, func: object) -> bool:
        """Return whether an operation has no formula and is not made of others."""
        return (
            isinstance(func, OpOverload)
            and func.namespace == "aten"
            and func._overloadpacket not in self.counter.flop_registry
            and not func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
        )


class _Counter(FlopCounterMode):
    """PyTorch's counter with the quick mode, and without a tracker of modules."""

    def __init__(self, custom_mapping: dict[Any, Any]) -> None:
        super().__init__(display=False, custom_mapping=custom_mapping)
        # Its global hooks are what compiled models warn about.
        self.mod_tracker = _NoModules()  # type: ignore[assignment]

    def __enter__(self) -> _Counter:
        """Start at zero."""
        self.flop_counts.clear()
        self.mode = _Quick(self)
        self.mode.__enter__()
        return self


class _NoModules:
    """In place of the tracker of modules."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, *error: object) -> None:
        """Do nothing."""


class _Eager:
    """Compiled models run eagerly while any count is open: compiled kernels have no formulas.

    Counts may close in another order than they were opened in (callbacks of a Trainer do), so the
    first opens the stance and the last closes it.
    """

    def __init__(self) -> None:
        """Start with no count open."""
        self.open = 0
        self.stance: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        """Force eager if this is the first count, or the first since something was compiled."""
        self.open += 1
        # Without Dynamo nothing is compiled, and importing it takes a second.
        if self.stance is None and "torch._dynamo" in sys.modules:
            self.stance = torch.compiler.set_stance("force_eager")
            self.stance.__enter__()

    def __exit__(self, *error: object) -> None:
        """Let compiled models run compiled again after the last count."""
        self.open -= 1
        if self.open == 0 and self.stance is not None:
            stance, self.stance = self.stance, None
            stance.__exit__(None, None, None)


_eager = _Eager()


@contextmanager
def count() -> Iterator[FlopCount]:
    """Count the FLOPs of every operation that runs inside, forward and backward.

    Models under ``torch.compile`` run eagerly inside, which counts the same arithmetic.

    Yields:
        The count; read ``total`` inside or afterwards.

    Example:
        >>> layer = torch.nn.Linear(3, 4)
        >>> with count() as counter:
        ...     _ = layer(torch.ones(5, 3))
        >>> counter.total  # 2 × 5 tokens × 3 inputs × 4 outputs
        120
    """
    mode = _Counter(_OWN)
    with _eager, mode:
        yield FlopCount(mode)


def _convolution_backward(*shapes: Any, out_shape: Any, **kwargs: Any) -> int:
    """Return PyTorch's count, whose weight gradient takes every group for the whole input."""
    *operands, groups, mask = shapes
    formula = cast("Callable[..., int]", conv_backward_flop)
    on_input = formula(*operands, groups, [mask[0], False], out_val=out_shape)
    on_weight = formula(*operands, groups, [False, mask[1]], out_val=out_shape)
    return int(on_input + on_weight // groups)


def register(operation: object, formula: Callable[..., int]) -> None:
    """Register the FLOPs of an operation; a formula that PyTorch or somebody else has, stays.

    Args:
        operation: E.g. ``torch.ops.lightning_mat.gram_accumulate``.
        formula: Takes the operation's arguments with shapes in place of tensors, and ``out_shape``;
            returns FLOPs.
    """
    if operation not in flop_registry:
        register_flop_formula(operation)(formula)


def paper_flops(forward: float, trained_share: float) -> float:
    r"""Return the FLOPs of a step under the MAT paper's rule, not as counted.

    .. math:: F = F_\text{forward} \, (1 + 2 s),

    a backward pass costs two forward passes, and what rests costs nothing in it. The rule also
    drops the gradients that travel *through* resting units, which an exact backward pass computes;
    use it to compare with the paper, and :func:`count` for what a step cost.

    Args:
        forward: FLOPs of the forward pass.
        trained_share: Share of the modules that train, in [0, 1].

    Raises:
        ValueError: If the share is outside [0, 1].

    Source:
        The MAT paper (Shi et al., NeurIPS 2023), implementation details: the backward pass is
        estimated as twice the forward pass.

    Example:
        >>> paper_flops(100.0, 0.25)
        150.0
    """
    if not 0.0 <= trained_share <= 1.0:
        raise ValueError(
            f"trained_share must be in [0, 1], got {trained_share}: it is the number of units that "
            "train over the number of units"
        )
    return forward * (1.0 + 2.0 * trained_share)


def _grouped_mm(a: Sequence[int], b: Sequence[int], *args: object, **kwargs: object) -> int:
    """Return the FLOPs of products of groups of rows, as experts in one batched tensor run them.

    Shapes ``[T, K] × [G, K, N]``, ``[M, T] × [T, N]``, ``[G, M, K] × [K, T]`` or
    ``[G, M, K] × [G, K, N]``, the groups cutting T: every product has one axis that is cut, and
    each row of it meets one group only.
    """
    batch = a[0] if len(a) == 3 and len(b) == 3 else 1
    return 2 * batch * a[-2] * a[-1] * b[-1]


def _sdpa(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: object, **kwargs: object
) -> int:
    """Return PyTorch's count, which in some versions knows no heads that share keys and values."""
    return int(sdpa_flop_count(query, _repeated(key, query), _repeated(value, query)))


def _sdpa_backward(
    grad: Sequence[int],
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    *args: object,
    **kwargs: object,
) -> int:
    key, value = _repeated(key, query), _repeated(value, query)
    return int(sdpa_backward_flop_count(grad, query, key, value))


def _repeated(shape: Sequence[int], query: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of keys or values with a head for each of the query's."""
    return (shape[0], query[1], *shape[2:])


# Operations that some PyTorch versions run without having a formula for them.
register(torch.ops.aten._grouped_mm, _grouped_mm)
register(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _sdpa)
register(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, _sdpa_backward)
# And those whose formula is another in some: in place of PyTorch's own while a count is open.
_OWN: dict[object, Callable[..., int]] = {
    torch.ops.aten.convolution_backward: _convolution_backward
}
for _kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention"):
    _OWN[getattr(torch.ops.aten, f"_scaled_dot_product_{_kind}")] = _sdpa
    _OWN[getattr(torch.ops.aten, f"_scaled_dot_product_{_kind}_backward")] = _sdpa_backward
_OWN[torch.ops.aten._scaled_dot_product_cudnn_attention] = _sdpa
_OWN[torch.ops.aten._scaled_dot_product_cudnn_attention_backward] = _sdpa_backward
