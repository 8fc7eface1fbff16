"""BertMLM: masked language modelling as a LightningModule, with the MAT paper's settings."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.models.bert import Bert, preset

#: What `--optimizer` can name, with the peak learning rate that goes with it by default.
OPTIMIZERS: dict[str, float] = {"adam": 2e-4, "adamw": 5e-4}


class BertMLM(L.LightningModule):
    """A BERT that predicts masked words.

    A batch is a dict of ``input_ids`` ``[S, T]``, ``masked_positions`` ``[S, M]`` and ``labels``
    ``[S, M]``, all int64. The loss is the mean cross-entropy over the masked words, in nats: the
    log perplexity of the MAT paper's tables.

    Args:
        size: Preset, see :data:`examples.models.bert.PRESETS`.
        vocab_size: Words, V.
        max_steps: Optimizer steps of the run; the learning rate reaches 0 there.
        max_length: Longest sequence.
        dropout: Probability.
        optimizer: ``"adam"``: Adam with β = (0, 0), ε = 1e-6, no weight decay and a linear decay
            without warm-up (table 4 of the MAT paper). ``"adamw"``: β = (0.9, 0.98), ε = 1e-6,
            weight decay 0.01 and a warm-up over the first twentieth of the steps.
        lr: Peak learning rate; None takes the optimizer's own from :data:`OPTIMIZERS`.
        seed: Seed of the dropout masks.

    Raises:
        ValueError: If the preset or the optimizer is unknown.
    """

    def __init__(
        self,
        size: str,
        vocab_size: int,
        max_steps: int,
        *,
        max_length: int = 512,
        dropout: float = 0.1,
        optimizer: str = "adam",
        lr: float | None = None,
        seed: int = 0,
    ) -> None:
        """Make the model."""
        super().__init__()
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"unknown optimizer {optimizer!r}: choose one of {', '.join(OPTIMIZERS)}"
            )
        self.save_hyperparameters()
        self.bert = Bert(
            preset(size, vocab_size=vocab_size, max_length=max_length, dropout=dropout)
        )

    def forward(self, input_ids: Tensor, masked_positions: Tensor | None = None) -> Tensor:
        """Return logits at the masked positions, ``[S, M, V]``; at all when there are none."""
        return self.bert(input_ids, masked_positions)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self(batch["input_ids"], batch["masked_positions"])
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Seed the dropout masks by step, so that a resumed run continues with the same ones."""
        torch.manual_seed((self.hparams["seed"] << 32) + self.global_step)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``val_loss``."""
        self.log("val_loss", self._loss(batch), prog_bar=True, batch_size=len(batch["labels"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``test_loss``."""
        self.log("test_loss", self._loss(batch), batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer and its learning-rate schedule, stepped every step."""
        name, steps = self.hparams["optimizer"], self.hparams["max_steps"]
        lr = self.hparams["lr"] or OPTIMIZERS[name]
        optimizer: torch.optim.Optimizer
        if name == "adam":
            warmup = 0
            optimizer = torch.optim.Adam(self.parameters(), lr=lr, betas=(0.0, 0.0), eps=1e-6)
        else:
            warmup = max(1, steps // 20)
            optimizer = torch.optim.AdamW(
                self.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01
            )

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return max(0.0, (steps - step) / (steps - warmup))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
