"""Image classification as a LightningModule: VGGClassifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from examples.models.training import Example, Factor, cosine, scheduled, staircase
from examples.models.vgg import VGG16, torchvision_vgg16

SCHEDULES: dict[str, Callable[[int], Factor]] = {"staircase": staircase, "cosine": cosine}


class VGGClassifier(Example):
    """A VGG16 with BatchNorm that tells classes of 32 × 32 images.

    A batch is (images ``[S, 3, 32, 32]``, classes ``[S]``). Logs ``train_loss`` and
    ``train_accuracy`` (of an epoch, at the weights that each batch met), ``val_loss``,
    ``val_accuracy``, ``test_loss`` and ``test_accuracy``.

    Args:
        max_steps: Optimizer steps of the run; the schedule ends there.
        classes: Classes, C.
        width: Filters of the first convolution.
        lr: Learning rate at the start.
        momentum: Of SGD.
        weight_decay: Of SGD.
        schedule: ``"staircase"``: a tenth at half of the steps and at three quarters, as the MAT
            paper has it (appendix B.1). ``"cosine"``: to 0.
        seed: Of what a step draws; the model itself draws nothing.
        torchvision: Whether torchvision's VGG16 takes the place of the project's own.

    Raises:
        ValueError: If the schedule is unknown.
        ModuleNotFoundError: If ``torchvision`` is asked for and not installed.
    """

    def __init__(
        self,
        max_steps: int,
        *,
        classes: int = 10,
        width: int = 64,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        schedule: str = "staircase",
        seed: int = 0,
        torchvision: bool = False,
    ) -> None:
        """Make the model."""
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
        self.save_hyperparameters()
        self.vgg = torchvision_vgg16(classes, width) if torchvision else VGG16(classes, width)
        self.train_accuracy = MulticlassAccuracy(classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")
        # A run that is resumed inside an epoch goes on counting.
        self.train_accuracy.persistent(True)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, ``[S, 3, 32, 32] → [S, C]``."""
        return self.vgg(images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin to count anew where an epoch begins."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx == 0:
            self.train_accuracy.reset()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.train_accuracy.update(logits.detach(), labels)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_accuracy``."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_accuracy``."""
        self._evaluate(batch, "test", self.test_accuracy)

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy
    ) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log(f"{stage}_accuracy", accuracy, prog_bar=stage == "val", batch_size=len(labels))

    def configure_optimizers(self) -> dict[str, Any]:
        """Return SGD and its learning-rate schedule, stepped every step."""
        h = self.hparams
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=h["lr"],
            momentum=h["momentum"],
            weight_decay=h["weight_decay"],
        )
        return scheduled(optimizer, SCHEDULES[h["schedule"]](h["max_steps"]))
