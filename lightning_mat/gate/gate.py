"""Gate: a backward pass that skips what rests."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mat.gate import compiled
from lightning_mat.gate.fallback import ClearResting, DropGradient, forget, note_once, watch
from lightning_mat.gate.forward import constant, detaching
from lightning_mat.gate.heads import splitting
from lightning_mat.gate.plan import rows_of
from lightning_mat.gate.rules import Forward, Rest
from lightning_mat.gate.sites import Site, find_sites
from lightning_mat.shards import leaves_of, sharded_modules
from lightning_mat.units.core import Partition
from lightning_mat.units.regions import Block
from lightning_mat.units.unit import matrix_shape

SKIPS = ("weights", "units")
# Kinds of units that have an output of their own, which ``skip="units"`` makes a constant. A layer
# has not: without it nothing would train below.
CUT_KINDS = ("head", "expert", "filter", "ffn")


class Gate:
    """Makes a model's backward pass skip the units that rest.

    After :meth:`apply`, and with ``skip="weights"``, the gradients of the units that train and of
    the remainder equal those of a plain backward pass. With ``skip="units"`` they equal those of
    the model in which the outputs of resting heads, experts, filters and feed-forward blocks are
    detached (:data:`CUT_KINDS`; other units rest as with ``"weights"``): nothing is computed or
    saved for gradients into or through them. Outputs are those of the plain model in both.

    A parameter that rests whole gets no gradient (``.grad`` is None); in one of which a part rests
    that part is zero, so that clipping by norm does not see it. The products that would make up
    resting gradients are not computed, and activations that only they need are not saved.

    There is a rule for each layer type, see :func:`register_gate_rule` and ``docs/step.md``. Of a
    layer without one, parameters that rest whole are skipped, and parts of others get their
    gradient in full, cleared where they rest (:attr:`in_full`).

    With all units active every module is exactly as it was. A gate is also a context manager that
    removes itself on exit. The model's copies and pickles carry no gate.

    Args:
        model: The model.
        part: Its units.
        skip: What is skipped: ``"weights"``, the gradients of resting parameters, or ``"units"``,
            also the gradients into and through resting units. With dropout inside of
            ``F.scaled_dot_product_attention`` the masks are then drawn separately for training and
            resting heads: of the same distribution, from other random numbers.
        freeze_bn: Stop the running statistics of BatchNorm in channels of resting filters, where
            a BatchNorm directly follows the convolution in their parent. It normalises by the batch
            as ever. By default the statistics are left alone.

    Raises:
        ValueError: If ``skip`` is unknown, the partition is of another model, or ``"units"`` would
            have to cut a part of a layer that no rule knows.

    Example:
        >>> import torch
        >>> from lightning_mat.units.unit import Slice, Unit
        >>> model = nn.Linear(3, 4, bias=False)
        >>> rows = [Unit(f"row.{i}", "ffn", "", (Slice("weight", 0, i, i + 1),)) for i in range(4)]
        >>> gate = Gate(model, Partition(rows, model))
        >>> gate.apply(torch.tensor([False, True, False, False]))
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> model.weight.grad
        tensor([[0., 0., 0.],
                [2., 2., 2.],
                [0., 0., 0.],
                [0., 0., 0.]])
        >>> gate.remove()

    Source:
        The MAT paper, section 4: units below the threshold are excluded from the backward pass.
    """

    def __init__(
        self, model: nn.Module, part: Partition, skip: str = "weights", *, freeze_bn: bool = False
    ) -> None:
        """Find the modules that hold what the units own; nothing changes before :meth:`apply`."""
        if skip not in SKIPS:
            choices = ", ".join(repr(choice) for choice in SKIPS)
            raise ValueError(f"skip must be one of {choices}, got {skip!r}")
        self.part = part
        self.skip = skip
        self.freeze_bn = freeze_bn
        leaves = leaves_of(model)
        held = dict(model.named_parameters())
        for name in part.owners:
            if name not in held or held[name].shape != part.shapes[name]:
                near = next((known for known in held if known.endswith(f".{name}")), None)
                raise ValueError(
                    f"the partition has a parameter {name!r} of shape "
                    f"{tuple(part.shapes[name])}, which this model has not"
                    f"{'' if near is None else f' (but {near!r})'}: make the partition of the same "
                    "model, which under Lightning is the LightningModule"
                )
        self._sites = find_sites(model, part, units=skip == "units", batch_norms=freeze_bn)
        # Of sharded parameters those that gradients arrive at; FSDP hands them on.
        self._params = {name: leaves.get(param, param) for name, param in held.items()}
        self._sharded = {name: param for name, param in held.items() if param in leaves}
        for site in self._sites.all():
            site.gated.exchange(leaves)
        if not leaves:  # layers inside that are sharded on their own have others until they run
            for site, _ in (*self._sites.experts, *self._sites.attentions):
                site.gated.watch_inside()
        self._readers = self._sites.readers() if skip == "units" else {}
        self._hooks: list[tuple[nn.Parameter, RemovableHandle]] = []
        self._in_full: set[str] = set()
        if self._sharded and skip == "units":
            self._check_sharded_layers(model)
        # Rules may have one state for each module, which a gate that is on needs.
        if skip == "units" and self._other() is None:
            for site in self._sites.layers:
                self._try(site)

    def _check_sharded_layers(self, model: nn.Module) -> None:
        """Raise where FSDP's hooks would see an output of which only a part has gradients."""
        sharded = set(sharded_modules(model))
        for site in self._sites.layers:
            if site.module in sharded:
                raise ValueError(
                    f'skip="units" does not work with fully_shard on a single layer '
                    f"({site.path!r}): call fully_shard on the block around it, or use "
                    'skip="weights"'
                )

    def _try(self, site: Site) -> None:
        """Raise early where a rule will not be able to cut what a unit contributes to a module."""
        owners = {i for name in site.names.values() for i, _ in self.part.owners[name]}
        first = min((i for i in owners if self.part.kinds[i] in CUT_KINDS), default=None)
        if first is None:
            return
        flags = [index != first for index in range(len(self.part))]
        own = {}
        for local, name in site.names.items():
            blocks, passing = self._blocks(name, flags)
            rest = Rest(self._params[name], blocks, passing)
            if not rest.passes:
                own[local] = rest
        entry = site.entry
        if (entry.rule is None or entry.rule(site.module, own) is None) and own:
            self._check_passes(site, own)
        _forget(site)

    @property
    def in_full(self) -> tuple[str, ...]:
        """Parameters of which a part rests, but whose gradient is computed in full."""
        return tuple(name for name in self._params if name in self._in_full)

    def apply(self, active: Tensor | Sequence[bool]) -> None:
        """Let the active units train and the others rest, from the next forward pass on.

        Call it between optimizer steps; a gradient left on a parameter that rests from now on is
        dropped.

        Args:
            active: Which units train, bool, shape ``[L]``.

        Raises:
            ValueError: If it is not a bool tensor of shape ``[L]``.
            RuntimeError: If another gate is on one of the modules.
        """
        flags = self.part.check_active(active).tolist()
        self.check_alone()
        self.remove()
        if all(flags):
            return
        try:
            rests = {name: rest for name in self.part.owners if (rest := self._rest(name, flags))}
            for site in self._sites.layers:
                self._gate(site, rests)
            for site, attention in self._sites.attentions:
                # In every decision: compiled models look at whether it is there.
                if not site.gated.on:
                    self._install(site, None)
                run = site.gated.run or site.gated.plain
                site.gated.run = splitting(run, attention.split(rests))
            for site, batch_norm in self._sites.statistics:
                batch_norm.stop(site.gated, rests)
            for site, unit in self._sites.experts:
                if not flags[unit]:
                    self._install(site, constant(site.gated))
        except BaseException:
            self.remove()
            raise

    @property
    def products(self) -> Tensor:
        """What training a unit costs, in weight gradients of the unit: float64, shape ``[L]``.

        With ``skip="units"`` a resting unit is spared a product of each of its weights for the
        gradient that travels on, too, which costs as much as that for the weight. What attention
        itself spares, and the layer behind a filter, is left out; the first layer of a network is
        taken for one whose input needs a gradient.
        """
        cut = [self.skip == "units" and kind in CUT_KINDS for kind in self.part.kinds]
        return torch.tensor(cut, dtype=torch.float64) + 1

    def _blocks(self, name: str, flags: list[bool]) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
        """Return what of a parameter trains, and what of it gradients travel through."""
        blocks = self.part.active_blocks(name, flags)
        passes = [
            on or self.skip == "weights" or kind not in CUT_KINDS
            for on, kind in zip(flags, self.part.kinds, strict=True)
        ]
        return blocks, self.part.active_blocks(name, passes)

    def _rest(self, name: str, flags: list[bool]) -> Rest | None:
        """Return what rests of a parameter, with its hook registered; None if nothing does."""
        param = self._params[name]
        rows, columns = matrix_shape(param.shape)
        blocks, passing = self._blocks(name, flags)
        if sum(block.numel for block in blocks) == rows * columns:
            return None
        passes = sum(block.numel for block in passing) == rows * columns
        readers = () if passes else self._readers.get(name, ())
        hook: ClearResting | DropGradient = DropGradient(name, readers)
        if blocks:
            keep = name not in self._sharded
            hook = ClearResting(name, blocks, rows, columns, readers, keep=keep)
        else:
            param.grad = None
            if name in self._sharded:
                self._sharded[name].grad = None
        if param.requires_grad:
            self._hooks.append((param, watch(param, hook)))
        clear = hook if isinstance(hook, ClearResting) else None
        return Rest(param, blocks, passing, clear, self._is_read_apart(name, flags, passing))

    def _is_read_apart(self, name: str, flags: list[bool], passing: tuple[Block, ...]) -> bool:
        """Return whether a BatchNorm behind a convolution, if any, passes on the same channels."""
        return all(
            scale in self.part.owners and rows_of(self._blocks(scale, flags)[1]) == rows_of(passing)
            for scale in self._sites.scales.get(name, ())
        )

    def _gate(self, site: Site, rests: dict[str, Rest]) -> None:
        """Make a module's forward follow what rests of its parameters."""
        module, gated = site.module, site.gated
        own = {local: rests[name] for local, name in site.names.items() if name in rests}
        entry = site.entry
        if entry.static is not None:
            make = entry.static.gradients
            cast(compiled.Place, gated.place).let(lambda: make(module, own))
        if not own and not entry.always:
            if entry.static is not None:
                self._install(site, None)
            return
        known = entry.rule is not None or site.inside_expert
        if known and not entry.always and _is_constant(module, own):
            self._install(site, constant(gated))
            return
        run = entry.rule(module, own) if entry.rule is not None else None
        if run is None:
            self._check_passes(site, own)
            sliced = [site.names[local] for local, rest in own.items() if not rest.whole]
            self._in_full.update(sliced)
            for name in sliced:
                kind = type(module).__name__
                note_once(
                    f"in full: {kind}",
                    f"no gate rule for a part of {name!r} in {kind}: its gradient is computed in "
                    "full and cleared where it rests (register_gate_rule adds a rule)",
                )
            if len(sliced) == len(own):
                return
            run = detaching(gated, own)
        self._install(site, run)

    def _install(self, site: Site, run: Forward | None) -> None:
        try:
            site.gated.install(run)
        except RuntimeError as error:
            raise RuntimeError(f"module {site.path!r}: {error}") from None

    def check_alone(self) -> None:
        """Raise a RuntimeError if another gate is on the model."""
        other = self._other()
        if other is not None:
            raise RuntimeError(
                f"module {other.path!r}: a gate is on it already: call remove() on that gate, or "
                "close() on its MAT, first"
            )

    def _other(self) -> Site | None:
        """Return a site that another gate is on."""
        return next((site for site in self._sites.all() if site.gated.other_is_on), None)

    def _check_passes(self, site: Site, own: dict[str, Rest]) -> None:
        """Raise where the gradients through a module would have to be cut without a rule."""
        name = next((site.names[n] for n, rest in own.items() if not rest.passes), None)
        if name is None or (site.inside_expert and _is_constant(site.module, own)):
            return
        raise ValueError(
            f'skip="units" cannot cut the gradients through {name!r}, because no gate rule knows '
            f"how these units rest in {type(site.module).__name__} (module {site.path!r}): use "
            'skip="weights", leave them out, or register_gate_rule one'
        )

    def remove(self) -> None:
        """Give the model back as it was; :meth:`apply` may be called again."""
        for site in self._sites.all():
            if site.gated.on:
                site.gated.uninstall()
                _forget(site)
        for _, handle in self._hooks:
            handle.remove()
        for param, _ in self._hooks:
            forget(param)
        self._hooks.clear()
        self._in_full.clear()

    def __enter__(self) -> Gate:
        """Return the gate itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the gate."""
        self.remove()


def _is_constant(module: nn.Module, own: dict[str, Rest]) -> bool:
    """Return whether nothing that a module reads passes gradients on."""
    return all(rest.cut for rest in own.values()) and own.keys() >= {
        name for name, _ in module.named_parameters()
    }


def _forget(site: Site) -> None:
    """Let go of what rested, and with it of the memory of gradients."""
    entry = site.entry
    if site.gated.place is not None:
        site.gated.place.let(lambda: None)
    if entry.always and entry.rule is not None and site.names:
        entry.rule(site.module, {})
