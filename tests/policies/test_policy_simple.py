"""policies.Full and policies.Random: the baselines."""

from __future__ import annotations

import pickle
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mat import policies
from lightning_mat.policies import History


def test_full_trains_everything_without_a_probe(make):
    decision = policies.Full().decide(History(), make.table(3), 7)
    assert decision.active.all()
    assert decision.reasons == ("full",) * 3
    assert decision.trained_share() == 1.0


def test_every_policy_is_a_policy():
    for policy in (policies.Full(), policies.Random(), policies.MAT()):
        assert isinstance(policy, policies.Policy)
    assert policies.MAT().needs_spectra
    assert not policies.Full().needs_spectra
    assert not policies.Random().needs_spectra


@given(
    count=st.integers(1, 9),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 99),
    protect=st.booleans(),
)
def test_random_trains_the_exact_fraction_of_each_layer_and_kind(
    make, count, fraction, seed, protect
):
    table = make.table(
        3 * count, kinds=["head"] * (2 * count) + ["ffn"] * count, layers=(["a", "b", "b"] * count)
    )
    decision = policies.Random(fraction, seed, protect).decide(History(), table, 1)
    for members in table.by_layer_and_kind().values():
        exact = round(fraction * len(members))
        assert int(decision.active[members].sum()) == (max(exact, 1) if protect else exact)


def test_random_names_what_it_drew_and_what_it_kept(make):
    table = make.table(3, layers=("a", "a", "b"))
    decision = policies.Random(0.5).decide(History(), table, 0)
    assert sorted(decision.reasons[:2]) == ["not drawn", "random"]
    assert decision.reasons[2] == "protected"  # round(0.5 · 1) is 0
    assert decision.summary() == "head: 2 of 3 train (1 not drawn, 1 protected)"


def test_random_depends_on_seed_and_episode_alone(make):
    table = make.table(16)
    policy = policies.Random(0.5, seed=3)
    torch.manual_seed(0)
    random.seed(0)
    states = torch.get_rng_state(), random.getstate()
    first = policy.decide(History(), table, 5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.rand(1)
    policy.decide(History(), table, 6)
    assert pickle.loads(pickle.dumps(policy)).decide(make.history([[1.0] * 16]), table, 5) == first


def test_random_draws_anew_for_each_episode_and_seed(make):
    table = make.table(16)
    drawn = {
        tuple(policies.Random(0.5, seed).decide(History(), table, episode).active.tolist())
        for seed in range(4)
        for episode in range(4)
    }
    assert len(drawn) == 16


def test_random_gives_each_unit_its_turn(make):
    table = make.table(8)
    total = sum(
        policies.Random(0.25).decide(History(), table, episode).active.int()
        for episode in range(400)
    )
    assert int(total.sum()) == 800
    assert int(total.min()) > 60  # 100 expected, standard deviation below 9
    assert int(total.max()) < 140


def test_this_draw_never_changes(make):
    # Written down so that a run of the baseline can be repeated with a later version.
    active = policies.Random(0.5, seed=0).decide(History(), make.table(8), 0).active
    assert active.nonzero().flatten().tolist() == [0, 4, 6, 7]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got"):
        policies.Random(fraction)
