"""The Triton kernels against torch; test_triton.py runs these in Triton's interpreter, or on a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from run_ckpt.backends.activations import round_rows
from run_ckpt.backends.reference import decode_weight
from run_ckpt.backends.triton.backend import TRITON
from run_ckpt.backends.triton.matmul import FUSED_MAX_M, dequantize
from run_ckpt.contract import codec
from run_ckpt.contract.codec import tensor_scale
from run_ckpt.contract.formats import PLAIN_NVFP4
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE
from tests.bits import assert_bits_equal
from tests.checkpoints import random_weight
from tests.codec import dequantize_fp8, dequantize_mxfp4, dequantize_mxfp8, fp8_scheme
from tests.layers import SCHEMES, make_layer

# Without a GPU these only run with TRITON_INTERPRET=1, set before triton is imported.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# One element; one more than each tile; exactly a tile; more rows than the fused kernel takes.
SHAPES = [(1, 1, 32), (17, 33, 96), (16, 32, 128), (65, 70, 160), (0, 16, 32), (FUSED_MAX_M + 1, 40, 64)]


def assert_same_values(actual: Tensor, expected: Tensor) -> None:
    """Every byte agrees, but for those of a NaN, whose sign and payload the hardware chooses."""
    actual = actual.cpu()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_bits_equal(actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


def integers(*shape: int, largest: int, seed: int) -> Tensor:
    values = torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed)).float()
    # Every block holds the largest, so that every scale is the same power of two.
    values[..., ::32] = largest
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_decodes_at_every_scale_as_torch_decodes_it(dtype: torch.dtype) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    codes = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    decoded = dequantize(packed.to(DEVICE), codes.to(DEVICE), None, "mxfp4", 512, dtype)
    assert_same_values(decoded, dequantize_mxfp4(packed, codes).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_e4m3_code_decodes_at_every_e8m0_scale_as_torch_decodes_it(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(torch.float8_e4m3fn)
    scale_codes = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 8)
    decoded = dequantize(codes.to(DEVICE), scale_codes.to(DEVICE), None, "mxfp8", 256, dtype)
    assert_same_values(decoded, dequantize_mxfp8(codes, scale_codes).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_e2m1_byte_decodes_at_every_e4m3_scale_as_torch_decodes_it(dtype: torch.dtype) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 32).view(torch.float8_e4m3fn)
    second = torch.tensor([0.123])
    decoded = dequantize(packed.to(DEVICE), scale.to(DEVICE), second.to(DEVICE), "nvfp4", 512, dtype)
    assert_same_values(decoded, codec.dequantize(packed, scale, PLAIN_NVFP4, second).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_shape", [(1,), (130,), (130, 1), (2, 3)], ids=["tensor", "row", "column", "block"])
def test_every_fp8_code_decodes_as_torch_decodes_it(scale_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # K is no multiple of anything, and the last block of 128 is cut in both directions.
    codes = torch.arange(259).remainder(256).to(torch.uint8).repeat(130, 1).view(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape, generator=torch.Generator().manual_seed(len(scale_shape)))
    decoded = dequantize(codes.to(DEVICE), scale.to(DEVICE), None, fp8_scheme(scale, 130).granularity, 259, dtype)
    assert_same_values(decoded, dequantize_fp8(codes, scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["mxfp4-plain", "mxfp8", "fp8-block"])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_product_is_exact_where_every_sum_is(scheme: str, M: int, N: int, K: int, dtype: torch.dtype) -> None:
    # |sum| <= 160 * 2 * 4 + 8 has at most 11 bits, which all three dtypes' float32 sums hold.
    weight, x = integers(N, K, largest=4, seed=1), integers(M, K, largest=2, seed=2)
    bias = integers(N, largest=8, seed=3)
    layer, tensors = make_layer(scheme, weight)
    if scheme == "fp8-block":
        # A scale of 4 / 448 is no power of two.
        tensors = {WEIGHT: weight.to(torch.float8_e4m3fn), WEIGHT_SCALE: torch.ones_like(tensors[WEIGHT_SCALE])}
    operands = {role: tensor.to(DEVICE) for role, tensor in TRITON.prepare(layer, tensors).items()}
    y = TRITON.matmul(layer, x.to(DEVICE, dtype), operands, bias.to(DEVICE, dtype))
    assert_bits_equal(y.cpu(), (x.double() @ weight.double().T + bias.double()).to(dtype))


def test_ties_round_to_even_as_torch_rounds_them() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(64, 1).view(torch.float8_e4m3fn)
    # 1 + odd / 256 is half way between two bfloat16, and so is its product with a power of two.
    scale = 1 + (2 * torch.arange(64.0) + 1) / 256
    decoded = dequantize(codes.to(DEVICE), scale.to(DEVICE), None, "channel", 256, torch.bfloat16)
    assert_same_values(decoded, dequantize_fp8(codes, scale).bfloat16())


def test_as_many_block_scales_as_rows_are_still_block_scales() -> None:
    codes = integers(16, 2048, largest=4, seed=1).to(torch.float8_e4m3fn)
    scale = torch.arange(1, 17, dtype=torch.float32).reshape(1, 16)
    decoded = dequantize(codes.to(DEVICE), scale.to(DEVICE), None, "block", 2048, torch.float32)
    assert_bits_equal(decoded.cpu(), dequantize_fp8(codes, scale))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("M", "dtype"), [(5, torch.bfloat16), (5, torch.float16), (FUSED_MAX_M + 1, torch.bfloat16)])
def test_product_is_that_of_the_reference_up_to_the_order_of_the_sum(scheme: str, dtype: torch.dtype, M: int) -> None:
    layer, tensors = make_layer(scheme, random_weight(64, 320))
    x = torch.randn(M, 320, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(dtype)
    operands = TRITON.prepare(layer, {role: tensor.to(DEVICE) for role, tensor in tensors.items()})
    weight = decode_weight(tensors[WEIGHT], tensors[WEIGHT_SCALE], layer.scheme, dtype, tensor_scale(tensors)).double()
    expected = x.double() @ weight.T + bias.double()
    y = TRITON.matmul(layer, x.to(DEVICE), operands, bias.to(DEVICE)).cpu()
    assert y.dtype == dtype
    # 321 additions in float32, then one rounding.
    magnitude = x.double().abs() @ weight.abs().T + bias.double().abs()
    bound = 321 * 2.0**-24 * magnitude + torch.finfo(dtype).eps / 2 * expected.abs()
    assert ((y.double() - expected).abs() <= bound * (1 + 2.0**-10)).all()


def test_pre_shuffled_bytes_are_put_in_order_and_back() -> None:
    weight = random_weight(288, 320)
    layer, tensors = make_layer("mxfp4-aiter", weight)
    _, plain = make_layer("mxfp4-plain", weight)
    operands = TRITON.prepare(layer, dict(tensors))
    restored = TRITON.restore(layer, operands) if TRITON.restore else {}
    for role in (WEIGHT, WEIGHT_SCALE):
        assert_bits_equal(operands[role], plain[role])
        assert_bits_equal(restored[role], tensors[role])


def test_nan_in_an_activation_stays_in_its_row_and_in_a_scale_in_its_column() -> None:
    layer, tensors = make_layer("mxfp4-plain", integers(40, 64, largest=4, seed=1))
    tensors[WEIGHT_SCALE][7, 1] = 255
    x = torch.ones(5, 64)
    x[3, 40] = math.nan
    operands = {role: tensor.to(DEVICE) for role, tensor in tensors.items()}
    is_nan = TRITON.matmul(layer, x.to(DEVICE), operands, None).isnan().cpu()
    expected = torch.zeros(5, 40, dtype=torch.bool)
    expected[3], expected[:, 7] = True, True
    assert torch.equal(is_nan, expected)


@pytest.mark.parametrize("scheme", ["mxfp4-aiter", "fp8-block"])
def test_compile_takes_the_product_whole(scheme: str) -> None:
    layer, tensors = make_layer(scheme, random_weight(64, 256))
    operands = TRITON.prepare(layer, {role: tensor.to(DEVICE) for role, tensor in tensors.items()})
    x, bias = torch.randn(3, 256, device=DEVICE), torch.ones(64, device=DEVICE)

    def story(x: Tensor) -> Tensor:
        return F.silu(TRITON.matmul(layer, x * 2, operands, bias))

    assert_bits_equal(torch.compile(story, fullgraph=True, backend="aot_eager")(x).cpu(), story(x).cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["mxfp8", "mxfp4"])
def test_activations_are_rounded_as_torch_rounds_them(activations: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    # Every exponent of float32 as that of the largest, with what is far below it; ties; bits at random.
    scales = torch.exp2(torch.arange(-149, 128).double()).float()[:, None]
    ordinary = scales * (torch.rand(277, 32, generator=generator) * 2 - 1)
    ties = scales * torch.tensor([1.75, 1.5, 0.75, -0.875, 0.3125, 0.4375, -0.0, 1 / 448] * 4)
    bits = torch.randint(-(2**15), 2**15, (512, 32), generator=generator).to(torch.int16).view(torch.bfloat16)
    special = torch.zeros(3, 32)
    special[0, 3], special[1, 5], special[2] = math.inf, math.nan, -0.0
    x = torch.cat([ordinary, ties, bits.float(), special]).to(dtype)
    assert TRITON.round_rows is not None
    rounded = TRITON.round_rows(x.to(DEVICE), activations, None)
    assert_same_values(rounded, round_rows(x, activations, None))
