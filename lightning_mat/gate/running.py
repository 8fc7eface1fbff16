"""Running statistics of BatchNorm that stop for resting filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_mat.gate.forward import GatedForward
from lightning_mat.gate.plan import rows_of
from lightning_mat.gate.rules import Rest
from lightning_mat.units.filters import following_norms
from lightning_mat.units.lookup import Lookup


class Statistics:
    """The running mean and variance of one BatchNorm.

    It still normalises by its batch, and channels of filters that train are tracked as ever. The
    count of batches goes on, too: with ``momentum=None``, a mean over all batches, a channel that
    wakes weighs a new batch as if it had seen all that came before.

    Args:
        path: The BatchNorm's name in the model.
        module: The BatchNorm.
        conv: Name of the weight of the convolution before it.
    """

    def __init__(self, path: str, module: _BatchNorm, conv: str) -> None:
        """Remember which is which."""
        self.path, self.module, self.conv = path, module, conv
        self.resting = torch.zeros(module.num_features, dtype=torch.bool)

    def stop(self, gated: GatedForward, rests: Mapping[str, Rest]) -> None:
        """Let the statistics of filters that rest keep their values.

        Args:
            gated: Stands in for the module's forward.
            rests: What rests, by the name of the parameter.
        """
        rest = rests.get(self.conv)
        if rest is None or not self.module.track_running_stats:
            return
        resting = torch.ones(self.module.num_features, dtype=torch.bool)
        for a, b in rows_of(rest.blocks):
            resting[a:b] = False
        # Always the same tensor: compiled models need no new graph for a decision.
        self.resting = self.resting.to(rest.param.device)
        self.resting.copy_(resting)
        if not gated.on:
            gated.install(None)
        forward = gated.run or gated.plain

        def run(*args: Any, **kwargs: Any) -> Any:
            running = [
                t for t in (self.module.running_mean, self.module.running_var) if t is not None
            ]
            before = [t.clone() for t in running]
            out = forward(*args, **kwargs)
            for tensor, old in zip(running, before, strict=True):
                # Past autograd, which saved them, as the layer's own update goes.
                tensor.data.copy_(torch.where(self.resting, old, tensor))
            return out

        gated.run = run


def statistics(model: nn.Module, canonical: Mapping[int, str]) -> list[Statistics]:
    """Return the BatchNorms of a model that directly follow one convolution, each once.

    Args:
        model: The model.
        canonical: {id of a parameter: its name in the partition}.
    """
    found: dict[nn.Module, list[Statistics]] = {}
    for conv, norm in following_norms(Lookup(model)).items():
        name = canonical.get(id(model.get_submodule(conv)._parameters.get("weight")))
        module = cast(_BatchNorm, model.get_submodule(norm))
        if name is not None:
            found.setdefault(module, []).append(Statistics(norm, module, name))
    return [same[0] for same in found.values() if len({one.conv for one in same}) == 1]
