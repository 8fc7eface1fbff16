"""The step's benchmark: its models, what it counts, its rivals, what it writes."""

import doctest
import json
import math

import pytest
import torch
from torch import nn

from benchmarks import activations, step, step_markdown, tables
from benchmarks.activations import saved_bytes
from benchmarks.counted import split_seconds
from benchmarks.models import ALL, WORKLOADS
from benchmarks.rivals import RIVALS
from benchmarks.study import Setting, Study, Way, choose
from lightning_mat.gate.gate import SKIPS
from lightning_mat.units import partition


def quick(name: str, **options: object) -> Study:
    return Study(WORKLOADS[name], Setting("cpu", 1, (), quick=True, **options))


def made(name: str, rival: str, share: float):
    """A model that a rival has changed, and the rival."""
    torch.manual_seed(0)
    study = quick(name)
    active = choose(study.part, share)
    way = study.way(study.plain.model)
    found = RIVALS[rival][0](study.workload, way.model, study.part, active, share)
    if found is not None:
        way.before = found.before_step
    return study, way, found, active


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_doctests():
    assert doctest.testmod(activations).failed == 0


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_model_trains_and_its_blocks_and_branches_are_its_own(name):
    study = quick(name)
    before = snapshot(study.plain.model)
    study.plain.step()
    after = snapshot(study.plain.model)
    assert any(not torch.equal(before[n], after[n]) for n in before)
    modules = set(study.plain.model.modules())
    blocks = study.workload.blocks(study.plain.model)
    assert len(blocks) >= 2
    assert {m for block in blocks for m in block} <= modules
    parameters = [id(p) for block in blocks for m in block for p in m.parameters()]
    assert len(parameters) == len(set(parameters))
    # Blocks hold what units own (the tied embedding is nobody's).
    own = {n for n, p in study.plain.model.named_parameters() if id(p) in set(parameters)}
    stem = {"stem.0.weight", "stem.1.weight", "stem.1.bias"}
    assert set(study.part.owners) - stem <= own
    branches = study.workload.branches(study.plain.model)
    assert {m for kind in branches for m in kind} <= modules
    assert (branches == []) == name.startswith("vgg16")
    assert study.full["flops"] > 0
    assert study.full["saved_bytes"] > 0


def test_full_models_have_the_sizes_that_their_names_say():
    millions = {"bert-small": 28.8, "vit-small": 21.3, "vgg16": 14.7, "resnet18": 11.2}
    millions |= {"bert-base": 109.5, "switch": 54.0, "vgg16-norms": 14.7, "resnet18-norms": 11.2}
    millions |= {"mixtral": 61.9}
    assert set(millions) == set(WORKLOADS) == {*ALL, "bert-base", "mixtral"}
    for name, expected in millions.items():
        if name == "mixtral":
            pytest.importorskip("transformers")
        workload = WORKLOADS[name]
        with torch.device("meta"):
            model = workload.make(0.0, **workload.full)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(expected, rel=0.01)


def test_a_share_is_that_of_every_layer_and_kind():
    part = partition(WORKLOADS["vgg16"].make(0.0, width=8), "filters")
    for share, expected in ((1.0, 1.0), (0.5, 0.5), (0.25, 0.25), (0.0, 13 / 528)):
        assert float(choose(part, share).double().mean()) == pytest.approx(expected)


def test_saved_bytes_count_storages_once_and_no_parameters():
    x = torch.randn(7, 3)
    layer = nn.Linear(3, 5)

    def forward():
        y = layer(x)  # saves x; the weight is no activation (x needs no gradient)
        return (y * y[:, :2].sum()).sum()  # saves y twice, and a scalar

    found = saved_bytes(forward, layer.parameters())
    assert found == (4 * (7 * 3 + 7 * 5 + 1), 0)


def test_copies_of_parameters_are_counted_apart():
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    x = torch.randn(7, 3)

    def lowered():
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    # Saved: x and the hidden neurons in half precision, and the second weight's copy.
    assert saved_bytes(lowered, net.parameters()) == (2 * (7 * 3 + 7 * 5), 2 * 10)

    def sliced():
        rows = net[0].weight.index_select(0, torch.tensor([0, 2]))
        return (rows * net[0].weight[:2].clone()).sum()

    found = saved_bytes(sliced, net.parameters())
    assert found.weights == 2 * 4 * 6
    assert found.activations == 8 * 2  # the index


