"""A slab of a tensor that a fold changes, before anything else is done with it."""

import numpy as np

from run_ckpt.contract.folds import TensorFold


def fold_bits(bits: np.ndarray, fold: TensorFold | None, row: int) -> np.ndarray:
    """Return rows ``row``.. of a tensor as folds leave them, of the same type: int16 (BF16) or int32 (F32) [n, width].

    The one thing that is rounded, to nearest even, is the bias of a scale.
    """
    if fold is None:
        return bits
    values = (bits if bits.itemsize == 4 else bits.astype(np.int32) << 16).view(np.float32)
    values = values * _powers(fold.columns) if fold.columns else values.copy()
    for part, exponents in fold.rows:
        start, stop = max(part.first, row), min(part.first + len(exponents), row + len(values))
        if start < stop:
            inside, one = values[start - row : stop - row], np.float32(part.plus_one)
            factors = 1 / _powers(exponents[start - part.first : stop - part.first])
            inside[:] = (inside + one) * factors[:, None] - one
    return values.view(np.int32) if bits.itemsize == 4 else round_to_bf16(values)


def scale_hessian(block: np.ndarray, exponents: tuple[int, ...]) -> np.ndarray:
    """Turn mean(x x') of some channels into that of x_k / d_k, in place, and return it."""
    factors = 1 / _powers(exponents)
    block *= factors
    block *= factors[:, None]
    return block


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Return the bits of float32 values as BF16, int16, nearest, ties to even. NaN is not looked for."""
    unsigned = values.view(np.uint32)
    return ((unsigned + 0x7FFF + ((unsigned >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)


def _powers(exponents: tuple[int, ...]) -> np.ndarray:
    return np.ldexp(np.float32(1), np.array(exponents, np.int32))
