"""Kernels as machine code of this processor, compiled by LLVM when a process first calls them.

Nothing is kept on disk: a conversion needs one kernel or two, and compiling takes 25 to 45 ms each. So no start
ever trusts machine code that somebody else could have written.
"""

import ctypes
import threading
from collections.abc import Callable

import llvmlite.binding as llvm
import numpy as np

from convert_ckpt.kernels.ir import write_function


class Kernel:
    """A native function of ``n_arguments`` 64-bit integers, some of them addresses, run without the interpreter lock.

    write(code, *arguments) writes its instructions (convert_ckpt.kernels.ir).
    """

    def __init__(self, name: str, n_arguments: int, write: Callable[..., None]):
        self._name = name
        self._n_arguments = n_arguments
        self._write = write
        self._function: Callable[..., None] | None = None
        self._compiling = threading.Lock()

    def __call__(self, *arguments: int) -> None:
        if self._function is None:
            with self._compiling:
                self._function = self._function or self._compile()
        self._function(*arguments)

    def _compile(self) -> Callable[..., None]:
        module = llvm.parse_assembly(write_function(self._name, self._n_arguments, self._write))
        target = _target_machine()
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        passes = llvm.create_pass_builder(target, options)
        passes.getModulePassManager().run(module, passes)
        self._engine = llvm.create_mcjit_compiler(module, target)  # owns the machine code
        self._engine.finalize_object()
        address = self._engine.get_function_address(self._name)
        return ctypes.CFUNCTYPE(None, *[ctypes.c_uint64] * self._n_arguments)(address)


def address(array: np.ndarray) -> int:
    """Return where the bytes of a contiguous array begin."""
    assert array.flags.c_contiguous
    return array.ctypes.data


def processor() -> tuple[str, str]:
    """Return LLVM's name of this processor and what it can do, such as ``+sha``."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _target_machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = processor()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=name, features=features, opt=3, reloc="pic", codemodel="default"
    )
