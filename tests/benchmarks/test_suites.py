"""The suites: their runs, one run trained in one go or in several, the command line."""

import doctest
import importlib
import json
import pkgutil
import time
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

import benchmarks.evidence
import benchmarks.suites
from benchmarks.__main__ import main
from benchmarks.evidence import page
from benchmarks.suites import methods, overhead, ranking, scales
from benchmarks.suites.calibration import seconds
from benchmarks.suites.noted import record_of
from benchmarks.suites.registry import SUITES
from benchmarks.suites.results import Results, read
from benchmarks.suites.runner import Outcome, Place, go
from benchmarks.suites.spec import Method, Run, chosen, paired
from benchmarks.suites.train import train

pytestmark = pytest.mark.filterwarnings("ignore:the threshold rests")

TASK = scales.tasks("test", "bert")[0]
METHODS = [
    Method("full"),
    Method("mat", "mat", {"alpha": "auto", "beta": 0}, {"skip": "units"}),
    Method("short", plain="short", like="mat"),
    Method("random", "random", {"fraction": 0.5}),
    Method("matched", "matched", like="mat"),
    Method("bottom", "bottom", like="mat"),
]
#: What differs between two machines, or two moments.
VARYING = ("seconds", "episode_seconds", "environment", "rounds")


def runs_of(*names: str, seeds=(0,)) -> list[Run]:
    return chosen(paired("bert", "test", [TASK], METHODS, seeds), names)


def trained(runs: list[Run], work: Path, **options) -> dict[str, dict]:
    lines: dict[str, dict] = {}
    for run in runs:
        needed = lines.get(run.needs.method.name) if run.needs else None
        line = None
        while line is None:
            line = train(run, needed, data=None, work=work, **options)
        lines[run.method.name] = line
    return lines


def settled(line: dict) -> dict:
    """A line without what varies."""
    kept = {name: value for name, value in line.items() if name not in VARYING}
    kept["curve"] = [{k: v for k, v in p.items() if k != "seconds"} for p in line["curve"]]
    return json.loads(json.dumps(kept))


@pytest.mark.parametrize("package", [benchmarks.suites, benchmarks.evidence])
def test_doctests(package):
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        assert doctest.testmod(importlib.import_module(found.name)).failed == 0, found.name
    assert doctest.testmod(importlib.import_module("benchmarks.__main__")).failed == 0


# ---- which runs there are ------------------------------------------------------------------------


def test_all_methods_of_a_seed_come_before_the_next_seed():
    runs = paired("bert", "test", [TASK], METHODS, (0, 1))
    assert [run.seed for run in runs] == [0] * len(METHODS) + [1] * len(METHODS)
    assert len({run.key for run in runs}) == 2 * len(METHODS)
    for run in runs:
        if run.needs is not None:
            assert run.needs in runs[: runs.index(run)]
            assert run.needs.seed == run.seed


def test_a_changed_setting_is_another_run():
    [run] = runs_of("full")
    changed = [
        replace(run, seed=1),
        replace(run, scale="cpu"),
        replace(run, task=replace(TASK, n_samples=5)),
        replace(run, task=replace(TASK, size={**TASK.size, "lr": 1e-3})),
        replace(run, method=Method("full", callback={"skip": "units"})),
    ]
    assert len({run.key, *(other.key for other in changed)}) == 6
    assert replace(run).key == run.key
    short = runs_of("short")[-1]
    other = replace(short, needs=replace(short.needs, task=replace(TASK, first=1)))
    assert other.key != short.key


def test_what_a_method_needs_comes_along():
    assert [run.method.name for run in runs_of("matched")] == ["mat", "matched"]
    with pytest.raises(ValueError, match="no method 'nobody' here: choose from full, mat, short"):
        runs_of("nobody")
    with pytest.raises(ValueError, match="'short' needs the result of 'mat'"):
        paired("bert", "test", [TASK], METHODS[2:3], (0,))


