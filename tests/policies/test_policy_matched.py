"""policies.Matched: the counts of a recorded run, other units."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mat import policies
from lightning_mat.policies import History
from lightning_mat.report.store import Probe, SpectraStore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

KINDS = ("head", "head", "head", "ffn") * 3
LAYERS = ("a",) * 4 + ("b",) * 4 + ("c",) * 4


def counts(decision, table):
    """Return how many units of each (layer, kind) train."""
    keys = list(table.by_layer_and_kind())
    trained = Counter(
        key
        for key, trains in zip(
            zip(table.layers, table.kinds, strict=True), decision.active.tolist(), strict=True
        )
        if trains
    )
    return {key: trained[key] for key in keys}


@pytest.fixture
def recorded(make, tmp_path):
    """Return a run of MAT, decision by decision, that was written down, and its folder."""
    table, store = make.table(12, KINDS, LAYERS), SpectraStore(tmp_path / "mat" / "spectra.npz")
    decisions = []
    for t in range(5):
        rows = [[float((7 * i + 3 * s) % 23 + 1) for i in range(12)] for s in range(t + 1)]
        history = make.history(rows)
        decision = policies.MAT(0.5, 0.2).decide(history, table, t)
        spectra = make.spectra([[v, 0.0] for v in rows[-1]])
        store.append(Probe(spectra, decision, table, step=10 * t, epoch=t, seconds=0.1))
        decisions.append(decision)
    return table, decisions, tmp_path


def test_a_recorded_runs_counts_are_kept_per_layer_and_episode(recorded):
    table, decisions, folder = recorded
    assert len({d.digest() for d in decisions}) > 1
    for path in (folder, folder / "mat" / "spectra.npz"):
        policy = policies.Matched.from_run(path, seed=3)
        for episode, decision in enumerate(decisions):
            drawn = policy.decide(History(), table, episode)
            assert counts(drawn, table) == counts(decision, table)
        later = policy.decide(History(), table, 9)
        assert counts(later, table) == counts(decisions[-1], table)


def test_other_units_are_drawn_by_seed_and_episode(recorded):
    table, _, folder = recorded
    drawn = {
        tuple(policies.Matched.from_run(folder, seed).decide(History(), table, 1).active.tolist())
        for seed in range(12)
    }
    assert len(drawn) > 3
    policy = policies.Matched.from_run(folder)
    again = pickle.loads(pickle.dumps(policy))
    assert again == policy
    assert again.decide(History(), table, 2) == policy.decide(History(), table, 2)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_record_is_matched_exactly(make, data):
    table = make.table(12, KINDS, LAYERS)
    groups = table.by_layer_and_kind()
    record = [
        {key: data.draw(st.integers(0, len(members))) for key, members in groups.items()}
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    policy = policies.Matched(record, data.draw(st.integers(0, 9)))
    for episode, expected in enumerate(record):
        decision = policy.decide(History(), table, episode)
        assert counts(decision, table) == expected
        assert {r for r in decision.reasons} <= {"random", "not drawn"}


def test_a_record_that_changes_afterwards_is_not_followed(make):
    given_record = [{("layer.0", "head"): 1}]
    policy = policies.Matched(given_record)
    given_record[0]["layer.0", "head"] = 2
    assert int(policy.decide(History(), make.table(2), 0).active.sum()) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "the record is empty"),
        ([{("a", "head"): -1}], r"episode 0 of the record has -1 units of \('a', 'head'\)"),
        ([{("a", "head"): 0.5}], "counts are whole numbers"),
    ],
)
def test_a_malformed_record_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        policies.Matched(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([{("layer.0", "ffn"): 1}], r"\('layer.0', 'ffn'\) is in the record only"),
        ([{}], r"\('layer.0', 'head'\) is in this run only"),
        ([{("layer.0", "head"): 3}], "trains 3 units of .* of which there are 2"),
    ],
)
def test_a_record_of_other_units_is_refused(make, record, message):
    policy = policies.Matched(record)
    with pytest.raises(ValueError, match=message):
        policy.check_units(make.table(2))
    with pytest.raises(ValueError, match=message):
        policy.decide(History(), make.table(2), 0)


def test_a_run_without_a_record_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no spectra at"):
        policies.Matched.from_run(tmp_path)
