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

# Of all pairs of samples, in four panels of one triangle (csrc/ghost.cpp).
PAIR_SHARE = 0.625


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
    return PAIR_SHARE * (of_inputs + (samples * tokens) ** 2 * rows)


def staged_multiply_adds(samples: int, tokens: float, elements: int) -> float:
    """Return the multiply-adds of forming gradients and multiplying them by themselves."""
    return samples * elements * (tokens + samples)


def choose_way(
    samples: int,
    shape: tuple[int, int],
    sources: Sequence[Source],
    pieces: Words,
    *,
    workspace: int,
    itemsize: int,
    on_gpu: bool,
) -> str:
    """Return the way that is counted to be cheapest, of those that the layer can go.

    Args:
        samples: S.
        shape: Rows and columns of the layer's gradient.
        sources: What makes it.
        pieces: What of it is owned, ``[m, 5]``.
        workspace: Bytes for intermediate results.
        itemsize: Bytes of a number in a Gram.
        on_gpu: Whether the layer's tensors are on a GPU.
    """
    _, columns = shape
    tokens = max((source.tokens for source in sources), default=0)
    heights = pieces[:, 2] - pieces[:, 1]
    elements = int((heights * (pieces[:, 4] - pieces[:, 3])).sum())
    whole = bool(((pieces[:, 3] == 0) & (pieces[:, 4] == columns)).all())
    if not elements or not tokens:
        return "staged"
    linear = all(source.kind == "linear" for source in sources)
    geometry = sources[0].geometry if len(sources) == 1 else None
    conv = geometry is not None and geometry.groups == 1 and sources[0].samples == samples
    if whole and (linear or conv) and not any(source.adds for source in sources):
        positions = sources[0].positions if conv else tokens
        kernel = prod(geometry.kernel) if geometry is not None else 1
        pairs = (samples * tokens) ** 2
        wide = heights > 4 * tokens
        numbers = pairs * (int(wide.sum()) + (kernel if conv else 0))
        numbers += samples**2 * tokens * int(heights[~wide].sum())
        rows = int(heights.sum())
        ghost = ghost_multiply_adds(samples, tokens, rows, columns // kernel, positions)
        ghost += ELEMENTWISE * PAIR_SHARE * numbers
        fits = (samples * max(positions, tokens)) ** 2 * itemsize <= workspace
        if fits and ghost < staged_multiply_adds(samples, tokens, elements):
            return "ghost"
    alone = linear and len(sources) == 1
    return "chip" if on_gpu and alone and tokens <= CHIP_TOKENS else "staged"