@pytest.mark.parametrize("which", ["random blocks frozen", "lower blocks frozen"])
@pytest.mark.parametrize("name", ["vit-small", "vgg16", "switch"])
def test_frozen_blocks_stay_and_the_others_move(name, which):
    study, way, rival, _ = made(name, which, 0.5)
    trained = {n for n, p in way.model.named_parameters() if p.requires_grad}
    before = snapshot(way.model)
    for _ in range(2):
        way.step()
    after = snapshot(way.model)
    # (Keys' biases have a gradient of zero: softmax does not see them.)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved <= trained
    assert len(moved) > len(trained) / 2
    sizes = [
        [(p.numel(), p.requires_grad) for m in block for p in m.parameters()]
        for block in study.workload.blocks(way.model)
    ]
    total = sum(n for block in sizes for n, _ in block)
    share = sum(n for block in sizes for n, on in block if on) / total
    assert rival.trained_share == pytest.approx(share)
    assert abs(share - 0.5) < 0.25
    assert all(len({on for _, on in block}) == 1 for block in sizes)  # whole blocks
    if which.startswith("lower"):
        order = [block[0][1] for block in sizes]
        assert order == sorted(order)
        stem = {"vit-small": "patches.weight", "switch": "words.weight"}
        assert stem.get(name) not in moved
    assert study.count("rival", way)["flops"] < study.full["flops"]


def test_zeroed_gradients_are_those_of_resting_units_and_nothing_is_saved():
    study, way, rival, active = made("vgg16", "gradients zeroed", 0.25)
    assert rival.trained_share == pytest.approx(float(active.double().mean()))
    way.step()
    for name, parameter in way.model.named_parameters():
        for unit, r in study.part.owners.get(name, ()):
            assert parameter.grad.flatten(1)[r.r0 : r.r1].any() == active[unit]
    assert study.count("rival", way)["flops"] == study.full["flops"]


def test_detached_branches_take_turns_and_their_number_stays():
    _, way, rival, _ = made("bert-small", "branches detached", 0.5)
    assert rival.trained_share == 0.5
    weights = {
        "attention": [layer.attention.out.weight for layer in way.model.layers],
        "ffn": [layer.ffn.fc2.weight for layer in way.model.layers],
    }
    seen = set()
    for _ in range(rival.draws):
        way.step()
        kept = {k: tuple(w.grad is not None for w in ws) for k, ws in weights.items()}
        assert all(sum(on) == 1 for on in kept.values())
        seen.add(tuple(kept.items()))
    assert len(seen) > 1
    assert made("vgg16", "branches detached", 0.5)[2] is None


