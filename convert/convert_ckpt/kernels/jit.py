"""Kernels as machine code of this processor, compiled by LLVM when a process first calls them.

Nothing is kept on disk: a conversion needs one kernel or two, and compiling takes 25 to 45 ms each. So no start
ever trusts machine code that somebody else could have written.
"""

import ctypes
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from convert_ckpt.kernels.ir import nbytes_of, write_function


class Kernel:
    """A native function of arrays and then integers, which runs without the interpreter lock.

    write(build, *arrays, *integers) writes its instructions, see ir.py. ``elements`` are the types of what the arrays
    hold. Call it with contiguous arrays of numbers as wide, and with integers from 0 to 2^64 - 1.
    """

    def __init__(self, write: Callable[..., None], elements: Sequence[ir.Type]):
        self._write = write
        self._elements = elements
        self._n_integers = len(inspect.signature(write).parameters) - 1 - len(elements)
        self._function: Callable[..., None] | None = None
        self._compiling = threading.Lock()

    def __call__(self, *arguments: Any) -> None:
        if self._function is None:
            with self._compiling:
                self._function = self._function or self._compile()
        arrays, integers = arguments[: len(self._elements)], arguments[len(self._elements) :]
        self._function(*map(_address, arrays, self._elements), *integers)

    def _compile(self) -> Callable[..., None]:
        module = llvm.parse_assembly(write_function(self._write, self._elements, self._n_integers))
        target = _target_machine()
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        passes = llvm.create_pass_builder(target, options)
        passes.getModulePassManager().run(module, passes)
        self._engine = llvm.create_mcjit_compiler(module, target)  # owns the machine code
        self._engine.finalize_object()
        n_arguments = len(self._elements) + self._n_integers
        address = self._engine.get_function_address("kernel")
        return ctypes.CFUNCTYPE(None, *[ctypes.c_uint64] * n_arguments)(address)


def processor() -> tuple[str, str]:
    """Return LLVM's name of this processor and what it can do, such as ``+avx2``."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _address(array: np.ndarray, element: ir.Type) -> int:
    assert array.flags.c_contiguous
    assert array.itemsize == nbytes_of(element)
    return array.ctypes.data


def _target_machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = processor()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=name, features=features, opt=3, reloc="pic", codemodel="default"
    )
