"""Mixtures that keep their experts in one tensor for each parameter, in every way they run them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SKIPS = ["weights", "units"]
DECISIONS = [[True, False, True, False], [False, True, True, True], [False] * 4]
TOKENS, WIDTH, INNER = 40, 16, 24


class Stack(nn.Module):
    """The forward that Hugging Face's mixtures have, with biases and either layout."""

    def __init__(self, biases: bool, turned: bool) -> None:
        super().__init__()
        up, down = (4, WIDTH, INNER), (4, INNER, WIDTH)
        self.turned = turned
        self.up_proj = nn.Parameter(torch.randn(up if turned else (4, INNER, WIDTH)))
        self.down_proj = nn.Parameter(torch.randn(down if turned else (4, WIDTH, INNER)))
        self.up_bias = nn.Parameter(torch.randn(4, INNER)) if biases else None
        self.down_bias = nn.Parameter(torch.randn(4, WIDTH)) if biases else None

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.turned:
            out = x @ weight
            return out if bias is None else out + bias
        return F.linear(x, weight, bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for e in range(4):
            token, place = torch.where(top_k_index == e)
            b = (None, None) if self.up_bias is None else (self.up_bias[e], self.down_bias[e])
            h = F.gelu(self.product(hidden_states[token], self.up_proj[e], b[0]))
            y = self.product(h, self.down_proj[e], b[1]) * top_k_weights[token, place, None]
            out.index_add_(0, token, y)
        return out


class Own(Stack):
    """A mixture of one's own that makes grouped products."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen, order = top_k_index.flatten().sort()
        ends = torch.bincount(chosen, minlength=4).cumsum(0, dtype=torch.int32)
        rows = hidden_states[order // top_k_index.shape[1]]
        h = F.gelu(F.grouped_mm(rows, self.up_proj.transpose(1, 2), offs=ends))
        y = F.grouped_mm(h, self.down_proj.mT, offs=ends)
        y = y * top_k_weights.flatten()[order, None]
        out = torch.zeros_like(hidden_states)
        return out.index_add(0, order // top_k_index.shape[1], y)


class Turned(Stack):
    """Its products take the parameters as they are, and its biases one for each row."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen, order = top_k_index.flatten().sort()
        numbers = torch.arange(4)
        ends = (chosen[:, None] <= numbers).sum(0, dtype=torch.int32)
        rows = hidden_states[order // top_k_index.shape[1]]
        h = F.gelu(self.up(rows, chosen, ends))
        y = F.grouped_mm(h, self.down_proj, offs=ends) + self.down_bias[chosen]
        y = y * top_k_weights.flatten()[order, None]
        out = torch.zeros_like(hidden_states)
        return out.index_add(0, order // top_k_index.shape[1], y)

    def up(self, rows: Tensor, chosen: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(rows, self.up_proj, offs=ends) + self.up_bias[chosen]


class Gathering(Stack):
    """It takes out one matrix for each row, counted from behind, and multiplies with ``@``."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        numbers = top_k_index[:, 0] - 4
        h = F.gelu(self.up_proj[numbers] @ hidden_states.unsqueeze(2))
        y = self.down_proj[numbers].bmm(h).squeeze(2)
        return y * top_k_weights[:, :1]


class Mixed(Own):
    """One whose second product goes through the experts one by one."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        h = F.grouped_mm(
            hidden_states, self.up_proj.mT, offs=torch.arange(1, 5, dtype=torch.int32) * 10
        )
        return torch.stack([h @ self.down_proj[e].T for e in range(4)])


class Fallen(Stack):
    """A mixture on a device without a kernel for grouped products, as Hugging Face's run there."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        product = torch.ops.transformers.grouped_mm_fallback
        chosen, order = top_k_index.flatten().sort()
        ends = torch.bincount(chosen, minlength=4).cumsum(0, dtype=torch.int32)
        rows = hidden_states[order // top_k_index.shape[1]]
        h = F.gelu(product(rows, self.up_proj.transpose(1, 2), offs=ends))
        y = product(h, self.down_proj.transpose(1, 2), offs=ends)
        y = y * top_k_weights.flatten()[order, None]
        out = torch.zeros_like(hidden_states)
        return out.index_add(0, order // top_k_index.shape[1], y)


class Holder(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args: Tensor) -> Tensor:
        return self.experts(*args)


def routed(dtype: torch.dtype, unused: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(TOKENS)])
    if unused is not None:
        index[index == unused] = (unused + 1) % 4
    x = torch.randn(TOKENS, WIDTH, dtype=dtype).requires_grad_()
    return x, index, torch.rand(TOKENS, 2, dtype=dtype).requires_grad_()


def mixtral_experts(implementation: str, dtype: torch.dtype) -> Holder:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    config = MixtralConfig(hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=4)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    model = Holder(mixtral.MixtralExperts(config))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.to(dtype)
