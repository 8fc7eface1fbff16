"""NaN or Inf in some units' gradients: these stay as they are, the others are decided."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mat import MAT, Spectra, policies
from lightning_mat.policies import History, UnitTable
from lightning_mat.policies.criteria import criterion_values
from lightning_mat.policies.temporal import settled
from lightning_mat.report.page import report
from lightning_mat.report.store import read
from tests.lightning_models import Watch, data, mat, model, trainer

NAMES = ("a", "b", "c", "d")
TABLE = UnitTable(NAMES, ("head",) * 4, ("x", "x", "y", "y"), torch.ones(4), full_cost=10.0)


def spectra(*lambda_max: float, alignment: Tensor | None = None) -> Spectra:
    values = torch.tensor([[value, 0.0] for value in lambda_max], dtype=torch.float64)
    return Spectra(NAMES, values, torch.ones(4), alignment=alignment)


class Scripted(MAT):
    """Measures what it is told."""

    script: list[Spectra]

    def measure(self, batch: Any) -> Spectra:
        return self.script.pop(0)


def engine(policy: Any, *script: Spectra) -> MAT:
    class Four(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in NAMES:
                setattr(self, name, nn.Linear(2, 2))

    found = Scripted(Four(), units="layers", policy=policy)
    found.script = list(script)
    return found


def decide(found: MAT) -> list[bool]:
    return found.update(None, step=len(found.history)).active.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_those_units_stay_as_they_are_and_the_others_are_decided(bad: float) -> None:
    policy = policies.MAT(0.5, beta=0, protect=False)
    found = engine(policy, spectra(9, 1, 8, 1), spectra(bad, bad, 2, 6), spectra(1, 9, 2, 6))
    assert decide(found) == [True, False, True, False]
    with pytest.warns(UserWarning, match=r"of 2 of 4 units \(first 'a'\).*these units as they are"):
        # the threshold is 3, of what was measured
        assert decide(found) == [True, False, False, True]
    assert found.decision.thresholds == {"layer": 3.0}
    assert found.decision.reasons[:2] == ("λ_max ≥ λ_α", "below λ_α")
    assert found.history.lambda_max[1].isnan().tolist() == [True, True, False, False]
    assert decide(found) == [False, True, False, True]


def test_units_that_the_first_probe_could_not_measure_train() -> None:
    policy = policies.MAT(0.5, beta=0, protect=False)
    found = engine(policy, spectra(math.nan, 1, 8, 2))
    with pytest.warns(UserWarning, match="1 of 4 units"):
        assert decide(found) == [True, False, True, False]


def test_a_kind_of_which_nothing_is_left_keeps_the_whole_decision() -> None:
    policy = policies.MAT(0.5, beta=0, protect=False)
    found = engine(policy, spectra(9, 1, 8, 1), spectra(*[math.nan] * 4))
    before = decide(found)
    with pytest.warns(UserWarning, match="4 of 4 units.*keeping the previous decision"):
        assert decide(found) == before
    assert len(found.history) == 1


def test_rates_of_units_that_were_not_measured_are_kept() -> None:
    class Rates:
        needs_spectra = True

        def decide(self, history: History, units: UnitTable, episode: int) -> Any:
            rates = torch.arange(1.0, len(units) + 1) * 10**episode
            active = torch.ones(len(units), dtype=torch.bool)
            return policies.Decision(active, ("full",) * len(units), {}, units.kinds, rates=rates)

    found = engine(Rates(), spectra(1, 2, 3, 4), spectra(1, math.nan, 3, 4))
    decide(found)
    with pytest.warns(UserWarning, match="'b'"):
        decide(found)
    assert found.rates is not None
    assert found.rates.tolist() == [10.0, 2.0, 20.0, 30.0]


def test_a_probe_that_did_not_measure_a_unit_counts_for_nothing_to_it() -> None:
    nan = math.nan
    series = torch.tensor(
        [[9.0, 9.0, nan], [5.0, 5.0, 9.0], [nan, 5.1, 5.0], [nan, 3.0, nan], [5.1, 3.0, 5.1]]
    )
    gone = [settled(column[~column.isnan()][:, None], 0.1) for column in series.T]
    assert settled(series, 0.1).tolist() == torch.cat(gone).tolist() == [True, True, True]
    assert settled(series[:4], 0.1, permanent=True).tolist() == [False, True, False]
    assert settled(series[:1], 0.1).tolist() == [False, False, False]


def test_criteria_pass_over_what_was_not_measured() -> None:
    history = History()
    alignment = torch.tensor([2.0, 3.0, math.inf, 1.0])
    history.append(spectra(1, 2, 3, 4, alignment=alignment), 0, 0, gaps=True)
    assert history.lambda_max[0].isnan().tolist() == [False, False, True, False]
    for criterion in ("lambda_max", "coherence", "trainability"):
        values = criterion_values(history, TABLE, criterion, per_flop=True)
        assert values.isnan().tolist() == [[False, False, True, False]]
    with pytest.raises(ValueError, match="NaN or Inf for 1 of 4"):
        history.check_against(NAMES)
    history.append(spectra(1, 2, 3, 4), 1, 0)
    with pytest.raises(ValueError, match="1 of 2 did not measure it"):
        criterion_values(history, TABLE, "trainability")


def test_a_history_of_some_units_and_of_new_ones() -> None:
    history = History()
    assert len(history.of(["a"])) == 0
    history.append(spectra(1, 2, 3, 4), 5, 1)
    some = history.of(["d", "new", "a"])
    assert some.names == ("d", "new", "a")
    assert some.step == [5]
    assert some.lambda_max[0, [0, 2]].tolist() == [4.0, 1.0]
    assert some.trace[0].isnan().tolist() == [False, True, False]
    again = History()
    again.load_state_dict(some.state_dict())
    assert torch.equal(again.lambda_max.nan_to_num(-1), some.lambda_max.nan_to_num(-1))


class Explodes(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * math.nan


def test_a_run_goes_on_with_nan_in_the_first_layers(tmp_path: Path) -> None:
    module = model()

    def forward(net: Any, batch: Any) -> Tensor:
        hidden = net.net[:2](batch[0])
        if net.trainer.current_epoch == 2:
            hidden = Explodes.apply(hidden)
        return net.net[2:](hidden)

    callback = mat(forward=forward)
    watch = Watch(callback)
    with pytest.warns(UserWarning, match=r"step 12.*1 of 3 units \(first 'net.0'\)"):
        trainer(tmp_path, callback, watch).fit(module, data())
    assert watch.active[12][0] == watch.active[11][0]
    assert watch.moved == watch.active
    assert callback.mat is not None
    assert callback.mat.history.step == [6, 12, 18]
    stored = read(tmp_path / "mat" / "spectra.npz")
    assert stored.step.tolist() == [6, 12, 18]
    assert [row.tolist() for row in stored.lambda_max != stored.lambda_max] == [
        [False] * 3,
        [True, False, False],
        [False] * 3,
    ]
    pytest.importorskip("matplotlib")
    assert report(tmp_path).stat().st_size > 1000
