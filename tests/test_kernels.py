"""The converter's kernels give the bytes of the torch reference, slab by slab, on input chosen to break them."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from convert_ckpt.run.buffers import Buffers
from convert_ckpt.run.slab import ErrorSums, largest_magnitude, quantize, tensor_scale, weight_bits
from run_ckpt.contract import codec
from run_ckpt.contract.dialects.dialect import usual_scale_shape, usual_suffixes
from run_ckpt.contract.formats import (
    AITER_MXFP4,
    BLOCK_FP8,
    CHANNEL_FP8,
    E2M1_MIDPOINTS,
    E2M1_VALUES,
    MXFP8,
    PLAIN_MXFP4,
    PLAIN_MXFP8,
    PLAIN_NVFP4,
    SCALE_RULES,
    TENSOR_FP8,
    Scheme,
)
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from run_ckpt.contract.manifest import INVERSE_TENSOR_SCALE, TENSOR_SCALE, WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.storage.rows import STORED_DTYPES
from tests.bits import assert_bits_equal
from tests.codec import dequantize_fp8, dequantize_mxfp4, dequantize_mxfp8, expand_fp8_scale, quantize_mxfp4

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
MXFP4_SCHEMES = {"aiter": AITER_MXFP4, "plain": PLAIN_MXFP4}
FP8_SCHEMES = {"tensor": TENSOR_FP8, "channel": CHANNEL_FP8, "block": BLOCK_FP8}
# Bytes that no test expects to find: what a kernel leaves unwritten shows.
UNWRITTEN = 0xA5


@dataclass(frozen=True)
class Converted:
    """A weight as the file would hold it, and what the kernels measured, over all slabs."""

    weight: Tensor
    scale: Tensor
    second: Tensor | None
    errors: ErrorSums
    largest_bits: int


def from_bits(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    integer = np.int32 if dtype == torch.float32 else np.int16
    return torch.from_numpy(np.ascontiguousarray(bits).astype(integer)).view(dtype)


@cache
def every_bf16_amax() -> Tensor:
    """bfloat16 [1024, 1024]: blocks with every finite amax; lanes are ties at either scale, zeros of both
    signs, the least and greatest subnormal, neighbours of ties, and random values below amax."""
    rng = np.random.default_rng(0)
    amax = np.resize(np.arange(0x7F80), 1024 * 32)
    exponent = np.maximum(amax >> 7, 1)
    ties = np.array(E2M1_MIDPOINTS)
    lanes = np.empty((amax.size, 32), np.int64)
    for first, above_floor in ((0, 0), (7, 1)):
        values = np.ldexp(ties, (exponent - 127 - 2 + above_floor)[:, None])
        lanes[:, first : first + 7] = truncated_bf16_bits(values)
    lanes[:, 14:18] = lanes[:, 2:6] + 1
    lanes[:, 18:22] = np.maximum(lanes[:, 2:6] - 1, 0)
    lanes[:, 22:26] = [0, 0, 1, 0x7F]
    lanes[:, 26:31] = rng.integers(np.maximum(amax - 5 * 128, 0)[:, None], amax[:, None] + 1, (amax.size, 5))
    lanes[:, 31] = amax
    lanes = np.minimum(lanes, amax[:, None])
    lanes = rng.permuted(lanes, axis=1) | (rng.integers(0, 2, lanes.shape) << 15)
    return from_bits(lanes.reshape(1024, 1024), torch.bfloat16)


def truncated_bf16_bits(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinity, which is then cut to amax
        return values.astype(np.float32).view(np.int32) >> 16


@cache
def random_bf16_patterns() -> Tensor:
    """bfloat16 [288, 320]: any finite bit patterns."""
    bits = np.random.default_rng(1).integers(0, 0x7F80, (288, 320))
    return from_bits(bits | (np.random.default_rng(2).integers(0, 2, bits.shape) << 15), torch.bfloat16)


@cache
def random_f32_patterns() -> Tensor:
    """float32 [288, 320]: any finite bit patterns."""
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 0x7F800000, (288, 320)) | (rng.integers(0, 2, (288, 320)) << 31)
    return from_bits(bits, torch.float32)


@cache
def f32_beside_ties() -> Tensor:
    """float32 [288, 320]: E2M1 and E4M3 ties at many scales, and one step of float32 below and above them,
    which bfloat16 would make ties too."""
    rng = np.random.default_rng(4)
    exponents = rng.integers(-120, 120, (288, 10, 1))
    ties = rng.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 4.25, 4.75, 1.0625], (288, 10, 32))
    ties[..., 0] = 6.0
    bits = np.ldexp(ties, exponents).astype(np.float32).view(np.int32) + rng.integers(-1, 2, ties.shape)
    bits[..., 0] -= bits[..., 0] & 1
    bits |= rng.integers(0, 2, bits.shape, np.int32) << 31
    return from_bits(bits.reshape(288, 320), torch.float32)


@cache
def every_f16_value() -> Tensor:
    """float16 [64, 1024]: every finite bit pattern, in random order."""
    magnitudes = np.arange(0x7C00)
    bits = np.resize(np.concatenate((magnitudes, magnitudes | 0x8000)), 64 * 1024)
    return from_bits(np.random.default_rng(5).permutation(bits).reshape(64, 1024), torch.float16)


def normal(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)).to(dtype)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "every-bf16-amax": every_bf16_amax,
    "bf16-patterns": random_bf16_patterns,
    "f32-patterns": random_f32_patterns,
    "f32-beside-ties": f32_beside_ties,
    "every-f16": every_f16_value,
}
ORDINARY: dict[str, Callable[[], Tensor]] = {
    "bf16": lambda: normal(288, 320),
    "f32": lambda: normal(288, 320, torch.float32),
    "f16": lambda: normal(288, 320, torch.float16),
    "bf16-small": lambda: normal(64, 4096) * 2.0**-100,
    "f32-large": lambda: normal(64, 1024, torch.float32) * 2.0**100,
}


def make_layer(weight: Tensor, scheme: Scheme, scale_rule: str = "even", roles: tuple[str, ...] | None = None) -> Layer:
    N, K = weight.shape
    return Layer(
        module="layer",
        scheme=scheme,
        N=N,
        K=K,
        source_tensor="layer.weight",
        source_dtype=DTYPE_NAMES[weight.dtype],
        scale_rule=scale_rule,
        tensors={role: f"layer.{role}" for role in roles or usual_suffixes(scheme, "diffusers")},
        scale_shape=usual_scale_shape(N, K, scheme),
    )


def kernel_bits(weight: Tensor) -> np.ndarray:
    raw = weight.contiguous().view(torch.uint8).numpy().reshape(-1)
    return weight_bits(raw, DTYPE_NAMES[weight.dtype], weight.shape[1])


def convert(
    weight: Tensor,
    scheme: Scheme,
    *,
    scale_rule: str = "even",
    slab_rows: int | None = None,
    roles: tuple[str, ...] | None = None,
) -> Converted:
    """Quantize slabs of ``slab_rows`` rows and lay what they write into files that were zero, as the engine does."""
    layer = make_layer(weight, scheme, scale_rule, roles)
    specs = layer.specs()
    files = {role: np.zeros(spec.nbytes, np.uint8) for role, spec in specs.items()}
    bits = kernel_bits(weight)
    scale = tensor_scale(largest_magnitude(bits), layer) if scheme.has_tensor_scale else None
    buffers = Buffers()
    all_errors, largest_bits = [], 0
    step = slab_rows or layer.N
    for row in range(0, layer.N, step):
        buffers.get(WEIGHT, step * layer.K)[:] = UNWRITTEN
        slab = bits[row : row + step]
        writes, errors, largest = quantize(slab, layer, row, buffers, scale)
        for write in writes:
            data = write.data.reshape(-1).view(np.uint8)
            files[write.role][write.offset : write.offset + data.size] = data
        all_errors.append(errors)
        largest_bits = max(largest_bits, largest)
    tensors = {role: torch.from_numpy(data) for role, data in files.items()}
    tensors = {role: tensor.view(STORED_DTYPES[specs[role].dtype]) for role, tensor in tensors.items()}
    return Converted(
        tensors[WEIGHT].reshape(specs[WEIGHT].shape),
        tensors[WEIGHT_SCALE].reshape(specs[WEIGHT_SCALE].shape),
        codec.tensor_scale(tensors),
        ErrorSums(
            sum(errors.squared_error for errors in all_errors),
            sum(errors.squared_signal for errors in all_errors),
            max(errors.largest for errors in all_errors),
        ),
        largest_bits,
    )


def reference_mxfp4(weight: Tensor, scheme: Scheme, scale_rule: str) -> tuple[Tensor, Tensor]:
    packed, scale_codes = quantize_mxfp4(weight, scale_rule)
    if scheme == AITER_MXFP4:
        return AITER_WEIGHT.shuffle(packed), AITER_SCALE.shuffle(AITER_SCALE.pad_to_tile(scale_codes))
    return packed, scale_codes


def reference_fp8(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    magnitude = weight.float().abs()
    if scheme == TENSOR_FP8:
        amax = magnitude.max().reshape(1)
    elif scheme == CHANNEL_FP8:
        amax = magnitude.amax(1)
    else:
        tiles = [[tile.max() for tile in rows.split(128, 1)] for rows in magnitude.split(128, 0)]
        amax = torch.tensor(tiles)
    scale = codec.fp8_scale(amax)
    return codec.quantize_fp8(weight, expand_fp8_scale(scale, N, K)), scale


@pytest.mark.parametrize("granularity", FP8_SCHEMES)
def test_the_codec_takes_the_amax_of_each_block(granularity: str) -> None:
    weight, scheme = normal(150, 272), FP8_SCHEMES[granularity]
    codes, scale = reference_fp8(weight, scheme)
    quantized, scales = codec.quantize(weight, scheme, "amax_over_448")
    assert_bits_equal(quantized, codes)
    assert_bits_equal(scales.reshape(scale.shape), scale)


def expected_errors(weight: Tensor, decoded: Tensor) -> ErrorSums:
    error = weight.double() - decoded.double()
    return ErrorSums(float((error**2).sum()), float((weight.double() ** 2).sum()), float(error.abs().max()))


@pytest.mark.parametrize("layout", MXFP4_SCHEMES)
@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("source", INPUTS)
def test_mxfp4_bytes_are_those_of_the_reference(source: str, scale_rule: str, layout: str) -> None:
    weight, scheme = INPUTS[source](), MXFP4_SCHEMES[layout]
    converted = convert(weight, scheme, scale_rule=scale_rule)
    packed, scale = reference_mxfp4(weight, scheme, scale_rule)
    assert_bits_equal(converted.scale, scale)
    assert_bits_equal(converted.weight, packed)


@pytest.mark.parametrize("K", [32, 64, 96, 160, 256, 320, 1056, 4096])
def test_mxfp4_takes_every_multiple_of_32_as_k(K: int) -> None:
    weight = normal(32, K)
    converted = convert(weight, PLAIN_MXFP4, scale_rule="mse")
    packed, scale = reference_mxfp4(weight, PLAIN_MXFP4, "mse")
    assert_bits_equal(converted.scale, scale)
    assert_bits_equal(converted.weight, packed)


@pytest.mark.parametrize("shape", [(32, 64), (256, 256), (288, 320), (512, 2048), (544, 192)], ids=str)
def test_tiled_bytes_are_those_of_the_reference_in_every_shape(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    converted = convert(weight, AITER_MXFP4)
    packed, scale = reference_mxfp4(weight, AITER_MXFP4, "even")
    assert_bits_equal(converted.scale, scale)
    assert_bits_equal(converted.weight, packed)


@pytest.mark.parametrize("slab_rows", [32, 64, 96, 256])
@pytest.mark.parametrize("layout", MXFP4_SCHEMES)
def test_mxfp4_bytes_do_not_depend_on_the_slabs(layout: str, slab_rows: int) -> None:
    weight, scheme = normal(288, 320), MXFP4_SCHEMES[layout]
    whole, slabs = convert(weight, scheme), convert(weight, scheme, slab_rows=slab_rows)
    assert_bits_equal(slabs.scale, whole.scale)
    assert_bits_equal(slabs.weight, whole.weight)


def test_tiled_scale_fills_the_first_rows_of_the_padded_scale_and_leaves_the_rest_zero() -> None:
    # 288 rows are 9 scale tiles of 32 rows, the slowest axis: their bytes are the first 288 rows of the
    # padded [512, 16], and the rows from 288 on are never written. K / 32 = 10 is padded to 16 inside a tile.
    weight = normal(288, 320)
    layer = make_layer(weight, AITER_MXFP4)
    writes, _, _ = quantize(kernel_bits(weight), layer, 0, Buffers(), None)
    scale = next(write for write in writes if write.role == WEIGHT_SCALE)
    padded = reference_mxfp4(weight, AITER_MXFP4, "even")[1]
    assert (scale.offset, scale.data.size, layer.scale_shape) == (0, 288 * 16, (512, 16))
    assert_bits_equal(torch.from_numpy(scale.data).reshape(288, 16), padded[:288])
    assert not padded[288:].any()


def test_tiled_slab_starts_at_its_row_in_the_padded_scale() -> None:
    weight = normal(288, 320)
    writes, _, _ = quantize(kernel_bits(weight)[96:], make_layer(weight, AITER_MXFP4), 96, Buffers(), None)
    assert {write.role: write.offset for write in writes} == {WEIGHT: 96 * 160, WEIGHT_SCALE: 96 * 16}


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
def test_all_zero_weight_gives_zero_bytes_that_keep_the_signs(scale_rule: str) -> None:
    weight = torch.tensor([0.0, -0.0], dtype=torch.bfloat16).repeat(32, 32)
    converted = convert(weight, PLAIN_MXFP4, scale_rule=scale_rule)
    assert (converted.weight.unique().tolist(), converted.scale.unique().tolist()) == ([0x80], [0])


def test_f32_weight_is_not_rounded_to_bf16_first() -> None:
    # Just above the tie 2.5: E2M1 takes 3; as bfloat16 it would be the tie, and go to 2.
    weight = torch.full((32, 32), float(np.nextafter(np.float32(2.5), np.float32(3))))
    weight[:, 0] = 6.0
    converted = convert(weight, PLAIN_MXFP4)
    assert dequantize_mxfp4(converted.weight, converted.scale)[0, 1].item() == 3.0


@pytest.mark.parametrize("granularity", FP8_SCHEMES)
@pytest.mark.parametrize("source", INPUTS)
def test_fp8_bytes_are_those_of_the_reference(source: str, granularity: str) -> None:
    weight, scheme = INPUTS[source](), FP8_SCHEMES[granularity]
    converted = convert(weight, scheme)
    codes, scale = reference_fp8(weight, scheme)
    assert_bits_equal(converted.scale, scale)
    assert_bits_equal(converted.weight.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("shape", [(16, 16), (48, 80), (128, 128), (144, 272), (272, 1040)], ids=str)
@pytest.mark.parametrize("granularity", FP8_SCHEMES)
def test_fp8_takes_every_multiple_of_16(granularity: str, shape: tuple[int, int]) -> None:
    weight, scheme = normal(*shape), FP8_SCHEMES[granularity]
    converted = convert(weight, scheme)
    codes, scale = reference_fp8(weight, scheme)
    assert_bits_equal(converted.scale, scale)
    assert_bits_equal(converted.weight.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize(("granularity", "slab_rows"), [("tensor", 1), ("tensor", 100), ("channel", 7), ("block", 128)])
def test_fp8_bytes_do_not_depend_on_the_slabs(granularity: str, slab_rows: int) -> None:
    weight, scheme = normal(288, 320), FP8_SCHEMES[granularity]
    whole, slabs = convert(weight, scheme), convert(weight, scheme, slab_rows=slab_rows)
    assert_bits_equal(slabs.scale, whole.scale)
    assert_bits_equal(slabs.weight.view(torch.uint8), whole.weight.view(torch.uint8))


@pytest.mark.parametrize("granularity", FP8_SCHEMES)
def test_fp8_all_zero_weight_gets_scale_1_and_keeps_the_signs(granularity: str) -> None:
    weight = torch.tensor([0.0, -0.0], dtype=torch.bfloat16).repeat(256, 128)
    converted = convert(weight, FP8_SCHEMES[granularity])
    assert converted.scale.unique().tolist() == [1.0]
    assert_bits_equal(converted.weight.view(torch.uint8), torch.tensor([0, 0x80], dtype=torch.uint8).repeat(256, 128))


def test_fp8_codes_saturate_under_a_scale_that_is_too_small() -> None:
    # A fused group's scale comes from the group; the kernel itself must not rely on it.
    weight = torch.tensor([[1000.0, -1000.0] * 8] * 16)
    layer = make_layer(weight, TENSOR_FP8)
    writes, _, _ = quantize(kernel_bits(weight), layer, 0, Buffers(), np.ones(1, np.float32))
    assert np.unique(writes[0].data).tolist() == [0x7E, 0xFE]


@pytest.mark.parametrize("scale_rule", MXFP8.scale_rules)
@pytest.mark.parametrize("source", INPUTS)
def test_mxfp8_bytes_are_those_of_the_reference(source: str, scale_rule: str) -> None:
    weight = INPUTS[source]()
    converted = convert(weight, PLAIN_MXFP8, scale_rule=scale_rule)
    codes, scale = codec.quantize(weight, PLAIN_MXFP8, scale_rule)
    assert_bits_equal(converted.scale, scale)
    assert_bits_equal(converted.weight.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("slab_rows", [1, 16, 100])
@pytest.mark.parametrize("K", [32, 96, 320, 1056])
def test_mxfp8_takes_every_multiple_of_32_as_k_in_any_slabs(K: int, slab_rows: int) -> None:
    weight = normal(112, K)
    converted = convert(weight, PLAIN_MXFP8, scale_rule="roundup", slab_rows=slab_rows)
    codes, scale = codec.quantize(weight, PLAIN_MXFP8, "roundup")
    assert_bits_equal(converted.scale, scale)
    assert_bits_equal(converted.weight.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("scale_rule", MXFP8.scale_rules)
@pytest.mark.parametrize("source", ORDINARY)
def test_mxfp8_errors_are_those_of_float64(source: str, scale_rule: str) -> None:
    weight = ORDINARY[source]()
    errors = convert(weight, PLAIN_MXFP8, scale_rule=scale_rule, slab_rows=32).errors
    expected = expected_errors(weight, dequantize_mxfp8(*codec.quantize(weight, PLAIN_MXFP8, scale_rule)))
    # As for MXFP4.
    assert errors.squared_error == pytest.approx(expected.squared_error, rel=1e-6)
    assert errors.squared_signal == pytest.approx(expected.squared_signal, rel=1e-6)
    assert errors.largest == expected.largest


# Of ModelOpt, and of compressed-tensors, which stores the inverse of the tensor's scale.
NVFP4_ROLES = {
    "scale": (WEIGHT, WEIGHT_SCALE, TENSOR_SCALE),
    "inverse": (WEIGHT, WEIGHT_SCALE, INVERSE_TENSOR_SCALE),
}


@cache
def nvfp4_ties() -> Tensor:
    """bfloat16 [256, 512]: blocks whose two scales multiply to a power of two, so that E2M1's ties are met exactly."""
    rng = np.random.default_rng(6)
    units = np.ldexp(1.0, rng.integers(-6, 7, (256, 32, 1)))
    lanes = rng.choice([*E2M1_MIDPOINTS, *E2M1_VALUES], (256, 32, 16)) * rng.choice([-1, 1], (256, 32, 16))
    lanes[..., 5] = 6.0
    weight = torch.from_numpy((lanes * units).reshape(256, 512))
    weight[0, 0] = 2688.0
    return weight.bfloat16()


