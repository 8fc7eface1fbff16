"""A backward pass that skips what rests: :class:`Gate`, and the rules it is made of."""

from lightning_mat.gate import (
    attention,
    conv,
    elementwise,
    embedding,
    experts,
    linear,
    norm,
    pooling,
    reading,
    reshaping,
    transposed,
)
from lightning_mat.gate.gate import Gate
from lightning_mat.gate.rules import register_gate_rule

__all__ = [
    "Gate",
    "attention",
    "conv",
    "elementwise",
    "embedding",
    "experts",
    "linear",
    "norm",
    "pooling",
    "reading",
    "register_gate_rule",
    "reshaping",
    "transposed",
]
