"""VGG16 with BatchNorm for small images: 13 convolutions and one linear classifier.

Source:
    Simonyan & Zisserman, "Very Deep Convolutional Networks" (ICLR 2015), configuration D. The
    three linear layers of the original, made for 224 × 224 images, become one, as is customary for
    CIFAR. Weights are drawn as in He et al., "Delving Deep into Rectifiers" (ICCV 2015).
"""

from __future__ import annotations

from torch import Tensor, nn

#: Convolutions of each stage and their filters in units of the width, 64; stages end in a pooling.
STAGES: tuple[tuple[int, int], ...] = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))


class VGG16(nn.Module):
    """VGG16 with BatchNorm; the five poolings take 32 × 32 images to one position.

    Args:
        classes: Classes, C.
        width: Filters of the first convolution.

    Example:
        >>> import torch
        >>> from lightning_mat import partition
        >>> len(partition(VGG16(), "filters"))
        4224
        >>> VGG16(width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        """Make the convolutions and the classifier."""
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for convolutions, wide in STAGES:
            for _ in range(convolutions):
                layers += [
                    # BatchNorm takes the mean away, and a bias with it.
                    nn.Conv2d(channels, wide * width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(wide * width),
                    nn.ReLU(inplace=True),
                ]
                channels = wide * width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, ``[S, 3, 32, 32] → [S, C]``."""
        return self.classifier(self.features(images).mean((2, 3)))


def torchvision_vgg16(classes: int = 10, width: int = 64) -> nn.Module:
    """Return torchvision's VGG16 with BatchNorm in the shape of :class:`VGG16`.

    Its convolutions have a bias, which BatchNorm takes away again; the state of a :class:`VGG16`
    loads into it but for those (``strict=False``).

    Raises:
        ModuleNotFoundError: If torchvision is not installed.
    """
    try:
        from torchvision.models import vgg
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "torchvision's VGG16 needs the package `torchvision`, which is not installed: "
            "pip install 'lightning-mat[vision]', or leave out torchvision=True"
        ) from error
    sizes: list[int | str] = []
    for convolutions, wide in STAGES:
        sizes += [wide * width] * convolutions + ["M"]
    model = vgg.VGG(vgg.make_layers(sizes, batch_norm=True), classes, init_weights=True)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(STAGES[-1][1] * width, classes)
    model.classifier.apply(_initialise)
    return model


def _initialise(module: nn.Module) -> None:
    """Draw convolutions from N(0, 2 / (9 · filters)), the classifier from N(0, 0.01²)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
