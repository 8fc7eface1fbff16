"""``lightning-mat doctor``: what is installed, what is used, and whether it computes right."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from lightning_mat import _extension
from lightning_mat.mntk import ops
from lightning_mat.mntk.accumulate import default_workspace
from lightning_mat.mntk.kernel import Layer, Plan, mntk_spectra, mntk_spectra_reference
from lightning_mat.units.unit import Rect

# The largest error that rounding explains, relative to the largest value of the result.
TOLERANCE = {
    "gram_accumulate": 1e-5,
    "gram_eigenvalues": 1e-12,
    "gram_extremes": 1e-11,
    "mntk_spectra": 1e-5,
}


@dataclass(frozen=True)
class Check:
    """One operation on one device by one backend, against the float64 reference on the CPU.

    Attributes:
        operation: Name of the operation in :mod:`lightning_mat.mntk.ops`.
        device: Where it ran.
        backend: ``"extension"`` or ``"eager"``.
        error: Largest difference relative to the largest value of the reference; NaN if it failed.
        failure: The message of the exception that it raised, or empty.
    """

    operation: str
    device: str
    backend: str
    error: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether rounding explains the error."""
        return not self.failure and self.error <= TOLERANCE[self.operation]


def devices() -> list[str]:
    """Return the devices to check: the CPU and every CUDA device."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def self_check(device: str, backend: str) -> list[Check]:
    """Run every operation on a device by a backend and compare it with the reference."""
    generator = torch.Generator().manual_seed(0)
    # Odd sizes, a transposed layout, several pieces per unit, and one Gram of rank one.
    grad = torch.randn(11, 7, 9, generator=generator).transpose(0, 2)
    pieces = torch.tensor([[0, 0, 3, 0, 11], [1, 3, 7, 0, 5], [1, 3, 7, 5, 6], [2, 6, 7, 10, 11]])
    grams = torch.zeros(3, 9, 9)
    ops.gram_accumulate_reference(grams, grad, pieces)

    def accumulate() -> Tensor:
        sums = torch.zeros(3, 9, 9, device=device)
        ops.gram_accumulate(sums, grad.to(device), pieces, backend=backend)
        return sums

    def eigenvalues() -> Tensor:
        return ops.gram_eigenvalues(grams.to(device), backend=backend)

    def extremes() -> Tensor:
        return torch.stack(ops.gram_extremes(grams.to(device), backend=backend))

    a, b, plan = _captured(generator)

    def spectra() -> Tensor:
        inputs, gradients = ([t.to(device) for t in tensors] for tensors in (a, b))
        return mntk_spectra(inputs, gradients, plan, backend=backend).eigenvalues

    cases: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "gram_accumulate": (accumulate, grams),
        "gram_eigenvalues": (eigenvalues, ops.gram_eigenvalues_reference(grams)),
        "gram_extremes": (extremes, torch.stack(ops.gram_extremes_reference(grams))),
        "mntk_spectra": (spectra, mntk_spectra_reference(a, b, plan).eigenvalues),
    }
    return [_compare(name, device, backend, *case) for name, case in cases.items()]


def _captured(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor], Plan]:
    """Return captured tensors of two units that share a layer, one per way to a Gram."""
    rows = [(0, Rect(0, 5, 0, 13)), (1, Rect(5, 11, 0, 13))]
    layers = [Layer("linear", 11, 13, rows, way=way) for way in ("staged", "chip", "ghost")]
    layers.append(Layer("bias", 11, 1, [(0, Rect(0, 5, 0, 1)), (1, Rect(5, 11, 0, 1))]))
    a = [torch.randn(9, 3, 13, generator=generator) for _ in layers[:3]]
    b = [torch.randn(9, 3, 11, generator=generator) for _ in layers]
    return [*a, torch.empty(0)], b, Plan(2, layers)


def _compare(
    name: str, device: str, backend: str, run: Callable[[], Tensor], expected: Tensor
) -> Check:
    try:
        found = run().cpu().double()
    except (RuntimeError, ValueError) as failure:  # what a doctor is for: report it and go on
        return Check(name, device, backend, float("nan"), str(failure).splitlines()[0])
    error = (found - expected.double()).abs().max() / expected.abs().max()
    return Check(name, device, backend, float(error))


def diagnose() -> tuple[str, bool]:
    """Return the report and whether every self-check passed."""
    checks: list[Check] = []
    for device in devices():
        if ops.backend_in_use(device)[0] == "extension":
            checks += self_check(device, "extension")
        checks += self_check(device, "eager")
    sections = {
        "Versions": _versions(),
        "Devices": _devices(),
        "Compiled extension": _compiled(),
        "In use": (_line(d, _in_use(d)) for d in devices()),
        "Self-check: largest relative error against the float64 reference": map(_result, checks),
    }
    lines = [line for title, body in sections.items() for line in (title, *body, "")]
    healthy = all(check.passed for check in checks)
    lines.append("All self-checks passed." if healthy else "A SELF-CHECK FAILED: see above.")
    return "\n".join(lines), healthy


def _in_use(device: str) -> str:
    name, why = ops.backend_in_use(device)
    return f"{name}: {why}; {default_workspace(device) >> 20} MiB of gradients at a time"


def _line(name: str, text: object) -> str:
    return f"  {name:<13} {text}"


def _versions() -> Iterator[str]:
    yield _line("python", platform.python_version())
    for package in ("torch", "lightning", "lightning-mat"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        yield _line(package, str(torch.__version__) if package == "torch" else version)


def _devices() -> Iterator[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield _line("cpu", f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield _line(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {major}.{minor}")


def _compiled() -> Iterator[str]:
    extension = _extension.load()
    if extension.error:
        yield _line("none", extension.error)
        yield _line("to fix", _extension.REMEDY)
        return
    info = extension.info
    yield _line("backends", info["backends"].replace(",", ", "))
    yield _line("because", info["reason"])
    yield _line("torch", info["torch"])
    yield _line("compiler", info["compiler"])
    if "cuda" in extension.backends:
        yield _line("nvcc", f"{info['cuda']}, for {info['arch_list']}")
        if not torch.cuda.is_available():
            yield _line("note", "compiled for CUDA, and no CUDA device to run on here")
    elif torch.cuda.is_available():
        yield _line("to fix", f"LIGHTNING_MAT_CUDA=1, then {_extension.REMEDY}")


def _result(check: Check) -> str:
    verdict = "ok" if check.passed else "FAILED " + (check.failure or "beyond rounding")
    name = f"{check.backend:<10} {check.operation:<17}"
    return _line(check.device, f"{name} {check.error:8.1e}  {verdict}")


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "doctor", help="show versions, devices and backends, and check what they compute"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if a self-check failed."""
    report, healthy = diagnose()
    print(report)
    return 0 if healthy else 1
