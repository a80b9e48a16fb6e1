"""What codes stand for, as float32, without torch: the twin of the decoders in contract/elements.py and codec.py."""

import numpy as np

from run_ckpt.contract.formats import E2M1_VALUES, E4M3_NAN_MAGNITUDE, E8M0_BIAS, E8M0_LARGEST, E8M0_NAN


def _e4m3_values() -> np.ndarray:
    """float32 [256]: sign, exponent field (bias 7), 3 bits of mantissa. Source: OFP8, E4M3."""
    codes = np.arange(0x80)
    mantissas = np.where(codes < 8, codes, 8 + codes % 8).astype(np.float32)
    magnitudes = np.ldexp(mantissas, np.maximum(codes >> 3, 1) - 10)
    magnitudes[E4M3_NAN_MAGNITUDE] = np.nan
    return np.concatenate([magnitudes, -magnitudes])


def _e2m1_pairs() -> np.ndarray:
    """float32 [256, 2] as uint64 [256]: the values of both nibbles of a byte, that of the low one first."""
    values = np.array([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], np.float32)
    codes = np.arange(256)
    return np.stack([values[codes & 15], values[codes >> 4]], axis=1).view(np.uint64)[:, 0]


E2M1_PAIRS = _e2m1_pairs()
E4M3_VALUES = _e4m3_values()
E5M2_VALUES = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)
E8M0_VALUES = np.ldexp(np.float32(1), np.minimum(np.arange(256), E8M0_LARGEST) - E8M0_BIAS)
E8M0_VALUES[E8M0_NAN] = np.nan
