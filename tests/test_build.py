"""What is compiled and why: the plan, the record in the library, the build backend."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from lightning_mat import _extension

ROOT = Path(__file__).resolve().parent.parent


def load(name: str):
    """A file of build_tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "build_tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def extension(monkeypatch):
    """build_tools/extension.py on a machine without any CUDA toolkit of its own."""
    module = load("extension")
    monkeypatch.setattr(module.glob, "glob", lambda pattern: [])
    return module


def toolkit(
    folder: Path, release: str, architectures: tuple[str, ...] = ("80", "90", "120")
) -> Path:
    """A folder that looks like a CUDA toolkit; returns it."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    known = " ".join(f"compute_{a}" for a in architectures)
    script(
        folder / "bin" / "nvcc",
        f"""case "$1" in
            --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
            --list-gpu-arch) printf '%s\\n' {known} ;;
            --dryrun) echo "#$ _HERE_={folder}/bin" >&2 ;;
        esac""",
    )
    return folder


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_a_cpu_build_of_torch_gets_no_cuda(extension, tmp_path):
    home = toolkit(tmp_path / "cuda", "13.0")
    plan = extension.make_plan(None, {"CUDA_HOME": str(home), "PATH": ""})
    assert not plan.cuda
    assert "CPU build" in plan.reason


def test_cuda_is_compiled_for_the_known_architectures_with_no_gpu(extension, tmp_path):
    home = toolkit(tmp_path / "cuda", "13.0")
    plan = extension.make_plan("13.2", {"CUDA_HOME": str(home), "PATH": ""})
    assert plan.cuda
    assert plan.toolkit.home == home
    assert plan.arch_list == "8.0;9.0;12.0"  # 8.6 and 8.9 are unknown to this compiler
    assert "13.0" in plan.reason
    assert str(home) in plan.reason


def test_the_architecture_list_can_be_given(extension, tmp_path):
    home = toolkit(tmp_path / "cuda", "13.0")
    environ = {"CUDA_HOME": str(home), "PATH": "", "TORCH_CUDA_ARCH_LIST": "9.0"}
    assert extension.make_plan("13.2", environ).arch_list == "9.0"


def test_an_nvcc_on_the_path_that_is_a_script_leads_to_its_toolkit(extension, tmp_path):
    home = toolkit(tmp_path / "opt" / "cuda-13.0", "13.0")
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "nvcc", f'exec "{home}/bin/nvcc" "$@"')
    plan = extension.make_plan("13.2", {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})
    assert plan.cuda
    assert plan.toolkit.home == home


def test_a_compiler_of_another_major_version_is_not_used(extension, tmp_path):
    environ = {"CUDA_HOME": str(toolkit(tmp_path / "cuda", "12.8")), "PATH": ""}
    plan = extension.make_plan("13.2", environ)
    assert not plan.cuda
    assert "no nvcc 13.x" in plan.reason
    assert "12.8" in plan.reason
    # One that fits is taken even where another comes first.
    environ["CUDA_PATH"] = str(toolkit(tmp_path / "cuda-13", "13.1"))
    assert extension.make_plan("13.2", environ).toolkit.release == "13.1"


def test_broken_toolkits_are_passed_over(extension, tmp_path):
    silent = toolkit(tmp_path / "silent", "13.0")
    script(silent / "bin" / "nvcc", "exit 1")
    wordless = toolkit(tmp_path / "wordless", "13.0")
    script(wordless / "bin" / "nvcc", "echo nothing of use")
    for home in (silent, wordless, tmp_path / "absent"):
        assert extension.toolkit_at(home) is None


def test_cuda_can_be_declined(extension, tmp_path):
    home = toolkit(tmp_path / "cuda", "13.0")
    environ = {"CUDA_HOME": str(home), "PATH": "", "LIGHTNING_MAT_CUDA": "0"}
    plan = extension.make_plan("13.2", environ)
    assert not plan.cuda
    assert plan.reason == "LIGHTNING_MAT_CUDA=0"


@pytest.mark.parametrize(
    ("torch_cuda", "message"), [(None, "install a torch"), ("13.2", "CUDA_HOME")]
)
def test_cuda_that_is_required_and_impossible_is_an_error_with_a_remedy(
    extension, torch_cuda, message
):
    with pytest.raises(SystemExit, match=message):
        extension.make_plan(torch_cuda, {"PATH": "", "LIGHTNING_MAT_CUDA": "1"})


def test_an_unknown_setting_is_named(extension):
    with pytest.raises(SystemExit, match="auto, 0 or 1, got 'yes'"):
        extension.make_plan("13.2", {"LIGHTNING_MAT_CUDA": "yes"})


def test_the_record_is_a_header_of_string_literals(extension):
    plan = extension.Plan(False, 'a "reason"\\with quotes')
    header = extension.build_header(plan, "0.1.0", "2.15.0")
    assert '#define LIGHTNING_MAT_BUILD_TORCH "2.15.0"\n' in header
    assert '#define LIGHTNING_MAT_BUILD_BACKENDS "cpu"\n' in header
    assert '#define LIGHTNING_MAT_BUILD_REASON "a \\"reason\\"\\\\with quotes"\n' in header


def test_every_source_is_compiled(extension):
    compiled = {*extension.CPU_SOURCES, *extension.CUDA_SOURCES}
    found = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.c*")}
    assert found == compiled


def test_kernels_know_no_torch_type():
    """So they compile in seconds and need none of the libraries' headers."""
    kernels = [*(ROOT / "csrc").rglob("*.cu"), ROOT / "csrc/mntk.h", ROOT / "csrc/lanczos.h"]
    for path in kernels:
        included = re.findall(r'#include [<"](.*)[>"]', path.read_text())
        assert not [name for name in included if re.match("ATen|torch|c10|pybind", name)], path


