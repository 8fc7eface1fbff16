"""Finding linear layers below a module, whatever they are called and however they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lightning_mat.units.unit import Slice

# Children under which torch.compile, FSDP and activation checkpointing keep the module they wrap.
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def join(path: str, name: str) -> str:
    """Return ``path.name``, without a dot where one of them is empty."""
    return f"{path}.{name}" if path and name else path or name


@dataclass(frozen=True)
class LinearMap:
    """A linear map y = Wx + b, or a run of its outputs, by parameter name.

    Args:
        weight: Name of the weight.
        bias: Name of the bias, or None.
        n_out: Number of outputs.
        n_in: Number of inputs.
        out_dim: Dimension of the weight that runs over outputs: 0 in ``torch.nn.Linear``, 1 in
            the Conv1D of Hugging Face, whose weight is ``[in, out]``.
        weight_start: Where the first output lies in the weight.
        bias_start: Where the first output lies in the bias.

    Example:
        >>> query = LinearMap("qkv.weight", "qkv.bias", 24, 8).split(8, 8, 8)[1]
        >>> [(s.param, s.start, s.stop) for s in query.outputs(0, 4)]
        [('qkv.weight', 8, 12), ('qkv.bias', 8, 12)]
    """

    weight: str
    bias: str | None
    n_out: int
    n_in: int
    out_dim: int = 0
    weight_start: int = 0
    bias_start: int = 0

    def outputs(self, start: int, stop: int) -> tuple[Slice, ...]:
        """Return the slices, of weight and bias, that make outputs ``[start, stop)``."""
        first = self.weight_start
        slices = [Slice(self.weight, self.out_dim, first + start, first + stop)]
        if self.bias is not None:
            slices.append(Slice(self.bias, 0, self.bias_start + start, self.bias_start + stop))
        return tuple(slices)

    def inputs(self, start: int, stop: int) -> tuple[Slice, ...]:
        """Return the slice of the weight that reads inputs ``[start, stop)``, for all outputs."""
        return (Slice(self.weight, 1 - self.out_dim, start, stop),)

    def split(self, *sizes: int) -> tuple[LinearMap, ...]:
        """Return maps that make the first ``sizes[0]`` outputs, the next ``sizes[1]``, …."""
        parts: list[LinearMap] = []
        for size in sizes:
            offset = sum(part.n_out for part in parts)
            parts.append(
                replace(
                    self,
                    n_out=size,
                    weight_start=self.weight_start + offset,
                    bias_start=self.bias_start + offset,
                )
            )
        return tuple(parts)


class Lookup:
    """The modules and parameters of a model by path, seen through wrappers.

    Args:
        model: Any module. Wrappers in the sense of :data:`WRAPPED` are passed through, so that
            ``attention.self.query`` is found when ``self`` is compiled on its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over ``(path, module)``, each module once and wrappers not at all."""
        for path, module in self._model.named_modules():
            if self._unwrap(path) == path:
                yield path, module

    def _unwrap(self, path: str) -> str:
        for name in WRAPPED:
            if (inner := join(path, name)) in self._modules:
                return self._unwrap(inner)
        return path

    def find(self, path: str, below: str) -> tuple[str, nn.Module] | None:
        """Return path and module at ``below`` under ``path``, or None."""
        for name in below.split("."):
            path = self._unwrap(join(path, name))
        module = self._modules.get(path)
        return None if module is None else (path, module)

    def own_parameters(self, path: str) -> list[str]:
        """Return the names of the parameters that the module at ``path`` holds itself."""
        names = (join(path, n) for n in self._modules[path]._parameters)
        return [name for name in names if name in self._parameters]

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Return the shape of a parameter; of any of its names where it is tied."""
        return tuple(self._parameters[parameter].shape)

    def linear(self, path: str, below: str) -> LinearMap | None:
        """Return the linear layer at ``below`` under ``path``, or None if there is none."""
        found = self.find(path, below)
        return None if found is None else self.as_linear(*found)

    def as_linear(self, path: str, module: nn.Module) -> LinearMap | None:
        """Return a module as a :class:`LinearMap`, or None if it is no linear layer."""
        weight = join(path, "weight")
        if weight not in self._parameters or len(self.shape(weight)) != 2:
            return None
        bias = join(path, "bias") if join(path, "bias") in self._parameters else None
        rows, columns = self.shape(weight)
        if (getattr(module, "out_features", None), getattr(module, "in_features", None)) == (
            rows,
            columns,
        ):
            return LinearMap(weight, bias, rows, columns)
        if getattr(module, "nf", None) == columns:
            return LinearMap(weight, bias, columns, rows, out_dim=1)
        return None

    def packed(self, path: str, name: str, bias: str, bias_start: int) -> LinearMap | None:
        """Return the matrix ``name`` that the module at ``path`` holds itself, or None."""
        weight = join(path, name)
        if weight not in self._parameters or len(self.shape(weight)) != 2:
            return None
        has_bias = join(path, bias) in self._parameters
        rows, columns = self.shape(weight)
        return LinearMap(
            weight, join(path, bias) if has_bias else None, rows, columns, bias_start=bias_start
        )


def block_of(path: str) -> str:
    """Return the member of an indexed container that ``path`` is or lies in, or its parent.

    Example:
        >>> block_of("bert.encoder.layer.3.attention"), block_of("self_attn")
        ('bert.encoder.layer.3', '')
    """
    names = path.split(".")
    for stop in range(len(names), 0, -1):
        if names[stop - 1].isdigit():
            return ".".join(names[:stop])
    return ".".join(names[:-1])


def block_around(path: str) -> str:
    """Return the member of an indexed container that ``path`` lies in, or the model (``""``).

    Example:
        >>> block_around("encoder.layer.3.fc1"), block_around("features.0"), block_around("head.fc")
        ('encoder.layer.3', '', '')
    """
    names = path.split(".")[:-1]
    while names and not names[-1].isdigit():
        names.pop()
    return ".".join(names)


def name_layers(paths: Sequence[str]) -> list[str]:
    """Return the layer of each module: its block, or itself where two share a block.

    A decoder block has self-attention and cross-attention: they are two layers.

    Example:
        >>> name_layers(["layers.0.attn", "layers.1.attn", "layers.1.cross"])
        ['layers.0', 'layers.1.attn', 'layers.1.cross']
    """
    blocks = [block_of(path) for path in paths]
    return [
        path if blocks.count(block) > 1 else block
        for path, block in zip(paths, blocks, strict=True)
    ]
