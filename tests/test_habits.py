"""Habits of Lightning's users: modules, loaders and trainers that are a little unusual."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lightning_mat import MAT, flops, policies
from lightning_mat.mntk.extent import Extent
from lightning_mat.run import samples_of
from tests.lightning_models import Small, data, mat, model, trainer


class Autoencoder(pl.LightningModule):
    """Its forward is the encoder alone, as in Lightning's first example."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.decoder(self.encoder(batch[0])), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_units_that_the_forward_pass_never_reaches_are_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"2 of 4 units .*decoder.* are not used") as said:
        trainer(tmp_path, mat()).fit(Autoencoder(), data())
    assert sum("are not used" in str(w.message) for w in said) == 1  # not in every probe
    callback = mat(forward=lambda module, batch: module.decoder(module.encoder(batch[0])))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*are not used.*")
        trainer(tmp_path / "all", callback).fit(Autoencoder(), data())
    assert callback.mat is not None
    assert (callback.mat.history.lambda_max > 0).all()


def test_a_softmax_at_the_end_is_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3), nn.Softmax(1))
    engine = MAT(net, units="layers")
    with pytest.warns(UserWarning, match="hardly depends on its parameters, as that of a softmax"):
        engine.update(x, step=0)
    engine.close()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*hardly depends.*")
        for model, output in ((net, "random"), (net[:-1], "sum_logits")):
            engine = MAT(model, units="layers", output=output)
            engine.update(x, step=0)
            engine.close()


