"""How each layer type gives per-sample gradients: one file per family, found by a registry."""

from lightning_mat.mntk.rules import attention, conv, embedding, linear, norm
from lightning_mat.mntk.rules.base import (
    LayerRule,
    explicit_forward,
    layer_rule,
    register_explicit_forward,
    register_layer_finder,
    register_layer_rule,
)

__all__ = [
    "LayerRule",
    "attention",
    "conv",
    "embedding",
    "explicit_forward",
    "layer_rule",
    "linear",
    "norm",
    "register_explicit_forward",
    "register_layer_finder",
    "register_layer_rule",
]
