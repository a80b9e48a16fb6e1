"""The number formats as data: E2M1, E8M0, E4M3 and the two weight formats made of them."""

from typing import Literal, get_args

WeightFormat = Literal["mxfp4", "fp8"]
Layout = Literal["aiter", "plain"]
ScaleRule = Literal["even", "floor", "roundup", "mse"]
Granularity = Literal["tensor", "channel", "block"]

WEIGHT_FORMATS: tuple[str, ...] = get_args(WeightFormat)
LAYOUTS: tuple[str, ...] = get_args(Layout)
SCALE_RULES: tuple[str, ...] = get_args(ScaleRule)
GRANULARITIES: tuple[str, ...] = get_args(Granularity)

# OCP Microscaling Formats (MX) v1.0, 5.3.3: sign, 2 exponent bits (bias 1), 1 mantissa bit.
# The value of code 0..7; bit 3 of a code is the sign.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Half-way points between neighbouring E2M1 values. Ties go to the even code, so a value on
# the point rounds up where the lower code is odd.
E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
E2M1_TIE_ROUNDS_UP = (False, True, False, True, False, True, False)
E2M1_TIE_RULE = "half_even"
NIBBLE_ORDER = "low_is_even_k"

# OCP MX v1.0, 5.4.1: value 2^(byte - 127); 255 is NaN.
E8M0_BIAS = 127
E8M0_NAN = 255
MXFP4_BLOCK_SIZE = 32

# OCP 8-bit floating point (OFP8), E4M3: largest finite value; codes 0x7F and 0xFF are NaN.
E4M3_MAX = 448.0
E4M3_NAN_MAGNITUDE = 0x7F
FP8_BLOCK_SIZE = 128

# The tile orders of `aiter` exist for this GPU architecture (MI350); see layouts.py.
AITER_TARGET_ARCH = "gfx950"
