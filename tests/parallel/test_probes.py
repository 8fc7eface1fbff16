"""Probes in two processes: shares, the same numbers and the same decision everywhere, failures."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler, SubsetRandomSampler, TensorDataset

from lightning_mat import MAT, Partition, flops, partition, policies
from lightning_mat.faults import severity
from lightning_mat.mntk.memory import ProbeMemoryError
from lightning_mat.mntk.probe import Probe
from lightning_mat.parallel import batches
from lightning_mat.parallel.batches import digest, same_batch
from lightning_mat.parallel.probing import SharedProbe, some_of
from lightning_mat.parallel.ranks import Ranks
from lightning_mat.parallel.shares import share_of_probe, share_out
from lightning_mat.parallel.whole import Whole
from lightning_mat.sampling import draw
from lightning_mat.shards import local_of, reshard
from tests.parallel import cases, sharded

CPU = torch.device("cpu")


def stack(layers: int = 12, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).double()


def x(samples: int = 6) -> torch.Tensor:
    return torch.randn(samples, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---- who measures what ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 40])
def test_every_unit_has_one_rank_and_shares_are_balanced(size: int) -> None:
    part = partition(stack(), "layers")
    cost = torch.linspace(1, 3, len(part), dtype=torch.float64)
    shares = share_out(part, cost, size)
    assert len(shares) == size
    assert sorted(unit for share in shares for unit in share) == list(range(len(part)))
    loads = share_of_probe(part, cost, shares)
    if size == 1:
        assert loads == [pytest.approx(1.0)]
    elif size < len(part):
        # Nobody does more than the lowest layer's backward pass and its even part of the Grams,
        # but for one layer.
        assert max(loads) <= 1 / 3 + 2 / 3 / size + float(cost.max() / cost.sum())
        assert max(loads) < share_of_probe(part, cost, share_out(part, cost, size - 1))[0] + 1e-9
    assert shares == share_out(part, cost, size)


def test_layers_are_measured_whole_where_there_are_enough() -> None:
    model = nn.Sequential(*[cases.Block() for _ in range(8)])
    part = partition(model, "ffn")
    for share in share_out(part, None, 2):
        others = [i for i in range(len(part)) if i not in share]
        assert {part.layers[i] for i in share}.isdisjoint(part.layers[i] for i in others)


def test_a_partition_of_some_units_measures_the_same() -> None:
    net = cases.Net()
    part = Partition(cases.units(net), net)
    batch = cases.points(8).tensors[0]
    everything = Probe(net, part).measure(batch)
    for share in ([0], [1, 2], [3, 0]):
        some = Probe(net, some_of(part, share)).measure(batch)
        torch.testing.assert_close(some.eigenvalues, everything.eigenvalues[share])
        torch.testing.assert_close(some.cost, everything.cost[share])
        assert some.names == tuple(part.names[i] for i in share)


# ---- measuring together --------------------------------------------------------------------


def measured(layers: int, settings: dict[str, Any]) -> Any:
    """Return the spectra of two probes, and what this rank measured in each."""
    ranks = Ranks(CPU)
    # (inputs, labels) where the loss is the output
    batch = (x(), torch.arange(6) % 8) if "output" in settings else x()
    model = stack(layers)
    model.insert(1, nn.BatchNorm1d(8).double())
    # Statistics differ between the ranks, as after a step.
    model[1].running_mean.add_(ranks.rank)
    before = [b.clone() for b in model.buffers()]
    probe = SharedProbe(model, partition(model, "layers"), ranks, **settings)
    found = [probe.measure(batch) for _ in range(2)]
    assert all(map(torch.equal, before, model.buffers()))
    own = probe._own()[0]
    assert all(p.grad is None for p in model.parameters())
    return found[0].eigenvalues, found[1].eigenvalues, found[1].cost, found[1].alignment, own


@pytest.mark.parametrize(
    ("layers", "settings"), [(12, {}), (1, {}), (4, {"output": "loss", "alignment": True})]
)
def test_shared_probes_measure_what_one_process_does(
    layers: int, settings: dict[str, Any], on_both: Callable[..., list[Any]]
) -> None:
    model = stack(layers)
    model.insert(1, nn.BatchNorm1d(8).double())
    part = partition(model, "layers")
    batch = (x(), torch.arange(6) % 8) if settings else x()
    expected = Probe(model, part, **settings).measure(batch)
    first, second = on_both(measured, layers, settings)
    for mine, other in zip(first[:4], second[:4], strict=True):
        assert torch.equal(mine, other) if mine is not None else other is None
    assert (first[3] is None) == (expected.alignment is None)
    if expected.alignment is not None:
        torch.testing.assert_close(first[3], expected.alignment, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(first[0], expected.eigenvalues, rtol=1e-9, atol=1e-9)
    assert torch.equal(first[2], expected.cost)
    assert sorted(first[4] + second[4]) == list(range(len(part)))


def charged(shared: bool) -> Any:
    """Return the FLOPs that two runs of three probes count, one resumed, and those that ran.

    Args:
        shared: Whether the ranks probe together.
    """
    ranks = Ranks(CPU) if shared else None
    model = stack(6)

    def engine() -> MAT:
        return MAT(model, (), partition(model, "layers"), ranks=ranks)

    mat = engine()
    with flops.count() as ran:
        for probe in range(3):
            mat.update(x(), step=probe)
    total = ran.total if ranks is None else float(ranks.sum(torch.tensor(ran.total))) / ranks.size
    found = [mat.probe_flops]
    mat.close()
    for stops in (0, 1, 2):
        resumed = engine()
        for probe in range(3):
            if probe == stops:
                state = resumed.state_dict()
                resumed.close()
                resumed = engine()
                resumed.load_state_dict(state)
                resumed.prepare(x())
            resumed.update(x(), step=probe)
        found.append(resumed.probe_flops)
        resumed.close()
    return found, total


@pytest.mark.filterwarnings("ignore")
def test_every_operation_of_a_probe_is_charged_once(on_both: Callable[..., list[Any]]) -> None:
    found, total = charged(False)
    assert found == [total] * 4
    first, second = on_both(charged, True)
    assert first == second
    assert len(set(first[0])) == 1
    assert first[0][0] == pytest.approx(first[1], abs=5)  # means are rounded down


def mapped(layers: list[int], names: list[str]) -> Any:
    """Go on with other units; return what was known of costs, and two probes' eigenvalues."""
    ranks, model = Ranks(CPU), stack(8)

    def of(some: list[int]) -> Partition:
        return some_of(partition(model, "layers"), some)

    mat = MAT(model, (), of([0, 2, 4]), ranks=ranks)
    mat.update(x(), step=0)
    state = mat.state_dict()
    mat.close()
    mat = MAT(model, (), of(layers), ranks=ranks, on_partition_change="map")
    mat.load_state_dict(state)
    mat.check_ranks()
    found = [mat.state_dict()["shared"]["cost"]]
    for step in (1, 2):
        mat.update(x(), step=step)
        found.append(mat.spectra.eigenvalues)
    mat.close()
    assert list(mat.part.names) == names
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", [[0, 1, 2, 3, 4, 5, 6], [1, 4, 7], [4]])
def test_other_units_are_shared_out_by_their_own_costs(
    layers: list[int], on_both: Callable[..., list[Any]]
) -> None:
    model = stack(8)
    part = some_of(partition(model, "layers"), layers)
    expected = Probe(model, part).measure(x()).eigenvalues
    for cost, *found in on_both(mapped, layers, list(part.names)):
        assert cost is None
        for eigenvalues in found:
            torch.testing.assert_close(eigenvalues, expected, rtol=1e-9, atol=1e-9)