NVFP4_INPUTS = {**INPUTS, **ORDINARY, "ties": nvfp4_ties}


@pytest.mark.parametrize("roles", NVFP4_ROLES.values(), ids=NVFP4_ROLES)
@pytest.mark.parametrize("source", NVFP4_INPUTS)
def test_nvfp4_bytes_are_those_of_the_reference(source: str, roles: tuple[str, ...]) -> None:
    weight = NVFP4_INPUTS[source]()
    converted = convert(weight, PLAIN_NVFP4, roles=roles)
    amax = weight.float().abs().amax()
    inverse = {INVERSE_TENSOR_SCALE: torch.full((1,), 2688.0) / amax}
    second = codec.tensor_scale(inverse) if INVERSE_TENSOR_SCALE in roles else codec.nvfp4_tensor_scale(amax)
    assert converted.second is not None
    assert second is not None
    assert_bits_equal(converted.second, second)
    packed, scale = codec.quantize(weight, PLAIN_NVFP4, "amax_over_6", second)
    assert_bits_equal(converted.scale.view(torch.uint8), scale.view(torch.uint8))
    assert_bits_equal(converted.weight, packed)


def test_nvfp4_meets_ties_on_this_data_and_rounds_them_to_even() -> None:
    weight = nvfp4_ties()
    packed, scale = codec.quantize(weight, PLAIN_NVFP4, "amax_over_6")
    units = weight.double() / scale.double().repeat_interleave(16, dim=1)
    ties = torch.isin(units.abs(), torch.tensor(E2M1_MIDPOINTS, dtype=torch.float64))
    assert ties.sum() > 10_000
    # The even code is a whole multiple of the wider step: 0, 1, 2, 4.
    decoded = codec.dequantize(packed, scale, PLAIN_NVFP4, torch.ones(1)).double()
    rounded = (decoded / scale.double().repeat_interleave(16, dim=1)).abs()[ties]
    assert set(rounded.tolist()) == {0.0, 1.0, 2.0, 4.0}


