"""A Switch-Transformer encoder in one file: every token visits one of E feed-forward experts.

All sizes of the routing follow from the batch's shape, so that the host never waits for the device
to count tokens. A sample's tokens compete for its own places only: experts see ``[S, capacity, H]``
with the sample first, and what a sample gets does not depend on the others of its batch.

Source:
    Fedus et al., "Switch Transformers" (JMLR 2022): top-1 routing, capacity, load-balancing loss
    (section 2.2). Groups of tokens that compete for an expert's places are from Lepikhin et al.,
    "GShard" (ICLR 2021); here a group is a sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.models.bert import BertConfig, FeedForward, MaskedWords, SelfAttention


@dataclass(frozen=True)
class SwitchConfig(BertConfig):
    """Size of a Switch encoder: BERT's, and its experts.

    Args:
        experts: Experts per layer, E.
        capacity_factor: Places of an expert over its even share of the tokens; what comes when they
            are full is dropped: it passes the layer by its residual connection alone.

    Raises:
        ValueError: If there is no expert, or the factor is not positive.
    """

    experts: int = 4
    capacity_factor: float = 1.5

    def __post_init__(self) -> None:
        """Check the sizes."""
        super().__post_init__()
        if self.experts < 1 or self.capacity_factor <= 0:
            raise ValueError(
                "experts must be ≥ 1 and capacity_factor > 0, got "
                f"{self.experts} and {self.capacity_factor}"
            )

    def capacity(self, tokens: int) -> int:
        """Return the places of one expert for a sample of so many tokens.

        Example:
            >>> SwitchConfig(1, 64).capacity(128)
            48
        """
        return math.ceil(self.capacity_factor * tokens / self.experts)


#: (layers, hidden) of the sizes; "paper" is the MAT paper's, with 12 heads (table 4).
SWITCH_PRESETS: dict[str, tuple[int, int]] = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "paper": (12, 768),
}


def switch_preset(
    name: str,
    *,
    vocab_size: int = 30_522,
    max_length: int = 512,
    dropout: float = 0.1,
    experts: int = 4,
    capacity_factor: float = 1.5,
) -> SwitchConfig:
    """Return the configuration of a size.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> paper = switch_preset("paper")
        >>> paper.layers, paper.heads, paper.experts, paper.capacity_factor
        (12, 12, 4, 1.5)
    """
    if name not in SWITCH_PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(SWITCH_PRESETS)}")
    layers, hidden = SWITCH_PRESETS[name]
    return SwitchConfig(layers, hidden, vocab_size, max_length, dropout, experts, capacity_factor)


class SwitchOutput(NamedTuple):
    """What the model returns.

    Attributes:
        logits: Shape ``[S, M, V]``.
        balance: Load-balancing loss, the mean over the layers; add a hundredth of it to the loss.
        dropped: Share of tokens that found no place, the mean over the layers.
    """

    logits: Tensor
    balance: Tensor
    dropped: Tensor


class Mixture(nn.Module):
    r"""Experts of which each token visits the most probable, ``[S, T, H] → [S, T, H]``.

    With router probabilities :math:`p = \operatorname{softmax}(W_r x)`, token :math:`x` becomes
    :math:`p_e \operatorname{expert}_e(x)`, :math:`e = \arg\max p`, or 0 if the expert is full.
    """

    def __init__(self, config: SwitchConfig) -> None:
        """Make router and experts."""
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.hidden, config.experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mixture, the load-balancing loss and the share of dropped tokens."""
        places = self.config.capacity(x.shape[1])
        # Products in half precision move tokens between experts: the softmax stays in float32.
        probabilities = self.router(x).float().softmax(-1)  # [S, T, E]
        gate, chosen = probabilities.max(-1)  # [S, T]
        slot, kept = assign(chosen, self.config.experts, places)
        inputs = _take(x, _tokens_by_slot(slot, self.config.experts * places))
        parts = inputs.unflatten(1, (self.config.experts, places)).unbind(1)
        outputs = torch.cat(
            [expert(part) for expert, part in zip(self.experts, parts, strict=True)], dim=1
        )
        # A dropped token reads the last place, and nothing of it.
        mixed = _take(outputs, slot.clamp(max=outputs.shape[1] - 1))
        mixed = mixed * (gate * kept).unsqueeze(-1).to(x.dtype)
        return mixed, balance_loss(probabilities, chosen), 1 - kept.float().mean()


