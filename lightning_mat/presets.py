"""Presets: the settings of the MAT paper's experiments.

Shi et al. (NeurIPS 2023) say in section 5.1 and appendix B.1:

- BERT: "randomly samples 64 data samples", "α = 0.1, β = 10⁻³", "starts from the 5th epoch and
  performs every 8 epochs". Read as: the first probe after five epochs.
- Switch-Transformer: 64 samples, "α_h = 0.1, β_h = 10⁻³ and α_e = 0.2, β_e = 10⁻³", "performs
  every 2 epochs after warming up". How long that is they do not say; the only warm-up they give is
  that of the learning rate, 12k steps, which is nearly 4 epochs of WikiText-103 (103 M words) in
  steps of 64 sequences of 512 tokens.
- VGG16: "random 64 data samples", "α = 0.2, β = 10⁻⁶". The calendar is not given; here an episode
  is an epoch, as it is for the random baseline there, and the first probe follows the first epoch.

In all of them the gradient is that of the sum of the logits (section 5), and "a protecting strategy
[...] maintains the gradient of at least one head or expert in each layer". What the backward pass
skips is not said outright: MAT "only back-propagates the parameters of those modules whose λ_max is
larger than the threshold", and appendix B.2 measures its "sparsity of weight gradients". That is
``skip="weights"``: gradients through resting units stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PAPER: Mapping[str, Mapping[str, Any]] = {
    "bert": {
        "units": "heads",
        "alpha": 0.1,
        "beta": 1e-3,
        "warmup_epochs": 5,
        "every_n_epochs": 8,
        "n_samples": 64,
        "output": "sum_logits",
        "skip": "weights",
        "protect": True,
    },
    "switch": {
        "units": "heads+experts",
        "alpha": {"head": 0.1, "expert": 0.2},
        "beta": {"head": 1e-3, "expert": 1e-3},
        "warmup_epochs": 4,
        "every_n_epochs": 2,
        "n_samples": 64,
        "output": "sum_logits",
        "skip": "weights",
        "protect": True,
    },
    "vgg": {
        "units": "filters",
        "alpha": 0.2,
        "beta": 1e-6,
        "warmup_epochs": 1,
        "every_n_epochs": 1,
        "n_samples": 64,
        "output": "sum_logits",
        "skip": "weights",
        "protect": True,
    },
}


def paper_settings(which: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a :class:`~lightning_mat.MATCallback` for one of the paper's models.

    Args:
        which: ``"bert"``, ``"switch"`` or ``"vgg"``.
        overrides: Arguments that replace the preset's. With ``policy``, the preset's thresholds and
            protection are left out; with ``every_n_steps``, or a policy that has a calendar of its
            own, its epochs per episode are.

    Raises:
        ValueError: If there is no such preset.

    Example:
        >>> paper_settings("vgg", {"n_samples": 32})["n_samples"]
        32
        >>> paper_settings("bert", {"every_n_steps": 500}).get("every_n_epochs")
    """
    if which not in PAPER:
        raise ValueError(f"the paper's presets are {', '.join(map(repr, PAPER))}, got {which!r}")
    settings = dict(PAPER[which])
    policy = overrides.get("policy")
    if policy is not None:
        for name in ("alpha", "beta", "protect"):
            del settings[name]
    own_steps = getattr(policy, "every_n_steps", None)
    if own_steps is not None or overrides.get("every_n_steps") is not None:
        del settings["every_n_epochs"]
    return {**settings, **overrides}
