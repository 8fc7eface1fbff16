"""Attention of some heads: those at rest run without autograd, and nothing of them is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from lightning_mat.gate.look import FirstLook
from lightning_mat.gate.once import once_differentiable
from lightning_mat.gate.partly import Partly, live, ordinary
from lightning_mat.gate.rules import Forward, Rest
from lightning_mat.gate.selection import Selection
from lightning_mat.units.core import Partition
from lightning_mat.units.heads import Attention, find_attention
from lightning_mat.units.regions import merge_runs
from lightning_mat.units.unit import Rect

# Where the heads are in [..., heads, tokens, width].
HEADS = -3


@dataclass(frozen=True)
class AttentionSite:
    """An attention module, and which parameters each of its groups of heads is made of.

    Attributes:
        attention: The module, taken apart.
        module: The module.
        groups: Per group, its slices: parameter (by the partition's name) and rectangle.
        look: Looks at the first gradient of heads at rest.
    """

    attention: Attention
    module: nn.Module
    groups: tuple[tuple[tuple[str, Rect], ...], ...]
    look: FirstLook

    def split(self, rests: Mapping[str, Rest]) -> Split | None:
        """Return how to split the module's heads, None where all of them pass gradients on."""
        on = [not _cut(group, rests) for group in self.groups]
        if all(on):
            return None
        device = next(self.module.parameters()).device
        return Split(self.attention.heads, on, device, self.look)


def _cut(group: Sequence[tuple[str, Rect]], rests: Mapping[str, Rest]) -> bool:
    """Return whether no gradient travels through anything that makes up a group of heads."""
    return all(
        name in rests
        and not any(_cross(owned, rect) for block in rests[name].passing for rect in block.rects())
        for name, owned in group
    )


def _cross(a: Rect, b: Rect) -> bool:
    return a.r0 < b.r1 and b.r0 < a.r1 and a.c0 < b.c1 and b.c0 < a.c1


def attention_sites(model: nn.Module, part: Partition) -> list[AttentionSite]:
    """Return the attention modules of a model whose heads may rest."""
    try:
        found = find_attention(model)
    except ValueError:  # something that looks like attention and is none: its heads are no units
        return []
    sites = []
    for attention in found:
        groups = tuple(
            tuple(
                (part.aliases[piece.param], piece.rect(part.shapes[part.aliases[piece.param]]))
                for piece in attention.head(i)
            )
            for i in range(attention.groups)
        )
        if all(name in part.owners for group in groups for name, _ in group):
            module, look = model.get_submodule(attention.path), FirstLook(attention.path)
            sites.append(AttentionSite(attention, module, groups, look))
    return sites


class Split:
    """Which heads of an attention pass gradients on, for tensors with either number of heads.

    Args:
        heads: Query heads.
        on: Per group of heads (key-value head), whether it passes gradients on.
        device: Where the tensors live.
        look: Looks at the first gradient of the heads that pass none on.
    """

    def __init__(
        self, heads: int, on: Sequence[bool], device: torch.device, look: FirstLook
    ) -> None:
        """Build the indices once, so that no training step copies anything to the device."""
        self.look = look
        self.heads, self.groups = heads, len(on)
        self.none = not any(on)
        self._chosen = {
            size: (_chosen(on, size, True, device), _chosen(on, size, False, device))
            for size in {heads, len(on)}
        }

    def fits(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        """Return whether the tensors are attention of these heads, ``[..., heads, tokens, width]``.

        Keys and values have as many heads as the queries, or one per group.
        """
        if min(query.dim(), key.dim(), value.dim()) < 3:
            return False
        sizes = [t.shape[HEADS] for t in (query, key, value)]
        if sizes[0] not in self._chosen or sizes[1] != sizes[2]:
            return False
        if sizes[1] not in (self.groups, sizes[0]):
            return False
        # With more dimensions than batch, heads, tokens and width, another may be the heads'.
        if query.dim() > 4 and not self._chosen.keys().isdisjoint(query.shape[:HEADS]):
            return False
        return mask is None or mask.dim() < 3 or mask.shape[HEADS] in (1, sizes[0])

    def chosen(self, size: int) -> tuple[Selection, Selection]:
        """Return which of so many heads pass gradients on, and which do not."""
        return self._chosen[size]

    def trained(self, tensor: Tensor) -> Tensor:
        """Return the heads that pass gradients on, alone."""
        chosen, _ = self._chosen[tensor.shape[HEADS]]
        if isinstance(tensor, Partly):
            if live(tensor) and (tensor.axis, tensor.selection.runs) == (HEADS, chosen.runs):
                return tensor.taken()
            tensor = tensor.merged()
        return cast(Tensor, TakeHeads.apply(tensor, chosen))

    def rested(self, tensor: Tensor) -> Tensor:
        """Return the other heads; call it without gradients."""
        return self._chosen[tensor.shape[HEADS]][1].take(self.values(tensor), HEADS)

    def values(self, tensor: Tensor) -> Tensor:
        """Return all heads; call it without gradients."""
        return tensor.full if isinstance(tensor, Partly) else tensor


def _chosen(on: Sequence[bool], size: int, which: bool, device: torch.device) -> Selection:
    share = size // len(on)
    runs = merge_runs((g * share, (g + 1) * share) for g, flag in enumerate(on) if flag is which)
    return Selection(runs, size, device)


class SplitAttention(TorchFunctionMode):
    """While it is entered, attention runs as two calls: heads that pass gradients on, and others.

    That is ``F.scaled_dot_product_attention``, and the two products of attention written out. Heads
    attend independently of each other, so that two calls have together the bits of one. Only with
    dropout inside of ``F.scaled_dot_product_attention`` are its masks drawn separately: other
    random numbers than in the plain model, of the same distribution. Inside of an activation
    checkpoint that begins within the module it runs plainly: it is run again when this is left.

    Args:
        split: Which heads pass gradients on.
    """

    def __init__(self, split: Split) -> None:
        """Remember the heads."""
        super().__init__()
        self._split = split
        self._saving = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Split attention, and leave every other function alone."""
        kwargs = kwargs or {}
        saving = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if torch.is_grad_enabled() and saving == self._saving:
            if func is F.scaled_dot_product_attention:
                return attend(self._split, *args, **kwargs)
            if func in _PRODUCTS and len(args) == 2 and not kwargs:
                return multiply(self._split, *args)
            if func is attention_weights:
                return _weigh(self._split, *args)
        return func(*args, **kwargs)


_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


def attend(
    split: Split,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Return ``F.scaled_dot_product_attention`` whose backward runs for some heads only.

    Args:
        split: Which heads those are.
        query: Shape ``[..., H, T, width]``.
        key: Shape ``[..., H or G, S, width]``.
        value: Shape ``[..., H or G, S, width']``.
        attn_mask: Broadcast over heads, or one for each.
        args: Dropout and so on.
        kwargs: The same.

    Returns:
        Shape ``[..., H, T, width']``; the plain call's wherever the shapes are others than these.
    """
    run = F.scaled_dot_product_attention
    if not split.fits(query, key, value, attn_mask):
        query, key, value = ordinary(query), ordinary(key), ordinary(value)
        return run(query, key, value, attn_mask, *args, **kwargs)
    if attn_mask is None or attn_mask.dim() < 3 or attn_mask.shape[HEADS] == 1:
        return _apart(
            split, lambda q, k, v: run(q, k, v, attn_mask, *args, **kwargs), query, key, value
        )
    return _apart(
        split, lambda q, k, v, m: run(q, k, v, m, *args, **kwargs), query, key, value, attn_mask
    )


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """Return the softmax of scaled scores, as ``nn.MultiheadAttention`` computes it.

    Args:
        query: Shape ``[B, H, T, width]``.
        key: Shape ``[B, H, S, width]``.
        bias: Added to the scores, shape ``[1, 1, T, S]`` or ``[B, H, T or 1, S]``, or None.

    Returns:
        Shape ``[B, H, T, S]``.
    """
    if has_torch_function((query, key)):
        return handle_torch_function(attention_weights, (query, key), query, key, bias)
    batch, heads, length, width = query.shape
    scaled = query.reshape(batch * heads, length, width) * math.sqrt(1.0 / width)
    keys = key.reshape(batch * heads, -1, width).transpose(-2, -1)
    if bias is None:
        scores = torch.bmm(scaled, keys)
    else:
        scores = torch.baddbmm(bias.flatten(0, 1), scaled, keys)
    return F.softmax(scores, dim=-1).view(batch, heads, length, -1)


def _weigh(split: Split, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """Return :func:`attention_weights` whose backward runs for some heads only."""
    if bias is None or bias.shape[HEADS] == 1:
        return _apart(split, lambda q, k: attention_weights(q, k, bias), query, key)
    return _apart(split, attention_weights, query, key, bias)


def multiply(split: Split, a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` whose backward runs for some heads only.

    Args:
        split: Which heads those are.
        a: Shape ``[batch, H, n, m]``.
        b: Shape ``[batch, H, m, k]``.

    Returns:
        Shape ``[batch, H, n, k]``; the plain product's wherever the shapes are others than these.
    """
    shapes = tuple(getattr(a, "shape", ())), tuple(getattr(b, "shape", ()))
    # Where another dimension has the same size, nothing tells which of them is the heads'.
    if any(len(s) < 4 or s[HEADS] != split.heads or s.count(split.heads) > 1 for s in shapes):
        return torch.matmul(a, b)
    return _apart(split, torch.matmul, a, b)


def _apart(split: Split, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return what ``run`` makes of some heads with gradients and of the others without, as one."""
    if split.none:
        with torch.no_grad():
            return run(*(split.values(t) for t in tensors))
    trained = run(*(split.trained(t) for t in tensors))
    with torch.no_grad():
        rested = run(*(split.rested(t) for t in tensors))
        chosen, others = split.chosen(trained.shape[HEADS] + rested.shape[HEADS])
        full = joined(trained, rested, chosen, others)
    return Partly.make(full, trained, chosen, HEADS, split.look)


class TakeHeads(torch.autograd.Function):
    """Some heads of a tensor ``[..., heads, tokens, width]``, as a tensor of their own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, chosen: Selection) -> Tensor:
        """Return a copy, so that what autograd saves does not keep all heads alive."""
        ctx.chosen, ctx.shape, ctx.strides = chosen, tensor.shape, tensor.stride()
        return chosen.copy(tensor, HEADS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return zeros for the other heads, in the memory order that the tensor had."""
        order = sorted(range(len(ctx.shape)), key=lambda i: -ctx.strides[i])
        result = grad.new_zeros([ctx.shape[i] for i in order])
        result = result.permute([order.index(i) for i in range(len(order))])
        ctx.chosen.put(grad, result, HEADS)
        return result, None


def joined(trained: Tensor, rested: Tensor, chosen: Selection, others: Selection) -> Tensor:
    """Return all heads in order, in the memory order in which attention returned them."""
    *batch, _, tokens, width = trained.shape
    if trained.stride(HEADS) <= trained.stride(-2):  # tokens before heads, as most kernels do
        result = trained.new_empty(*batch, tokens, chosen.size, width).transpose(-2, HEADS)
    else:
        result = trained.new_empty(*batch, chosen.size, tokens, width)
    chosen.put(trained, result, HEADS)
    others.put(rested, result, HEADS)
    return result


def splitting(run: Forward, split: Split | None) -> Forward:
    """Return a module's forward in which the attention of heads at rest has no backward.

    Args:
        run: The forward.
        split: Which heads rest, None where none does.
    """

    def split_run(*args: Any, **kwargs: Any) -> Any:
        # A compiled model runs attention plainly: the projections around cut its gradients, which
        # is right, and keeps the decision out of the graph.
        if torch.compiler.is_compiling() or split is None:
            return run(*args, **kwargs)
        with SplitAttention(split):
            return run(*args, **kwargs)

    return split_run
