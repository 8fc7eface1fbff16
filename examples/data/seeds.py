"""One seed from several numbers, for streams that depend on (seed, epoch) or (seed, step)."""

from __future__ import annotations

#: What a stream is for. Order and dropout draw so differently that they share one.
COMMON, AUGMENTATION = range(2)


def mixed(seed: int, number: int, purpose: int = COMMON) -> int:
    """Return a seed below 2³², different for different arguments as far as 32 bits go.

    The CPU's generator looks at the low 32 bits of a seed alone: ``seed << 32`` plus a number would
    give all seeds the same stream. Multiples of an odd number near 2³² over the golden ratio lie
    far from each other, so that each seed has its own stretch of epochs or steps.

    Args:
        seed: Of the run, ≥ 0.
        number: Epoch or step, ≥ 0.
        purpose: What the stream is for; each has its own.

    Example:
        >>> mixed(0, 7), mixed(1, 7), mixed(2**40, 7) < 2**32
        (7, 2654435768, True)
    """
    return (seed * 0x9E3779B1 + purpose * 0x85EBCA6B + number) % 2**32
