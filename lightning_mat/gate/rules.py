"""The registry of gate rules: for a layer type, a forward whose backward skips what rests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_mat.gate.fallback import ClearResting
from lightning_mat.units.regions import Block

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Rest:
    """One parameter of a module, some or all of which rests.

    Attributes:
        param: The parameter.
        blocks: What of it trains, over its matrix view; empty where all of it rests.
        clear: The parameter's hook; a rule hands it every gradient that it made, through
            :meth:`deliver`, so that the hook knows that its resting slices are zero already.
    """

    param: nn.Parameter
    blocks: tuple[Block, ...]
    clear: ClearResting | None = None

    @property
    def whole(self) -> bool:
        """Return whether all of it rests."""
        return len(self.blocks) == 0

    def deliver(self, grad: Tensor) -> Tensor:
        """Return ``grad``, noted as one in which what rests is zero."""
        return grad if self.clear is None else self.clear.deliver(grad)


GateRule = Callable[[nn.Module, Mapping[str, Rest]], Forward | None]


@dataclass(frozen=True)
class Entry:
    """What is registered for a layer type.

    Attributes:
        rule: Makes the forward, or is None: then only parameters that rest whole are skipped.
        reads: Submodules whose parameters this module's forward uses without calling them.
    """

    rule: GateRule | None = None
    reads: tuple[str, ...] = ()


_UNKNOWN = Entry()
_entries: dict[object, Entry] = {}


def register_gate_rule(
    layer: type[nn.Module] | str, rule: GateRule | None = None, *, reads: tuple[str, ...] = ()
) -> None:
    """Teach the gate a layer type; the latest registration counts.

    A rule belongs to the ``forward`` of the class, so subclasses that inherit it are covered, and
    subclasses with a forward of their own are not.

    Args:
        layer: The class, or its full name such as ``"transformers.pytorch_utils.Conv1D"`` where
            its package must not be imported.
        rule: ``rule(module, rests)`` with ``rests`` mapping names of parameters (only those of
            which something rests) to :class:`Rest`. Returns what to call instead of the module's
            forward while gradients are enabled, or None where it cannot handle the case. It must
            read the parameters from the module at each call. Without a rule, parameters that rest
            whole are detached during the forward, others get their gradient in full.
        reads: Submodules whose parameters the forward uses without calling them; they appear in
            ``rests`` as ``"<submodule>.<name>"``.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(Tensor([2.0]))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> def rest_scale(module, rests):
        ...     return lambda x: x * module.weight.detach() if rests["weight"].whole else None
        >>> register_gate_rule(Scale, rest_scale)
    """
    key = f"{layer}.forward" if isinstance(layer, str) else layer.forward
    _entries[key] = Entry(rule, tuple(reads))


def entry_for(module: nn.Module) -> Entry:
    """Return what is registered for a module's forward; nothing for one that was replaced."""
    if "forward" in module.__dict__:
        return _UNKNOWN
    forward = type(module).forward
    found = _entries.get(forward)
    if found is None:
        found = _entries.get(
            f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
        )
    return found or _UNKNOWN
