"""Gate rule for ``nn.Embedding``: rows of a vocabulary, and features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mat.gate.compiled import Gradients, Needs
from lightning_mat.gate.once import once_differentiable
from lightning_mat.gate.plan import covers, training_blocks
from lightning_mat.gate.rules import Forward, Rest, Static, register_gate_rule
from lightning_mat.gate.selection import Selection, place


@dataclass(frozen=True)
class Slab:
    """Rows of the table that train in the same features.

    Attributes:
        rows: The rows.
        features: The features.
        places: For each row of the table its place among these, or their number, int64.
    """

    rows: Selection
    features: Selection
    places: Tensor


class PartialEmbedding(torch.autograd.Function):
    """Look-up in a table of which some rows train.

    In the backward pass every token gets the place of its row among those that train, and all
    tokens whose row rests get one place more, which the operation leaves out as it does padding:
    nothing depends on how many there are, so that no device has to be waited for.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, tokens: Tensor, layer: nn.Embedding, plan: EmbeddingPlan
    ) -> Tensor:
        """Return the rows of the tokens.

        Args:
            ctx: What autograd keeps for the backward pass.
            weight: The table, shape ``[rows, features]``.
            tokens: Integers of any shape.
            layer: The layer, for its options.
            plan: What trains.
        """
        ctx.plan, ctx.layer, ctx.dtype = plan, layer, weight.dtype
        ctx.save_for_backward(tokens)
        return _embedding(layer, tokens, weight, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the table's gradient."""
        (tokens,) = ctx.saved_tensors
        return _gradient(ctx.layer, ctx.plan, grad, tokens).to(ctx.dtype), None, None, None


@dataclass
class EmbeddingPlan:
    """What of a table trains.

    Attributes:
        slabs: The parts that do.
        rest: The table's :class:`Rest`, None where all of it trains.
    """

    slabs: list[Slab]
    rest: Rest | None


def embedding_rule(module: nn.Module, rests: Mapping[str, Rest]) -> Forward | None:
    """Return the forward of an embedding of which something rests."""
    if not covers(module, rests):
        return None
    layer = cast(nn.Embedding, module)
    rest = rests["weight"]
    if rest.whole:
        return lambda input: _embedding(layer, input, layer.weight.detach(), None)
    if layer.sparse:  # the hook refuses the gradient when it comes, with the reason
        return lambda input: _embedding(layer, input, layer.weight, None)
    plan = _plan(layer, rest)
    return lambda input: PartialEmbedding.apply(layer.weight, input, layer, plan)


def embedding_gradients(module: nn.Module, rests: Mapping[str, Rest]) -> Gradients | None:
    """Return what computes the gradient of an embedding in a compiled model."""
    layer = cast(nn.Embedding, module)
    if not covers(module, rests) or layer.sparse:
        return None
    plan = _plan(layer, rests.get("weight"))

    def gradients(
        grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        wanted = needs[1] and plan.slabs
        return None, _gradient(layer, plan, grad, x).to(weight.dtype) if wanted else None, None

    return gradients


def _embedding(layer: nn.Embedding, tokens: Tensor, weight: Tensor, bias: object) -> Tensor:
    return F.embedding(
        tokens,
        weight,
        layer.padding_idx,
        layer.max_norm,
        layer.norm_type,
        layer.scale_grad_by_freq,
        layer.sparse,
    )


def _gradient(layer: nn.Embedding, plan: EmbeddingPlan, grad: Tensor, tokens: Tensor) -> Tensor:
    """Return the table's gradient from that of what was looked up, ``[..., features]``."""
    scale = layer.scale_grad_by_freq
    if plan.rest is None:
        padding = -1 if layer.padding_idx is None else layer.padding_idx
        return _scatter(grad, tokens, layer.num_embeddings, padding, scale)
    result = plan.rest.zeros(grad.dtype)
    for slab in plan.slabs:
        n = len(slab.rows)
        places = slab.places.to(tokens.device)[tokens]
        table = _scatter(slab.features.take(grad, -1), places, n + 1, n, scale)
        place(table[:n], result, slab.rows, slab.features)
    return plan.rest.deliver(result)


def _scatter(grad: Tensor, tokens: Tensor, rows: int, padding: int, scale: bool) -> Tensor:
    out = torch.ops.aten.embedding_dense_backward(grad, tokens, rows, padding, scale)
    return cast(Tensor, out)


def _plan(layer: nn.Embedding, rest: Rest | None) -> EmbeddingPlan:
    n_rows, n_features = layer.weight.shape
    device = layer.weight.device
    slabs = []
    for block in training_blocks(layer.weight, rest):
        rows = Selection(block.rows, n_rows, device)
        places = torch.full((n_rows,), len(rows), dtype=torch.int64)
        start = 0
        for a, b in block.rows:
            places[a:b] = torch.arange(start, start + b - a)
            start += b - a
        if layer.padding_idx is not None:
            places[layer.padding_idx] = len(rows)
        slabs.append(Slab(rows, Selection(block.columns, n_features, device), places.to(device)))
    return EmbeddingPlan(slabs, rest)


register_gate_rule(
    nn.Embedding, embedding_rule, static=Static(plain=_embedding, gradients=embedding_gradients)
)