@pytest.mark.parametrize("slab_rows", [1, 16, 100])
@pytest.mark.parametrize("K", [16, 48, 320, 1040])
def test_nvfp4_takes_every_multiple_of_16_as_k_in_any_slabs(K: int, slab_rows: int) -> None:
    weight = normal(112, K)
    converted = convert(weight, PLAIN_NVFP4, slab_rows=slab_rows)
    packed, scale = codec.quantize(weight, PLAIN_NVFP4, "amax_over_6")
    assert_bits_equal(converted.scale.view(torch.uint8), scale.view(torch.uint8))
    assert_bits_equal(converted.weight, packed)


@pytest.mark.parametrize("source", [name for name in ORDINARY if name != "bf16-small"] + ["ties", "every-f16"])
def test_nvfp4_errors_are_those_of_float64(source: str) -> None:
    weight = NVFP4_INPUTS[source]()
    errors = convert(weight, PLAIN_NVFP4, slab_rows=32).errors
    packed, scale = codec.quantize(weight, PLAIN_NVFP4, "amax_over_6")
    second = codec.nvfp4_tensor_scale(weight.abs().amax())
    expected = expected_errors(weight, codec.dequantize(packed, scale, PLAIN_NVFP4, second))
    # As for MXFP4; where a difference is rounded to float32, the largest one is too.
    assert errors.squared_error == pytest.approx(expected.squared_error, rel=1e-6)
    assert errors.squared_signal == pytest.approx(expected.squared_signal, rel=1e-6)
    assert errors.largest == pytest.approx(expected.largest, rel=2**-23)


