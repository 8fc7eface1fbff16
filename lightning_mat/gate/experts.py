"""Gate rule for mixtures that keep their experts in one tensor ``[E, ...]`` for each parameter.

Their forward takes an expert's matrix out of the tensor (``self.down_proj[expert]``) or hands the
whole of it to a grouped product. During the forward the parameters are exchanged for stand-ins:
:class:`Stacked`, or, where a compiler traces it, :class:`TracedStack`.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_mat.gate.grouped import Experts
from lightning_mat.gate.rules import Forward, Rest, register_gate_rule
from lightning_mat.gate.stacked import NotTracedError, Stacked
from lightning_mat.gate.traced import StackPlace, TracedStack, show_products
from lightning_mat.units.unit import matrix_shape

# What the forward of a mixture takes in Hugging Face's models, from version 5 on.
ROUTED = {"hidden_states", "top_k_index", "top_k_weights"}


class Mixture:
    """The forward of a mixture of which experts may rest; a module has one, whatever rests.

    Attributes:
        places: Those of the parameters that are matrices of experts.
        products: Whether their products are made for all experts in one operation.
        cuts: Whether there are decisions in which some experts pass no gradients on.
        opaque: Whether it was traced, and did something else with them.
    """

    def __init__(self, module: nn.Module) -> None:
        """Start with nothing at rest."""
        self.places = {
            name: StackPlace()
            for name, param in module._parameters.items()
            if param is not None and param.dim() > 2
        }
        self.products = self.cuts = self.opaque = False
        self._experts: dict[str, Experts] = {}

    def let(self, module: nn.Module, rests: Mapping[str, Rest]) -> None:
        """Set what rests from now on."""
        self.products = _makes_products(module)
        if self.products:
            show_products()
        self._experts = {name: Experts(rest) for name, rest in rests.items()}
        for name, place in self.places.items():
            place.experts = self._experts.get(name)
        if rests:  # otherwise as it was: compiled models should not see a difference
            self.cuts = not all(rest.passes for rest in rests.values())

    @functools.cached_property
    def run(self) -> Forward:
        """:meth:`_run`, in which no compiler should find the stand-ins of one decision."""
        return cast(Forward, torch.compiler.disable(self._run))

    def _run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output, computed with stand-ins for its parameters."""
        stand_ins = {}
        for name, experts in self._experts.items():
            param = cast(nn.Parameter, module._parameters[name])
            used = param if experts.train.numbers else param.detach()
            stand_ins[name] = Stacked.make(used, experts)
        params = module._parameters
        held = {name: params[name] for name in stand_ins}
        try:
            params.update(cast("dict[str, nn.Parameter]", stand_ins))
            return type(module).forward(module, *args, **kwargs)
        finally:
            params.update(held)

    def trace(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output, for a compiler: what is traced knows no decision.

        Raises:
            NotTracedError: If the module uses one of them in another way than such products.
        """
        stand_ins = {}
        seen: dict[StackPlace, None] = {}
        for name, place in self.places.items():
            param = cast(nn.Parameter, module._parameters[name])
            stand_ins[name] = TracedStack.make(param, place, cuts=self.cuts, seen=seen)
        shown = cast(nn.Module, Shown(module, stand_ins))
        out = type(module).forward(shown, *args, **kwargs)
        if len(seen) < len(stand_ins):
            raise NotTracedError
        return out


class Shown:
    """A module that shows stand-ins in the place of its parameters, to a compiler.

    Exchanging them, as an eager forward does, would be a side effect, which compilers do not allow
    inside of an activation checkpoint.

    Args:
        module: The module.
        stand_ins: What to show, by the parameter's name.
    """

    def __init__(self, module: nn.Module, stand_ins: Mapping[str, Tensor]) -> None:
        object.__setattr__(self, "_shown", module)
        object.__setattr__(self, "_stand_ins", stand_ins)

    def __getattr__(self, name: str) -> Any:
        if name in self._stand_ins:
            return self._stand_ins[name]
        value = getattr(self._shown, name)
        if isinstance(value, MethodType) and value.__self__ is self._shown:
            return functools.partial(value.__func__, self)  # its own code sees them, too
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._shown, name, value)


def _makes_products(module: nn.Module) -> bool:
    """Return whether a mixture makes the products of all experts in one operation.

    A guess before its forward is traced: what goes through the experts one by one mostly breaks a
    graph itself, in the midst of which no stand-in should be found.
    """
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if chosen is not None:  # Hugging Face's
        return chosen in ("grouped_mm", "batched_mm")
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and not {"grouped_mm", "_grouped_mm"}.isdisjoint(code.co_names)


_mixtures: weakref.WeakKeyDictionary[nn.Module, Mixture] = weakref.WeakKeyDictionary()


def stacked_rule(module: nn.Module, rests: Mapping[str, Rest]) -> Forward | None:
    """Return the forward of a mixture with parameters ``[E, ...]`` of which experts rest.

    Register it for a mixture of your own, whose forward takes experts out of its parameters by
    number: ``register_gate_rule(MyExperts, stacked_rule, always=True)``.

    In a compiled model its grouped products are in the graph, as any other layer. Where experts
    are taken out one by one, it skips nothing with ``skip="weights"``, and runs uncompiled with
    ``skip="units"``.
    """
    for rest in rests.values():
        columns = ((0, matrix_shape(rest.param.shape)[1]),)
        if any(block.columns != columns for block in (*rest.blocks, *rest.passing)):
            return None
    mixture = _mixtures.get(module) or Mixture(module)
    _mixtures[module] = mixture
    mixture.let(module, rests)
    _ = mixture.run  # made here, not within a compiled model

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and mixture.products and not mixture.opaque:
            try:
                return mixture.trace(module, *args, **kwargs)
            except NotTracedError:
                # What the forward did so far stays in this one graph, and is done again.
                mixture.opaque = True
        if mixture.cuts or not torch.compiler.is_compiling():
            return mixture.run(module, *args, **kwargs)
        # Gradients in full: the parameters' hooks clear what rests.
        return type(module).forward(module, *args, **kwargs)

    return run


@functools.cache
def _takes_routes(forward: Callable[..., Any]) -> bool:
    return set(inspect.signature(forward).parameters) >= ROUTED


def _is_mixture(module: nn.Module) -> bool:
    """Return whether a module is a mixture with stacked experts, by what its forward takes."""
    shapes = [p.dim() for p in module._parameters.values() if p is not None]
    return max(shapes, default=0) > 2 and _takes_routes(type(module).forward)


register_gate_rule(_is_mixture, stacked_rule, always=True)
