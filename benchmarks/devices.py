"""The device of a benchmark: checked before anything runs, named in its result."""

from __future__ import annotations

import argparse

import torch


def device_argument(text: str) -> str:
    """Return a device that is there, as ``type=`` of an option.

    Raises:
        argparse.ArgumentTypeError: If it is neither a CPU nor a CUDA device, or is not there.

    Example:
        >>> device_argument("cpu")
        'cpu'
    """
    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is no device to measure on: use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            f"{text!r} needs a GPU, and torch {torch.__version__} sees none: use cpu, or run this "
            "on a machine with an NVIDIA GPU and a torch that is built for CUDA"
        )
    if kind == "cuda" and (torch.device(text).index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not there: torch sees {torch.cuda.device_count()} GPUs, counted from 0"
        )
    return text


def device_name(device: str) -> str:
    """Return ``"cpu"``, or the GPU's name."""
    kind = torch.device(device).type
    return kind if kind == "cpu" else torch.cuda.get_device_name(device)
