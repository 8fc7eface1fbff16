"""Gate rule for ``nn.MultiheadAttention``, whose forward reads packed weights itself."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mat.gate import compiled, linear
from lightning_mat.gate.forward import inside
from lightning_mat.gate.heads import attention_weights
from lightning_mat.gate.once import once_differentiable
from lightning_mat.gate.rules import Forward, Rest, register_gate_rule
from lightning_mat.units.regions import Block

# A product: its weight, its bias, and which rows of the packed ones it is, None for all.
Key = tuple[str, str, tuple[int, int] | None]

OUT: Key = ("out_proj.weight", "out_proj.bias", None)


@dataclass(frozen=True)
class RowsRest(Rest):
    """What rests of some rows of a packed parameter; ``param`` has their shape, and no data.

    Attributes:
        packed: What rests of all of it.
    """

    packed: Rest | None = None

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """Return a gradient of these rows, zero."""
        device = None if self.packed is None else self.packed.param.device
        return torch.zeros(self.param.shape, dtype=dtype, device=device)


def rows_rest(rest: Rest | None, rows: tuple[int, int] | None) -> Rest | None:
    """Return what rests of rows ``[start, stop)`` of a parameter, None where nothing does."""
    if rest is None or rows is None or rows == (0, len(rest.param)):
        return rest
    start, stop = rows
    shape = (stop - start, *rest.param.shape[1:])

    def clip(blocks: Sequence[Block]) -> tuple[Block, ...]:
        clipped = []
        for block in blocks:
            runs = [(max(a, start) - start, min(b, stop) - start) for a, b in block.rows]
            runs = [(a, b) for a, b in runs if a < b]
            if runs:
                clipped.append(Block(tuple(runs), block.columns))
        return tuple(clipped)

    trains, passes = clip(rest.blocks), clip(rest.passing)
    stand_in = cast(nn.Parameter, torch.empty(shape, device="meta"))
    if sum(block.numel for block in trains) == stand_in.numel():
        return None
    return RowsRest(stand_in, trains, passes, packed=rest)


class Rows(torch.autograd.Function):
    """Parts of a packed parameter, whose gradients are put together in one piece."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, sizes: Sequence[int], rest: Rest) -> Any:
        """Return consecutive rows of ``packed``, so many in each part."""
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.rest = list(sizes), rest
        return tuple(part.detach() for part in packed.split(ctx.sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradient of the packed parameter, whose parts are zero where they rest."""
        rest: Rest = ctx.rest
        if all(grad is None for grad in grads):  # what came after passed none on
            return None, None, None
        result = rest.zeros(next(g.dtype for g in grads if g is not None))
        for target, grad in zip(result.split(ctx.sizes), grads, strict=True):
            if grad is None:
                target.zero_()
            else:
                target.copy_(grad)
        return rest.deliver(result), None, None


class Attention:
    """The forward of an ``nn.MultiheadAttention`` of which something may rest.

    Step by step ``F.multi_head_attention_forward``, with products that skip. There is one for each
    module, whatever rests, so that compiled models always see the same one.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.MultiheadAttention) -> None:
        """Number the module's products, for compiled models."""
        self._rests: Mapping[str, Rest] = {}
        self._plans: dict[Key, linear.LinearPlan] = {}
        width = module.embed_dim
        edges = [(0, 3), (0, 1), (1, 3), (1, 2), (2, 3)]
        names = ["in_proj_weight"] * len(edges)
        if module.in_proj_weight is None:
            edges, names = [(0, 1), (1, 2), (2, 3)], [f"{x}_proj_weight" for x in "qkv"]
        keys = [
            (name, "in_proj_bias", (a * width, b * width))
            for name, (a, b) in zip(names, edges, strict=True)
        ]
        self._sites = {key: compiled.Place(F.linear) for key in (OUT, *keys)}

    def let(self, module: nn.MultiheadAttention, rests: Mapping[str, Rest]) -> None:
        """Set what rests from now on."""
        self._rests, self._plans = rests, {}
        # Weakly: this lives as long as the module, and must not keep it alive.
        seen = weakref.ref(module)

        def gradients(key: Key) -> compiled.Gradients | None:
            layer = seen()
            return None if layer is None else _gradients(self._plan(layer, key))

        for key, site in self._sites.items():
            site.let(functools.partial(gradients, key))

    def _plan(self, module: nn.MultiheadAttention, key: Key) -> linear.LinearPlan:
        """Return what is computed of one product's gradients, planned when it first runs."""
        if key in self._plans:
            return self._plans[key]
        name, bias_name, rows = key
        weight_rows = rows if name == "in_proj_weight" else None
        layer = SimpleNamespace(
            weight=_rows(_parameter(module, name), weight_rows),
            bias=_rows(_parameter(module, bias_name), rows),
        )
        found = {
            "weight": rows_rest(self._rests.get(name), weight_rows),
            "bias": rows_rest(self._rests.get(bias_name), rows),
        }
        rests = {own: rest for own, rest in found.items() if rest is not None}
        plan = linear.linear_plan(cast(nn.Module, layer), rests, input_major=False)
        self._plans[key] = plan
        return plan

    def _linear(
        self,
        module: nn.MultiheadAttention,
        x: Tensor,
        key: Key,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Return ``x Wᵀ + b``."""
        if torch.compiler.is_compiling():
            site = self._sites[key]
            return cast(
                Tensor, compiled.StaticLayer.apply(x, weight, bias, _product, None, site.number)
            )
        plan = self._plan(module, key)
        if plan.weight_rest is None and plan.bias_rest is None:
            return F.linear(x, weight, bias)
        layer = cast(nn.Linear, SimpleNamespace(weight=weight, bias=bias))
        return linear.run_linear(layer, x, plan)

    def _split(self, packed: Tensor | None, name: str, sizes: Sequence[int]) -> Sequence[Any]:
        """Return parts of a packed parameter."""
        if packed is None:
            return [None] * len(sizes)
        if len(sizes) == 1:
            return [packed]
        if torch.compiler.is_compiling():
            return list(packed.split(list(sizes)))
        rest = self._rests.get(name)
        if rest is None or rest.whole:
            return list(packed.split(list(sizes)))
        return cast("tuple[Tensor, ...]", Rows.apply(packed, sizes, rest))

    def _project(
        self, module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each ``[tokens, batch, E]``."""
        width, packed = module.embed_dim, module.in_proj_weight
        bias = module.in_proj_bias
        inputs: list[Tensor]
        if packed is not None and query is key is value:
            inputs, parts = [query], [3]
        elif packed is not None and key is value:
            inputs, parts = [query, key], [1, 2]
        else:
            inputs, parts = [query, key, value], [1, 1, 1]
        sizes = [part * width for part in parts]
        if packed is not None:
            names = ["in_proj_weight"] * len(parts)
            weights = self._split(packed, "in_proj_weight", sizes)
        else:
            names = [f"{x}_proj_weight" for x in "qkv"]
            weights = [module._parameters[name] for name in names]
        biases = self._split(bias, "in_proj_bias", sizes)
        outputs: list[Tensor] = []
        start = 0
        for x, name, size, w, b in zip(inputs, names, sizes, weights, biases, strict=True):
            out = self._linear(module, x, (name, "in_proj_bias", (start, start + size)), w, b)
            start += size
            if size == width:
                outputs.append(out)
                continue
            count = size // width
            out = out.unflatten(-1, (count, width)).unsqueeze(0).transpose(0, -2).squeeze(-2)
            outputs.extend(out.contiguous().unbind(0))
        q, k, v = outputs
        return q, k, v

    def __call__(
        self,
        module: nn.MultiheadAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the module returns for these arguments."""
        batched = query.dim() == 3
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is None: pass that, too")
        padding = F._canonical_mask(
            mask=key_padding_mask,
            mask_name="key_padding_mask",
            other_type=F._none_or_dtype(attn_mask),
            other_name="attn_mask",
            target_type=query.dtype,
        )
        mask = F._canonical_mask(
            mask=attn_mask,
            mask_name="attn_mask",
            other_type=None,
            other_name="",
            target_type=query.dtype,
            check_other=False,
        )
        if not batched:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            padding = None if padding is None else padding.unsqueeze(0)
        elif module.batch_first:  # inputs that are the same stay the same: one product for all
            if key is value:
                query, key = _time_first(query, key)
                value = key
            else:
                query, key, value = (x.transpose(1, 0) for x in (query, key, value))
        length, batch, width = query.shape
        heads, source = module.num_heads, key.shape[0]

        def apart(x: Tensor, tokens: int) -> Tensor:
            x = x.view(tokens, batch * heads, width // heads).transpose(0, 1)
            return x.view(batch, heads, tokens, width // heads)

        projected = self._project(module, query, key, value)
        q, k, v = (apart(x, n) for x, n in zip(projected, (length, source, source), strict=True))
        hint = is_causal and padding is None and not need_weights
        bias = None if hint else _scores_bias(mask, padding, batch, heads)
        dropout = module.dropout if module.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            weights = attention_weights(q, k, bias)
            weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, bias, dropout, hint)
        mixed = mixed.permute(2, 0, 1, 3).reshape(length * batch, width)
        out_proj = module.out_proj
        out = self._linear(module, mixed, OUT, out_proj.weight, out_proj.bias)
        out = out.view(length, batch, width)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return (out.transpose(1, 0) if module.batch_first else out), weights


def _time_first(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    moved = query.transpose(1, 0)
    return moved, moved if query is key else key.transpose(1, 0)


def _scores_bias(
    mask: Tensor | None, padding: Tensor | None, batch: int, heads: int
) -> Tensor | None:
    """Return what both masks add to the scores ``[batch, heads, L, S]``, in a shape that fits."""
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(0)
    if padding is not None:
        source = padding.shape[-1]
        padding = padding.view(batch, 1, 1, source).expand(-1, heads, -1, -1)
        padding = padding.reshape(batch * heads, 1, source)
        mask = padding if mask is None else mask + padding
    if mask is None:
        return None
    if mask.shape[0] == 1:
        return mask.unsqueeze(0)
    return mask.view(batch, heads, -1, mask.shape[-1])


def _product(module: object, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _gradients(plan: linear.LinearPlan) -> compiled.Gradients:
    return lambda *args: linear.all_gradients(plan, *args)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    path, _, own = name.rpartition(".")
    return inside(module, path)._parameters[own]


def _rows(tensor: Tensor | None, rows: tuple[int, int] | None) -> Tensor | None:
    return tensor if tensor is None or rows is None else tensor[rows[0] : rows[1]]


_attentions: weakref.WeakKeyDictionary[nn.Module, Attention] = weakref.WeakKeyDictionary()


def attention_rule(module: nn.Module, rests: Mapping[str, Rest]) -> Forward | None:
    """Return the forward of an ``nn.MultiheadAttention`` of which something rests."""
    layer = cast(nn.MultiheadAttention, module)
    if layer.bias_k is not None or layer.bias_v is not None or layer.add_zero_attn:
        return None
    if "weight" not in layer.out_proj._parameters or "in_proj_weight" not in layer._parameters:
        return None  # computed from other parameters
    attention = _attention_of(layer)
    attention.let(layer, rests)

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return attention(layer, *args, **kwargs)

    return run


def _attention_of(module: nn.MultiheadAttention) -> Attention:
    """Return the one forward that a module has."""
    if module not in _attentions:
        _attentions[module] = Attention(module)
    return _attentions[module]


# Its forward hands the packed in_proj_weight and out_proj's weight to one functional call and
# never calls out_proj.
register_gate_rule(nn.MultiheadAttention, attention_rule, reads=("out_proj",), always=True)
