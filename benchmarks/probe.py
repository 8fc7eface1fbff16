"""What a probe costs: against one forward and backward pass, and against the usual ways.

    python benchmarks/probe.py [--preset mini] [--samples 64] [--length 128] [--rounds 9]

Four things over the same samples of random words, timed in turn (medians of interleaved rounds):

* ``step``: one forward and backward pass in training mode, all weight gradients, with the loss;
* ``probe``: :func:`lightning_mat.mntk` of all heads and FFN blocks, eigenvalues included;
* ``vmap``: ``vmap(grad)`` in chunks, then the same Grams and eigenvalues;
* ``loop``: one backward pass per sample, then the same Grams and eigenvalues.

All four compute logits at all positions (``--positions all``, the plain call of a BERT) or at the
masked ones only (``--positions masked``, as the example trains). The probe never builds them: for
a sum of logits it needs one row of the last layer. The kernels are compared before anything is
timed. Writes ``benchmarks/results/probe-<preset>-<positions>-<device>.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import interleaved, peak_memory, ratio, summary, write_result
from examples.models.bert import Bert, preset
from lightning_mat import flops
from lightning_mat.mntk import Probe
from lightning_mat.units import Partition, partition


def make_batch(
    samples: int, length: int, vocabulary: int, device: str, share: float = 0.15
) -> dict[str, Tensor]:
    """Return random words, and the positions at which logits are wanted, a share of all."""
    masked = max(1, round(share * length))
    positions = torch.stack([torch.randperm(length)[:masked].sort()[0] for _ in range(samples)])
    return {
        "input_ids": torch.randint(0, vocabulary, (samples, length)).to(device),
        "masked_positions": positions.to(device),
        "labels": torch.randint(0, vocabulary, (samples, masked)).to(device),
    }


def training_step(model: Bert, batch: dict[str, Tensor]) -> None:
    """Run one forward and backward pass, as training does."""
    model.train()
    model.zero_grad(set_to_none=True)
    logits = model(batch["input_ids"], batch["masked_positions"])
    F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()


def grams_of(part: Partition, name: str, jacobian: Tensor, grams: Tensor) -> None:
    """Add a parameter's per-sample gradients, [S, *shape], to the Grams of its owners."""
    matrix = jacobian.flatten(2) if jacobian.dim() > 2 else jacobian.unsqueeze(-1)
    for unit, r in part.owners[name]:
        v = matrix[:, r.r0 : r.r1, r.c0 : r.c1].reshape(len(matrix), -1)
        grams[unit].addmm_(v, v.T)


def scalar(model: Bert, parameters: dict[str, Tensor], words: Tensor, masked: Tensor) -> Tensor:
    """Return one sample's sum of logits."""
    inputs = (words.unsqueeze(0), masked.unsqueeze(0))
    return functional_call(model, parameters, inputs).sum()


def by_vmap(model: Bert, part: Partition, batch: dict[str, Tensor], chunk: int) -> Tensor:
    """Return eigenvalues by ``vmap(grad)`` over all samples, ``chunk`` at a time."""
    model.eval()
    samples = len(batch["input_ids"])
    parameters = {n: p.detach() for n, p in model.named_parameters() if n in part.owners}
    gradient = grad(lambda p, w, m: scalar(model, p, w, m))
    per_sample = vmap(gradient, in_dims=(None, 0, 0), chunk_size=chunk, randomness="same")
    jacobians = per_sample(parameters, batch["input_ids"], batch["masked_positions"])
    grams = torch.zeros(len(part), samples, samples, device=batch["input_ids"].device)
    for name in list(jacobians):
        grams_of(part, name, jacobians.pop(name), grams)
    return torch.linalg.eigvalsh(grams.double())


