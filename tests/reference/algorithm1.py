"""Algorithm 1 of the MAT paper, line by line, in exact rational arithmetic.

Shi et al., "Train Faster, Perform Better: Modular Adaptive Training in Over-Parameterized Models"
(NeurIPS 2023). Line numbers are the paper's. Written from the paper alone, for one kind of module
at a time (the paper's experiments give each kind its own α and β), with lists in place of tensors
and fractions in place of floating point, so that it has nothing in common with what it checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

Spectrum = Sequence[Fraction]  # the eigenvalues of one mNTK, in any order


def algorithm1(
    probes: Sequence[Sequence[Spectrum]], alpha: Fraction, beta: Fraction
) -> Iterator[set[int]]:
    """Yield the information set I of each episode t = 0, 1, ... as indices of modules.

    Args:
        probes: For each episode, the spectrum of each module's mNTK.
        alpha: Modular threshold.
        beta: Temporal threshold.
    """
    modules = set(range(len(probes[0])))
    variation: list[list[Fraction]] = []  # Δ_t^l
    for t, spectra in enumerate(probes):
        variation.append([])
        everything: set[Fraction] = set()  # Λ̃, line 4
        for module in sorted(modules):  # line 5
            principal = max(spectra[module])  # line 7
            initial = max(probes[0][module])
            variation[t].append(abs(principal - initial))  # line 8
            everything |= set(spectra[module])  # line 9
        low, high = min(everything), max(everything)
        threshold = low + (high - low) * alpha  # line 11
        nuisance = {m for m in modules if max(spectra[m]) < threshold}  # line 12
        if t >= 1:  # Δ_{t-1} exists
            nuisance |= {  # line 13; a ratio over Δ_1 = 0 is no number below β
                m
                for m in modules
                if variation[1][m] != 0
                and abs(variation[t][m] - variation[t - 1][m]) / variation[1][m] < beta
            }
        yield modules - nuisance  # line 14
