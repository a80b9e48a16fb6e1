"""One slab of a weight -> the bytes of its codes and scales, and its error sums."""

from dataclasses import dataclass, replace

import numpy as np

from convert_ckpt.methods.grid import Grid
from convert_ckpt.run.buffers import Buffers
from run_ckpt.contract.formats import E4M3_MAX, E8M0, F32_TINY, MX_BLOCK_SIZE, NVFP4_LARGEST
from run_ckpt.contract.layouts import PLAIN
from run_ckpt.contract.manifest import INVERSE_TENSOR_SCALE, TENSOR_SCALE, WEIGHT, WEIGHT_SCALE, Layer

# float32 bits of infinity: magnitudes from here on are not finite.
_INFINITY_BITS = 0x7F800000


@dataclass(frozen=True)
class TensorWrite:
    """Bytes for the tensor that plays ``role``, at byte ``offset`` of it."""

    role: str
    offset: int
    data: np.ndarray


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Sums over elements, in float64: (w - decoded)^2, w^2; and the largest |w - decoded|."""

    squared_error: float
    squared_signal: float
    largest: float


def weight_bits(raw: np.ndarray, dtype: str, K: int) -> np.ndarray:
    """Return the bits of the rows in ``raw`` as the kernels take them.

    BF16 -> int16 [n, K]; F32 -> int32 [n, K]; F16, which is exact in F32, -> int32 [n, K].
    """
    if dtype == "BF16":
        return raw.view(np.int16).reshape(-1, K)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32).view(np.int32).reshape(-1, K)
    return raw.view(np.int32).reshape(-1, K)


def to_float(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bits as weight_bits() gives them."""
    return (bits if bits.itemsize == 4 else bits.astype(np.int32) << 16).view(np.float32)


def largest_magnitude(bits: np.ndarray) -> int:
    """Return the float32 bits of the largest magnitude."""
    from convert_ckpt.kernels.fp8 import tile_maxima

    return int(tile_maxima(bits, *bits.shape)[0, 0])


def is_finite(magnitude_bits: int) -> bool:
    return magnitude_bits < _INFINITY_BITS


def fp8_scales(amax_bits: np.ndarray) -> np.ndarray:
    """Return float32 amax / 448, or 1 where that is zero; twin of contract.codec.fp8_scale."""
    scales = amax_bits.view(np.float32) / np.float32(E4M3_MAX)
    scales[scales == 0] = 1.0
    return scales


def tensor_scale(amax_bits: int, layer: Layer) -> np.ndarray:
    """Return float32 [1]: the scale of a layer's whole weight as it is on disk, given the largest magnitude's bits.

    Twin of contract.codec.fp8_scale and nvfp4_tensor_scale.
    """
    amax = np.array([amax_bits], np.uint32)
    if not layer.format.is_two_level:
        return fp8_scales(amax)
    largest = np.float32(NVFP4_LARGEST)
    scale = amax.view(np.float32) / largest
    is_usable = scale >= np.float32(F32_TINY)
    if INVERSE_TENSOR_SCALE in layer.tensors:
        scale = np.divide(largest, amax.view(np.float32), out=np.ones(1, np.float32), where=is_usable)
    return np.where(is_usable, scale, np.float32(1))


def quantize(
    bits: np.ndarray, layer: Layer, row: int, buffers: Buffers, tensor_scale: np.ndarray | None
) -> tuple[list[TensorWrite], ErrorSums, int]:
    """Return writes, errors and the largest magnitude (float32 bits) of rows ``row``.. of a layer.

    bits: of the rows, see weight_bits. The writes' data lie in ``buffers``. tensor_scale: see tensor_scale(), where a
    scale follows from the whole weight, whose amax was taken before (the largest magnitude is then returned as 0), else
    None.
    """
    return _QUANTIZERS[layer.format.name](bits, layer, row, buffers, tensor_scale)


def _quantize_mx(
    bits: np.ndarray, layer: Layer, row: int, buffers: Buffers, tensor_scale: np.ndarray | None
) -> tuple[list[TensorWrite], ErrorSums, int]:
    from convert_ckpt.kernels.mx import quantize_slab

    n_rows, K = bits.shape
    pitch = layer.scale_shape[1]
    width = K // layer.format.element.per_byte
    weight = buffers.get(WEIGHT, n_rows * width)
    scale = buffers.get(WEIGHT_SCALE, n_rows * pitch)
    scale[:] = 0
    errors, largest = quantize_slab(
        bits, layer.scale_rule, layer.scheme, weight_out=weight, scale_out=scale, scale_pitch=pitch
    )
    writes = [TensorWrite(WEIGHT, row * width, weight), TensorWrite(WEIGHT_SCALE, row * pitch, scale)]
    return writes, ErrorSums(*errors.tolist()), largest


def _quantize_fp8(
    bits: np.ndarray, layer: Layer, row: int, buffers: Buffers, tensor_scale: np.ndarray | None
) -> tuple[list[TensorWrite], ErrorSums, int]:
    from convert_ckpt.kernels.fp8 import encode_slab, tile_maxima

    n_rows, K = bits.shape
    tile_rows, tile_cols = layer.scheme.block[0] or n_rows, layer.scheme.block[1] or K
    largest = 0
    if tensor_scale is None:
        amax_bits = tile_maxima(bits, tile_rows, tile_cols)
        largest = int(amax_bits.max())
        scales = fp8_scales(amax_bits)
    else:
        scales = tensor_scale.reshape(1, 1)
    codes = buffers.get(WEIGHT, n_rows * K).reshape(n_rows, K)
    errors = encode_slab(bits, scales, tile_rows, tile_cols, codes)
    scale_offset = row // tile_rows * scales.shape[1] * scales.itemsize
    writes = [TensorWrite(WEIGHT, row * K, codes)]
    if tensor_scale is None or row == 0:
        writes.append(TensorWrite(WEIGHT_SCALE, scale_offset, scales))
    return writes, ErrorSums(*errors.tolist()), largest


