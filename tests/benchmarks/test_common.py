"""What the benchmarks share."""

import doctest
import json
import sys

import pytest
import torch

from benchmarks import common


def test_doctests():
    assert doctest.testmod(common).failed == 0


def test_every_round_runs_every_function_in_turning_order():
    calls = []
    seconds = common.interleaved(
        {name: lambda name=name: calls.append(name) for name in "abc"}, rounds=2, warmup=1
    )
    assert "".join(calls) == "cbaabccba"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert all(value >= 0 for values in seconds.values() for value in values)
    assert common.summary(seconds)["b"]["rounds"] == 2


def test_a_process_begins_anew_once_to_keep_its_memory(monkeypatch):
    begun = []
    monkeypatch.setattr(common.os, "execve", lambda *what: begun.append(what))
    monkeypatch.setattr(common.sys, "platform", "linux")
    monkeypatch.setattr(common.sys, "orig_argv", ["python", "-X", "dev", "script.py", "--quick"])
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    common.keep_freed_memory()
    [(program, arguments, environment)] = begun
    assert program == arguments[0] == sys.executable
    assert arguments[1:] == ["-X", "dev", "script.py", "--quick"]
    assert environment.items() >= common.KEEPING.items()
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    common.keep_freed_memory()
    assert len(begun) == 1


def test_nothing_to_time_is_an_error():
    with pytest.raises(ValueError, match="at least one function and one round, got 0 and 3"):
        common.interleaved({}, rounds=3)


def test_ratio_is_taken_within_rounds():
    # A machine that became ten times slower in the second and third round.
    seconds = {"new": [1.0, 10.0, 10.0], "old": [2.0, 20.0, 20.0]}
    assert common.ratio(seconds, "new", "old") == 0.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_sees_what_a_call_needed_and_freed():
    size = 64 * 2**20
    peak = common.peak_memory(lambda: torch.ones(size // 4).sum().item())
    assert 0.95 * size <= peak < 1.5 * size  # the kernel's count lags behind by some pages
    assert common.peak_memory(lambda: None) < size / 8


def test_results_carry_their_environment_and_no_nan(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    path = common.write_result("probe", {"ratio": 1.5})
    written = json.loads(path.read_text())
    assert path == tmp_path / "results" / "probe.json"
    assert written["ratio"] == 1.5
    assert written["environment"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match=r"nan|NaN"):
        common.write_result("broken", {"ratio": float("nan")})
    assert not (tmp_path / "results" / "broken.json").exists()
