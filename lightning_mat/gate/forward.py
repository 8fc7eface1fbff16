"""GatedForward: stands in for a module's forward, and leaves everything else of it alone."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from lightning_mat.gate.compiled import Place, StaticLayer
from lightning_mat.gate.rules import Forward, Plain, Rest


@functools.cache
def _stand_in(forward: Forward) -> Forward:
    """Return the function that stands in for a class's forward, bound to a GatedForward.

    One for each class: compilers guard on functions, and so take alike layers for alike. Lightning
    and Hugging Face look at the signature and the name of a model's forward.
    """

    def stand_in(gated: GatedForward, *args: Any, **kwargs: Any) -> Any:
        return gated(*args, **kwargs)

    functools.update_wrapper(stand_in, forward, updated=())
    stand_in.is_gate = stand_in  # type: ignore[attr-defined]
    return stand_in


class GatedForward:
    """What ``module.__dict__["forward"]`` is bound to: runs a rule's forward where gradients flow.

    The module keeps its class, parameters, hooks, ``state_dict`` and ``repr``. A deep copy or a
    pickle of the module holds its plain forward. Without gradients, inside ``torch.func``
    transforms, and when the parameters that the gate knows have been exchanged
    (``torch.func.functional_call``), the plain forward runs.

    Args:
        module: The module.
        names: Its parameters that units own, by (dotted) name.
        plain: The forward of a layer ``(x, weight, bias) → y``, where compiled models have one
            graph for all decisions.
        eager: Stand aside in compiled models, where the modules inside do the same.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Iterable[str] = (),
        plain: Plain | None = None,
        *,
        eager: bool = False,
    ) -> None:
        """Remember where the parameters are."""
        self.module = module
        self.watched = tuple(
            (params, name, params[name]) for params, name in (_holder(module, n) for n in names)
        )
        self.layer = plain
        self.place = None if plain is None else Place(functools.partial(plain, module))
        self.eager = eager
        self.on = False
        self.run: Forward | None = None
        self.before: Forward | None = None
        self.plain: Forward = MethodType(type(module).forward, module)
        self.installed: Forward = self
        # A wrapper that somebody put around this, and that stayed when this was uninstalled.
        self._around: Forward | None = None

    @property
    def is_wrapped(self) -> bool:
        """Whether somebody's wrapper is on the module that runs this."""
        now = self.module.__dict__.get("forward")
        return now is not None and now is self._around

    def watch_inside(self) -> None:
        """Look at all parameters of the module, not at those that units own alone."""
        known = {(id(params), name) for params, name, _ in self.watched}
        self.watched += tuple(
            (module._parameters, name, param)
            for module in self.module.modules()
            if not isinstance(module, torch.jit.ScriptModule)
            for name, param in module._parameters.items()
            if (id(module._parameters), name) not in known
        )

    def exchange(self, params: Mapping[Tensor, nn.Parameter]) -> None:
        """Expect other parameters in the place of some that the module held at construction."""
        self.watched = tuple(
            (held, name, param if param is None else params.get(param, param))
            for held, name, param in self.watched
        )

    @property
    def other_is_on(self) -> bool:
        """Whether another gate is on the module."""
        now = self.module.__dict__.get("forward")
        other = getattr(now, "__self__", now)
        return isinstance(other, GatedForward) and other.on and other is not self

    def install(self, run: Forward | None) -> None:
        """Route the module's forward through ``run``; None where nothing of it rests.

        Raises:
            RuntimeError: If another gate is on the module.
        """
        if self.place is not None:
            self.place.ran = False
        if self.is_wrapped:
            self.run, self.on = run, True
            return
        if self.other_is_on:
            raise RuntimeError("a gate is on it already: call remove() on that gate first")
        self.before = self.module.__dict__.get("forward")
        if isinstance(getattr(self.before, "__self__", self.before), GatedForward):
            self.before = None  # it came with a copy
        if self.before is None:
            self.plain = MethodType(type(self.module).forward, self.module)
            self.installed = MethodType(_stand_in(type(self.module).forward), self)
        else:
            self.plain = self.before
            self.installed = functools.update_wrapper(self, self.plain, updated=())
        self.run, self.on = run, True
        self.module.__dict__["forward"] = self.installed

    def uninstall(self) -> None:
        """Give the module back the forward it had; inert if another wrapper holds on to this."""
        self.run, self.on = None, False
        now = self.module.__dict__.get("forward")
        if now is not self.installed:
            self._around = now
            return
        self._around = None
        if self.before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output; its backward skips what rests."""
        if (
            not self.on
            or not torch.is_grad_enabled()
            or torch._C._are_functorch_transforms_active()
            or any(params.get(name) is not param for params, name, param in self.watched)
        ):
            return self.plain(*args, **kwargs)
        if torch.compiler.is_compiling():
            # With more arguments, as a transposed convolution may have, it is no (x) → y.
            if self.place is not None and len(args) + len(kwargs) == 1:
                return self._compiled(*args, **kwargs)
            if self.eager and self.place is None:
                return self.plain(*args, **kwargs)
        if self.place is not None:
            self.place.ran = True
        if self.run is None or torch.autograd.forward_ad._current_level >= 0:
            return self.plain(*args, **kwargs)
        _refuse_reentrant(self.module)
        return self.run(*args, **kwargs)

    def _compiled(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of a layer in a compiled model: the graph knows no decision."""
        (x,) = (*args, *kwargs.values())
        weight, bias = self.module._parameters["weight"], self.module._parameters.get("bias")
        assert self.place is not None
        return StaticLayer.apply(x, weight, bias, self.layer, self.module, self.place.number)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """Return what runs the plain forward of the module's copy."""
        if self.before is not None:
            return copy.deepcopy(self.before, memo)
        return GatedForward(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the forward that somebody put on the module, or as what has the class's."""
        return _same, (self.module if self.before is None else self.before,)


GatedForward.is_gate = GatedForward  # type: ignore[attr-defined]


def _same(thing: Any) -> Any:
    return thing


def inside(module: nn.Module, path: str) -> nn.Module:
    """Return a submodule, the module itself for ""; scripted modules know no submodules."""
    return module.get_submodule(path) if path else module


def _holder(module: nn.Module, name: str) -> tuple[dict[str, nn.Parameter | None], str]:
    """Return the ``_parameters`` that hold a parameter with a dotted name, and its own name."""
    path, _, own = name.rpartition(".")
    return inside(module, path)._parameters, own


def detaching(gated: GatedForward, rests: Mapping[str, Rest]) -> Forward:
    """Return a forward in which every parameter that rests whole is a constant.

    Autograd then neither computes its gradient nor saves what only that gradient needs.
    """
    names = [_holder(gated.module, name) for name, rest in rests.items() if rest.whole]

    def run(*args: Any, **kwargs: Any) -> Any:
        held = [params[name] for params, name in names]
        try:
            for (params, name), param in zip(names, held, strict=True):
                params[name] = None if param is None else param.detach()  # type: ignore[assignment]
            return gated.plain(*args, **kwargs)
        finally:
            for (params, name), param in zip(names, held, strict=True):
                params[name] = param

    return run


def constant(gated: GatedForward) -> Forward:
    """Return a forward whose output is a constant: nothing of it is saved or passes gradients."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return gated.plain(*args, **kwargs)

    return run


def _refuse_reentrant(module: nn.Module) -> None:
    """Raise where a reentrant checkpoint is being recomputed.

    Its output has gradients only if its input has, so that what trains inside, above a part that
    rests, would silently get none.
    """
    # Recomputing happens within a backward pass; only then is the stack worth a look.
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            raise RuntimeError(
                f"{type(module).__name__} is in a reentrant activation checkpoint, which loses the "
                "gradients of what trains above units at rest: use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), in Hugging Face "
                'gradient_checkpointing_enable({"use_reentrant": False})'
            )
        frame = frame.f_back  # type: ignore[assignment]