def assign(chosen: Tensor, experts: int, places: int) -> tuple[Tensor, Tensor]:
    """Give each token a place with its expert, first come, first served within a sample.

    Args:
        chosen: Expert of each token, int64, shape ``[S, T]``.
        experts: Experts, E.
        places: Places of an expert.

    Returns:
        The slot, ``expert · places + place``, or ``E · places`` for a token that is dropped, int64,
        shape ``[S, T]``; and whether the token found a place, bool, shape ``[S, T]``.

    Example:
        >>> assign(torch.tensor([[1, 0, 1, 1]]), experts=2, places=2)
        (tensor([[2, 0, 3, 4]]), tensor([[ True,  True,  True, False]]))
    """
    # F.one_hot would ask the device for the largest index.
    visits = chosen.unsqueeze(-1) == torch.arange(experts, device=chosen.device)
    place = visits.cumsum(1).take_along_dim(chosen.unsqueeze(-1), dim=-1).squeeze(-1) - 1
    kept = place < places
    return torch.where(kept, chosen * places + place, experts * places), kept


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    r"""Return the load-balancing loss, 1 where all experts get equally many tokens.

    .. math:: E \sum_e f_e P_e,

    :math:`f_e` the share of the tokens that choose expert :math:`e`, :math:`P_e` its mean
    probability; gradients flow through :math:`P_e` only.

    Args:
        probabilities: Of the router, shape ``[S, T, E]``.
        chosen: Expert of each token, int64, shape ``[S, T]``.

    Source:
        Fedus et al., equations 4 to 6, without the factor α.
    """
    experts = probabilities.shape[-1]
    visits = chosen.unsqueeze(-1) == torch.arange(experts, device=chosen.device)
    return experts * (visits.float().mean((0, 1)) * probabilities.mean((0, 1))).sum()


def _tokens_by_slot(slot: Tensor, slots: int) -> Tensor:
    """Return which token sits in each slot, ``[S, T] → [S, slots]``.

    An empty slot reads token 0; as nobody reads its expert's output, it adds to no gradient.
    """
    samples, tokens = slot.shape
    # The last column takes the dropped tokens.
    found = torch.zeros(samples, slots + 1, dtype=torch.int64, device=slot.device)
    found.scatter_(1, slot, torch.arange(tokens, device=slot.device).expand_as(slot))
    return found[:, :slots]


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Return rows of each sample, ``[S, N, H], [S, M] → [S, M, H]``."""
    samples, number, _ = rows.shape
    start = number * torch.arange(samples, device=index.device).unsqueeze(1)
    # Unlike take_along_dim, whose backward pass adds element by element.
    taken = rows.flatten(0, 1).index_select(0, (index + start).flatten())
    return taken.unflatten(0, (samples, -1))


class Layer(nn.Module):
    """One encoder layer: attention, then the mixture; residual first, normalise after."""

    def __init__(self, config: SwitchConfig) -> None:
        """Make the two blocks and their norms."""
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.mixture = Mixture(config)
        self.mixture_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the hidden states, the load-balancing loss and the share of dropped tokens."""
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        mixed, balance, dropped = self.mixture(x)
        return self.mixture_norm(x + self.dropout(mixed)), balance, dropped


class Switch(MaskedWords):
    """Switch encoder with a masked-language-model head; the decoder is the token embedding.

    Args:
        config: Size.

    Example:
        >>> model = Switch(SwitchConfig(2, 64, vocab_size=100, max_length=16))
        >>> out = model(torch.zeros(2, 16, dtype=torch.long), torch.tensor([[1, 5], [0, 2]]))
        >>> out.logits.shape, out.balance.shape
        (torch.Size([2, 2, 100]), torch.Size([]))
    """

    def __init__(self, config: SwitchConfig) -> None:
        """Make embeddings, layers and head."""
        super().__init__(config, (Layer(config) for _ in range(config.layers)), tied=True)

    def forward(self, input_ids: Tensor, masked_positions: Tensor | None = None) -> SwitchOutput:
        """Return logits over the vocabulary, and what the routing has to say.

        Args:
            input_ids: Words, int64, shape ``[S, T]``.
            masked_positions: Positions to predict, int64, shape ``[S, M]``; all when None.

        Raises:
            ValueError: If the sequence is longer than the position embedding.
        """
        x = self.embed(input_ids)
        balance, dropped = [], []
        for layer in self.layers:
            x, loss, share = layer(x)
            balance.append(loss)
            dropped.append(share)
        logits = self.predict(x, masked_positions)
        return SwitchOutput(logits, torch.stack(balance).mean(), torch.stack(dropped).mean())
