"""Does a unit hold exactly the parameters on which its own contribution depends?

A unit speaks to the model through its columns of an outlet (the attention's output projection, the
second linear layer). With every other column of the outlet set to zero, the model's output reaches
the layer's other parameters through this unit alone: their gradient must vanish outside the unit's
slices, exactly, and inside it must not vanish where the untouched model has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lightning_mat.units import Unit


def elements(model: nn.Module, units: Iterable[Unit]) -> dict[str, Tensor]:
    """Return {parameter: bool mask of what the units own}, by plain indexing."""
    masks: dict[str, Tensor] = {}
    for unit in units:
        for s in unit.slices:
            parameter = model.get_parameter(s.param)
            mask = masks.setdefault(s.param, torch.zeros(parameter.shape, dtype=torch.bool))
            if s.dim is None:
                mask[...] = True
            else:
                mask.movedim(s.dim, 0)[s.start : s.stop] = True
    return masks


def gradients(
    model: nn.Module, run: Callable[[nn.Module], Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    output = run(model)
    weights = torch.linspace(1, 2, output.numel(), dtype=output.dtype).sin()
    names = list(names)
    found = torch.autograd.grad(
        (output.flatten() * weights).sum(), [model.get_parameter(n) for n in names]
    )
    return dict(zip(names, found, strict=True))


def assert_units_are_closed(
    model: nn.Module, run: Callable[[nn.Module], Tensor], units: list[Unit], outlet: str
) -> None:
    """Check all units of one layer, whose outlet is the parameter ending in ``outlet``."""
    together = elements(model, units)
    (speaker,) = [name for name in together if name.endswith(outlet)]
    others = [name for name in together if name != speaker]
    assert together[speaker].all(), "the units together own all of the outlet"
    untouched = gradients(model, run, others)
    largest = max(g.abs().max() for g in untouched.values())
    live = {n: g.abs() > 1e-9 * largest for n, g in untouched.items()}
    weight = model.get_parameter(speaker)
    kept = weight.detach().clone()
    for unit in units:
        own = elements(model, [unit])
        with torch.no_grad():
            weight.copy_(kept * own[speaker])
        alone = gradients(model, run, others)
        with torch.no_grad():
            weight.copy_(kept)
        for name in others:
            inside = own.get(name, torch.zeros_like(live[name]))
            assert not alone[name][~inside].any(), f"{unit.name} depends on more of {name}"
            assert alone[name][inside & live[name]].all(), f"{unit.name} owns too much of {name}"
            # A key's bias has no gradient: softmax ignores what is added to all scores of a query.
            assert (inside & live[name]).any() or name.endswith(("key.bias", "k_proj.bias"))