@pytest.mark.parametrize("roles", NVFP4_ROLES.values(), ids=NVFP4_ROLES)
@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-130], ids=str)
def test_nvfp4_of_what_float32_can_not_scale_has_scales_of_1_or_the_smallest(
    value: float, roles: tuple[str, ...]
) -> None:
    converted = convert(torch.full((32, 64), value), PLAIN_NVFP4, roles=roles)
    assert converted.second is not None
    assert converted.second.tolist() == [1.0]
    assert converted.scale.float().unique().tolist() == [1.0 if value == 0 else 2.0**-9]
    assert converted.weight.unique().tolist() == [0x88 if str(value) == "-0.0" else 0]


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("source", ORDINARY)
def test_mxfp4_error_sums_are_those_of_float64(source: str, scale_rule: str) -> None:
    weight = ORDINARY[source]()
    errors = convert(weight, PLAIN_MXFP4, scale_rule=scale_rule, slab_rows=32).errors
    expected = expected_errors(weight, dequantize_mxfp4(*quantize_mxfp4(weight, scale_rule)))
    # Rows are summed in float32: some K / 8 roundings of 2^-24, mostly cancelling.
    assert errors.squared_error == pytest.approx(expected.squared_error, rel=1e-6)
    assert errors.squared_signal == pytest.approx(expected.squared_signal, rel=1e-6)


