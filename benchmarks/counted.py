"""Where a step's time goes: into the operations that are counted in FLOPs, and into the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import flop_registry

STEP = "one step"


class Seconds(NamedTuple):
    """A step's time.

    Attributes:
        counted: In products, convolutions and attention, whose FLOPs F counts.
        rest: In all else: normalisation, dropout, activations, copies, Python, the optimizer.
    """

    counted: float
    rest: float


def split_seconds(
    step: Callable[[], object], device: torch.device | str, steps: int = 3
) -> Seconds:
    """Return how a step's time is split.

    A step that skips a share of F cannot save more than that share of what is counted, unless it
    skips some of the rest as well.

    Args:
        step: One training step.
        device: Where it runs; on a GPU its kernels' time is taken.
        steps: Steps to look at, after one more.
    """
    names = {f"aten::{str(packet).rpartition('.')[2]}" for packet in flop_registry}
    cuda = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    step()
    with profile(activities=activities) as found:
        for _ in range(steps):
            with record_function(STEP):
                step()
                if cuda:
                    torch.cuda.synchronize(device)
    counted = whole = 0.0
    for event in found.events() or []:
        time = event.device_time_total if cuda else event.cpu_time_total
        if event.name == STEP and event.device_type == torch.autograd.DeviceType.CPU:
            whole += event.cpu_time_total
        elif event.name in names and not _inside(event, names):
            counted += time
    return Seconds(counted / steps / 1e6, (whole - counted) / steps / 1e6)


def _inside(event: torch.autograd.profiler_util.FunctionEvent, names: set[str]) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name in names:
            return True
        parent = parent.cpu_parent
    return False
