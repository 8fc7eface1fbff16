"""GatedForward: stands in for a module's forward, and leaves everything else of it alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from lightning_mat.gate.rules import Forward, Rest


class GatedForward:
    """Callable in ``module.__dict__["forward"]`` that runs a rule's forward where gradients flow.

    The module keeps its class, parameters, hooks, ``state_dict`` and ``repr``. A deep copy or a
    pickle of the module holds its plain forward. Without gradients, inside ``torch.func``
    transforms, and when the parameters that the gate knows have been exchanged
    (``torch.func.functional_call``), the plain forward runs.

    Args:
        module: The module.
        rests: Its parameters of which something rests, by (dotted) name.
    """

    def __init__(self, module: nn.Module, rests: Mapping[str, Rest]) -> None:
        """Remember the module's own forward."""
        self.module = module
        self.before: Forward | None = module.__dict__.get("forward")
        self.plain: Forward = self.before or MethodType(type(module).forward, module)
        self.run: Forward | None = None
        self.watched = tuple((*_holder(module, name), rest.param) for name, rest in rests.items())
        # Lightning and Hugging Face look at the signature and the code of a model's forward.
        functools.update_wrapper(self, self.plain, updated=())

    def install(self, run: Forward) -> None:
        """Route the module's forward through ``run``."""
        self.run = run
        self.module.__dict__["forward"] = self

    def uninstall(self) -> None:
        """Give the module back the forward it had; inert if another wrapper holds on to this."""
        self.run = None
        if self.module.__dict__.get("forward") is not self:
            return
        if self.before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output; its backward skips what rests."""
        if (
            self.run is None
            or not torch.is_grad_enabled()
            or torch._C._are_functorch_transforms_active()
            or any(params.get(name) is not param for params, name, param in self.watched)
        ):
            return self.plain(*args, **kwargs)
        return self.run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """Return the plain forward of the module's copy."""
        if self.before is not None:
            return copy.deepcopy(self.before, memo)
        return MethodType(type(self.module).forward, copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the plain forward."""
        if self.before is not None:
            return _same, (self.before,)
        return getattr, (self.module, "forward")


def _same(forward: Forward) -> Forward:
    return forward


def _holder(module: nn.Module, name: str) -> tuple[dict[str, nn.Parameter | None], str]:
    """Return the ``_parameters`` that hold a parameter with a dotted name, and its own name."""
    path, _, own = name.rpartition(".")
    return module.get_submodule(path)._parameters, own


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