def _quantize_nvfp4(
    bits: np.ndarray, layer: Layer, row: int, buffers: Buffers, tensor_scale: np.ndarray | None
) -> tuple[list[TensorWrite], ErrorSums, int]:
    from convert_ckpt.kernels.nvfp4 import quantize_slab

    assert tensor_scale is not None
    n_rows, K = bits.shape
    n_scales = layer.scale_shape[1]
    weight, scale = buffers.get(WEIGHT, n_rows * K // 2), buffers.get(WEIGHT_SCALE, n_rows * n_scales)
    errors = quantize_slab(bits, _multiplier(layer, tensor_scale), weight_out=weight, scale_out=scale)
    writes = [TensorWrite(WEIGHT, row * K // 2, weight), TensorWrite(WEIGHT_SCALE, row * n_scales, scale)]
    if row == 0:
        role = next(role for role in (TENSOR_SCALE, INVERSE_TENSOR_SCALE) if role in layer.tensors)
        writes.append(TensorWrite(role, 0, tensor_scale))
    return writes, ErrorSums(*errors.tolist()), 0


def _multiplier(layer: Layer, tensor_scale: np.ndarray) -> np.ndarray:
    """Return what the scales of blocks are multiplied by; twin of contract.codec.tensor_scale."""
    return np.float32(1) / tensor_scale if INVERSE_TENSOR_SCALE in layer.tensors else tensor_scale


def decode_grid(bits: np.ndarray, layer: Layer, scales: np.ndarray, tensor_scale: np.ndarray | None) -> Grid:
    """Return the values that the codes of a whole weight stand for under the scales that quantize() chose."""
    N, K = bits.shape
    rows, cols = layer.scheme.block
    if layer.format.scale == E8M0:
        scales = _plain_mx_scales(bits, layer)
    elif layer.format.is_two_level and tensor_scale is not None:
        from convert_ckpt.kernels.nvfp4 import SCALES

        scales = SCALES[scales.reshape(layer.scale_shape)] * _multiplier(layer, tensor_scale)
    repeated = np.repeat(scales, rows or N, axis=0)[:N]
    return Grid(layer.format.element.name, np.ascontiguousarray(repeated.T), np.arange(K) // (cols or K))


def encode_on_grid(
    decoded: np.ndarray,
    layer: Layer,
    row: int,
    scales: np.ndarray,
    tensor_scale: np.ndarray | None,
    out: np.ndarray,
) -> None:
    """Write the codes of rows ``row``.. to ``out`` uint8, given values of the grid, float32 [n, K].

    scales: of the whole weight, as quantize() writes them.
    """
    _ENCODERS[layer.format.name](decoded.view(np.int32), layer, row, scales, tensor_scale, out)


def _plain_mx_scales(bits: np.ndarray, layer: Layer) -> np.ndarray:
    """Return float32 [N, K/32]."""
    from convert_ckpt.kernels.mx import SCALES, quantize_slab

    (N, K), plain = bits.shape, replace(layer.scheme, layout=PLAIN)
    codes, out = np.empty((N, K // MX_BLOCK_SIZE), np.uint8), np.empty(N * K // layer.format.element.per_byte, np.uint8)
    quantize_slab(bits, layer.scale_rule, plain, weight_out=out, scale_out=codes, scale_pitch=codes.shape[1])
    return SCALES[codes]


def _encode_mx(
    bits: np.ndarray, layer: Layer, row: int, scales: np.ndarray, tensor_scale: np.ndarray | None, out: np.ndarray
) -> None:
    from convert_ckpt.kernels.mx import GIVEN, quantize_slab

    pitch = layer.scale_shape[1]
    part = scales[row * pitch : (row + len(bits)) * pitch]
    quantize_slab(bits, GIVEN, layer.scheme, weight_out=out, scale_out=part, scale_pitch=pitch)


def _encode_nvfp4(
    bits: np.ndarray, layer: Layer, row: int, scales: np.ndarray, tensor_scale: np.ndarray | None, out: np.ndarray
) -> None:
    from convert_ckpt.kernels.nvfp4 import quantize_slab

    assert tensor_scale is not None
    n_scales = layer.scale_shape[1]
    part = scales[row * n_scales : (row + len(bits)) * n_scales]
    quantize_slab(bits, _multiplier(layer, tensor_scale), weight_out=out, scale_out=part, given=True)


def _encode_fp8(
    bits: np.ndarray, layer: Layer, row: int, scales: np.ndarray, tensor_scale: np.ndarray | None, out: np.ndarray
) -> None:
    from convert_ckpt.kernels.fp8 import encode_slab

    n_rows, K = bits.shape
    rows, cols = layer.scheme.block
    part = scales[layer.scheme.scale_rows(row, row + n_rows)]
    encode_slab(bits, part, rows or n_rows, cols or K, out.reshape(n_rows, K))


# Format -> the wrapper of its kernel.
_QUANTIZERS = {"mxfp4": _quantize_mx, "mxfp8": _quantize_mx, "nvfp4": _quantize_nvfp4, "fp8": _quantize_fp8}
_ENCODERS = {"mxfp4": _encode_mx, "mxfp8": _encode_mx, "nvfp4": _encode_nvfp4, "fp8": _encode_fp8}
