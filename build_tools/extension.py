"""What is compiled: C++ always, CUDA where the installed torch and a compiler allow it."""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from setuptools import Extension

ROOT = Path(__file__).resolve().parent.parent
# Compute capabilities compiled for without TORCH_CUDA_ARCH_LIST, as far as the compiler knows them.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "12.0")
CPU_SOURCES = (
    "csrc/ops.cpp",
    "csrc/pass.cpp",
    "csrc/source.cpp",
    "csrc/chunk.cpp",
    "csrc/form.cpp",
    "csrc/ghost.cpp",
    "csrc/boxes.cpp",
    "csrc/cpu/backend.cpp",
    "csrc/cpu/boxes.cpp",
    "csrc/cpu/ghost.cpp",
    "csrc/cpu/gram.cpp",
    "csrc/cpu/spectrum.cpp",
)
CUDA_SOURCES = (
    "csrc/cuda/backend.cpp",
    "csrc/cuda/pending.cpp",
    "csrc/cuda/support.cpp",
    "csrc/cuda/boxes.cu",
    "csrc/cuda/gram.cu",
    "csrc/cuda/ghost.cu",
    "csrc/cuda/rows.cu",
    "csrc/cuda/spectrum.cu",
    "csrc/cuda/upload.cu",
)
LOG = "_build.log"
# -fno-wrapv undoes a flag that some Pythons pass on, which keeps the solver's loops from being
# vectorised: it is four times slower with it.
HOST_FLAGS = ["-O3", "-g0", "-fno-wrapv", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
# at::parallel_for runs on one thread in sources that are compiled without OpenMP.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
# -Xptxas -v: registers, shared memory and spills of every kernel are in the build's log.
NVCC_FLAGS = ["-O3", "-Xptxas", "-v", "-Werror", "all-warnings", "-Xcompiler", "-Wall"]


class Toolkit(NamedTuple):
    """A CUDA toolkit: its folder, release such as "13.0", and the architectures it knows."""

    home: Path
    release: str
    architectures: tuple[str, ...]


class Plan(NamedTuple):
    """What is going to be compiled, and why."""

    cuda: bool
    reason: str
    toolkit: Toolkit | None = None
    arch_list: str = ""


def toolkit_at(home: Path) -> Toolkit | None:
    """Return the toolkit in a folder, or None where it is not one that can compile."""
    nvcc = home / "bin" / "nvcc"
    if not (home / "include" / "cuda_runtime.h").is_file() or not nvcc.is_file():
        return None
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
        known = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+\.\d+)", version.stdout)
    codes = re.findall(r"compute_(\d+)(\d)\b", known.stdout)
    if release is None:
        return None
    return Toolkit(home, release.group(1), tuple(f"{major}.{minor}" for major, minor in codes))


def toolkit_homes(environ: dict[str, str]) -> list[Path]:
    """Folders that may hold a CUDA toolkit, in the order in which they are tried."""
    homes = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc:
        homes.append(Path(nvcc).resolve().parent.parent)
        # The nvcc on PATH may be a script that calls the real one, which tells where it lives.
        trace = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        )
        homes += [Path(p).parent for p in re.findall(r"_HERE_=(\S+)", trace.stderr + trace.stdout)]
    homes += [Path(p) for p in sorted(glob.glob("/usr/local/cuda*"), reverse=True)]
    homes.append(Path("/opt/cuda"))
    return list(dict.fromkeys(homes))


