"""The suites by name."""

from __future__ import annotations

from types import ModuleType

from benchmarks.suites import (
    bert,
    finetune,
    optimizers,
    overhead,
    pareto,
    ranking,
    sizes,
    switch,
    vgg,
)

#: In the order in which ``all`` runs them: what the headline sentences need first.
SUITES: dict[str, ModuleType] = {
    "bert": bert,
    "vgg": vgg,
    "switch": switch,
    "pareto": pareto,
    "finetune": finetune,
    "ranking": ranking,
    "overhead": overhead,
    "optimizers": optimizers,
    "sizes": sizes,
}
