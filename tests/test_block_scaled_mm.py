"""The block_scaled_mm backend: torch's own checks of the call, and a stand-in for what the GPU does with its bytes.

No GPU here multiplies blocks with scales. The shapes, dtypes, strides, sizes and orders that the call needs are checked
by torch's own registration for tensors without data; the numbers by a stand-in that finds each scale by the formula of
cuBLAS' documentation, "1D Block Scaling Factors Layout". Compared by hand: torch 2.13's to_blocked and
_bfloat16_to_float4_e2m1fn_x2 (torch/testing/_internal/common_quantized.py, which wants expecttest) give the same bytes.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from run_ckpt.backends import block_scaled_mm
from run_ckpt.backends.activations import encode_rows, round_rows
from run_ckpt.backends.backend import Device
from run_ckpt.backends.block_scaled_mm import BLOCK_SCALED_MM
from run_ckpt.backends.choose import choose_backend
from run_ckpt.contract.codec import dequantize, tensor_scale
from run_ckpt.contract.elements import unpack_nibbles
from run_ckpt.contract.formats import E2M1_VALUES
from run_ckpt.contract.layouts import CUBLAS_SCALE
from run_ckpt.contract.manifest import INVERSE_TENSOR_SCALE, TENSOR_SCALE, WEIGHT, WEIGHT_SCALE
from tests.bits import assert_bits_equal
from tests.checkpoints import random_weight
from tests.layers import describe_layer, make_layer

SCHEMES = ["mxfp8", "nvfp4"]
SCALED_MM: Any = F.scaled_mm
BLACKWELL = Device("cuda", "sm100")


def multiply_stand_in(*arguments: Any) -> Tensor:
    """Stand in for torch.nn.functional.scaled_mm on a GPU: decode what lies there, multiply in float64."""
    checked = check_call(*arguments)
    mat_a, mat_b, scale_a, _, scale_b, *_ = arguments
    product = _decode(mat_a, scale_a[0]) @ _decode(mat_b.t(), scale_b[0]).T
    for scales in (scale_a, scale_b):
        product = product * (scales[1].double() if len(scales) > 1 else 1)
    assert (product.shape, torch.bfloat16) == (checked.shape, checked.dtype)
    return product.bfloat16()


def check_call(*arguments: Any) -> Tensor:
    """Return what the call would return for tensors like these on a GPU, says torch. Raises RuntimeError."""
    with FakeTensorMode():
        return SCALED_MM(*(_on_gpu(argument) for argument in arguments))


def _on_gpu(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_on_gpu(one) for one in argument]
    if not isinstance(argument, Tensor):
        return argument
    return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="cuda")


def _decode(codes: Tensor, scales: Tensor) -> Tensor:
    if codes.dtype == torch.float4_e2m1fn_x2:
        values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], dtype=torch.float64)
        elements, block = values[unpack_nibbles(codes.contiguous().view(torch.uint8)).long()], 16
    else:
        elements, block = codes.double(), 32
    places = offsets(len(elements), elements.shape[1] // block)
    return elements * scales.flatten().double()[places].repeat_interleave(block, dim=1)


def offsets(rows: int, cols: int) -> Tensor:
    """Return where the scale of each row and block lies, int64 [rows, cols]."""
    row, col = torch.arange(rows)[:, None], torch.arange(cols)
    tile = row // 128 * -(-cols // 4) + col // 4
    return 512 * tile + row % 32 * 16 + row % 128 // 32 * 4 + col % 4


@pytest.fixture
def on_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_scaled_mm.F, "scaled_mm", multiply_stand_in)


# The bytes.


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torch_would_refuse_scales_that_are_not_padded(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_scaled_mm.F, "scaled_mm", check_call)
    layer, tensors = make_layer(scheme, random_weight(48, 96))
    operands = BLOCK_SCALED_MM.prepare(layer, tensors)
    assert BLOCK_SCALED_MM.matmul(layer, torch.ones(5, 96), operands, None).shape == (5, 48)
    monkeypatch.setattr(block_scaled_mm, "_tile", lambda scale: scale)
    with pytest.raises(RuntimeError, match="scale_a must have"):
        BLOCK_SCALED_MM.matmul(layer, torch.ones(5, 96), operands, None)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (128, 4), (130, 5), (300, 24)])
def test_scales_lie_where_cublas_looks(rows: int, cols: int) -> None:
    scale = torch.randint(0, 255, (rows, cols), dtype=torch.uint8)
    tiled = CUBLAS_SCALE.shuffle(CUBLAS_SCALE.pad_to_tile(scale))
    assert tiled.shape == (-(-rows // 128) * 128, -(-cols // 4) * 4)
    assert_bits_equal(tiled.flatten()[offsets(rows, cols)], scale)
    assert tiled.sum(dtype=torch.int64) == scale.sum(dtype=torch.int64)  # the padding is zero


def test_nvfp4_has_one_scale_for_all_tokens_and_the_low_nibble_first() -> None:
    x = torch.zeros(2, 16)
    x[0, :3], x[1, :2] = torch.tensor([6.0, -3.0, 0.4]), torch.tensor([1.5, 0.25])
    codes, scales, second = encode_rows(x, "nvfp4")
    assert_bits_equal(second, torch.tensor([6.0]) / (6 * 448))
    assert scales.flatten().tolist() == [448, 112]  # amax / 6 in units of that
    assert codes[0, :2].tolist() == [0xD7, 0x01]  # 6 and -3, 0.5 and 0
    assert codes[1, :1].tolist() == [0x27]  # 6 and 1 times 1.5 / 6
    rounded = round_rows(x, "nvfp4", None)
    torch.testing.assert_close(rounded[:, :3], torch.tensor([[6.0, -3.0, 0.5], [1.5, 0.25, 0.0]]), rtol=2**-22, atol=0)


# What comes out.


@pytest.mark.usefixtures("on_blackwell")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 16, 32), (37, 48, 96), (130, 144, 640), (0, 16, 64)])
def test_product_is_that_of_the_rounded_activations(scheme: str, M: int, N: int, K: int) -> None:
    layer, tensors = make_layer(scheme, random_weight(N, K))
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    weight = dequantize(tensors[WEIGHT], tensors[WEIGHT_SCALE], layer.scheme, tensor_scale(tensors))
    y = BLOCK_SCALED_MM.matmul(layer, x, BLOCK_SCALED_MM.prepare(layer, dict(tensors)), None)
    exact = round_rows(x, layer.format.name, None).double() @ weight.double().T
    # One rounding to BF16; the scales of NVFP4 are multiplied in another order, in float32.
    torch.testing.assert_close(y.double(), exact, rtol=2.0**-8, atol=2.0**-20)


@pytest.mark.usefixtures("on_blackwell")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bias_is_added_in_the_dtype_of_the_activations(scheme: str, dtype: torch.dtype) -> None:
    layer, tensors = make_layer(scheme, random_weight(48, 96))
    operands = BLOCK_SCALED_MM.prepare(layer, tensors)
    x, bias = torch.randn(3, 96).to(dtype), torch.randn(48).to(dtype)
    without = BLOCK_SCALED_MM.matmul(layer, x, operands, None)
    assert_bits_equal(BLOCK_SCALED_MM.matmul(layer, x, operands, bias), without + bias)


@pytest.mark.usefixtures("on_blackwell")
def test_inverse_scale_of_compressed_tensors_is_the_same() -> None:
    layer, tensors = make_layer("nvfp4", random_weight(48, 96))
    tensors[TENSOR_SCALE] = torch.tensor([2.0**-7])
    inverse = {**tensors, INVERSE_TENSOR_SCALE: torch.tensor([2.0**7])}
    del inverse[TENSOR_SCALE]
    x = torch.randn(3, 96)
    products = [
        BLOCK_SCALED_MM.matmul(layer, x, BLOCK_SCALED_MM.prepare(layer, given), None) for given in (tensors, inverse)
    ]
    assert_bits_equal(*products)


@pytest.mark.usefixtures("on_blackwell")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_stays_in_its_row(scheme: str) -> None:
    layer, tensors = make_layer(scheme, random_weight(48, 96))
    x = torch.ones(3, 96)
    x[1, 40] = float("inf")
    y = BLOCK_SCALED_MM.matmul(layer, x, BLOCK_SCALED_MM.prepare(layer, tensors), None)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_are_restored_exactly(scheme: str) -> None:
    layer, tensors = make_layer(scheme, random_weight(144, 96))
    operands = BLOCK_SCALED_MM.prepare(layer, dict(tensors))
    assert operands[WEIGHT].data_ptr() == tensors[WEIGHT].data_ptr()
    assert operands[WEIGHT_SCALE].shape == (256, 4 if scheme == "mxfp8" else 8)
    assert BLOCK_SCALED_MM.restore is not None
    restored = BLOCK_SCALED_MM.restore(layer, operands)
    assert restored.keys() == tensors.keys()
    for role, tensor in restored.items():
        assert_bits_equal(tensor, tensors[role])


@pytest.mark.usefixtures("on_blackwell")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compile_takes_the_product_whole(scheme: str) -> None:
    layer, tensors = make_layer(scheme, random_weight(32, 64))
    operands, bias = BLOCK_SCALED_MM.prepare(layer, tensors), torch.ones(32)
    x = torch.randn(7, 64)

    def story(x: Tensor) -> Tensor:
        return F.silu(BLOCK_SCALED_MM.matmul(layer, x * 2, operands, bias))

    assert_bits_equal(torch.compile(story, fullgraph=True, backend="aot_eager")(x), story(x))


# The choice.


def test_it_is_taken_where_its_activations_are_asked_for() -> None:
    for scheme in SCHEMES:
        layer = describe_layer(scheme, 256, 256)
        assert choose_backend(layer, BLACKWELL).backend.name == "triton"
        assert choose_backend(layer, BLACKWELL, activations=scheme).backend is BLOCK_SCALED_MM
        assert choose_backend(layer, BLACKWELL, "block_scaled_mm").rounded_to is None
    other = {"mxfp8": "nvfp4", "nvfp4": "mxfp8"}
    assert (
        choose_backend(describe_layer("nvfp4", 256, 256), BLACKWELL, activations=other["nvfp4"]).backend.name
        == "triton"
    )


@pytest.mark.parametrize(
    ("scheme", "N", "K", "device", "reason"),
    [
        ("mxfp4-plain", 256, 256, BLACKWELL, "mxfp4"),
        ("nvfp4", 24, 256, BLACKWELL, "N = 24"),
        ("mxfp8", 256, 48, BLACKWELL, "K = 48"),
        ("nvfp4", 256, 256, Device("cuda", "sm90"), "from sm100 on, this is cuda sm90"),
        ("mxfp8", 256, 256, Device("rocm", "gfx950"), "rocm gfx950"),
        ("mxfp8", 256, 256, Device("cpu"), "this is cpu"),
        ("nvfp4", 256, 256, Device("cuda", "sm120"), None),
    ],
)
def test_reason_names_what_is_in_the_way(scheme: str, N: int, K: int, device: Device, reason: str | None) -> None:
    answer = BLOCK_SCALED_MM.unsupported(describe_layer(scheme, N, K), device)
    assert answer is None if reason is None else reason in (answer or "")


def test_an_older_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(block_scaled_mm.F, "scaled_mm")
    layer = describe_layer("nvfp4", 256, 256)
    assert "scaled_mm" in (BLOCK_SCALED_MM.unsupported(layer, BLACKWELL) or "")
    assert BLOCK_SCALED_MM.unsupported(layer, Device("cuda", "sm100", is_here=False)) is None
