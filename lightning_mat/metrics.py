"""What an episode's beginning and a whole run look like in numbers."""

from __future__ import annotations

import torch

from lightning_mat.engine import MAT
from lightning_mat.ledger import Ledger


def episode_metrics(mat: MAT, seconds: float) -> dict[str, float]:
    """Return what is logged at the beginning of an episode.

    Args:
        mat: The engine, after its decision.
        seconds: What the probe took.

    Returns:
        ``trained_share`` and ``probe_seconds``; per kind ``<kind>/trained`` and ``<kind>/units``
        (how many), ``<kind>/lambda_max_q0`` to ``q100`` (quartiles of λ_max) where there is a
        probe, and ``<kind>/threshold`` where the policy has one.
    """
    metrics = {"trained_share": float(mat.active.double().mean()), "probe_seconds": seconds}
    for kind, (trained, total) in mat.decision.by_kind().items():
        metrics[f"{kind}/trained"] = trained
        metrics[f"{kind}/units"] = total
        if mat.spectra is not None:
            chosen = torch.tensor([k == kind for k in mat.part.kinds])
            values = mat.spectra.lambda_max[chosen]
            for percent in (0, 25, 50, 75, 100):
                quantile = torch.nanquantile(values, percent / 100)
                metrics[f"{kind}/lambda_max_q{percent}"] = float(quantile)
    for kind, threshold in mat.decision.thresholds.items():
        metrics[f"{kind}/threshold"] = threshold
    return metrics


def run_summary(mat: MAT, ledger: Ledger) -> dict[str, float | int]:
    """Return what a run has cost so far; see :meth:`lightning_mat.MATCallback.summary`."""
    return {
        "flops": ledger.flops + mat.probe_flops,
        "probe_flops": mat.probe_flops,
        "probe_seconds": mat.probe_seconds,
        "seconds": ledger.seconds + mat.probe_seconds,
        "trained_share": ledger.trained_share,
        "full_step_flops": int(mat.full_cost),
        "probes": mat.probes,
        "skipped_probes": mat.skipped,
    }