@pytest.mark.parametrize("granularity", FP8_SCHEMES)
@pytest.mark.parametrize("source", ORDINARY)
def test_fp8_error_sums_are_those_of_float64(source: str, granularity: str) -> None:
    weight, scheme = ORDINARY[source](), FP8_SCHEMES[granularity]
    errors = convert(weight, scheme).errors
    expected = expected_errors(weight, dequantize_fp8(*reference_fp8(weight, scheme)))
    # As for MXFP4.
    assert errors.squared_error == pytest.approx(expected.squared_error, rel=1e-6)
    assert errors.squared_signal == pytest.approx(expected.squared_signal, rel=1e-6)


@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("source", [*ORDINARY, "f32-beside-ties", "every-f16"])
def test_mxfp4_largest_error_is_exact(source: str, scale_rule: str) -> None:
    weight = (ORDINARY | INPUTS)[source]()
    largest = convert(weight, PLAIN_MXFP4, scale_rule=scale_rule).errors.largest
    decoded = dequantize_mxfp4(*quantize_mxfp4(weight, scale_rule))
    assert largest == expected_errors(weight, decoded).largest


@pytest.mark.parametrize("granularity", FP8_SCHEMES)
@pytest.mark.parametrize("source", [*ORDINARY, "every-f16"])
def test_fp8_largest_error_is_exact(source: str, granularity: str) -> None:
    weight, scheme = (ORDINARY | INPUTS)[source](), FP8_SCHEMES[granularity]
    largest = convert(weight, scheme).errors.largest
    assert largest == expected_errors(weight, dequantize_fp8(*reference_fp8(weight, scheme))).largest


