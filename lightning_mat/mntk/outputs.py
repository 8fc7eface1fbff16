"""Outputs: the one scalar per sample whose Jacobian the mNTK is made of.

========== =====================================================================================
sum_logits the sum over all logits of a sample: the paper's choice (appendix B.3)
random     a fixed random projection of the logits, ±1/√k, which keeps the directions that
           sum_logits cancels (softmax cross-entropy gradients sum to zero over the classes)
loss       the sample's loss: cross-entropy for integer targets, squared error for real ones
callable   ``(model, batch) -> [S]`` scalars
========== =====================================================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTPUTS = ("sum_logits", "random", "loss")
TARGETS = ("labels", "label", "targets", "target", "y")
IGNORED = -100
"""Target value that counts for nothing, as in ``torch.nn.functional.cross_entropy``."""

Forward = Callable[[nn.Module, Any], Any]
Output = str | Callable[[nn.Module, Any], Tensor]


def check_output(output: Output) -> None:
    """Raise a ValueError if the output is neither a known word nor a callable."""
    if not callable(output) and output not in OUTPUTS:
        raise ValueError(
            f"output must be one of {OUTPUTS} or a callable (model, batch) -> [S] scalars, "
            f"got {output!r}"
        )


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call a model with the inputs of a training batch, without its targets.

    A mapping gives keyword arguments, as far as ``forward`` names them and they are not targets; a
    pair is (inputs, targets); anything else is passed as it is.

    Raises:
        ValueError: If no argument of the model's forward is found in the batch.
    """
    if isinstance(batch, Mapping):
        signature = inspect.signature(model.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.values())
        inputs = {
            key: value
            for key, value in batch.items()
            if key not in TARGETS and (key in signature or takes_any)
        }
        if not inputs:
            raise ValueError(
                f"none of the batch's keys {sorted(map(str, batch))} is an argument of "
                f"{type(model).__name__}.forward{tuple(signature)}: pass "
                "forward=lambda model, batch: ... that returns the logits"
            )
        return model(**inputs)
    if isinstance(batch, (list, tuple)):
        if len(batch) not in (1, 2):
            raise ValueError(
                f"a batch of {len(batch)} parts is neither (inputs,) nor (inputs, targets): pass "
                "forward=lambda model, batch: ... that returns the logits"
            )
        return model(batch[0])
    return model(batch)


def logits_of(result: Any, samples: int) -> Tensor:
    """Return the logits in what a model returned: a tensor, ``.logits``, or the first of a tuple.

    Raises:
        ValueError: If there is none, or its dimension 0 is not the samples.
    """
    logits = result
    if isinstance(logits, Mapping) and "logits" in logits:
        logits = logits["logits"]
    elif hasattr(logits, "logits"):
        logits = logits.logits
    elif isinstance(logits, (tuple, list)) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise ValueError(
            f"the model returned {type(result).__name__}, in which no logits were found: pass "
            "forward=lambda model, batch: ... that returns a tensor [S, ...]"
        )
    if logits.dim() == 0 or logits.shape[0] != samples:
        raise ValueError(
            f"logits must have the {samples} samples in dimension 0, got shape "
            f"{list(logits.shape)}: pass forward=... that returns [S, ...], or output=callable"
        )
    return logits


def projection(output: str, size: int, seed: int, like: Tensor) -> Tensor:
    """Return the vector v of shape ``[size]`` for which z = Σ v · logits; ones for sum_logits."""
    if output == "sum_logits":
        return torch.ones(size, dtype=like.dtype, device=like.device)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    vector: Tensor = signs / size**0.5
    return vector.to(like)


def project(output: str, logits: Tensor, seed: int) -> Tensor:
    """Return z, shape ``[S]``, as the projection of the logits ``[S, ..., k]``."""
    if output == "sum_logits":
        return logits.flatten(1).sum(1) if logits.dim() > 1 else logits
    if logits.dim() == 1:
        return logits
    vector = projection(output, logits.shape[-1], seed, logits)
    return (logits * vector).flatten(1).sum(1)


def targets_of(batch: Any) -> Tensor:
    """Return the targets of a batch: the second of a pair, or the entry of a usual name.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(batch, Mapping):
        for name in TARGETS:
            found: Any = batch.get(name)
            if isinstance(found, Tensor):
                return found
    elif isinstance(batch, (list, tuple)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[1]
    raise ValueError(
        f'output="loss" found no targets in a batch of type {type(batch).__name__}: name them one '
        f"of {TARGETS}, pass (inputs, targets), or pass output=callable (model, batch) -> [S]"
    )


def sample_losses(model: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    """Return each sample's loss, averaged over its own targets, shape ``[S]``.

    Args:
        model: Consulted for one thing: transformers' causal language models shift their targets.
        logits: ``[S, ..., k]``, or ``[S, k, ...]`` for images.
        targets: Integers ``[S, ...]`` (−100 counts for nothing), or reals of the logits' shape.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    if targets.is_floating_point():
        if targets.shape != logits.shape:
            targets = targets.view_as(logits) if targets.numel() == logits.numel() else targets
        if targets.shape == logits.shape:
            return (logits - targets).square().flatten(1).mean(1)
    else:
        classes_second = (logits.shape[0], *logits.shape[2:]) == tuple(targets.shape)
        # torch's convention for images, [S, k, height, width], where both could be meant
        if logits.dim() > 3 and classes_second:
            return _cross_entropy(logits, targets)
        if logits.shape[:-1] == targets.shape:
            if getattr(model, "loss_type", None) == "ForCausalLM":
                logits, targets = logits[:, :-1], targets[:, 1:]
            return _cross_entropy(logits.movedim(-1, 1), targets)
        if logits.dim() == 3 and classes_second:
            return _cross_entropy(logits, targets)
    raise ValueError(
        f"logits of shape {list(logits.shape)} and targets of shape {list(targets.shape)} and type "
        f'{targets.dtype} do not fit output="loss": pass output=callable (model, batch) -> [S]'
    )


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    counted = (targets != IGNORED).flatten(1).sum(1) if targets.dim() > 1 else 1
    total = losses.flatten(1).sum(1) if losses.dim() > 1 else losses
    return total / (counted.clamp_min(1) if isinstance(counted, Tensor) else counted)
