"""What kernels are written with does what numpy's operators do; a process compiles a kernel once, from memory alone."""

import doctest
import operator
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from convert_ckpt.kernels import ir, jit
from convert_ckpt.kernels.ir import F32, F64, I8, I16, I32, I64, Array, FunctionBuilder, Vector, larger, smaller
from convert_ckpt.kernels.jit import Kernel
from convert_ckpt.kernels.layouts import storage_index
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT, ROW_MAJOR, TileLayout

ELEMENTS = {"uint8": I8, "uint16": I16, "int32": I32, "uint32": I32, "uint64": I64, "float32": F32, "float64": F64}
LANES = 16
RNG = np.random.default_rng(0)
U32 = RNG.integers(0, 2**32, (2, LANES), np.uint32)
I32S = RNG.integers(-5, 5, (2, LANES), np.int32)
FLOATS = RNG.standard_normal((2, LANES), np.float32)
U16 = RNG.integers(0, 2**16, (2, LANES), np.uint16)


def apply(function: Callable, x: np.ndarray, y: np.ndarray, dtype: str, n: int = LANES) -> np.ndarray:
    """Return function(x, y) as a kernel computes it on vectors, ``n`` of ``dtype``."""

    def write(build: FunctionBuilder, x: Array, y: Array, out: Array) -> None:
        out.store(0, function(x.load(0, LANES), y.load(0, LANES)))

    out = np.zeros(n, dtype)
    Kernel(write, [ELEMENTS[str(array.dtype)] for array in (x, y, out)])(x, y, out)
    return out


def sum_of_squares(build: FunctionBuilder, out: Array, n: Vector) -> None:
    """out[0] = sum of i * i for i < n."""
    total = build.variable(build.constant(I64, 0))
    for i in build.range(n):
        total.value += i * i
    out.store(0, total.value)


def run(kernel: Kernel, n: int) -> int:
    out = np.zeros(1, np.uint64)
    kernel(out, n)
    return int(out[0])


def test_example_of_the_docstring_gives_the_bits_of_its_twin() -> None:
    done = doctest.testmod(ir, extraglobs={"np": np, "Kernel": Kernel})
    assert (done.attempted, done.failed) == (5, 0)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "floordiv", "mod", "and_", "or_"])
def test_operators_take_integers_as_unsigned(name: str) -> None:
    expected = getattr(operator, name)(*U32)
    assert np.array_equal(apply(getattr(operator, name), *U32, "uint32"), expected)


@pytest.mark.parametrize("name", ["lshift", "rshift"])
def test_shifts_fill_with_zeros(name: str) -> None:
    counts = U32[1] % 32
    assert np.array_equal(
        apply(getattr(operator, name), U32[0], counts, "uint32"), getattr(operator, name)(U32[0], counts)
    )


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv"])
def test_operators_round_floats_as_numpy_does(name: str) -> None:
    assert np.array_equal(apply(getattr(operator, name), *FLOATS, "float32"), getattr(operator, name)(*FLOATS))


@pytest.mark.parametrize("values", [I32S, FLOATS], ids=["signed", "float"])
def test_larger_and_smaller_are_maximum_and_minimum(values: np.ndarray) -> None:
    dtype = str(values.dtype)
    assert np.array_equal(apply(larger, *values, dtype), np.maximum(*values))
    assert np.array_equal(apply(smaller, *values, dtype), np.minimum(*values))


def test_a_number_beside_a_vector_fills_its_lanes() -> None:
    assert np.array_equal(
        apply(lambda x, _: (x > 0).where(x * 0.5, -1.0), *FLOATS, "float32"),
        np.where(FLOATS[0] > 0, FLOATS[0] * 0.5, np.float32(-1)),
    )


@pytest.mark.parametrize(
    ("function", "inputs", "expected"),
    [
        (lambda x, _: x.widen(I32), U16, U16[0].astype(np.uint32)),
        (lambda x, _: x.narrow(I8), U16, U16[0].astype(np.uint8)),
        (lambda x, _: x.widen(F64), FLOATS, FLOATS[0].astype(np.float64)),
        (lambda x, _: x.reinterpret(I32), FLOATS, FLOATS[0].view(np.uint32)),
        (lambda x, _: x.reinterpret(I32, LANES // 2), U16, U16[0].view(np.uint32)),
        (lambda x, y: x.join(y), U16, U16.reshape(-1)),
        (lambda x, _: x.halves()[1], U16, U16[0, LANES // 2 :]),
        (lambda x, _: x.fold(Vector.__add__, 4), U32, U32[0].reshape(4, 4).sum(0, dtype=np.uint32)),
        (lambda x, _: x.fold(larger).splat(4), FLOATS, np.full(4, FLOATS[0].max())),
    ],
    ids=["widen", "narrow", "widen-float", "reinterpret", "reinterpret-pairs", "join", "halves", "fold", "splat"],
)
def test_lanes_become_those_of_the_docstring(function: Callable, inputs: np.ndarray, expected: np.ndarray) -> None:
    assert np.array_equal(apply(function, *inputs, str(expected.dtype), len(expected)), expected)


def test_a_loop_counts_and_carries() -> None:
    kernel = Kernel(sum_of_squares, [I64])
    assert [run(kernel, n) for n in (0, 1, 5)] == [0, 0, 30]


def test_a_loop_in_a_loop_starts_anew_in_each_turn() -> None:
    def write(build: FunctionBuilder, out: Array, n_rows: Vector, n_columns: Vector) -> None:
        for row in build.range(n_rows):
            total = build.variable(build.constant(I64, 0))
            for column in build.range(n_columns):
                total.value += row * 10 + column
            out.store(row, total.value)

    out = np.zeros(3, np.uint64)
    Kernel(write, [I64])(out, 3, 4)
    assert out.tolist() == [sum(row * 10 + column for column in range(4)) for row in range(3)]


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (ROW_MAJOR, (3, 5)),
        (AITER_WEIGHT, (48, 96)),
        (AITER_SCALE, (96, 24)),
        (TileLayout("made up", (4, 2), (3,), order=(0, 4, 2, 3, 1), pad_to=(1, 1)), (24, 15)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_kernels_place_elements_where_the_layout_says(layout: TileLayout, shape: tuple[int, int]) -> None:
    def write(build: FunctionBuilder, logical: Array, stored: Array, rows: Vector, cols: Vector) -> None:
        for row in build.range(rows):
            for col in build.range(cols):
                stored.store(storage_index(layout, row, col, cols), logical.load(row * cols + col))

    logical = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    stored = np.full(shape, -1, np.int32)
    Kernel(write, [I32, I32])(logical, stored, *shape)
    assert np.array_equal(stored, layout.shuffle(torch.from_numpy(logical)).numpy())


def test_an_array_of_another_width_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        Kernel(sum_of_squares, [I64])(np.zeros(1, np.uint32), 1)


def test_threads_that_call_a_kernel_at_once_compile_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(jit, "_target_machine", lambda make=jit._target_machine: (compiled.append(1), make())[1])
    kernel = Kernel(sum_of_squares, [I64])
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda n: run(kernel, n), [5] * 8)) == [30] * 8
    assert len(compiled) == 1


def test_a_first_call_opens_no_file() -> None:
    # Machine code from disk would be code that somebody else may have written.
    script = (
        "import sys\n"
        "import numpy as np\n"
        "from convert_ckpt.kernels import fp8\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, arguments: opened.append(arguments) if event == 'open' else None)\n"
        "assert fp8.tile_maxima(np.full((1, 16), -1, np.int16), 1, 16)[0, 0] == 0x7FFF0000\n"
        "assert not opened, opened\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
