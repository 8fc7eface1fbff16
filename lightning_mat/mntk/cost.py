r"""What each way to a layer's Grams costs, counted before it is gone.

For S samples, T tokens, E owned elements of R rows and C columns:

* staged: blocks of gradients are formed and multiplied by themselves, ``S·T·E + S²·E``
  multiply-adds;
* ghost: :math:`\Theta_{ss'} = \sum_{tt'} (a_{st}·a_{s't'}) (b_{st}·b_{s't'})`, without the
  gradients, ``S²·T²·(C + R)`` times the share of pairs that is formed. It wins where T is small:
  T = 1, pooled features, late feature maps. A convolution's patches are not formed either: their
  products are sums of those of the P elements of a channel, ``S²·P²·channels``;
* chip: as staged, but gradients are formed where they are multiplied, on a GPU. Each element costs
  T multiply-adds on the ordinary units instead of one write and one read of a block, and so pays
  only for a handful of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from lightning_mat.mntk.factors import Source
from lightning_mat.mntk.words import Words

CHIP_TOKENS = 4
"""Most tokens for which gradients are formed on the chip."""

# A pass over numbers (product, sum) moves as many bytes as it does operations, and so costs about
# as much as this many multiply-adds of a matrix product.
ELEMENTWISE = 12

_PANELS, _PANEL_TOKENS = 4, 128


def panel_share(samples: int, tokens: int) -> float:
    """Return which share of the pairs of samples is formed: panels of one triangle (ghost.cpp).

    Example:
        >>> panel_share(64, 16), panel_share(2, 1)
        (0.625, 1.0)
    """
    panels = max(1, min(samples * tokens // _PANEL_TOKENS, _PANELS, samples))
    return (panels + 1) / (2 * panels)


def ghost_multiply_adds(
    samples: int, tokens: int, rows: int, inputs: int, positions: int | None = None
) -> float:
    """Return the multiply-adds of the products of tokens of the pairs of samples that are formed.

    Args:
        samples: S.
        tokens: T.
        rows: R, owned output gradients.
        inputs: C of a linear layer, channels of a convolution.
        positions: Of a convolution, the elements of a channel: its patches' products are sums of
            products of elements, which are formed once.
    """
    of_inputs = (samples * (positions or tokens)) ** 2 * inputs
    return panel_share(samples, tokens) * (of_inputs + (samples * tokens) ** 2 * rows)


def staged_multiply_adds(samples: int, tokens: float, elements: int) -> float:
    """Return the multiply-adds of forming gradients and multiplying them by themselves."""
    return samples * elements * (tokens + samples)


def possible_ways(
    samples: int,
    shape: tuple[int, int],
    sources: Sequence[Source],
    pieces: Words,
    *,
    workspace: int,
    itemsize: int,
    on_gpu: bool,
) -> tuple[str, ...]:
    """Return the ways that a layer can go (csrc/ghost.cpp and csrc/pass.cpp decide alike).

    Args:
        samples: S.
        shape: Rows and columns of the layer's gradient.
        sources: What makes it.
        pieces: What of it is owned, ``[m, 5]``.
        workspace: Bytes for intermediate results.
        itemsize: Bytes of a number in a Gram.
        on_gpu: Whether the layer's tensors are on a GPU.
    """
    ways = ["staged"]
    tokens = max((source.tokens for source in sources), default=0)
    heights, widths = pieces[:, 2] - pieces[:, 1], pieces[:, 4] - pieces[:, 3]
    if not tokens or not (heights * widths).any():
        return ("staged",)
    linear = all(source.kind == "linear" for source in sources)
    conv = _is_plain_convolution(samples, sources)
    whole = bool(((pieces[:, 3] == 0) & (pieces[:, 4] == shape[1]))[heights > 0].all())
    if whole and (linear or conv) and not any(source.adds for source in sources):
        positions = sources[0].positions if conv else 0
        numbers = 2 * (samples * tokens) ** 2 + (samples * positions) ** 2
        if numbers * itemsize <= workspace:
            ways.append("ghost")
    if on_gpu and linear and len(sources) == 1 and sources[0].samples == samples:
        ways.append("chip")
    return tuple(ways)


def choose_way(
    samples: int,
    shape: tuple[int, int],
    sources: Sequence[Source],
    pieces: Words,
    ways: Sequence[str],
) -> str:
    """Return the way that is counted to be cheapest, of those that the layer can go.

    Args:
        samples: S.
        shape: Rows and columns of the layer's gradient.
        sources: What makes it.
        pieces: What of it is owned, ``[m, 5]``.
        ways: :func:`possible_ways`.
    """
    if ways == ("staged",):
        return "staged"
    tokens = max(source.tokens for source in sources)
    heights = pieces[:, 2] - pieces[:, 1]
    if "ghost" in ways:
        conv = _is_plain_convolution(samples, sources)
        kernel = prod(sources[0].geometry.kernel) if conv and sources[0].geometry else 1
        positions = sources[0].positions if conv else tokens
        pairs = (samples * tokens) ** 2
        wide = heights > 4 * tokens
        numbers = pairs * (int(wide.sum()) + (kernel if conv else 0))
        numbers += samples**2 * tokens * int(heights[~wide].sum())
        rows = int(heights.sum())
        ghost = ghost_multiply_adds(samples, tokens, rows, shape[1] // kernel, positions)
        ghost += ELEMENTWISE * panel_share(samples, tokens) * numbers
        elements = int((heights * (pieces[:, 4] - pieces[:, 3])).sum())
        if ghost < staged_multiply_adds(samples, tokens, elements):
            return "ghost"
    # A GPU's tiles have 64 samples: above, each would form its elements anew.
    return "chip" if "chip" in ways and tokens <= CHIP_TOKENS and samples <= 64 else "staged"


def _is_plain_convolution(samples: int, sources: Sequence[Source]) -> bool:
    if len(sources) != 1 or sources[0].geometry is None:
        return False
    return sources[0].geometry.groups == 1 and sources[0].samples == samples
