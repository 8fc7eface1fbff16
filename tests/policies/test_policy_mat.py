"""policies.MAT against algorithm 1, and what it promises beside it."""

from __future__ import annotations

import math
import pickle
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mat import MAT, policies
from lightning_mat.policies import History, UnitTable
from lightning_mat.policies.temporal import settled
from tests.reference.algorithm1 import algorithm1

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# Eigenvalues are whole numbers and α, β are multiples of 2⁻¹⁰: float64 then holds every quantity
# of equations 4 to 6 exactly, and decisions must agree to the last unit, ties included.
EIGENVALUES = st.one_of(st.integers(0, 12), st.integers(0, 2**30))
DYADIC = st.integers(1, 1023).map(lambda k: Fraction(k, 1024))


@st.composite
def runs(draw, kinds="hf"):
    """Draw (kind of each unit, spectra [P][L][S] in descending order)."""
    labels = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=7))
    probes, samples = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    spectrum = st.lists(EIGENVALUES, min_size=samples, max_size=samples)
    spectra = [[sorted(draw(spectrum), reverse=True) for _ in labels] for _ in range(probes)]
    return labels, spectra


def histories(make, spectra):
    """Yield the history after each probe."""
    history = History()
    for t, probe in enumerate(spectra):
        history.append(make.spectra(probe), t, t)
        yield history


@given(run=runs(), alpha=st.tuples(DYADIC, DYADIC), beta=st.tuples(DYADIC, DYADIC))
@settings(max_examples=250, deadline=None)
def test_decisions_are_those_of_algorithm_1_per_kind(make, run, alpha, beta):
    kinds, spectra = run
    present = sorted(set(kinds))
    alphas, betas = dict(zip("fh", alpha, strict=True)), dict(zip("fh", beta, strict=True))
    policy = policies.MAT(
        {k: float(alphas[k]) for k in present},
        {k: float(betas[k]) for k in present},
        protect=False,
    )
    table = make.table(len(kinds), kinds=kinds)
    expected = {}
    for kind, members in table.by_kind().items():
        exact = [[[Fraction(v) for v in probe[i]] for i in members] for probe in spectra]
        expected[kind] = list(algorithm1(exact, alphas[kind], betas[kind]))
    for t, history in enumerate(histories(make, spectra)):
        active = policy.decide(history, table, t).active.tolist()
        for kind, members in table.by_kind().items():
            assert {j for j, i in enumerate(members) if active[i]} == expected[kind][t]


@given(run=runs(), alpha=DYADIC, beta=DYADIC, permanent=st.booleans())
@settings(max_examples=60, deadline=None)
def test_protection_only_adds_units_and_reasons_match_what_trains(
    make, run, alpha, beta, permanent
):
    kinds, spectra = run
    table = make.table(len(kinds), kinds=kinds, layers=["ab"[i % 2] for i in range(len(kinds))])
    for t, history in enumerate(histories(make, spectra)):
        given_both = (float(alpha), float(beta))
        bare = policies.MAT(*given_both, permanent=permanent, protect=False)
        kept = policies.MAT(*given_both, permanent=permanent)
        without, with_ = bare.decide(history, table, t), kept.decide(history, table, t)
        woken = [r == "protected" for r in with_.reasons]
        assert with_.active.tolist() == (without.active | torch.tensor(woken)).tolist()
        for trains, reason in zip(with_.active.tolist(), with_.reasons, strict=True):
            assert trains == (reason in ("λ_max ≥ λ_α", "protected"))


@given(run=runs(), beta=DYADIC)
@settings(max_examples=60, deadline=None)
def test_permanent_rests_whoever_the_temporal_policy_ever_rested(make, run, beta):
    kinds, spectra = run
    table = make.table(len(kinds), kinds=kinds)
    fresh = policies.MAT(0.5, float(beta), protect=False)
    forever = policies.MAT(0.5, float(beta), permanent=True, protect=False)
    ever = torch.zeros(len(kinds), dtype=torch.bool)
    for t, history in enumerate(histories(make, spectra)):
        ever |= settled(history.lambda_max, float(beta))
        active = forever.decide(history, table, t).active
        assert not (active & ever).any()
        assert torch.equal(active | ever, fresh.decide(history, table, t).active | ever)


