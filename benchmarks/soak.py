"""A long run on a tiny model: what grows that should not?

    python benchmarks/soak.py [--steps 10000] [--every 20]

Trains a two-layer BERT through Lightning with a probe every 20 steps, after each of which another
half of the units rests, and looks, every 500 steps, at resident memory, Python objects, hooks,
gated modules, the optimizer's state, open files and the run's folder. Then it puts a gate on and
off 1,000 times, and gives a compiled model 333 decisions. Exits with status 1 and names what grew,
if anything did:

* resident memory or Python objects, at any look, by more than 2% over those of step 1,000;
* a count, at any look after that one, at all;
* what a probe adds to the spectra or to the log, by more than 2%;
* a parameter or buffer that is not bit-equal after the gate's coming and going;
* a graph beyond the first two (one without a gate, one with it).

It also does so if nothing rested at a look, or a probe was skipped: then nothing was shown.

Writes ``benchmarks/results/soak-<device>.json``.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning as L
import torch
import torch._dynamo.testing
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import write_result
from examples.models.bert import Bert, preset
from lightning_mat import Gate, MATCallback, partition, policies

WORDS, LENGTH, BATCH = 50, 8, 8
LOOK, TURNS, DECISIONS = 500, 1000, 333
SETTLED = 1000
"""Steps after which nothing may grow any more."""
BREATH = 0.02
BREATHES = ("resident_bytes", "python_objects", "spectra_bytes_per_probe", "log_bytes_per_probe")
"""What may grow by that share; all else may not grow."""


class Halves(policies.Random):
    """A random half of each layer's units rests, another one in each episode, after a probe.

    So as many layers are gated at every look.
    """

    needs_spectra: ClassVar[bool] = True


class Tiny(L.LightningModule):
    """BERT-tiny that predicts the words it reads."""

    def __init__(self) -> None:
        """Make the model."""
        super().__init__()
        self.bert = Bert(preset("tiny", vocab_size=WORDS, max_length=LENGTH, dropout=0.1))

    def forward(self, words: Tensor) -> Tensor:
        """Return logits, ``[S, T, V]``."""
        return self.bert(words)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[0].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Watch(L.Callback):
    """Looks at the process every so many steps.

    Args:
        every: Steps between two looks.
        folder: The run's folder.
        callback: Whose run it is.
    """

    def __init__(self, every: int, folder: Path, callback: MATCallback) -> None:
        """Start without a look."""
        self.every, self.folder, self.callback = every, folder, callback
        self.looks: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Look."""
        if trainer.global_step % self.every == 0:
            found = look(trainer, module, self.folder, self.callback)
            self.looks.append({"step": trainer.global_step, **found})


def look(
    trainer: L.Trainer, module: nn.Module, folder: Path, callback: MATCallback
) -> dict[str, int]:
    """Return how much there is of everything that could pile up."""
    gc.collect()
    hooks = sum(
        len(getattr(m, kind))
        for m in module.modules()
        for kind in vars(m)
        if kind.endswith("_hooks")
    )
    hooks += sum(
        len(getattr(p, kind) or ())
        for p in module.parameters()
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks")
    )
    optimizer = trainer.optimizers[0]
    mat = callback.mat
    assert mat is not None
    size = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    spectra = {path for path in size if path.name == "spectra.npz"}
    spectra |= {path for path in size if path.parent.name == "spectra.eigenvalues"}
    log = {path for path in size if path.name == "metrics.csv"}
    return {
        "resident_bytes": _resident(),
        "python_objects": len(gc.get_objects()),
        "hooks": hooks,
        "gated_modules": sum("forward" in vars(m) for m in module.modules()),
        "units_at_rest": int((~mat.active).sum()),
        "optimizer_tensors": sum(len(state) for state in optimizer.state.values()),
        "parameter_groups": len(optimizer.param_groups),
        "open_files": len(os.listdir("/proc/self/fd")),
        "spectra_bytes_per_probe": sum(size[path] for path in spectra) // mat.probes,
        "log_bytes_per_probe": sum(size[path] for path in log) // mat.probes,
        "other_bytes": sum(size[path] for path in size.keys() - spectra - log),
    }


def grown(looks: list[Mapping[str, int]], settled: int = SETTLED) -> list[str]:
    """Return what grew after ``settled`` steps, a sentence each.

    The first look from there on is compared with the greatest of all later ones. What
    :data:`BREATHES` names may be larger by :data:`BREATH`, counts may not be larger at all.

    Raises:
        ValueError: If there are fewer than two looks from there on.

    Example:
        >>> before = {"step": 1000, "resident_bytes": 100, "hooks": 3}
        >>> grown([before, {**before, "step": 1500, "resident_bytes": 101}])
        []
        >>> grown([before, {**before, "step": 1500, "hooks": 4}, {**before, "step": 2000}])
        ['hooks grew from 3 at step 1000 to 4 at step 1500']
    """
    later = [each for each in looks if each["step"] >= settled]
    if len(later) < 2:
        raise ValueError(f"need two looks from step {settled} on, got {len(later)}: run longer")
    first, found = later[0], []
    for name in first.keys() - {"step"}:
        most = max(later[1:], key=lambda each: each[name])
        if most[name] > first[name] * (1 + BREATH * (name in BREATHES)):
            found.append(
                f"{name} grew from {first[name]} at step {first['step']} to {most[name]} at step "
                f"{most['step']}"
            )
    return sorted(found)


