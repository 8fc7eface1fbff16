"""CIFAR-10: its files, its splits, and an augmentation that depends on the index alone."""

import doctest
import lzma
import pickle
import sys

import numpy as np
import pytest
import torch

from examples.data import cifar10, cifar10_files
from examples.data.cifar10 import MEAN, STD, Cifar10, Images, augmented
from examples.data.cifar10_files import HALVES, TEST, TRAIN, read, unpack

EACH = 20  # images in a batch file


def drawn(seed):
    """Rows of one batch: smooth images, so that the predictor has edges and slopes to tell."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(-9, 10, (EACH, 3, 32, 32))
    images = (steps.cumsum(2) + steps.cumsum(3) + rng.integers(256, size=(EACH, 3, 1, 1))) & 255
    labels = np.arange(EACH) % 10
    return np.concatenate([labels[:, None], images.reshape(EACH, -1)], 1).astype(np.uint8)


@pytest.fixture(scope="module")
def rows():
    return {name: drawn(i) for i, name in enumerate((*TRAIN, TEST))}


@pytest.fixture(scope="module")
def binary(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "cifar-10"
    folder.mkdir()
    for name, values in rows.items():
        values.tofile(folder / f"{name}.bin")
    return folder


def packed(rows):
    """One half's stream, pixel by pixel as the predictor's paper has it."""
    whole = np.concatenate(rows)
    images = whole[:, 1:].reshape(-1, 3, 32, 32).astype(int)
    residual = np.zeros_like(images)
    for i in range(32):
        for j in range(32):
            a = images[:, :, i, j - 1] if j else 0
            b = images[:, :, i - 1, j] if i else 0
            if i and j:
                c = images[:, :, i - 1, j - 1]
                guess = np.where(c >= np.maximum(a, b), np.minimum(a, b), a + b - c)
                guess = np.where(c <= np.minimum(a, b), np.maximum(a, b), guess)
            else:
                guess = a if j else b
            residual[:, :, i, j] = images[:, :, i, j] - guess
    red, green, blue = (residual[:, p] for p in range(3))
    stored = np.stack([green, red - green, blue - green], 1) & 255
    return whole[:, 0].tobytes() + stored.astype(np.uint8).tobytes()


@pytest.mark.parametrize("module", [cifar10, cifar10_files])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def test_binary_version_is_read_in_order_from_the_folder_or_the_one_above(rows, binary):
    train, test = read(binary)
    whole = np.concatenate([rows[name] for name in TRAIN])
    assert torch.equal(train.images.flatten(1), torch.from_numpy(whole[:, 1:].copy()))
    assert train.images.shape == (5 * EACH, 3, 32, 32)
    assert train.labels.tolist() == whole[:, 0].tolist()
    assert test.labels.tolist() == rows[TEST][:, 0].tolist()
    above = read(binary.parent)
    assert torch.equal(above[1].images, test.images)


def test_packed_halves_hold_the_same_and_are_unpacked_once(rows, binary, tmp_path, monkeypatch):
    folder = tmp_path / "packed"
    folder.mkdir()
    for half, names in HALVES.items():
        (folder / half).write_bytes(lzma.compress(packed([rows[name] for name in names])))
    expected = read(binary)

    def check(cache):
        for found, wanted in zip(read(folder, cache), expected, strict=True):
            assert torch.equal(found.images, wanted.images)
            assert torch.equal(found.labels, wanted.labels)

    (tmp_path / "file").write_text("")
    check(tmp_path / "file")  # nothing can be written below a file
    check(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(cifar10_files, "unpack", None)
        check(tmp_path / "cache")
    (folder / "cifar10-b.med.xz").write_bytes(b"no xz stream")
    with pytest.raises(ValueError, match=r"cifar10-b.med.xz is damaged"):
        read(folder, tmp_path / "cache")
    with pytest.raises(ValueError, match="3072 bytes does not hold 3 batches"):
        unpack(bytes(3072), 3)


def test_missing_files_are_named(binary, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no cifar-10 in .*looked for data_batch_1.bin"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read(tmp_path / "nowhere")
    (tmp_path / "cifar10-a.med.xz").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"lacks cifar10-b.med.xz; found cifar10-a.med.xz"):
        read(tmp_path)
    for path in binary.iterdir():
        if path.stem != "data_batch_3":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "cifar10-a.med.xz").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_3.bin; found"):
        read(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"data_batch_3.bin has 100 bytes.*multiple of the 3073"):
        read(tmp_path)


def test_a_download_without_torchvision_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-mat\[vision\]"):
        read(None)


def test_a_download_has_the_layout_of_the_files(monkeypatch, tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")

    class Downloaded:
        def __init__(self, root, train, download):
            assert (root, download) == (str(tmp_path), True)
            self.data = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 32, 32, 3)
            self.targets = [3, 7] if train else [1, 2]

    monkeypatch.setattr(datasets, "CIFAR10", Downloaded)
    train, test = read(None, tmp_path)
    assert train.images.shape == (2, 3, 32, 32)
    assert train.images[0, :, 0, 1].tolist() == [3, 4, 5]  # the second pixel's colours
    assert (train.labels.tolist(), test.labels.tolist()) == ([3, 7], [1, 2])


def test_splits_are_the_end_for_validation_and_stratified_subsets(binary):
    data = Cifar10(binary, 10, valid_size=30, train_size=40, test_size=10, seed=1)
    train, test = read(binary)
    assert data.describe() == {
        "name": "cifar-10",
        "augment": False,
        "train_images": 40,
        "valid_images": 30,
        "test_images": 10,
    }
    assert torch.equal(data.valid.images, train.images[-30:])
    assert data.train.labels.bincount().tolist() == [4] * 10
    assert data.test.labels.bincount().tolist() == [1] * 10
    held = {image.numpy().tobytes() for image in train.images[-30:]}
    used = {image.numpy().tobytes() for image in data.train.images}
    assert used.isdisjoint(held)
    assert used <= {image.numpy().tobytes() for image in train.images}
    other = Cifar10(binary, 10, valid_size=30, train_size=40, seed=2)
    assert torch.equal(data.train.images, other.train.images)
    assert len(other.test) == len(test.labels)
    with pytest.raises(ValueError, match=r"train_size must be from 1 to 70.*got 71"):
        Cifar10(binary, 10, valid_size=30, train_size=71)
    with pytest.raises(ValueError, match=r"valid_size must be from 1 to 99.*got 100"):
        Cifar10(binary, 10, valid_size=100)
    with pytest.raises(ValueError, match=r"batch needs 50 images, but only 40"):
        Cifar10(binary, 50, valid_size=30, train_size=40)


def test_batches_are_normalised_and_complete(binary):
    data = Cifar10(binary, 16, valid_size=30, seed=1)
    batches = list(data.train_dataloader())
    assert [images.shape for images, _ in batches] == [(16, 3, 32, 32)] * 4
    images, labels = next(iter(data.val_dataloader()))
    pixels = data.valid.images[:16].double() / 255
    expected = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(images.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(labels, data.valid.labels[:16])
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 30


def test_another_seed_is_as_if_made_with_it(binary):
    first, wanted = (Cifar10(binary, 16, valid_size=30, augment=True, seed=s) for s in (1, 2))
    found = list(first.with_seed(2).train_dataloader())
    for (a, x), (b, y) in zip(found, wanted.train_dataloader(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    before = [images for images, _ in first.train_dataloader()]
    assert not all(torch.equal(a, c) for (a, _), c in zip(found, before, strict=True))


def test_windows_and_mirrors_by_a_loop():
    torch.manual_seed(0)
    images = torch.randint(256, (40, 3, 6, 7), dtype=torch.uint8)
    row, column = torch.randint(9, (2, 40))
    mirror = torch.randint(2, (40,))
    found = augmented(images, row, column, mirror)
    for s in range(40):
        padded = torch.zeros(3, 6 + 8, 7 + 8, dtype=torch.uint8)
        padded[:, 4:10, 4:11] = images[s]
        wanted = padded[:, row[s] : row[s] + 6, column[s] : column[s] + 7]
        assert torch.equal(found[s], wanted.flip(2) if mirror[s] else wanted), s
    still = torch.full((40,), 4)
    assert torch.equal(augmented(images, still, still, torch.zeros_like(still)), images)


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    torch.manual_seed(0)
    images, labels = torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8), torch.arange(30)

    def make(seed=3):
        return Images(images, labels, augment=True, seed=seed)

    data = make()
    index = (torch.randperm(90) % 90).tolist()  # three epochs, mixed
    together, classes = data.__getitems__(index)
    assert torch.equal(classes, torch.tensor(index) % 30)
    torch.rand(5)  # the global stream does not matter
    again = pickle.loads(pickle.dumps(make()))  # as a worker process gets it
    for k, i in enumerate(index):
        assert torch.equal(again[i][0], together[k])
    epoch = [torch.stack([data[30 * e + i][0] for i in range(30)]) for e in range(2)]
    assert not torch.equal(epoch[0], epoch[1])
    assert not torch.equal(epoch[0], make(4).__getitems__(range(30))[0])
    with pytest.raises(IndexError, match="≥ 0, got -1"):
        data[-1]


def test_every_window_and_mirror_is_as_likely():
    n = 8100
    data = Images(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), torch.zeros(n), augment=True)
    row, column, mirror = data._draw(5)
    # Binomial(8100, 1/9): mean 900, standard deviation 28; 5 of them is one in a million.
    assert ((row.bincount(minlength=9) - 900).abs() < 141).all()
    assert ((column.bincount(minlength=9) - 900).abs() < 141).all()
    assert abs(int(mirror.sum()) - n // 2) < 225
    assert torch.corrcoef(torch.stack([row, column, mirror]).double()).triu(1).abs().max() < 0.06


def test_worker_processes_give_the_same_batches(binary):
    def batches(workers):
        data = Cifar10(binary, 16, valid_size=30, augment=True, seed=2, num_workers=workers)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(1)
        return [images for images, _ in loader]

    assert all(map(torch.equal, batches(0), batches(1)))
