"""A kernel is compiled once in a process, from what is in memory alone."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from convert_ckpt.kernels import jit
from convert_ckpt.kernels.ir import I64, Code, Value
from convert_ckpt.kernels.jit import Kernel, address


def make_kernel() -> Kernel:
    """out[0] = sum of i * i for i < n."""

    def write(code: Code, n: Value, out: Value) -> None:
        (total,) = code.loop(n, [code.constant(I64, [0])], lambda i, sums: [sums[0] + i * i])
        code.store(total, out)

    return Kernel("sum_of_squares", 2, write)


def run(kernel: Kernel, n: int) -> int:
    out = np.zeros(1, np.uint64)
    kernel(n, address(out))
    return int(out[0])


def test_a_loop_counts_and_carries() -> None:
    kernel = make_kernel()
    assert [run(kernel, n) for n in (0, 1, 5)] == [0, 0, 30]


def test_threads_that_call_a_kernel_at_once_compile_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(jit, "_target_machine", lambda make=jit._target_machine: (compiled.append(1), make())[1])
    kernel = make_kernel()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda n: run(kernel, n), [5] * 8)) == [30] * 8
    assert len(compiled) == 1


def test_kernels_of_one_name_are_told_apart() -> None:
    def write_seven(code: Code, out: Value) -> None:
        code.store(code.constant(I64, [7]), out)

    squares, seven = make_kernel(), Kernel("sum_of_squares", 1, write_seven)
    out = np.zeros(1, np.uint64)
    seven(address(out))
    assert (run(squares, 5), int(out[0])) == (30, 7)


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
