"""Block -> E8M0 scale code, in plain torch: the scale rules of the MX formats."""

import torch
from torch import Tensor

from run_ckpt.contract.elements import encode_e2m1, scale_to_units
from run_ckpt.contract.formats import E2M1, E2M1_VALUES, E8M0_BIAS, E8M0_LARGEST, ROUND_UP_FROM_1_75, ElementFormat


def choose_scale_codes(blocks: Tensor, rule: str, element: ElementFormat = E2M1) -> Tensor:
    """Return E8M0 codes uint8 [...] for blocks float32 [..., 32], finite, by the named rule.

    element: of the codes; the rules "even" and "mse" are those of E2M1.
    """
    return SCALE_CODE_RULES[rule](blocks, element)


def even(blocks: Tensor, element: ElementFormat) -> Tensor:
    """amax rounded to a power of two at 1.75 * 2^k (half of the last E2M1 step), divided by 4.

    Where the rounding overflows float32 (amax >= 1.75 * 2^127) the code is 254.
    Source: AITER fp4_utils.dynamic_mxfp4_quant (Triton); Quark's ``even``.
    """
    exponent = (_amax_bits(blocks) + ROUND_UP_FROM_1_75) >> 23
    overflowed = exponent == 255
    return _to_code(torch.where(overflowed, E8M0_LARGEST, exponent - element.emax))


def floor(blocks: Tensor, element: ElementFormat) -> Tensor:
    """2^floor(log2 amax) over the element's largest power of two. Source: OCP MX v1.0, 6.3."""
    return _to_code((_amax_bits(blocks) >> 23) - element.emax)


def roundup(blocks: Tensor, element: ElementFormat) -> Tensor:
    """The smallest power of two that is at least amax / the largest value, so nothing saturates.

    Source: AITER f32_to_mx_e8m0_scale, RoundUp, which also lifts a subnormal quotient to code 1.
    """
    bits = (blocks.abs().amax(-1) / element.largest).view(torch.int32)
    return _to_code((bits >> 23) + ((bits & 0x7FFFFF) != 0))


def mse(blocks: Tensor, element: ElementFormat) -> Tensor:
    """Of the codes of ``floor`` and ``floor + 1`` the one with the smaller squared error.

    On equal error the smaller code. Errors are summed in float64 by halves (see fold_halves),
    so that every implementation adds in the same order.
    """
    low = floor(blocks, element)
    high = _to_code(low.to(torch.int32) + 1)
    return torch.where(_squared_error(blocks, high) < _squared_error(blocks, low), high, low)


SCALE_CODE_RULES = {"even": even, "floor": floor, "roundup": roundup, "mse": mse}


def fold_halves(x: Tensor) -> Tensor:
    """Sum the last axis [..., 2^n] by adding its upper half to its lower half until one is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(-1)


def _amax_bits(blocks: Tensor) -> Tensor:
    return blocks.abs().amax(-1).view(torch.int32)


def _to_code(exponent: Tensor) -> Tensor:
    return exponent.clamp(0, E8M0_LARGEST).to(torch.uint8)


def _squared_error(blocks: Tensor, codes: Tensor) -> Tensor:
    magnitude_codes = encode_e2m1(scale_to_units(blocks, codes)) & 7
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)[magnitude_codes.long()]
    decoded = torch.ldexp(values, (codes.to(torch.int32) - E8M0_BIAS).unsqueeze(-1))
    return fold_halves((blocks.abs().double() - decoded) ** 2)
