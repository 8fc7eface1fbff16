"""The command line of the main job."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.data.corpus import HUB
from examples.models.bert import PRESETS
from examples.models.mlm import OPTIMIZERS

METHODS = ("full", "mat", "random")

#: What `--demo` sets, unless the command line says otherwise.
DEMO: dict[str, Any] = {
    "preset": "tiny",
    "method": ["full", "mat"],
    "max_steps": 400,
    "seq_len": 64,
    "vocab_size": 4096,
    "dropout": 0.0,
    "optimizer": "adamw",
    "lr": 1e-3,
    "alpha": "auto",
    "warmup_epochs": 0,  # an epoch is nearly half of this run
    "every_n_steps": 50,
    "n_samples": 32,
    "out": Path("runs/demo"),
    "overwrite": True,
}

#: Settings that a resumed run may change, and paths of data, which are this machine's own.
_FREE = (
    "data",
    "vocab",
    "method",
    "out",
    "resume",
    "overwrite",
    "demo",
    "accelerator",
    "num_workers",
)


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser, for its ``error``, and the options; ``--demo`` changes their defaults."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
    return parser, args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that decide the result, as JSON values."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in _FREE}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train BERT by masked language modelling, plain and with MAT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="tiny, full and mat, embedded corpus: minutes on a CPU")
    add("--preset", choices=PRESETS, default="mini", help="size of the model")
    add("--method", choices=METHODS, nargs="+", default=["full", "mat"], help="one or several")
    add("--out", type=Path, help="folder for results (default: runs/bert-PRESET-CORPUS)")
    add("--resume", action="store_true", help="go on from the last checkpoints in --out")
    add("--overwrite", action="store_true", help="delete an earlier run in --out first")
    add("--seed", type=int, default=0, help="of weights, order, masks, dropout and probes")

    data = parser.add_argument_group("data (default: an embedded corpus)")
    source = data.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=Path, metavar="DIR", help="holds WikiText-2's files, or a folder wikitext-2"
    )
    source.add_argument("--hub", nargs="?", const="wikitext-2", choices=HUB, help="download")
    add = data.add_argument
    add("--tokens", choices=("words", "pieces"), default="words", help="whole words, word pieces")
    add(
        "--vocab",
        type=Path,
        metavar="FILE",
        help="word pieces of this vocab.txt (default: one in "
        "or beside DIR, else trained on the training split)",
    )
    add(
        "--vocab-size",
        type=int,
        help="words to keep (default: all; embedded corpus, and pieces that are trained: 8192)",
    )
    add("--seq-len", type=int, default=128, help="words in a sample")
    add("--num-workers", type=int, default=0, help="processes that prepare batches")

    add = parser.add_argument_group("training").add_argument
    add("--max-steps", type=int, default=12_000, help="optimizer steps")
    add("--batch-size", type=int, default=32, help="samples in a batch")
    add("--dropout", type=float, default=0.1, help="probability")
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="adam is the paper's: β = (0, 0)")
    add("--lr", type=float, help=f"peak learning rate (default: {OPTIMIZERS})")
    add("--accelerator", default="auto", help="auto, cpu, gpu, …")
    add("--precision", default="32-true", help="32-true, bf16-mixed, …")
    add("--checkpoint-every", type=int, default=200, metavar="STEPS", help="for --resume")

    add = parser.add_argument_group("MAT").add_argument
    add("--units", default="heads+ffn", help="what can rest: heads, ffn, layers, heads+ffn, …")
    add("--alpha", type=_threshold, default=0.1, help="number, auto, or head=0.1,ffn=0.2")
    add("--beta", type=_threshold, default=1e-3, help="number, or head=1e-3,ffn=1e-4")
    add("--output", default="sum_logits", choices=("sum_logits", "random", "loss"), help="probed")
    add("--warmup-epochs", type=int, default=1, help="epochs before the first probe")
    add("--every-n-epochs", type=int, default=1, help="epochs between probes")
    add("--every-n-steps", type=int, help="steps between probes, instead of epochs")
    add("--n-samples", type=int, default=64, help="samples of a probe, S")
    return parser


def _threshold(text: str) -> float | str | dict[str, float]:
    """Read ``0.1``, ``auto`` or ``head=0.1,ffn=0.2``."""
    if text == "auto":
        return text
    try:
        if "=" in text:
            pairs = (pair.split("=") for pair in text.split(","))
            return {kind.strip(): float(value) for kind, value in pairs}
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number, nor auto, nor kind=number,kind=number"
        ) from None