def test_noise_of_a_softmax_is_not_taken_for_samples_that_are_mixed() -> None:
    said = []
    for seed in range(30):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3), nn.Softmax(1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine = MAT(net, units="layers")
            try:
                engine.update(torch.randn(8, 6), step=0)
                said.append(any("hardly depends" in str(w.message) for w in caught))
            except ValueError as error:
                said.append("hardly depends" in str(error))
    assert all(said)


class Adapted(nn.Module):
    """A frozen layer with an adapter of low rank, which is zero so far."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return 100 + self.base(x) + self.up(self.down(x))


def test_an_adapter_that_is_zero_so_far_is_no_constant() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*hardly depends.*")
        MAT(Adapted(), units="layers").update(torch.randn(8, 6), step=0)


def test_a_model_under_another_gate_is_not_measured() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    first, second = (MAT(net, units="layers") for _ in range(2))
    first.gate.apply([True, False])
    with pytest.raises(RuntimeError, match="a gate is on it already"):
        second.update(torch.randn(8, 6), step=0)
    first.close()
    second.update(torch.randn(8, 6), step=0)


class Validated(Small):
    """Has a validation metric that is best in the first epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("worse", float(self.current_epoch))

    test_step = validation_step


def test_testing_the_best_checkpoint_changes_nothing_of_the_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback, best = mat(), ModelCheckpoint(tmp_path / "best", monitor="worse")
    fit = trainer(tmp_path, callback, best, enable_checkpointing=True)
    module = Validated()
    fit.fit(module, data(), data())
    assert callback.mat is not None
    before, decision = callback.summary(), callback.mat.decision
    fit.test(dataloaders=data(), verbose=False, ckpt_path="best")
    fit.validate(module, data(), verbose=False, ckpt_path=best.best_model_path)
    assert (callback.summary(), callback.mat.decision) == (before, decision)
    fit.save_checkpoint(tmp_path / "final.ckpt")
    saved = torch.load(tmp_path / "final.ckpt", weights_only=True)["callbacks"]["MATCallback"]
    assert saved["mat"]["probes"] == callback.mat.probes > 1


class Sentences(Dataset[tuple[Tensor, Tensor]]):
    """Of very different lengths."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        length = int(8 * 2 ** (3 * torch.rand((), generator=generator)))
        return torch.randn(length, 8, generator=generator), torch.tensor(index % 3)


def padded(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Collate to the longest of a batch."""
    return pad_sequence([x for x, _ in items], batch_first=True), torch.stack([y for _, y in items])


class Tagger(Small):
    """Works on every word alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(layer for _ in range(5) for layer in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean(1)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_units_cost_what_they_do_in_batches_that_are_padded_less_than_a_probe(
    tmp_path: Path, batch_size: int
) -> None:
    torch.manual_seed(0)
    callback = mat(policy=policies.MAT(budget=0.85), n_samples=64)
    loader = DataLoader(Sentences(), batch_size, collate_fn=padded)
    trainer(tmp_path, callback, max_epochs=2, log_every_n_steps=50).fit(Tagger(), loader)
    assert callback.mat is not None
    assert callback.mat.probes == 1
    table = callback.mat.table()
    # Of three products of each layer one is for its weight; the first has no input gradient.
    weights = [8 * 8] * 5 + [8 * 3]
    share = sum(weights) / (3 * sum(weights) - weights[0])
    assert float(table.cost.sum()) / table.full_cost == pytest.approx(share, rel=1e-6)
    saved = MAT(Tagger(), units="layers")
    saved.load_state_dict(callback.mat.state_dict())
    assert torch.equal(saved.table().cost, table.cost)


def test_extents_tell_padding_and_nothing_else() -> None:
    one, other = padded([Sentences()[0]]), padded([Sentences()[i] for i in range(8)])
    assert Extent.of(other).over(Extent.of(one)) == other[0].shape[1] / one[0].shape[1]
    assert Extent.of(other[0]).over(Extent.of(one)) == 1.0  # of another kind
    assert Extent.of("no tensor").over(Extent()) == 1.0


class Skips(Small):
    """Has no loss for the first batch of each epoch."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return None if batch_idx == 0 else super().training_step(batch, batch_idx)


def test_a_batch_without_a_loss_is_not_what_the_others_cost(tmp_path: Path) -> None:
    costs = []
    for kind in (Small, Skips):
        callback = mat(policy=policies.Full())
        trainer(tmp_path / kind.__name__, callback).fit(kind(), data())
        costs.append(callback.summary())
    assert costs[0]["full_step_flops"] == costs[1]["full_step_flops"] > 0
    # Of 24 batches the first ran no operation that counts; the other three are charged as steps.
    assert costs[1]["flops"] == costs[0]["flops"] * 23 / 24


def test_batches_of_several_loaders_count_the_fewest_samples() -> None:
    assert samples_of({"a": torch.zeros(16, 2), "b": (torch.zeros(64, 3), torch.tensor(0.5))}) == 16
    assert samples_of([torch.tensor(0.5), None]) == samples_of(torch.zeros(0, 3)) == 1


class Recurrent(Small):
    """Makes tensors in forward without saying of which type."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(6, 8), nn.Linear(8, 3)
        self.net = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x, torch.zeros(len(x), 8, device=x.device)))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("output", ["sum_logits", lambda module, batch: module(batch[0]).sum(1)])
def test_what_forward_makes_has_the_type_of_a_training_step(
    tmp_path: Path, precision: Any, output: Any
) -> None:
    callback = mat(output=output)
    trainer(tmp_path, callback, precision=precision, max_epochs=3).fit(Recurrent(), data())
    assert callback.summary()["probes"] == 2
    assert torch.get_default_dtype() == torch.float32


class Augments(Small):
    """Adds noise on the device, and remembers what it trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(float(batch[0].sum()))
        return super().training_step(batch, batch_idx)


def test_hooks_that_augment_a_probe_leave_the_training_as_it_was(tmp_path: Path) -> None:
    seen = []
    for callbacks in ([], [mat(dry_run=True)]):
        torch.manual_seed(0)
        module = Augments()
        trainer(tmp_path / str(len(seen)), *callbacks, max_epochs=2).fit(module, data())
        seen.append(module.seen)
    assert seen[0] == seen[1]


def test_the_noise_of_a_probe_depends_on_its_seed_alone(tmp_path: Path) -> None:
    found = []
    for drawn in (0, 3):
        callback = mat(warmup_epochs=0)
        torch.manual_seed(0)
        module = Augments()
        torch.rand(drawn)
        trainer(tmp_path / str(drawn), callback, max_steps=1).fit(module, data())
        assert callback.mat is not None
        found.append(callback.mat.history.lambda_max)
    assert torch.equal(*found)


def test_a_development_run_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    callback = mat(warmup_epochs=0)
    run = pl.Trainer(fast_dev_run=True, accelerator="cpu", callbacks=[callback], logger=True)
    run.fit(model(), data())
    assert callback.summary()["probes"] == 1
    assert not list(tmp_path.iterdir())


class Penalised(Small):
    """Has a loss with the gradient's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        y = self(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return nn.functional.cross_entropy(y, batch[1]) + slope.square().mean()


def test_second_derivatives_are_refused_with_the_remedy(tmp_path: Path) -> None:
    policy = policies.Random(0.5)
    with pytest.raises(RuntimeError, match=r"no second derivatives .*units=\"layers\""):
        trainer(tmp_path / "a", mat(units="ffn", policy=policy)).fit(Penalised(), data())
    trainer(tmp_path / "b", mat(units="layers", policy=policy)).fit(Penalised(), data())


def test_learning_rates_are_logged_as_those_of_the_optimizer(tmp_path: Path) -> None:
    monitor = LearningRateMonitor()
    trainer(tmp_path, mat(every_n_steps=5), monitor).fit(model(), data())
    assert list(monitor.lrs) == ["lr-AdamW"]


def test_a_tuner_does_not_bring_back_the_decision_of_the_last_fit(tmp_path: Path) -> None:
    callback = mat(every_n_steps=5)
    trainer(tmp_path / "a", callback).fit(model(), data())
    assert callback.mat is not None
    assert not callback.mat.active.all()
    seen: list[bool] = []

    class First(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            assert callback.mat is not None
            seen.append(bool(callback.mat.active.all()))

    finder = LearningRateFinder(num_training_steps=4)
    trainer(tmp_path / "b", finder, callback, First()).fit(Tuned(), data())
    assert seen[0]
    assert callback.mat.history.step[0] == 6


class Tuned(Small):
    """Has a learning rate to find."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.lr)


class Leaving(Small):
    """Leaves the rest of an epoch out once an episode has begun."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.counting = flops._eager.open


def test_nothing_is_counted_of_a_batch_that_is_left_out(tmp_path: Path) -> None:
    module = Leaving()
    callback = mat(every_n_steps=3, warmup_epochs=0)
    trainer(tmp_path, callback).fit(module, data(), data())
    assert module.counting == 0
    assert callback.summary()["probes"] > 1


class Shared(nn.Module):
    """Projects positions once for all samples, as DeBERTa does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.relative, self.out = (nn.Linear(6, 6) for _ in range(3))
        self.register_buffer("positions", torch.linspace(-1, 1, 18).view(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x)) @ self.relative(self.positions).mean(0).diag())


def test_a_layer_that_runs_once_for_all_samples_is_named() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"'relative' .* once for all samples.* shape \(3, 6\)"):
        MAT(Shared(), units="layers").update(torch.randn(8, 6), step=0)
