"""What each suite trains at each scale: one table of sizes.

``cpu`` is sized for two cores and one to two minutes per run, ``gpu`` for one modern GPU and
minutes per run; ``paper`` has the settings of the MAT paper (appendix B.1); ``test`` takes seconds
and is what the project's tests run. ``python -m benchmarks calibrate`` measures what a step costs,
``python -m benchmarks list`` multiplies it out.

Batches of text have ``length · batch_size`` word pieces, 15% of them masked. At ``cpu`` the text
models start from a pretrained encoder's lowest layers, see :mod:`benchmarks.suites.pretrained`, and
after a head start, see :mod:`benchmarks.suites.start`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.suites.spec import Task

SCALES = ("cpu", "gpu", "paper", "test")

#: Samples of the probes of the suite ``ranking``, beside those of the task's own probes.
PROBED = {"cpu": (16, 64, 256), "gpu": (16, 64, 256), "paper": (16, 64, 256), "test": (4, 8)}


def _text(length: int, pieces: int | None, **sizes: Any) -> dict[str, Any]:
    return {"corpus": "wikitext-2", "pieces": pieces, "length": length, **sizes}


def _bert(size: str, length: int, **more: Any) -> dict[str, Any]:
    return {"size": size, "max_length": length, "dropout": 0.0, "optimizer": "adamw", **more}


def _pretrained(layers: int) -> dict[str, Any]:
    return {
        **{"pretrained": layers, "max_length": 64, "dropout": 0.0},
        **{"optimizer": "adamw", "lr": 5e-4},
    }


# ---- cpu -------------------------------------------------------------------------------------

_CPU_TEXT = _text(64, None, valid_size=128, test_size=384)
_CPU_BERT = Task(
    name="minilm-4",
    model="bert",
    size=_pretrained(4),
    data=_CPU_TEXT,
    steps=200,
    batch_size=8,
    units="heads+ffn",
    first=20,
    every=60,
    n_samples=6,
    points=8,
    head_start=300,
)
_CPU_SWITCH = Task(
    name="minilm-2",
    model="switch",
    size=_pretrained(2),
    data=_CPU_TEXT,
    steps=200,
    batch_size=8,
    units="heads+experts",
    first=20,
    every=90,
    n_samples=6,
    points=8,
    head_start=300,
)
_CPU_VGG = Task(
    name="width-16",
    model="vgg",
    size={"width": 16, "lr": 0.05},
    data={"train_size": 2048, "valid_size": 1000, "test_size": 2000},
    steps=768,  # 24 epochs
    batch_size=64,
    units="filters",
    first=128,
    every=160,
    n_samples=16,
)
_CPU_REVIEWS = Task(
    name="minilm-6",
    model="sentiment",
    size={"lr": 5e-5},
    data={"seq_len": 64, "train_size": 4000, "valid_size": 320, "test_size": 640},
    steps=128,
    batch_size=16,
    units="heads+ffn",
    first=16,
    every=56,
    n_samples=6,
    points=6,
)

# ---- gpu: bf16, as one trains there ------------------------------------------------------------

_GPU_TEXT = _text(128, None, valid_size=512)
_GPU_BERT = Task(
    name="small",
    model="bert",
    size=_bert("small", 128, lr=5e-4),
    data=_GPU_TEXT,
    steps=6000,
    batch_size=64,
    units="heads+ffn",
    first=600,
    every=900,
    n_samples=64,
    precision="bf16-mixed",
)
_GPU_SWITCH = Task(
    name="mini",
    model="switch",
    size=_bert("mini", 128, lr=5e-4),
    data=_GPU_TEXT,
    steps=4000,
    batch_size=64,
    units="heads+experts",
    first=400,
    every=600,
    n_samples=64,
    precision="bf16-mixed",
)
_GPU_VGG = Task(
    name="width-64",
    model="vgg",
    size={"width": 64, "lr": 0.1},
    data={"augment": True, "valid_size": 5000},
    steps=14040,  # 40 epochs of 351 batches
    batch_size=128,
    units="filters",
    first=1404,
    every=2106,
    n_samples=64,
    points=20,
    precision="bf16-mixed",
)
_GPU_REVIEWS = Task(
    name="minilm-6",
    model="sentiment",
    size={"lr": 5e-5},
    data={"seq_len": 256},
    steps=2100,
    batch_size=32,
    units="heads+ffn",
    first=105,
    every=399,
    n_samples=64,
    precision="bf16-mixed",
)

# ---- paper: appendix B.1; 8 GPUs of 8 sequences each are 64 per step ---------------------------

_PAPER_BERT = Task(
    name="base",
    model="bert",
    size={"size": "base", "max_length": 512, "dropout": 0.1, "optimizer": "adam"},
    data=_text(512, None),
    steps=12_000,
    batch_size=64,
    units="heads",
    calendar="epochs",
    first=5,
    every=8,
    n_samples=64,
    points=40,
)
_PAPER_SWITCH = Task(
    name="paper",
    model="switch",
    size={"size": "paper", "max_length": 512, "dropout": 0.1, "optimizer": "adamw-cosine"},
    data={**_text(512, None), "corpus": "wikitext-103"},
    steps=300_000,
    batch_size=64,
    units="heads+experts",
    calendar="epochs",
    first=4,
    every=2,
    n_samples=64,
    points=60,
)
_PAPER_VGG = Task(
    name="width-64",
    model="vgg",
    size={"width": 64, "lr": 0.1},
    data={"augment": True, "valid_size": 5000},
    steps=70_200,  # 200 epochs of 351 batches
    batch_size=128,
    units="filters",
    calendar="epochs",
    first=1,
    every=1,
    n_samples=64,
    points=100,
)

# ---- test: seconds -----------------------------------------------------------------------------

_TEST_BERT = Task(
    name="tiny",
    model="bert",
    size=_bert("tiny", 16),
    data={
        **{"corpus": "embedded", "pieces": 300, "length": 16},
        **{"train_size": 40, "valid_size": 8, "test_size": 8},
    },
    steps=6,
    batch_size=4,
    units="heads+ffn",
    first=2,
    every=2,
    n_samples=4,
    points=2,
)


def _sizes(like: Task, steps: dict[str, int], probes: int) -> list[Task]:
    """Return shorter runs of several sizes of BERT, with so many probes."""
    found = []
    for name, count in steps.items():
        size = {**like.size, "size": name}
        first, every = max(1, count // 8), -(-count * 7 // (8 * probes))
        changes = {"size": size, "steps": count, "first": first, "every": every, "points": 4}
        found.append(replace(like, name=name, **changes))
    return found


def _both_optimizers(like: Task) -> list[Task]:
    adam = {**like.size, "optimizer": "adam", "lr": None}
    return [replace(like, name="adam-0-0", size=adam), replace(like, name="adamw")]


def _short(like: Task, steps: int) -> Task:
    """Return a run of so many steps, for what is timed and not learned."""
    return replace(like, name=like.name, steps=steps, first=steps // 2, every=steps, points=1)


#: Tasks of each suite at each scale; a suite that is missing has no runs there.
TASKS: dict[str, dict[str, list[Task]]] = {
    "cpu": {
        # Three probes, so that equation 6 acts, below 1.5% of the seconds.
        "bert": [replace(_CPU_BERT, steps=240, first=24, every=72)],
        "switch": [_CPU_SWITCH],
        "vgg": [_CPU_VGG],
        # Long enough that two probes and the first look stay below 1.5% at a quarter, too.
        "pareto": [replace(_CPU_BERT, first=10, every=95, points=4)],
        "finetune": [_CPU_REVIEWS],
        "optimizers": _both_optimizers(_CPU_BERT),
        # From random weights: what is saved is measured here, not what is learned.
        "sizes": _sizes(
            replace(_CPU_BERT, name="", size=_bert("mini", 64), head_start=0),
            {"mini": 150, "small": 120, "medium": 150},
            probes=1,
        ),
        "overhead": [_short(_CPU_BERT, 30), _short(_CPU_VGG, 30)],
        # The stability needs three points of training, not its end.
        "ranking": [
            replace(_CPU_BERT, steps=120, points=2),
            replace(_CPU_SWITCH, steps=120, points=2),
            replace(_CPU_VGG, steps=384, points=2),
            replace(_CPU_REVIEWS, steps=60, points=2),
        ],
    },
    "gpu": {
        "bert": [_GPU_BERT],
        "switch": [_GPU_SWITCH],
        "vgg": [_GPU_VGG],
        "pareto": [_GPU_BERT],
        "finetune": [_GPU_REVIEWS],
        "optimizers": _both_optimizers(_GPU_BERT),
        "sizes": _sizes(_GPU_BERT, {"mini": 2000, "small": 2000, "medium": 1000, "base": 600}, 4),
        "overhead": [_short(_GPU_BERT, 100), _short(_GPU_VGG, 100)],
        "ranking": [_GPU_BERT, _GPU_SWITCH, _GPU_VGG, _GPU_REVIEWS],
    },
    "paper": {
        "bert": [_PAPER_BERT],
        "switch": [_PAPER_SWITCH],
        "vgg": [_PAPER_VGG],
        "sizes": [
            replace(_PAPER_BERT, name=name, size={**_PAPER_BERT.size, "size": name})
            for name in ("mini", "small", "medium", "base", "large")
        ],
    },
    "test": {
        "bert": [_TEST_BERT],
        "pareto": [_TEST_BERT],
        "optimizers": _both_optimizers(_TEST_BERT),
        "sizes": [_TEST_BERT],
        "overhead": [_short(_TEST_BERT, 12)],
        "ranking": [_TEST_BERT],
    },
}


def tasks(scale: str, suite: str) -> list[Task]:
    """Return what a suite trains at a scale; nothing if it has no runs there.

    Raises:
        ValueError: If the scale is unknown.
    """
    if scale not in TASKS:
        raise ValueError(f"unknown scale {scale!r}: choose one of {', '.join(SCALES)}")
    return TASKS[scale].get(suite, [])
