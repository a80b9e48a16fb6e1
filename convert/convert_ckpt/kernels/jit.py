"""Kernels as machine code: compiled by LLVM at the first use on a machine, kept on disk for every later start.

Loading what was kept takes milliseconds. It is looked up by the processor, the LLVM and the text of this folder,
so that no edit, upgrade or other machine ever meets code that is not its own.
"""

import contextlib
import ctypes
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from convert_ckpt.kernels.ir import write_function

_HERE = Path(__file__).parent
_DIGEST_NBYTES = 32


class Kernel:
    """A native function of ``n_arguments`` 64-bit integers, some of them addresses, run without the interpreter lock.

    write(code, *arguments) writes its instructions (convert_ckpt.kernels.ir). No two kernels share a ``name``.
    """

    def __init__(self, name: str, n_arguments: int, write: Callable[..., None]):
        self._name = name
        self._n_arguments = n_arguments
        self._write = write
        self._function: Callable[..., None] | None = None
        self._loading = threading.Lock()

    def __call__(self, *arguments: int) -> None:
        if self._function is None:
            with self._loading:
                self._function = self._function or self._load()
        self._function(*arguments)

    def _load(self) -> Callable[..., None]:
        machine_code = _read(self._name)
        if machine_code is None:
            machine_code = self._compile()
            _keep(self._name, machine_code)
        with _LINKING:
            engine = _engine()
            engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
            engine.finalize_object()
            address = engine.get_function_address(self._name)
        return ctypes.CFUNCTYPE(None, *[ctypes.c_uint64] * self._n_arguments)(address)

    def _compile(self) -> bytes:
        module = llvm.parse_assembly(write_function(self._name, self._n_arguments, self._write))
        machine = _target_machine()
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        passes = llvm.create_pass_builder(machine, options)
        passes.getModulePassManager().run(module, passes)
        machine_code: bytes = machine.emit_object(module)
        return machine_code


def address(array: np.ndarray) -> int:
    """Return where the bytes of a contiguous array begin."""
    assert array.flags.c_contiguous
    return array.ctypes.data


@cache
def processor() -> tuple[str, str]:
    """Return LLVM's name of this processor and what it can do, such as ``+sha``."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


_LINKING = threading.Lock()


@cache
def _target_machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = processor()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=name, features=features, opt=3, reloc="pic", codemodel="default"
    )


@cache
def _engine() -> llvm.ExecutionEngine:
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())


@cache
def _key() -> str:
    texts = [path.read_bytes() for path in sorted(_HERE.glob("*.py"))]
    return hashlib.sha256(repr((llvmlite.__version__, *processor(), texts)).encode()).hexdigest()[:16]


def _folders() -> list[Path]:
    """Return where machine code may be kept, best first."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [_HERE / "__pycache__", caches / "convert-ckpt"]


def _read(name: str) -> bytes | None:
    """Return the machine code kept for this processor, None where there is none or its bytes have changed."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            data = (folder / f"{name}-{_key()}.o").read_bytes()
            digest, machine_code = data[:_DIGEST_NBYTES], data[_DIGEST_NBYTES:]
            if hashlib.sha256(machine_code).digest() == digest:
                return machine_code
    return None


def _keep(name: str, machine_code: bytes) -> None:
    """Keep it in the first folder that can be written; where there is none it is compiled at each start."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(hashlib.sha256(machine_code).digest() + machine_code)
            Path(file.name).replace(folder / f"{name}-{_key()}.o")
            return
