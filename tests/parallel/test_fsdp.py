"""FSDP2: gate, optimizer, probe and checkpoints on sharded parameters are those of one process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from lightning_mat import MAT, Partition, Slice, Unit, flops, partition
from lightning_mat.mntk.probe import Probe
from lightning_mat.parallel import Ranks
from lightning_mat.parallel.probing import SharedProbe
from lightning_mat.shards import is_sharded, local_of, local_rows
from tests.parallel import sharded

CPU = torch.device("cpu")
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
SGD = partial(torch.optim.SGD, lr=1e-1, momentum=0.9, weight_decay=0.1)


def resting(names: list[str], pattern: str) -> dict[str, torch.Tensor]:
    """Return which elements of each parameter rest, by the slices themselves."""
    model = sharded.net()
    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for unit, on in zip(sharded.units(model), sharded.flags(pattern), strict=True):
        for piece in unit.slices if not on else ():
            stop = piece.stop if piece.dim is not None else None
            mask = masks[piece.param]
            (mask.T if piece.dim == 1 else mask)[piece.start : stop] = True
    return {name: masks[name] for name in names}


# ---- gradients and steps -------------------------------------------------------------------


@pytest.mark.parametrize("skip", ["weights", "units"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (ADAMW, {}),
        (partial(ADAMW, foreach=True), {}),
        (partial(ADAMW, fused=True), {}),
        (SGD, {}),
        (ADAMW, {"waking": "decay"}),
        (partial(SGD, foreach=True), {"waking": "reset"}),
        (ADAMW, {"in_place": True}),
        (partial(ADAMW, fused=True), {"in_place": True}),
    ],
    ids=["adamw", "foreach", "fused", "sgd", "decay", "reset", "large", "largefused"],
)
def test_steps_are_those_of_one_process(
    skip: str, optimizer: Any, options: dict[str, Any], on_both: Callable[..., list[Any]]
) -> None:
    call = partial(sharded.both_ways, optimizer, skip=skip, **options)
    first, second = on_both(call)
    (names, ours, moments, beside), (_, alone, expected_moments, expected_beside) = first
    before = [p.detach() for p in sharded.net().parameters()]
    for pattern, mine, one in zip(sharded.DECISIONS, ours, alone, strict=True):
        rests = resting(names, pattern)
        for name, grad, expected in zip(names, mine[0], one[0], strict=True):
            assert (grad is None) == (expected is None), name
            if grad is not None:
                torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)
                assert not grad[rests[name]].any()
        for name, old, weight, expected in zip(names, before, mine[1], one[1], strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-12)
            assert torch.equal(old[rests[name]], weight[rests[name]])
            if not rests[name].all():
                assert not torch.equal(old, weight)
        before = mine[1]
    for own, expected in zip(moments, expected_moments, strict=True):
        assert own.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(own[key], value, rtol=1e-9, atol=1e-12, check_dtype=False)
    # Step counts of slabs, also of those that a rank has no row of.
    for mine in (beside, second[0][3]):
        assert mine.keys() == expected_beside.keys()
        assert mine["without"] == expected_beside["without"]
        for name, packed in expected_beside["mat"].items():
            assert torch.equal(mine["mat"][name]["slabs"], packed["slabs"])
            for key, column in packed["history"].items():
                assert torch.equal(mine["mat"][name]["history"][key], column)


class Encoder(nn.Module):
    """Transformer layers, whose attention has packed weights, between two layers that share one."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(8, 4, 12, 0.0, batch_first=True) for _ in range(2)]
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x.mean(1))


