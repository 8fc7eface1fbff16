"""Fine-tuning of a pretrained encoder to tell the sentiment of a text: SentimentClassifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from examples.models.encoder import PACKAGED, freeze_lowest, load_encoder
from examples.models.training import Example, linear, scheduled


class SentimentClassifier(Example):
    """A pretrained encoder, the mean of its last hidden states, and a linear layer.

    A batch is a dict of ``input_ids`` and ``attention_mask`` ``[S, T]`` and ``labels`` ``[S]``.
    Logs ``train_loss``, ``val_loss``, ``val_accuracy``, ``test_loss`` and ``test_accuracy``. The
    optimizer is AdamW with β = (0.9, 0.999); the learning rate rises over the first tenth of the
    steps and falls linearly to 0.

    Args:
        max_steps: Optimizer steps of the run.
        encoder: Where the encoder comes from, see :func:`examples.models.encoder.find_encoder`; or
            a module, called with ``input_ids`` and ``attention_mask``, whose result has
            ``last_hidden_state`` ``[S, T, H]`` and whose ``config`` has ``hidden_size``.
        classes: Classes, C.
        dropout: Probability, before the linear layer; the encoder has its own.
        lr: Peak learning rate.
        weight_decay: Of AdamW.
        frozen_layers: Lowest layers of the encoder that do not train, nor do its embeddings then.
        seed: Seed of the dropout masks.

    Raises:
        FileNotFoundError: If a folder is named that holds no checkpoint.
        ModuleNotFoundError: If transformers, or the package that is named, is not installed.
        ValueError: If the encoder has not so many layers.
    """

    def __init__(
        self,
        max_steps: int,
        encoder: str | Path | nn.Module = PACKAGED,
        *,
        classes: int = 2,
        dropout: float = 0.1,
        lr: float = 5e-5,
        weight_decay: float = 0.01,
        frozen_layers: int = 0,
        seed: int = 0,
    ) -> None:
        """Load the encoder and make the linear layer."""
        super().__init__()
        # Not the encoder: where it lies is this machine's own, and its weights are in the state.
        self.save_hyperparameters(ignore="encoder")
        self.encoder = encoder if isinstance(encoder, nn.Module) else load_encoder(encoder)
        freeze_lowest(self.encoder, frozen_layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits, ``[S, T], [S, T] → [S, C]``."""
        found = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        return self.head(self.dropout(masked_mean(found.last_hidden_state, attention_mask)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        loss = F.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_accuracy``."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_accuracy``."""
        self._evaluate(batch, "test", self.test_accuracy)

    def _evaluate(self, batch: dict[str, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        logits, labels = self(batch["input_ids"], batch["attention_mask"]), batch["labels"]
        accuracy.update(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log(f"{stage}_accuracy", accuracy, prog_bar=stage == "val", batch_size=len(labels))

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW and its learning-rate schedule, stepped every step."""
        h = self.hparams
        optimizer = torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad],
            lr=h["lr"],
            weight_decay=h["weight_decay"],
        )
        return scheduled(optimizer, linear(h["max_steps"], max(1, h["max_steps"] // 10)))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens that are not padding, ``[S, T, H], [S, T] → [S, H]``.

    Example:
        >>> masked_mean(torch.tensor([[[1.0], [3.0], [50.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2.]])
    """
    weights = mask.to(x.dtype).unsqueeze(-1)
    return (x * weights).sum(1) / weights.sum(1).clamp_min(1)
