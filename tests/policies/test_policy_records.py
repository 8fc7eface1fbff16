"""UnitTable, Decision and History: checked, comparable, saved with plain types."""

from __future__ import annotations

import io
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_mat.policies import Decision, History, UnitTable, base


def reloaded(state):
    """Return the state after a trip through a weights-only checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.fixture
def decision():
    """Return a decision of two kinds."""
    return Decision(
        torch.tensor([True, False, True, True]),
        ("λ_max ≥ λ_α", "below λ_α", "protected", "λ_max ≥ λ_α"),
        {"head": 3.2e11, "ffn": 0.5},
        ("head", "head", "head", "ffn"),
    )


def test_summary_has_a_line_per_kind_with_counts_and_threshold(decision):
    assert decision.summary() == (
        "head: 2 of 3 train, λ_α = 3.2e11 (1 below λ_α, 1 protected)\nffn: 1 of 1 train, λ_α = 0.5"
    )


def test_counts(decision):
    assert decision.trained_share() == 0.75
    assert decision.by_kind() == {"head": (2, 3), "ffn": (1, 1)}
    assert decision.count("λ_max ≥ λ_α") == 2
    assert decision.count("λ_max ≥ λ_α", "head") == 1


def test_a_decision_without_units_trains_everything():
    assert Decision(torch.zeros(0, dtype=torch.bool), (), {}, ()).trained_share() == 1.0


def test_a_decision_survives_pickle_and_a_weights_only_checkpoint(decision):
    assert pickle.loads(pickle.dumps(decision)) == decision
    assert Decision.from_state_dict(reloaded(decision.state_dict())) == decision


def test_decisions_differ_where_anything_differs(decision):
    state = decision.state_dict()
    changes = {
        "active": torch.tensor([True, True, True, True]),
        "reasons": ["λ_max ≥ λ_α", "temporal", "protected", "λ_max ≥ λ_α"],
        "thresholds": {"head": math.nextafter(3.2e11, 0), "ffn": 0.5},
        "kinds": ["head", "head", "head", "expert"],
    }
    others = [Decision.from_state_dict({**state, key: value}) for key, value in changes.items()]
    assert all(other != decision for other in others)
    assert len({decision, *others}) == 5
    assert decision != "decision"


# Unpickles a decision with the package's own __init__ left out, so that only what policies
# themselves import is loaded.
PROGRAM = """
import pickle, sys, types
package = types.ModuleType("lightning_mat")
package.__path__ = [sys.argv[1]]
sys.modules["lightning_mat"] = package
decision = pickle.load(sys.stdin.buffer)
assert "lightning_mat.policies" in sys.modules
assert not {"lightning", "matplotlib", "lightning_mat.units", "lightning_mat.mntk"} & {*sys.modules}
print(decision.digest(), hash(decision))
"""


def test_the_digest_is_the_same_in_another_process_which_loads_policies_alone(decision):
    package = Path(base.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(package)],
        input=pickle.dumps(decision),
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert done.stdout.decode().split() == [decision.digest(), str(hash(decision))]


def test_a_decision_does_not_change_with_the_tensor_it_was_made_from():
    active = torch.tensor([True])
    decision = Decision(active, ("full",), {}, ("head",))
    active[0] = False
    assert decision.active.all()


def test_a_malformed_decision_is_refused():
    with pytest.raises(ValueError, match="must be a bool vector"):
        Decision(torch.tensor([1.0]), ("full",), {}, ("head",))
    with pytest.raises(ValueError, match="1 flags, 2 reasons and 1 kinds"):
        Decision(torch.tensor([True]), ("full", "full"), {}, ("head",))


def test_unit_table_groups_in_order_of_first_appearance(make):
    table = make.table(4, kinds=("ffn", "head", "ffn", "head"), layers=("b", "a", "a", "a"))
    assert list(table.by_kind().items()) == [("ffn", [0, 2]), ("head", [1, 3])]
    assert table.by_layer_and_kind() == {
        ("b", "ffn"): [0],
        ("a", "head"): [1, 3],
        ("a", "ffn"): [2],
    }
    assert len(pickle.loads(pickle.dumps(table))) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ("head",)}, "2 names, 1 kinds"),
        ({"cost": torch.ones(3)}, r"costs of shape \(3,\)"),
        ({"names": ("a", "a")}, "two units are named 'a'"),
        ({"cost": torch.tensor([1.0, -2.0])}, r"the cost of 'b' is -2\.0"),
        ({"cost": torch.tensor([math.nan, 1.0])}, "the cost of 'a' is nan"),
        ({"full_cost": -1.0}, "full_cost is -1.0"),
    ],
)
def test_a_malformed_unit_table_is_refused(change, message):
    good = {
        "names": ("a", "b"),
        "kinds": ("head", "head"),
        "layers": ("x", "x"),
        "cost": torch.ones(2),
    }
    with pytest.raises(ValueError, match=message):
        UnitTable(**{**good, **change})


def test_history_keeps_every_series_in_float64(make):
    history = History()
    history.append(make.spectra([[4.0, 2.0], [9.0, 0.0]]), step=100, epoch=1)
    history.append(make.spectra([[5.0, 5.0], [8.0, 1.0]]), step=200, epoch=2)
    assert len(history) == 2
    assert history.names == ("u0", "u1")
    assert history.lambda_max.tolist() == [[4.0, 9.0], [5.0, 8.0]]
    assert history.lambda_min.tolist() == [[2.0, 0.0], [5.0, 1.0]]
    assert history.trace.tolist() == [[6.0, 9.0], [10.0, 9.0]]
    assert history.effective_rank[1, 0].item() == pytest.approx(2.0)
    assert history.lambda_max.dtype == torch.float64
    assert (history.step, history.epoch) == ([100, 200], [1, 2])


def test_history_survives_pickle_and_a_weights_only_checkpoint(make):
    history = make.history([[1e16, 2.0], [3.0, 4.0]])
    restored = History()
    restored.load_state_dict(reloaded(history.state_dict()))
    for other in (restored, pickle.loads(pickle.dumps(history))):
        assert torch.equal(other.lambda_max, history.lambda_max)
        assert torch.equal(other.effective_rank, history.effective_rank)
        assert (other.names, other.step, other.epoch) == (history.names, [0, 10], [0, 1])


def test_an_empty_history_survives_a_checkpoint_and_can_be_appended_to(make):
    history = History()
    history.load_state_dict(reloaded(History().state_dict()))
    assert len(history) == 0
    history.append(make.spectra([[4.0, 2.0]]), 0, 0)
    assert history.lambda_max.tolist() == [[4.0]]


def test_a_saved_history_does_not_change_with_the_run(make):
    history = make.history([[1.0, 2.0]])
    state = history.state_dict()
    history.lambda_max[0, 0] = 7.0
    history.append(make.spectra([[5.0, 0.0], [6.0, 0.0]]), 1, 1)
    assert state["lambda_max"].tolist() == [[1.0, 2.0]]
    assert state["step"] == [0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_probe_with_nan_or_inf_is_refused_and_leaves_the_history_as_it_was(make, value):
    history = make.history([[1.0, 2.0]])
    with pytest.raises(ValueError, match="NaN or Inf for 1 of 2 units, first 'u1'"):
        history.append(make.spectra([[1.0, 0.0], [value, value]]), 1, 1)
    assert len(history) == 1
    assert history.trace.shape == (1, 2)


def test_a_probe_of_other_units_is_refused(make):
    history = make.history([[1.0, 2.0]])
    with pytest.raises(ValueError, match="of 2 units, got 3"):
        history.append(make.spectra([[1.0], [1.0], [1.0]]), 1, 1)
    with pytest.raises(ValueError, match="unit 0 of the history is 'u0', got 'x'"):
        history.check_against(["x", "u1"])


def test_a_probe_with_a_value_missing_is_refused(make):
    spectra = make.spectra([[1.0], [2.0]])
    broken = type(spectra)(("u0",), spectra.eigenvalues, spectra.cost)
    with pytest.raises(ValueError, match=r"shape \(2,\) for 1 units"):
        History().append(broken, 0, 0)


def test_a_damaged_history_state_is_refused(make):
    state = make.history([[1.0, 2.0]]).state_dict()
    with pytest.raises(ValueError, match="the state is damaged"):
        History().load_state_dict({**state, "trace": torch.zeros(2, 2)})
