"""Per-sample gradients of the affine parameters of normalisation layers."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_mat.mntk.factors import Dense, Factor, Scaled, Summed
from lightning_mat.mntk.rules.base import register_layer_finder, register_layer_rule


def _flat(values: Tensor) -> Dense:
    """Return a factor of a parameter of any shape: [S, *shape] → [S, shape[0], rest]."""
    return Dense(values.flatten(2) if values.dim() > 2 else values.unsqueeze(-1))


@register_layer_rule(nn.LayerNorm, nn.RMSNorm)
class LayerNormRule:
    """y = x̂ ∘ w + b with x̂ normalised over the item: ∂w = Σ_t grad_t ∘ x̂_t, ∂b = Σ_t grad_t."""

    def item_dims(self, module: nn.Module) -> tuple[int, int]:
        """Return the normalised dimensions."""
        dims = len(cast(nn.LayerNorm, module).normalized_shape)
        return dims, dims

    def factors(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Factor]:
        """Return the factors of ``weight`` and ``bias``."""
        if isinstance(module, nn.LayerNorm):
            normal = F.layer_norm(x, module.normalized_shape, eps=module.eps)
        else:
            norm = cast(nn.RMSNorm, module)
            normal = F.rms_norm(x, list(norm.normalized_shape), eps=norm.eps)
        return {
            "weight": Scaled(normal.flatten(2), grad.flatten(2)),
            "bias": Summed(grad.flatten(2)),
        }


@cache
def _scales_by_plain_weight(layer_type: type) -> bool:
    # Llama, Qwen and their relatives each define the same class; Gemma's multiplies by 1 + w, and
    # is left to the fallback.
    if not layer_type.__name__.endswith("RMSNorm"):
        return False
    if not layer_type.__module__.startswith("transformers."):
        return False
    return "return self.weight * hidden_states.to(input_dtype)" in inspect.getsource(layer_type)


def _is_rms_norm(module: nn.Module) -> bool:
    layer_type: Any = type(module)  # hashable, which type[Module] is not to mypy
    return _scales_by_plain_weight(layer_type) and hasattr(module, "variance_epsilon")


@register_layer_finder(_is_rms_norm)
class NamedRMSNormRule:
    """The RMSNorm that transformers' models define: y = w ∘ x / sqrt(mean(x²) + ε), in float32."""

    def item_dims(self, module: nn.Module) -> tuple[int, int]:
        """Vectors in, vectors out."""
        return 1, 1

    def factors(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Factor]:
        """Return the factor of ``weight``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        epsilon = cast(float, module.variance_epsilon)
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return {"weight": Scaled(normal.to(x.dtype), grad)}


@register_layer_rule(nn.GroupNorm)
class GroupNormRule:
    """As LayerNorm, over groups of channels; one weight and bias per channel."""

    def item_dims(self, module: nn.Module) -> tuple[int, int]:
        """Everything but the first dimension is one item."""
        return -1, -1

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return x̂, shape of ``x`` [N, C, *]."""
        norm = cast(nn.GroupNorm, module)
        return F.group_norm(x, norm.num_groups, eps=norm.eps)

    def factors(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Factor]:
        """Return the factors of ``weight`` and ``bias``."""
        normal = self.normalised(module, x.flatten(0, 1)).view_as(x)
        rest = [1, *range(3, grad.dim())]
        return {"weight": _flat((grad * normal).sum(rest)), "bias": _flat(grad.sum(rest))}


@register_layer_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
class BatchNormRule(GroupNormRule):
    """BatchNorm in eval mode, where a sample's output does not depend on the others."""

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return x̂ by the running statistics.

        Raises:
            ValueError: If the layer keeps none, and so mixes the samples of a batch.
        """
        norm = cast(_BatchNorm, module)
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(NO_STATISTICS)
        return F.batch_norm(x, norm.running_mean, norm.running_var, eps=norm.eps)


NO_STATISTICS = (
    "track_running_stats=False normalises over the batch also in eval mode, so that it has no "
    "per-sample gradient: track running statistics, or use GroupNorm"
)
