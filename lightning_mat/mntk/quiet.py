"""A context in which a model can be probed without leaving a trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

PRECISIONS = ("float32", "tf32", "bf16")


@contextmanager
def quiet(model: nn.Module, precision: str = "float32") -> Iterator[None]:
    """Put a model in eval mode without weight gradients, and give everything back on exit.

    Parameters, buffers, ``.grad``, ``requires_grad``, train/eval flags, the random number streams
    (torch, Python, NumPy) and the numerical settings are bit-equal before and after, also when the
    body raises.

    Args:
        model: The model to probe.
        precision: ``"float32"`` (no autocast, no TF32), ``"tf32"`` or ``"bf16"`` (autocast).

    Raises:
        ValueError: If the precision is not one of :data:`PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    training = {module: module.training for module in model.modules()}
    frozen = {p: p.requires_grad for p in model.parameters()}
    buffers = _kept_buffers(training)
    cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(kept_random_streams(cuda))
        stack.enter_context(_numerics(model, precision))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # hooks must fire, and shapes of a probe must not recompile a training step
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in training:
                module.training = False
            for parameter in frozen:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in frozen.items():
                parameter.requires_grad_(flag)
            for module, flag in training.items():
                module.training = flag
            with torch.no_grad():
                for module, name, buffer, version, before in buffers:
                    module._buffers[name] = buffer
                    if buffer._version != version:
                        buffer.copy_(before)


def _kept_buffers(
    modules: Iterable[nn.Module],
) -> list[tuple[nn.Module, str, Tensor, int, Tensor]]:
    """Return where each buffer is, itself, its version, and a copy of it."""
    return [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


@contextmanager
def kept_random_streams(
    devices: Iterable[torch.device] = (), seed: int | None = None
) -> Iterator[None]:
    """Restore torch's, Python's and NumPy's random number streams on exit.

    Args:
        devices: GPUs whose streams are kept, too.
        seed: If given, the block starts with all of them seeded.
    """
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    current = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    numbers = {current if d.index is None else d.index for d in devices}
    with torch.random.fork_rng(devices=sorted(numbers)):
        try:
            if seed is not None:
                # torch.manual_seed would seed all GPUs, also those whose streams are not restored
                torch.default_generator.manual_seed(seed)
                for number in sorted(numbers):
                    torch.cuda.default_generators[number].manual_seed(seed)
                random.seed(seed)
                if numpy is not None:
                    numpy.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


@contextmanager
def _numerics(model: nn.Module, precision: str) -> Iterator[None]:
    """Pin the precision of matrix products, and the plain path of attention layers."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # cuDNN refuses the backward pass of a recurrent layer in eval mode
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    cudnn = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = cudnn and not recurrent
    try:
        with (
            _float32_products(precision == "tf32"),
            torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        torch.backends.cudnn.enabled = cudnn


@contextmanager
def _float32_products(tf32: bool) -> Iterator[None]:
    """Compute float32 products exactly, or with TF32 on a GPU.

    torch has an older set of settings, which show the same values but cannot be read once they do
    not fit these.
    """
    backends = cast(Any, torch.backends)
    on_gpu = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    settings = [*on_gpu, backends.mkldnn.matmul]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32" if tf32 and setting in on_gpu else "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