def test_the_example_by_hand(make):
    # One kind, Λ̃ from 0 to 1000, α = 0.1: λ_α = 100. Unit 2 settles: Δ = 0, 200, 200.
    history = make.history([[900, 50, 500], [950, 60, 300], [1000, 99, 300]])
    decision = policies.MAT(0.1, 1e-3).decide(history, make.table(3), 2)
    assert decision.reasons == ("λ_max ≥ λ_α", "below λ_α", "temporal")
    assert decision.active.tolist() == [True, False, False]
    assert decision.thresholds == {"head": 100.0}
    assert decision.summary() == "head: 1 of 3 train, λ_α = 100 (1 below λ_α, 1 temporal)"


def test_a_unit_exactly_at_the_threshold_is_information(make):
    history = make.history([[1000, 100]])
    assert policies.MAT(0.1).decide(history, make.table(2), 0).active.all()


def test_kinds_do_not_share_a_threshold(make):
    history = make.history([[1000, 900, 10, 9]])
    table = make.table(4, kinds=("head", "head", "ffn", "ffn"))
    decision = policies.MAT({"head": 0.5, "ffn": 0.95}, protect=False).decide(history, table, 0)
    assert decision.active.tolist() == [True, True, True, False]
    assert decision.thresholds == {"head": 500.0, "ffn": 9.5}


def test_auto_splits_each_kind_at_its_own_gap(make):
    history = make.history([[1e12, 2e12, 1e8, 3.0, 2.9, 400.0]])
    table = make.table(6, kinds=("head",) * 3 + ("ffn",) * 3)
    decision = policies.MAT({"head": "auto", "ffn": "auto"}, protect=False).decide(
        history, table, 0
    )
    assert decision.active.tolist() == [True, True, False, False, False, True]
    assert decision.thresholds["head"] == pytest.approx(1e10, rel=1e-9)


def test_a_resting_unit_wakes_when_its_eigenvalue_rises(make):
    table, policy = make.table(2), policies.MAT(0.1)
    assert not policy.decide(make.history([[100, 1]]), table, 0).active[1]
    assert policy.decide(make.history([[100, 1], [90, 50]]), table, 1).active[1]


def test_the_same_history_gives_the_same_decision_and_the_policy_keeps_no_state(make):
    history = make.history([[900, 50, 500], [950, 60, 300], [1000, 99, 300]])
    policy, table = policies.MAT({"head": "auto"}, 1e-2, permanent=True), make.table(3)
    before = pickle.dumps(policy)
    first = policy.decide(history, table, 2)
    policy.decide(make.history([[1, 2, 3]]), table, 0)
    assert pickle.dumps(policy) == before
    assert pickle.loads(before).decide(history, table, 2) == first
    restored = History()
    restored.load_state_dict(history.state_dict())
    assert policy.decide(restored, table, 2).digest() == first.digest()


def test_a_mapping_given_to_the_policy_may_change_afterwards():
    given_alpha = {"head": 0.1}
    policy = policies.MAT(given_alpha)
    given_alpha["head"] = 0.9
    assert policy.alpha == {"head": 0.1}


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, math.nan, "gap", {"head": 1.0}, {"head": None}])
def test_alpha_outside_its_range_is_refused_at_construction(alpha):
    with pytest.raises(ValueError, match=r"alpha.* must be in \(0, 1\) or \"auto\", got"):
        policies.MAT(alpha)


def test_alpha_is_by_default_a_tenth_but_for_filters(make):
    table = make.table(6, kinds=["head"] * 3 + ["filter"] * 3)
    history = make.history([[100, 50, 40, 100, 30, 25]])
    found = policies.MAT().decide(history, table, 0)
    assert found.active.tolist() == [True, True, True, True, False, False]
    assert found == policies.MAT({"head": 0.1, "filter": "auto"}).decide(history, table, 0)
    assert policies.MAT(0.1).decide(history, table, 0).active.all()


@pytest.mark.parametrize("beta", [-1e-9, math.nan, math.inf, "auto", None, {"head": -1}])
def test_beta_below_zero_is_refused_at_construction(beta):
    with pytest.raises(ValueError, match=r"beta.* must be a finite number ≥ 0, got"):
        policies.MAT(beta=beta)


@pytest.mark.parametrize("budget", [0, -0.5, 1.01, math.nan])
def test_budget_outside_its_range_is_refused_at_construction(budget):
    with pytest.raises(ValueError, match=r"budget must be in \(0, 1\], got"):
        policies.MAT(budget=budget)


