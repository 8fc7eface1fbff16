"""ResNet-18 for small images: the stem is one 3 × 3 convolution, without a pooling.

Source:
    He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016); the stem is the one that
    they and everybody since use for CIFAR.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut, ``[S, inputs, h, w] → [S, outputs, h/s, w/s]``.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Stride s of the first convolution; other than 1, or where the channels change, the
            shortcut is a 1 × 1 convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Make the residual branch and the shortcut."""
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return F.relu(self.shortcut(x) + self.residual(x))


class ResNet18(nn.Module):
    """ResNet-18: four stages of two blocks; each but the first halves the image.

    Args:
        classes: Classes, C.
        width: Channels of the first stage.

    Example:
        >>> import torch
        >>> ResNet18(width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        """Make stem, blocks and classifier."""
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        blocks = []
        for stage in range(4):
            outputs = width * 2**stage
            inputs = outputs if stage == 0 else outputs // 2
            blocks += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(8 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, ``[S, 3, h, w] → [S, C]``."""
        return self.classifier(self.blocks(self.stem(images)).mean((2, 3)))
