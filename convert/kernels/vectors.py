"""Vector code for numba: Python's operators on LLVM vectors with a fixed number of lanes.

LLVM turns a vector into as many registers as the processor needs for it, and does what is written here in
the order in which it is written: the results have the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


class Vector:
    """Equal lanes of integers or floats. A number beside a Vector stands for as many lanes of it.

    ``>>`` shifts zeros in; ``>`` and ``==`` compare signed integers, or floats that are not NaN.
    """

    def __init__(self, code: Code, value: ir.Value):
        self._code = code
        self.value = value
        self.element = value.type.element
        self.lanes = value.type.count

    def __add__(self, other: Operand) -> Vector:
        return self._binary("fadd" if self.element == F32 else "add", other)

    def __sub__(self, other: Operand) -> Vector:
        return self._binary("fsub" if self.element == F32 else "sub", other)

    def __mul__(self, other: Operand) -> Vector:
        return self._binary("fmul" if self.element == F32 else "mul", other)

    def __truediv__(self, other: Operand) -> Vector:
        return self._binary("fdiv", other)

    def __and__(self, other: Operand) -> Vector:
        return self._binary("and_", other)

    def __or__(self, other: Operand) -> Vector:
        return self._binary("or_", other)

    def __xor__(self, other: Operand) -> Vector:
        return self._binary("xor", other)

    def __lshift__(self, other: Operand) -> Vector:
        return self._binary("shl", other)

    def __rshift__(self, other: Operand) -> Vector:
        return self._binary("lshr", other)

    def __gt__(self, other: Operand) -> Vector:
        return self._compare(">", other)

    def __lt__(self, other: Operand) -> Vector:
        return self._compare("<", other)

    def equals(self, other: Operand) -> Vector:
        """A mask of the lanes that are equal."""
        return self._compare("==", other)

    def where(self, yes: Vector, no: Operand) -> Vector:
        """Lanes of ``yes`` where this mask holds, else of ``no``."""
        return self._new(self._code.builder.select(self.value, yes.value, yes.match(no)))

    def as_counts(self, element: ir.Type) -> Vector:
        """A mask as 0 and -1."""
        return self._new(self._code.builder.sext(self.value, ir.VectorType(element, self.lanes)))

    def reinterpret(self, element: ir.Type, lanes: int | None = None) -> Vector:
        """The same bits as other lanes."""
        return self._new(self._code.builder.bitcast(self.value, ir.VectorType(element, lanes or self.lanes)))

    def widen(self, element: ir.Type) -> Vector:
        """Wider integers, zeros above."""
        return self._new(self._code.builder.zext(self.value, ir.VectorType(element, self.lanes)))

    def narrow(self, element: ir.Type) -> Vector:
        """The low bits."""
        return self._new(self._code.builder.trunc(self.value, ir.VectorType(element, self.lanes)))

    def shuffle(self, other: Vector, picks: Sequence[int]) -> Vector:
        """Lane i is lane picks[i] of this vector, or of ``other`` counted on."""
        mask = ir.Constant(ir.VectorType(I32, len(picks)), [ir.Constant(I32, pick) for pick in picks])
        return self._new(self._code.builder.shuffle_vector(self.value, other.value, mask))

    def pick(self, picks: Sequence[int]) -> Vector:
        """Lane i is lane picks[i]."""
        return self.shuffle(self, picks)

    def halves(self) -> tuple[Vector, Vector]:
        """The lower and the upper lanes."""
        half = self.lanes // 2
        return self.pick(range(half)), self.pick(range(half, self.lanes))

    def like(self, number: int | float) -> Vector:
        """A vector of this kind whose lanes are all ``number``."""
        return self._code.constant(self.element, [number] * self.lanes)

    def match(self, other: Operand) -> ir.Value:
        """``other`` as the IR value of a vector like this one."""
        if isinstance(other, Vector):
            return other.value
        return self.like(other).value

    def _binary(self, operation: str, other: Operand) -> Vector:
        return self._new(getattr(self._code.builder, operation)(self.value, self.match(other)))

    def _compare(self, operation: str, other: Operand) -> Vector:
        compare = self._code.builder.fcmp_ordered if self.element == F32 else self._code.builder.icmp_signed
        return self._new(compare(operation, self.value, self.match(other)))

    def _new(self, value: ir.Value) -> Vector:
        return Vector(self._code, value)


Operand = Vector | int | float


class Code:
    """The function that is being written: loads, stores, constants, calls and loops."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    def constant(self, element: ir.Type, lanes: Sequence[int | float]) -> Vector:
        kind = ir.VectorType(element, len(lanes))
        return Vector(self, ir.Constant(kind, [ir.Constant(element, lane) for lane in lanes]))

    def splat(self, scalar: ir.Value, lanes: int) -> Vector:
        """All lanes are ``scalar``."""
        empty = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
        first = self.builder.insert_element(empty, scalar, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, lanes), [ir.Constant(I32, 0)] * lanes)
        return Vector(self, self.builder.shuffle_vector(first, empty, zeros))

    def offset(self, address: ir.Value, index: ir.Value | int, nbytes: int | ir.Value = 1) -> ir.Value:
        """address + index * nbytes."""
        index, nbytes = (ir.Constant(I64, x) if isinstance(x, int) else x for x in (index, nbytes))
        return self.builder.add(address, self.builder.mul(index, nbytes))

    def load(self, address: ir.Value, element: ir.Type, lanes: int) -> Vector:
        """Read a vector from an address that need not be aligned."""
        pointer = self.builder.inttoptr(address, ir.VectorType(element, lanes).as_pointer())
        return Vector(self, self.builder.load(pointer, align=1))

    def store(self, vector: Vector, address: ir.Value) -> None:
        """Write a vector to an address that need not be aligned."""
        self.builder.store(vector.value, self.builder.inttoptr(address, vector.value.type.as_pointer()), align=1)

    def load_scalar(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=1)

    def call(self, name: str, result: ir.Type, *operands: Vector) -> Vector:
        """Call an LLVM intrinsic, such as ``llvm.x86.sha256msg1``."""
        kind = ir.FunctionType(result, [operand.value.type for operand in operands])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return Vector(self, self.builder.call(function, [operand.value for operand in operands]))

    def loop(
        self, count: ir.Value, start: Sequence[Vector], body: Callable[[ir.Value, list[Vector]], list[Vector]]
    ) -> list[Vector]:
        """Return what ``body(i, carried)`` returned last, for i = 0 .. count - 1; ``start`` is carried first."""
        builder = self.builder
        zero, one = ir.Constant(count.type, 0), ir.Constant(count.type, 1)
        before = builder.block
        head = builder.append_basic_block("head")
        inside = builder.append_basic_block("inside")
        after = builder.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(count.type)
        carried = [builder.phi(vector.value.type) for vector in start]
        builder.cbranch(builder.icmp_unsigned("<", index, count), inside, after)
        builder.position_at_end(inside)
        results = body(index, [Vector(self, phi) for phi in carried])
        following = builder.add(index, one)
        end = builder.block
        builder.branch(head)
        for phi, first, again in zip(
            [index, *carried], [zero, *(v.value for v in start)], [following, *(v.value for v in results)], strict=True
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(again, end)
        builder.position_at_end(after)
        return [Vector(self, phi) for phi in carried]
