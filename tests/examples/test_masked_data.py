"""Blocks, masks and the order of batches."""

import doctest

import pytest
import torch

from examples.data import loader, masking, seeds
from examples.data.corpus import read_directory
from examples.data.loader import EpochSampler, ResumableLoader
from examples.data.masking import MaskedBlocks, MaskedText
from examples.data.seeds import mixed


@pytest.mark.parametrize("module", [loader, masking, seeds])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


@pytest.fixture
def blocks():
    return MaskedBlocks(torch.arange(205), length=20, mask=999, seed=7)


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in ("input_ids", "masked_positions", "labels"))


def test_putting_the_labels_back_restores_the_text(blocks):
    assert len(blocks) == 10
    for i, sample in enumerate(blocks):
        assert (sample["input_ids"] == 999).sum() == len(sample["labels"]) == 3
        restored = sample["input_ids"].clone()
        restored[sample["masked_positions"]] = sample["labels"]
        assert torch.equal(restored, torch.arange(20 * i, 20 * i + 20))


def test_masks_depend_on_seed_epoch_and_block_alone(blocks):
    again = MaskedBlocks(torch.arange(205), length=20, mask=999, seed=7)
    other = MaskedBlocks(torch.arange(205), length=20, mask=999, seed=8)
    order = torch.randperm(30).tolist()
    assert all(same(blocks[i], again[i]) for i in order)
    assert not all(same(blocks[i], other[i]) for i in range(10))
    assert not all(same(blocks[i], blocks[10 + i]) for i in range(10))
    for i in range(10):  # another epoch, the same text
        assert torch.equal(
            blocks[i]["input_ids"].scatter(0, blocks[i]["masked_positions"], blocks[i]["labels"]),
            blocks[10 + i]["input_ids"].scatter(
                0, blocks[10 + i]["masked_positions"], blocks[10 + i]["labels"]
            ),
        )


def test_masks_reach_every_position_equally():
    blocks = MaskedBlocks(torch.zeros(4000 * 20, dtype=torch.long), length=20, mask=1)
    hits = torch.zeros(20)
    for sample in blocks:
        hits[sample["masked_positions"]] += 1
    # Binomial(4000, 0.15): mean 600, standard deviation 22.6; 5 of them is one in a million.
    assert ((hits - 600).abs() < 113).all()


def test_text_shorter_than_a_block_is_an_error(blocks):
    with pytest.raises(ValueError, match=r"needs 20 words.*only 19"):
        MaskedBlocks(torch.arange(19), length=20, mask=0)
    with pytest.raises(IndexError, match="≥ 0, got -1"):
        blocks[-1]


def batches(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [batch["labels"] for batch in loader]


def make(blocks):
    return ResumableLoader(
        blocks, batch_size=3, sampler=EpochSampler(len(blocks), seed=1), drop_last=True
    )


def test_order_is_drawn_per_seed():
    orders = {tuple(EpochSampler(20, seed)) for seed in (0, 1, 2, 2**31 - 1)}
    assert len(orders) == 4


def test_every_seed_epoch_and_purpose_has_its_own_stream():
    found = {mixed(s, n, p) for s in range(50) for n in range(0, 100_000, 97) for p in range(2)}
    assert len(found) == 50 * len(range(0, 100_000, 97)) * 2


def test_another_seed_is_as_if_made_with_it(data_dir):
    corpus = read_directory(data_dir)
    first, wanted = (MaskedText(corpus, length=8, batch_size=4, seed=s) for s in (1, 2))
    found = first.with_seed(2)
    for split in ("train", "val", "test"):
        loaders = [getattr(text, f"{split}_dataloader")() for text in (found, wanted, first)]
        pairs = list(zip(*loaders, strict=True))
        assert all(same(a, b) for a, b, _ in pairs)
        assert not all(same(a, c) for a, _, c in pairs)


def test_order_is_drawn_per_epoch(blocks):
    first, second = batches(make(blocks), 0), batches(make(blocks), 1)
    assert len(first) == len(second) == 3
    assert all(map(torch.equal, first, batches(make(blocks), 0)))
    assert not all(map(torch.equal, first, second))


@pytest.mark.parametrize("served", [0, 1, 2, 3])
def test_loader_goes_on_after_the_last_batch_handed_out(blocks, served):
    full = batches(make(blocks), 4)
    stopped = make(blocks)
    stopped.sampler.set_epoch(4)
    iterator = iter(stopped)
    for _ in range(served):
        next(iterator)
    state = stopped.state_dict()
    resumed = make(blocks)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    rest = batches(resumed, 4)
    if served:
        assert len(rest) == 3 - served
        assert all(map(torch.equal, rest, full[served:]))
    else:  # nothing was handed out of epoch 4
        assert all(map(torch.equal, rest, full))
    assert all(map(torch.equal, batches(resumed, 5), batches(make(blocks), 5)))


def test_splits_are_disjoint_and_evaluation_never_changes(data_dir):
    text = MaskedText(read_directory(data_dir), length=8, batch_size=4)
    number = {word: i for i, word in enumerate(text.vocabulary.words)}
    assert "valid" not in number
    assert "test" not in number  # the vocabulary is training's
    assert (text.train.blocks == number["train"]).any()
    assert not (text.valid.blocks == number["train"]).any()
    assert not (text.test.blocks == number["train"]).any()
    for make_loader in (text.val_dataloader, text.test_dataloader):
        assert all(same(a, b) for a, b in zip(make_loader(), make_loader(), strict=True))


def test_loaders_leave_the_global_random_stream_alone(data_dir):
    text = MaskedText(read_directory(data_dir), length=8, batch_size=4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for make_loader in (text.train_dataloader, text.val_dataloader):
        next(iter(make_loader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_too_little_text_for_a_batch_is_an_error(data_dir):
    with pytest.raises(ValueError, match=r"batch needs 500 blocks.*lower --batch-size"):
        MaskedText(read_directory(data_dir), length=8, batch_size=500)
