"""Every LightningModule of the examples: trained with MAT, resumed inside an epoch, its logs."""

import doctest
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from examples.data.cifar10 import Images
from examples.data.corpus import Corpus
from examples.data.loader import as_fetched, ordered_batches, training_batches
from examples.data.masking import MaskedText
from examples.models import encoder, hf_bert, images, mlm, sentiment, training
from examples.models.images import VGGClassifier
from examples.models.mlm import BertMLM, SwitchMLM
from examples.models.sentiment import SentimentClassifier, masked_mean
from examples.models.switch import SWITCH_PRESETS, Switch, switch_preset
from lightning_mat import MATCallback, partition

STEPS = 10  # four in an epoch
WORDS = 19


@pytest.mark.parametrize("module", [encoder, hf_bert, images, mlm, sentiment, training])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def text(seed=3):
    lines = tuple(f"a{i % 7} b{i % 5} c{i % 3} ." for i in range(80))
    return MaskedText(Corpus("small", lines, lines[:20], lines[:20]), 8, 12, seed=seed)


class Arrays(L.LightningDataModule):
    """Three splits of one data set whose `__getitems__` gives batches."""

    def __init__(self, data, n, seed=3):
        super().__init__()
        self.data, self.n, self.seed = data, n, seed

    def train_dataloader(self):
        return training_batches(self.data, self.n, 12, self.seed, collate=as_fetched)

    def val_dataloader(self):
        return ordered_batches(self.data, 12, collate=as_fetched)

    test_dataloader = val_dataloader


def pictures():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    pixels = torch.randint(128, (48, 3, 32, 32), generator=generator, dtype=torch.uint8)
    pixels += (60 * labels).to(torch.uint8).view(-1, 1, 1, 1)
    return Arrays(Images(pixels, labels, augment=True, seed=3), 48)


class Sentences(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.words = torch.randint(5, 40, (48, 9), generator=generator)
        self.lengths = torch.randint(3, 10, (48,), generator=generator)

    def __len__(self):
        return 48

    def __getitems__(self, indices):
        places = torch.tensor(indices) % 48
        mask = (torch.arange(9) < self.lengths[places, None]).long()
        words = self.words[places] * mask
        return {"input_ids": words, "attention_mask": mask, "labels": (words[:, 0] > 20).long()}

    def __getitem__(self, index):
        return {name: value[0] for name, value in self.__getitems__([index]).items()}


def small_encoder():
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=16,
        ),
        add_pooling_layer=False,
    )


def make(name):
    """Return module, data and units."""
    L.seed_everything(3, verbose=False)
    if name.startswith("bert"):
        if name == "bert-hf":
            pytest.importorskip("transformers")
        words = {"max_length": 8, "optimizer": "adamw", "lr": 1e-3, "seed": 3}
        return BertMLM("tiny", WORDS, STEPS, **words, hf=name == "bert-hf"), text(), "heads+ffn"
    if name == "switch":
        module = SwitchMLM("tiny", WORDS, STEPS, max_length=8, lr=1e-3, seed=3)
        return module, text(), "heads+experts"
    if name == "sentiment":
        module = SentimentClassifier(STEPS, small_encoder(), lr=1e-3, seed=3)
        return module, Arrays(Sentences(), 48), "heads+ffn"
    if name == "vgg-torchvision":
        pytest.importorskip("torchvision")
    other = name == "vgg-torchvision"
    module = VGGClassifier(STEPS, classes=3, width=4, lr=0.02, seed=3, torchvision=other)
    return module, pictures(), "filters"


NAMES = ["bert", "bert-hf", "switch", "vgg", "vgg-torchvision", "sentiment"]
OWN = ["bert", "switch", "vgg", "sentiment"]


def trainer(*callbacks, **options):
    return L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)},
        **options,
    )


def adaptive(units, skip):
    return MATCallback(
        units, alpha=0.6, beta=0.0, every_n_steps=3, warmup_epochs=0, n_samples=8, skip=skip
    )


@pytest.mark.filterwarnings("ignore:the threshold rests")
@pytest.mark.parametrize("skip", ["weights", "units"])
@pytest.mark.parametrize("name", NAMES)
def test_every_module_trains_with_mat_and_learns(name, skip):
    module, data, units = make(name)
    callback = adaptive(units, skip)
    fit = trainer(callback)
    before = fit.validate(module, datamodule=data, verbose=False)[0]
    fit.fit(module, datamodule=data)
    after = fit.test(module, datamodule=data, verbose=False)[0]
    summary = callback.summary()
    assert summary["probes"] == 4
    assert 0 < summary["trained_share"] < 1
    assert after["test_loss"] < before["val_loss"]
    expected = {"test_loss"}
    if name.startswith("vgg") or name == "sentiment":
        expected |= {"test_accuracy"}
    if name == "switch":
        expected |= {"test_balance", "test_dropped"}
    assert set(after) == expected


