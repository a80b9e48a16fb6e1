"""Triton: activations rounded to the blocked formats, byte for byte as backends/activations.py rounds them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from run_ckpt.backends.activations import BLOCKED
from run_ckpt.backends.triton.decode import TL_DTYPES, round_to
from run_ckpt.contract.formats import E2M1, E4M3, MX_BLOCK_SIZE, ElementFormat

# Blocks that one program rounds.
_N_BLOCKS = 64
# Bits of the mantissa, and the exponent of the smallest normal number.
_FLOATS: dict[ElementFormat, tuple[int, int]] = {E4M3: (3, -6), E2M1: (1, 0)}


def round_blocks(x: Tensor, activations: str) -> Tensor:
    """Return what the "mxfp8" or "mxfp4" codes of x [M, K], contiguous, stand for, see activations.round_rows."""
    out, n_blocks = torch.empty_like(x), x.numel() // MX_BLOCK_SIZE
    if n_blocks:
        with torch.cuda.device_of(x):
            round_kernel[(triton.cdiv(n_blocks, _N_BLOCKS),)](
                x, out, n_blocks, **constants(activations), DTYPE=TL_DTYPES[x.dtype], N_BLOCKS=_N_BLOCKS
            )
    return out


def constants(activations: str) -> dict[str, object]:
    """Return what round_kernel is compiled for."""
    scheme, rule = BLOCKED[activations]
    mantissa, min_exponent = _FLOATS[scheme.format.element]
    return {
        "RULE": rule,
        "LARGEST": scheme.format.element.largest,
        "MANTISSA": mantissa,
        "MIN_EXPONENT": min_exponent,
    }


@triton.jit
def round_kernel(
    x_ptr,
    out_ptr,
    n_blocks,
    RULE: tl.constexpr,
    LARGEST: tl.constexpr,
    MANTISSA: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    DTYPE: tl.constexpr,
    N_BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * N_BLOCKS + tl.arange(0, N_BLOCKS)
    place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + place, mask=(block < n_blocks)[:, None], other=0.0)
    if DTYPE == tl.bfloat16:
        # As decode.round_to: Triton's interpreter casts a subnormal wrongly.
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float32)
    # Bits of magnitudes are in the order of the magnitudes, NaN above all.
    amax = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    exponent = (_roundup(amax, LARGEST) if RULE == "roundup" else _even(amax))[:, None] - 127
    units = _scale(x, -exponent)
    units = tl.minimum(tl.maximum(units, -LARGEST), LARGEST)
    y = _scale(_round_to_bits(units, MANTISSA, MIN_EXPONENT), exponent)
    y = tl.where((amax >= 0x7F800000)[:, None], float("nan"), y)
    if DTYPE == tl.float16:
        y = tl.where(y == y, tl.minimum(tl.maximum(y, -65504.0), 65504.0), y)
    tl.store(out_ptr + place, round_to(y, DTYPE, False), mask=(block < n_blocks)[:, None])


@triton.jit
def _roundup(amax, LARGEST: tl.constexpr):
    """Return scale_rules.roundup; amax: bits of float32."""
    bits = tl.math.div_rn(amax.to(tl.float32, bitcast=True), LARGEST).to(tl.int32, bitcast=True)
    return tl.minimum((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32), 254)


@triton.jit
def _even(amax):
    """Return scale_rules.even, of E2M1, whose largest power of two is 2^2; amax: bits of float32."""
    exponent = (amax + (1 << 21)) >> 23
    return tl.where(exponent == 255, 254, tl.maximum(exponent - 2, 0))


@triton.jit
def _scale(x, exponent):
    """Return x * 2^exponent, exact unless that is no float32; the exponent, from -127 to 127, in two halves."""
    half = exponent >> 1
    return x * _power(half) * _power(exponent - half)


@triton.jit
def _power(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _round_to_bits(x, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    """Return x rounded to MANTISSA bits behind the point, below 2^MIN_EXPONENT in equal steps; ties go to even."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) & (-1 << DROPPED)
    # Added to 1.5 * 2^n, x is rounded to multiples of 2^(n - 23).
    LIFT: tl.constexpr = 1.5 * 2.0 ** (23 - MANTISSA + MIN_EXPONENT)
    in_steps = (x + LIFT) - LIFT
    # Zero keeps its sign.
    in_steps = ((bits & -0x80000000) | (in_steps.to(tl.int32, bitcast=True) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < 2.0**MIN_EXPONENT, in_steps, rounded.to(tl.float32, bitcast=True))
