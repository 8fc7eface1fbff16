"""A model that ``fully_shard`` cuts through its units, and its runs, cut and in one piece."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_mat import MAT, MATCallback, Partition, Slice, Unit, policies
from lightning_mat.optim import pieces
from lightning_mat.parallel import Ranks
from lightning_mat.shards import reshard
from tests.parallel.cases import Block, Rows, batches

WORDS, WIDTH, HIDDEN, CLASSES = 7, 8, 12, 3
THIRDS = [(0, 4), (4, 8), (8, 12)]
# Which units train: word vectors (two slabs of rows), a norm and three slabs of neurons of each of
# two blocks. Two ranks have 6 neurons each: the middle slab is on both, the others on one.
DECISIONS = (
    "11 1111 1111",
    "10 0101 1110",
    "01 1001 0111",
    "11 1111 1111",
    "00 0000 1010",
    "11 1110 0000",
)


class Net(nn.Module):
    """Word vectors, two blocks, a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean(1))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def units(model: nn.Module) -> list[Unit]:
    words = next(name for name, m in model.named_modules() if isinstance(m, nn.Embedding))
    prefix = words.removesuffix("words")
    rows = [(0, 3), (3, WORDS)]
    found = [
        Unit(f"words.{i}", "layer", "words", (Slice(f"{prefix}words.weight", 0, a, b),))
        for i, (a, b) in enumerate(rows)
    ]
    for block in (f"{prefix}blocks.0", f"{prefix}blocks.1"):
        norm = (Slice(f"{block}.norm.weight"), Slice(f"{block}.norm.bias"))
        found.append(Unit(f"{block}.norm", "layer", block, norm))
        for third, (a, b) in enumerate(THIRDS):
            slices = (
                Slice(f"{block}.fc1.weight", 0, a, b),
                Slice(f"{block}.fc1.bias", 0, a, b),
                Slice(f"{block}.fc2.weight", 1, a, b),
            )
            found.append(Unit(f"{block}.{third}", "ffn", block, slices))
    return found


def flags(pattern: str) -> Tensor:
    return torch.tensor([flag == "1" for flag in pattern if flag != " "])


class Listed(policies.Policy):
    """Goes through some decisions; with spectra, measures before."""

    def __init__(self, patterns: Any = DECISIONS, needs_spectra: bool = False) -> None:
        self.patterns, self.needs = patterns, needs_spectra

    @property
    def needs_spectra(self) -> bool:
        return self.needs

    def decide(self, history: Any, units: Any, episode: int) -> policies.Decision:
        active = flags(self.patterns[episode % len(self.patterns)])
        return policies.Decision(active, ("test",) * len(active), {}, units.kinds)


