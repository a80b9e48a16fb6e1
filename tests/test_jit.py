"""Kept machine code is found again, and never where it does not belong."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert_ckpt.kernels import jit
from convert_ckpt.kernels.ir import I64, Code, Value
from convert_ckpt.kernels.jit import Kernel, address


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(jit, "_folders", lambda: [tmp_path / "kept"])
    return tmp_path / "kept"


def make_kernel(name: str) -> Kernel:
    """out[0] = sum of i * i for i < n."""

    def write(code: Code, n: Value, out: Value) -> None:
        (total,) = code.loop(n, [code.constant(I64, [0])], lambda i, sums: [sums[0] + i * i])
        code.store(total, out)

    return Kernel(name, 2, write)


def run(kernel: Kernel, n: int) -> int:
    out = np.zeros(1, np.uint64)
    kernel(n, address(out))
    return int(out[0])


def test_a_loop_counts_and_carries(folder: Path) -> None:
    kernel = make_kernel("test_loop")
    assert [run(kernel, n) for n in (0, 1, 5)] == [0, 0, 30]


def test_machine_code_is_kept_and_used_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(make_kernel("test_kept"), 5)
    (kept,) = folder.iterdir()
    before = kept.stat()
    monkeypatch.setattr(Kernel, "_compile", lambda self: pytest.fail("compiled again"))
    assert jit._read("test_kept") is not None
    assert kept.stat() == before


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 5000], ids=len)
def test_damaged_code_is_compiled_again(folder: Path, damage: bytes) -> None:
    name = f"test_damaged_{len(damage)}"
    run(make_kernel(name), 1)
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage)
    assert jit._read(name) is None
    jit._keep(name, whole[32:])
    assert kept.read_bytes() == whole
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert jit._read(name) is None


def test_another_processor_has_code_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(make_kernel("test_processor"), 1)
    monkeypatch.setattr(jit, "_key", jit._key.__wrapped__)
    monkeypatch.setattr(jit, "processor", lambda: ("other", "+sha"))
    assert jit._read("test_processor") is None


def test_kernels_run_where_nothing_can_be_kept() -> None:
    script = (
        "import numpy as np\n"
        "from convert_ckpt.kernels import fp8, jit\n"
        "jit._folders = lambda: [jit.Path('/dev/null/no')]\n"
        "assert fp8.tile_maxima(np.full((1, 16), -1, np.int16), 1, 16)[0, 0] == 0x7FFF0000\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
