"""The main job: command line, methods, result, resume."""

import json
import math
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from examples import bert_wikitext2, options, record
from examples.bert_wikitext2 import main
from examples.data.corpus import read_directory
from examples.data.masking import MaskedText
from examples.models.mlm import BertMLM

SCRIPT = Path(bert_wikitext2.__file__)

ROW = {
    "method": str,
    "test_loss": float,
    "steps": int,
    "flops": int,
    "seconds": float,
    "probe_flops": int,
    "probe_seconds": float,
    "probes": int,
    "trained_share": float,
    "full_step_flops": int,
}


@pytest.fixture
def small(data_dir, tmp_path):
    """Command line of a run of six steps: three epochs of two batches."""
    return [
        *("--preset", "tiny", "--data", str(data_dir), "--out", str(tmp_path / "out")),
        *("--seq-len", "8", "--batch-size", "50", "--max-steps", "6", "--accelerator", "cpu"),
        *("--n-samples", "4", "--warmup-epochs", "1"),
    ]


def train(data_dir, folder, *, steps=8, resume=None):
    """Train a tiny BERT for `steps` steps, three an epoch, and keep every checkpoint."""
    text = MaskedText(read_directory(data_dir), length=8, batch_size=32, seed=3)
    L.seed_everything(3 if resume is None else 99, verbose=False)
    module = BertMLM("tiny", len(text.vocabulary), steps, max_length=8, dropout=0.2, seed=3)

    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=text, ckpt_path=resume)
    return module.state_dict()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_resumed_after_any_step_ends_with_the_same_weights(data_dir, tmp_path):
    whole = train(data_dir, tmp_path / "whole")
    for step in range(1, 8):
        resumed = train(
            data_dir, tmp_path / f"r{step}", resume=tmp_path / "whole" / f"step={step}.ckpt"
        )
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), f"step {step}"


