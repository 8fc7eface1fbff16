"""Gate: a backward pass that skips what rests."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mat.gate.fallback import ClearResting, DropGradient, forget, note_once, watch
from lightning_mat.gate.forward import GatedForward, detaching
from lightning_mat.gate.rules import Rest, entry_for
from lightning_mat.units.core import Partition
from lightning_mat.units.unit import matrix_shape

SKIPS = ("weights",)


class Gate:
    """Makes a model's backward pass skip the units that rest.

    After :meth:`apply`, the gradients of the units that train and of the remainder equal those of a
    plain backward pass. A parameter that rests whole gets no gradient (``.grad`` is None); in one
    of which a part rests that part is zero, so that clipping by norm does not see it. The products
    that would make up resting gradients are not computed, and activations that only they need are
    not saved. Outputs and input gradients are those of the plain model.

    Rules know ``nn.Linear``, ``nn.Conv1d`` to ``nn.Conv3d`` and Hugging Face's ``Conv1D``, and any
    layer's parameters that rest whole. A parameter of another layer of which a part rests, gets its
    gradient in full, cleared where it rests (:attr:`in_full`).

    With all units active every module is exactly as it was. A gate is also a context manager that
    removes itself on exit. The model's copies and pickles carry no gate.

    Args:
        model: The model.
        part: Its units.
        skip: What is skipped: ``"weights"``, the gradients of resting parameters.

    Raises:
        ValueError: If ``skip`` is unknown, or the partition is of another model.

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

    def __init__(self, model: nn.Module, part: Partition, skip: str = "weights") -> None:
        """Find the modules that hold what the units own; nothing changes before :meth:`apply`."""
        if skip not in SKIPS:
            choices = ", ".join(repr(choice) for choice in SKIPS)
            raise ValueError(f"skip must be one of {choices}, got {skip!r}")
        self.part = part
        self.skip = skip
        self._params = dict(model.named_parameters())
        for name in part.owners:
            if name not in self._params or self._params[name].shape != part.shapes[name]:
                raise ValueError(
                    f"the partition has a parameter {name!r} of shape "
                    f"{tuple(part.shapes[name])}, which this model has not: make the partition of "
                    "the same model"
                )
        canonical = {id(param): name for name, param in self._params.items()}
        # Shared modules and tied parameters: every module once, every parameter under one name.
        read = {
            module.get_submodule(child)
            for module in model.modules()
            for child in entry_for(module).reads
        }
        self._sites = [
            (path, module, names)
            for path, module in model.named_modules()
            if module not in read and (names := _names(module, canonical, part))
        ]
        self._gated: list[GatedForward] = []
        self._hooks: list[tuple[nn.Parameter, RemovableHandle]] = []
        self._in_full: set[str] = set()

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
        self.remove()
        try:
            rests = {name: rest for name in self.part.owners if (rest := self._rest(name, flags))}
            for path, module, names in self._sites:
                own = {local: rests[name] for local, name in names.items() if name in rests}
                if own:
                    self._gate(path, module, own, names)
        except BaseException:
            self.remove()
            raise

    def _rest(self, name: str, flags: list[bool]) -> Rest | None:
        """Return what rests of a parameter, with its hook registered; None if nothing does."""
        param = self._params[name]
        rows, columns = matrix_shape(param.shape)
        blocks = self.part.active_blocks(name, flags)
        if sum(block.numel for block in blocks) == rows * columns:
            return None
        hook = ClearResting(name, blocks, rows, columns) if blocks else DropGradient(name)
        if not blocks:
            param.grad = None
        if param.requires_grad:
            self._hooks.append((param, watch(param, hook)))
        return Rest(param, blocks, hook if isinstance(hook, ClearResting) else None)

    def _gate(
        self, path: str, module: nn.Module, own: dict[str, Rest], names: dict[str, str]
    ) -> None:
        if isinstance(module.__dict__.get("forward"), GatedForward):
            raise RuntimeError(
                f"module {path!r} has a gate already: call remove() on the other gate first"
            )
        gated = GatedForward(module, own)
        rule = entry_for(module).rule
        run = rule(module, own) if rule is not None else None
        if run is None:
            sliced = [names[local] for local, rest in own.items() if not rest.whole]
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
        gated.install(run)
        self._gated.append(gated)

    def remove(self) -> None:
        """Give the model back as it was; :meth:`apply` may be called again."""
        for gated in self._gated:
            gated.uninstall()
        for _, handle in self._hooks:
            handle.remove()
        for param, _ in self._hooks:
            forget(param)
        self._gated.clear()
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


def _names(module: nn.Module, canonical: dict[int, str], part: Partition) -> dict[str, str]:
    """Return {name within the module: canonical name} of the owned parameters it reads itself."""
    found: dict[str, str] = {}
    for prefix in ("", *entry_for(module).reads):
        for local, param in module.get_submodule(prefix)._parameters.items():
            name = canonical.get(id(param))
            if name in part.owners:
                found[f"{prefix}.{local}" if prefix else local] = name
    return found
