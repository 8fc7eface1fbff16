"""What a gate promises, computed the plain way: every gradient in full, then resting parts removed.

Independent of the code it checks: masks come from the slices of the units, one index expression
each, not from the partition's arithmetic on rectangles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_mat.units.core import Partition


def resting(model: nn.Module, part: Partition, active: Sequence[bool]) -> dict[str, Tensor]:
    """Return, per parameter, a bool mask of what rests."""
    named = dict(model.named_parameters(remove_duplicate=False))
    masks = {id(p): torch.zeros(p.shape, dtype=torch.bool) for p in model.parameters()}
    for unit, on in zip(part.units, active, strict=True):
        for piece in () if on else unit.slices:
            mask = masks[id(named[piece.param])]
            if piece.dim is None:
                mask.fill_(True)
            elif piece.dim == 0:
                mask[piece.start : piece.stop] = True
            else:
                mask[:, piece.start : piece.stop] = True
    return {name: masks[id(param)] for name, param in model.named_parameters()}


def expected_gradients(
    model: nn.Module, part: Partition, active: Sequence[bool], loss: Callable[[], Tensor]
) -> dict[str, Tensor | None]:
    """Return the gradients that a plain backward pass gives what trains, None for what rests whole.

    The model must carry no gate; its gradients are None before and after.
    """
    value = loss()
    if value.requires_grad:  # everything may be at rest
        value.backward()
    masks = resting(model, part, active)
    expected: dict[str, Tensor | None] = {}
    for name, param in model.named_parameters():
        grad, mask = param.grad, masks[name]
        if grad is None or (mask.numel() and bool(mask.all())):
            expected[name] = None
        else:
            expected[name] = grad.masked_fill(mask, 0.0)
        param.grad = None
    return expected


CUT = ("head", "expert", "filter", "ffn")
# Layers whose output is linear in their parameters.
SCALED = (_ConvNd, _NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@contextmanager
def detached(model: nn.Module, part: Partition, active: Sequence[bool]) -> Iterator[None]:
    """Make what resting units contribute to their layers' outputs constants, by plain hooks.

    For layers that are called as modules and whose weight is ``[out, in]``, or ``[in, out]``
    in transformers' ``Conv1D``: resting outputs are detached behind the layer, resting inputs in
    front of it, and experts that are modules behind the expert. Convolutions and norms have the
    gradients of one whose resting weights are zero. Nothing is below an embedding.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    cut = [on or kind not in CUT for on, kind in zip(active, part.kinds, strict=True)]
    masks = {id(named[name]): mask for name, mask in resting(model, part, cut).items()}
    handles = [
        module.register_forward_hook(
            _without({n: masks[id(p)] for n, p in owned.items()}), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, SCALED) and (owned := dict(module.named_parameters()))
    ]
    for unit, on in zip(part.units, active, strict=True):
        if on or unit.kind not in CUT:
            continue
        owned = {id(named[piece.param]) for piece in unit.slices if piece.dim is None}
        for module in model.modules():
            inside = {id(p) for p in module.parameters()}
            if unit.kind == "expert" and module is not model and inside and inside <= owned:
                handles.append(module.register_forward_hook(_behind(None, -1)))
                continue
            for piece in unit.slices:
                local = [n for n, p in module._parameters.items() if p is named[piece.param]]
                if not local or isinstance(module, (*SCALED, nn.Embedding)):
                    continue
                swapped = type(module).__name__ == "Conv1D" and local[0] == "weight"
                run = None if piece.dim is None else (piece.start, piece.stop)
                if piece.dim == (0 if swapped else 1):
                    handles.append(module.register_forward_pre_hook(_in_front(run, -1)))
                elif local[0] == "weight":
                    handles.append(module.register_forward_hook(_behind(run, -1)))
    try:
        with _packed_products(model, masks):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _packed_products(model: nn.Module, masks: dict[int, Tensor]) -> Iterator[None]:
    """Make resting parts of products constants, where a forward calls ``F.linear`` itself.

    ``nn.MultiheadAttention`` does with its weights or with rows of them, mixtures with an expert's
    matrix out of a stack; a product has the gradients of one whose resting weights are zero.
    """
    packed = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    convolutions = {
        id(p) for m in model.modules() if isinstance(m, _ConvNd) for p in m.parameters()
    }
    ours = {id(p) for m in packed for p in m.parameters()}
    ours |= {id(p) for p in model.parameters() if p.dim() == 3} - convolutions
    linear = nn.functional.linear

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight, bias)
        whole = weight if id(weight) in ours else weight._base
        if whole is None or id(whole) not in ours:
            return out
        first = weight.storage_offset() // whole[0].numel()
        mask = masks[id(whole)][first : first + len(weight)]
        if whole.dim() == 3:
            mask = mask[0]
        partly = linear(x, weight.masked_fill(mask, 0.0), bias)
        return out.detach() + (partly - partly.detach())

    nn.functional.linear = product
    try:
        yield
    finally:
        nn.functional.linear = linear


def _constant(x: Tensor, run: tuple[int, int | None] | None, dim: int) -> Tensor:
    if run is None:
        return x.detach()
    mask = torch.zeros(x.shape[dim], dtype=torch.bool)
    mask[run[0] : run[1]] = True
    return torch.where(mask.view(-1, *[1] * (x.dim() - 1 - dim % x.dim())), x.detach(), x)


def _behind(run: tuple[int, int | None] | None, dim: int) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: object, out: Tensor) -> Tensor:
        fixed = _constant(out, run, dim)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):  # the weight's contribution is constant, not the bias'
            mask = torch.zeros_like(bias)
            mask[slice(*(run or (0, None)))] = 1
            live = mask * (bias - bias.detach())
            fixed = fixed + live.view(-1, *[1] * (out.dim() - 1 - dim % out.dim()))
        return fixed

    return hook


def _in_front(run: tuple[int, int | None] | None, dim: int) -> Callable[..., tuple[Tensor, ...]]:
    return lambda module, args: (_constant(args[0], run, dim), *args[1:])


def _without(masks: dict[str, Tensor]) -> Callable[..., Tensor]:
    """Give an output the gradients that it has where these entries of the parameters are zero."""
    inside = False

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict, out: Tensor) -> Tensor:
        nonlocal inside
        if inside:
            return out
        inside = True
        try:
            given = {n: p.masked_fill(masks[n], 0.0) for n, p in module.named_parameters()}
            partly = torch.func.functional_call(module, given, args, kwargs)
        finally:
            inside = False
        return out.detach() + (partly - partly.detach())

    return hook
