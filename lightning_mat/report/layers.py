"""Short names of layers, for axes and tables."""

from __future__ import annotations

from collections.abc import Sequence


def short_names(layers: Sequence[str]) -> dict[str, str]:
    """Return each layer's path without the parts that all layers begin with.

    Args:
        layers: Module paths; repetitions do not matter.

    Returns:
        Short name of each layer, in order of first appearance.

    Example:
        >>> short_names(["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.encoder.layer.0"])
        {'bert.encoder.layer.0': '0', 'bert.encoder.layer.1': '1'}
        >>> short_names(["model.head"])
        {'model.head': 'head'}
    """
    distinct = list(dict.fromkeys(layers))
    paths = [layer.split(".") for layer in distinct]
    common = 0
    # The last part of a path always stays, so that no name becomes empty.
    for parts in zip(*(path[:-1] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common += 1
    return {layer: ".".join(path[common:]) for layer, path in zip(distinct, paths, strict=True)}
