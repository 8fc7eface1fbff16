"""The CUDA kernels' own source in tests/emulator: Grams, spectra, the walks of their work."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import math
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-pthread", "-fPIC", "-shared", "-DLIGHTNING_MAT_EMULATOR"]
SCALARS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# name -> (type of the elements, whether products of float32 have one TF32 term, tolerance relative
# to the largest entry)
KINDS = {
    "float64": (torch.float64, False, 1e-13),
    "float32": (torch.float32, False, 1e-5),
    "tf32": (torch.float32, True, 2e-3),
    "bfloat16": (torch.bfloat16, False, 1e-5),
    "float16": (torch.float16, False, 1e-5),
}
SMALL, LARGE = 99 * 1024, 227 * 1024  # shared memory of a block: the smallest device's, the largest

Piece = tuple[int, int, int, int, int]  # unit, r0, r1, c0, c1
Block = Tensor | tuple[Tensor, Tensor]  # [S, R, C], or a [S, T, C] and b [S, T, R]


# ---- The library ---------------------------------------------------------------------------------


class GramCase(ctypes.Structure):
    """Mirrors the structure in tests/emulator/run.cpp."""

    _fields_ = [
        ("blocks", ctypes.c_int64),
        ("block_count", ctypes.c_int64),
        ("pieces", ctypes.c_int64),
        ("piece_count", ctypes.c_int64),
        ("shares", ctypes.c_int64),
        ("targets", ctypes.c_int64),
        ("target_count", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("element_type", ctypes.c_int64),
        ("gram_type", ctypes.c_int64),
        ("precision", ctypes.c_int64),
        ("shared_limit", ctypes.c_int64),
        ("grams", ctypes.c_int64),
        ("eigenvalues", ctypes.c_int64),
        ("seed", ctypes.c_int64),
        ("resident", ctypes.c_int64),
    ]


class SpectrumParams(ctypes.Structure):
    """Mirrors the structure in csrc/mntk.h."""

    _fields_ = [
        ("grams", ctypes.c_void_p),
        ("gram_type", ctypes.c_int),
        ("count", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("which", ctypes.c_void_p),
        ("eigenvalues", ctypes.c_void_p),
        ("largest", ctypes.c_void_p),
        ("smallest", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workers", ctypes.c_int64),
    ]


def compiler() -> str:
    """A C++20 compiler, or skips."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if sys.platform != "linux" or found is None:
        pytest.skip("the emulator needs Linux and a C++ compiler (g++, or CXX)")
    probe = [found, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    result = subprocess.run(probe, input="#include <concepts>", text=True, capture_output=True)
    if result.returncode != 0:
        pytest.skip(f"the emulator needs C++20, which {found} does not compile")
    return found


@pytest.fixture(scope="session")
def call(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Calls a function of the library, which is compiled once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    library = folder / "emulator.so"
    # EMULATOR_FLAGS: -fsanitize=thread, for example.
    command = [compiler(), *FLAGS, *os.environ.get("EMULATOR_FLAGS", "").split()]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulator'}"]
    command += [str(ROOT / "tests" / "emulator" / "run.cpp"), "-o", str(library)]
    with (folder / "emulator.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
    loaded = ctypes.CDLL(str(library))

    def call(name: str, *arguments: int | np.ndarray | Tensor | ctypes.Structure) -> None:
        function = getattr(loaded, name)
        function.restype = ctypes.c_char_p
        error = function(
            *(ctypes.c_int64(x) if isinstance(x, int) else place(x) for x in arguments)
        )
        if error is not None:
            raise RuntimeError(error.decode())

    return call


def place(x: np.ndarray | Tensor | ctypes.Structure) -> ctypes.c_void_p:
    if isinstance(x, ctypes.Structure):
        return ctypes.c_void_p(ctypes.addressof(x))
    return ctypes.c_void_p(x.ctypes.data if isinstance(x, np.ndarray) else x.data_ptr())


# ---- Problems and their reference ----------------------------------------------------------------


@dataclass
class Problem:
    """Blocks, what each unit owns of each block, and how many units there are."""

    blocks: Sequence[Block]
    pieces: Sequence[Sequence[Piece]]
    units: int
    one_term: bool = False
    gram_type: torch.dtype = torch.float32
    shared: int = SMALL
    seed: int = 0
    resident: int = 1
    samples: int = field(init=False)

    def __post_init__(self):
        first = self.blocks[0]
        self.samples = len(first if isinstance(first, Tensor) else first[0])

    def gradient(self, block: int) -> np.ndarray:
        """[S, R, C] in float64, rounded to the elements' type as the kernel's operands are."""
        values = self.blocks[block]
        if not isinstance(values, Tensor):
            a, b = values
            values = torch.einsum("str,stc->src", b.double(), a.double())
            if a.dtype in (torch.bfloat16, torch.float16) and self.gram_type == torch.float32:
                values = values.to(a.dtype)
        return values.double().numpy()

    def grams(self) -> np.ndarray:
        """The definition, in float64."""
        result = np.zeros((self.units, self.samples, self.samples))
        for block, pieces in enumerate(self.pieces):
            values = self.gradient(block)
            for unit, r0, r1, c0, c1 in pieces:
                part = values[:, r0:r1, c0:c1].reshape(self.samples, -1)
                result[unit] += part @ part.T
        return result


def block_words(block: Block) -> list[int]:
    """What csrc/mntk.h's Block holds."""
    if isinstance(block, Tensor):
        return [block.data_ptr(), *block.stride(), *[0] * 9]
    a, b = block
    return [0, 0, 0, 0, a.data_ptr(), b.data_ptr(), *a.stride(), *b.stride(), a.shape[1]]


def words(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, width)


@dataclass
class Result:
    grams: np.ndarray  # [units, S, S]
    eigenvalues: np.ndarray  # [units, S]


def launch(
    call: Callable[..., None],
    problem: Problem,
    blocks: Sequence[int] | None = None,
    into: Tensor | None = None,
    solve: bool = True,
) -> Result:
    """One launch over some of the blocks; Grams start at zero unless there are some to add to."""
    chosen = range(len(problem.blocks)) if blocks is None else blocks
    pieces, shares, targets = [], [], []
    for unit in range(problem.units):
        first_share = len(shares)
        for block in chosen:
            owned = [p for p in problem.pieces[block] if p[0] == unit]
            if owned:
                shares.append((block, len(pieces), len(pieces) + len(owned)))
                pieces += [(len(targets), *p[1:]) for p in owned]
        fresh = int(into is None)
        # The first Gram and the last row belong to nobody.
        slot, row = problem.units - unit, problem.units - 1 - unit if solve else -1
        targets.append((slot, first_share, len(shares), fresh, row))
    size = problem.samples
    grams = into
    if grams is None:
        grams = torch.full((problem.units + 1, size, size), math.nan, dtype=problem.gram_type)
    eigenvalues = torch.full((problem.units + 1, size), math.nan, dtype=torch.float64)
    elements = problem.blocks[0]
    element_type = (elements if isinstance(elements, Tensor) else elements[0]).dtype
    tables = [
        words([block_words(b) for b in problem.blocks], 13),
        words(pieces, 5),
        words(shares, 3),
        words(targets, 5),
    ]
    case = GramCase(
        blocks=tables[0].ctypes.data,
        block_count=len(problem.blocks),
        pieces=tables[1].ctypes.data,
        piece_count=len(pieces),
        shares=tables[2].ctypes.data,
        targets=tables[3].ctypes.data,
        target_count=len(targets),
        samples=size,
        element_type=SCALARS.index(element_type),
        gram_type=SCALARS.index(problem.gram_type),
        precision=int(problem.one_term),
        shared_limit=problem.shared,
        grams=grams.data_ptr(),
        eigenvalues=eigenvalues.data_ptr(),
        seed=problem.seed,
        resident=problem.resident,
    )
    call("run_gram", case)
    assert into is not None or grams[0].isnan().all()
    assert eigenvalues[-1].isnan().all()
    return Result(grams.double().numpy()[:0:-1], eigenvalues.numpy()[-2::-1])


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_grams(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    scale = max(np.abs(expected).max(initial=0.0), 1e-300)
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(found, found.transpose(0, 2, 1))


def assert_spectra(result: Result, tolerance: float = 1e-12) -> None:
    expected = np.linalg.eigvalsh(result.grams)[:, ::-1]
    scale = np.maximum(np.abs(expected).max(axis=1, keepdims=True, initial=0.0), 1e-300)
    np.testing.assert_allclose(result.eigenvalues / scale, expected / scale, rtol=0, atol=tolerance)
    assert (np.diff(result.eigenvalues) <= 0).all()


# Two blocks; unit 0 owns rows and a column, unit 1 two pieces of one block, unit 3 nothing.
SIZES = [(7, 36), (5, 3)]
PIECES: list[list[Piece]] = [
    [(0, 0, 3, 0, 36), (1, 3, 5, 0, 36), (1, 6, 7, 4, 9)],
    [(0, 0, 5, 0, 1), (2, 0, 2, 1, 3), (2, 4, 5, 1, 3), (2, 3, 3, 0, 3)],
]


def mixed(samples: int, kind: str = "float32", **options: object) -> Problem:
    dtype, one_term, _ = KINDS[kind]
    blocks = [normal(samples, *size, dtype=dtype, seed=k) for k, size in enumerate(SIZES)]
    gram_type = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(blocks, PIECES, 4, one_term=one_term, gram_type=gram_type, **options)


# ---- The emulator itself -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "float16"])
def test_products_of_a_warp(call, kind):
    depth = 8 if kind == "tf32" else 16
    dtype = KINDS[kind][0]
    a, b = normal(16, depth, seed=1).to(dtype).float(), normal(depth, 8, seed=2).to(dtype).float()
    if kind == "tf32":
        a, b = a.bfloat16().float(), b.bfloat16().float()
    d = torch.full((16, 8), math.nan)
    call("run_mma", SCALARS.index(dtype), a, b, d)
    torch.testing.assert_close(d, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


# In the order of run.cpp's Mistake: what is said about it.
MISTAKES = {
    "none": "",
    "return": "63 of 64 threads wait at __syncthreads .*, 1 threads of the block have returned",
    "other line": "waits at __syncthreads .* while others wait at __syncthreads",
    "lane": "while others wait at __shfl_xor_sync|of 32 threads wait at __shfl_xor_sync",
    "memory": "wrote behind its shared memory of 1024 bytes",
    "alignment": "load_16 from an unaligned address",
    "copy": "returns while its copies are under way",
}


@pytest.mark.parametrize("resident", [1, 3])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported(call, mistake, resident):
    total = torch.zeros(1)
    number = list(MISTAKES).index(mistake)
    if mistake == "none":
        for seed in range(3):
            call("run_faulty", number, seed, resident, total)
            assert total.item() == 8 * 64
    else:
        with pytest.raises(RuntimeError, match=MISTAKES[mistake]):
            call("run_faulty", number, 0, resident, total)


# ---- Grams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [2, 3, 16, 17, 33, 63, 64, 65, 130])
def test_gram_of_any_number_of_samples(call, samples, kind):
    problem = mixed(samples, kind, seed=samples)
    result = launch(call, problem, solve=samples <= 33)
    assert_grams(result.grams, problem.grams(), KINDS[kind][2])
    if samples <= 33:
        assert_spectra(result)


def in_memory(values: Tensor, name: str) -> Tensor:
    """The same values, laid out in another way."""
    samples, rows, columns = values.shape
    if name == "contiguous":
        return values.clone()
    if name == "unaligned":
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    if name == "padded rows":
        return torch.cat([values, values], dim=2)[:, :, :columns]
    if name == "second half":
        return torch.cat([values, values], dim=2)[:, :, columns:]
    if name == "every second":
        return torch.stack([values, -values], dim=-1)[..., 0]
    if name == "expanded":
        return values[:, :1].expand(samples, rows, columns)
    order = [int(c) for c in name]
    inverse = [order.index(d) for d in range(3)]
    return values.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(8, 24), (5, 7)], ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        *("contiguous", "unaligned", "padded rows", "second half", "every second", "expanded"),
        *("021", "102", "120", "201", "210"),
    ],
)
def test_gram_of_any_strides(call, layout, size, kind):
    dtype, _, tolerance = KINDS[kind]
    rows, columns = size
    block = in_memory(normal(18, rows, columns, dtype=dtype), layout)
    middle = columns // 3
    pieces = [
        (0, 0, rows - 1, 0, columns),
        (1, rows - 1, rows, 0, middle),
        (2, rows - 1, rows, middle, columns),
    ]
    problem = Problem([block], [pieces], 3)
    result = launch(call, problem, solve=False)
    assert_grams(result.grams, problem.grams(), tolerance)


PATTERNS: dict[str, tuple[int, int, list[Piece]]] = {
    "rows": (9, 8, [(u, 3 * u, 3 * u + 3, 0, 8) for u in range(3)]),
    "columns": (8, 9, [(u, 0, 8, 3 * u, 3 * u + 3) for u in range(3)]),
    "filters": (7, 27, [(u, u, u + 1, 0, 27) for u in range(7)]),
    "biases": (7, 1, [(u, u, u + 1, 0, 1) for u in range(7)]),
    "both": (6, 8, [(0, 0, 3, 0, 4), (1, 0, 3, 4, 8), (2, 3, 6, 0, 4), (3, 3, 6, 4, 8)]),
    "several": (9, 7, [(1, 0, 2, 0, 7), (1, 4, 6, 0, 3), (1, 8, 9, 6, 7), (3, 2, 4, 1, 6)]),
    "empty pieces": (5, 7, [(0, 2, 2, 0, 7), (0, 0, 1, 3, 3), (1, 0, 5, 0, 7)]),
    "no pieces": (5, 7, []),
    "no columns": (5, 0, [(0, 0, 5, 0, 0)]),
}


@pytest.mark.parametrize("kind", ["float32", "float16", "float64"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gram_of_any_pieces(call, pattern, kind):
    dtype, _, tolerance = KINDS[kind]
    rows, columns, pieces = PATTERNS[pattern]
    units = max((p[0] for p in pieces), default=0) + 1
    block = normal(5, rows, columns, dtype=dtype)
    gram_type = torch.float64 if kind == "float64" else torch.float32
    problem = Problem([block], [pieces], units, gram_type=gram_type)
    result = launch(call, problem)
    assert_grams(result.grams, problem.grams(), tolerance)
    assert_spectra(result)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_gram_in_float64_of_narrow_elements(call, kind):
    problem = mixed(5, kind)
    problem.gram_type = torch.float64
    result = launch(call, problem)
    assert_grams(result.grams, problem.grams(), 1e-14)
    assert_spectra(result)


@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "padded rows", "on chip"])
@pytest.mark.parametrize("size", [(1, 2500), (1300, 3), (3, 1024), (60, 40)], ids=str)
def test_gram_of_several_items(call, size, layout, kind):
    dtype, one_term, tolerance = KINDS[kind]
    rows, columns = size
    if layout == "on chip":
        block = normal(6, 1, columns, dtype=dtype), normal(6, 1, rows, dtype=dtype, seed=1)
    else:
        block = in_memory(normal(6, rows, columns, dtype=dtype), layout)
    problem = Problem([block], [[(0, 0, rows, 0, columns)]], 1, one_term=one_term)
    assert_grams(launch(call, problem, solve=False).grams, problem.grams(), tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("samples", [6, 40])
def test_gram_formed_on_chip(call, samples, tokens, kind):
    dtype, one_term, tolerance = KINDS[kind]
    if dtype in (torch.bfloat16, torch.float16) and tokens > 1:
        tolerance = 1e-4  # a sum that float64 and float32 round to different neighbours
    blocks = []
    for k, (rows, columns) in enumerate([(5, 32), (4, 7)]):
        a = normal(samples, tokens, columns, dtype=dtype, seed=2 * k)
        b = normal(samples, tokens, rows, dtype=dtype, seed=2 * k + 1)
        blocks.append((a, b if k == 0 else in_memory(b, "021")))
    pieces = [[(0, 0, 2, 0, 32), (1, 2, 5, 0, 13), (2, 2, 5, 13, 32)], [(1, 0, 4, 1, 6)]]
    gram_type = torch.float64 if kind == "float64" else torch.float32
    problem = Problem(blocks, pieces, 3, one_term=one_term, gram_type=gram_type)
    result = launch(call, problem, solve=samples == 6)
    assert_grams(result.grams, problem.grams(), tolerance)


@pytest.mark.parametrize("layout", ["unaligned", "every second", "120", "021"])
def test_gram_formed_on_chip_from_any_strides(call, layout):
    a, b = normal(7, 3, 12), normal(7, 3, 5, seed=1)
    pieces = [[(0, 0, 3, 0, 12), (1, 3, 5, 4, 12), (2, 3, 5, 0, 4)]]
    problem = Problem([(in_memory(a, layout), in_memory(b, layout))], pieces, 3)
    assert_grams(launch(call, problem).grams, problem.grams(), 1e-5)


def test_gram_of_blocks_in_memory_and_on_chip(call):
    blocks = [normal(9, 4, 12), (normal(9, 2, 6, seed=1), normal(9, 2, 3, seed=2))]
    pieces = [[(0, 0, 4, 0, 8), (1, 0, 4, 8, 12)], [(0, 0, 3, 0, 2), (1, 0, 3, 2, 6)]]
    problem = Problem(blocks, pieces, 2)
    assert_grams(launch(call, problem).grams, problem.grams(), 1e-5)


def before_guard(values: Tensor) -> Tensor:
    """The same values, and behind them memory that nobody can read."""
    size = values.numel() * values.element_size()
    used = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, used + mmap.PAGESIZE)
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=used - size)
    copy.copy_(values.flatten())
    guard = ctypes.c_void_p(copy.data_ptr() + size)
    assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return copy.view(values.shape)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("samples", [3, 17, 33, 65])
def test_nothing_behind_a_block_is_read(call, samples, kind):
    # A kernel that does read there ends the process.
    dtype = KINDS[kind][0]
    blocks = [
        before_guard(normal(samples, 3, 40, dtype=dtype)),
        before_guard(normal(samples, 5, 7, dtype=dtype)),
        tuple(before_guard(normal(samples, 2, size, dtype=dtype)) for size in (24, 3)),
        tuple(before_guard(normal(samples, 2, size, dtype=dtype)) for size in (5, 3)),
    ]
    pieces = [[(0, 0, 3, 0, 40)], [(1, 0, 5, 0, 7)], [(0, 0, 3, 0, 24)], [(1, 0, 3, 0, 5)]]
    problem = Problem(blocks, pieces, 2)
    tolerance = 1e-4 if kind == "bfloat16" else 1e-5
    assert_grams(launch(call, problem, solve=False).grams, problem.grams(), tolerance)


# ---- One launch or several, any schedule ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("samples", [5, 20])
def test_adds_to_what_is_there(call, samples, kind):
    problem = mixed(samples, kind)
    before = normal(5, samples, samples, dtype=problem.gram_type, seed=3)
    before += before.transpose(1, 2).clone()
    expected = before.double().numpy()[:0:-1] + problem.grams()
    result = launch(call, problem, into=before.clone(), solve=False)
    assert_grams(result.grams, expected, KINDS[kind][2])


@pytest.mark.parametrize("samples", [5, 66])
@pytest.mark.parametrize("kind", ["float32", "float16", "float64"])
def test_launches_can_be_split(call, kind, samples):
    problem = mixed(samples, kind, shared=LARGE)
    whole = launch(call, problem)
    grams = torch.zeros(5, samples, samples, dtype=problem.gram_type)
    first = launch(call, problem, blocks=[0], into=grams, solve=False)
    assert np.isnan(first.eigenvalues).all()
    both = launch(call, problem, blocks=[1], into=grams)
    np.testing.assert_array_equal(whole.grams, both.grams)
    np.testing.assert_array_equal(whole.eigenvalues, both.eigenvalues)


@pytest.mark.parametrize("resident", [1, 2, 5])
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_any_schedule_gives_the_same_bits(call, kind, resident):
    dtype, _, tolerance = KINDS[kind]
    blocks = [normal(17, 3, 2600, dtype=dtype), normal(17, 2, 1500, dtype=dtype, seed=1)]
    pieces = [
        [(0, 0, 2, 0, 2600), (1, 2, 3, 0, 1300), (2, 2, 3, 1300, 2600)],
        [(0, 0, 1, 0, 1500), (1, 1, 2, 0, 1500)],
    ]
    gram_type = torch.float64 if kind == "float64" else torch.float32
    results = [
        launch(call, Problem(blocks, pieces, 3, gram_type=gram_type, seed=seed, resident=resident))
        for seed in (range(3) if resident > 1 else (0, 9))
    ]
    assert_grams(
        results[0].grams, Problem(blocks, pieces, 3, gram_type=gram_type).grams(), tolerance
    )
    for one, other in itertools.pairwise(results):
        np.testing.assert_array_equal(one.grams, other.grams)
        np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)