@pytest.mark.filterwarnings("ignore:the threshold rests", "ignore:The dirpath has changed")
@pytest.mark.parametrize("name", OWN)
def test_every_module_resumes_inside_an_epoch(name, tmp_path):
    def train(folder, resume=None):
        module, data, units = make(name)
        saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        if resume is not None:
            L.seed_everything(99, verbose=False)
        fit = trainer(adaptive(units, "units"), saves)
        fit.fit(module, datamodule=data, ckpt_path=resume)
        return module.state_dict(), dict(fit.callback_metrics)

    whole, metrics = train(tmp_path / "whole")
    for step in (2, 4, 6):  # inside the first epoch, at its end, inside the second
        resumed, again = train(tmp_path / f"r{step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), step
        for key in ("train_accuracy", "val_loss"):
            assert metrics.get(key) == again.get(key), (step, key)


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_training_accuracy_counts_the_whole_epoch_after_a_resume(tmp_path):
    def train(resume=None):
        module, data, _ = make("vgg")
        saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit = trainer(*([saves] if resume is None else []))
        seen = []
        module.on_train_epoch_end = lambda: seen.append(
            (
                int(module.train_accuracy.tp),
                int(module.train_accuracy.tp + module.train_accuracy.fp),
            )
        )
        fit.fit(module, datamodule=data, ckpt_path=resume)
        return seen

    whole = train()
    assert [total for _, total in whole[:2]] == [48, 48]
    assert train(tmp_path / "step=6.ckpt")[0] == whole[1]
    assert train(tmp_path / "step=4.ckpt")[-2] == whole[1]


def test_dropout_masks_depend_on_seed_and_step():
    module, data, _ = make("bert")
    batch = next(iter(data.train_dataloader()))
    module.trainer = trainer()

    def loss(seed):
        module.hparams["seed"] = seed
        module.on_train_batch_start(batch, 0)
        return float(module.bert(batch["input_ids"]).detach().square().mean())

    assert loss(1) == loss(1)
    assert len({loss(seed) for seed in (1, 2, 3)}) == 3


def test_switch_adds_the_balance_to_what_it_minimises_and_counts_what_is_dropped():
    module, data, _ = make("switch")
    module.eval()
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value.item()})
    batch = next(iter(data.train_dataloader()))
    loss = module.training_step(batch, 0)
    with torch.no_grad():
        out = module(batch["input_ids"], batch["masked_positions"])
    words = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten())
    assert logged["train_loss"] == pytest.approx(words.item(), rel=1e-6)
    assert loss.item() == pytest.approx((words + 0.01 * out.balance).item(), rel=1e-6)
    assert logged["train_balance"] == pytest.approx(out.balance.item(), rel=1e-6)
    assert logged["train_dropped"] == pytest.approx(out.dropped.item(), rel=1e-6)
    tight = SwitchMLM("tiny", WORDS, STEPS, max_length=8, capacity_factor=0.5)
    assert tight(batch["input_ids"]).dropped > 0.4


def test_the_papers_switch_and_its_optimizer():
    config = switch_preset("paper")
    assert (config.layers, config.heads, config.experts, config.capacity_factor) == (12, 12, 4, 1.5)
    with torch.device("meta"):
        units = partition(Switch(config), "heads+experts")
    kinds = list(units.kinds)
    assert (kinds.count("head"), kinds.count("expert")) == (144, 48)
    made = SwitchMLM("tiny", WORDS, 100).configure_optimizers()
    group = made["optimizer"].param_groups[0]
    assert type(made["optimizer"]) is torch.optim.AdamW
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.99), 1e-6, 0.01)
    factor = made["lr_scheduler"]["scheduler"].lr_lambdas[0]
    # 12k of 300k steps of warm-up: one twenty-fifth.
    assert [factor(i) for i in (0, 3, 4, 52, 100)] == pytest.approx([0.25, 1, 1, 0.5, 0])
    with pytest.raises(ValueError, match=r"unknown preset 'huge'.*paper"):
        switch_preset("huge")
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        SwitchMLM("tiny", WORDS, 100, optimizer="lion")
    assert set(SWITCH_PRESETS) >= {"tiny", "small", "paper"}


def test_the_papers_schedule_of_vgg():
    made = VGGClassifier(200, width=2).configure_optimizers()
    group = made["optimizer"].param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
    factor = made["lr_scheduler"]["scheduler"].lr_lambdas[0]
    rates = [0.1 * factor(i) for i in (0, 99, 100, 149, 150, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    other = VGGClassifier(200, width=2, schedule="cosine").configure_optimizers()
    factor = other["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert [factor(i) for i in (0, 100, 200)] == pytest.approx(
        [1, (1 + math.cos(math.pi / 2)) / 2, 0]
    )
    with pytest.raises(ValueError, match=r"unknown schedule 'step'.*staircase, cosine"):
        VGGClassifier(200, schedule="step")


def test_padding_does_not_reach_the_logits():
    torch.manual_seed(0)
    module = SentimentClassifier(STEPS, small_encoder()).eval()
    words = torch.randint(5, 40, (2, 6))
    mask = torch.ones_like(words)
    padded = torch.cat([words, torch.full((2, 3), 7)], 1)
    longer = torch.cat([mask, torch.zeros(2, 3, dtype=torch.int64)], 1)
    torch.testing.assert_close(module(padded, longer), module(words, mask), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(module(padded, torch.ones_like(padded)), module(words, mask))
    x = torch.randn(3, 4, 5)
    assert torch.allclose(masked_mean(x, torch.ones(3, 4, dtype=torch.int64)), x.mean(1))


def test_frozen_layers_rest_and_the_others_train():
    module = SentimentClassifier(STEPS, small_encoder(), frozen_layers=1)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert not any(".layer.0." in n or ".embeddings." in n for n in trained)
    assert any(".layer.1." in n for n in trained)
    assert "head.weight" in trained
    held = {
        id(p) for g in module.configure_optimizers()["optimizer"].param_groups for p in g["params"]
    }
    assert held == {id(p) for p in module.parameters() if p.requires_grad}
    part = partition(module, "heads+ffn")
    assert {unit.layer for unit in part if unit.kind == "head"} == {"encoder.encoder.layer.1"}
    with pytest.raises(ValueError, match=r"frozen_layers must be from 0 to 2, got 3"):
        SentimentClassifier(STEPS, small_encoder(), frozen_layers=3)
