"""Where a number was measured: the record that every result file carries."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

Value = str | int | bool | None

# What measuring itself changes in a checkout makes no other code of it.
_RESULTS = (":!benchmarks/results", ":!BENCHMARKS.md", ":!docs/figures")


def environment(device: torch.device | str = "cpu") -> dict[str, Value]:
    """Return what a reader needs to judge a measurement, as plain JSON values.

    Args:
        device: Device of the measurement.

    Returns:
        ``time`` (UTC), ``commit`` and ``modified`` (of the checkout that the package was imported
        from; None outside of one), ``platform``, ``python``, versions of ``torch``, ``lightning``
        and ``lightning_mat`` (None if not installed), ``cuda`` (the version torch was built for),
        ``device`` (its name), ``cpu``, ``cores`` (that this process may use) and ``threads`` (that
        torch uses).

    Example:
        >>> environment()["torch"] == torch.__version__
        True
    """
    where = torch.device(device)
    project = Path(__file__).resolve().parents[2]
    changes = _git(project, "status", "--porcelain", "--untracked-files=no", "--", ".", *_RESULTS)
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git(project, "rev-parse", "HEAD"),
        "modified": None if changes is None else bool(changes),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": _version("lightning"),
        "lightning_mat": _version("lightning-mat"),
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def cpu_model() -> str:
    """Return the processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(folder: Path, *command: str) -> str | None:
    if not (folder / ".git").exists():
        return None  # git would look further up, into somebody else's repository
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
