"""The kernel's benchmark: its workloads, its baselines, what it counts and what it writes."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import baselines, devices, floor, kernel, workloads
from lightning_mat import _extension
from lightning_mat.mntk.kernel import Geometry, Layer, mntk_spectra
from lightning_mat.units.unit import Rect

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.sh"
EMPTY = torch.empty(0)
NAMES = list(workloads.WORKLOADS)


def quick(name: str) -> workloads.Inputs:
    workload = workloads.WORKLOADS[name]
    return workload.draw("cpu", **workload.quick)


@pytest.mark.parametrize("module", [baselines, floor, kernel, devices], ids=lambda m: m.__name__)
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_all_ways_find_the_same_spectra(name):
    torch.manual_seed(1)
    inputs = quick(name)
    exact = baselines.layerwise(inputs)
    by_vmap = baselines.by_vmap(inputs, baselines.draw_weights(inputs), chunk=2)
    op = mntk_spectra(inputs.a, inputs.b, inputs.plan).eigenvalues
    assert exact.shape == by_vmap.shape == op.shape == (inputs.plan.units, len(inputs.b[0]))
    largest = exact.amax(1, keepdim=True).double()
    assert (largest > 0).all()
    torch.testing.assert_close(by_vmap / largest, exact / largest, rtol=0, atol=1e-5)
    torch.testing.assert_close(op.flip(1) / largest, exact / largest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_call_draws_other_inputs_and_no_zeros(name):
    first, second = quick(name), quick(name)
    for one, other in zip((*first.a, *first.b), (*second.a, *second.b), strict=True):
        if one.numel() > 8 and one.shape == other.shape:
            assert not torch.equal(one, other)
            assert one.any()


@pytest.mark.parametrize(
    ("name", "size", "units"),
    [
        ("bert-heads-128", "cuda", 144),
        ("bert-heads-512", "cpu", 72),
        ("bert-heads-ffn-128", "cuda", 156),
        ("vgg-filters", "cpu", 4224),
        ("llama-layer", "cuda", 33),
        ("mlp", "cpu", 3),
    ],
)
def test_full_sizes_have_the_models_units(name, size, units):
    workload = workloads.WORKLOADS[name]
    inputs = workload.draw("meta", **getattr(workload, size))
    assert inputs.plan.units == units
    assert {unit for layer in inputs.plan.layers for unit, _ in layer.owned} == set(range(units))
    for layer in inputs.plan.layers:
        # Slabs fill their parameter: one batched product each, and none twice.
        assert sum(r.numel for _, r in layer.owned) == layer.rows * layer.columns
        assert len(baselines.runs(layer.owned)) == 1


def test_experts_have_their_own_numbers_of_tokens():
    torch.manual_seed(0)
    inputs = quick("switch-experts")
    tokens = [len(a[0]) for a in inputs.a]
    assert len(set(tokens)) > 1
    assert max(tokens) <= 9
    # A padded token gives nothing to any product.
    for a, b in zip(inputs.a, inputs.b, strict=True):
        assert ((a == 0).all(-1) <= (b == 0).all(-1)).all()


def test_runs_of_slabs():
    rows = [(u, Rect(2 * u, 2 * u + 2, 0, 9)) for u in range(3)]
    columns = [(5 + u, Rect(0, 9, 3 * u, 3 * u + 3)) for u in range(3)]
    gap = (9, Rect(7, 9, 0, 9))
    found = baselines.runs([*rows, gap, *columns])
    assert [(run.unit, run.count, run.down) for run in found] == [
        (0, 3, True),
        (9, 1, True),
        (5, 3, False),
    ]
    gradients = torch.randn(2, 9, 9, dtype=torch.float64)
    grams = torch.zeros(10, 2, 2, dtype=torch.float64)
    baselines.add_slabs(grams, gradients, [*rows, gap, *columns])
    for unit, r in [*rows, gap, *columns]:
        v = gradients[:, r.r0 : r.r1, r.c0 : r.c1].flatten(1)
        torch.testing.assert_close(grams[unit], v @ v.T)


def test_operations_of_a_layer_by_hand():
    # S = 3, T = 100: direct, 2·3·100·6 for the gradients of 2 × 3 elements and 9·6 for the Grams.
    whole = Layer("linear", 2, 3, [(0, Rect(0, 2, 0, 3))])
    assert floor.layer_flops(whole, EMPTY, torch.empty(3, 100, 2)) == 3600 + 54
    # T = 1, 50 × 40: ghost, 3² · (50 + 40), where direct takes 2·3·2000 + 9·2000.
    rows = [(0, Rect(0, 25, 0, 40)), (1, Rect(25, 50, 0, 40))]
    assert floor.layer_flops(Layer("linear", 50, 40, rows), EMPTY, torch.empty(3, 1, 50)) == 9 * 90
    # Only what is owned counts: 10 of the 40 columns, of full height.
    columns = [(0, Rect(0, 50, 5, 15))]
    assert (
        floor.layer_flops(Layer("linear", 50, 40, columns), EMPTY, torch.empty(3, 1, 50)) == 9 * 60
    )
    # A rectangle in the middle has no ghost way.
    middle = [(0, Rect(10, 20, 5, 15))]
    expected = 2 * 3 * 100 + 9 * 100
    assert (
        floor.layer_flops(Layer("linear", 50, 40, middle), EMPTY, torch.empty(3, 1, 50)) == expected
    )
    # A convolution: 9 input positions and one of the output, 2 channels, 8 filters of 2 × 3 × 3.
    conv = Layer("conv", 8, 18, [(0, Rect(0, 8, 0, 18))], Geometry((3, 3), (1, 1), (1, 1), (0, 0)))
    a, b = torch.empty(3, 2, 3, 3), torch.empty(3, 8, 1, 1)
    assert floor.layer_flops(conv, a, b) == (3 * 9) ** 2 * 2 + 9 * (9 + 8)
    vector = [(0, Rect(0, 5, 0, 1))]
    assert floor.layer_flops(Layer("bias", 5, 1, vector), EMPTY, torch.empty(3, 7, 5)) == 105 + 45
    assert floor.layer_flops(Layer("scale", 5, 1, vector), EMPTY, torch.empty(3, 7, 5)) == 210 + 45


def test_floor_of_a_workload_by_hand():
    inputs = workloads.mlp("cpu", samples=3, layers=2, width=10)
    # Per layer: ghost 9·20 beats 2·3·100 + 9·100; the bias takes 3·10 + 9·10.
    # Inputs and gradients of both layers once (a bias shares its gradient), 2 · 3 eigenvalues.
    counted = floor.count(inputs)
    assert counted == floor.Count(flops=2 * (180 + 120), bytes=4 * (2 * 60) + 8 * 6)
    ceilings = floor.Ceilings(bandwidth=528.0, peak={"float32": 100.0, "tf32": 900.0})
    found = floor.floor(counted, ceilings, "float32")
    assert found["seconds_of_operations"] == found["seconds"] == 6.0
    assert found["seconds_of_bytes"] == 1.0
    assert found["bound"] == "operations"
    assert found["seconds_with_three_tf32_terms"] == 2.0
    assert floor.floor(counted, ceilings, "tf32")["bound"] == "bytes"


def test_a_result_and_its_table(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    parts = ["vgg-filters", "eigen", "probe"]
    assert kernel.main([*arguments, "--layers", "1", "--workload", *parts]) == 0
    result = json.loads((tmp_path / "kernel-cpu.json").read_text())
    assert result["settings"]["precision"] == "float32"
    assert result["settings"]["quick"]
    assert "commit" in result
    assert result["environment"]["torch"] == torch.__version__
    assert result["left_out"] == []
    assert result["ceilings"]["bytes_per_second"] > 0
    assert result["ceilings"]["flops"]["float32"] > 0

    row = result["workloads"]["vgg-filters"]
    assert row["sizes"] == {"layers": 1, "samples": 4, "size": 8}
    assert (row["units"], row["samples"], row["tokens"]) == (64, 4, [64, 64])
    assert set(row["seconds"]) == {"op", "layerwise", "vmap"} == set(row["peak_bytes"])
    assert row["seconds"]["op"]["rounds"] == 1
    assert row["times_op"]["op"] == 1.0
    assert max(row["difference_of_lambda_max"].values()) < 1e-4
    assert row["not_timed"] == {}
    least = row["floor"]
    assert least["seconds"] == max(least["seconds_of_operations"], least["seconds_of_bytes"])
    ratio = row["seconds"]["op"]["median_seconds"] / least["seconds"]
    assert row["op_over_floor"] == pytest.approx(ratio)

    assert set(result["eigen"]["3"]["seconds"]) == {"op", "eigvalsh", "eigvalsh in float64"}
    assert result["probe"]["probe_over_step"] > 0
    printed = capsys.readouterr().out
    assert "vgg-filters" in printed
    assert "eigen-solve of 3 Grams of 8×8" in printed
    assert "probe of BERT-tiny" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_said_so(capsys):
    with pytest.raises(SystemExit):
        kernel.main(["--device", "cuda"])
    assert "'cuda' needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["gpu", "meta"])
def test_other_devices_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        kernel.main(["--device", text])
    assert f"'{text}' is no device to measure on: use cpu or cuda" in capsys.readouterr().err


def test_what_disagrees_is_not_timed_and_fails(tmp_path, monkeypatch, capsys):
    calls = []

    def wrong(*args, **options):
        calls.append(options)
        result = mntk_spectra(*args, **options)
        eigenvalues = result.eigenvalues.clone()
        eigenvalues[0] = torch.nan
        return type("Result", (), {"eigenvalues": eigenvalues})

    monkeypatch.setattr(kernel, "mntk_spectra", wrong)
    arguments = ["--quick", "--device", "cpu", "--workload", "mlp", "--out", str(tmp_path)]
    assert kernel.main(arguments) == 1
    row = json.loads((tmp_path / "kernel-cpu.json").read_text())["workloads"]["mlp"]
    assert len(calls) == 1
    assert set(row["seconds"]) == {"layerwise", "vmap"}
    assert row["not_timed"]["op"].startswith("disagrees")
    assert row["difference_of_lambda_max"]["op"] is None
    assert "disagrees" in capsys.readouterr().out


def test_no_memory_for_a_baseline_leaves_it_out(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(kernel, "by_vmap", full)
    ceilings = floor.Ceilings(1.0, {"float32": 1.0})
    setting = kernel.Setting("cpu", "quick", "float32", 1, ceilings)
    row = kernel.measure("mlp", [quick("mlp")], setting)
    assert row["not_timed"] == {"vmap": "vmap ran out of memory"}
    assert set(row["times_op"]) == {"op", "layerwise"}


def test_no_part_starts_after_its_time(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--device", "cpu", "--seconds", "-1", "--out", str(tmp_path)]
    assert kernel.main([*arguments, "--workload", "mlp", "eigen"]) == 0
    result = json.loads((tmp_path / "kernel-cpu.json").read_text())
    assert result["left_out"] == ["mlp", "eigen"]
    assert "left out for want of time: mlp, eigen" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif("cuda" not in _extension.load().backends, reason="not compiled for CUDA")
@pytest.mark.parametrize("name", NAMES)
def test_quick_workloads_on_a_gpu_for_the_sanitizer(name):
    torch.manual_seed(1)
    inputs = quick(name)
    exact = baselines.layerwise(inputs).flip(1).double()
    # Drawn and compared on the host, so that little but our own kernels runs on the device.
    there = inputs.to("cuda")
    found = mntk_spectra(there.a, there.b, there.plan, backend="extension").eigenvalues.cpu()
    largest = exact.amax(1, keepdim=True)
    torch.testing.assert_close(found / largest, exact / largest, rtol=0, atol=1e-4)


def gpu_sh(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environ,
        timeout=60,
    )


def test_gpu_sh_is_a_bash_script():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    assert os.access(SCRIPT, os.X_OK)
    assert gpu_sh("--help").stdout.startswith("Builds, tests, sanitizes and measures")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--only", "nonsense"],
            "no part 'nonsense': choose from build, test, sanitize, kernel, step, tables",
        ),
        (["--only", "build,nonsense"], "no part 'nonsense'"),
        (["--only=test", "--only=*"], "no part '*'"),
        (["--only", ","], "--only names no part"),
        (["--only"], "--only needs a part"),
        (["kernel"], "unknown argument 'kernel'"),
    ],
)
def test_gpu_sh_refuses_what_it_does_not_know(arguments, message):
    done = gpu_sh(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_gpu_sh_says_that_there_is_no_gpu(tmp_path):
    blind = executable(tmp_path / "python", "echo 'no CUDA device: torch sees none' >&2; exit 1")
    done = gpu_sh(PYTHON=str(blind), OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no CUDA device: torch sees none" in done.stderr
    assert not (tmp_path / "out").exists()
    assert gpu_sh(PYTHON=str(tmp_path / "none")).returncode == 2


def executable(path: Path, body: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path):
    """What gpu.sh calls on a machine with a GPU: records the calls, does nothing."""
    log = tmp_path / "calls"
    executable(
        tmp_path / "python",
        f"""
        case "$*" in
            *is_available*) printf 'a warning\\n9\\t0\\tSome GPU\\n' ;;
            "-m pip"*) echo "pip $TORCH_CUDA_ARCH_LIST $LIGHTNING_MAT_CUDA" >> {log}
                exit "${{BUILD_STATUS:-0}}" ;;
            "-m pytest"*) echo "pytest $*" >> {log}
                for argument; do xml=${{argument#--junitxml=}}; done
                echo "<testsuites><testsuite tests='3' skipped='${{SKIPPED:-1}}' failures='0'
                    errors='0'/></testsuites>" > "$xml" ;;
            *kernel.py*) echo "kernel $* $COMMIT" >> {log}; echo 'a table' ;;
            "-m benchmarks"*) echo "tables $*" >> {log}; echo 'tables' ;;
            *step.py*) echo "step $* $COMMIT" >> {log}; echo 'steps' ;;
            *) PATH=/usr/bin:/bin exec {sys.executable} "$@" ;;
        esac""",
    )
    executable(tmp_path / "nvidia-smi", "echo 580.1")
    executable(
        tmp_path / "compute-sanitizer",
        f'echo "sanitizer $2" >> {log}; shift 4; while [[ $1 == --* ]]; do shift 2; done; "$@"',
    )
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "OUT": str(tmp_path / "out"),
        "COMMIT": "abc",
    }, log


def test_gpu_sh_runs_its_parts_in_order_and_sums_up(machine):
    environ, log = machine
    done = gpu_sh(**environ)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = log.read_text().splitlines()
    assert [call.split()[0] for call in calls] == [
        "pip",
        "pytest",
        *["sanitizer", "pytest"] * 3,
        "kernel",
        *["step"] * 2,
    ]
    assert calls[0] == "pip 9.0 1"
    assert "tests/benchmarks/test_kernel.py" in calls[1]
    assert [call for call in calls if call.startswith("sanitizer")] == [
        "sanitizer memcheck",
        "sanitizer racecheck",
        "sanitizer initcheck",
    ]
    for call in calls[-3:]:
        assert "--device cuda" in call
        assert call.endswith(" abc")
    assert "--model bert-base --precision bf16 --compile both" in calls[-2]
    assert "--model all --precision bf16" in calls[-1]
    summary = json.loads((Path(environ["OUT"]) / "gpu.json").read_text())
    assert (summary["device"], summary["driver"], summary["commit"]) == ("Some GPU", "580.1", "abc")
    assert list(summary["parts"]) == [
        "build",
        "test",
        "memcheck",
        "racecheck",
        "initcheck",
        "kernel",
        "step-bert-base",
        "step",
    ]
    assert {part["result"] for part in summary["parts"].values()} == {"passed"}
    assert "a table" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["step", "0", "passed"]


def test_gpu_sh_only_step_shares_out_its_time(machine):
    environ, log = machine
    done = gpu_sh("--only", "step", LIMIT="100", **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = [call.split() for call in log.read_text().splitlines()]
    limits = [int(call[call.index("--time-limit") + 1]) for call in calls]
    assert 45 <= limits[0] <= 50
    assert 50 <= limits[1] <= 60  # nothing of the first half was used
    assert done.stdout.count("steps\n") == 2


def test_gpu_sh_only_tables_runs_the_suites_in_order(machine, tmp_path):
    environ, log = machine
    work, data = tmp_path / "work", tmp_path / "data"
    done = gpu_sh("--only", "tables", WORK=str(work), DATA=str(data), LIMIT="200", **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = [call.split() for call in log.read_text().splitlines()]
    assert [call[3] for call in calls] == ["bert", "vgg", "switch", "pareto"]
    for call in calls:
        options = dict(zip(call[4::2], call[5::2], strict=True))
        limit = options.pop("--time-limit")
        assert 100 <= int(limit.removesuffix("s")) <= 155
        assert options == {
            "--scale": "gpu",
            "--device": "cuda",
            "--results": environ["OUT"],
            "--work": str(work),
            "--data": str(data),
        }
    assert done.stdout.count("tables\n") == 4


def test_gpu_sh_runs_nothing_after_a_failed_build(machine):
    environ, log = machine
    done = gpu_sh("--only", "kernel,build", BUILD_STATUS="3", **environ)
    assert done.returncode == 1
    assert log.read_text() == "pip 9.0 1\n"
    parts = json.loads((Path(environ["OUT"]) / "gpu.json").read_text())["parts"]
    assert parts["build"]["result"] == "failed: status 3"
    assert parts["kernel"]["result"] == "failed: not run, the build failed"


def test_gpu_sh_fails_where_every_test_was_skipped(machine):
    environ, _ = machine
    done = gpu_sh("--only", "test", SKIPPED="3", **environ)
    assert done.returncode == 1
    assert "no test ran on the GPU" in done.stdout


def test_gpu_sh_skips_the_sanitizer_where_there_is_none(machine):
    environ, log = machine
    (log.parent / "compute-sanitizer").unlink()
    done = gpu_sh("--only", "sanitize", **environ)
    assert done.returncode == 0
    assert "skipped: compute-sanitizer is not installed" in done.stdout