def disagreeing() -> Any:
    """Return the errors of what ranks do differently."""
    ranks, found = Ranks(CPU), []

    def failing(what: Callable[[], None]) -> str:
        try:
            what()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def probe() -> None:
        with ranks.together("the probe"):
            if ranks.rank == 1:
                raise ValueError("no memory for it")

    found.append(failing(probe))
    found.append(failing(lambda: ranks.check_same("the decision", f"{ranks.rank}")))
    found.append(failing(lambda: ranks.check_same("the decision", "same")))

    class Odd(nn.Module):
        """Its forward pass raises on one rank."""

        def __init__(self) -> None:
            super().__init__()
            self.net = stack(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if ranks.rank == 0:
                raise KeyError("mine")
            return self.net(x)

    model = Odd()
    mat = MAT(model, units="layers", ranks=ranks)
    found.append(failing(lambda: mat.prepare(x())))
    return found


def test_what_fails_on_one_rank_fails_on_all(on_both: Callable[..., list[Any]]) -> None:
    first, second = on_both(disagreeing)
    assert first[0] == (
        "PeerError: the probe failed in process 1 of 2: ValueError: no memory for it"
    )
    assert second[0] == "ValueError: no memory for it"
    assert first[1] == second[1]
    assert "process 1" in first[1]
    assert first[2] == second[2] == "nothing"
    assert first[3].startswith("KeyError")
    assert "failed in process 0 of 2: KeyError" in second[3]


def failures() -> Any:
    """Return the severity of what a rank raises where both fail, or one does."""
    ranks = Ranks(CPU)
    of_rank = [
        (ProbeMemoryError("full"), None),
        (None, OSError("gone")),
        (TypeError("wrong"), None),
        (ProbeMemoryError("full"), TypeError("wrong")),
        (OSError("gone"), ProbeMemoryError("full")),
    ]
    found = []
    for errors in of_rank:
        mine = errors[ranks.rank]
        try:
            with ranks.together("drawing"):
                if mine is not None:
                    raise mine
        except Exception as error:
            found.append(severity(error))
    return found


def test_all_ranks_survive_a_failure_or_none_does(on_both: Callable[..., list[Any]]) -> None:
    first, second = on_both(failures)
    assert first == second == [0, 1, 2, 2, 1]


def unreadable() -> Any:
    """Train where one rank cannot read the samples of its second probe."""

    class Files(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            if broken:
                raise OSError("gone")
            return super().__getitem__(index)

    ranks, broken = Ranks(CPU), False
    mat = MAT(stack(4), units="layers", ranks=ranks)
    decided = []
    for probe in range(3):
        broken = probe == 1 and ranks.rank == 1
        try:
            with ranks.together("drawing samples"):
                samples = draw(DataLoader(Files(x())), 4, 0, mat.probes + mat.skipped)[0]
            mat.update(samples, step=probe)
        except Exception as error:
            mat.skip(error, step=probe)
        decided.append(mat.decision.digest())
    return decided, mat.probes, mat.skipped


@pytest.mark.filterwarnings("ignore")
def test_a_probe_that_one_rank_cannot_draw_is_skipped_on_all(
    on_both: Callable[..., list[Any]],
) -> None:
    first, second = on_both(unreadable)
    assert first == second
    assert first[1:] == (2, 1)


SAMPLES = 7  # of a probe, no number of a step


def failing_at(place: str, folder: Path) -> Any:
    """Train where one rank fails at the samples of the second of three probes."""
    calls = 0

    def fails(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            nonlocal calls
            # The first look at the model comes before the three probes.
            calls += any(isinstance(a, (list, tuple)) and len(a[0]) == SAMPLES for a in args)
            if calls == 3 and torch.distributed.get_rank() == 1:
                calls += 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return function(*args, **options)

        return called

    owner, name = {
        "hook": (cases.Net, "on_before_batch_transfer"),
        "transfer": (DDPStrategy, "batch_to_device"),
        "digest": (batches, "digest"),
    }[place]
    mat = {"alpha": "auto", "every_n_steps": 4, "n_samples": SAMPLES}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(owner, name, fails(getattr(owner, name)))
        _, record, callback, _ = cases.fit(folder, ("ddp", {}), mat=mat)
    said = [str(w.message) for w in caught if "skipping this probe" in str(w.message)]
    summary = callback.summary()
    return said, (record.active, summary["probes"], summary["skipped_probes"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["hook", "transfer", "digest"])
def test_samples_that_one_rank_cannot_take_skip_the_probe_on_all(
    place: str, tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    (said, first), (own, second) = on_both(failing_at, place, tmp_path)
    assert first == second
    assert first[1:] == (2, 1)
    assert len(said) == len(own) == 1
    assert "failed in process 1 of 2: OutOfMemoryError" in said[0]
    assert "probe at step 4: OutOfMemoryError" in own[0]


class Heavy(torch.Tensor):
    """A buffer that does not fit the memory a second time."""

    fits = True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.clone and not cls.fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().__torch_function__(func, types, args, kwargs or {})


def without_room(place: str) -> Any:
    """Probe three times; in the second one rank has no memory for what the ranks exchange."""
    ranks = Ranks(CPU)
    if place == "buffers":
        model, batch = stack(4), x()
        model[0].register_buffer("heavy", torch.zeros(3).as_subclass(Heavy))
        part = partition(model, "layers")
    else:
        model, batch = sharded.cut(sharded.net()), sharded.samples(8)[0]
        part = Partition(sharded.units(model), model)
    mat = MAT(model, (), part, ranks=ranks)
    allocate = Whole._allocate

    def without(*size: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def full(whole: Whole) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", without)
            return allocate(whole)

    decided = []
    for probe in range(3):
        with pytest.MonkeyPatch.context() as patch:
            if probe == 1 and ranks.rank == 1:
                patch.setattr(Heavy, "fits", False)
                patch.setattr(Whole, "_allocate", full)
            mat.update(batch, step=probe)
        decided.append(mat.decision.digest())
    mat.close()
    return decided, mat.probes, mat.skipped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["buffers", "parameters"])
def test_a_rank_without_memory_for_what_is_exchanged_skips_the_probe_on_all(
    place: str, on_both: Callable[..., list[Any]]
) -> None:
    first, second = on_both(without_room, place)
    assert first == second
    assert first[1:] == (2, 1)


class Asked(TorchDispatchMode):
    """Notes the operations whose result is in memory of its own."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel():
            own = result.untyped_storage().data_ptr() not in self._known
            self.found += [str(func)] * own
        return result


def gathered() -> Any:
    """Return what gathering a sharded model allocates, and whether it is the model."""
    model = sharded.cut(sharded.net())
    whole = Whole(model, Ranks(CPU))
    reshard(model)
    room = whole._allocate()
    known = [*room, *whole._stand_ins.values(), *map(local_of, whole._stand_ins)]
    with Asked(known) as asked:
        whole._gather(*room)
    full = [p.full_tensor() for p in whole._stand_ins]
    rows = {param: -(-param.shape[0] // 2) for param in whole._stand_ins}
    largest = max(n * param[0].numel() * param.element_size() for param, n in rows.items())
    assert [r.nbytes for r in room] == [largest, 2 * largest]
    return asked.found, all(map(torch.equal, full, whole._stand_ins.values()))


def test_gathering_a_model_asks_for_no_memory(on_both: Callable[..., list[Any]]) -> None:
    """Where it did, a rank that lacks some would leave the others waiting for its rows."""
    for found, same in on_both(gathered):
        assert found == []
        assert same


def warned(failing: int | None) -> list[str]:
    """Return the warnings of a probe that fails on one rank, or in which one unit's is NaN."""
    ranks, model = Ranks(CPU), stack(4)
    mat = MAT(model, units="layers", ranks=ranks)
    measure = Probe.measure

    def fails(probe: Probe, batch: Any) -> Any:
        spectra = measure(probe, batch)
        if failing is None and ranks.rank == 1:
            spectra.eigenvalues[0] = float("nan")
        if ranks.rank == failing:
            raise ProbeMemoryError("full")
        return spectra

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(Probe, "measure", fails)
        mat.update(x(), step=3)
    mat.close()
    return [str(w.message) for w in caught if "probe at step 3" in str(w.message)]


@pytest.mark.parametrize(("failing", "expected"), [(None, [1, 0]), (0, [1, 0]), (1, [1, 1])])
def test_the_first_process_warns_and_the_one_that_failed(
    failing: int | None, expected: list[int], on_both: Callable[..., list[Any]]
) -> None:
    assert [len(said) for said in on_both(warned, failing)] == expected


def differing() -> Any:
    ranks = Ranks(CPU)
    mine = {"x": torch.full((4, 2), float(ranks.rank)), "name": "a"}
    same = {"x": torch.zeros(4, 2), "name": "a", "more": Pair(numpy.zeros(2), "a"), "f": len}
    of_arrays = Pair(numpy.full(2, ranks.rank), "a")
    kept = same_batch(same, ranks) is same
    return same_batch(mine, ranks), kept, same_batch([of_arrays], ranks)[0]


@pytest.mark.filterwarnings("ignore")
def test_samples_of_rank_0_are_measured_where_data_differ(
    on_both: Callable[..., list[Any]],
) -> None:
    for batch, kept, pair in on_both(differing):
        assert torch.equal(batch["x"], torch.zeros(4, 2))
        assert kept
        assert pair.x.tolist() == [0, 0]


def test_digests_tell_batches_apart() -> None:
    batch = [torch.arange(3), ("a", 1)]
    others = [[torch.arange(3) + 1, ("a", 1)], [torch.arange(3.0), ("a", 1)], [torch.arange(3), ()]]
    assert digest(batch) == digest([torch.arange(3), ("a", 1)])
    assert all(digest(other) != digest(batch) for other in others)
    assert digest(torch.zeros(0, dtype=torch.bfloat16)) != digest(torch.zeros(0))


@dataclass
class Pair:
    """A batch of a data set's own."""

    x: Any
    name: str


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (numpy.arange(3), numpy.arange(3) + 1),
        (numpy.arange(4), numpy.arange(4).reshape(2, 2)),
        (numpy.arange(3), numpy.arange(3.0)),
        (Pair(torch.zeros(2), "a"), Pair(torch.ones(2), "a")),
        (Pair(torch.zeros(2), "a"), Pair(torch.zeros(2), "b")),
        (Pair(numpy.zeros(2), "a"), Pair(numpy.ones(2), "a")),
        (Pair([{"y": numpy.zeros(2)}], "a"), Pair([{"y": numpy.ones(2)}], "a")),
        (numpy.array(["a", None], object), numpy.array(["a", 1], object)),
        (Fraction(1, 3), Fraction(2, 3)),
        ({"a", "b"}, {"a", "c"}),
        (b"a", b"b"),
        (len, max),
        (lambda: 1, 1),
    ],
)
def test_digests_look_into_arrays_and_objects(one: Any, other: Any) -> None:
    assert digest([one]) != digest([other])
    assert digest({"x": one}) == digest({"x": copy.deepcopy(one)})


def test_digests_end_where_objects_hold_each_other() -> None:
    one, other = Pair(None, "a"), Pair(None, "b")
    one.x, other.x = other, one
    assert digest(one) != digest(other)
    assert digest(one) == digest(copy.deepcopy(one))


def test_a_subset_stays_one_where_lightning_deals_out_its_sampler() -> None:
    data = TensorDataset(torch.arange(20))
    wrapped = DistributedSamplerWrapper(SubsetRandomSampler([3, 4, 5, 6]), 2, 0)
    drawn = draw(DataLoader(data, sampler=wrapped), 4, 0, 0)[0]
    assert sorted(drawn.tolist()) == [3, 4, 5, 6]
    plain = DistributedSampler(data, 2, 0)
    assert len(draw(DataLoader(data, sampler=plain), 20, 0, 0)[0]) == 20


# ---- deciding together ---------------------------------------------------------------------


class Drawn(policies.Policy):
    """Decides something else on every rank."""

    needs_spectra = True

    def decide(self, history: Any, units: Any, episode: int) -> policies.Decision:
        active = torch.tensor([True, torch.distributed.get_rank() == 0, False, True])
        return policies.Decision(active, ("test",) * 4, {"ffn": 0.1}, units.kinds)


@pytest.mark.filterwarnings("ignore")
def test_rank_0_decides(tmp_path: Path, on_both: Callable[..., list[Any]]) -> None:
    first, second = on_both(
        cases.gradients, tmp_path, ("ddp_mat", {}), {"mat": {"policy": Drawn()}, "max_steps": 3}
    )
    assert first["active"] == second["active"] == [[True, True, False, True]] * 3
    assert first["decision"] == second["decision"]


class Lost(Drawn):
    """Cannot decide on the rank that decides for all."""

    def decide(self, history: Any, units: Any, episode: int) -> policies.Decision:
        if torch.distributed.get_rank() == 0:
            raise KeyError("mine")
        return super().decide(history, units, episode)


@pytest.mark.filterwarnings("ignore")
def test_a_policy_that_fails_on_rank_0_ends_the_run_on_all(tmp_path: Path, processes: Any) -> None:
    options = {"mat": {"policy": Lost()}, "max_steps": 3}
    first, second = processes.run(cases.gradients, tmp_path, ("ddp_mat", {}), options)
    assert isinstance(first, KeyError)
    assert "the decision failed in process 0 of 2: KeyError" in str(second)


class Loose(Drawn):
    """The same, in single steps and without spectra."""

    needs_spectra = False
    every_n_steps = 1


@pytest.mark.filterwarnings("ignore")
def test_a_policy_that_is_no_function_of_the_history_is_found_out(
    tmp_path: Path, processes: Any
) -> None:
    options = {"mat": {"policy": Loose(), "every_n_steps": 1}, "max_steps": 3}
    for error in processes.run(cases.gradients, tmp_path, ("ddp", {}), options):
        assert isinstance(error, RuntimeError)
        assert "the decision of process 1 is another" in str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", ["ddp", "ddp_mat"])
def test_decisions_of_two_processes_are_those_of_one(
    name: str, batch_norm: bool, tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    options = {"mat": {"alpha": "auto", "every_n_steps": 2}, "net": {"batch_norm": batch_norm}}
    alone = cases.gradients(tmp_path / "a", None, options)
    first, second = on_both(cases.gradients, tmp_path / "b", (name, {}), options)
    assert first["active"] == second["active"]
    for key, value in first["history"].items():
        other = second["history"][key]
        if key == "names":
            assert value == other
            continue
        torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True)
    # Statistics of half a batch make other models: they agree before the first step alone.
    steps, probes = (2, 1) if batch_norm else (12, 6)
    assert first["active"][:steps] == alone["active"][:steps]
    a, b = (run["history"]["lambda_max"] for run in (first, alone))
    assert len(a) == len(b) == 6
    torch.testing.assert_close(a[:probes], b[:probes], rtol=1e-6, atol=0)
    if not batch_norm:
        assert len({tuple(active) for active in alone["active"]}) > 1
