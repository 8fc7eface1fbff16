"""Copies of boxes: extension and eager reference against indexing, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lightning_mat import _extension
from lightning_mat.optim import boxes
from lightning_mat.optim.boxes import runs_of
from lightning_mat.optim.slabs import Box

EXTENSION = _extension.load()
Copies = tuple[Callable[..., None], Callable[..., None]]  # gather, scatter
REFERENCE: Copies = (boxes.gather_boxes_reference, boxes.scatter_boxes_reference)
PLACES = [
    pytest.param("cpu", REFERENCE, id="cpu-eager"),
    pytest.param(
        "cpu",
        (boxes.gather_boxes, boxes.scatter_boxes),
        id="cpu-extension",
        marks=pytest.mark.skipif(bool(EXTENSION.error), reason=EXTENSION.error),
    ),
    pytest.param(
        "cuda",
        (boxes.gather_boxes, boxes.scatter_boxes),
        id="cuda-extension",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            pytest.mark.skipif("cuda" not in EXTENSION.backends, reason="not compiled for CUDA"),
        ],
    ),
]
places = pytest.mark.parametrize(("device", "copies"), PLACES)


def contiguous(*shape: int) -> Tensor:
    return torch.zeros(shape)


def channels_last(*shape: int) -> Tensor:
    return torch.zeros(shape).to(memory_format=torch.channels_last)


def shifted(*shape: int) -> Tensor:
    """Begins at an odd element of its storage."""
    numel = torch.Size(shape).numel()
    return torch.zeros(numel + 3)[3:].view(shape)


def spread(*shape: int) -> Tensor:
    """Has gaps in its memory."""
    return torch.zeros(shape[0], *(2 * n for n in shape[1:]))[tuple(slice(None, n) for n in shape)]


def s(start: int, stop: int) -> slice:
    return slice(start, stop)


# name -> tensors, each with boxes of it
LAYOUTS: dict[str, list[tuple[Tensor, list[Box]]]] = {
    "rows": [(contiguous(9, 7), [(s(1, 3),), (s(4, 5),), (s(8, 9),)])],
    "columns": [(contiguous(9, 7), [(s(0, 9), s(1, 3)), (s(2, 9), s(5, 7))])],
    "single columns": [(contiguous(33, 5), [(s(0, 33), s(i, i + 1)) for i in (0, 2, 4)])],
    "single elements": [(contiguous(19), [(s(i, i + 1),) for i in range(0, 19, 2)])],
    "whole": [(contiguous(4, 4), [(s(0, 4),)]), (contiguous(3), [(s(0, 3),)])],
    "scalar": [(contiguous(), [()])],
    "filters": [(contiguous(8, 3, 3, 3), [(s(0, 2),), (s(5, 6),)])],
    "input channels": [(contiguous(5, 6, 3, 3), [(s(0, 5), s(1, 2)), (s(0, 5), s(4, 6))])],
    "channels last": [
        (channels_last(5, 6, 3, 2), [(s(0, 2),), (s(2, 5), s(1, 2)), (s(3, 5), s(3, 6))])
    ],
    "gaps": [(spread(4, 3, 2), [(s(0, 1),), (s(2, 4), s(1, 3))]), (spread(5, 5), [(s(1, 5),)])],
    "odd offsets": [(shifted(6, 5), [(s(1, 2),), (s(3, 6), s(1, 4))])],
    "wide": [(contiguous(64, 1024), [(s(1, 33),), (s(40, 64), s(3, 1023))])],
    "wide words": [(contiguous(64, 1024), [(s(0, 64), s(0, 512)), (s(2, 9), s(512, 520))])],
    "many": [(contiguous(i % 7 + 1, 3), [(s(i % 3, i % 7 + 1),)]) for i in range(300) if i % 7 > 1],
    "empty boxes": [(contiguous(4, 4), [(s(2, 2),), (s(1, 3), s(2, 2))])],
    "empty tensor": [(contiguous(0, 3), [(s(0, 0),)]), (contiguous(2), [(s(1, 2),)])],
    "no boxes": [(contiguous(4, 4), [])],
    "nothing": [],
}


def case(layout: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Tensors of distinct numbers, a table with gaps in the flat tensor, and the flat tensor."""
    fulls, table, start, value = [], [], 1, 0
    for index, (full, owned) in enumerate(LAYOUTS[layout]):
        memory = full.untyped_storage().nbytes() // full.element_size()
        other = torch.empty(memory, dtype=dtype, device=device)
        other = other.as_strided(full.shape, full.stride(), full.storage_offset())
        numbers = torch.arange(value, value + full.numel()) % 2003  # exact in half precision
        value += full.numel()
        other.copy_(numbers.view(full.shape))
        fulls.append(other)
        for box in owned:
            for offset, stride, rows, run in runs_of(full, box):
                table.append((index, offset, stride, rows, run, start))
                start += rows * run + len(table) % 2
    flat = torch.full((start + 2,), -1.0, dtype=dtype, device=device)
    return fulls, torch.tensor(table, dtype=torch.int64).view(-1, 6), flat


@places
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_are_copied_there_and_back(
    layout: str, dtype: torch.dtype, device: str, copies: Copies
) -> None:
    gather, scatter = copies
    fulls, table, flat = case(layout, dtype, device)
    before = [full.clone() for full in fulls]
    gather(fulls, table, flat)
    assert all(map(torch.equal, fulls, before))
    inside = [
        full[box] for full, (_, owned) in zip(fulls, LAYOUTS[layout], strict=True) for box in owned
    ]
    expected = torch.cat([torch.zeros(0, dtype=dtype, device=device), *map(torch.flatten, inside)])
    # Memory's order need not be the view's, and gaps of the flat tensor stay as they were.
    copied = flat[flat >= 0]
    assert torch.equal(copied.sort().values, expected.sort().values)
    assert len(flat) - len(copied) == (flat == -1).sum()

    flat.add_(1)  # exact below 2048, in bfloat16 below 256: compare what addition gave
    for full, (_, owned) in zip(before, LAYOUTS[layout], strict=True):
        for box in owned:
            full[box] += 1
    scatter(flat, table, fulls)
    assert all(map(torch.equal, fulls, before))


