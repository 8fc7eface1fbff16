"""As much of a trainer and of a LightningModule as MATCallback's hooks ask for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_mat import MATCallback

POINTS = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


class Module(nn.Sequential):
    """A stack of layers with the methods of a LightningModule that are called."""

    def log(self, name: str, value: float, **options: Any) -> None:
        """Log nothing."""

    def _on_before_batch_transfer(self, batch: Any) -> Any:
        return batch


class Logger:
    """Keeps what is logged."""

    name, version = "", ""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Keep a row."""
        self.rows.append((step, metrics))


class Trainer:
    """Runs the hooks of one callback in Lightning's order, one call at a time.

    Args:
        module: The model.
        callback: Whose hooks are called.
        optimizer: As ``configure_optimizers`` returns it.
        folder: Of the run.
    """

    world_size, is_global_zero, current_epoch = 1, True, 0

    def __init__(
        self, module: Module, callback: MATCallback, optimizer: Optimizer, folder: Path
    ) -> None:
        self.lightning_module, self.callback = module, callback
        self.callbacks = [callback]
        self.strategy = SimpleNamespace(
            root_device=torch.device("cpu"),
            model=module,
            optimizers=[optimizer],
            batch_to_device=lambda batch: batch,
        )
        self.precision_plugin = SimpleNamespace(convert_input=lambda batch: batch)
        self.loggers = [Logger()]
        self.log_dir = self.default_root_dir = str(folder)
        self.train_dataloader = DataLoader(TensorDataset(POINTS), batch_size=5)
        self.global_step = 0

    @property
    def optimizers(self) -> list[Any]:
        """The strategy's, which the callback wraps."""
        return self.strategy.optimizers

    def start(self, saved: dict[str, Any] | None) -> None:
        """Begin a fit, or go on with a saved one."""
        run: Any = self
        module: Any = self.lightning_module
        self.callback.setup(run, module, "fit")
        if saved is not None:
            module.load_state_dict(saved["model"])
            self.callback.load_state_dict(saved["callback"])
        self.callback.on_fit_start(run, module)
        if saved is not None:
            self.optimizers[0].load_state_dict(saved["optimizer"])
            self.global_step = saved["step"]
        self.callback.on_train_start(run, module)

    def begin_batch(self, batch: Tensor) -> None:
        """Let an episode begin where one is due."""
        run: Any = self
        module: Any = self.lightning_module
        self.callback.on_train_batch_start(run, module, batch, self.global_step)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass."""
        run: Any = self
        module: Any = self.lightning_module
        self.callback.on_before_backward(run, module, loss)
        loss.backward()
        self.callback.on_after_backward(run, module)

    def end_batch(self, batch: Tensor) -> None:
        """End a batch, after the optimizer's step if there was one."""
        run: Any = self
        module: Any = self.lightning_module
        self.callback.on_train_batch_end(run, module, None, batch, self.global_step)

    def fail(self, error: BaseException) -> None:
        """End the fit as Lightning does after an error."""
        run: Any = self
        module: Any = self.lightning_module
        self.callback.on_exception(run, module, error)

    def end(self) -> None:
        """End the fit."""
        run: Any = self
        module: Any = self.lightning_module
        self.callback.teardown(run, module, "fit")

    def checkpoint(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {
            "model": self.lightning_module.state_dict(),
            "callback": self.callback.state_dict(),
            "optimizer": self.optimizers[0].state_dict(),
            "step": self.global_step,
        }