def make_plan(torch_cuda: str | None, environ: dict[str, str]) -> Plan:
    """Decide whether the CUDA sources are compiled.

    Args:
        torch_cuda: The CUDA release that torch was built with, None for a CPU build.
        environ: LIGHTNING_MAT_CUDA (auto, 0 or 1), TORCH_CUDA_ARCH_LIST, CUDA_HOME and PATH count.

    Raises:
        SystemExit: If LIGHTNING_MAT_CUDA is 1 and CUDA cannot be compiled, or is something else.
    """
    mode = environ.get("LIGHTNING_MAT_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"LIGHTNING_MAT_CUDA must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return Plan(False, "LIGHTNING_MAT_CUDA=0")
    if torch_cuda is None:
        plan = Plan(False, "the installed torch is a CPU build")
        remedy = "install a torch that is built for CUDA"
    else:
        major = torch_cuda.split(".")[0]
        toolkits = [t for t in map(toolkit_at, toolkit_homes(environ)) if t]
        fitting = [t for t in toolkits if t.release.split(".")[0] == major]
        if fitting:
            return _cuda_plan(fitting[0], torch_cuda, environ)
        found = ", ".join(f"{t.release} in {t.home}" for t in toolkits) or "none"
        reason = f"torch is built for CUDA {torch_cuda}, but no nvcc {major}.x was found ({found})"
        plan = Plan(False, reason)
        remedy = f"install the CUDA {major} toolkit and name its folder in CUDA_HOME"
    if mode == "1":
        raise SystemExit(f"LIGHTNING_MAT_CUDA=1, but {plan.reason}: {remedy}")
    return plan


def _cuda_plan(toolkit: Toolkit, torch_cuda: str, environ: dict[str, str]) -> Plan:
    arch_list = environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(
        a for a in ARCHITECTURES if a in toolkit.architectures
    )
    reason = f"torch is built for CUDA {torch_cuda}, nvcc {toolkit.release} is in {toolkit.home}"
    return Plan(True, reason, toolkit, arch_list)


def build_header(plan: Plan, version: str, torch_version: str) -> str:
    """Return the header that records the plan in the library."""
    values = {
        "VERSION": version,
        "TORCH": torch_version,
        "BACKENDS": "cpu,cuda" if plan.cuda else "cpu",
        "REASON": plan.reason,
        "CUDA": plan.toolkit.release if plan.toolkit else "",
        "ARCH_LIST": plan.arch_list,
    }
    lines = [f"#define LIGHTNING_MAT_BUILD_{k} {json.dumps(v)}\n" for k, v in values.items()]
    compiler = '#define LIGHTNING_MAT_BUILD_COMPILER "c++ " __VERSION__\n'
    return "".join(["#pragma once\n", *lines, compiler])


@contextmanager
def kept_output(path: Path) -> Iterator[None]:
    """Write what this process and its compilers print to a file as well."""
    sys.stdout.flush()
    sys.stderr.flush()
    terminals = [os.dup(1), os.dup(2)]
    read, write = os.pipe()

    def copy() -> None:
        with path.open("wb") as file:
            while chunk := os.read(read, 1 << 16):
                file.write(chunk)
                os.write(terminals[0], chunk)

    copier = threading.Thread(target=copy, daemon=True)
    copier.start()
    os.dup2(write, 1)
    os.dup2(write, 2)
    os.close(write)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(terminals[0], 1)
        os.dup2(terminals[1], 2)
        copier.join(timeout=10)  # a compiler's daemon may hold the other end


def configure() -> dict[str, object]:
    """Return setup()'s arguments for the extension; none where torch is missing (archives)."""
    if importlib.util.find_spec("torch") is None:
        if {"build_ext", "bdist_wheel", "editable_wheel", "install"} & set(sys.argv):
            raise SystemExit("torch is needed to compile lightning_mat: pip install 'torch>=2.10'")
        return {}
    # Importing torch is enough to know its CUDA release; CUDA_HOME has to be right before
    # torch.utils.cpp_extension is imported, since that module reads it once.
    import torch

    plan = make_plan(torch.version.cuda, dict(os.environ))
    if plan.toolkit:
        os.environ["CUDA_HOME"] = str(plan.toolkit.home)
        os.environ["TORCH_CUDA_ARCH_LIST"] = plan.arch_list
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        """Writes the build's record, says what it compiles, and compiles it."""

        def build_extensions(self) -> None:
            folder = Path(self.build_temp).resolve() / "generated"
            folder.mkdir(parents=True, exist_ok=True)
            header = build_header(plan, self.distribution.get_version(), torch.__version__)
            (folder / "lightning_mat_build.h").write_text(header)
            for extension in self.extensions:
                extension.include_dirs.insert(0, str(folder))
            what = f"C++ and CUDA ({plan.arch_list})" if plan.cuda else "C++ only"
            with kept_output(folder / LOG):
                print(f"lightning_mat: compiling {what} against torch {torch.__version__}")
                print(f"lightning_mat: because {plan.reason}", flush=True)
                super().build_extensions()
            if self.inplace or getattr(self, "editable_mode", False):
                # Beside the library: what its kernels need is tested.
                shutil.copy(folder / LOG, ROOT / "lightning_mat" / LOG)

    return {
        "ext_modules": [_extension(cpp_extension, plan)],
        "cmdclass": {"build_ext": BuildExtension},
    }


def _extension(cpp_extension: ModuleType, plan: Plan) -> Extension:
    kind = cpp_extension.CUDAExtension if plan.cuda else cpp_extension.CppExtension
    # Others' headers are system headers, so that only our own sources' warnings count.
    headers = [*_pybind11_headers(), *cpp_extension.include_paths(), sysconfig.get_path("include")]
    if plan.toolkit:
        headers.append(str(plan.toolkit.home / "include"))
    system = [flag for path in headers for flag in ("-isystem", path)]
    flags = {"cxx": [*HOST_FLAGS, *OPENMP, *system]}
    if plan.cuda:
        flags["nvcc"] = NVCC_FLAGS
    return kind(
        "lightning_mat._C",
        [*CPU_SOURCES, *(CUDA_SOURCES if plan.cuda else ())],
        define_macros=[("LIGHTNING_MAT_WITH_CUDA", "1")] if plan.cuda else [],
        extra_compile_args=flags,
        extra_link_args=OPENMP,
        depends=[str(path) for path in sorted((ROOT / "csrc").rglob("*.h"))],
    )


def _pybind11_headers() -> list[str]:
    """pybind11's own headers where it is installed; torch carries a copy of them otherwise."""
    if importlib.util.find_spec("pybind11") is None:
        return []
    import pybind11

    return [pybind11.get_include()]