@places
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backends_put_elements_in_the_same_places(layout: str, device: str, copies: Copies) -> None:
    fulls, table, flat = case(layout, torch.float32, device)
    expected = flat.clone()
    copies[0](fulls, table, flat)
    REFERENCE[0](fulls, table, expected)
    assert torch.equal(flat, expected)


def test_one_row_of_the_table_where_memory_has_two_steps() -> None:
    param = torch.zeros(6, 5, 3, 3)
    assert runs_of(param, (s(1, 3),)) == [(45, 90, 1, 90)]
    assert runs_of(param, (s(0, 6), s(1, 3))) == [(9, 45, 6, 18)]
    assert runs_of(channels_last(6, 5, 3, 3), (s(0, 6), s(1, 3))) == [(1, 5, 54, 2)]
    assert len(runs_of(spread(4, 3, 2), (s(0, 4), s(0, 2)))) == 4


WRONG: dict[str, Sequence[int]] = {
    "of tensor 1|does not fit 1": (1, 0, 1, 1, 1, 0),
    "of tensor -1|does not fit 1": (-1, 0, 1, 1, 1, 0),
    "negative number|does not fit": (0, -1, 1, 1, 1, 0),
    "12 elements of memory": (0, 10, 1, 1, 3, 0),
    r"from element 0 on: fulls\[0\] has 12|12 elements of memory": (0, 0, 4, 4, 3, 0),
    "elements of memory": (0, 0, 2**62, 2**62, 1, 0),
    "they overlap": (0, 0, 2, 2, 3, 0),
    "has 8|flat has 8": (0, 0, 4, 3, 3, 0),
    "which has 8|flat has 8 elements": (0, 0, 3, 1, 3, 6),
}


@places
@pytest.mark.parametrize("message", WRONG)
def test_a_box_that_does_not_fit_is_refused(message: str, device: str, copies: Copies) -> None:
    full, flat = torch.zeros(3, 4, device=device), torch.zeros(8, device=device)
    table = torch.tensor([(0, 0, 1, 1, 1, 0), WRONG[message]])
    with pytest.raises(ValueError, match=message) as error:
        copies[0]([full], table, flat)
    assert "boxes[1]" in str(error.value)
    with pytest.raises(ValueError, match=message):
        copies[1](flat, table, [full])


@places
def test_tensors_that_do_not_fit_are_refused(device: str, copies: Copies) -> None:
    gather, _ = copies
    full, flat = torch.zeros(3, 4, device=device), torch.zeros(8, device=device)
    table = torch.tensor([(0, 0, 1, 1, 1, 0)])
    for wrong in (table[:, :5], table.int(), table[0], table.expand(2, 6).T.contiguous().T):
        with pytest.raises(ValueError, match=r"contiguous int64 tensor \[boxes, 6\] on the CPU"):
            gather([full], wrong, flat)
    for wrong in (flat[::2], flat.view(2, 4)):
        with pytest.raises(ValueError, match="flat must be contiguous and of one dimension"):
            gather([full], table, wrong)
    with pytest.raises(ValueError, match=r"fulls\[1\].*(Float|float32)"):
        gather([full, full.float()], table, flat)
    if copies is REFERENCE:  # elsewhere they do not get as far as the copy
        with pytest.raises(ValueError, match=r"fulls\[0\] has layout torch.sparse_coo"):
            gather([full.to_sparse()], table, flat)
        with pytest.raises(ValueError, match=r"fulls\[0\].*meta"):
            gather([full.to("meta")], table, flat)


@places
def test_autograd_hears_of_what_was_written(device: str, copies: Copies) -> None:
    gather, scatter = copies
    full, flat = torch.zeros(3, 4, device=device), torch.zeros(8, device=device)
    table = torch.tensor([(0, 0, 4, 3, 2, 0)])
    versions = full._version, flat._version
    gather([full], table, flat)
    assert (full._version, flat._version > versions[1]) == (versions[0], True)
    written = flat._version
    scatter(flat, table, [full])
    assert (full._version > versions[0], flat._version) == (True, written)


@pytest.mark.skipif(bool(EXTENSION.error), reason=EXTENSION.error)
@pytest.mark.parametrize("layout", ["rows", "channels last", "many", "no boxes"])
def test_operations_are_described_to_torch(layout: str) -> None:
    fulls, table, flat = case(layout, torch.float32, "cpu")
    ops = torch.ops.lightning_mat
    torch.library.opcheck(ops.gather_boxes.default, (fulls, table, flat))
    torch.library.opcheck(ops.scatter_boxes.default, (flat, table, fulls))


@pytest.mark.skipif(bool(EXTENSION.error), reason=EXTENSION.error)
def test_threads_share_the_words_of_large_boxes() -> None:
    full = torch.arange(300_000.0, dtype=torch.float32).view(300, 1000)
    table = torch.tensor([(0, 1, 1000, 300, 997, 3), (0, 999, 1000, 300, 1, 299_700)])
    found, expected = torch.zeros(300_000, dtype=torch.float32), torch.zeros(300_000).float()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        boxes.gather_boxes([full], table, found)
    finally:
        torch.set_num_threads(threads)
    REFERENCE[0]([full], table, expected)
    assert torch.equal(found, expected)