def encoded(units: str, skip: str, gathers: bool) -> Any:
    """Return gradients and weights of an encoder with gradients of two batches in each step.

    Args:
        units: Of the model.
        skip: Of the engine.
        gathers: Whether the ranks' gradients are averaged once for both, not twice.
    """
    ranks, ends = Ranks(CPU), []
    x = torch.randn(8, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for owned in (ranks, None):
        torch.manual_seed(0)
        model = Encoder().double()
        if owned is not None:
            for module in (*model.layers, model):
                fully_shard(module, mesh=sharded.init_device_mesh("cpu", (2,)))
        part = partition(model, units)
        mat = MAT(model, ADAMW(model.parameters()), part, skip=skip, ranks=owned)
        generator, found = torch.Generator().manual_seed(3), []
        for _ in range(4):
            active = torch.rand(len(part), generator=generator) > 0.6
            mat.gate.apply(active)
            mat.optimizers[0].apply(active)
            own = x if owned is None else x.chunk(2)[ranks.rank]
            for last, some in enumerate(own.chunk(2)):
                if owned is not None and gathers:
                    model.set_requires_gradient_sync(bool(last))
                (model(some).square().mean() / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            found += [sharded.full(p.grad) for p in model.parameters()]
            mat.optimizers[0].step()
            mat.optimizers[0].zero_grad()
        mat.close()
        ends.append((found, [sharded.full(p) for p in model.parameters()]))
    return ends


@pytest.mark.parametrize(
    ("units", "skip", "gathers"),
    [
        ("heads+ffn", "weights", True),
        ("heads+ffn", "units", False),
        ("heads+ffn", "units", True),
        ("layers", "weights", True),
    ],
)
def test_heads_and_shared_weights_rest_with_accumulated_and_clipped_gradients(
    units: str, skip: str, gathers: bool, on_both: Callable[..., list[Any]]
) -> None:
    for (grads, weights), (expected, alone) in on_both(encoded, units, skip, gathers):
        assert [g is None for g in grads] == [g is None for g in expected]
        for grad, one in zip(grads, expected, strict=True):
            if grad is not None:
                torch.testing.assert_close(grad, one, rtol=1e-9, atol=1e-12)
        for weight, one in zip(weights, alone, strict=True):
            torch.testing.assert_close(weight, one, rtol=1e-8, atol=1e-10)


def skipped(skip: str) -> list[int]:
    """Return the FLOPs of a step in one piece, sharded and with everything training."""
    ranks, found = Ranks(CPU), []
    x, y = (t.chunk(2)[ranks.rank] for t in sharded.samples())
    for model, owned, pattern in (
        (sharded.net(), None, sharded.DECISIONS[4]),
        (sharded.cut(sharded.net()), ranks, sharded.DECISIONS[4]),
        (sharded.net(), None, sharded.DECISIONS[0]),
    ):
        mat = sharded.engine(model, (), owned, [pattern], skip=skip)
        mat.update(None, step=0)
        with flops.count() as counter:
            nn.functional.cross_entropy(model(x), y).backward()
        found.append(counter.total)
        mat.close()
    return found


@pytest.mark.parametrize("skip", ["weights", "units"])
def test_skipped_work_is_skipped(skip: str, on_both: Callable[..., list[Any]]) -> None:
    for alone, ours, everything in on_both(skipped, skip):
        assert ours == alone < everything


class Own(nn.Module):
    """A layer that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, None] * self.weight).sum(2)


def unknown() -> Any:
    """Return the gradient of a layer without a rule of which a part rests, then all of it."""
    model = nn.Sequential(nn.Linear(3, 3).double(), Own())
    fully_shard(model, mesh=sharded.init_device_mesh("cpu", (2,)))
    units = [Unit(f"{i}", "layer", "1", (Slice("1.weight", 0, i, i + 1),)) for i in range(4)]
    mat = MAT(model, (), Partition(units, model), ranks=Ranks(CPU))
    found = []
    for active in ([False, True, True, False], [False] * 4):
        mat.gate.apply(torch.tensor(active))
        with sharded.used_outside(model[1]) if not any(active) else nullcontext():
            model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
        found.append(sharded.full(model[1].weight.grad))
        model.zero_grad()
    mat.close()
    return found


def test_the_net_below_the_rules_holds(on_both: Callable[..., list[Any]]) -> None:
    for partly, nothing in on_both(unknown):
        assert partly.any(1).tolist() == [False, True, True, False]
        assert nothing is None


def mixed(skip: str) -> Any:
    """Return gradients and weights in bfloat16, with units at rest and with everything training."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ranks, found = Ranks(CPU), []
    for patterns in (sharded.DECISIONS[1:2], ["11 1111 1111"]):
        model = sharded.cut(sharded.net(torch.float32), mp_policy=policy)
        found.append(sharded.trained(model, ADAMW, ranks, patterns, skip=skip))
    return found


def test_mixed_precision_rounds_what_trains_and_leaves_what_rests(
    on_both: Callable[..., list[Any]],
) -> None:
    (partly, everything), _ = on_both(mixed, "weights")
    names, ((grads, weights),), *_ = partly
    rests = resting(names, sharded.DECISIONS[1])
    before = [p.detach() for p in sharded.net(torch.float32).parameters()]
    for name, grad, expected, old, weight in zip(
        names, grads, everything[1][0][0], before, weights, strict=True
    ):
        assert weight.dtype == torch.float32
        assert torch.equal(old[rests[name]], weight[rests[name]])
        if grad is None:
            assert rests[name].all()
            continue
        assert grad.dtype == torch.float32
        assert not grad[rests[name]].any()
        trains = ~rests[name]
        torch.testing.assert_close(grad[trains], expected[trains], rtol=2e-2, atol=2e-4)


# ---- probes --------------------------------------------------------------------------------


def spectra(fsdp: dict[str, Any]) -> Any:
    """Return spectra before and after a training step, and what the probes left behind."""
    ranks, batch = Ranks(CPU), sharded.samples(8)
    model = sharded.cut(sharded.net(), **fsdp)
    part = Partition(sharded.units(model), model)
    probe = SharedProbe(model, part, ranks)
    before = [local_of(p).clone() for p in model.parameters()]
    hooks = [(list(m._forward_pre_hooks), list(m._forward_hooks)) for m in model.modules()]
    found = [probe.measure(batch[0]).eigenvalues for _ in range(2)]
    assert all(map(is_sharded, model.parameters()))
    assert all(map(torch.equal, before, map(local_of, model.parameters())))
    assert hooks == [(list(m._forward_pre_hooks), list(m._forward_hooks)) for m in model.modules()]
    assert all(p.untyped_storage().size() == 0 for p in probe._whole._stand_ins.values())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    nn.functional.cross_entropy(model(batch[0]).double(), batch[1]).backward()
    kept = [local_of(p.grad).clone() for p in model.parameters()]
    found.append(probe.measure(batch[0]).eigenvalues)
    assert all(map(torch.equal, kept, [local_of(p.grad) for p in model.parameters()]))
    optimizer.step()
    with torch.no_grad():
        model(batch[0])  # leaves the outermost parameters gathered, and old
    optimizer.step()
    found.append(probe.measure(batch[0]).eigenvalues)
    return found


def test_spectra_are_those_of_one_process(on_both: Callable[..., list[Any]]) -> None:
    model, batch = sharded.net(), sharded.samples(8)
    part = Partition(sharded.units(model), model)
    expected = [Probe(model, part).measure(batch[0]).eigenvalues]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    optimizer.step()
    expected.append(Probe(model, part).measure(batch[0]).eigenvalues)
    for found in on_both(spectra, {}):
        for index in range(3):
            torch.testing.assert_close(found[index], expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[3], expected[1], rtol=1e-9, atol=1e-9)


def without_room() -> Any:
    """Return what a probe says that finds no room for the whole model on one rank."""
    ranks = Ranks(CPU)
    model = sharded.cut(sharded.net())
    part = Partition(sharded.units(model), model)
    mat = MAT(model, (), part, sharded.Listed(needs_spectra=True), ranks=ranks)

    whole = mat.probe._whole
    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 1:
            param, one = next(iter(whole._stand_ins.items()))
            patch.setattr(whole, "_stand_ins", {param: Full(one)})
        with pytest.warns(UserWarning, match="the whole model does not fit the memory"):
            mat.update(sharded.samples(8)[0], step=0)
    assert all(map(is_sharded, model.parameters()))
    mat.update(sharded.samples(8)[0], step=1)
    return mat.skipped, mat.probes


class Full:
    """A stand-in for which there is no memory."""

    def __init__(self, param: nn.Parameter) -> None:
        self._param = param

    def untyped_storage(self) -> Any:
        return self

    def resize_(self, size: int) -> None:
        if size:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def numel(self) -> int:
        return self._param.numel()

    def element_size(self) -> int:
        return self._param.element_size()


def test_a_model_that_does_not_fit_whole_costs_the_probe_alone(
    on_both: Callable[..., list[Any]],
) -> None:
    assert on_both(without_room) == [(1, 1), (1, 1)]


# ---- checkpoints ---------------------------------------------------------------------------


def round_trip(optimizer: Any, patterns: Any) -> Any:
    """Return steps after a state was saved as sharded checkpoints have it, and without that."""
    ranks, (x, y), ends = Ranks(CPU), sharded.samples(), []
    for resumes in (False, True):
        model = sharded.cut(sharded.net())
        mat = sharded.engine(model, optimizer(model.parameters()), ranks, patterns)
        for step in range(len(patterns)):
            mat.update(None, step=step)
            nn.functional.cross_entropy(model(x), y).backward()
            mat.optimizers[0].step()
            mat.optimizers[0].zero_grad()
            if step != 1 or not resumes:
                continue
            state = sharded.copied(get_optimizer_state_dict(model, mat.optimizers[0]))
            assert "mat" not in state  # which is why it is in the engine's
            assert len(state["state"]) == len(list(model.parameters()))
            own = sharded.copied(mat.state_dict())
            mat.close()
            mat.optimizers[0].unwrap()
            mat = sharded.engine(model, optimizer(model.parameters()), ranks, patterns)
            set_optimizer_state_dict(model, mat.optimizers[0], optim_state_dict=state)
            mat.load_state_dict(own)
        ends.append([sharded.full(p) for p in model.parameters()])
        mat.close()
    return ends


@pytest.mark.parametrize("optimizer", [ADAMW, SGD, partial(SGD, dampening=0.5)])
@pytest.mark.parametrize("steps", [(0, 1, 2, 3), (4, 4, 3, 1)])  # the second: never trained
def test_a_sharded_checkpoint_keeps_the_state_of_what_rests(
    optimizer: Any, steps: tuple[int, ...], on_both: Callable[..., list[Any]]
) -> None:
    patterns = [sharded.DECISIONS[step] for step in steps]
    for whole, resumed in on_both(round_trip, optimizer, patterns):
        assert all(map(torch.equal, whole, resumed))


def stopped_and_resumed(folder: Path, distributed: bool, mat: dict[str, Any]) -> Any:
    """Return the ends of a run, and of the same one stopped inside an epoch and an episode."""
    options: dict[str, Any] = {"distributed": distributed, "mat": mat}
    whole = sharded.summary(sharded.fit(folder / "whole", **options))
    save = ModelCheckpoint(folder / "saved", save_last=True, every_n_train_steps=1)
    half = {"callbacks": [save], "enable_checkpointing": True, "max_steps": 7}
    sharded.fit(folder / "half", **options, **half)
    last = folder / "saved" / "last.ckpt"
    resumed = sharded.summary(sharded.fit(folder / "resumed", ckpt_path=last, **options))
    return whole, resumed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("distributed", "mat"),
    [(True, {"skip": "units"}), (False, {}), (True, {"alpha": "auto"})],
)
def test_a_lightning_run_is_resumed_and_is_that_of_one_process(
    distributed: bool, mat: dict[str, Any], tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    alone = sharded.summary(sharded.fit(tmp_path / "alone", shards=False, mat=mat))
    (whole, resumed), other = on_both(stopped_and_resumed, tmp_path, distributed, mat)
    assert whole["steps"] == resumed["steps"] == alone["steps"] == 12
    assert whole["decision"] == resumed["decision"] == other[1]["decision"]
    assert whole["active"] == alone["active"]
    assert not all(alone["active"])
    for key in ("weights", "moments"):
        assert all(map(torch.equal, whole[key], resumed[key]))
        for a, e in zip(whole[key], alone[key], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-10)
    assert torch.equal(whole["lambda_max"], resumed["lambda_max"])
    torch.testing.assert_close(whole["lambda_max"], alone["lambda_max"], rtol=1e-7, atol=1e-9)


def going_on(folder: Path, shards: bool) -> Any:
    """Return the end of a run that goes on, sharded or not, where another one stopped."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        last = folder / "last.ckpt"
        found = sharded.summary(sharded.fit(folder / "more", shards=shards, ckpt_path=last))
    return found, [str(w.message) for w in caught]


def stopped(folder: Path, shards: bool, distributed: bool = False) -> None:
    """Leave a checkpoint inside an epoch and an episode, in one file if not distributed."""
    save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    half = {"callbacks": [save], "enable_checkpointing": True, "max_steps": 7}
    sharded.fit(folder, shards=shards, distributed=distributed, **half)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shards", [False, True])
def test_a_sharded_run_goes_on_in_one_process(
    shards: bool,
    tmp_path: Path,
    on_both: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # Lightning leaves addresses there
    on_both(stopped, tmp_path, True, shards)
    if shards:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found, _ = going_on(tmp_path, shards)
    finally:
        if shards:
            dist.destroy_process_group()
    whole = sharded.summary(sharded.fit(tmp_path / "whole", shards=False))
    assert found["active"] == whole["active"]
    for key in ("weights", "moments"):
        for a, e in zip(found[key], whole[key], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-10)
    for name, packed in whole["beside"]["mat"].items():
        for key, column in packed["history"].items():
            assert torch.equal(found["beside"]["mat"][name]["history"][key], column)


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_one_process_goes_on_sharded_with_a_warning(
    tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    stopped(tmp_path, False)
    whole = sharded.summary(sharded.fit(tmp_path / "whole", shards=False))
    for found, said in on_both(going_on, tmp_path, True):
        assert found["active"] == whole["active"]
        assert any("every slab goes on with the highest" in text for text in said)


# ---- refused -------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    """Return what is said about models that cannot work."""
    ranks, said = Ranks(CPU), {}

    def ask(name: str, model: nn.Module, **options: Any) -> None:
        try:
            part = Partition(sharded.units(model), model)
            MAT(model, units=part, **{"ranks": ranks, **options}).close()
        except ValueError as error:
            said[name] = str(error)

    ask("ranks", sharded.cut(sharded.net()), ranks=None)
    columns = sharded.cut(sharded.net(), shard_placement_fn=lambda p: Shard(p.dim() - 1))
    ask("columns", columns)
    blocks = sharded.net()
    for block in blocks.blocks:
        fully_shard(block, mesh=sharded.init_device_mesh("cpu", (2,)))
    ask("left out", blocks)
    compiled = sharded.cut(sharded.net())
    compiled.blocks[0].compile()
    ask("compiled", compiled)
    single = sharded.net()
    fully_shard(single.blocks[0].fc1, mesh=sharded.init_device_mesh("cpu", (2,)))
    ask("single", sharded.cut(single), skip="units")
    ask("works", sharded.cut(sharded.net()), skip="units")
    assert dist.get_world_size() == 2
    return said


def test_what_cannot_work_is_refused_with_the_reason(on_both: Callable[..., list[Any]]) -> None:
    for said in on_both(refusals):
        assert "pass ranks=" in said["ranks"]
        assert "leave tensor parallelism out" in said["columns"]
        assert "'words.weight' is in no module" in said["left out"]
        assert "'blocks.0' is compiled" in said["compiled"]
        assert "call fully_shard on the block around it" in said["single"]
        assert "works" not in said


def rows() -> list[tuple[int, int]]:
    model = sharded.cut(sharded.net())
    found = [local_rows(p) for p in model.parameters()]
    assert [b - a for a, b in found] == [len(local_of(p)) for p in model.parameters()]
    small = fully_shard(nn.Linear(1, 1), mesh=sharded.init_device_mesh("cpu", (2,)))
    return [*found[:1], local_rows(small.weight)]


def test_rows_of_a_rank(on_both: Callable[..., list[Any]]) -> None:
    first, second = on_both(rows)
    assert first == [(0, 4), (0, 1)]
    assert second == [(4, 7), (1, 1)]
