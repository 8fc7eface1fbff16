"""ViT in one file: pre-norm Transformer encoder over patches of an image, with a classifier.

Source:
    Dosovitskiy et al., "An Image Is Worth 16x16 Words" (ICLR 2021); 384 wide with 12 layers is the
    "small" of Touvron et al., "DeiT" (ICML 2021). Attention and feed-forward are BERT's, which read
    ``hidden``, ``heads`` and ``dropout`` of a configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.models.bert import FeedForward, SelfAttention


@dataclass(frozen=True)
class ViTConfig:
    """Size of a ViT; heads are 64 wide and the feed-forward block is four times the hidden size.

    Args:
        layers: Encoder layers, L.
        hidden: Hidden size, H; a multiple of 64.
        image: Height and width of the square images.
        patch: Height and width of a patch; divides the image.
        classes: Classes, C.
        dropout: Probability, after the embeddings, in the attention and after each block.

    Raises:
        ValueError: If the hidden size or the patch does not fit.
    """

    layers: int = 12
    hidden: int = 384
    image: int = 32
    patch: int = 4
    classes: int = 10
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.hidden < 64 or self.hidden % 64:
            raise ValueError(
                f"hidden must be a multiple of 64 (heads are 64 wide), got {self.hidden}"
            )
        if self.patch < 1 or self.image % self.patch:
            raise ValueError(
                f"patch must divide the image's height and width, {self.image}, got {self.patch}"
            )

    @property
    def heads(self) -> int:
        """Attention heads per layer, H / 64."""
        return self.hidden // 64

    @property
    def tokens(self) -> int:
        """Patches of an image and the class token."""
        return (self.image // self.patch) ** 2 + 1


class Layer(nn.Module):
    """One encoder layer: attention, then feed-forward; normalise first, add the residual after."""

    def __init__(self, config: ViTConfig) -> None:
        """Make the two blocks and their norms."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.attention = SelfAttention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, ``[S, T, H] → [S, T, H]``."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class ViT(nn.Module):
    """Vision transformer that classifies by its class token.

    Args:
        config: Size.

    Example:
        >>> model = ViT(ViTConfig(layers=1, hidden=64, image=8))
        >>> model.config.tokens, model(torch.zeros(2, 3, 8, 8)).shape
        (5, torch.Size([2, 10]))
    """

    def __init__(self, config: ViTConfig) -> None:
        """Make embeddings, layers and head."""
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(3, config.hidden, config.patch, stride=config.patch)
        self.class_token = nn.Parameter(torch.zeros(config.hidden))
        self.positions = nn.Parameter(torch.empty(config.tokens, config.hidden))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.head = nn.Linear(config.hidden, config.classes)
        nn.init.normal_(self.positions, std=0.02)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, ``[S, 3, image, image] → [S, C]``."""
        patches = self.patches(images).flatten(2).mT  # [S, T - 1, H]
        start = self.class_token.expand(len(images), 1, -1)
        x = self.dropout(torch.cat([start, patches], dim=1) + self.positions)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))


def _initialise(module: nn.Module) -> None:
    """Draw weights of linear layers from N(0, 0.02²) and zero their biases."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
