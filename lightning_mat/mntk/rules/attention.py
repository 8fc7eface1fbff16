"""``nn.MultiheadAttention``, written so that its projections are separate linear calls.

The module passes its packed weight and its output projection to one functional call, so that no
hook on a layer ever sees them. For a probe its forward is replaced by this one, which computes the
same from the same parameters.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mat.mntk.factors import Factor
from lightning_mat.mntk.rules.base import LayerRule, register_explicit_forward
from lightning_mat.mntk.rules.linear import LinearRule


class Observer(Protocol):
    """What records the linear calls: see :class:`lightning_mat.mntk.tape.Tape`."""

    names: dict[int, str]

    def observe(
        self,
        site: str,
        module: nn.Module,
        rule: LayerRule,
        names: dict[str, str],
        x: Tensor,
        y: Tensor,
    ) -> Tensor:
        """Record a call and return its output."""
        ...


class PackedRowsRule(LinearRule):
    """A linear call with some rows of a packed weight: the other rows' gradient is zero."""

    def __init__(self, start: int, stop: int, total: int) -> None:
        self.before, self.after = start, total - stop

    def factors(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Factor]:
        """Return the factors of the packed ``weight`` and ``bias``."""
        return super().factors(module, x, F.pad(grad, (self.before, self.after)))


@register_explicit_forward(nn.MultiheadAttention)
def attention_forward(
    module: nn.Module,
    tape: Observer,
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``nn.MultiheadAttention.forward``, observing every projection.

    Raises:
        ValueError: If the module adds ``bias_k``/``bias_v`` or a zero key, which this does not do.
    """
    attention = cast(nn.MultiheadAttention, module)
    if attention.bias_k is not None or attention.add_zero_attn:
        raise ValueError(
            f"layer {name!r} uses add_bias_kv or add_zero_attn, for which there is no per-sample "
            "gradient rule: leave it out of the units, or switch them off"
        )
    batched = query.dim() == 3
    query, key, value = _project_inputs(attention, tape, name, query, key, value)
    if not batched:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
    elif not attention.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    heads = attention.num_heads
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    mask = _additive_mask(attn_mask, key_padding_mask, query, key)
    if need_weights:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = (scores if mask is None else scores + mask).softmax(-1)
        context = weights @ value
    else:
        context = F.scaled_dot_product_attention(query, key, value, mask)
    context = context.transpose(1, 2).flatten(2)
    if not batched:
        context = context.squeeze(0)
    elif not attention.batch_first:
        context = context.transpose(0, 1)
    projection = attention.out_proj
    out = _observed(
        attention,
        tape,
        f"{name}:out",
        LinearRule(),
        context,
        (projection.weight, projection.bias),
        F.linear(context, projection.weight, projection.bias),
    )
    if not need_weights:
        return out, None
    weights = weights.mean(1) if average_attn_weights else weights
    return out, weights if batched else weights.squeeze(0)


def _project_inputs(
    attention: nn.MultiheadAttention,
    tape: Observer,
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the projected query, key and value, in the layout in which they came."""
    size = attention.embed_dim
    bias = attention.in_proj_bias
    packed = attention.in_proj_weight
    inputs = {"query": query, "key": key, "value": value}
    if packed is None:
        separate = {
            "query": attention.q_proj_weight,
            "key": attention.k_proj_weight,
            "value": attention.v_proj_weight,
        }
        outs = []
        for i, (part, x) in enumerate(inputs.items()):
            rows = slice(i * size, (i + 1) * size)
            y = F.linear(x, separate[part], None if bias is None else bias[rows])
            weight_site = f"{name}:{part}"
            y = _observed(attention, tape, weight_site, LinearRule(), x, (separate[part], None), y)
            if bias is not None:
                rule = PackedRowsRule(rows.start, rows.stop, 3 * size)
                y = _observed(attention, tape, f"{weight_site}.bias", rule, x, (None, bias), y)
            outs.append(y)
        return outs[0], outs[1], outs[2]
    if query is key and key is value:
        y = F.linear(query, packed, bias)
        y = _observed(attention, tape, f"{name}:in", LinearRule(), query, (packed, bias), y)
        q, k, v = y.chunk(3, -1)
        return q, k, v
    outs = []
    for i, (part, x) in enumerate(inputs.items()):
        rows = slice(i * size, (i + 1) * size)
        y = F.linear(x, packed[rows], None if bias is None else bias[rows])
        rule = PackedRowsRule(rows.start, rows.stop, 3 * size)
        outs.append(_observed(attention, tape, f"{name}:{part}", rule, x, (packed, bias), y))
    return outs[0], outs[1], outs[2]


def _observed(
    attention: nn.MultiheadAttention,
    tape: Observer,
    site: str,
    rule: LayerRule,
    x: Tensor,
    parameters: tuple[Tensor | None, Tensor | None],
    y: Tensor,
) -> Tensor:
    """Record a linear call with the parameters of it that are tracked."""
    names = {
        attribute: tape.names[id(parameter)]
        for attribute, parameter in zip(("weight", "bias"), parameters, strict=True)
        if parameter is not None and id(parameter) in tape.names
    }
    return tape.observe(site, attention, rule, names, x, y) if names else y


def _additive_mask(
    attn_mask: Tensor | None, padding: Tensor | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """Merge the masks into one that is added to the scores, [S or 1, heads or 1, T, T_k]."""
    total: Tensor | None = None
    if attn_mask is not None:
        total = _additive(attn_mask, query)
        if total.dim() == 3:
            total = total.view(query.shape[0], query.shape[1], *total.shape[1:])
    if padding is not None:
        hidden = _additive(padding, query).view(-1, 1, 1, key.shape[2])
        total = hidden if total is None else total + hidden
    return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
    return mask.to(like.dtype)