def cut(model: Net, **options: Any) -> Net:
    """Return the model with each block and the rest of it sharded over all processes."""
    options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), **options}
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def samples(count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(WORDS, (count, 5), generator=generator)
    return x, (x.sum(1) % CLASSES)


def full(tensor: Any) -> Tensor | None:
    if tensor is None:
        return None
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def engine(model: Net, optimizer: Any, ranks: Ranks | None, patterns: Any, **options: Any) -> MAT:
    part = Partition(units(model), model)
    return MAT(model, optimizer, part, Listed(patterns), ranks=ranks, **options)


def trained(
    model: Net, optimizer: Any, ranks: Ranks | None, patterns: Any, **options: Any
) -> list[Any]:
    """Return gradients, weights and moments after each step, one step per decision.

    With ``ranks`` each process trains on its part of the samples.
    """
    mat = engine(model, optimizer(model.parameters()), ranks, patterns, **options)
    x, y = samples()
    if ranks is not None:
        x, y = (t.chunk(ranks.size)[ranks.rank] for t in (x, y))
    names = [name for name, _ in model.named_parameters()]
    found = []
    for step in range(len(patterns)):
        mat.update(None, step=step)
        nn.functional.cross_entropy(model(x).double(), y).backward()
        grads = [full(p.grad) for p in model.parameters()]
        mat.optimizers[0].step()
        mat.optimizers[0].zero_grad()
        weights = [full(p) for p in model.parameters()]
        found.append((grads, weights))
    state = mat.optimizers[0].state
    moments = [
        {key: full(v) if isinstance(v, Tensor) else v for key, v in state.get(p, {}).items()}
        for p in model.parameters()
    ]
    beside = mat.optimizers[0].state_beside()
    mat.close()
    return [names, found, moments, beside]


def both_ways(optimizer: Any, *, in_place: bool = False, **options: Any) -> Any:
    """Return what :func:`trained` does of a sharded model, and of one in one piece.

    Args:
        optimizer: Makes it.
        in_place: Step the sharded model's slabs in place, as large ones, not as copies.
        options: Of the engine.
    """
    with pytest.MonkeyPatch.context() as patch:
        if in_place:
            patch.setattr(pieces, "PACK_BELOW", 1)
            patch.setattr(pieces, "FUSED_PACK_BELOW", 1)
        ours = trained(cut(net()), optimizer, Ranks(torch.device("cpu")), DECISIONS, **options)
    return ours, trained(net(), optimizer, None, DECISIONS, **options)


class Module(pl.LightningModule):
    """The model as Lightning trains it."""

    def __init__(self, shards: bool = True, **options: Any) -> None:
        super().__init__()
        self.net, self.shards, self.options = net(), shards, options

    def configure_model(self) -> None:
        if self.shards and not isinstance(self.net, FSDPModule):
            cut(self.net, mesh=self.device_mesh["data_parallel"], **self.options)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def fit(
    folder: Path,
    *,
    shards: bool = True,
    ckpt_path: Path | None = None,
    distributed: bool = True,
    mat: dict[str, Any] | None = None,
    plain: bool = False,
    **options: Any,
) -> tuple[Module, MATCallback, pl.Trainer]:
    """Train through Lightning, 6 steps an epoch, 4 steps an episode; plain is without MAT."""
    given = {"warmup_epochs": 0, "every_n_steps": 4, "n_samples": 8, **(mat or {})}
    if not given.keys() & {"alpha", "policy"}:
        given["policy"] = Listed(needs_spectra=True)
    callback = MATCallback(units, **given)
    size = dist.get_world_size() if shards else 1
    plan: Any = "auto"
    if shards:
        plan = ModelParallelStrategy(
            data_parallel_size=size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=distributed,
            process_group_backend="gloo",
        )
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": size,
        "strategy": plan,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 1,
    }
    more = options.pop("callbacks", [])
    own = [] if plain else [callback]
    trainer = pl.Trainer(callbacks=[*own, *more], **(settings | options))
    module, data = Module(shards), Rows(*samples(96))
    loaders = batches(data, size), batches(data, size)
    trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True)
    return module, callback, trainer


def summary(run: tuple[Module, MATCallback, pl.Trainer]) -> dict[str, Any]:
    """Return plain tensors and numbers of the end of a run."""
    module, callback, trainer = run
    optimizer = trainer.strategy.optimizers[0]
    reshard(module)  # a validation at the end leaves what is outermost gathered
    return {
        "weights": [full(p) for p in module.parameters()],
        "moments": [full(optimizer.state[p]["exp_avg_sq"]) for p in module.parameters()],
        "decision": callback.mat.decision.digest(),
        "active": callback.mat.active.tolist(),
        "lambda_max": callback.mat.history.state_dict()["lambda_max"],
        "beside": optimizer.state_beside(),
        "steps": trainer.global_step,
    }


@contextmanager
def used_outside(layer: nn.Module) -> Iterator[None]:
    """Let a layer's forward run as if the model read its parameters itself."""
    gated = layer.__dict__.pop("forward")
    try:
        yield
    finally:
        layer.__dict__["forward"] = gated


def copied(thing: Any) -> Any:
    return copy.deepcopy(thing)
