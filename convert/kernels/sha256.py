"""SHA-256 (FIPS 180-4) of several streams at once, which one core does faster than one after the other.

A stream's blocks depend on each other, so that a core that hashes one stream waits most of the time. With the
SHA instructions of x86 two streams fill the gaps; without them each stream is one lane of a vector.
"""

import math
from itertools import count, islice

from llvmlite import ir
from numba import types, uint64
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from convert.kernels.rows import compiled
from convert.kernels.vectors import I32, Code, Vector

BLOCK_NBYTES = 64
_QUAD = ir.VectorType(I32, 4)


def _first_primes(n: int) -> list[int]:
    return list(islice((p for p in count(2) if all(p % d for d in range(2, math.isqrt(p) + 1))), n))


def _integer_cube_root(x: int) -> int:
    root = round(x ** (1 / 3))
    while root**3 > x:
        root -= 1
    while (root + 1) ** 3 <= x:
        root += 1
    return root


# 32 bits behind the point of the primes' square roots, and of their cube roots (FIPS 180-4, 5.3.3 and 4.2.2).
INITIAL_STATE = [math.isqrt(p << 64) & 0xFFFFFFFF for p in _first_primes(8)]
_ROUND_CONSTANTS = [_integer_cube_root(p << 96) & 0xFFFFFFFF for p in _first_primes(64)]


def _features() -> str:
    return cpu_target.target_context.codegen().magic_tuple()[2]


HAS_SHA = "+sha," in _features() + ","


@intrinsic
def _hash_interleaved(typing_context, states, addresses, n_blocks):
    """The SHA instructions of x86, a stream's steps beside those of the others."""
    n_streams = addresses.count

    def generate(context, builder, signature, values):
        code = Code(builder)
        states, addresses, n_blocks = values
        sources = [builder.extract_value(addresses, i) for i in range(n_streams)]
        halves = [code.offset(states, 2 * i + half, 16) for i in range(n_streams) for half in (0, 1)]
        words = [code.load(address, I32, 4) for address in halves]
        start = []
        for abcd, efgh in zip(words[::2], words[1::2], strict=True):
            start += [abcd.shuffle(efgh, (5, 4, 1, 0)), abcd.shuffle(efgh, (7, 6, 3, 2))]

        def hash_block(i, carried):
            blocks = [code.offset(source, i, BLOCK_NBYTES) for source in sources]
            return [a + b for a, b in zip(carried, _rounds_interleaved(code, carried, blocks), strict=True)]

        end = code.loop(n_blocks, start, hash_block)
        for i, (feba, hgdc) in enumerate(zip(end[::2], end[1::2], strict=True)):
            code.store(feba.shuffle(hgdc, (3, 2, 7, 6)), halves[2 * i])
            code.store(feba.shuffle(hgdc, (1, 0, 5, 4)), halves[2 * i + 1])
        return context.get_dummy_value()

    return types.void(types.uint64, addresses, types.uint64), generate


def _rounds_interleaved(code: Code, carried: list[Vector], blocks: list[ir.Value]) -> list[Vector]:
    """All 64 rounds. carried: for each stream the words f e b a, then h g d c."""
    state = list(carried)
    schedules = [
        [code.call("llvm.bswap.v4i32", _QUAD, code.load(code.offset(block, i, 16), I32, 4)) for i in range(4)]
        for block in blocks
    ]
    for i in range(0, 64, 4):
        for stream, w in enumerate(schedules):
            if i >= 16:
                step = code.call("llvm.x86.sha256msg1", _QUAD, w[-4], w[-3]) + w[-2].shuffle(w[-1], (1, 2, 3, 4))
                w.append(code.call("llvm.x86.sha256msg2", _QUAD, step, w[-1]))
            summand = w[i // 4] + code.constant(I32, _ROUND_CONSTANTS[i : i + 4])
            feba, hgdc = state[2 * stream : 2 * stream + 2]
            hgdc = code.call("llvm.x86.sha256rnds2", _QUAD, hgdc, feba, summand)
            feba = code.call("llvm.x86.sha256rnds2", _QUAD, feba, hgdc, summand.pick((2, 3, 2, 3)))
            state[2 * stream : 2 * stream + 2] = feba, hgdc
    return state


@intrinsic
def _hash_lanes(typing_context, states, addresses, n_blocks):
    """Each stream is a lane of a vector; the number of streams is a power of two up to 16."""
    n_streams = addresses.count

    def generate(context, builder, signature, values):
        code = Code(builder)
        states, addresses, n_blocks = values
        sources = [builder.extract_value(addresses, i) for i in range(n_streams)]
        rows = [code.load(code.offset(states, i, 32), I32, 8) for i in range(n_streams)]

        def hash_block(i, carried):
            blocks = [code.offset(source, i, BLOCK_NBYTES) for source in sources]
            w = _transpose([code.load(block, I32, 16) for block in blocks])
            w = [code.call(f"llvm.bswap.v{n_streams}i32", word.value.type, word) for word in w]
            return [a + b for a, b in zip(carried, _rounds_in_lanes(code, carried, w), strict=True)]

        for i, row in enumerate(_transpose(code.loop(n_blocks, _transpose(rows), hash_block))):
            code.store(row, code.offset(states, i, 32))
        return context.get_dummy_value()

    return types.void(types.uint64, addresses, types.uint64), generate


def _transpose(rows: list[Vector]) -> list[Vector]:
    """Vector j of the result holds lane j of every row; the number of rows is a power of two."""
    n_rows, lanes = len(rows), rows[0].lanes
    while len(rows) > 1:
        rows = [rows[i].shuffle(rows[i + 1], range(2 * rows[i].lanes)) for i in range(0, len(rows), 2)]
    return [rows[0].pick(range(j, n_rows * lanes, lanes)) for j in range(lanes)]


def _rounds_in_lanes(code: Code, carried: list[Vector], w: list[Vector]) -> list[Vector]:
    """All 64 rounds as FIPS 180-4 has them; rotations are LLVM's funnel shifts."""

    def rotate(x: Vector, *distances: int) -> Vector:
        turned = [code.call(f"llvm.fshr.v{x.lanes}i32", x.value.type, x, x, x.like(n)) for n in distances]
        return turned[0] if len(turned) == 1 else turned[0] ^ turned[1] ^ turned[2]

    a, b, c, d, e, f, g, h = carried
    for i, constant in enumerate(_ROUND_CONSTANTS):
        if i >= 16:
            s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >> 3)
            s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >> 10)
            w.append(w[i - 16] + s0 + w[i - 7] + s1)
        t1 = h + w[i] + constant + rotate(e, 6, 11, 25) + (g ^ (e & (f ^ g)))
        t2 = rotate(a, 2, 13, 22) + ((a & b) | (c & (a | b)))
        a, b, c, d, e, f, g, h = t1 + t2, a, b, c, d + t1, e, f, g
    return [a, b, c, d, e, f, g, h]


@compiled
def hash_interleaved(states, addresses, n_blocks):
    _hash_interleaved(uint64(states.ctypes.data), addresses, uint64(n_blocks))


@compiled
def hash_lanes(states, addresses, n_blocks):
    _hash_lanes(uint64(states.ctypes.data), addresses, uint64(n_blocks))
