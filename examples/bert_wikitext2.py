"""Train BERT by masked language modelling, plain and with MAT, and compare what it took.

    python examples/bert_wikitext2.py --demo
    python examples/bert_wikitext2.py --preset mini --data DIR --method full mat --max-steps 1000

Every method starts from the same weights and sees the same words, order and masks. The run ends
with one row per method, and writes the rows with their settings and environment to
``OUT/result.json``, the probes of MAT to ``OUT/mat/…/mat/spectra.npz`` and a picture of them to
``OUT/lambda_max.png``. A run that was stopped goes on with ``--resume``. The defaults are the MAT
paper's settings (appendix B, table 4) at a sequence length that suits one device.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from anywhere

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from examples.data.corpus import Corpus, read_directory, read_hub
from examples.data.embedded import embedded_corpus
from examples.data.locate import find_vocabulary, locate
from examples.data.masking import MaskedText
from examples.data.vocabulary import Vocabulary
from examples.data.wordpiece import WordPieces, read_pieces
from examples.models.mlm import BertMLM
from examples.options import METHODS, parse, settings
from examples.record import Clock, FullStepCost, Row, table
from lightning_mat import MATCallback, policies
from lightning_mat.report.environment import environment


def main(argv: Sequence[str] | None = None) -> int:
    """Run the methods that the command line names, one after the other; return 0.

    Args:
        argv: Command line; the process's own by default.

    Raises:
        SystemExit: With status 2 and a message if the command line or the data is unusable.
    """
    parser, args = parse(argv)
    try:
        text = _read(args)
        for method in args.method:
            _method_callback(method, args)  # a bad α is told now, not after hours of `full`
        out = _prepare(args, text)
    except (FileNotFoundError, FileExistsError, ModuleNotFoundError, ValueError) as error:
        parser.error(str(error))
    _quiet()
    print("text:", ", ".join(f"{name} {value}" for name, value in text.describe().items()))
    rows = []
    for method in args.method:
        print(f"\n== {method}: {_explain(method, args)}", flush=True)
        done = _finished(out / method) if args.resume else None
        rows.append(done or _train(method, args, text, out / method))
    _report(rows, args, text, out)
    return 0


def _read(args: argparse.Namespace) -> MaskedText:
    """Read the corpus that the command line names and cut it into blocks."""
    for name in ("max_steps", "batch_size", "seq_len", "checkpoint_every"):
        if getattr(args, name) < 1:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} must be ≥ 1, got {getattr(args, name)}")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed must be in [0, 2³¹), got {args.seed}")
    if not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout must be in [0, 1), got {args.dropout}")
    corpus: Corpus
    size = args.vocab_size
    if args.data is not None:
        corpus = read_directory(locate(args.data, "wikitext-2"))
    elif args.hub is not None:
        corpus = read_hub(args.hub)
    else:
        corpus, size = embedded_corpus(), size or (None if args.vocab else 8192)
    vocabulary: Vocabulary | WordPieces
    if args.tokens == "pieces" or args.vocab is not None:
        # A file that merely lies there gives way to a size that was asked for.
        nearby = find_vocabulary(args.data) if args.data is not None and size is None else None
        vocabulary = read_pieces(args.vocab or nearby, corpus.train, size)
    else:
        vocabulary = Vocabulary.build(corpus.train, size)
    return MaskedText(
        corpus,
        args.seq_len,
        args.batch_size,
        vocabulary=vocabulary,
        seed=args.seed,
        num_workers=args.num_workers,
    )


def _prepare(args: argparse.Namespace, text: MaskedText) -> Path:
    """Return the output folder: new, emptied or to be resumed, never another run's by accident."""
    out: Path = args.out or Path("runs", f"bert-{args.preset}-{text.source}")
    record = out / "settings.json"
    now = {**settings(args), "corpus": text.describe()}
    if record.is_file() and args.resume:
        before = json.loads(record.read_text())
        changed = [
            f"{name}: {before.get(name)} → {now.get(name)}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"the run in {out} has other settings ({'; '.join(changed)}): "
                "resume with its own, or choose another --out"
            )
    elif record.is_file() and args.overwrite:
        for method in METHODS:
            shutil.rmtree(out / method, ignore_errors=True)
        for stale in ("result.json", "lambda_max.png"):
            (out / stale).unlink(missing_ok=True)
    elif record.is_file():
        raise FileExistsError(
            f"{out} holds a run already: --resume goes on with it, --overwrite deletes it, "
            "--out chooses another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(now, indent=2) + "\n")
    return out


def _method_callback(method: str, args: argparse.Namespace) -> MATCallback | FullStepCost:
    """Return what makes the method differ from plain training."""
    if method == "full":
        return FullStepCost()
    return MATCallback(
        units=args.units,
        policy=policies.Random(0.5, seed=args.seed)
        if method == "random"
        else policies.MAT(args.alpha, args.beta),
        every_n_epochs=args.every_n_epochs,
        every_n_steps=args.every_n_steps,
        warmup_epochs=args.warmup_epochs,
        n_samples=args.n_samples,
        output=args.output,
        seed=args.seed,
    )


def _train(method: str, args: argparse.Namespace, text: MaskedText, folder: Path) -> Row:
    """Train and test by one method; keep checkpoints, logs and the row in ``folder``."""
    L.seed_everything(args.seed, verbose=False)
    module = BertMLM(
        args.preset,
        len(text.vocabulary),
        args.max_steps,
        max_length=max(512, args.seq_len),
        dropout=args.dropout,
        optimizer=args.optimizer,
        lr=args.lr,
        seed=args.seed,
    )
    clock, special = Clock(), _method_callback(method, args)
    checkpoint = ModelCheckpoint(
        folder,
        save_last=True,
        save_top_k=0,
        every_n_train_steps=args.checkpoint_every,
        enable_version_counter=False,
    )
    trainer = L.Trainer(
        max_steps=args.max_steps,
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        logger=CSVLogger(folder, name="log"),
        callbacks=[clock, special, checkpoint, TQDMProgressBar(refresh_rate=10)],
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    resumes = args.resume and last.is_file()
    trainer.fit(module, datamodule=text, ckpt_path=last if resumes else None)
    tested = trainer.test(module, datamodule=text, verbose=False)
    if isinstance(special, FullStepCost):
        cost = special.flops or 0
        measured: dict[str, Any] = {"flops": cost * trainer.global_step, "full_step_flops": cost}
        measured |= {"probe_flops": 0, "probe_seconds": 0.0, "probes": 0, "trained_share": 1.0}
    else:
        measured = {**special.summary()}
        del measured["seconds"]  # the clock's are the same for all methods
        del measured["skipped_probes"]  # no column of the comparison
        measured["full_step_flops"] *= args.batch_size  # from per sample
    row = Row(
        method=method,
        test_loss=tested[0]["test_loss"],
        steps=trainer.global_step,
        seconds=clock.seconds,
        **measured,
    )
    machine = environment(trainer.strategy.root_device)
    trainer.save_checkpoint(folder / "final.ckpt", weights_only=True)
    _write_json(folder / "row.json", {"row": asdict(row), "environment": machine})
    return row


def _finished(folder: Path) -> Row | None:
    """Return the row of a method that an earlier, resumed run has finished."""
    path = folder / "row.json"
    if not path.is_file():
        return None
    print(f"finished earlier: {path}")
    return Row(**json.loads(path.read_text())["row"])


def _explain(method: str, args: argparse.Namespace) -> str:
    if method == "full":
        return "plain training, every unit in every step"
    when = f"{args.every_n_epochs} epoch(s)"
    if args.every_n_steps:
        when = f"{args.every_n_steps} steps"
    if method == "random":
        return f"half of the units, drawn anew every {when}, trains; the others rest"
    return (
        f"every {when}, λ_max of every unit is measured; units below the threshold "
        f"(α = {args.alpha}) or settled (β = {args.beta}) rest until the next time"
    )


def _report(rows: Sequence[Row], args: argparse.Namespace, text: MaskedText, out: Path) -> None:
    """Print the table; write the result and the picture, and say where they are."""
    print(
        f"\nBERT-{args.preset} on the {text.source} corpus, {args.max_steps} steps; "
        "loss: log perplexity\n"
    )
    print(table(rows))
    for line in _verdict(rows):
        print(line)
    environments = {
        row.method: json.loads((out / row.method / "row.json").read_text())["environment"]
        for row in rows
    }
    result = {
        "schema": 1,
        "settings": settings(args),
        "corpus": text.describe(),
        "rows": [asdict(row) for row in rows],
        "environments": environments,
    }
    _write_json(out / "result.json", result)
    print(f"\nwrote {out / 'result.json'}")
    if "mat" in args.method:
        _draw(out)


def _verdict(rows: Sequence[Row]) -> list[str]:
    """Return one sentence per other method: what it took and reached beside plain training."""
    full = next((row for row in rows if row.method == "full"), None)
    return [
        f"\n{row.method} took {row.flops / full.flops:.0%} of the FLOPs and "
        f"{row.seconds / full.seconds:.0%} of the seconds of full; "
        f"its test loss differs by {row.test_loss - full.test_loss:+.3f}"
        for row in rows
        if full is not None and row is not full
    ]


def _draw(out: Path) -> None:
    """Draw λ_max of every unit over time from the newest log of MAT."""
    stores = sorted(
        (out / "mat").glob("log/version_*/mat/spectra.npz"), key=lambda p: p.stat().st_mtime
    )
    if not stores:
        print("no probe was due in this run: lower --warmup-epochs or set --every-n-steps")
        return
    try:
        from lightning_mat.report.plot import lambda_max_plot
        from lightning_mat.report.store import read

        lambda_max_plot(read(stores[-1]), out / "lambda_max.png")
    except ModuleNotFoundError as error:
        print(f"no picture: {error}")
        return
    print(f"wrote {out / 'lambda_max.png'}: λ_max of every unit over time, from {stores[-1]}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _quiet() -> None:
    """Leave out Lightning's advice that a comparison cannot follow."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


if __name__ == "__main__":
    sys.exit(main())