def test_a_mapping_must_name_the_kinds_that_exist(make):
    history, table = make.history([[1, 2]]), make.table(2, kinds=("head", "ffn"))
    with pytest.raises(ValueError, match=r"'haed', .* of kind ffn, head.*mean 'head'\?"):
        policies.MAT({"haed": 0.1, "ffn": 0.1}).decide(history, table, 0)
    with pytest.raises(ValueError, match=r"alpha names the kind 'heads', .*did you mean 'head'\?"):
        policies.MAT({"heads": 0.1, "ffn": 0.1}).decide(history, table, 0)
    with pytest.raises(ValueError, match=r"give a value for those only$"):
        policies.MAT({"block": 0.1, "ffn": 0.1}).decide(history, table, 0)
    with pytest.raises(ValueError, match="beta has no value for kind 'ffn'"):
        policies.MAT(beta={"head": 0.1}).decide(history, table, 0)
    with pytest.raises(ValueError, match="beta has no value for kind 'ffn'"):
        policies.MAT(beta={"head": 0.1}).check_kinds(["head", "ffn"])


def test_nothing_is_decided_without_a_finite_probe_of_the_same_units(make):
    policy, table = policies.MAT(), make.table(2)
    with pytest.raises(ValueError, match="history is empty"):
        policy.decide(History(), table, 0)
    with pytest.raises(ValueError, match="of 3 units, got 2"):
        policy.decide(make.history([[1, 2, 3]]), table, 0)
    history = make.history([[1, 2]])
    history.lambda_max[-1, 1] = math.nan
    with pytest.raises(ValueError, match="lambda_max is NaN or Inf for 1 of 2 units, first 'u1'"):
        policy.decide(history, table, 0)


def messages(policy, history, table):
    """Return the texts of the warnings of one decision."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy.decide(history, table, len(history) - 1)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def test_a_threshold_that_rests_nobody_is_warned_about_once_per_change(make):
    rows = [[100, 90], [100, 80], [100, 5], [100, 95]]
    said = [
        messages(policies.MAT(0.1), make.history(rows[: t + 1]), make.table(2)) for t in range(4)
    ]
    assert [len(texts) for texts in said] == [1, 0, 0, 1]
    assert "rests none of the 2 units of kind 'head'" in said[0][0]
    assert 'alpha="auto"' in said[0][0]
    (text,) = messages(policies.MAT("auto"), make.history([[100, 100]]), make.table(2))
    assert "there is no gap between them; set alpha to a number" in text


def test_warnings_of_a_run_name_a_line_outside_the_package(make):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    engine = MAT(net, units="layers", policy=policies.MAT(1e-9))
    with pytest.warns(UserWarning, match="rests none of the 2 units") as caught:
        engine.update(torch.randn(8, 4), step=0)
    assert [w.filename for w in caught] == [__file__] * len(caught)
    engine.close()


@pytest.mark.parametrize("protect", [True, False])
def test_rules_that_rest_everybody_are_warned_about(make, protect):
    history = make.history([[100, 90, 7], [50, 40, 3], [50, 40, 3]])
    (text,) = messages(policies.MAT(0.1, protect=protect), history, make.table(3))
    assert text.endswith('lower beta or alpha, or set alpha="auto"')
    (automatic,) = messages(policies.MAT("auto", protect=protect), history, make.table(3))
    assert automatic.endswith("train: lower beta") or automatic.endswith("trains: lower beta")
    assert "all 3 units of kind 'head' rest by the rules (1 below λ_α = 5, 2 temporal)" in text
    assert ("only protected ones train" if protect else "none trains") in text


def test_protection_that_lets_nobody_rest_is_warned_about_at_the_first_probe(make):
    table, rows = make.table(2, layers=("a", "b")), [[100, 1], [100, 1]]
    (text,) = messages(policies.MAT(0.1), make.history(rows[:1]), table)
    assert "each of the 2 units of kind 'head' is alone in its layer" in text
    assert messages(policies.MAT(0.1), make.history(rows), table) == []
    assert messages(policies.MAT(0.1, protect=False), make.history(rows[:1]), table) == []


def test_a_kind_with_a_single_unit_is_not_warned_about(make):
    assert messages(policies.MAT(), make.history([[5]]), make.table(1)) == []


def test_decisions_of_a_large_network_take_a_table_of_thousands_of_units(make):
    count = 4224  # filters of VGG16
    layers = [f"features.{i // 325}" for i in range(count)]
    values = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = make.table(count, kinds="filter", layers=layers)
    assert isinstance(table, UnitTable)
    decision = policies.MAT("auto").decide(make.history([values.tolist()]), table, 0)
    assert all(decision.active[m].any() for m in table.by_layer_and_kind().values())
