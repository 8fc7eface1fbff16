"""Sites: the modules of a model at which a gate stands in for the forward."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lightning_mat.gate.compiled import Place
from lightning_mat.gate.forward import GatedForward, inside
from lightning_mat.gate.heads import AttentionSite, attention_sites
from lightning_mat.gate.rules import Entry, entry_for
from lightning_mat.gate.running import Statistics, statistics
from lightning_mat.units.core import Partition
from lightning_mat.units.filters import following_norms
from lightning_mat.units.lookup import Lookup


class Site:
    """A module that reads parameters of units, and what stands in for its forward.

    Args:
        path: Its name in the model.
        module: The module.
        names: Its parameters that units own: name within the module → name in the partition.
        eager: Whether it stands aside in compiled models; by default where every layer inside has
            one graph for all decisions.
    """

    def __init__(
        self, path: str, module: nn.Module, names: dict[str, str], *, eager: bool | None = None
    ) -> None:
        """Make the stand-in; nothing is installed."""
        self._entry = entry_for(module)
        static = self._entry.static if names else None
        self.path, self.module, self.names = path, module, names
        self.inside_expert = False
        self.gated = GatedForward(
            module,
            names,
            None if static is None else static.plain,
            eager=_has_static_layers(module) if eager is None else eager,
        )

    @property
    def entry(self) -> Entry:
        """What is registered for the module's forward now."""
        return self._entry if self.gated.is_wrapped else entry_for(self.module)


class Sites(NamedTuple):
    """All sites of a model.

    Attributes:
        layers: Modules that read parameters of units.
        experts: Modules all of whose parameters one expert owns, with the expert's index.
        attentions: Attention modules whose heads are units.
        statistics: BatchNorms behind convolutions, where their running statistics may be stopped.
        scales: {name of the weight of a convolution: those of the weights of the BatchNorms behind
            it, None for one without}; empty where gradients through units are not skipped.
    """

    layers: list[Site]
    experts: list[tuple[Site, int]]
    attentions: list[tuple[Site, AttentionSite]]
    statistics: list[tuple[Site, Statistics]]
    scales: dict[str, set[str | None]]

    def readers(self) -> dict[str, list[Place]]:
        """Return the places of the layers that read a parameter, where all of them have one."""
        found: dict[str, list[Place | None]] = {}
        for site in self.layers:
            for name in site.names.values():
                found.setdefault(name, []).append(site.gated.place)
        return {
            name: known
            for name, places in found.items()
            if len(known := [place for place in places if place is not None]) == len(places)
        }

    def all(self) -> list[Site]:
        """Return every site, some of them twice."""
        others = (*self.experts, *self.attentions, *self.statistics)
        return [*self.layers, *(site for site, _ in others)]


def find_sites(model: nn.Module, part: Partition, *, units: bool, batch_norms: bool) -> Sites:
    """Return where a gate has to stand in.

    Args:
        model: The model.
        part: Its units.
        units: Whether gradients through units are skipped, so that experts and attention count.
        batch_norms: Whether running statistics may be stopped.
    """
    canonical = {id(param): name for name, param in model.named_parameters()}
    # Shared modules and tied parameters: every module once, every parameter under one name.
    read = {
        module.get_submodule(child)
        for module in model.modules()
        for child in entry_for(module).reads
    }
    layers = [
        Site(path, module, names)
        for path, module in model.named_modules()
        if module not in read and (names := _names(module, canonical, part))
    ]
    known = {site.module: site for site in layers}
    attentions = attention_sites(model, part) if units else []
    norms = statistics(model, canonical) if batch_norms else []
    behind = [(known.get(b.module) or Site(b.path, b.module, {}), b) for b in norms]
    for site, _ in behind:
        site.gated.eager = False
    experts = _experts(model, canonical, part) if units else []
    for expert, _ in experts:
        for module in expert.module.modules():
            if module in known:
                known[module].inside_expert = True
    return Sites(
        layers,
        experts,
        [
            (known.get(a.module) or Site(a.attention.path, a.module, {}, eager=True), a)
            for a in attentions
        ],
        behind,
        _scales(model, canonical) if units else {},
    )


def _scales(model: nn.Module, canonical: dict[int, str]) -> dict[str, set[str | None]]:
    """Return the weights of the BatchNorms behind a convolution, by the name of its weight."""
    found: dict[str, set[str | None]] = {}
    for conv, norm in following_norms(Lookup(model)).items():
        weights = (model.get_submodule(path)._parameters.get("weight") for path in (conv, norm))
        name, scale = (canonical.get(id(weight)) for weight in weights)
        if name is not None:
            # One over several processes is no BatchNorm of some of its channels.
            synced = isinstance(model.get_submodule(norm), nn.SyncBatchNorm)
            found.setdefault(name, set()).add(None if synced else scale)
    return found


def _has_static_layers(module: nn.Module) -> bool:
    """Return whether compiled models need no stand-in, because the layers inside have theirs.

    A layer that no rule knows needs none either: hooks drop the gradients of what rests.
    """
    holders = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    entries = [entry_for(m) for m in holders]
    return all(entry.static is not None or entry.rule is None for entry in entries)


def _experts(
    model: nn.Module, canonical: dict[int, str], part: Partition
) -> list[tuple[Site, int]]:
    """Return the modules all of whose parameters one expert owns, the outermost ones."""
    owner: dict[str, int] = {}
    for name, rects in part.owners.items():
        units = {index for index, _ in rects}
        if len(units) == 1 and not part.free_blocks(name):
            owner[name] = units.pop()
    found: list[tuple[Site, int]] = []
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        owners = {owner.get(canonical[id(p)], -1) for p in module.parameters()}
        if module in inside or module is model or len(owners) != 1:
            continue
        unit = owners.pop()
        if unit >= 0 and part.kinds[unit] == "expert" and next(module.children(), None):
            found.append((Site(path, module, {}), unit))
            inside.update(module.modules())
    return found


def _names(module: nn.Module, canonical: dict[int, str], part: Partition) -> dict[str, str]:
    """Return {name within the module: canonical name} of the owned parameters it reads itself."""
    found: dict[str, str] = {}
    for prefix in ("", *entry_for(module).reads):
        for local, param in inside(module, prefix)._parameters.items():
            name = canonical.get(id(param))
            if name in part.owners:
                found[f"{prefix}.{local}" if prefix else local] = name
    return found
