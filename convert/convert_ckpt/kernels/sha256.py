"""SHA-256 (FIPS 180-4) of several streams at once, which one core does faster than one after the other.

A stream's blocks depend on each other, so that a core that hashes one stream waits most of the time. With the
SHA instructions of x86 two streams fill the gaps; without them each stream is one lane of a vector.
"""

import math
from functools import cache
from itertools import count, islice

from convert_ckpt.kernels.ir import I32, I64, Code, Value
from convert_ckpt.kernels.jit import Kernel, processor

BLOCK_NBYTES = 64


def _first_primes(n: int) -> list[int]:
    return list(islice((p for p in count(2) if all(p % d for d in range(2, math.isqrt(p) + 1))), n))


def _integer_cube_root(x: int) -> int:
    root: int = round(x ** (1 / 3))
    while root**3 > x:
        root -= 1
    while (root + 1) ** 3 <= x:
        root += 1
    return root


# 32 bits behind the point of the primes' square roots, and of their cube roots (FIPS 180-4, 5.3.3 and 4.2.2).
INITIAL_STATE = [math.isqrt(p << 64) & 0xFFFFFFFF for p in _first_primes(8)]
_ROUND_CONSTANTS = [_integer_cube_root(p << 96) & 0xFFFFFFFF for p in _first_primes(64)]


def has_sha_instructions() -> bool:
    return "+sha" in processor()[1].split(",")


def has_wide_vectors() -> bool:
    return "+avx2" in processor()[1].split(",")


@cache
def hash_interleaved(n_streams: int) -> Kernel:
    """A kernel (jobs, n_blocks) that adds n_blocks blocks to each stream. Needs has_sha_instructions().

    jobs: address of uint64 [2, n_streams]: addresses of states, uint32 [8], changed in place, and of the data.
    """

    def write(code: Code, jobs: Value, n_blocks: Value) -> None:
        states, sources = _jobs(code, jobs, n_streams)
        start = []
        for state in states:
            abcd, efgh = code.load(state, I32, 4), code.load(state + 16, I32, 4)
            start += [abcd.shuffle(efgh, (5, 4, 1, 0)), abcd.shuffle(efgh, (7, 6, 3, 2))]

        def hash_block(i: Value, carried: list[Value]) -> list[Value]:
            blocks = [source + i * BLOCK_NBYTES for source in sources]
            return [a + b for a, b in zip(carried, _rounds_interleaved(code, carried, blocks), strict=True)]

        end = code.loop(n_blocks, start, hash_block)
        for state, feba, hgdc in zip(states, end[::2], end[1::2], strict=True):
            code.store(feba.shuffle(hgdc, (3, 2, 7, 6)), state)
            code.store(feba.shuffle(hgdc, (1, 0, 5, 4)), state + 16)

    return Kernel(f"sha256_interleaved_{n_streams}", 2, write)


def _rounds_interleaved(code: Code, carried: list[Value], blocks: list[Value]) -> list[Value]:
    """All 64 rounds. carried: for each stream the words f e b a, then h g d c."""
    state = list(carried)
    schedules = [
        [code.call("llvm.bswap.v4i32", code.load(block + 16 * i, I32, 4)) for i in range(4)] for block in blocks
    ]
    for i in range(0, 64, 4):
        for stream, w in enumerate(schedules):
            if i >= 16:
                step = code.call("llvm.x86.sha256msg1", w[-4], w[-3]) + w[-2].shuffle(w[-1], (1, 2, 3, 4))
                w.append(code.call("llvm.x86.sha256msg2", step, w[-1]))
            summand = w[i // 4] + code.constant(I32, _ROUND_CONSTANTS[i : i + 4])
            feba, hgdc = state[2 * stream : 2 * stream + 2]
            hgdc = code.call("llvm.x86.sha256rnds2", hgdc, feba, summand)
            feba = code.call("llvm.x86.sha256rnds2", feba, hgdc, summand.pick((2, 3, 2, 3)))
            state[2 * stream : 2 * stream + 2] = feba, hgdc
    return state


@cache
def hash_lanes(n_streams: int) -> Kernel:
    """The same on any processor, with a lane of a vector for each stream; their number is a power of two, best 8."""

    def write(code: Code, jobs: Value, n_blocks: Value) -> None:
        states, sources = _jobs(code, jobs, n_streams)
        start = _transpose([code.load(state, I32, 8) for state in states])

        def hash_block(i: Value, carried: list[Value]) -> list[Value]:
            w = _transpose([code.load(source + i * BLOCK_NBYTES, I32, 16) for source in sources])
            w = [code.call(f"llvm.bswap.v{n_streams}i32", word) for word in w]
            return [a + b for a, b in zip(carried, _rounds_in_lanes(code, carried, w), strict=True)]

        end = code.loop(n_blocks, start, hash_block)
        for state, row in zip(states, _transpose(end), strict=True):
            code.store(row, state)

    return Kernel(f"sha256_lanes_{n_streams}", 2, write)


def _rounds_in_lanes(code: Code, carried: list[Value], w: list[Value]) -> list[Value]:
    """All 64 rounds as FIPS 180-4 has them; a rotation is LLVM's funnel shift of a word and itself."""

    def rotate(x: Value, n: int) -> Value:
        return code.call(f"llvm.fshr.v{x.lanes}i32", x, x, x.like(n))

    a, b, c, d, e, f, g, h = carried
    for i, constant in enumerate(_ROUND_CONSTANTS):
        if i >= 16:
            s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >> 3)
            s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >> 10)
            w.append(w[i - 16] + s0 + w[i - 7] + s1)
        t1 = h + w[i] + constant + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + (g ^ (e & (f ^ g)))
        t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) | (c & (a | b)))
        a, b, c, d, e, f, g, h = t1 + t2, a, b, c, d + t1, e, f, g
    return [a, b, c, d, e, f, g, h]


def _jobs(code: Code, jobs: Value, n_streams: int) -> tuple[list[Value], list[Value]]:
    addresses = [code.load(jobs + 8 * i, I64) for i in range(2 * n_streams)]
    return addresses[:n_streams], addresses[n_streams:]


def _transpose(rows: list[Value]) -> list[Value]:
    """Vector j of the result holds lane j of every row; both numbers are powers of two above one."""
    n_rows, lanes = len(rows), rows[0].lanes
    while len(rows) > 1:
        rows = [rows[i].shuffle(rows[i + 1], range(2 * rows[i].lanes)) for i in range(0, len(rows), 2)]
    return [rows[0].pick(range(j, n_rows * lanes, lanes)) for j in range(lanes)]