# ---- Spectra -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "shared", "tolerance"),
    [(2, SMALL, 1e-12), (33, SMALL, 1e-12), (64, SMALL, 1e-12), (128, SMALL, 1e-5)],
)
def test_completed_units_are_solved(call, samples, shared, tolerance):
    problem = mixed(samples, shared=shared)
    result = launch(call, problem)
    assert_grams(result.grams, problem.grams(), 1e-5)
    assert_spectra(result, tolerance)


def test_float64_grams_are_solved(call):
    problem = mixed(40, "float64", shared=LARGE)
    assert_spectra(launch(call, problem), 1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_unit(call, kind, bad):
    problem = mixed(18, kind)
    clean = launch(call, problem)
    problem.blocks[0][3, 4, 35] = bad  # unit 1's, next to unit 0's elements
    result = launch(call, problem)
    others = [0, 2, 3]
    np.testing.assert_array_equal(result.grams[others], clean.grams[others])
    np.testing.assert_array_equal(result.eigenvalues[others], clean.eigenvalues[others])
    assert not np.isfinite(result.grams[1, 3]).any()
    assert np.isfinite(np.delete(np.delete(result.grams[1], 3, 0), 3, 1)).all()
    assert np.isnan(result.eigenvalues[1]).all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_neighbours_in_memory_are_not_read_into_a_unit(call, kind):
    dtype, _, tolerance = KINDS[kind]
    block = torch.full((19, 6, 48), math.nan, dtype=dtype)
    block[:, 2:4, 8:40] = normal(19, 2, 32, dtype=dtype)
    problem = Problem([block], [[(0, 2, 4, 8, 24), (1, 2, 4, 24, 39)]], 2)
    assert_grams(launch(call, problem, solve=False).grams, problem.grams(), tolerance)


def hard_grams(size: int, dtype: torch.dtype) -> Tensor:
    factors = normal(5, size, size, dtype=torch.float64)
    factors[1] = factors[1, :1]  # rank one
    factors[2] *= torch.logspace(0, -8, size, dtype=torch.float64)[:, None]
    factors[3] = torch.eye(size, dtype=torch.float64)
    factors[4] = 0
    grams = (factors @ factors.mT).to(dtype)
    return torch.tril(grams) + torch.tril(grams, -1).mT


def spectrum(
    call: Callable[..., None], grams: Tensor, shared: int, which: np.ndarray | None, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues of some of the Grams, and the largest and the smallest alone."""
    count, size = len(grams) if which is None else len(which), grams.shape[-1]
    eigenvalues = np.full((rows, size), math.nan)
    extremes = np.full((2, rows), math.nan)
    for all_of_them in (True, False):
        params = SpectrumParams(
            grams=grams.data_ptr(),
            gram_type=SCALARS.index(grams.dtype),
            count=count,
            samples=size,
            which=None if which is None else which.ctypes.data,
            eigenvalues=eigenvalues.ctypes.data if all_of_them else None,
            largest=None if all_of_them else extremes[0].ctypes.data,
            smallest=None if all_of_them else extremes[1].ctypes.data,
            workspace=None,
            workers=2,
        )
        call("run_spectrum", params, shared)
    return eigenvalues, extremes[0], extremes[1]


@pytest.mark.parametrize(
    ("size", "dtype", "shared", "tolerance"),
    [
        pytest.param(24, torch.float32, SMALL, 1e-13, id="on chip, float32"),
        pytest.param(24, torch.float64, SMALL, 1e-13, id="on chip, float64"),
        pytest.param(40, torch.float32, 14 * 1024, 1e-6, id="on chip, float32 basis"),
        pytest.param(19, torch.float32, 0, 1e-13, id="global memory, float32"),
        pytest.param(19, torch.float64, 0, 1e-13, id="global memory, float64"),
        pytest.param(133, torch.float32, SMALL, 1e-13, id="global memory, large"),
    ],
)
def test_spectra_of_hard_grams(call, size, dtype, shared, tolerance):
    grams = hard_grams(size, dtype)
    if size > 128:
        grams = grams[2:3]
    eigenvalues, largest, smallest = spectrum(call, grams, shared, None, len(grams))
    assert_spectra(Result(grams.double().numpy(), eigenvalues), tolerance)
    np.testing.assert_allclose(largest, eigenvalues[:, 0], rtol=tolerance)
    scale = eigenvalues[:, 0]
    np.testing.assert_allclose(smallest, eigenvalues[:, -1], rtol=0, atol=tolerance * scale.max())


@pytest.mark.parametrize("shared", [SMALL, 0], ids=["on chip", "global memory"])
def test_spectra_of_some_grams(call, shared):
    grams = normal(4, 9, 9, seed=1)
    grams = grams @ grams.mT
    which = words([(3, 0), (0, 2), (2, 4)], 2)
    eigenvalues, largest, smallest = spectrum(call, grams, shared, which, 5)
    expected = np.linalg.eigvalsh(grams.double().numpy())[:, ::-1]
    for gram, row in which.tolist():
        np.testing.assert_allclose(eigenvalues[row], expected[gram], rtol=1e-5, atol=1e-5)
        assert eigenvalues[row, [0, -1]] == pytest.approx([largest[row], smallest[row]])
    for found in (eigenvalues, largest, smallest):
        assert np.isnan(found[[1, 3]]).all()


# ---- The work's walks ----------------------------------------------------------------------------


def plan(
    call: Callable[..., None],
    samples: int,
    pieces: list[Piece],
    shares: list[tuple[int, ...]],
    targets: list[tuple[int, ...]],
) -> list[np.ndarray]:
    """Items, groups and cells, one per row."""
    room = 40_000
    tables = [np.full((room, width), -1, dtype=np.int64) for width in (6, 4, 4)]
    counts = np.zeros(3, dtype=np.int64)
    given = [words(pieces, 5), words(shares, 3), words(targets, 5)]
    call("run_plan", samples, *given, len(targets), room, *tables, counts)
    return [table[:count] for table, count in zip(tables, counts, strict=True)]


@pytest.mark.parametrize("samples", [2, 64, 65, 300])
def test_plan_covers_every_element_once_per_tile(call, samples):
    pieces = [(0, 0, 3, 0, 700), (0, 4, 5, 0, 9), (0, 5, 5, 0, 9), (1, 0, 40, 2, 90)]
    pieces += [(3, 0, 4096, 0, 2048)]
    sizes = [(r1 - r0) * (c1 - c0) for _, r0, r1, c0, c1 in pieces]
    shares = [(0, 0, 3), (1, 3, 4), (1, 1, 2), (0, 4, 5)]
    targets = [(0, 0, 1, 1, 0), (1, 1, 3, 1, 1), (2, 3, 3, 1, 2), (3, 3, 4, 0, -1)]
    items, groups, cells = plan(call, samples, pieces, shares, targets)
    side = math.ceil(samples / 64)
    tiles = side * side if side > 1 else 1
    assert len(cells) == len(targets) * tiles
    # Groups follow each other without a gap within cells, and items within groups.
    for inner, outer in [(items, groups), (groups, cells)]:
        assert outer[0, 0] == 0
        assert outer[-1, 1] == len(inner)
        np.testing.assert_array_equal(outer[1:, 0], outer[:-1, 1])
    for number, (first, last, target, tile) in enumerate(cells.tolist()):
        assert (target, tile) == divmod(number, tiles)
        # (share, block, piece) -> elements so far: in order, without a gap.
        reached: dict[tuple[int, int, int], int] = {}
        for group in range(first, last):
            assert groups[group, 2] == number
            for item in items[groups[group, 0] : groups[group, 1]].tolist():
                start, elements, piece, block, *rest = item
                assert rest == [tile, group]
                key = (int(groups[group, 3]), block, piece)
                assert start == reached.get(key, 0)
                reached[key] = start + elements
        if target == 2:  # owns nothing
            assert list(reached.values()) == [0]
            continue
        expected = [
            ((share, shares[share][0], piece), sizes[piece])
            for share in range(*targets[target][1:3])
            for piece in range(*shares[share][1:])
            if sizes[piece] > 0
        ]
        assert list(reached.items()) == expected


@pytest.mark.parametrize("samples", [1, 16, 17, 32, 33, 64, 65, 128, 129, 300])
def test_tiles_cover_the_lower_triangle_once(call, samples):
    side = math.ceil(samples / 64)
    covered = np.zeros((side * 64, side * 64), dtype=int)
    for tile in range(side * side if side > 1 else 1):
        rows, columns = (np.full(40 * 128, -1, dtype=np.int64) for _ in range(2))
        call("run_places", samples, tile, rows, columns)
        used = rows >= 0
        np.add.at(covered, (rows[used], columns[used]), 1)
    lower = np.tril(np.ones((samples, samples), dtype=bool))
    assert (covered[:samples, :samples][lower] == 1).all()
    assert covered.max() == 1


@pytest.mark.parametrize("strides", [(10, 1), (1, 10), (16, 1), (2, 1), (0, 0), (0, 1), (7, 3)])
@pytest.mark.parametrize(
    "piece", [(0, 0, 6, 0, 10), (0, 1, 4, 3, 8), (0, 2, 3, 0, 10), (0, 0, 6, 9, 10)]
)
@pytest.mark.parametrize("cuts", [1, 3])
def test_walks_visit_every_element_of_a_piece_once(call, piece, strides, cuts):
    block = words([[1, 1000, *strides, *[0] * 9]], 13)
    _, r0, r1, c0, c1 = piece
    elements = (r1 - r0) * (c1 - c0)
    visited: list[int] = []
    bounds = [elements * cut // cuts for cut in range(cuts + 1)]
    for first, last in itertools.pairwise(bounds):
        for step in (1, 2, 5, 16):
            found = [np.full(last - first, -1, dtype=np.int64) for _ in range(3)]
            call("run_walk", block, words([piece], 5), first, last - first, step, *found)
            np.testing.assert_array_equal(found[0], found[1])
            np.testing.assert_array_equal(found[0], found[2])
        visited += found[0].tolist()
    expected = [r * strides[0] + c * strides[1] for r in range(r0, r1) for c in range(c0, c1)]
    assert sorted(visited) == sorted(expected)


# ---- The small kernels ---------------------------------------------------------------------------


def structure(**fields: int | np.ndarray | type) -> ctypes.Structure:
    """A structure of csrc/ with these fields, in order: pointers, numbers, or the type's tag."""
    kinds = {name: ctypes.c_int64 for name in fields}
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            kinds[name] = ctypes.c_void_p
        elif isinstance(value, np.dtype):
            kinds[name] = ctypes.c_int

    class Params(ctypes.Structure):
        _fields_ = list(kinds.items())

    def word(value):
        if isinstance(value, np.ndarray):
            return value.ctypes.data
        return (0 if value == np.float64 else 1) if isinstance(value, np.dtype) else value

    return Params(*(word(value) for value in fields.values()))


both_types = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@both_types
@pytest.mark.parametrize("samples", [2, 5, 130])
def test_the_last_sum_of_products_of_tokens(samples, dtype, call):
    rng = np.random.default_rng(samples)
    tokens, first, last = 3, samples // 3, samples
    slots, begins = np.array([2, 0]), np.array([0, 1, 4])
    products = rng.standard_normal((last - first, 4, last, tokens)).astype(dtype)
    b = rng.standard_normal((4, samples, tokens)).astype(dtype)
    grams = np.ones((3, samples, samples), dtype)
    expected = grams.astype(np.float64)
    for run, slot in enumerate(slots):
        r = slice(begins[run], begins[run + 1])
        added = np.einsum("sruk,ruk->su", products[:, r].astype(np.float64), b[r, :last])
        for s, u in np.ndindex(*added.shape):
            if u <= first + s:
                expected[slot, first + s, u] += added[s, u]
                expected[slot, u, first + s] += added[s, u] * (u != first + s)
    params = structure(
        products=products,
        b=b,
        first=first,
        last=last,
        rows=4,
        tokens=tokens,
        samples=samples,
        slots=slots,
        begins=begins,
        runs=2,
        grams=grams,
        type=np.dtype(dtype),
    )
    call("run_ghost", params, 1)
    np.testing.assert_allclose(grams, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert (grams[1] == 1).all()


@both_types
def test_the_products_of_patches(dtype, call):
    samples, channels, size = 4, 2, 3  # 3 × 3 inputs, kernel 2 × 2, stride 1, padding 1 before
    rng = np.random.default_rng(0)
    x = rng.standard_normal((samples, channels, size, size))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 0), (1, 0)))
    places = [(h, w, i, j) for h in range(3) for w in range(3) for i in range(2) for j in range(2)]
    inside = [h + i > 0 and w + j > 0 for h, w, i, j in places]
    at = np.array(
        [
            (h + i - 1) * size + w + j - 1 if ok else -1
            for (h, w, i, j), ok in zip(places, inside, strict=True)
        ]
    )
    flat = x.reshape(samples, channels, -1)
    elements = np.ascontiguousarray(np.einsum("scp,zcq->spzq", flat, flat), dtype)
    patches = np.full((samples, 9, samples, 9), np.nan, dtype)
    params = structure(
        elements=elements,
        patches=patches,
        at=at,
        tokens=9,
        kernel=4,
        positions=9,
        samples=samples,
        first=1,
        last=3,
        type=np.dtype(dtype),
    )
    call("run_patches", params, 1)
    windows = np.stack(
        [
            padded[:, :, h : h + 2, w : w + 2].reshape(samples, -1)
            for h in range(3)
            for w in range(3)
        ],
        axis=1,
    )
    expected = np.einsum("std,zud->stzu", windows, windows)
    np.testing.assert_allclose(patches[1:3, :, :3], expected[1:3, :, :3], rtol=0, atol=1e-5)
    assert np.isnan(patches[0]).all()
    assert np.isnan(patches[3]).all()


@both_types
@pytest.mark.parametrize("columns", [1, 128, 200])
def test_the_rows_of_an_embedding(columns, dtype, call):
    rng = np.random.default_rng(columns)
    samples, tokens, rows, first = 3, 9, 4, 2
    index = rng.integers(-1, 8, (samples, tokens))
    values = rng.standard_normal((samples, tokens, columns)).astype(dtype)
    table = np.ones((samples, rows, columns), dtype)
    expected = table.astype(np.float64)
    for s, t in np.ndindex(samples, tokens):
        if first <= index[s, t] < first + rows:
            expected[s, index[s, t] - first] += values[s, t]
    params = structure(
        table=table,
        values=values,
        index=index,
        samples=samples,
        rows=rows,
        columns=columns,
        tokens=tokens,
        first=first,
        type=np.dtype(dtype),
    )
    call("run_rows", params, 1)
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-5)