@pytest.mark.parametrize(("scale_rule", "is_beyond"), [("even", True), ("floor", False), ("roundup", True)])
def test_mxfp4_value_beyond_float32_is_an_infinite_error(scale_rule: str, is_beyond: bool) -> None:
    weight = torch.full((32, 32), 1.875 * 2.0**127)
    largest = convert(weight, PLAIN_MXFP4, scale_rule=scale_rule).errors.largest
    assert (largest == float("inf")) == is_beyond


MEASURE = """
import sys
import numpy as np
from convert_ckpt.kernels import jit
if sys.argv[1] == "narrow":
    jit.processor = lambda: ("generic", "")
from convert_ckpt.kernels.fp8 import encode_slab
from convert_ckpt.kernels.mx import quantize_slab
from run_ckpt.contract.formats import PLAIN_MXFP4, SCALE_RULES

values = np.random.default_rng(0).standard_normal((32, 1056), np.float32)
for bits in (values.view(np.int32), np.ascontiguousarray(values.view(np.int16)[:, 1::2])):
    for rule in SCALE_RULES:
        codes, scale_codes = np.zeros(32 * 528, np.uint8), np.zeros(32 * 33, np.uint8)
        errors, _ = quantize_slab(bits, rule, PLAIN_MXFP4, weight_out=codes, scale_out=scale_codes, scale_pitch=33)
        print(errors.tobytes().hex())
    scales = np.full((1, 9), 0.01, np.float32)
    print(encode_slab(bits, scales, 128, 128, np.zeros((32, 1056), np.uint8)).tobytes().hex())
"""


def test_error_sums_have_the_same_bits_on_a_processor_without_wide_vectors() -> None:
    wide, narrow = (
        subprocess.run([sys.executable, "-c", MEASURE, width], check=True, capture_output=True).stdout
        for width in ("wide", "narrow")
    )
    assert wide == narrow


@pytest.mark.parametrize("scheme", [PLAIN_MXFP4, AITER_MXFP4, PLAIN_MXFP8, CHANNEL_FP8, BLOCK_FP8], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (31, 319), (100, 161), (287, 319)], ids=str)
def test_largest_magnitude_finds_a_single_infinity(scheme: Scheme, place: tuple[int, int]) -> None:
    weight = normal(288, 320)
    weight[place] = float("-inf")
    assert convert(weight, scheme).largest_bits == 0x7F800000


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.values())
@pytest.mark.parametrize("shape", [(1, 16), (3, 80), (32, 320)], ids=str)
def test_largest_magnitude_is_the_float32_bits_of_amax(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = normal(*shape, dtype)
    assert largest_magnitude(kernel_bits(weight)) == int(weight.float().abs().max().view(torch.int32))
