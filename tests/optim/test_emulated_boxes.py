"""The CUDA kernel's own source in tests/emulator copies boxes as the reference does."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_mat.optim.boxes import gather_boxes_reference, scatter_boxes_reference
from tests.mntk.test_emulated import FLAGS, ROOT, compiler
from tests.optim.test_boxes import LAYOUTS, case

Copy = Callable[[list[Tensor], Tensor, Tensor, bool], None]


@pytest.fixture(scope="session")
def copy_boxes(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """Copies to the flat tensor or from there, in the emulator."""
    library = tmp_path_factory.mktemp("emulator") / "boxes.so"
    command = [compiler(), *FLAGS, *os.environ.get("EMULATOR_FLAGS", "").split()]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulator'}"]
    command += [str(ROOT / "tests" / "emulator" / "boxes.cpp"), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    function = ctypes.CDLL(str(library)).run_boxes
    function.restype = ctypes.c_char_p

    def copy(fulls: list[Tensor], table: Tensor, flat: Tensor, gather: bool) -> None:
        pointers = (ctypes.c_void_p * max(len(fulls), 1))(*(full.data_ptr() for full in fulls))
        error = function(
            pointers,
            ctypes.c_void_p(table.data_ptr()),
            ctypes.c_int64(len(table)),
            ctypes.c_void_p(flat.data_ptr()),
            *map(ctypes.c_int64, (flat.element_size(), int(gather), 7)),
        )
        if error is not None:
            raise RuntimeError(error.decode())

    return copy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_copies_boxes_there_and_back(
    layout: str, dtype: torch.dtype, copy_boxes: Copy
) -> None:
    fulls, table, flat = case(layout, dtype, "cpu")
    expected = flat.clone()
    copy_boxes(fulls, table, flat, True)
    gather_boxes_reference(fulls, table, expected)
    assert torch.equal(flat, expected)

    twins = [torch.empty_strided(f.shape, f.stride(), dtype=dtype).copy_(f) for f in fulls]
    flat.mul_(2)
    copy_boxes(fulls, table, flat, False)
    scatter_boxes_reference(flat, table, twins)
    assert all(map(torch.equal, fulls, twins))