def test_full_writes_a_row_with_the_documented_fields(small, tmp_path, capsys):
    assert main([*small, "--method", "full"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result) == {"schema", "settings", "corpus", "rows", "environments"}
    [row] = result["rows"]
    assert {name: type(value) for name, value in row.items()} == ROW
    assert row["steps"] == 6
    assert 0 < row["test_loss"] < 2 * math.log(result["corpus"]["vocabulary"])
    assert row["flops"] == 6 * row["full_step_flops"] > 0
    assert row["seconds"] > 0
    assert result["corpus"]["name"] == "small"
    assert result["environments"]["full"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(result)
    printed = capsys.readouterr().out
    assert "trained share" in printed
    assert "result.json" in printed
    assert (tmp_path / "out" / "full" / "last.ckpt").is_file()


def test_full_step_is_counted_as_three_forward_products(small, tmp_path):
    main([*small, "--method", "full", "--max-steps", "1", "--dropout", "0"])
    row = json.loads((tmp_path / "out" / "result.json").read_text())["rows"][0]
    corpus = json.loads((tmp_path / "out" / "result.json").read_text())["corpus"]
    samples, length, masked, hidden = 50, 8, 1, 128
    tokens, predicted = samples * length, samples * masked
    linear = 2 * tokens * 12 * hidden**2 * 2
    head = 2 * predicted * (hidden**2 + hidden * corpus["vocabulary"])
    attention = 2 * 2 * 2 * samples * length**2 * hidden
    # Attention's backward is 2 products per forward one, or 2.5 where it recomputes its scores.
    assert 3 * (linear + head + attention) <= row["full_step_flops"]
    assert row["full_step_flops"] <= 3 * (linear + head) + 3.5 * attention


@pytest.mark.filterwarnings("ignore:the threshold rests")
def test_all_methods_start_alike_and_report_side_by_side(small, tmp_path, capsys):
    assert main([*small, "--method", "full", "mat", "random"]) == 0
    out = tmp_path / "out"
    rows = json.loads((out / "result.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["full", "mat", "random"]
    assert [row["steps"] for row in rows] == [6, 6, 6]
    assert all({n: type(v) for n, v in row.items()} == ROW for row in rows)
    full, mat, random = rows
    assert mat["probes"] >= 1
    assert 0 < mat["probe_flops"] < mat["flops"]
    assert 0 < mat["probe_seconds"] < mat["seconds"]
    assert mat["full_step_flops"] == full["full_step_flops"]
    assert random["probes"] == 0
    assert 0 < random["trained_share"] < 1
    assert random["flops"] < full["flops"]
    assert "lambda_max.png" in capsys.readouterr().out
    assert (out / "lambda_max.png").read_bytes()[:4] == b"\x89PNG"


def test_resume_keeps_what_is_finished_and_goes_on_with_the_rest(small, tmp_path, capsys):
    out = tmp_path / "out"
    main([*small, "--method", "full"])
    first = (out / "full" / "row.json").read_text()
    assert main([*small, "--method", "full", "--resume"]) == 0
    assert "finished earlier" in capsys.readouterr().out
    assert (out / "full" / "row.json").read_text() == first
    (out / "full" / "row.json").unlink()  # as if stopped before its test
    assert main([*small, "--method", "full", "--resume"]) == 0
    again, before = (json.loads(t)["row"] for t in ((out / "full" / "row.json").read_text(), first))
    for name in ("test_loss", "steps", "flops", "full_step_flops"):
        assert again[name] == before[name]
    assert again["seconds"] >= before["seconds"]  # the earlier seconds are not forgotten


@pytest.mark.filterwarnings("ignore:the threshold rests")
@pytest.mark.parametrize("warmup", ["0", "1"])
def test_mat_that_rests_nothing_is_full_in_loss_and_operations(small, tmp_path, warmup):
    options = ["--method", "full", "mat", "--alpha", "1e-9", "--beta", "0"]
    main([*small, *options, "--warmup-epochs", warmup])
    full, mat = json.loads((tmp_path / "out" / "result.json").read_text())["rows"]
    assert mat["trained_share"] == 1
    assert mat["probes"] >= 1
    assert mat["test_loss"] == full["test_loss"]
    assert mat["flops"] - mat["probe_flops"] == full["flops"]


@pytest.mark.filterwarnings("ignore:the threshold rests")
@pytest.mark.parametrize("method", ["full", "mat", "random"])
def test_a_stopped_command_resumes_to_the_weights_of_one_never_stopped(
    small, tmp_path, monkeypatch, method
):
    options = [*small, "--method", method, "--checkpoint-every", "1", "--every-n-steps", "2"]
    options += ["--warmup-epochs", "0", "--alpha", "0.95", "--beta", "0"]
    main([*options, "--out", str(tmp_path / "whole")])
    step = BertMLM.training_step

    def stops(self, batch, batch_idx):
        if self.global_step == 3:  # in the middle of an epoch and of an episode
            raise RuntimeError("stopped")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(BertMLM, "training_step", stops)
        with pytest.raises(RuntimeError, match="stopped"):
            main([*options, "--out", str(tmp_path / "stopped")])
    main([*options, "--out", str(tmp_path / "stopped"), "--resume"])
    whole, resumed = (
        torch.load(tmp_path / run / method / "final.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = [
        json.loads((tmp_path / run / "result.json").read_text())["rows"][0]
        for run in ("whole", "stopped")
    ]
    for name in ("test_loss", "steps", "flops", "probes", "probe_flops", "trained_share"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-12), name
    assert (rows[0]["trained_share"] < 1) == (method != "full")  # units did rest


def test_no_earlier_run_is_lost_by_accident(small, tmp_path, capsys):
    main([*small, "--method", "full"])
    written = (tmp_path / "out" / "result.json").read_text()
    with pytest.raises(SystemExit):
        main([*small, "--method", "full"])
    assert "--resume goes on with it, --overwrite deletes it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*small, "--method", "full", "--resume", "--seed", "5"])
    assert "seed: 0 → 5" in capsys.readouterr().err
    assert (tmp_path / "out" / "result.json").read_text() == written
    assert main([*small, "--method", "full", "--overwrite", "--max-steps", "2"]) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["rows"][0]["steps"] == 2


def test_script_starts_from_anywhere_and_names_missing_files(tmp_path):
    (tmp_path / "train.txt").write_text("a b c\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--data", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "lacks valid.txt (or wiki.valid.tokens), test.txt" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--method", "best"], "invalid choice: 'best'"),
        (["--alpha", "much"], "'much' is neither a number, nor auto"),
        (["--alpha", "head=a"], "'head=a' is neither a number, nor auto"),
        (["--alpha", "1.5"], "alpha"),
        (["--max-steps", "0"], "--max-steps must be ≥ 1, got 0"),
        (["--dropout", "1"], "--dropout must be in [0, 1), got 1"),
        (["--batch-size", "5000"], "lower --batch-size"),
        (["--vocab-size", "2"], "vocabulary size must be above 3"),
    ],
)
def test_bad_input_ends_with_a_message_before_anything_is_written(
    small, tmp_path, capsys, options, message
):
    with pytest.raises(SystemExit) as caught:
        main([*small, *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_thresholds_may_differ_per_kind():
    _, args = options.parse(["--alpha", "head=0.1,ffn=0.2", "--beta", "0.5"])
    assert args.alpha == {"head": 0.1, "ffn": 0.2}
    assert args.beta == 0.5


def test_demo_options_yield_to_the_command_line(monkeypatch):
    seen = {}
    monkeypatch.setattr(bert_wikitext2, "_read", lambda args: seen.update(vars(args)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--demo", "--max-steps", "3"])
    assert seen["preset"] == "tiny"
    assert seen["method"] == ["full", "mat"]
    assert seen["max_steps"] == 3


def test_paper_optimizer_and_schedule():
    made = BertMLM("tiny", 50, 100).configure_optimizers()
    group = made["optimizer"].param_groups[0]
    assert type(made["optimizer"]) is torch.optim.Adam
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.0, 0.0), 1e-6, 0)
    schedule = made["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(101):
        rates.append(group["lr"])
        made["optimizer"].step()
        schedule.step()
    assert rates[0] == pytest.approx(2e-4)
    assert rates[50] == pytest.approx(1e-4)
    assert rates[100] == 0


def test_adamw_warms_up_and_decays():
    module = BertMLM("tiny", 50, 100, optimizer="adamw", lr=1e-3)
    made = module.configure_optimizers()
    factor = made["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert type(made["optimizer"]) is torch.optim.AdamW
    assert [factor(i) for i in (0, 4, 5, 100)] == [pytest.approx(v) for v in (0.2, 1, 1, 0)]
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        BertMLM("tiny", 50, 100, optimizer="lion")


def test_clock_leaves_validation_out_and_goes_on_from_a_checkpoint(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(record.time, "perf_counter", lambda: now[0])
    clock = record.Clock()

    def after(seconds, hook):
        now[0] += seconds
        hook(None, None)

    after(5, clock.on_validation_start)  # outside of training
    after(5, clock.on_validation_end)
    after(0, clock.on_train_start)
    after(3, clock.on_validation_start)
    after(100, clock.on_validation_end)
    now[0] += 1
    assert clock.seconds == 4
    resumed = record.Clock()
    resumed.load_state_dict(clock.state_dict())
    after(0, resumed.on_train_start)
    after(2, resumed.on_train_end)
    after(50, resumed.on_validation_start)
    assert resumed.seconds == 6
