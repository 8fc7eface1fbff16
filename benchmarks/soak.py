"""A long run on a tiny model: what grows that should not?

    python benchmarks/soak.py [--steps 10000] [--every 20]

Trains a two-layer BERT through Lightning with a probe every 20 steps, and looks, every 500 steps,
at resident memory, Python objects, hooks, the optimizer's state, open files and what lies beside
the spectra file. Then it puts a gate on and off 1,000 times, and gives a compiled model 300
decisions. Exits with status 1 and names what grew, if anything did:

* resident memory by more than 2% after step 1,000, or any count at all from there on;
* a parameter or buffer that is not bit-equal after the gate's coming and going;
* a graph beyond the first two (one without a gate, one with it).

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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning as L
import torch
import torch._dynamo.testing
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import write_result
from examples.models.bert import Bert, preset
from lightning_mat import Gate, MATCallback, partition

WORDS, LENGTH, BATCH = 50, 8, 8
SETTLED = 1000
"""Steps after which nothing may grow any more."""
MEMORY = 0.02


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
    """

    def __init__(self, every: int, folder: Path) -> None:
        """Start without a look."""
        self.every, self.folder = every, folder
        self.looks: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Look."""
        if trainer.global_step % self.every == 0:
            self.looks.append({"step": trainer.global_step, **look(trainer, module, self.folder)})


def look(trainer: L.Trainer, module: nn.Module, folder: Path) -> dict[str, int]:
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
    beside = [p for p in folder.rglob("mat/**/*") if p.is_file() and p.name != "spectra.npz"]
    return {
        "resident_bytes": _resident(),
        "python_objects": len(gc.get_objects()),
        "hooks": hooks,
        "optimizer_tensors": sum(len(state) for state in optimizer.state.values()),
        "parameter_groups": len(optimizer.param_groups),
        "open_files": len(os.listdir("/proc/self/fd")),
        "bytes_beside_spectra": sum(p.stat().st_size for p in beside),
    }


def grown(looks: list[Mapping[str, int]], settled: int = SETTLED) -> list[str]:
    """Return what grew after ``settled`` steps, a sentence each.

    Resident memory and Python objects breathe: they may grow by :data:`MEMORY`, from the first of
    the later looks to the smallest of the last three. Counts may not grow at all.

    Example:
        >>> before = {"step": 1000, "resident_bytes": 100, "hooks": 3}
        >>> grown([before, {**before, "step": 1500, "resident_bytes": 101}])
        []
        >>> grown([before, {**before, "step": 1500, "hooks": 4}])
        ['hooks grew from 3 at step 1000 to 4']
    """
    later = [each for each in looks if each["step"] >= settled]
    if len(later) < 2:
        raise ValueError(f"need two looks from step {settled} on, got {len(later)}: run longer")
    found = []
    for name in later[0]:
        first, last = later[0][name], min(each[name] for each in later[1:][-3:])
        breathes = name in ("resident_bytes", "python_objects")
        if name != "step" and last > first * (1 + MEMORY if breathes else 1):
            found.append(f"{name} grew from {first} at step {later[0]['step']} to {last}")
    return found


def train(steps: int, every: int, look_every: int) -> dict[str, Any]:
    """Return the looks at one run, and how long it took."""
    L.seed_everything(0, verbose=False)
    words = torch.randint(WORDS, (16 * BATCH, LENGTH))
    loader = DataLoader(TensorDataset(words), BATCH, shuffle=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        watch = Watch(look_every, folder)
        mat = MATCallback(
            "heads+ffn",
            every_n_steps=every,
            warmup_epochs=0,
            n_samples=16,
            skip="units",
            keep_eigenvalues=False,
        )
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=CSVLogger(folder, name="log"),
            callbacks=[mat, watch],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        start = time.perf_counter()
        trainer.fit(Tiny(), loader)
        seconds = time.perf_counter() - start
        probes = mat.summary()["probes"]
    return {"looks": watch.looks, "probes": probes, "seconds": seconds}


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
    parser.add_argument("--quick", action="store_true", help="1,500 steps; writes nothing")
    args = parser.parse_args()
    if args.steps < 2 * SETTLED:
        parser.error(f"--steps must be ≥ {2 * SETTLED}, got {args.steps}")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning_mat")

    steps, turns = (1500, 50) if args.quick else (args.steps, 1000)
    run = train(steps, args.every, 250 if args.quick else 500)
    complaints = grown(run["looks"])
    complaints += [f"{name} changed under a gate" for name in come_and_go(turns)]
    made = graphs(turns // 3)
    if made > 2:
        complaints.append(f"a compiled model made {made} graphs")
    first, last = (next(x for x in run["looks"] if x["step"] >= SETTLED), run["looks"][-1])
    print(f"{steps} steps and {run['probes']} probes in {run['seconds']:.0f} s; {made} graphs")
    for name in first:
        print(f"{name:22} {first[name]:>12} {last[name]:>12}")
    for complaint in complaints:
        print(f"GREW: {complaint}")
    if not args.quick:
        settings = {**vars(args), "gates": turns, "decisions": turns // 3}
        write_result(
            "soak-cpu",
            {"settings": settings, **run, "graphs": made, "complaints": complaints},
        )
    return 1 if complaints else 0


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