@pytest.mark.parametrize("scale", scales.SCALES)
def test_every_suite_at_every_scale_has_unique_runs_and_makes_its_callbacks(scale):
    if scale not in ("paper", "test"):
        assert all(suite.runs(scale, (0,)) for suite in SUITES.values())
    for suite in SUITES.values():
        runs = suite.runs(scale, range(3))
        assert len({run.key for run in runs}) == len(runs)
        for run in runs:
            assert run.task.first < run.task.steps or run.task.calendar == "epochs"
            record = [{("x", "head"): 1}]
            special = methods.callback(run.task, run.method, run.seed, record)
            assert (special is None) == (run.method.policy is None)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown scale 'huge'"):
        scales.tasks("huge", "bert")
    with pytest.raises(ValueError, match="no policy 'best'"):
        methods.callback(TASK, Method("x", "best"), 0)
    with pytest.raises(ValueError, match="must be ≥ 1 step"):
        methods.StepCalendar(0, 5)


# ---- one run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return trained(runs_of(*(m.name for m in METHODS)), tmp_path_factory.mktemp("work"))


def test_a_line_has_what_the_report_needs(lines):
    full, mat = lines["full"], lines["mat"]
    assert [p["step"] for p in full["curve"]] == [3, 6]
    assert full["flops"] == 6 * full["full_step_flops"] > 0
    # A backward pass is two forward passes of products, and more where attention recomputes.
    ratio = full["full_step_flops"] / (TASK.batch_size * full["forward_flops"])
    assert 3 <= ratio < 3.1
    assert full["paper_flops"] == pytest.approx(3 * 6 * TASK.batch_size * full["forward_flops"])
    assert full["test_end"]["loss"] > 0
    assert full["best_step"] in (3, 6)
    assert mat["probes"] == 2
    assert mat["full_step_flops"] == full["full_step_flops"]
    assert mat["flops"] - mat["probe_flops"] < full["flops"]
    assert 0 < mat["trained_share"] < 1
    assert [e["step"] for e in mat["episodes"]] == [2, 4]
    assert sum(mat["shares_trained"].values()) == mat["units"] == 20
    assert mat["seconds"] >= mat["episode_seconds"] > 0
    json.dumps(mat, allow_nan=False)


def test_methods_are_paired(lines, tmp_path):
    assert len({line["initial"] for line in lines.values()}) == 1
    seen = lines["full"]["batches"]
    assert len(set(seen)) == len(seen) == 6
    for line in lines.values():
        assert line["batches"] == seen[: line["steps"]]
    [other] = trained(runs_of("full", seeds=(1,)), tmp_path).values()
    assert not set(other["batches"]) & set(seen)


