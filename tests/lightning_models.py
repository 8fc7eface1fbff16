"""A small LightningModule and its data, for the tests of the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from examples.data.loader import EpochSampler, ResumableLoader
from lightning_mat import MATCallback


class Small(pl.LightningModule):
    """Three linear layers, dropout between them."""

    def __init__(self, optimizer: str = "adamw", width: int = 16) -> None:
        super().__init__()
        self.name = optimizer
        self.net = nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        if self.name == "sgd":
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Random points in three classes; any index is taken modulo their number."""

    def __init__(self, samples: int) -> None:
        self.x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))
        self.y = (self.x.sum(1) > 0).long() + (self.x[:, 0] > 1).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index %= len(self.x)
        return self.x[index], self.y[index]


def data(samples: int = 96, batch_size: int = 16, ranks: int = 1, rank: int = 0) -> DataLoader[Any]:
    """Return points in an order that depends on the epoch alone, also within a resumed epoch."""
    sampler = EpochSampler(samples, ranks=ranks, rank=rank)
    return ResumableLoader(Points(samples), batch_size // ranks, sampler=sampler)


def model(**options: Any) -> Small:
    torch.manual_seed(0)
    return Small(**options)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Return a quiet trainer on the CPU."""
    settings: dict[str, Any] = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": CSVLogger(str(folder), name="", version=""),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), default_root_dir=folder, **(settings | options))


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def mat(**options: Any) -> MATCallback:
    """Return a callback over layers that rests some of them."""
    defaults = {"units": "layers", "n_samples": 8} | (
        {} if "policy" in options else {"alpha": "auto"}
    )
    return MATCallback(**(defaults | options))


class Watch(pl.Callback):
    """Notes which units train in every step, and whether the optimizer moved the others."""

    def __init__(self, callback: MATCallback) -> None:
        self.callback = callback
        self.active: list[list[bool]] = []
        self.moved: list[list[bool]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.before = weights(module)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        assert self.callback.mat is not None
        self.active.append(self.callback.mat.active.tolist())
        after = weights(module)
        self.moved.append(
            [not torch.equal(a, b) for a, b in zip(self.before, after, strict=True)][::2]
        )
