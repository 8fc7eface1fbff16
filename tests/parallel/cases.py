"""A model, its data and its runs, in one process or in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.data.loader import ResumableLoader, training_batches
from lightning_mat import MATCallback, Slice, Unit, policies
from lightning_mat.parallel import MATDDPStrategy

WIDTH, HIDDEN = 8, 12
# Which of the units (two halves of two feed-forward networks) train, episode by episode.
PATTERNS = ("0111", "0011", "1111", "1010", "1100", "0110")


class Block(nn.Module):
    """A feed-forward network behind a norm, beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


class Net(pl.LightningModule):
    """Two blocks in float64; a BatchNorm that counts differently on every rank."""

    def __init__(self, returns: str = "loss", batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.returns = returns
        self.automatic_optimization = returns != "manual"
        first = nn.BatchNorm1d(6) if batch_norm else nn.Identity()
        self.first = nn.Sequential(first, nn.Linear(6, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(WIDTH, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        if self.returns == "manual":
            optimizer = self.optimizers()
            self.manual_backward(2 * loss)
            self.trainer.callbacks[-1].note(self)
            optimizer.step()
            optimizer.zero_grad()
            return None
        return {"loss": loss} if self.returns == "dict" else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def units(model: nn.Module) -> list[Unit]:
    """Return the halves of each block's neurons."""
    found = []
    for block in range(2):
        for half, (a, b) in enumerate([(0, HIDDEN // 2), (HIDDEN // 2, HIDDEN)]):
            path = f"blocks.{block}"
            slices = (
                Slice(f"{path}.fc1.weight", 0, a, b),
                Slice(f"{path}.fc1.bias", 0, a, b),
                Slice(f"{path}.fc2.weight", 1, a, b),
            )
            found.append(Unit(f"{path}.{half}", "ffn", path, slices))
    return found


class Cycle(policies.Policy):
    """Goes through some patterns; with spectra, measures before."""

    def __init__(self, needs_spectra: bool = False) -> None:
        self.needs = needs_spectra

    @property
    def needs_spectra(self) -> bool:
        return self.needs

    def decide(self, history: Any, units: Any, episode: int) -> policies.Decision:
        pattern = PATTERNS[episode % len(PATTERNS)]
        active = torch.tensor([flag == "1" for flag in pattern])
        return policies.Decision(active, ("test",) * 4, {}, units.kinds)


class Record(pl.Callback):
    """Notes the gradients of every step, and what the strategy sent; stands last."""

    def __init__(self) -> None:
        self.grads: list[list[Tensor | None]] = []
        self.sent: list[int] = []
        self.active: list[list[bool]] = []

    def note(self, module: pl.LightningModule) -> None:
        grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
        self.grads.append(grads)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if module.automatic_optimization:
            self.note(module)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.sent.append(getattr(trainer.strategy, "bytes_reduced", -1))
        callback = next((c for c in trainer.callbacks if isinstance(c, MATCallback)), None)
        if callback is not None:
            self.active.append(callback.mat.active.tolist())


class Rows(TensorDataset):
    """Tensors' rows; any index is taken modulo their number."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index % len(self))


def points(samples: int = 96) -> Rows:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    return Rows(x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long())


def batches(data: Rows, ranks: int) -> ResumableLoader:
    """Return batches of 16 samples, this process' share of each."""
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    return training_batches(data, len(data), 16 // ranks, seed=0, ranks=ranks, rank=rank)


def strategy(name: str, **options: Any) -> Any:
    kind = {"ddp": DDPStrategy, "ddp_mat": MATDDPStrategy}[name]
    return kind(process_group_backend="gloo", **options)


def callback(skip: str = "weights", **options: Any) -> MATCallback:
    settings: dict[str, Any] = {"warmup_epochs": 0, "every_n_steps": 2, "n_samples": 8}
    settings |= {"policy": Cycle()} if "alpha" not in options else {}
    return MATCallback(units, skip=skip, **(settings | options))


def fit(
    folder: Path,
    plan: Any = None,
    *,
    mat: dict[str, Any] | None = None,
    net: dict[str, Any] | None = None,
    ckpt_path: Path | None = None,
    callbacks: list[pl.Callback] | None = None,
    **options: Any,
) -> tuple[Net, Record, MATCallback | None, pl.Trainer]:
    """Train; in several processes where the strategy is one of several.

    Args:
        folder: The run's.
        plan: Name and options of the strategy, or None for one process.
        mat: Options of the callback, None to train without it.
        net: Options of the model.
        ckpt_path: To resume from.
        callbacks: Further ones.
        options: Of the trainer.
    """
    record, adaptive = Record(), None if mat is None else callback(**mat)
    devices = 1 if plan is None else torch.distributed.get_world_size()
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": devices,
        "logger": CSVLogger(str(folder), name="", version=""),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "strategy": "auto" if plan is None else strategy(plan[0], **plan[1]),
    }
    own = [c for c in (adaptive, *(callbacks or ()), record) if c is not None]
    trainer = pl.Trainer(callbacks=own, **(settings | options))
    module = Net(**(net or {}))
    trainer.fit(module, batches(points(), devices), ckpt_path=ckpt_path, weights_only=True)
    return module, record, adaptive, trainer


def gradients(folder: Path, plan: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the gradients of all steps and the weights of a run."""
    module, record, adaptive, _ = fit(folder, plan, **options)
    return {
        "grads": record.grads,
        "weights": [p.detach().clone() for p in module.parameters()],
        "names": [name for name, _ in module.named_parameters()],
        "active": record.active,
        "sent": record.sent,
        "history": None if adaptive is None else adaptive.mat.history.state_dict(),
        "decision": None if adaptive is None else adaptive.mat.decision.digest(),
    }
