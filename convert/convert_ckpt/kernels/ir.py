"""Vector code in Python's operators: what is written here LLVM turns into the instructions of any processor.

A kernel is a Python function that runs once, when it is compiled: with Vectors and Arrays in place of numbers, whose
operators write instructions down. Python's own ``if`` and ``for`` choose what is written; ``build.range`` writes a
loop, and a ``build.variable`` is what its turns change. The sum of squares of n float32, n a multiple of 8:

>>> def sum_of_squares(build: FunctionBuilder, x: Array, out: Array, n: Vector) -> None:
...     sums = build.variable(build.constant(F32, 0.0, lanes=8))
...     for i in build.range(n // 8):
...         lanes = x.load(i * 8, 8)
...         sums.value += lanes * lanes
...     out.store(0, sums.value.fold(Vector.__add__))

>>> def twin(x: np.ndarray) -> np.float32:
...     sums = np.zeros(8, np.float32)
...     for lanes in x.reshape(-1, 8):
...         sums += lanes * lanes
...     while len(sums) > 1:
...         sums = np.add(*np.split(sums, 2))
...     return sums[0]

>>> x, out = np.linspace(0, 1, 1000, dtype=np.float32), np.empty(1, np.float32)
>>> Kernel(sum_of_squares, (F32, F32))(x, out, x.size)
>>> bool(out[0] == twin(x))
True

A vector takes as many registers as the processor needs for it. Every step is done in the order in which it is written
and rounded by itself, so that results have the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from llvmlite import ir

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32, F64 = ir.FloatType(), ir.DoubleType()


class Vector:
    """``lanes`` integers or floats of one type, ``element``; with one lane a scalar.

    An operand beside a Vector is one of the same type and lanes, or a Python number, which then fills all lanes.
    ``//``, ``%`` and ``>>`` take integers as unsigned; ``<`` and ``>`` compare signed integers, or floats that are
    not NaN, and give a mask: i1 in each lane.
    """

    def __init__(self, builder: ir.IRBuilder, value: ir.Value):
        self._builder = builder
        self.value = value
        self.lanes = value.type.count if isinstance(value.type, ir.VectorType) else 1
        self.element = value.type.element if isinstance(value.type, ir.VectorType) else value.type

    def __add__(self, other: Operand) -> Vector:
        return self._arithmetic("add", other)

    def __sub__(self, other: Operand) -> Vector:
        return self._arithmetic("sub", other)

    def __mul__(self, other: Operand) -> Vector:
        return self._arithmetic("mul", other)

    def __truediv__(self, other: Operand) -> Vector:
        return self._new(self._builder.fdiv(self.value, self._match(other)))

    def __floordiv__(self, other: Operand) -> Vector:
        return self._new(self._builder.udiv(self.value, self._match(other)))

    def __mod__(self, other: Operand) -> Vector:
        return self._new(self._builder.urem(self.value, self._match(other)))

    def __and__(self, other: Operand) -> Vector:
        return self._new(self._builder.and_(self.value, self._match(other)))

    def __or__(self, other: Operand) -> Vector:
        return self._new(self._builder.or_(self.value, self._match(other)))

    def __lshift__(self, other: Operand) -> Vector:
        return self._new(self._builder.shl(self.value, self._match(other)))

    def __rshift__(self, other: Operand) -> Vector:
        return self._new(self._builder.lshr(self.value, self._match(other)))

    def __lt__(self, other: Operand) -> Vector:
        return self._compare("<", other)

    def __gt__(self, other: Operand) -> Vector:
        return self._compare(">", other)

    def where(self, yes: Vector, no: Operand) -> Vector:
        """Lanes of ``yes`` where this mask holds, else of ``no``."""
        return self._new(self._builder.select(self.value, yes.value, yes._match(no)))

    def reinterpret(self, element: ir.Type, lanes: int | None = None) -> Vector:
        """The same bits as lanes of another type; the lowest lane holds the lowest bits."""
        return self._new(self._builder.bitcast(self.value, _type_of(element, lanes or self.lanes)))

    def widen(self, element: ir.Type) -> Vector:
        """Wider integers, zeros above; wider floats."""
        cast = self._builder.fpext if self.element == F32 else self._builder.zext
        return self._new(cast(self.value, _type_of(element, self.lanes)))

    def narrow(self, element: ir.Type) -> Vector:
        """The low bits of integers."""
        return self._new(self._builder.trunc(self.value, _type_of(element, self.lanes)))

    def splat(self, lanes: int) -> Vector:
        """A vector whose lanes are all this scalar."""
        undefined = ir.Constant(_type_of(self.element, lanes), ir.Undefined)
        first = self._builder.insert_element(undefined, self.value, ir.Constant(I32, 0))
        return self._new(self._builder.shuffle_vector(first, undefined, _constant(I32, 0, lanes)))

    def join(self, other: Vector) -> Vector:
        """The lanes of this vector, then those of ``other``, of which there are as many."""
        return self._pick(other, range(2 * self.lanes))

    def halves(self) -> tuple[Vector, Vector]:
        """The lower and the upper lanes."""
        half = self.lanes // 2
        return self._pick(self, range(half)), self._pick(self, range(half, self.lanes))

    def fold(self, combine: Callable[[Vector, Vector], Vector], lanes: int = 1) -> Vector:
        """Combine the lower half with the upper half until ``lanes`` are left."""
        folded = self
        while folded.lanes > lanes:
            folded = combine(*folded.halves())
        return folded

    def like(self, number: int | float) -> Vector:
        """A constant of this type, all lanes the same."""
        return self._new(_constant(self.element, number, self.lanes))

    def _match(self, other: Operand) -> ir.Value:
        return other.value if isinstance(other, Vector) else _constant(self.element, other, self.lanes)

    def _arithmetic(self, operation: str, other: Operand) -> Vector:
        prefix = "f" if self.element in (F32, F64) else ""
        return self._new(getattr(self._builder, prefix + operation)(self.value, self._match(other)))

    def _compare(self, operation: str, other: Operand) -> Vector:
        compare = self._builder.fcmp_ordered if self.element in (F32, F64) else self._builder.icmp_signed
        return self._new(compare(operation, self.value, self._match(other)))

    def _pick(self, other: Vector, lanes: Sequence[int]) -> Vector:
        """These lanes of this vector, and of ``other`` counted on."""
        indices = [ir.Constant(I32, lane) for lane in lanes]
        if len(indices) == 1:
            return self._new(self._builder.extract_element(self.value, indices[0]))
        mask = ir.Constant(_type_of(I32, len(indices)), indices)
        return self._new(self._builder.shuffle_vector(self.value, other.value, mask))

    def _new(self, value: ir.Value) -> Vector:
        return Vector(self._builder, value)


Operand = Vector | int | float


def larger(x: Vector, y: Operand) -> Vector:
    """The larger one, lane by lane."""
    return (x > y).where(x, y)


def smaller(x: Vector, y: Operand) -> Vector:
    """The smaller one, lane by lane."""
    return (x < y).where(x, y)


class Array:
    """Numbers of one type that lie in memory one after the other; indices count them. Nothing need be aligned."""

    def __init__(self, builder: ir.IRBuilder, address: Vector, element: ir.Type):
        self._builder = builder
        self._address = address
        self.element = element

    def at(self, index: Vector) -> Array:
        """The part from ``index`` on."""
        return Array(self._builder, self._address_of(index), self.element)

    def load(self, index: Operand, lanes: int = 1) -> Vector:
        """``lanes`` numbers, the first of them at ``index``."""
        return Vector(self._builder, self._builder.load(self._pointer(index, lanes), align=1))

    def store(self, index: Operand, numbers: Vector) -> None:
        """Write ``numbers``, the first of them at ``index``."""
        self._builder.store(numbers.value, self._pointer(index, numbers.lanes), align=1)

    def _pointer(self, index: Operand, lanes: int) -> ir.Value:
        return self._builder.inttoptr(self._address_of(index).value, _type_of(self.element, lanes).as_pointer())

    def _address_of(self, index: Operand) -> Vector:
        if isinstance(index, Vector) and index.element != I64:
            index = index.widen(I64)
        return self._address + index * nbytes_of(self.element)


class Variable:
    """A value that outlives the turns of a loop; read and set ``value``."""

    def __init__(self, builder: ir.IRBuilder, start: Vector):
        self._builder = builder
        # In the entry block, or each turn would take more of the stack; LLVM makes registers of it.
        with builder.goto_entry_block():
            self._slot = builder.alloca(start.value.type)
        self.value = start

    @property
    def value(self) -> Vector:
        return Vector(self._builder, self._builder.load(self._slot))

    @value.setter
    def value(self, value: Vector) -> None:
        self._builder.store(value.value, self._slot)


class FunctionBuilder:
    """The function that is being written."""

    def __init__(self, builder: ir.IRBuilder):
        self._builder = builder

    def constant(self, element: ir.Type, number: int | float, lanes: int = 1) -> Vector:
        return Vector(self._builder, _constant(element, number, lanes))

    def variable(self, start: Vector) -> Variable:
        return Variable(self._builder, start)

    def range(self, count: Vector) -> Iterator[Vector]:
        """Write a loop: the body of the ``for`` over this runs once here, and count times in the kernel.

        Yields the number of the turn, I64 from 0 on. No ``break``, no ``return`` in the body.
        """
        builder = self._builder
        head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
        turn = self.variable(count.like(0))
        builder.branch(head)
        builder.position_at_end(head)
        number = turn.value
        builder.cbranch(builder.icmp_unsigned("<", number.value, count.value), body, after)
        builder.position_at_end(body)
        yield number
        turn.value = number + 1
        builder.branch(head)
        builder.position_at_end(after)


def write_function(write: Callable[..., None], elements: Sequence[ir.Type], n_integers: int) -> str:
    """Return the IR of a module with one function, ``kernel``; ``write(build, *arrays, *integers)`` writes its body.

    It takes the addresses of arrays of these ``elements``, then n_integers integers, all of them I64.
    """
    module = ir.Module("kernel")
    signature = ir.FunctionType(ir.VoidType(), [I64] * (len(elements) + n_integers))
    function = ir.Function(module, signature, "kernel")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    arguments = [Vector(builder, argument) for argument in function.args]
    arrays = [Array(builder, address, element) for address, element in zip(arguments, elements, strict=False)]
    write(FunctionBuilder(builder), *arrays, *arguments[len(elements) :])
    builder.ret_void()
    return str(module)


def nbytes_of(element: ir.Type) -> int:
    """Bytes of one number of this type."""
    if isinstance(element, ir.IntType):
        return int(element.width) // 8
    return 4 if element == F32 else 8


def _type_of(element: ir.Type, lanes: int) -> ir.Type:
    return ir.VectorType(element, lanes) if lanes > 1 else element


def _constant(element: ir.Type, number: int | float, lanes: int) -> ir.Constant:
    constant = ir.Constant(element, number)
    return ir.Constant(ir.VectorType(element, lanes), [constant] * lanes) if lanes > 1 else constant
