"""The scaled_mm backend on torch's own kernel, which runs on a CPU too."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from run_ckpt.backends import fp8
from run_ckpt.backends.backend import Device
from run_ckpt.backends.scaled_mm import SCALED_MM
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE
from tests.bits import assert_bits_equal
from tests.checkpoints import random_weight
from tests.codec import dequantize_fp8
from tests.layers import describe_layer, make_layer

MI300 = Device("rocm", "gfx942")
FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
STATIC = [None, 0.5]
SCHEMES = ["fp8-tensor", "fp8-channel"]


def exact_values(rows: int, cols: int, seed: int) -> Tensor:
    """Multiples of 32 up to 448, which every row reaches: each scale is 1, each code and each sum exact."""
    values = 32 * torch.randint(-14, 15, (rows, cols), generator=torch.Generator().manual_seed(seed))
    values[:, seed % cols] = 448
    return values.to(torch.float8_e4m3fn).float()


def emulate(x: Tensor, decoded: Tensor, input_scale: float | None, dtype: torch.dtype = FN) -> Tensor:
    """Return quantized x times a decoded weight in float64, [M, N]."""
    limit = torch.finfo(dtype).max
    scale = torch.tensor(input_scale) if input_scale else x.float().abs().amax(1, keepdim=True) / limit
    codes = (x.float() / scale).clamp(-limit, limit).to(dtype)
    return codes.double() * scale.double() @ decoded.double().T


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("input_scale", [None, 1.0], ids=["dynamic", "static"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 16, 16), (37, 48, 80), (0, 16, 32)])
def test_product_is_exact_where_every_sum_is(scheme: str, input_scale: float | None, M: int, N: int, K: int) -> None:
    weight, x = exact_values(N, K, 3) * 2**-5, exact_values(M, K, 5).bfloat16()
    layer, tensors = make_layer(scheme, weight, input_scale)
    y = SCALED_MM.matmul(layer, x, SCALED_MM.prepare(layer, tensors), None)
    assert_bits_equal(y, (x.double() @ weight.double().T).bfloat16())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("input_scale", STATIC, ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_product_is_that_of_the_codes(scheme: str, input_scale: float | None, dtype: torch.dtype) -> None:
    layer, tensors = make_layer(scheme, random_weight(64, 96), input_scale)
    x = torch.randn(21, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = emulate(x, dequantize_fp8(tensors[WEIGHT], tensors[WEIGHT_SCALE]), input_scale)
    y = SCALED_MM.matmul(layer, x, SCALED_MM.prepare(layer, tensors), bias)
    assert y.dtype == dtype
    # The product is rounded to BF16, and so is the sum with a BF16 bias (2^-9 each); the rest is float32.
    bound = 2.0**-8 * (expected.abs() + bias.double().abs())
    assert ((y.double() - expected - bias.double()).abs() <= bound).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("input_scale", STATIC, ids=["dynamic", "static"])
def test_weight_is_not_copied_and_restored_exactly(scheme: str, input_scale: float | None) -> None:
    layer, tensors = make_layer(scheme, random_weight(32, 64), input_scale)
    operands = SCALED_MM.prepare(layer, dict(tensors))
    assert operands[WEIGHT].data_ptr() == tensors[WEIGHT].data_ptr()
    assert operands[WEIGHT].t().stride() == (1, 64)
    for role, tensor in SCALED_MM.restore(layer, operands).items():
        assert_bits_equal(tensor, tensors[role])


def test_values_beyond_a_static_scale_saturate() -> None:
    layer, tensors = make_layer("fp8-tensor", torch.full((16, 16), 1.0), input_scale=1.0)
    y = SCALED_MM.matmul(layer, torch.full((1, 16), 1000.0), SCALED_MM.prepare(layer, tensors), None)
    assert_bits_equal(y, torch.full((1, 16), 448.0 * 16))


@pytest.fixture
def portable_kernel() -> Iterator[None]:
    """Multiply by ATen's own CPU kernel: where a CPU has AMX, torch calls oneDNN, which refuses e4m3fnuz.

    ATen asks for the flag before it looks at the CPU (_scaled_mm_out_cpu in aten/src/ATen/native/Blas.cpp).
    """
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.mark.usefixtures("portable_kernel")
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("input_scale", STATIC, ids=["dynamic", "static"])
def test_gfx942_multiplies_fnuz_to_the_same(
    scheme: str, input_scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "describe_device", lambda device: MI300)
    layer, tensors = make_layer(scheme, random_weight(32, 64), input_scale)
    tensors[WEIGHT].view(torch.uint8)[0, :2] = torch.tensor([0x80, 0x00], dtype=torch.uint8)
    decoded = dequantize_fp8(tensors[WEIGHT], tensors[WEIGHT_SCALE])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    operands = SCALED_MM.prepare(layer, tensors)
    assert operands[WEIGHT].dtype == FNUZ
    # The same numbers, -0 aside, which e4m3fnuz has not.
    assert_bits_equal(operands[WEIGHT].float() * operands[WEIGHT_SCALE].reshape(-1, 1), decoded + 0.0)
    # A static scale doubles with the weight's.
    expected = emulate(x, decoded, input_scale and 2 * input_scale, FNUZ)
    y = SCALED_MM.matmul(layer, x, operands, None)
    torch.testing.assert_close(y.double(), expected, rtol=2.0**-8, atol=2.0**-20)


@pytest.mark.parametrize("input_scale", STATIC, ids=["dynamic", "static"])
def test_compile_takes_the_product_whole(input_scale: float | None) -> None:
    layer, tensors = make_layer("fp8-tensor", random_weight(32, 64), input_scale)
    operands, bias = SCALED_MM.prepare(layer, tensors), torch.ones(32, dtype=torch.bfloat16)
    x = torch.randn(7, 64).bfloat16()

    def story(x: Tensor) -> Tensor:
        return F.silu(SCALED_MM.matmul(layer, x * 2, operands, bias))

    assert_bits_equal(torch.compile(story, fullgraph=True, backend="aot_eager")(x), story(x))


@pytest.mark.parametrize(
    ("scheme", "N", "K", "device", "reason"),
    [
        ("mxfp4-aiter", 256, 256, Device("cuda", "sm100"), "mxfp4"),
        ("fp8-block", 256, 256, Device("cuda", "sm90"), "one a block"),
        ("fp8-tensor", 24, 256, Device("cuda", "sm90"), "N = 24"),
        ("fp8-tensor", 256, 40, Device("cpu"), "K = 40"),
        ("fp8-tensor", 256, 256, Device("cuda", "sm86"), "sm89 on, this is sm86"),
        ("fp8-tensor", 256, 256, Device("rocm", "gfx90a"), "gfx942"),
        ("fp8-tensor", 256, 256, Device("mps"), "sm89"),
        ("fp8-tensor", 256, 256, Device("cuda", "sm89"), None),
        ("fp8-channel", 256, 256, Device("cuda", "sm120"), None),
        ("fp8-channel", 256, 256, Device("rocm", "gfx1201"), None),
        ("fp8-channel", 256, 256, Device("cpu"), None),
    ],
)
def test_reason_names_what_is_in_the_way(scheme: str, N: int, K: int, device: Device, reason: str | None) -> None:
    answer = SCALED_MM.unsupported(describe_layer(scheme, N, K), device)
    assert answer is None if reason is None else reason in (answer or "")


def test_scale_of_one_row_is_on_disk_again_in_its_shape() -> None:
    layer, tensors = make_layer("fp8-channel", random_weight(16, 16))
    assert SCALED_MM.restore(layer, SCALED_MM.prepare(layer, dict(tensors)))[WEIGHT_SCALE].shape == layer.scale_shape