def test_torch_is_asked_for_only_where_it_is_missing(monkeypatch):
    # The backend changes both when it is imported, in the process that builds.
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    backend = load("backend")
    assert backend.get_requires_for_build_editable() == []
    assert backend.get_requires_for_build_wheel() == []
    assert backend.get_requires_for_build_sdist() == []
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend.get_requires_for_build_editable() == ["torch>=2.10"]


@pytest.mark.skipif(bool(_extension.load().error), reason=_extension.load().error)
def test_the_library_records_how_it_was_built():
    found = _extension.load()
    assert found.info["torch"] == torch.__version__
    assert found.info["compiler"].startswith("c++ ")
    assert found.info["reason"]
    assert found.backends[0] == "cpu"
    if "cuda" in found.backends:
        assert found.info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert found.info["arch_list"]


@pytest.fixture
def fresh_load():
    """The loading itself, each time."""
    return _extension.load.__wrapped__


def test_a_library_that_does_not_import_is_explained(fresh_load, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_mat._C", None)
    found = fresh_load()
    assert found.backends == ()
    assert "cannot be imported" in found.error


@pytest.mark.skipif(bool(_extension.load().error), reason=_extension.load().error)
def test_a_library_for_another_torch_is_not_used(fresh_load, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    found = fresh_load()
    assert found.backends == ()
    assert "torch 9.9.9 is running" in found.error


# ---- what the compiled kernels need ----------------------------------------

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def kernels(log: str) -> list[dict[str, str]]:
    """What ptxas says of every kernel."""
    return [found.groupdict() for found in _ENTRY.finditer(log)]


def test_a_spill_would_be_seen():
    log = """ptxas info    : Compiling entry function '_Z1fv' for 'sm_86'
ptxas info    : Function properties for _Z1fv
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size"""
    assert kernels(log) == [
        {
            "name": "_Z1fv",
            "architecture": "sm_86",
            "stack": "16",
            "stores": "4",
            "loads": "8",
            "registers": "255",
        }
    ]


@pytest.mark.skipif(bool(_extension.load().error), reason="the library is not compiled")
@pytest.mark.skipif(sys.platform != "linux", reason="compiled without OpenMP")
def test_the_library_runs_on_all_threads():
    """Without OpenMP torch's parallel loops run on one thread, and nobody notices."""
    assert _extension.load().info["parallel"] == "openmp"


@pytest.mark.skipif(
    "cuda" not in _extension.load().backends, reason="the library was compiled without CUDA"
)
def test_kernels_keep_everything_in_registers():
    """No kernel spills or has a stack frame, on any architecture that was compiled for."""
    log = Path(_extension.__file__).with_name("_build.log").read_text()
    found = kernels(log)
    compiled = {kernel["architecture"].removeprefix("sm_") for kernel in found}
    wanted = _extension.load().info["arch_list"].split(";")
    assert compiled == {architecture.replace(".", "") for architecture in wanted}
    for name in ("gram_kernel", "spectrum_kernel", "ghost_kernel"):
        assert any(name in kernel["name"] for kernel in found), name
    for kernel in found:
        needs = (kernel["stack"], kernel["stores"], kernel["loads"])
        assert needs == ("0", "0", "0"), kernel
