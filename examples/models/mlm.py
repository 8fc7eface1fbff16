"""Masked language modelling as LightningModules: BertMLM and SwitchMLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.models.bert import Bert, preset
from examples.models.hf_bert import HuggingFaceBert
from examples.models.switch import Switch, SwitchOutput, switch_preset
from examples.models.training import Example, Factor, cosine, linear, scheduled


@dataclass(frozen=True)
class Recipe:
    """An optimizer and its schedule.

    Args:
        lr: Peak learning rate.
        betas: Of Adam.
        weight_decay: Decoupled, as AdamW's; 0 is Adam.
        warmup: Part of the steps in which the learning rate rises.
        decay: How it falls afterwards, see :mod:`examples.models.training`.
    """

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    warmup: float
    decay: Callable[[int, int], Factor]


RECIPES: dict[str, Recipe] = {
    "adam": Recipe(2e-4, (0.0, 0.0), 0.0, 0.0, linear),
    "adamw": Recipe(5e-4, (0.9, 0.98), 0.01, 1 / 20, linear),
    "adamw-cosine": Recipe(1e-4, (0.9, 0.99), 0.01, 1 / 25, cosine),
}
#: What `--optimizer` can name, with the peak learning rate that goes with it by default.
OPTIMIZERS: dict[str, float] = {name: recipe.lr for name, recipe in RECIPES.items()}


class MaskedLM(Example):
    """Base of the modules that predict masked words.

    A batch is a dict of ``input_ids`` ``[S, T]``, ``masked_positions`` ``[S, M]`` and ``labels``
    ``[S, M]``, all int64. The loss that is logged is the mean cross-entropy over the masked words,
    in nats: the log perplexity of the MAT paper's tables.

    The optimizers, all with ε = 1e-6: ``"adam"`` is Adam with β = (0, 0), no weight decay and a
    linear decay without warm-up (the MAT paper's for BERT, table 4); ``"adamw"`` has β = (0.9,
    0.98), weight decay 0.01, a warm-up over the first twentieth of the steps and a linear decay;
    ``"adamw-cosine"`` has β = (0.9, 0.99), weight decay 0.01, a warm-up over the first
    twenty-fifth and a cosine decay (the paper's for the Switch-Transformer).
    """

    def _check_optimizer(self, name: str) -> None:
        """Raise a ValueError if there is no such optimizer."""
        if name not in RECIPES:
            raise ValueError(f"unknown optimizer {name!r}: choose one of {', '.join(RECIPES)}")

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> Tensor:
        """Return the loss to minimise, and log ``<stage>_loss`` with what belongs to it."""
        loss = word_loss(self(batch["input_ids"], batch["masked_positions"]), batch["labels"])
        self._log(f"{stage}_loss", loss, batch)
        return loss

    def _log(self, name: str, value: Tensor, batch: dict[str, Tensor]) -> None:
        bar = name in ("train_loss", "val_loss")
        self.log(name, value, prog_bar=bar, batch_size=len(batch["labels"]))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return self._evaluate(batch, "train")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``val_loss``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``test_loss``."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer and its learning-rate schedule, stepped every step."""
        recipe, steps = RECIPES[self.hparams["optimizer"]], self.hparams["max_steps"]
        parameters = [p for p in self.parameters() if p.requires_grad]
        options: dict[str, Any] = {
            "lr": self.hparams["lr"] or recipe.lr,
            "betas": recipe.betas,
            "eps": 1e-6,
        }
        optimizer: torch.optim.Optimizer
        if recipe.weight_decay:
            options["weight_decay"] = recipe.weight_decay
            optimizer = torch.optim.AdamW(parameters, **options)
        else:
            optimizer = torch.optim.Adam(parameters, **options)
        warmup = max(1, int(steps * recipe.warmup)) if recipe.warmup else 0
        return scheduled(optimizer, recipe.decay(steps, warmup))


class BertMLM(MaskedLM):
    """A BERT that predicts masked words; batch, loss and optimizers as in :class:`MaskedLM`.

    Args:
        size: Preset, see :data:`examples.models.bert.PRESETS`.
        vocab_size: Words, V.
        max_steps: Optimizer steps of the run; the learning rate reaches 0 there.
        max_length: Longest sequence.
        dropout: Probability.
        optimizer: ``"adam"``, ``"adamw"`` or ``"adamw-cosine"``, see :class:`MaskedLM`.
        lr: Peak learning rate; None takes the optimizer's own from :data:`OPTIMIZERS`.
        seed: Seed of the dropout masks.
        hf: Whether Hugging Face's BERT takes the place of the project's own.

    Raises:
        ValueError: If the preset or the optimizer is unknown.
        ModuleNotFoundError: If ``hf`` is asked for and transformers is not installed.
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
        hf: bool = False,
    ) -> None:
        """Make the model."""
        super().__init__()
        self._check_optimizer(optimizer)
        self.save_hyperparameters()
        config = preset(size, vocab_size=vocab_size, max_length=max_length, dropout=dropout)
        self.bert = HuggingFaceBert(config) if hf else Bert(config)

    def forward(self, input_ids: Tensor, masked_positions: Tensor | None = None) -> Tensor:
        """Return logits at the masked positions, ``[S, M, V]``; at all when there are none."""
        return self.bert(input_ids, masked_positions)


class SwitchMLM(MaskedLM):
    """A Switch encoder that predicts masked words; batch and optimizers as in :class:`MaskedLM`.

    Beside the loss, the load-balancing loss (``<stage>_balance``, 1 when even) and the share of
    tokens that found no place with their expert (``<stage>_dropped``) are logged; the loss that is
    minimised is the cross-entropy plus ``balance_weight`` times the load-balancing loss.

    Args:
        size: Preset, see :data:`examples.models.switch.SWITCH_PRESETS`.
        vocab_size: Words, V.
        max_steps: Optimizer steps of the run; the learning rate reaches 0 there.
        max_length: Longest sequence.
        dropout: Probability.
        optimizer: ``"adam"``, ``"adamw"`` or ``"adamw-cosine"``, see :class:`MaskedLM`.
        lr: Peak learning rate; None takes the optimizer's own from :data:`OPTIMIZERS`.
        seed: Seed of the dropout masks.
        experts: Experts per layer, E.
        capacity_factor: Places of an expert over its even share of the tokens.
        balance_weight: Of the load-balancing loss (the factor α of Fedus et al.).

    Raises:
        ValueError: If the preset or the optimizer is unknown, or a size unusable.
    """

    def __init__(
        self,
        size: str,
        vocab_size: int,
        max_steps: int,
        *,
        max_length: int = 512,
        dropout: float = 0.1,
        optimizer: str = "adamw-cosine",
        lr: float | None = None,
        seed: int = 0,
        experts: int = 4,
        capacity_factor: float = 1.5,
        balance_weight: float = 0.01,
    ) -> None:
        """Make the model."""
        super().__init__()
        self._check_optimizer(optimizer)
        self.save_hyperparameters()
        config = switch_preset(
            size,
            vocab_size=vocab_size,
            max_length=max_length,
            dropout=dropout,
            experts=experts,
            capacity_factor=capacity_factor,
        )
        self.switch = Switch(config)

    def forward(self, input_ids: Tensor, masked_positions: Tensor | None = None) -> SwitchOutput:
        """Return logits at the masked positions, ``[S, M, V]``, and what the routing says."""
        return self.switch(input_ids, masked_positions)

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> Tensor:
        out = self(batch["input_ids"], batch["masked_positions"])
        loss = word_loss(out.logits, batch["labels"])
        self._log(f"{stage}_loss", loss, batch)
        self._log(f"{stage}_balance", out.balance, batch)
        self._log(f"{stage}_dropped", out.dropped, batch)
        return loss + self.hparams["balance_weight"] * out.balance


def word_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits ``[S, M, V]`` and labels ``[S, M]``, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
