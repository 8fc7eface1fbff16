"""BERT in one file: post-norm Transformer encoder with a masked-language-model head.

Source:
    Devlin et al., "BERT" (NAACL 2019); the sizes are those of Turc et al., "Well-Read Students
    Learn Better" (2019), which table 7 of the MAT paper uses too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BertConfig:
    """Size of a BERT: heads are 64 wide and the feed-forward block is four times the hidden size.

    Args:
        layers: Encoder layers, L.
        hidden: Hidden size, H; a multiple of 64.
        vocab_size: Words, V.
        max_length: Longest sequence, T.
        dropout: Probability, after the embeddings, in the attention and after each block.

    Raises:
        ValueError: If ``hidden`` is not a multiple of 64.
    """

    layers: int
    hidden: int
    vocab_size: int = 30_522
    max_length: int = 512
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Check the hidden size."""
        if self.hidden < 64 or self.hidden % 64:
            raise ValueError(
                f"hidden must be a multiple of 64 (heads are 64 wide), got {self.hidden}"
            )

    @property
    def heads(self) -> int:
        """Attention heads per layer, H / 64."""
        return self.hidden // 64


#: (layers, hidden) of the published sizes.
PRESETS: dict[str, tuple[int, int]] = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}


def preset(
    name: str, *, vocab_size: int = 30_522, max_length: int = 512, dropout: float = 0.1
) -> BertConfig:
    """Return the configuration of a published size.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> preset("mini").layers, preset("mini").hidden, preset("mini").heads
        (4, 256, 4)
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    layers, hidden = PRESETS[name]
    return BertConfig(layers, hidden, vocab_size, max_length, dropout)


class SelfAttention(nn.Module):
    r"""Multi-head attention of a sequence to itself, ``[S, T, H] → [S, T, H]``.

    .. math:: \operatorname{softmax}\bigl(Q K^\top / \sqrt{64}\bigr) V \; \text{per head.}

    Head ``i`` owns rows ``64 i : 64 (i + 1)`` of query, key and value, and those columns of out.
    """

    def __init__(self, config: BertConfig) -> None:
        """Make the four projections."""
        super().__init__()
        self.num_heads = config.heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.hidden, config.hidden)
        self.key = nn.Linear(config.hidden, config.hidden)
        self.value = nn.Linear(config.hidden, config.hidden)
        self.out = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        query, key, value = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [S, heads, T, 64]
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """``fc2(gelu(fc1(x)))``, ``[S, T, H] → [S, T, H]`` through 4H hidden neurons."""

    def __init__(self, config: BertConfig) -> None:
        """Make the two linear layers."""
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, 4 * config.hidden)
        self.fc2 = nn.Linear(4 * config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to every token."""
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """One encoder layer: attention, then feed-forward; residual first, normalise after."""

    def __init__(self, config: BertConfig) -> None:
        """Make the two blocks and their norms."""
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.ffn = FeedForward(config)
        self.ffn_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, ``[S, T, H] → [S, T, H]``."""
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class MaskedWords(nn.Module):
    """What stands before and behind an encoder's layers: embeddings, and a head for masked words.

    Args:
        config: Size.
        layers: The layers, ``[S, T, H]`` to ``[S, T, H]``.
        tied: Whether the decoder's weight is the token embedding, as in BERT.
    """

    def __init__(self, config: BertConfig, layers: Iterable[nn.Module], *, tied: bool) -> None:
        """Make embeddings and head around the layers."""
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden)
        self.positions = nn.Embedding(config.max_length, config.hidden)
        self.embedding_norm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Sequential(
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.LayerNorm(config.hidden, eps=1e-12),
        )
        self.decoder = nn.Linear(config.hidden, config.vocab_size)
        self.apply(_initialise)
        if tied:
            self.decoder.weight = self.words.weight

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return what the first layer gets, ``[S, T] → [S, T, H]``.

        Raises:
            ValueError: If the sequence is longer than the position embedding.
        """
        length = input_ids.shape[1]
        if length > self.config.max_length:
            raise ValueError(
                f"sequence of {length} tokens is longer than max_length {self.config.max_length}"
            )
        # Positions carry the sample dimension too, so that every layer has per-sample gradients.
        positions = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        return self.dropout(self.embedding_norm(self.words(input_ids) + self.positions(positions)))

    def predict(self, x: Tensor, masked_positions: Tensor | None) -> Tensor:
        """Return logits of the last hidden states, ``[S, M, V]``, or ``[S, T, V]``."""
        if masked_positions is not None:
            x = x.take_along_dim(masked_positions.unsqueeze(-1), dim=1)
        return self.decoder(self.head(x))


class Bert(MaskedWords):
    """BERT with a masked-language-model head; segments are left out (one segment per sample).

    Args:
        config: Size.
        tied: Whether the decoder's weight is the token embedding, as in BERT.

    Example:
        >>> model = Bert(preset("tiny", vocab_size=100, max_length=16))
        >>> words = torch.zeros(2, 16, dtype=torch.long)
        >>> model(words).shape, model(words, torch.tensor([[1, 5], [0, 2]])).shape
        (torch.Size([2, 16, 100]), torch.Size([2, 2, 100]))
    """

    def __init__(self, config: BertConfig, *, tied: bool = True) -> None:
        """Make embeddings, layers and head."""
        super().__init__(config, (Layer(config) for _ in range(config.layers)), tied=tied)

    def encode(self, input_ids: Tensor) -> Tensor:
        """Return the last hidden states, ``[S, T] → [S, T, H]``.

        Raises:
            ValueError: If the sequence is longer than the position embedding.
        """
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, input_ids: Tensor, masked_positions: Tensor | None = None) -> Tensor:
        """Return logits over the vocabulary.

        Args:
            input_ids: Words, int64, shape ``[S, T]``.
            masked_positions: Positions to predict, int64, shape ``[S, M]``; all when None. The
                vocabulary-sized product is the largest of a small BERT, so only these are computed.

        Returns:
            Logits, shape ``[S, M, V]``, or ``[S, T, V]`` without positions.
        """
        return self.predict(self.encode(input_ids), masked_positions)


def _initialise(module: nn.Module) -> None:
    """Draw weights from N(0, 0.02²) and zero the biases, as BERT does."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
