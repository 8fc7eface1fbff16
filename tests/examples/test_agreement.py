"""The project's models and others' of the same size: the same losses from the same weights, and
losses after a few hundred steps from weights of their own that differ no more than seeds do."""

import math
import random

import lightning as L
import pytest
import torch

from examples.data.cifar10 import Images
from examples.data.corpus import Corpus
from examples.data.loader import as_fetched, training_batches
from examples.data.masking import MaskedText
from examples.models.images import VGGClassifier
from examples.models.mlm import BertMLM

SEEDS = (1, 2, 3)


def sentences(n, seed):
    """Lines in which a word mostly says what the next one is: a chain over 40 words."""
    draw, lines, word = random.Random(seed), [], 0
    for _ in range(n):
        line = []
        for _ in range(15):
            word = (3 * word + draw.choice((1, 1, 1, 2, 5))) % 40
            line.append(f"w{word}")
        lines.append(" ".join(line))
    return tuple(lines)


def text(seed):
    return MaskedText(Corpus("chain", sentences(600, 0), *[sentences(20, 1)] * 2), 16, 8, seed=seed)


def pictures(seed):
    """Loader of noisy images of four classes, each with a pattern of its own."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(90, (4, 3, 8, 8), generator=generator).repeat_interleave(4, 2)
    labels = torch.arange(320) % 4
    noise = torch.randint(160, (320, 3, 32, 32), generator=generator)
    pixels = (patterns.repeat_interleave(4, 3)[labels] + noise).to(torch.uint8)
    data = Images(pixels, labels, augment=True, seed=seed)
    return training_batches(data, 320, 16, seed, collate=as_fetched)


def bert(other, seed=0, steps=30, **options):
    options = {"max_length": 16, "optimizer": "adamw", "lr": 1e-3, "seed": seed, **options}
    return BertMLM("tiny", 43, steps, hf=other, **options)


def vgg(other, seed=0, steps=30, **options):
    options = {"classes": 4, "width": 4, "lr": 0.02, "seed": seed, **options}
    return VGGClassifier(steps, torchvision=other, **options)


def losses(module, batches):
    """Train a module batch by batch and return every loss."""
    module.log = lambda *_, **__: None
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    found = []
    for number, batch in enumerate(batches):
        loss = module.training_step(batch, number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        found.append(float(loss.detach()))
    return torch.tensor(found, dtype=torch.float64)


def in_double(batch):
    return tuple(t.double() if t.is_floating_point() else t for t in batch)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_berts_losses_are_hugging_faces_from_the_same_weights(optimizer):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    lr = {"adam": 1e-4, "adamw": 1e-3}[optimizer]
    ours, theirs = (bert(other, dropout=0.0, optimizer=optimizer, lr=lr) for other in (False, True))
    theirs.bert.copy_from(ours.bert)
    batches = list(text(0).train_dataloader())[:3] * 10
    found, expected = (losses(module.double(), batches) for module in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert found[-3:].mean() < found[:3].mean() - 0.2  # and they did train


def test_vggs_losses_are_torchvisions_from_the_same_weights():
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    ours, theirs = vgg(False), vgg(True)
    missing, unexpected = theirs.vgg.load_state_dict(ours.vgg.state_dict(), strict=False)
    assert len(missing) == 13  # the convolutions' biases, which BatchNorm takes away
    assert unexpected == []
    batches = [in_double(batch) for batch in list(pictures(0))[:3]] * 8
    found, expected = (losses(module.double(), batches) for module in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert found[-3:].mean() < found[:3].mean() - 0.2


def final_loss(make, other, seed, steps, loader):
    """Train by Lightning from a seed's own weights; return the mean loss of the last fifth."""
    L.seed_everything(seed, verbose=False)
    module, seen = make(other, seed, steps), []
    step = module.training_step

    def remember(batch, batch_idx):
        loss = step(batch, batch_idx)
        seen.append(float(loss.detach()))
        return loss

    module.training_step = remember
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train_dataloaders=loader(seed))
    last = seen[-steps // 5 :]
    return sum(last) / len(last), seen[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*", "ignore:You defined a `validation")
@pytest.mark.parametrize(
    ("make", "loader", "steps", "needs"),
    [
        (bert, lambda seed: text(seed).train_dataloader(), 240, "transformers"),
        (vgg, pictures, 160, "torchvision"),
    ],
    ids=["bert", "vgg"],
)
def test_losses_differ_no_more_than_between_seeds(make, loader, steps, needs):
    pytest.importorskip(needs)
    ours, theirs = (
        [final_loss(make, other, seed, steps, loader) for seed in SEEDS] for other in (False, True)
    )
    learned = min(first - last for last, first in ours + theirs)
    ours, theirs = (torch.tensor([last for last, _ in runs]) for runs in (ours, theirs))
    # Six numbers, four degrees of freedom: Student's 99.9% quantile is 8.6.
    error = math.sqrt(float(ours.var() + theirs.var()) / len(SEEDS))
    difference = abs(float(ours.mean() - theirs.mean()))
    assert difference < 8.6 * error
    # That would say little if seeds differed much, or nothing had been learned.
    assert learned > 0.3
    assert difference < 0.2 * learned
