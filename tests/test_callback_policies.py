"""MATCallback with policies that bring a calendar, rates or a record, and the paper's presets."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from examples.models.bert import Bert, preset
from examples.models.vgg import VGG16
from lightning_mat import MAT, MATCallback, MATOptimizer, engine, flops, policies
from lightning_mat.ledger import Ledger
from lightning_mat.presets import PAPER
from lightning_mat.report.store import read
from tests.lightning_models import Small, Watch, data, mat, model, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:the threshold rests")


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[bool], list[float] | None]]:
    """Return the decisions that reach an optimizer, which then steps at a rate of 1."""
    noted: list[tuple[list[bool], list[float] | None]] = []

    class Noting(MATOptimizer):
        def apply(self, active: Any, rates: Tensor | None = None) -> None:
            noted.append((active.tolist(), None if rates is None else rates.tolist()))
            super().apply(active)

    monkeypatch.setattr(engine, "MATOptimizer", Noting)
    return noted


def rows_of(folder: Path, column: str) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get(column)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_multirate_decides_in_every_optimizer_step(
    tmp_path: Path, applied: list[Any], accumulate: int
) -> None:
    callback = mat(policy=policies.Multirate(k=3), warmup_epochs=0)
    watch = Watch(callback)
    fit = trainer(tmp_path, callback, watch, accumulate_grad_batches=accumulate, max_epochs=2)
    fit.fit(model(), data())
    steps = [all(active) for active in watch.active[::accumulate]]
    assert steps == [step % 3 == 0 for step in range(12 // accumulate)]
    assert watch.active[::accumulate] == watch.active[accumulate - 1 :: accumulate]
    assert callback.mat is not None
    assert callback.mat.episode == 12 // accumulate
    assert callback.mat.probes == 0
    rates = callback.mat.decision.rates
    assert rates is not None
    assert sorted(rates.tolist()) in ([1, 1, 3], [1, 3, 3])
    assert [r for _, r in applied if r is not None] == [rates.tolist()] * (len(applied) - 2)


def test_what_holds_already_is_not_applied_again(applied: list[Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    run = MAT(net, optimizer, "layers", policies.Multirate(k=3, fast=0.5))
    for step in range(7):
        run.update(None, step=step)
    assert [all(active) for active, _ in applied] == [True, False, True, False, True]
    run.close()
    assert applied[-1] == ([True, True], None)
    run.update(None, step=7)
    run.update(None, step=8)
    assert [all(active) for active, _ in applied[-2:]] == [True, False]


def test_a_dry_run_has_no_rates(applied: list[Any]) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    run = MAT(net, optimizer, "layers", policies.Multirate(), dry_run=True)
    run.update(None, step=0)
    run.update(None, step=1)
    assert all(entry == ([True, True], None) for entry in applied)
    run.close()


def test_a_policy_of_single_steps_is_logged_once_and_counted_once_per_kind_of_step(
    tmp_path: Path, applied: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policies.Multirate(k=3)
    once, always = mat(policy=policy, warmup_epochs=0), mat(policy=policy, warmup_epochs=0)
    trainer(tmp_path / "once", once).fit(model(), data())
    assert len(rows_of(tmp_path / "once", "mat/trained_share")) == 1
    counted = rows_of(tmp_path / "once", "mat/step_flops")
    assert len(counted) == 2
    assert float(counted[0]["mat/step_flops"]) > float(counted[1]["mat/step_flops"])
    monkeypatch.setattr(Ledger, "switch", lambda self, active: setattr(self, "_due", True))
    trainer(tmp_path / "always", always).fit(model(), data())
    for name in ("flops", "full_step_flops", "trained_share"):
        assert once.summary()[name] == always.summary()[name]


def test_a_resumed_multirate_run_ends_with_the_same_bits(
    tmp_path: Path, applied: list[Any]
) -> None:
    def callback() -> MATCallback:
        return mat(policy=policies.Multirate(k=4), warmup_epochs=1)

    whole_callback, whole = callback(), model()
    trainer(tmp_path / "whole", whole_callback).fit(whole, data())
    save = ModelCheckpoint(tmp_path / "save", save_last=True, every_n_train_steps=1)
    options: dict[str, Any] = {"max_steps": 12, "enable_checkpointing": True}
    trainer(tmp_path / "half", callback(), save, **options).fit(model(), data())
    resumed, second = Small(), callback()
    trainer(tmp_path / "half", second).fit(
        resumed, data(), ckpt_path=tmp_path / "save" / "last.ckpt", weights_only=True
    )
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    assert second.mat is not None
    assert whole_callback.mat is not None
    assert second.mat.decision == whole_callback.mat.decision
    assert second.summary()["flops"] == whole_callback.summary()["flops"]


def test_multirate_is_the_method_by_hand(tmp_path: Path) -> None:
    policy = policies.Multirate(k=3)
    adaptive, by_hand = model(optimizer="sgd"), model(optimizer="sgd")
    callback = mat(policy=policy, warmup_epochs=0)
    trainer(tmp_path, callback, max_epochs=2).fit(adaptive, data())
    assert callback.mat is not None
    fast = policy.decide(policies.History(), callback.mat.table(), 1).active.tolist()
    layers = [list(layer.parameters()) for layer in by_hand.net if isinstance(layer, nn.Linear)]
    optimizers = [
        torch.optim.SGD(p, 0.05 * (1 if quick else 3), momentum=0.9, weight_decay=1e-2)
        for p, quick in zip(layers, fast, strict=True)
    ]
    loader, step = data(), 0
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for x, y in loader:
            for optimizer in optimizers:
                optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand(x), y).backward()
            for optimizer, quick in zip(optimizers, fast, strict=True):
                if quick or step % 3 == 0:
                    optimizer.step()
            step += 1
    for found, expected in zip(weights(adaptive), weights(by_hand), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{"every_n_epochs": 2}, {"every_n_steps": 5}])
def test_another_calendar_than_the_policys_is_refused(options: dict[str, int]) -> None:
    (name, value) = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"Multirate decides every 1 .* but {name}={value}"):
        MATCallback(policy=policies.Multirate(), **options)
    assert MATCallback(policy=policies.Multirate(), every_n_steps=1).schedule.every_n_steps == 1


def test_trainability_needs_the_loss_and_measures_its_alignment(tmp_path: Path) -> None:
    by_loss = policies.MAT("auto", criterion="trainability")
    for policy in (by_loss, policies.Top(0.5, criterion="trainability"), policies.Bottom(by_loss)):
        with pytest.raises(ValueError, match="exists for output=\"loss\" only, got 'sum_logits'"):
            MATCallback(policy=policy)
        callback = mat(policy=policy, output="loss")
        watch = Watch(callback)
        trainer(tmp_path, callback, watch).fit(model(), data())
        assert callback.mat is not None
        history = callback.mat.history
        assert history.alignment.shape == (3, 3)
        assert ((history.alignment >= 0) & (history.alignment <= 8)).all()
        assert watch.moved == watch.active
        assert any(not all(active) for active in watch.active)


def test_alignment_is_measured_only_where_it_is_needed(tmp_path: Path) -> None:
    callback = mat(output="loss")
    trainer(tmp_path, callback).fit(model(), data())
    assert callback.mat is not None
    assert callback.mat.history.alignment.isnan().all()


def test_thresholds_of_another_criterion_are_not_drawn_over_eigenvalues(tmp_path: Path) -> None:
    callback = mat(policy=policies.MAT(0.9, criterion="coherence"))
    trainer(tmp_path, callback).fit(model(), data())
    assert callback.mat is not None
    assert callback.mat.decision.thresholds["layer"] < 1
    stored = read(tmp_path / "mat/spectra.npz")
    assert not (stored.thresholds["layer"] >= 0).any()
    assert float(rows_of(tmp_path, "mat/layer/threshold")[-1]["mat/layer/threshold"]) < 1


def test_matched_trains_as_many_as_the_recorded_run(tmp_path: Path) -> None:
    recorded = mat()
    trainer(tmp_path / "mat", recorded).fit(model(), data())
    policy = policies.Matched.from_run(tmp_path / "mat")
    matched = mat(policy=policy)
    watch, of_mat = Watch(matched), read(tmp_path / "mat" / "mat" / "spectra.npz")
    trainer(tmp_path / "matched", matched, watch).fit(model(), data())
    trained = [sum(active) for active in watch.active]
    assert trained == [3] * 6 + [int(n) for n in of_mat.active.sum(1) for _ in range(6)]
    assert min(trained) < 3
    other = mat(policy=policies.Matched([{("x", "head"): 1}]))
    with pytest.raises(ValueError, match="use the record of a run with the same"):
        trainer(tmp_path / "other", other).fit(model(), data())


def test_top_trains_as_many_as_mat_would(tmp_path: Path) -> None:
    callback = mat(policy=policies.Top(policies.MAT("auto")))
    trainer(tmp_path, callback).fit(model(), data())
    assert callback.mat is not None
    history, table = callback.mat.history, callback.mat.table()
    mats = policies.MAT("auto").decide(history, table, 0)
    assert callback.mat.decision.by_kind() == mats.by_kind()


def test_a_policy_without_probes_knows_the_cost_of_a_full_step(tmp_path: Path) -> None:
    rested, whole = mat(policy=policies.Random(0.3)), mat(policy=policies.Full())
    trainer(tmp_path / "a", rested).fit(model(), data())
    trainer(tmp_path / "b", whole).fit(model(), data())
    assert rested.summary()["full_step_flops"] == whole.summary()["full_step_flops"]
    assert rested.summary()["flops"] < whole.summary()["flops"]


def test_the_papers_presets_are_its_numbers() -> None:
    bert, switch, vgg = (MATCallback.paper(name) for name in ("bert", "switch", "vgg"))
    assert bert.policy == policies.MAT(0.1, 1e-3)
    assert switch.policy == policies.MAT(
        {"head": 0.1, "expert": 0.2}, {"head": 1e-3, "expert": 1e-3}
    )
    assert vgg.policy == policies.MAT(0.2, 1e-6)
    calendars = [(c.schedule.warmup_epochs, c.schedule.every_n_epochs) for c in (bert, switch, vgg)]
    assert calendars == [(5, 8), (4, 2), (1, 1)]
    assert [c.n_samples for c in (bert, switch, vgg)] == [64] * 3
    due = [epoch for epoch in range(30) if bert.schedule.is_due(epoch, epoch * 10, 0)]
    assert due == [5, 13, 21, 29]


def test_overrides_win_over_a_preset() -> None:
    assert MATCallback.paper("bert", alpha=0.3, n_samples=8).policy == policies.MAT(0.3, 1e-3)
    assert MATCallback.paper("bert", every_n_steps=7).schedule.every_n_steps == 7
    for name in PAPER:
        baseline = MATCallback.paper(name, policy=policies.Random(0.5))
        assert baseline.policy == policies.Random(0.5)
        assert baseline.schedule.every_n_epochs == PAPER[name]["every_n_epochs"]
        multirate = MATCallback.paper(name, policy=policies.Multirate(), warmup_epochs=0)
        assert multirate.schedule.every_n_steps == 1
    with pytest.raises(ValueError, match="belong to the default policy"):
        MATCallback.paper("bert", policy=policies.Random(), alpha=0.3)
    with pytest.raises(ValueError, match="presets are 'bert', 'switch', 'vgg', got 'gpt'"):
        MATCallback.paper("gpt")


@pytest.mark.parametrize(
    ("policy", "options", "remedy"),
    [
        (policies.Random(), {"alpha": 0.5}, "drop alpha, which Random does not take$"),
        (policies.Random(), {"protect": False}, r"pass protect to Random\(...\)$"),
        (
            policies.Random(),
            {"alpha": 0.5, "beta": 0, "protect": False},
            r"pass protect to Random\(...\), and drop alpha and beta, which Random does not take$",
        ),
        (policies.MAT(), {"alpha": 0.5, "beta": 0}, r"pass alpha and beta to MAT\(...\)$"),
    ],
)
def test_settings_of_the_default_policy_are_sent_where_they_belong(
    policy: policies.Policy, options: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        MATCallback(policy=policy, **options)


class Answers:
    """A policy that returns what it was given."""

    def __init__(self, answer: Any, needs_spectra: bool) -> None:
        self.answer, self.needs_spectra = answer, needs_spectra

    def decide(self, *_: Any) -> Any:
        return self.answer


class Silent:
    """A policy that does not say whether it needs spectra."""

    def decide(self, *_: Any) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("random", r"got the str 'random', which has no decide\(history, units, episode\)"),
        (policies.Random, r"got the class Random: make one of it, Random\(...\)"),
        (Silent(), "got the Silent .*the bool needs_spectra .*, and has none"),
        (Answers(None, "yes"), "the bool needs_spectra .*, and has 'yes' there"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_policy_is_named_at_construction(policy: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MATCallback(policy=policy)
    with pytest.raises(TypeError, match=message):
        MAT(Small(), policy=policy)


@pytest.mark.parametrize("needs_spectra", [True, False])
def test_what_is_no_decision_is_named(tmp_path: Path, needs_spectra: bool) -> None:
    bare = Answers(torch.ones(3, dtype=torch.bool), needs_spectra)
    with pytest.raises(TypeError, match=r"Answers.decide must return .*Decision, got Tensor"):
        trainer(tmp_path / "a", mat(policy=bare)).fit(model(), data())
    short = policies.Decision(torch.tensor([True]), ("full",), {}, ("layer",))
    with pytest.raises(ValueError, match="about 1 units, but was asked about 3"):
        trainer(tmp_path / "b", mat(policy=Answers(short, needs_spectra))).fit(model(), data())


def test_no_optimizers_are_left_out() -> None:
    with pytest.raises(TypeError, match="optimizers must be an optimizer or several, got None"):
        MAT(Small(), None)  # type: ignore[arg-type]


def test_a_policy_within_a_policy_is_named_in_a_config(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n  accelerator: cpu\n  logger: false\n  callbacks:\n"
        "    - class_path: lightning_mat.MATCallback\n"
        "      init_args:\n        units: layers\n"
        "        policy:\n          class_path: lightning_mat.policies.Bottom\n"
        "          init_args:\n            criterion: coherence\n            fraction:\n"
        "              class_path: lightning_mat.policies.MAT\n"
        "              init_args: {alpha: auto}\n"
    )
    cli = LightningCLI(Small, run=False, args=["--config", str(config)], save_config_callback=None)
    (found,) = [c for c in cli.trainer.callbacks if isinstance(c, MATCallback)]  # type: ignore[attr-defined]
    assert found.policy == policies.Bottom(policies.MAT("auto"), criterion="coherence")


class Own(MATCallback):
    """A subclass."""


def test_a_subclass_has_the_presets_too() -> None:
    assert type(Own.paper("vgg")) is Own


def bert_step() -> tuple[nn.Module, Tensor]:
    words = torch.randint(50, (4, 16))
    return Bert(preset("tiny", vocab_size=50, max_length=16, dropout=0.0)), words


def vgg_step() -> tuple[nn.Module, Tensor]:
    return VGG16(width=4), torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize("skip", ["weights", "units"])
@pytest.mark.parametrize(
    ("make", "units", "budget"),
    [
        (bert_step, "heads+ffn", {"weights": 0.85, "units": 0.7}),
        (vgg_step, "filters", {"weights": 0.85, "units": 0.7}),
    ],
)
def test_a_step_within_a_budget_takes_no_more_flops(
    make: Any, units: str, budget: dict[str, float], skip: str
) -> None:
    torch.manual_seed(0)
    net, batch = make()

    def counted() -> int:
        with flops.count() as counter:
            net(batch).sum().backward()
        return counter.total

    policy = policies.MAT(budget=budget[skip])
    run = MAT(net, torch.optim.SGD(net.parameters(), 0.1), units, policy, skip=skip)
    full = counted()
    run.full_cost = full / len(batch)
    run.update(batch, step=0)
    assert not run.active.all()
    spent, said = counted() / full, run.table().cost_share(run.active)
    # What is said leaves a little out that is spared: attention's own products, and what the next
    # layer would send to a resting filter. An image needs no gradient, which is taken for spared.
    image = (
        2 * 32 * 32 * 27 * 4 * len(batch) / full if skip == "units" and units == "filters" else 0
    )
    assert 0.75 * said < spent <= said + image + 1e-9
    assert said <= budget[skip] + 1e-9
    # The budget is spent: no unit that rests would fit.
    assert said > budget[skip] - float(run.table().cost.max()) / run.full_cost
