"""The registry of gate rules: for a layer type, a forward whose backward skips what rests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_mat.gate.compiled import Gradients
from lightning_mat.gate.fallback import ClearResting
from lightning_mat.units.regions import Block

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Rest:
    """One parameter of a module, some or all of which rests.

    Attributes:
        param: The parameter.
        blocks: What of it trains, over its matrix view; empty where all of it rests.
        passing: What of it gradients travel through, over its matrix view: all of it with
            ``skip="weights"``. What it contributes to the layer's output elsewhere counts as a
            constant: no gradient of it, and none through it to the layer's input.
        clear: The parameter's hook; a rule hands it every gradient that it made, through
            :meth:`deliver`, so that the hook knows that its resting slices are zero already.
        apart: Whether what reads the output next can go on with the part of it that gradients
            travel through. A BatchNorm of whose affine parameters all train cannot.
    """

    param: nn.Parameter
    blocks: tuple[Block, ...]
    passing: tuple[Block, ...]
    clear: ClearResting | None = None
    apart: bool = True

    @property
    def whole(self) -> bool:
        """Return whether all of it rests."""
        return len(self.blocks) == 0

    @property
    def cut(self) -> bool:
        """Return whether no gradient travels through it."""
        return len(self.passing) == 0

    @property
    def passes(self) -> bool:
        """Return whether gradients travel through all of it."""
        return sum(block.numel for block in self.passing) == self.param.numel()

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """Return a gradient that is zero where the parameter rests; what trains is to be written.

        Hand it to :meth:`deliver` then.
        """
        # In the parameter's layout, or autograd would copy it to that of .grad.
        like = self.param.detach()
        last = like.dim() > 3 and not like.is_contiguous() and like.movedim(1, -1).is_contiguous()
        shape = like.movedim(1, -1).shape if last else like.shape
        if self.clear is None:
            zeros = torch.zeros(shape, dtype=dtype, device=like.device)
        else:
            zeros = self.clear.buffer.zeros(shape, dtype, like.device)
        return zeros.movedim(-1, 1) if last else zeros

    def deliver(self, grad: Tensor) -> Tensor:
        """Return ``grad``, noted as one in which what rests is zero."""
        return grad if self.clear is None else self.clear.deliver(grad)


GateRule = Callable[[nn.Module, Mapping[str, Rest]], Forward | None]


Plain = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Static:
    """How a layer ``(x, weight, bias) → y`` is gated in a compiled model, in one graph for all.

    Attributes:
        plain: ``plain(module, x, weight, bias) -> y``, the layer's forward.
        gradients: ``gradients(module, rests)`` returns what computes the gradients while these
            parameters rest (none of them, too), or None where the rule cannot handle the case.
    """

    plain: Plain
    gradients: Callable[[nn.Module, Mapping[str, Rest]], Gradients | None]


@dataclass(frozen=True)
class Entry:
    """What is registered for a layer type.

    Attributes:
        rule: Makes the forward, or is None: then only parameters that rest whole are skipped.
        static: The same for compiled models; without it each decision compiles anew.
        reads: Submodules whose parameters this module's forward uses without calling them.
        always: The rule makes the forward in every decision, also where nothing rests or all of it.
    """

    rule: GateRule | None = None
    static: Static | None = None
    reads: tuple[str, ...] = ()
    always: bool = False


_UNKNOWN = Entry()
_entries: dict[object, Entry] = {}
# Layers that are known by what they look like, where many classes are alike.
_alike: dict[Callable[[nn.Module], bool], Entry] = {}


def register_gate_rule(
    layer: type[nn.Module] | str | Callable[[nn.Module], bool],
    rule: GateRule | None = None,
    *,
    static: Static | None = None,
    reads: tuple[str, ...] = (),
    always: bool = False,
) -> None:
    """Teach the gate a layer type; the latest registration counts.

    A rule belongs to the ``forward`` of the class, so subclasses that inherit it are covered, and
    subclasses with a forward of their own are not.

    Args:
        layer: The class, or its full name such as ``"transformers.pytorch_utils.Conv1D"`` where
            its package must not be imported, or a function that says of a module whether it is
            one, for classes that are alike and many; a registered class comes before it.
        rule: ``rule(module, rests)`` with ``rests`` mapping names of parameters (only those of
            which something rests) to :class:`Rest`. Returns what to call instead of the module's
            forward while gradients are enabled, or None where it cannot handle the case. It must
            read the parameters from the module at each call, and honour ``Rest.passing``. Without a
            rule, parameters that rest whole are detached during the forward, others get their
            gradient in full.
        static: How a compiled model gates it without a new graph for each decision.
        reads: Submodules whose parameters the forward uses without calling them; they appear in
            ``rests`` as ``"<submodule>.<name>"``.
        always: Ask the rule in every decision, also where nothing of a module rests (``rests`` is
            empty then) or all of it: for forwards whose output is no constant then, or that
            compiled models must find the same in every decision.

    Raises:
        TypeError: If ``layer``, ``rule`` or ``static`` is none of these.

    Example:
        A layer whose rule knows the weight at rest as a whole, and no part of it:

        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(Tensor([2.0, 3.0]))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> def rest_scale(module, rests):
        ...     rest = rests["weight"]
        ...     if not rest.whole or not rest.passes:
        ...         return None
        ...     return lambda x: x * module.weight.detach()
        >>> register_gate_rule(Scale, rest_scale)

        It is asked once a gate follows a decision. Where it returns None, what rests has zeros:

        >>> from lightning_mat import Gate, Partition, Slice, Unit
        >>> model = nn.Sequential(Scale(), nn.Tanh())
        >>> units = [Unit(f"scale.{i}", "scale", "0", (Slice("0.weight", 0, i, i + 1),))
        ...          for i in range(2)]
        >>> gate = Gate(model, Partition(units, model))
        >>> gradients = []
        >>> for active in ([False, False], [True, False]):
        ...     gate.apply(torch.tensor(active))
        ...     model.zero_grad()
        ...     x = torch.zeros(2, requires_grad=True)
        ...     model(x).sum().backward()
        ...     gradients.append((x.grad.tolist(), model[0].weight.grad))
        >>> gradients[0], gradients[1][0], gradients[1][1].tolist()
        (([2.0, 3.0], None), [2.0, 3.0], [0.0, 0.0])
    """
    _check_registration(layer, rule, static)
    entry = Entry(rule, static, tuple(reads), always)
    if isinstance(layer, str):
        _entries[f"{layer}.forward"] = entry
    elif isinstance(layer, type):
        _entries[cast("type[nn.Module]", layer).forward] = entry
    else:
        _alike[layer] = entry


def _check_registration(layer: object, rule: object, static: object) -> None:
    if isinstance(layer, nn.Module):
        name = type(layer).__name__
        raise TypeError(f"layer must be a class of layers, got one {name}: pass type(layer)")
    if isinstance(layer, type) and not issubclass(layer, nn.Module):
        raise TypeError(f"layer must be a class of torch.nn.Module, got {layer.__name__}")
    if not isinstance(layer, str) and not callable(layer):
        raise TypeError(
            f"layer must be a class, its full name or a function of a module, got {layer!r}"
        )
    if rule is not None and (isinstance(rule, type) or not callable(rule)):
        raise TypeError(
            f"rule must be a function rule(module, rests) or None, got {rule!r}: see the example "
            "of register_gate_rule"
        )
    if static is not None and not isinstance(static, Static):
        raise TypeError(f"static must be a lightning_mat.gate.rules.Static or None, got {static!r}")


def entry_for(module: nn.Module) -> Entry:
    """Return what is registered for a module's forward; nothing for one that was replaced."""
    replaced = module.__dict__.get("forward")
    if replaced is not None and not _is_gate(replaced):
        return _UNKNOWN
    forward = type(module).forward
    found = _entries.get(forward)
    if found is None:
        found = _entries.get(
            f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
        )
    if found is None:
        found = next((entry for fits, entry in _alike.items() if fits(module)), None)
    return found or _UNKNOWN


def _is_gate(forward: Any) -> bool:
    """Return whether a gate stands in for a forward; ``functools.wraps`` copies marks to others."""
    bearer = getattr(forward, "__func__", forward)
    return getattr(bearer, "is_gate", None) in (bearer, type(bearer))
