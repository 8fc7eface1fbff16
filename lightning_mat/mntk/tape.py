"""Tape: what the tracked layers see in one forward and one backward pass.

Every use of a tracked layer is a call: its input, and, once the backward pass has reached it, the
gradient of its output. The backward pass runs from the scalars down to one *anchor*, a zero that is
added to the output of every tracked layer that has no tracked layer below it. With the parameters'
``requires_grad`` off, autograd then computes input gradients only, and only as far down as needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_mat.mntk.rules import LayerRule, explicit_forward, layer_rule


@dataclass(eq=False)
class Call:
    """One use of a tracked layer.

    Args:
        site: Name of the layer, and of its part where it has several (``"attn:query"``).
        module: The layer.
        rule: Its rule; None for the fallback.
        names: Canonical parameter name by the attribute name that the rule gives.
        x: Its first input; dropped by whoever has used it.
        inputs: All inputs, kept for the fallback only.
        outputs: Output leaves, detached, kept for the fallback only.
        grads: Gradients of the output leaves, as they arrive.
    """

    site: str
    module: nn.Module
    rule: LayerRule | None
    names: dict[str, str]
    x: Any
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    outputs: list[Any] | None = None
    grads: dict[int, Tensor] = field(default_factory=dict)
    number: int = 0
    known: bool = False
    """Whether the gradient was known without a backward pass."""

    @property
    def layer(self) -> str:
        """Name of the layer, without the part."""
        return self.site.split(":")[0]

    @property
    def key(self) -> tuple[str, int]:
        """Identity of the call within a forward pass."""
        return self.site, self.number

    def row_dims(self, grad: Tensor) -> int:
        """Return how many leading dimensions of the output gradient index rows."""
        if self.rule is None:
            return grad.dim()
        item = self.rule.item_dims(self.module)[1]
        return 1 if item < 0 else grad.dim() - item

    def x_row_dims(self) -> int:
        """Return how many leading dimensions of the input index rows."""
        assert self.rule is not None
        item = self.rule.item_dims(self.module)[0]
        return 1 if item < 0 else int(self.x.dim()) - item


class Tape:
    """Records the calls of some layers; use as ``with tape.recording(): forward``.

    Args:
        modules: The layers to track, by name.
        names: Canonical name of every tracked parameter, by ``id``.
        arrived: Called as ``arrived(call)`` when the gradient of a call's output is there.
        samples: Samples of the forward pass.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        names: Mapping[int, str],
        arrived: Callable[[Call], None],
        samples: int,
    ) -> None:
        self.samples = samples
        self.modules = modules
        self.names = names
        self.arrived = arrived
        self.calls: list[Call] = []
        self.anchor: Tensor | None = None
        self._counts: dict[str, int] = {}
        self._open = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record calls until the end of the block; gradients arrive afterwards, too."""
        self.calls, self._counts, self.anchor = [], {}, None
        with ExitStack() as stack:
            for name, module in self.modules.items():
                explicit = explicit_forward(module)
                if explicit is not None:
                    stack.enter_context(self._replaced(name, module, explicit))
                else:
                    hook = self._hook(name)
                    handle = module.register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            self._open = True
            stack.callback(self._close)
            yield

    def _close(self) -> None:
        # a checkpointed block calls its layers again during the backward pass: not a new use
        self._open = False

    def own_names(self, module: nn.Module) -> dict[str, str]:
        """Return the tracked parameters of a module itself: attribute → canonical name."""
        return {
            attribute: self.names[id(parameter)]
            for attribute, parameter in own_parameters(module).items()
            if id(parameter) in self.names
        }

    def _hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
            if not self._open:
                return None
            rule = layer_rule(module)
            if rule is not None and isinstance(y, Tensor):
                x = args[0] if args else next(iter(kwargs.values()))
                if isinstance(module, nn.Embedding):
                    x, y = self._for_each_sample(x, y)
                return self.observe(name, module, rule, self.own_names(module), x, y)
            return self._observe_any(name, module, args, kwargs, y)

        return hook

    def _for_each_sample(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Give every sample rows of its own of an embedding that is looked up once for all.

        Position embeddings are: [1, T] indices, or 0 … T - 1, broadcast over the samples.
        Their gradient would arrive summed over the samples.
        """
        if x.dim() == 2 and x.shape[0] == 1:
            return x.expand(self.samples, -1), y.expand(self.samples, -1, -1)
        positions = torch.arange(x.shape[0], device=x.device) if x.dim() == 1 else None
        if positions is not None and len(positions) > 2 and torch.equal(x, positions.to(x)):
            return x.expand(self.samples, -1), y.expand(self.samples, -1, -1)
        return x, y

    @contextmanager
    def _replaced(
        self, name: str, module: nn.Module, explicit: Callable[..., Any]
    ) -> Iterator[None]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return explicit(module, self, name, *args, **kwargs)

        before = module.__dict__.get("forward")
        module.__dict__["forward"] = forward
        try:
            yield
        finally:
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before

    def observe(
        self,
        site: str,
        module: nn.Module,
        rule: LayerRule,
        names: dict[str, str],
        x: Tensor,
        y: Tensor,
    ) -> Tensor:
        """Record a call and return its output, connected to the anchor."""
        call = self._new(Call(site, module, rule, names, x.detach()))
        return self._watch(call, 0, y)

    def given(
        self,
        site: str,
        module: nn.Module,
        rule: LayerRule,
        names: dict[str, str],
        x: Tensor,
        grad: Tensor,
    ) -> None:
        """Record a call whose output gradient is known without a backward pass."""
        call = self._new(Call(site, module, rule, names, x.detach()))
        call.grads[0], call.known = grad, True

    def _observe_any(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any
    ) -> Any:
        """Record a call of a layer without a rule: all inputs and all outputs."""
        leaves, structure = tree_flatten(y)
        inputs = tree_flatten((args, kwargs))
        detached = [v.detach() if isinstance(v, Tensor) else v for v in inputs[0]]
        call = self._new(Call(name, module, None, self.own_names(module), None))
        call.inputs = tree_unflatten(detached, inputs[1])
        call.outputs = [v.detach() if isinstance(v, Tensor) else None for v in leaves]
        watched = [
            self._watch(call, i, v) if isinstance(v, Tensor) and v.is_floating_point() else v
            for i, v in enumerate(leaves)
        ]
        return tree_unflatten(watched, structure)

    def _new(self, call: Call) -> Call:
        call.number = self._counts.get(call.site, 0)
        self._counts[call.site] = call.number + 1
        self.calls.append(call)
        return call

    def _watch(self, call: Call, leaf: int, y: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise ValueError(
                f"layer {call.site!r} runs without gradients (no_grad, or reentrant "
                "checkpointing), so that it cannot be measured: pass forward=... that calls the "
                "model with gradients, or leave the layer out of the units"
            )
        if not y.requires_grad:
            if self.anchor is None:
                self.anchor = torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
            y = y + self.anchor.to(y)

        def arrive(grad: Tensor) -> None:
            call.grads[leaf] = grad.detach()
            self.arrived(call)

        y.register_hook(arrive)
        return y

    def backward(self, scalars: Tensor, weights: Tensor | None = None, keep: bool = False) -> None:
        """Backpropagate Σ_s w_s z_s to the anchor; gradients arrive through the hooks.

        Args:
            scalars: z, shape ``[S]``.
            weights: w, shape ``[S]``; ones by default.
            keep: Keep the graph for another call.
        """
        if self.anchor is None or not scalars.requires_grad:
            return
        total = scalars.sum() if weights is None else (scalars * weights.to(scalars)).sum()
        torch.autograd.grad(total, self.anchor, retain_graph=keep, allow_unused=True)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a module uses itself, by attribute.

    A container that shares a parameter with a layer inside of it (transformers' prediction heads
    hold their decoder's bias) leaves its use to that layer.
    """
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if not own or layer_rule(module) is not None:
        return own
    inside = {id(p) for child in module.children() for p in child.parameters()}
    return {name: p for name, p in own.items() if id(p) not in inside}


def tracked_modules(
    model: nn.Module, owned: Sequence[str], aliases: Mapping[str, str]
) -> tuple[dict[str, nn.Module], dict[int, str]]:
    """Return the layers that own some parameters, by name, and the parameters' names by ``id``.

    Layers whose children's parameters they use themselves (packed attention) are tracked in the
    place of those children.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = set(owned)
    names = {id(p): aliases[n] for n, p in parameters.items() if aliases.get(n) in wanted}
    modules: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=True):
        if explicit_forward(module) is not None:
            if any(id(p) in names for p in module.parameters()):
                modules[name] = module
            inside.update(id(child) for child in module.modules())
        elif id(module) not in inside and any(
            id(p) in names for p in own_parameters(module).values()
        ):
            modules[name] = module
    return modules, names


def linked_modules(
    modules: Mapping[str, nn.Module],
    names: Mapping[int, str],
    together: Iterable[set[str]] = (),
) -> list[tuple[str, ...]]:
    """Return the layers in groups, such that layers with a common parameter are in one group.

    Args:
        modules: The tracked layers, by name.
        names: The tracked parameters' names, by ``id``.
        together: Sets of layers to keep in one group for other reasons.
    """
    users: dict[str, set[str]] = {}
    for layer, module in modules.items():
        deep = explicit_forward(module) is not None
        for parameter in module.parameters(recurse=deep):
            if id(parameter) in names:
                users.setdefault(names[id(parameter)], set()).add(layer)
    group_of = {layer: {layer} for layer in modules}
    for linked in (*users.values(), *together):
        merged = set().union(*(group_of[layer] for layer in linked))
        group_of.update(dict.fromkeys(merged, merged))
    groups: list[tuple[str, ...]] = []
    for layer in modules:
        group = tuple(other for other in modules if other in group_of[layer])
        if group[0] == layer:
            groups.append(group)
    return groups