def unshown(run: Mapping[str, Any]) -> list[str]:
    """Return why a run shows nothing, if so: units must rest at every look, and probes succeed."""
    idle = [
        f"{name} is 0 at step {each['step']}: nothing that could pile up was in use"
        for each in run["looks"]
        for name in ("gated_modules", "units_at_rest")
        if not each[name]
    ]
    return idle + ([f"{run['skipped']} probes were skipped"] if run["skipped"] else [])


def train(steps: int, every: int, look_every: int, *others: L.Callback) -> dict[str, Any]:
    """Return the looks at one run, and what it was.

    Args:
        steps: Of the optimizer.
        every: Steps between two probes.
        look_every: Steps between two looks.
        others: Callbacks that run beside.
    """
    L.seed_everything(0, verbose=False)
    words = torch.randint(WORDS, (16 * BATCH, LENGTH))
    loader = DataLoader(TensorDataset(words), BATCH, shuffle=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mat = MATCallback(
            "heads+ffn",
            policy=Halves(),
            every_n_steps=every,
            warmup_epochs=0,
            n_samples=16,
            skip="units",
        )
        watch = Watch(look_every, folder, mat)
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=CSVLogger(folder, name="log", flush_logs_every_n_steps=1),
            callbacks=[mat, *others, watch],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        start = time.perf_counter()
        trainer.fit(Tiny(), loader)
        seconds = time.perf_counter() - start
        summary = mat.summary()
    return {
        "looks": watch.looks,
        "probes": summary["probes"],
        "skipped": summary["skipped_probes"],
        "trained_share": summary["trained_share"],
        "seconds": seconds,
    }


def come_and_go(times: int) -> list[str]:
    """Put a gate on and off so often; return the names of what is not bit-equal afterwards."""
    torch.manual_seed(0)
    model = Tiny()
    part = partition(model, "heads+ffn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    draws = torch.rand(times, len(part)) < 0.5
    for active in draws:
        gate = Gate(model, part, skip="units")
        gate.apply(active)
        gate.remove()
    same = {name: torch.equal(value, before[name]) for name, value in model.state_dict().items()}
    return [name for name, equal in same.items() if not equal]


def graphs(decisions: int) -> int:
    """Return how many graphs a compiled model has made after so many decisions."""
    torch.manual_seed(0)
    model = Tiny()
    part = partition(model, "heads+ffn")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    words = torch.randint(WORDS, (BATCH, LENGTH))
    compiled(words).sum().backward()
    with Gate(model, part, skip="units") as gate:
        for active in torch.rand(decisions, len(part)) < 0.5:
            gate.apply(active)
            compiled(words).sum().backward()
    return int(counter.frame_count)


def main() -> int:
    """Run everything, write the result; return 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=20, help="steps between two probes")
    args = parser.parse_args()
    if args.steps < 2 * SETTLED:
        parser.error(f"--steps must be ≥ {2 * SETTLED}, got {args.steps}")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning_mat")

    run = train(args.steps, args.every, LOOK)
    complaints = grown(run["looks"]) + unshown(run)
    complaints += [f"{name} changed under a gate" for name in come_and_go(TURNS)]
    made = graphs(DECISIONS)
    if made > 2:
        complaints.append(f"a compiled model made {made} graphs")
    settings = {**vars(args), "settled": SETTLED, "gates": TURNS, "decisions": DECISIONS}
    result = {"settings": settings, **run, "graphs": made, "complaints": complaints}
    print(said(result))
    for complaint in complaints:
        print(f"NOT FLAT: {complaint}")
    write_result("soak-cpu", result)
    return 1 if complaints else 0


def said(result: Mapping[str, Any]) -> str:
    """Return what a result says, as docs/reliability.md has it."""
    settings = result["settings"]
    later = [each for each in result["looks"] if each["step"] >= settings["settled"]]
    lines = [
        f"- {name.replace('_', ' ')}: {later[0][name]:,}, later at most "
        f"{max(each[name] for each in later[1:]):,}"
        for name in later[0]
        if name != "step"
    ]
    steps, probes = settings["steps"], result["probes"]
    return (
        f"{steps:,} steps, {probes:,} probes, {len(result['looks'])} looks; of the units "
        f"{result['trained_share']:.0%} trained. A gate that came and went {settings['gates']:,} "
        f"times left every parameter and buffer bit-equal, and a compiled model made "
        f"{result['graphs']} graphs in {settings['decisions']} decisions. At step "
        f"{later[0]['step']:,}, and at any look after it:\n\n" + "\n".join(lines)
    )


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