def test_a_result_its_table_and_its_pages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.steps() == {}
    assert tables.step_page() == step_markdown.overview({}) == ""
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--model", "switch"]
    assert step.main([*arguments, "--shares", "1", ".5", "--rivals", ".5"]) == 0
    result = json.loads((tmp_path / "step-switch-cpu.json").read_text())
    assert result["settings"]["unit_count"] == 2 * (4 + 1)
    assert result["environment"]["torch"] == torch.__version__
    assert "commit" in result
    assert result["left_out"] == []
    assert result["failed"] == {}
    rows = {(row["skip"], row["share"]): row for row in result["steps"]}
    assert set(rows) == {(skip, share) for skip in SKIPS for share in (1.0, 0.5)}
    for (skip, share), row in rows.items():
        assert row["flops_ratio"] == row["flops"] / result["full"]["flops"]
        assert (row["flops_ratio"] == 1) == (share == 1) == (row["efficiency"] is None)
        assert (row["saved_ratio"] == 1) == (share == 1), skip
        assert row["seconds"]["rounds"] == 1
        assert row["optimizer_time_ratio"] > 0
        assert row["counted_time_ratio"] > 0
        assert row["rest_time_ratio"] > 0
        assert row["peak_ratio"] is None or row["peak_ratio"] > 0
        if share < 1:
            kept = (1 - row["time_ratio"]) / (1 - row["flops_ratio"])
            assert row["efficiency"] == pytest.approx(kept)
    assert [row["name"] for row in result["rivals"]] == list(RIVALS)
    printed = capsys.readouterr().out
    assert "eager, skip=weights, 50%" in printed
    assert "gradients zeroed, 50%" in printed

    overview = step_markdown.overview(tables.steps())
    assert len(overview.splitlines()) == 2 + len(SKIPS)
    assert f"| 50% | `weights` | {rows['weights', 0.5]['flops_ratio']:.3f} |" in overview
    page = tables.step_page()
    assert page.startswith("### Switch encoder")
    assert page.count('| `skip="weights"` |') == 2
    assert "- *branches detached*: DropBP" in page

    # The compiled model's rows from a file of their own, in the place of older ones.
    mine = {**result, "steps": [{**row, "compiled": True} for row in result["steps"]]}
    old = [{**row, "time_ratio": 9.0} for row in mine["steps"]]
    old += [{**row, "share": 0.25} for row in mine["steps"]]
    both = {**result, "steps": result["steps"] + old}
    files = {"step-switch-cpu": both, "step-switch-compiled-cpu": mine}
    (found,) = step_markdown.joined(files).values()
    assert found["steps"] == [*result["steps"], *old[len(mine["steps"]) :], *mine["steps"]]
    assert "step-switch-compiled-cpu.json" in step_markdown.page({"step-switch-cpu": found})
    mine["settings"] = {**result["settings"], "batch_size": 99}
    assert step_markdown.joined(files) == files


def test_a_steps_time_is_split_by_what_has_flops():
    weight = torch.randn(300, 300)

    def step():
        for _ in range(20):
            weight @ weight

    product = split_seconds(step, "cpu")
    other = split_seconds(lambda: [weight.sort() for _ in range(20)], "cpu")
    assert product.counted > 0
    assert other.counted == 0
    assert other.rest > 0


def test_what_fails_is_said_and_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    def measure_share(self: Study, share: float, compiled: bool) -> None:
        if share == 0.5:
            raise RuntimeError("no half")

    monkeypatch.setattr(Study, "measure_share", measure_share)
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--model", "vgg16"]
    assert step.main([*arguments, "--shares", "1", ".5", "0", "--rivals"]) == 1
    result = json.loads((tmp_path / "step-vgg16-cpu.json").read_text())
    assert result["failed"] == {"eager 50%": "RuntimeError: no half"}
    assert "failed: eager 50%" in capsys.readouterr().out


def test_nothing_starts_that_would_not_end_in_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(step.time, "monotonic", lambda: now[0])
    limit = step.Limit(10.0)

    def work(seconds: float) -> None:
        now[0] += seconds

    assert limit.run("a", lambda: work(4))
    assert limit.run("a", lambda: work(3))
    assert not limit.run("a", lambda: work(1))  # three are left, and one took four
    assert limit.run("b", lambda: work(3))
    assert not limit.run("c", lambda: work(0))
    assert now[0] == 10


def test_options():
    args = step.parse(["--device", "cpu", "--model", "bert-base", "all"])
    assert args.model == ["bert-base", *ALL]
    assert math.isinf(args.time_limit)
    assert args.rivals == [0.5, 0.25]
    assert step.parse(["--device", "cpu", "--rivals"]).rivals == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "gpt"], "invalid choice: 'gpt'"),
        (["--shares", "1.5"], "shares must be in [0, 1], got 1.5"),
        (["--device", "tpu"], "'tpu' is no device to measure on"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        step.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", WORKLOADS)
def test_no_step_waits_for_the_gpu(name):
    setting = Setting("cuda", 1, SKIPS, precision="bf16", quick=True)
    study = Study(WORKLOADS[name], setting)
    active = choose(study.part, 0.25)

    def checked(way: Way) -> None:
        way.step()  # allocates what it needs
        torch.cuda.set_sync_debug_mode("error")
        try:
            way.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    try:
        checked(study.plain)
    except RuntimeError as error:
        pytest.skip(f"the plain step waits itself: {error}")
    for gate, way in study.gated.values():
        gate.apply(active)
        way.optimizer.apply(active)
        checked(way)
