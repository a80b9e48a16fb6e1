"""Every code of E2M1, E4M3 and E8M0 has the value its specification says, and rounding is to nearest even."""

import math

import pytest
import torch
from torch import Tensor

from run_ckpt.contract.codec import fp8_scale, quantize, quantize_fp8
from run_ckpt.contract.elements import (
    decode_e2m1,
    decode_e8m0,
    encode_e2m1,
    pack_nibbles,
    scale_to_units,
    unpack_nibbles,
)
from run_ckpt.contract.formats import PLAIN_MXFP8
from tests.bits import assert_bits_equal
from tests.codec import dequantize_fp8, expand_fp8_scale

# OCP Microscaling Formats v1.0, table 5 (E2M1): S EE M, bias 1, no Inf, no NaN.
E2M1 = {
    0b0000: 0.0,
    0b0001: 0.5,
    0b0010: 1.0,
    0b0011: 1.5,
    0b0100: 2.0,
    0b0101: 3.0,
    0b0110: 4.0,
    0b0111: 6.0,
    0b1000: -0.0,
    0b1001: -0.5,
    0b1010: -1.0,
    0b1011: -1.5,
    0b1100: -2.0,
    0b1101: -3.0,
    0b1110: -4.0,
    0b1111: -6.0,
}
# Half-way between neighbours -> the neighbour whose mantissa bit is 0.
E2M1_TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
FINITE_E4M3 = [code for code in range(256) if code & 0x7F != 0x7F]
SMALLEST_DOUBLE = 5e-324