def test_all_runs_begin_after_one_head_start(lines, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    task = replace(TASK, head_start=3)
    runs = paired("bert", "test", [task], [METHODS[0], METHODS[3]], (0, 1))
    found = [train(run, None, data=None, work=tmp_path) for run in runs]
    assert len({line["initial"] for line in found} | {lines["full"]["initial"]}) == 2
    assert len(list((tmp_path / "cache/lightning-mat/starts").iterdir())) == 1
    # Whether it had to be trained first makes no difference.
    assert settled(train(runs[0], None, data=None, work=tmp_path)) == settled(found[0])
    assert found[0]["batches"] == lines["full"]["batches"]


def test_random_has_the_full_steps_cost_of_full(lines):
    assert lines["random"]["full_step_flops"] == lines["full"]["full_step_flops"]
    assert lines["random"]["flops"] < lines["full"]["flops"]
    assert lines["random"]["probes"] == 0


def test_short_costs_what_the_other_has_cost(tmp_path):
    task = replace(TASK, steps=16, every=14)
    found = trained(paired("bert", "test", [task], METHODS[1:3], (0,)), tmp_path)
    short, mat = found["short"], found["mat"]
    assert task.points < short["steps"] < task.steps
    assert abs(short["flops"] - mat["flops"]) <= short["full_step_flops"] / 2
    assert short["curve"][-1]["step"] == short["steps"]


def test_matched_and_bottom_train_as_many_units_in_each_episode(lines):
    assert record_of(lines["matched"]) == record_of(lines["mat"])
    for ours, theirs in zip(record_of(lines["bottom"]), record_of(lines["mat"]), strict=True):
        assert sum(ours.values()) == sum(theirs.values())
    with pytest.raises(ValueError, match="noted no episode"):
        record_of(lines["full"])


def test_a_run_that_is_cut_at_every_step_gives_the_same_line(lines, tmp_path):
    work, cuts = tmp_path / "work", 0
    for name in ("full", "mat"):
        [run] = runs_of(name)
        line = None
        while line is None:
            line = train(run, None, data=None, work=work, deadline=time.monotonic())
            cuts += line is None
            if line is None:
                assert (work / run.key / "last.ckpt").is_file()
        assert settled(line) == settled(lines[name])
        assert not (work / run.key).exists()
    assert cuts == 8  # after steps 1, 2, 4 and 5 of each


def test_the_best_validations_weights_are_tested(tmp_path):
    # A learning rate that destroys the model after the first validation.
    task = replace(TASK, steps=4, points=4, size={**TASK.size, "lr": 3.0})
    [run] = paired("bert", "test", [task], METHODS[:1], (0,))
    line = train(run, None, data=None, work=tmp_path)
    assert line["best_step"] < 4
    assert line["test_best"]["loss"] < line["test_end"]["loss"]


def test_a_run_that_fails_is_told_and_what_needs_it_is_left_out(tmp_path):
    runs, said = runs_of("full", "mat", "matched", "random"), []

    def train_some(run, needed, **options):
        if run.method.name == "mat":
            raise RuntimeError("no such luck")
        return {"key": run.key}

    place = Place("cpu", "cpu", None, tmp_path, tmp_path)
    outcome = go(runs, train_some, place, say=said.append)
    assert outcome == Outcome(2, ("bert-test-tiny-mat-s0",))
    assert "no such luck" in "".join(said)
    assert any("matched-s0: left out" in line for line in said)
    assert list(Results("bert", "cpu", tmp_path).read()) == [runs[0].key, runs[2].key]


# ---- results -------------------------------------------------------------------------------------


def test_a_half_written_line_is_ignored_and_cut_off(tmp_path):
    results = Results("bert", "NVIDIA H200", tmp_path)
    assert results.path.name == "bert-nvidia-h200.jsonl"
    results.append({"key": "a", "x": 1})
    with results.path.open("ab") as file:
        file.write(b'{"key": "b", "x"')
    assert list(results.read()) == ["a"]
    results.append({"key": "c", "x": 3})
    assert list(read(results.path)) == ["a", "c"]
    assert results.path.read_bytes().endswith(b'{"key":"c","x":3}\n')


def test_damaged_or_double_results_are_refused(tmp_path):
    results = Results("bert", "cpu", tmp_path)
    results.append({"key": "a"})
    with pytest.raises(ValueError, match="has a run 'a' already"):
        results.append({"key": "a"})
    with pytest.raises(ValueError, match=r"nan|NaN|JSON"):
        results.append({"key": "b", "x": float("nan")})
    assert list(results.read()) == ["a"]
    results.path.write_text('{"key": "a"}\n{"key"\n{"key": "b"}\n')
    with pytest.raises(ValueError, match="line 2 of .* is no result"):
        results.read()
    results.path.write_text('{"key": "a"}\n{"key": "a"}\n')
    with pytest.raises(ValueError, match="line 2 of .* repeats the key 'a'"):
        results.read()


# ---- the command line ----------------------------------------------------------------------------


def command(tmp_path, *arguments):
    return [*arguments, "--results", str(tmp_path / "r"), "--work", str(tmp_path / "w")]


def test_a_suite_runs_stops_and_goes_on(tmp_path, capsys):
    options = ["--scale", "test", "--seeds", "1", "--methods", "full", "random"]
    assert main(command(tmp_path, "bert", *options, "--time-limit", "0.001s")) == 0
    assert "continue with the same command" in capsys.readouterr().out
    assert main(command(tmp_path, "bert", *options)) == 0
    printed = capsys.readouterr().out
    assert "bert: 0 of 2 runs done, 2 to do" in printed
    assert "all runs are done" in printed
    path = tmp_path / "r" / "bert-cpu.jsonl"
    before = path.read_bytes()
    assert [line["method"]["name"] for line in read(path).values()] == ["full", "random"]
    for line in read(path).values():
        assert line["environment"]["torch"] == torch.__version__
        assert str(tmp_path) not in json.dumps(line)
    assert main(command(tmp_path, "bert", *options)) == 0
    assert "2 of 2 runs done, 0 to do" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_the_closing_hint_repeats_the_folder_and_report_writes_there(tmp_path, capsys):
    root = Path(page.ROOT, page.PAGE)
    before = root.read_bytes()
    where = command(tmp_path, "bert", "--scale", "test", "--seeds", "1", "--methods", "full")
    assert main(where) == 0
    hint = f"`python -m benchmarks report --results {tmp_path / 'r'}` writes"
    assert hint in capsys.readouterr().out
    assert main(command(tmp_path, "report")) == 0
    text = (tmp_path / "r" / page.PAGE).read_text()
    assert "masked words of the embedded corpus (" in text
    assert (tmp_path / "r" / "figures" / "bert-test-cpu-tiny-curves.png").is_file()
    assert "](figures/bert-test-cpu-tiny-curves.png)" in text
    assert main(command(tmp_path, "report", "--out", str(tmp_path / "new" / "o"))) == 0
    assert (tmp_path / "new" / "o" / page.PAGE).read_text() == text
    assert root.read_bytes() == before
    assert page.home(page.RESULTS) == page.ROOT


def test_list_names_methods_and_suites_without_runs(tmp_path, capsys):
    assert main(command(tmp_path, "list", "--scale", "test", "--seeds", "1")) == 0
    printed = capsys.readouterr().out
    assert "methods of optimizers: full, mat, mat-units\n" in printed
    assert "no runs at --scale test: vgg, switch, finetune\n" in printed


def test_list_says_what_is_left(tmp_path, capsys):
    assert main(command(tmp_path, "list", "--scale", "test", "--seeds", "1")) == 0
    printed = capsys.readouterr().out
    assert "| bert | 14 | 14 | not calibrated |" in printed


def test_calibration_multiplies_out_what_was_measured(tmp_path, capsys):
    where = command(tmp_path, "--scale", "test", "--seeds", "1")
    assert main(["calibrate", *where]) == 0
    printed = capsys.readouterr().out
    assert "not calibrated" not in printed
    assert "estimated in all, at most" in printed
    costs = json.loads((tmp_path / "r" / "calibration-cpu.json").read_text())["costs"]
    [cost] = [c for c in costs.values() if c["task"]["name"] == "tiny" and c["task"]["points"] == 2]
    [full, mat, _] = runs_of("full", "mat", "short")
    rest = 2 * cost["valid"] + 2 * cost["test"]
    assert seconds(full, cost) == pytest.approx(6 * cost["step"] + rest)
    assert seconds(mat, cost) == pytest.approx(6 * cost["step"] + 2 * cost["probe"] + rest)
    assert min(cost[name] for name in ("step", "probe", "valid", "test")) > 0


def test_ranking_is_measured_at_three_points_and_survives_a_cut(tmp_path):
    [run] = SUITES["ranking"].runs("test", [0])
    whole = ranking.train(run, None, data=None, work=tmp_path / "a")
    cut = None
    while cut is None:
        cut = ranking.train(run, None, data=None, work=tmp_path / "b", deadline=time.monotonic())
    assert [point["step"] for point in whole["ranking"]] == [1, 3, 5]
    assert cut["ranking"] == whole["ranking"]
    for point in whole["ranking"]:
        assert set(point["samples"]) == set(ranking.OUTPUTS)
        assert set(point["samples"]["loss"]) == {"4", "8"}
        assert set(point["outputs"]["sum_logits vs loss"]) == {"head", "ffn"}
        assert all(-1 <= rho <= 1 for rho in point["outputs"]["random vs loss"].values())
    # Measuring leaves the training as it was.
    [plain] = paired("ranking", "test", [TASK], METHODS[:1], (0,))
    assert [p["loss"] for p in whole["curve"]] == [
        p["loss"] for p in train(plain, None, data=None, work=tmp_path / "c")["curve"]
    ]


def test_correlations_of_known_rankings():
    a, b = torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([10.0, 20.0, 40.0, 30.0])
    same = torch.ones(4)
    spectra = {("x", 4, 0): a, ("x", 4, 1): b, ("y", 4, 0): -a, ("y", 4, 1): same}
    found = ranking.correlations(spectra, ["head"] * 4)
    assert found["samples"]["x"]["4"]["head"] == pytest.approx(0.8)  # 1 − 6·2 / (4·15)
    assert found["samples"]["y"]["4"]["head"] is None
    assert found["outputs"]["x vs y"]["head"] == -1
    # Two units of a kind have no ranking to speak of.
    assert ranking.correlations(spectra, ["head", "head", "ffn", "ffn"])["samples"]["x"]["4"] == {
        "head": None,
        "ffn": None,
    }


def test_overhead_keeps_its_rounds_when_it_is_cut(tmp_path, monkeypatch):
    [run] = SUITES["overhead"].runs("test", [0])
    calls = []

    def measure(task, seed, data, device):
        calls.append(seed)
        return {"plain": {"step_seconds": 1.0}}

    monkeypatch.setattr(overhead, "measure", measure)
    assert overhead.train(run, None, data=None, work=tmp_path, deadline=0.0) is None
    assert calls == []
    ticks = iter([0.0, 0.0, 2.0])
    monkeypatch.setattr(overhead.time, "monotonic", lambda: next(ticks))
    assert overhead.train(run, None, data=None, work=tmp_path, deadline=1.0) is None
    assert len(calls) == 2
    line = overhead.train(run, None, data=None, work=tmp_path)
    assert len(line["rounds"]) == len(calls) == overhead.ROUNDS
    assert not (tmp_path / run.key).exists()


def test_overhead_measures_every_way():
    [task] = scales.tasks("test", "overhead")
    found = overhead.measure(task, 0, None, "cpu")
    assert list(found) == ["plain", "active", "probing"]
    assert all(way["step_seconds"] > 0 for way in found.values())
    assert found["probing"]["probe_seconds"] > 0
    assert found["probing"]["probe_flops"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["bert", "--seeds", "0"], "must be a whole number ≥ 1, got '0'"),
        (["bert", "--time-limit", "soon"], "'soon' is no time: write 90s, 9m or 2h"),
        (["bert", "--data", "/nowhere/at/all"], "there is no folder '/nowhere/at/all'"),
        (["bert", "--device", "tpu"], "'tpu' is no device"),
        (["bert", "--methods", "best"], "no method 'best' here"),
        (["all", "--methods", "mat"], "--methods needs one suite"),
        (
            ["vgg", "--scale", "test"],
            "at --scale test: choose from cpu, gpu, paper",
        ),
        (["vgg", "--scale", "test", "--methods", "mat"], "vgg has no runs at --scale test"),
        (["bert", "--out", "x"], "--out is where `report` writes"),
        (["report"], "there is no folder of results"),
        pytest.param(
            ["bert", "--scale", "gpu"],
            "--scale gpu is for a GPU, or say --device cpu: 'cuda' needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_input_is_refused(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        main(command(tmp_path, *arguments))
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_data_folder_without_the_data_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments in (["--data", str(tmp_path / "empty")], []):
        with pytest.raises(SystemExit) as error:
            main(command(tmp_path, "bert", *arguments))
        assert error.value.code == 2
        message = capsys.readouterr().err
        assert "bert minilm-4 trains on WikiText-2" in message
        assert "by --data" in message
        assert "embedded" not in message


def test_a_download_that_fails_is_one_error_and_names_the_data(tmp_path, capsys, monkeypatch):
    vision = pytest.importorskip("torchvision.datasets")

    def unreachable(*args, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(vision, "CIFAR10", unreachable)
    with pytest.raises(SystemExit) as error:
        main(command(tmp_path, "vgg"))
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert "vgg width-16 trains on CIFAR-10: CIFAR-10 could not be downloaded" in printed.err
    assert "no route to host" in printed.err
    assert "--data DIR" in printed.err
    assert "Traceback" not in printed.err + printed.out


def test_task_names_its_metric():
    assert TASK.metric == "loss"
    assert replace(TASK, model="vgg").metric == "accuracy"
