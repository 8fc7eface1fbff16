"""Runs in several processes: what is refused, what is resumed, how the strategy is named."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.nn.parallel import DistributedDataParallel

from lightning_mat import MAT, MATCallback, Partition
from lightning_mat.parallel import MATDDPStrategy, Ranks, Ready
from lightning_mat.parallel.ready import hand_nothing
from lightning_mat.parallel.refusals import check_strategy
from lightning_mat.report.store import read
from tests.parallel import cases

# ---- refused at the start ------------------------------------------------------------------


class Plan:
    """What of a trainer is looked at."""

    def __init__(self, strategy: Any, module: nn.Module | None = None, size: int = 1) -> None:
        self.strategy, self.world_size = strategy, size
        self.lightning_module = nn.Linear(1, 1) if module is None else module


class Other(Strategy):
    """Somebody's own."""


def bare(kind: type[Strategy]) -> Any:
    """Return a strategy that was not set up: some need packages or GPUs for that."""
    concrete = type(kind.__name__, (kind,), {})
    concrete.__abstractmethods__ = frozenset()
    return object.__new__(concrete)


def with_mesh(strategy: Any, size: int) -> Any:
    """Return a strategy with a mesh in which so many processes hold a parameter together."""
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: size)}
    return strategy


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (Plan(bare(FSDPStrategy)), "it flattens the parameters"),
        (Plan(with_mesh(bare(ModelParallelStrategy), 2), size=4), "with tensor parallelism"),
        (Plan(bare(DeepSpeedStrategy)), "DeepSpeed takes gradients"),
        (Plan(DDPStrategy(static_graph=True)), "static_graph=True"),
        (
            Plan(DDPStrategy(ddp_comm_state=PostLocalSGDState(None, None, 1))),
            "post-local SGD",
        ),
        (Plan(bare(XLAStrategy)), "XLA traces the step once"),
        (Plan(bare(Other), size=2), "with DDP and FSDP2 only, this run has 2 with Other"),
        (
            Plan(DDPStrategy(), nn.Sequential(nn.DataParallel(nn.Linear(1, 1)))),
            "module '0' is an nn.DataParallel",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_an_alternative(plan: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        check_strategy(plan)
    assert "strategy=" in str(error.value) or "leave static_graph out" in str(error.value)


def test_a_refusal_comes_before_training(tmp_path: Path, processes: Any) -> None:
    plan = ("ddp", {"static_graph": True})
    for error in processes.run(cases.gradients, tmp_path, plan, {"mat": {}}):
        assert isinstance(error, ValueError)
        assert "static_graph" in str(error)


def grouped(folder: Path) -> Any:
    """Train each process as a group of its own, and all as one that is not the default one."""
    rank = dist.get_rank()
    own = [dist.new_group([i]) for i in range(dist.get_world_size())][rank]
    everyone = dist.new_group()
    weights = {}
    for name in ("ddp", "ddp_mat"):
        module = cases.fit(folder / name, (name, {"process_group": own}), max_steps=3)[0]
        weights[name] = [p.detach().clone() for p in module.parameters()]
    try:
        cases.fit(folder / "refused", ("ddp_mat", {"process_group": own}), mat={})
        said = "nothing"
    except ValueError as error:
        said = str(error)
    options: dict[str, Any] = {"mat": {}, "max_steps": 3}
    together = cases.gradients(folder, ("ddp_mat", {"process_group": everyone}), options)
    return weights["ddp"], weights["ddp_mat"], said, together["weights"]


@pytest.mark.filterwarnings("ignore")
def test_gradients_are_averaged_over_the_process_group(
    tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    first, second = on_both(grouped, tmp_path)
    for plain, ours, said, _ in (first, second):
        assert all(map(torch.equal, plain, ours))
        assert "process_group has 1 of 2 processes" in said
    assert not any(map(torch.equal, first[1], second[1]))
    assert all(map(torch.equal, first[3], second[3]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("skip", ["weights", "units"])
def test_ddp_of_one_process_is_plain_training(
    skip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # Lightning leaves addresses there
    options = {"mat": {"skip": skip}}
    one = cases.gradients(tmp_path / "a", None, options)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        other = cases.gradients(tmp_path / "b", ("ddp_mat", {}), options)
    finally:
        dist.destroy_process_group()
    assert all(map(torch.equal, one["weights"], other["weights"]))
    assert one["active"] == other["active"]


# ---- the loss ------------------------------------------------------------------------------


def test_a_loss_that_autograd_saved_can_be_marked() -> None:
    weight, other = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(3))
    loss = weight.exp()  # its backward pass reads its output
    hand_nothing(loss, [other])
    loss.backward()
    assert float(weight.grad) == pytest.approx(float(torch.tensor(2.0).exp()))
    assert other.grad is None


def test_a_loss_without_gradients_can_be_marked() -> None:
    weight, loss = nn.Parameter(torch.ones(3)), torch.tensor(1.0)
    hand_nothing(loss, [weight])
    loss.backward()
    assert weight.grad is None


def test_a_loss_of_several_views_is_refused() -> None:
    losses = (nn.Parameter(torch.ones(2)) * 2).unbind()
    with pytest.raises(RuntimeError, match=r"loss\.clone\(\)"):
        hand_nothing(losses[0], [nn.Parameter(torch.ones(1))])


class Forked(nn.Module):
    """Uses another layer on every rank, beside blocks that units own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([cases.Block(), cases.Block()])
        self.sides = nn.ModuleList([nn.Linear(cases.WIDTH, 1) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sides[dist.get_rank()](self.blocks[1](self.blocks[0](x)))


def forked() -> str:
    """Return what a backward pass says in which the ranks use different parameters."""
    model = Forked()
    ddp = DistributedDataParallel(model)
    mat = MAT(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        Partition(cases.units(model), model),
        cases.Cycle(),
        skip="units",
        ranks=Ranks(torch.device("cpu")),
    )
    mat.update(None, step=0)
    ready, loss = Ready(ddp, mat), ddp(torch.ones(2, cases.WIDTH)).sum()
    ready.before_backward(loss)
    loss.backward()
    try:
        ready.after_backward()
    except RuntimeError as error:
        return str(error)
    finally:
        mat.close()
    return "nothing"


def test_ranks_that_use_other_parameters_are_told_what_to_do(
    on_both: Callable[..., list[Any]],
) -> None:
    for said in on_both(forked):
        assert "'sides.0.weight' got a gradient in 1 of 2 processes only" in said
        assert "ddp_find_unused_parameters_true" in said


# ---- resumed -------------------------------------------------------------------------------


def stopped_and_resumed(folder: Path, name: str) -> Any:
    """Return the end of a run, and of the same one stopped inside an epoch and an episode."""
    mat = {"alpha": "auto", "every_n_steps": 4, "skip": "units"}
    same: dict[str, Any] = {"mat": mat, "net": {"batch_norm": True}}
    ends = []
    whole = cases.fit(folder / "whole", (name, {}), **same)
    save = ModelCheckpoint(folder / "saved", save_last=True, every_n_train_steps=1)
    half = {"callbacks": [save], "enable_checkpointing": True, "max_steps": 7}
    cases.fit(folder / "half", (name, {}), **same, **half)
    last = folder / "saved" / "last.ckpt"
    resumed = cases.fit(folder / "resumed", (name, {}), **same, ckpt_path=last)
    for module, _, adaptive, trainer in (whole, resumed):
        state = adaptive.mat.state_dict()
        optimizer = trainer.optimizers[0].state_dict()["state"]
        ends.append(
            {
                "weights": [p.detach().clone() for p in module.parameters()],
                "moments": [values["exp_avg_sq"] for values in optimizer.values()],
                "lambda_max": state["history"]["lambda_max"],
                "shared": state["shared"]["cost"],
                "decision": adaptive.mat.decision.digest(),
                "summary": {k: v for k, v in adaptive.summary().items() if "seconds" not in k},
            }
        )
    return ends


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ddp", "ddp_mat"])
def test_a_resumed_run_ends_with_the_same_bits(
    name: str, tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    (whole, resumed), other = on_both(stopped_and_resumed, tmp_path, name)
    assert whole["decision"] == resumed["decision"] == other[0]["decision"]
    assert whole["summary"] == resumed["summary"] == other[0]["summary"] == other[1]["summary"]
    for key in ("weights", "moments"):
        assert all(map(torch.equal, whole[key], resumed[key]))
        assert all(map(torch.equal, whole[key], other[1][key]))
    assert torch.equal(whole["lambda_max"], resumed["lambda_max"])
    assert torch.equal(whole["shared"], resumed["shared"])
    assert len(whole["lambda_max"]) == 3
    found = read(tmp_path / "resumed/mat/spectra.npz").step.tolist()
    assert found == [8]  # rank 0 alone writes, what came after the checkpoint


@pytest.mark.filterwarnings("ignore")
def test_another_number_of_processes_decides_the_same(
    tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    mat = {"alpha": "auto", "every_n_steps": 4, "skip": "units"}
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    half = {"callbacks": [save], "enable_checkpointing": True, "max_steps": 7}
    cases.fit(tmp_path / "one", None, mat=mat, **half)
    last = {"mat": mat, "ckpt_path": tmp_path / "last.ckpt"}
    alone = cases.gradients(tmp_path / "alone", None, last)
    for rank in on_both(cases.gradients, tmp_path / "both", ("ddp_mat", {}), last):
        assert rank["active"] == alone["active"]
        assert not all(map(all, rank["active"]))
        assert rank["history"]["step"] == alone["history"]["step"]


def with_other_states(folder: Path) -> Any:
    """Resume from a checkpoint that holds another decision on the second rank."""
    mat, rank = {"every_n_steps": 2}, torch.distributed.get_rank()
    save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    half = {"callbacks": [save], "enable_checkpointing": True, "max_steps": 5}
    cases.fit(folder / "half", ("ddp", {}), mat=mat, **half)
    state = torch.load(folder / "last.ckpt", weights_only=True)
    if rank:
        name = next(key for key in state["callbacks"] if "MATCallback" in key)
        state["callbacks"][name]["mat"]["decision"]["active"][0] ^= True
    torch.save(state, folder / f"{rank}.ckpt")
    cases.fit(folder / "more", ("ddp", {}), mat=mat, ckpt_path=folder / f"{rank}.ckpt")


@pytest.mark.filterwarnings("ignore")
def test_ranks_with_other_states_are_found_out(tmp_path: Path, processes: Any) -> None:
    for error in processes.run(with_other_states, tmp_path):
        assert isinstance(error, RuntimeError)
        assert "the state of process 1" in str(error)


# ---- the name ------------------------------------------------------------------------------


def test_the_strategy_has_a_name() -> None:
    assert MATCallback is not None  # the import of the callback registers it
    trainer = pl.Trainer(strategy="ddp_mat", accelerator="cpu", logger=False)
    assert isinstance(trainer.strategy, MATDDPStrategy)


def test_the_command_line_knows_the_strategy(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    config = tmp_path / "run.yaml"
    config.write_text(
        "trainer:\n  strategy: ddp_mat\n  accelerator: cpu\n  logger: false\n"
        "  callbacks: [{class_path: lightning_mat.MATCallback, init_args: {units: layers}}]\n"
    )
    code = (
        "import sys; import lightning_mat\n"
        "from lightning.pytorch.cli import LightningCLI\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "cli = LightningCLI(BoringModel, run=False, save_config_callback=None,"
        " args=['--config', sys.argv[1]])\n"
        "print(type(cli.trainer.strategy).__name__)\n"
    )
    run = [sys.executable, "-W", "ignore", "-c", code, str(config)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert "MATDDPStrategy" in done.stdout, done.stderr[-2000:]