def e4m3_value(code: int) -> float:
    """The value of S EEEE MMM, bias 7, by the fields (OCP OFP8 v1.0, table 1); 0x7F and 0xFF are NaN."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


def encode_one(value: float) -> int:
    return int(encode_e2m1(torch.tensor([value], dtype=torch.float64))[0])


def fp8_code(value: float, scale: float = 1.0) -> int:
    return int(quantize_fp8(torch.tensor([[value]]), torch.tensor([scale])).view(torch.uint8)[0, 0])


def as_code_tensor(codes: list[int]) -> Tensor:
    return torch.tensor(codes, dtype=torch.uint8)


@pytest.mark.parametrize(("code", "value"), E2M1.items(), ids=[f"{code:04b}" for code in E2M1])
def test_e2m1_code_decodes_to_the_value_of_the_table(code: int, value: float) -> None:
    assert_bits_equal(decode_e2m1(as_code_tensor([code])), torch.tensor([value]))


@pytest.mark.parametrize(("code", "value"), E2M1.items(), ids=[f"{code:04b}" for code in E2M1])
def test_e2m1_value_encodes_to_its_own_code(code: int, value: float) -> None:
    assert encode_one(value) == code


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize(("tie", "value"), E2M1_TIES.items(), ids=map(str, E2M1_TIES))
def test_e2m1_tie_goes_to_the_even_mantissa(tie: float, value: float, sign: int) -> None:
    assert E2M1[encode_one(sign * tie)] == sign * value


@pytest.mark.parametrize("tie", E2M1_TIES, ids=map(str, E2M1_TIES))
def test_e2m1_just_below_a_tie_rounds_down(tie: float) -> None:
    assert E2M1[encode_one(math.nextafter(tie, 0))] == max(v for v in E2M1.values() if v < tie)


@pytest.mark.parametrize("tie", E2M1_TIES, ids=map(str, E2M1_TIES))
def test_e2m1_just_above_a_tie_rounds_up(tie: float) -> None:
    assert E2M1[encode_one(math.nextafter(tie, 9))] == min(v for v in E2M1.values() if v > tie)


@pytest.mark.parametrize("value", [6.0, 6.5, 7.0, 7.999, 1e9, 1.7e308], ids=str)
def test_e2m1_saturates_at_6(value: float) -> None:
    assert [encode_one(value), encode_one(-value)] == [0b0111, 0b1111]


@pytest.mark.parametrize(("value", "code"), [(0.0, 0b0000), (-0.0, 0b1000)], ids=["+0", "-0"])
def test_e2m1_keeps_the_sign_of_zero(value: float, code: int) -> None:
    assert encode_one(value) == code


def test_e2m1_keeps_the_sign_of_what_rounds_to_zero() -> None:
    assert [encode_one(SMALLEST_DOUBLE), encode_one(-SMALLEST_DOUBLE)] == [0b0000, 0b1000]


def test_e8m0_byte_is_a_power_of_two_with_bias_127() -> None:
    # OCP MX v1.0, 5.4.1. 2^-127 is a float32 subnormal and must not be flushed to zero.
    values = decode_e8m0(torch.arange(255, dtype=torch.uint8))
    assert values.double().tolist() == [math.ldexp(1.0, code - 127) for code in range(255)]


def test_e8m0_byte_255_is_nan() -> None:
    assert decode_e8m0(as_code_tensor([255])).isnan().all()


@pytest.mark.parametrize("code", [0, 1, 127, 253, 254])
@pytest.mark.parametrize("bits", [1, 0x7F, 0x80, 0x7F7F], ids=["min-subnormal", "max-subnormal", "min-normal", "max"])
def test_division_by_the_scale_is_exact(code: int, bits: int) -> None:
    value = torch.tensor([[bits] * 32], dtype=torch.int16).view(torch.bfloat16).float()
    units = scale_to_units(value, as_code_tensor([code]))
    assert units[0, 0].item() == math.ldexp(value[0, 0].item(), 127 - code)


def test_low_nibble_holds_the_even_k() -> None:
    assert pack_nibbles(as_code_tensor([0x1, 0x2, 0xF, 0x8])).tolist() == [0x21, 0x8F]


def test_unpacking_gives_the_low_nibble_first() -> None:
    assert unpack_nibbles(as_code_tensor([0x21, 0x8F])).tolist() == [0x1, 0x2, 0xF, 0x8]


def test_packing_undoes_unpacking_for_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    assert_bits_equal(pack_nibbles(unpack_nibbles(packed)), packed)


@pytest.mark.parametrize("code", FINITE_E4M3, ids=lambda code: f"{code:02x}")
def test_e4m3_code_has_the_value_of_its_bit_fields(code: int) -> None:
    decoded = dequantize_fp8(as_code_tensor([[code]]).view(torch.float8_e4m3fn), torch.ones(1))
    assert_bits_equal(decoded, torch.tensor([[e4m3_value(code)]]))


@pytest.mark.parametrize("code", FINITE_E4M3, ids=lambda code: f"{code:02x}")
def test_e4m3_value_encodes_to_its_own_code(code: int) -> None:
    assert fp8_code(e4m3_value(code)) == code


@pytest.mark.parametrize("sign", [0, 0x80], ids=["positive", "negative"])
def test_e4m3_tie_goes_to_the_even_code(sign: int) -> None:
    lower = range(0x7E)
    ties = [(e4m3_value(sign | code) + e4m3_value(sign | code + 1)) / 2 for code in lower]
    assert [fp8_code(tie) for tie in ties] == [sign | code + code % 2 for code in lower]


def test_e4m3_beside_a_tie_goes_to_the_nearer_code() -> None:
    lower = range(0x7E)
    ties = torch.tensor([(e4m3_value(code) + e4m3_value(code + 1)) / 2 for code in lower])
    below, above = torch.nextafter(ties, torch.zeros(1)), torch.nextafter(ties, torch.full((1,), 500.0))
    codes = quantize_fp8(torch.stack((below, above)), torch.ones(1)).view(torch.uint8)
    assert codes.tolist() == [list(lower), [code + 1 for code in lower]]


@pytest.mark.parametrize("value", [448.0, 449.0, 463.999, 464.0, 1e38], ids=str)
def test_e4m3_saturates_at_448_and_never_gives_nan(value: float) -> None:
    assert [fp8_code(value), fp8_code(-value)] == [0x7E, 0xFE]


def test_e4m3_keeps_the_sign_of_zero() -> None:
    assert [fp8_code(0.0), fp8_code(-0.0)] == [0x00, 0x80]


def test_e4m3_keeps_the_sign_of_what_rounds_to_zero() -> None:
    # Half of the smallest subnormal 2^-9 is a tie with the even code 0.
    assert [fp8_code(2.0**-10), fp8_code(-(2.0**-10))] == [0x00, 0x80]


def test_mxfp8_takes_the_nearest_e4m3_value_of_the_exact_quotient() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-30, 30, 4)[:, None]
    codes, scale_codes = quantize(weight, PLAIN_MXFP8, "roundup")
    exponents = (scale_codes.int() - 127).repeat_interleave(32, dim=1)
    units = torch.ldexp(weight.double(), -exponents)
    expected = [[nearest_e4m3(abs(q)) | (q < 0) << 7 for q in row] for row in units.tolist()]
    assert codes.view(torch.uint8).tolist() == expected


def test_fp8_division_is_in_float32_and_not_by_a_reciprocal() -> None:
    # 17 is a tie (16, 18), and 17 * scale / scale is near it: what the float32 division makes of it decides.
    scale = torch.rand(500, 1, generator=torch.Generator().manual_seed(1)) + 0.001
    weight = (17 * scale).expand(500, 2).contiguous()
    # A double quotient rounded to float32 is the correctly rounded float32 quotient (53 >= 2 * 24 + 2).
    expected = [[nearest_e4m3(q) for q in row] for row in (weight.double() / scale.double()).float().tolist()]
    assert quantize_fp8(weight, scale).view(torch.uint8).tolist() == expected


def nearest_e4m3(value: float) -> int:
    """The code of the nearest non-negative E4M3 value, the even code at a tie, 448 beyond it."""
    return min(range(0x7F), key=lambda code: (abs(e4m3_value(code) - value), code % 2))


@pytest.mark.parametrize(
    ("amax", "scale"),
    [(448.0, 1.0), (1.0, 1.0 / 448.0), (0.0, 1.0), (2.0**-149, 1.0), (3.0e38, 3.0e38 / 448.0)],
    ids=["448", "1", "zero", "underflow", "huge"],
)
def test_fp8_scale_is_amax_over_448_or_1_where_that_is_zero(amax: float, scale: float) -> None:
    assert_bits_equal(fp8_scale(torch.tensor([amax])), torch.tensor([scale]))


@pytest.mark.parametrize(
    ("shape", "cell"),
    [((1,), (0,)), ((200,), (150,)), ((200, 1), (150, 0)), ((2, 3), (1, 2))],
    ids=["tensor", "channel-1d", "channel-2d", "block"],
)
def test_fp8_scale_reaches_the_elements_of_its_granule(shape: tuple[int, ...], cell: tuple[int, ...]) -> None:
    scale = torch.arange(1.0, math.prod(shape) + 1).reshape(shape)
    expanded = expand_fp8_scale(scale, 200, 300).expand(200, 300)
    assert expanded[150, 290].item() == scale[cell].item()
