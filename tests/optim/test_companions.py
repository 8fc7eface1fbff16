"""What works on an optimizer works on this one: schedulers, scalers, hooks, Lightning, closures."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.data import DataLoader

from lightning_mat.optim import MATOptimizer
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import Slice, Unit
from tests.optim.cases import Model, gradients, set_gradients, units_of
from tests.reference.optim import SlabOracle

ACTIVE = [True, False, True, False, True]


@pytest.mark.parametrize("holds", ["wrapper", "inner"])
def test_learning_rate_schedulers_hold_either_object(holds: str) -> None:
    model = Model()
    inner = SGD(model.parameters(), lr=1.0, momentum=0.9)
    scheduler = StepLR(inner, 1, gamma=0.5) if holds == "inner" else None
    optimizer = MATOptimizer(inner, model, units_of(model))
    scheduler = scheduler or StepLR(optimizer, 1, gamma=0.5)
    optimizer.apply(ACTIVE)
    oracle = SlabOracle(model, optimizer.part, lambda _, p: SGD(p, lr=1.0, momentum=0.9))
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # e.g. "lr_scheduler.step() before optimizer.step()"
        for seed in range(3):
            grads = gradients(model, torch.Generator().manual_seed(seed))
            set_gradients(model, grads)
            rates.append(optimizer.param_groups[0]["lr"])
            for *_, slab_optimizer in oracle.slabs:
                slab_optimizer.param_groups[0]["lr"] = rates[-1]
            optimizer.step()
            oracle.step(grads, ACTIVE)
            scheduler.step()
    assert rates == [1.0, 0.5, 0.25]
    torch.testing.assert_close(model.rows.detach(), oracle.params["rows"])


def test_schedulers_that_look_inside() -> None:
    model = Model()
    optimizer = MATOptimizer(Adam(model.parameters(), lr=0.1), model, units_of(model))
    OneCycleLR(optimizer, 0.5, total_steps=10)
    assert optimizer.inner.param_groups[0]["max_lr"] == 0.5
    plateau = ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        plateau.step(1.0)
    assert optimizer.inner.param_groups[0]["lr"] < 0.1
    # Loading makes new groups: the wrapper shows those.
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.inner.param_groups
    LambdaLR(optimizer, lambda _: 0.5)


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_scaler_unscales_and_skips(fused: bool) -> None:
    model = Model().float()
    inner = AdamW(model.parameters(), fused=fused)
    optimizer = MATOptimizer(inner, model, units_of(model))
    optimizer.apply(ACTIVE)
    oracle = SlabOracle(model, optimizer.part, lambda _, p: AdamW(p))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for seed in range(3):
        scale = scaler.scale(torch.ones(())).item()
        grads = gradients(model, torch.Generator().manual_seed(seed))
        scaled = {name: grad.float() * scale for name, grad in grads.items()}
        if seed == 1:
            scaled["rows"][0, 0] = torch.inf
        else:
            oracle.step({name: grad.float() for name, grad in grads.items()}, ACTIVE)
        set_gradients(model, scaled)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4.0
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach(), oracle.params[name], rtol=1e-5, atol=1e-6)


def test_the_closure_runs_once_with_gradients_enabled_and_its_loss_comes_back() -> None:
    model = nn.Linear(3, 4)
    part = Partition([Unit("a", "ffn", "", (Slice("weight", 0, 0, 2),))], model)
    optimizer = MATOptimizer(SGD(model.parameters(), lr=0.1), model, part)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        assert optimizer.param_groups[0]["params"][0] is model.weight
        optimizer.zero_grad()
        loss = model(torch.ones(3)).sum()
        loss.backward()
        return loss

    for active in ([True], [False]):
        optimizer.apply(active)
        before = model.weight.detach().clone()
        with torch.no_grad():
            expected = model(torch.ones(3)).sum()
            assert torch.equal(optimizer.step(closure=closure), expected)
        assert torch.equal(model.weight[:2], before[:2]) is not active[0]
        assert torch.equal(model.weight[2:], before[2:] - 0.1)
    assert calls == [True, True]
    assert optimizer.step() is None


@pytest.mark.parametrize("stage", ["closure", "step"])
def test_an_error_leaves_the_parameters_in_their_groups(stage: str) -> None:
    model = Model()
    inner = Adam(model.parameters(), fused=True)
    optimizer = MATOptimizer(inner, model, units_of(model))
    optimizer.apply(ACTIVE)
    set_gradients(model, gradients(model, torch.Generator()))

    def closure() -> float:
        if stage == "closure":
            raise RuntimeError("no data")
        inner.param_groups[0]["betas"] = None
        return 0.0

    with pytest.raises((RuntimeError, TypeError)):
        optimizer.step(closure)
    assert list(map(id, inner.param_groups[0]["params"])) == list(map(id, model.parameters()))
    assert len(inner.param_groups) == 1
    assert set(inner.state) <= set(model.parameters())
    inner.param_groups[0]["betas"] = (0.9, 0.999)
    optimizer.step()


def test_hooks_run_once_and_see_the_parameters() -> None:
    model = Model()
    inner = Adam(model.parameters())
    seen: list[str] = []

    def record(name: str) -> Any:
        def hook(optimizer: Optimizer, *_: object) -> None:
            assert list(map(id, optimizer.param_groups[0]["params"])) == list(
                map(id, model.parameters())
            )
            assert set(optimizer.state) <= set(model.parameters())
            seen.append(name)

        return hook

    inner.register_step_pre_hook(record("pre inner"))
    inner.register_step_post_hook(record("post inner"))
    optimizer = MATOptimizer(inner, model, units_of(model))
    optimizer.register_step_pre_hook(record("pre"))
    optimizer.register_step_post_hook(record("post"))
    handles = [
        register_optimizer_step_pre_hook(record("global pre")),
        register_optimizer_step_post_hook(record("global post")),
    ]
    set_gradients(model, gradients(model, torch.Generator()))
    everything = ["global pre", "pre inner", "pre", "post inner", "post", "global post"]
    for active in (ACTIVE, [True] * 5):
        optimizer.apply(active)
        seen.clear()
        optimizer.step()
        assert seen == everything
    for handle in handles:
        handle.remove()


def test_state_dict_hooks_run() -> None:
    model = Model()
    optimizer = MATOptimizer(Adam(model.parameters()), model, units_of(model))
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": "mine"})
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("load"))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert saved["note"] == "mine"
    assert seen == ["save", "load"]


def test_stepping_the_inner_optimizer_steps_the_slabs() -> None:
    model = Model()
    inner = Adam(model.parameters())
    optimizer = MATOptimizer(inner, model, units_of(model))
    optimizer.apply(ACTIVE)
    before = model.rows.detach().clone()
    set_gradients(model, gradients(model, torch.Generator()))
    inner.step()
    assert torch.equal(model.rows[2:4], before[2:4])
    assert not torch.equal(model.rows[:2], before[:2])


def test_zero_grad_reaches_resting_parameters_too() -> None:
    model = Model()
    optimizer = MATOptimizer(Adam(model.parameters()), model, units_of(model))
    optimizer.apply([False] * 5)
    set_gradients(model, gradients(model, torch.Generator()))
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_group_may_be_added() -> None:
    model = Model()
    part = units_of(model)
    later = [model.rows, model.free]
    first = [p for p in model.parameters() if all(p is not q for q in later)]
    optimizer = MATOptimizer(Adam(first), model, part)
    optimizer.apply(ACTIVE)
    set_gradients(model, gradients(model, torch.Generator()))
    for _ in range(3):
        optimizer.step()
    optimizer.add_param_group({"params": [model.rows], "lr": 0.5})
    optimizer.inner.add_param_group({"params": [model.free]})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert torch.equal(model.rows[2:4], before["rows"][2:4])
    assert not torch.equal(model.rows[:2], before["rows"][:2])
    assert not torch.equal(model.free, before["free"])
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert optimizer.state_dict()["mat"]["rows"]["history"]["step"].nan_to_num(0).tolist() == [
        1, 0, 1,
    ]  # fmt: skip


def test_lightnings_wrapper_shares_the_optimizer() -> None:
    model = Model()
    optimizer = MATOptimizer(Adam(model.parameters()), model, units_of(model))
    wrapped = LightningOptimizer(optimizer)
    assert isinstance(wrapped, MATOptimizer)
    assert isinstance(wrapped, Optimizer)
    wrapped.apply(ACTIVE)
    set_gradients(model, gradients(model, torch.Generator()))
    optimizer.step()
    assert model.whole in wrapped.state
    assert wrapped.param_groups is optimizer.inner.param_groups
    assert wrapped.state_dict()["mat"].keys() == optimizer.state_dict()["mat"].keys()
    wrapped.load_state_dict(optimizer.state_dict())
    assert "3 of 5 units train" in repr(optimizer)
    wrapped.zero_grad()
    assert model.rows.grad is None


class Module(pl.LightningModule):
    """Regression with one unit of two at rest, switched on a step boundary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(4, 4)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.layer(batch).square().mean()

    def on_train_batch_start(self, *_: Any) -> None:
        self.optimizers().apply([self.global_step % 2 == 0, self.global_step % 3 == 0])

    def configure_optimizers(self) -> dict[str, Any]:
        units = [
            Unit(
                str(i),
                "ffn",
                "",
                (Slice("layer.weight", i, 0, 2), Slice("layer.bias", 0, i, i + 1)),
            )
            for i in (0,)
        ]
        units.append(Unit("1", "ffn", "", (Slice("layer.weight", 0, 2, 3),)))
        optimizer = MATOptimizer(Adam(self.parameters(), lr=0.1), self, Partition(units, self))
        return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1, gamma=0.9)}


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_run_resumes_to_the_same_weights(tmp_path: Any) -> None:
    def trainer(epochs: int) -> pl.Trainer:
        return pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, gradient_clip_val=1.0,
        )  # fmt: skip

    data = DataLoader(torch.randn(12, 4), batch_size=3)
    whole = Module()
    trainer(3).fit(whole, data)
    first = trainer(1)
    first.fit(Module(), data)
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Module()
    trainer(3).fit(resumed, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_keeps_the_model_alive() -> None:
    model = Model()
    optimizer = MATOptimizer(Adam(model.parameters()), model, units_of(model))
    optimizer.apply(ACTIVE)
    set_gradients(model, gradients(model, torch.Generator()))
    optimizer.step()
    reference = weakref.ref(model.rows)
    del model, optimizer
    gc.collect()
    assert reference() is None
