"""Vector code in Python's operators: what is written here LLVM turns into the instructions of any processor.

A vector takes as many registers as the processor needs for it. Every step is done in the order in which it is written
and rounded by itself, so that results have the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32, F64 = ir.FloatType(), ir.DoubleType()


class Value:
    """An integer or a float, or a vector of equal ``lanes`` of them. A Python number beside it is one like it.

    ``>>`` shifts zeros in; ``<`` and ``>`` compare signed integers, or floats that are not NaN.
    """

    def __init__(self, code: Code, value: ir.Value):
        self._code = code
        self.value = value
        self.lanes = value.type.count if isinstance(value.type, ir.VectorType) else 1
        self.element = value.type.element if isinstance(value.type, ir.VectorType) else value.type

    def __add__(self, other: Operand) -> Value:
        return self._arithmetic("add", other)

    def __sub__(self, other: Operand) -> Value:
        return self._arithmetic("sub", other)

    def __mul__(self, other: Operand) -> Value:
        return self._arithmetic("mul", other)

    def __truediv__(self, other: Operand) -> Value:
        return self._new(self._code.builder.fdiv(self.value, self.match(other)))

    def __floordiv__(self, other: Operand) -> Value:
        return self._new(self._code.builder.udiv(self.value, self.match(other)))

    def __mod__(self, other: Operand) -> Value:
        return self._new(self._code.builder.urem(self.value, self.match(other)))

    def __and__(self, other: Operand) -> Value:
        return self._new(self._code.builder.and_(self.value, self.match(other)))

    def __or__(self, other: Operand) -> Value:
        return self._new(self._code.builder.or_(self.value, self.match(other)))

    def __xor__(self, other: Operand) -> Value:
        return self._new(self._code.builder.xor(self.value, self.match(other)))

    def __lshift__(self, other: Operand) -> Value:
        return self._new(self._code.builder.shl(self.value, self.match(other)))

    def __rshift__(self, other: Operand) -> Value:
        return self._new(self._code.builder.lshr(self.value, self.match(other)))

    def __lt__(self, other: Operand) -> Value:
        return self._compare("<", other)

    def __gt__(self, other: Operand) -> Value:
        return self._compare(">", other)

    def where(self, yes: Value, no: Operand) -> Value:
        """Lanes of ``yes`` where this mask holds, else of ``no``."""
        return self._new(self._code.builder.select(self.value, yes.value, yes.match(no)))

    def reinterpret(self, element: ir.Type, lanes: int | None = None) -> Value:
        """The same bits as other lanes."""
        return self._new(self._code.builder.bitcast(self.value, kind(element, lanes or self.lanes)))

    def widen(self, element: ir.Type) -> Value:
        """Wider integers, zeros above; wider floats."""
        cast = self._code.builder.fpext if self.element == F32 else self._code.builder.zext
        return self._new(cast(self.value, kind(element, self.lanes)))

    def narrow(self, element: ir.Type) -> Value:
        """The low bits."""
        return self._new(self._code.builder.trunc(self.value, kind(element, self.lanes)))

    def splat(self, lanes: int) -> Value:
        """A vector whose lanes are all this scalar."""
        first = self._code.builder.insert_element(
            ir.Constant(kind(self.element, lanes), ir.Undefined), self.value, ir.Constant(I32, 0)
        )
        return self._new(first).pick([0] * lanes)

    def shuffle(self, other: Value, picks: Sequence[int]) -> Value:
        """Lane i is lane picks[i] of this vector, or of ``other`` counted on; one lane is a scalar."""
        if len(picks) == 1:
            source = self if picks[0] < self.lanes else other
            return self._new(self._code.builder.extract_element(source.value, ir.Constant(I32, picks[0] % self.lanes)))
        mask = ir.Constant(kind(I32, len(picks)), [ir.Constant(I32, pick) for pick in picks])
        return self._new(self._code.builder.shuffle_vector(self.value, other.value, mask))

    def pick(self, picks: Sequence[int]) -> Value:
        """Lane i is lane picks[i]."""
        return self.shuffle(self, picks)

    def join(self, other: Value) -> Value:
        """The lanes of this vector, then those of ``other``."""
        return self.shuffle(other, range(2 * self.lanes))

    def halves(self) -> tuple[Value, Value]:
        """The lower and the upper lanes."""
        half = self.lanes // 2
        return self.pick(range(half)), self.pick(range(half, self.lanes))

    def fold(self, combine: Callable[[Value, Value], Value], lanes: int = 1) -> Value:
        """Combine the lower half with the upper half until ``lanes`` are left."""
        folded = self
        while folded.lanes > lanes:
            folded = combine(*folded.halves())
        return folded

    def like(self, number: int | float) -> Value:
        """A constant of this kind, all lanes the same."""
        return self._code.constant(self.element, [number] * self.lanes)

    def match(self, other: Operand) -> ir.Value:
        """The IR value of ``other`` as an operand beside this one."""
        return other.value if isinstance(other, Value) else self.like(other).value

    def _arithmetic(self, operation: str, other: Operand) -> Value:
        prefix = "f" if self.element in (F32, F64) else ""
        return self._new(getattr(self._code.builder, prefix + operation)(self.value, self.match(other)))

    def _compare(self, operation: str, other: Operand) -> Value:
        builder = self._code.builder
        compare = builder.fcmp_ordered if self.element in (F32, F64) else builder.icmp_signed
        return self._new(compare(operation, self.value, self.match(other)))

    def _new(self, value: ir.Value) -> Value:
        return Value(self._code, value)


Operand = Value | int | float


def kind(element: ir.Type, lanes: int) -> ir.Type:
    """A vector type, or the element itself for one lane."""
    return ir.VectorType(element, lanes) if lanes > 1 else element


def larger(x: Value, y: Value) -> Value:
    """The larger one, lane by lane."""
    return (x > y).where(x, y)


class Code:
    """The function that is being written: loads, stores, constants, calls and loops. Addresses are I64."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    def constant(self, element: ir.Type, lanes: Sequence[int | float]) -> Value:
        constants = [ir.Constant(element, lane) for lane in lanes]
        return Value(self, ir.Constant(kind(element, len(lanes)), constants) if len(lanes) > 1 else constants[0])

    def load(self, address: Value, element: ir.Type, lanes: int = 1) -> Value:
        """Read from an address that need not be aligned."""
        pointer = self.builder.inttoptr(address.value, kind(element, lanes).as_pointer())
        return Value(self, self.builder.load(pointer, align=1))

    def load_nth(self, address: Value, i: Value, element: ir.Type, lanes: int) -> Value:
        """Read vector i of those that lie one after the other from ``address`` on."""
        return self.load(address + i * (lanes * element.width // 8), element, lanes)

    def store(self, value: Value, address: Value) -> None:
        """Write to an address that need not be aligned."""
        pointer = self.builder.inttoptr(address.value, value.value.type.as_pointer())
        self.builder.store(value.value, pointer, align=1)

    def call(self, name: str, *operands: Value) -> Value:
        """Call an LLVM intrinsic whose result is of the first operand's kind, such as ``llvm.x86.sha256msg1``."""
        operand_kinds = [operand.value.type for operand in operands]
        module = self.builder.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(operand_kinds[0], operand_kinds), name)
        return Value(self, self.builder.call(function, [operand.value for operand in operands]))

    def loop(
        self, count: Value, start: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
    ) -> list[Value]:
        """Return what ``body(i, carried)`` returned last, for i = 0 .. count - 1; ``start`` is carried first."""
        builder = self.builder
        before = builder.block
        head = builder.append_basic_block("head")
        inside = builder.append_basic_block("inside")
        after = builder.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        index, *carried = [builder.phi(value.value.type) for value in (count, *start)]
        builder.cbranch(builder.icmp_unsigned("<", index, count.value), inside, after)
        builder.position_at_end(inside)
        results = [Value(self, index) + 1, *body(Value(self, index), [Value(self, phi) for phi in carried])]
        end = builder.block
        builder.branch(head)
        for phi, first, again in zip([index, *carried], [count.like(0), *start], results, strict=True):
            phi.add_incoming(first.value, before)
            phi.add_incoming(again.value, end)
        builder.position_at_end(after)
        return [Value(self, phi) for phi in carried]


def write_function(name: str, n_arguments: int, write: Callable[..., None]) -> str:
    """Return the IR of a module with the function ``name``; ``write(code, *arguments)`` writes its body."""
    module = ir.Module(name)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * n_arguments), name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    code = Code(builder)
    write(code, *[Value(code, argument) for argument in function.args])
    builder.ret_void()
    return str(module)