def by_loop(model: Bert, part: Partition, batch: dict[str, Tensor]) -> Tensor:
    """Return eigenvalues by one backward pass per sample."""
    model.eval()
    samples = len(batch["input_ids"])
    owned = {n: p for n, p in model.named_parameters() if n in part.owners}
    jacobians = {n: torch.empty(samples, *p.shape, device=p.device) for n, p in owned.items()}
    for s in range(samples):
        one = {key: value[s : s + 1] for key, value in batch.items()}
        total = model(one["input_ids"], one["masked_positions"]).sum()
        for name, g in zip(owned, torch.autograd.grad(total, list(owned.values())), strict=True):
            jacobians[name][s] = g
    grams = torch.zeros(len(part), samples, samples, device=batch["input_ids"].device)
    for name in list(jacobians):
        grams_of(part, name, jacobians.pop(name), grams)
    return torch.linalg.eigvalsh(grams.double())


def main() -> None:
    """Compare, time, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=30_522)
    parser.add_argument("--units", default="heads+ffn")
    parser.add_argument("--positions", choices=("all", "masked"), default="all")
    parser.add_argument("--chunk", type=int, default=16, help="samples at a time for vmap(grad)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    size = preset(args.preset, vocab_size=args.vocabulary, max_length=args.length, dropout=0.1)
    model = Bert(size).to(args.device)
    part = partition(model, args.units)
    share = 1.0 if args.positions == "all" else 0.15
    batch = make_batch(args.samples, args.length, args.vocabulary, args.device, share)
    inputs = {key: batch[key] for key in ("input_ids", "masked_positions")}
    probe = Probe(model, part)

    ways: dict[str, Callable[[], object]] = {
        "step": lambda: training_step(model, batch),
        "probe": lambda: probe.measure(inputs),
        "vmap": lambda: by_vmap(model, part, batch, args.chunk),
        "loop": lambda: by_loop(model, part, batch),
    }
    found = probe.measure(inputs).lambda_max
    errors = {}
    for name, other in (
        ("vmap", by_vmap(model, part, batch, args.chunk)),
        ("loop", by_loop(model, part, batch)),
    ):
        errors[name] = float(((other[:, -1].cpu() - found) / found).abs().max())
        if errors[name] > 1e-3:
            raise SystemExit(f"probe and {name} differ by {errors[name]:.1e} in λ_max: not timed")

    counted = {}
    for name in ("step", "probe"):
        with flops.count() as counter:
            ways[name]()
        counted[name] = counter.total
    model.zero_grad(set_to_none=True)
    memory = {name: peak_memory(way, args.device) for name, way in ways.items()}
    seconds = interleaved(ways, rounds=args.rounds, device=args.device)
    ratios = {name: ratio(seconds, name, "probe") for name in ways}
    device = args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    write_result(
        f"probe-{args.preset}-{args.positions}-{device.replace(' ', '-')}",
        {
            "settings": vars(args) | {"unit_count": len(part)},
            "seconds": summary(seconds),
            "times_probe": ratios,
            "probe_over_step": ratio(seconds, "probe", "step"),
            "flops": counted,
            "peak_bytes": memory,
            "largest_relative_difference_of_lambda_max": errors,
        },
        device=args.device,
    )
    print(
        f"BERT-{args.preset}, S = {args.samples}, T = {args.length}, {len(part)} units, "
        f"logits at {args.positions} positions"
    )
    print(f"{'':8}{'seconds':>10}{'÷ step':>10}{'÷ probe':>10}{'peak MB':>10}{'GFLOP':>10}")
    for name in ways:
        row = summary(seconds)[name]["median_seconds"]
        peak = f"{memory[name] / 1e6:.0f}" if memory[name] is not None else "?"
        gflop = f"{counted[name] / 1e9:.1f}" if name in counted else ""
        over = ratio(seconds, name, "step")
        print(f"{name:8}{row:10.3f}{over:10.2f}{ratios[name]:10.2f}{peak:>10}{gflop:>10}")


if __name__ == "__main__":
    main()
