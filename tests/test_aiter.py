"""The AITER backend: what it hands to AITER, and what comes back, with a stand-in for the device calls."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from run_ckpt.backends import fp8
from run_ckpt.backends.aiter import AITER
from run_ckpt.backends.backend import Device
from run_ckpt.contract.errors import BackendError
from run_ckpt.contract.manifest import INPUT_SCALE, WEIGHT, WEIGHT_SCALE
from tests import aiter_stand_in
from tests.aiter_stand_in import Refused
from tests.bits import assert_bits_equal
from tests.checkpoints import random_weight
from tests.installed import Installer, install_fixture  # noqa: F401
from tests.layers import describe_layer, make_layer

GOLDEN_FILE = Path(__file__).parent / "golden" / "aiter_golden.safetensors"
MI350, MI300 = Device("rocm", "gfx950"), Device("rocm", "gfx942")
# The stand-in's tiles hold 32 rows; the golden weight has 304.
N_GOLDEN = 288


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN_FILE)


@pytest.fixture(autouse=True)
def aiter(install: Installer) -> None:
    install.aiter()


def exact_weight(N: int, K: int) -> Tensor:
    """Small integers that MXFP4 and FP8 both hold."""
    weight = torch.randint(-4, 5, (N, K), generator=torch.Generator().manual_seed(N + K)).float()
    weight[:, ::32] = 4
    return weight


def exact_activations(M: int, K: int) -> Tensor:
    x = torch.randint(-3, 4, (M, K), generator=torch.Generator().manual_seed(M)).bfloat16()
    x[:, ::32] = 4
    return x


# The stand-in itself, held against AITER's own code.


@pytest.mark.parametrize("rows", ["m5", "m48"])
def test_stand_in_quantizes_activations_to_the_bytes_of_aiter(golden: dict[str, Tensor], rows: str) -> None:
    x = golden[f"gemm.{rows}.x"]
    packed, scale = aiter_stand_in.dynamic_mxfp4_quant(x, shuffle=True)
    assert_bits_equal(packed.view(torch.uint8), golden[f"gemm.{rows}.xq"])
    written = -(-len(x) // 32) * 32
    assert_bits_equal(scale.view(torch.uint8)[:written], golden[f"gemm.{rows}.xs_shuf"][:written])


@pytest.mark.parametrize("rows", ["m5", "m48"])
def test_layer_gives_the_outputs_of_aiter(golden: dict[str, Tensor], rows: str) -> None:
    layer = describe_layer("mxfp4-plain", N_GOLDEN, 512)
    tensors = {WEIGHT: golden["normal.even.q"][:N_GOLDEN], WEIGHT_SCALE: golden["normal.even.s"][:N_GOLDEN]}
    y = AITER.matmul(layer, golden[f"gemm.{rows}.x"], AITER.prepare(layer, tensors), None)
    expected = golden[f"gemm.{rows}.y_a4w4_bf16"][:, :N_GOLDEN]
    assert_bits_equal(y, expected.contiguous())


def test_stand_in_reads_the_shuffled_fp8_weight_of_aiter(golden: dict[str, Tensor]) -> None:
    weight, scale = golden["fp8.per_row.q_shuf"], golden["fp8.per_row.s"]
    codes = golden["fp8.per_row.q"][:5].contiguous()
    y = aiter_stand_in.gemm_a8w8_bpreshuffle(codes, weight, torch.ones(5, 1), scale)
    expected = codes.double() @ (golden["fp8.per_row.q"].double() * scale.double()).T
    assert_bits_equal(y, expected.float().bfloat16())


# MXFP4.


def test_pre_shuffled_bytes_are_taken_as_they_are() -> None:
    layer, tensors = make_layer("mxfp4-aiter", random_weight(256, 256))
    operands = AITER.prepare(layer, dict(tensors))
    assert operands[WEIGHT].data_ptr() == tensors[WEIGHT].data_ptr()
    assert operands[WEIGHT_SCALE].data_ptr() == tensors[WEIGHT_SCALE].data_ptr()


@pytest.mark.parametrize(("N", "K"), [(256, 256), (288, 320), (512, 64)])
def test_plain_bytes_are_shuffled_into_the_same(N: int, K: int) -> None:
    weight = random_weight(N, K)
    layer, tensors = make_layer("mxfp4-plain", weight)
    _, shuffled = make_layer("mxfp4-aiter", weight)
    operands = AITER.prepare(layer, dict(tensors))
    for role in (WEIGHT, WEIGHT_SCALE):
        assert_bits_equal(operands[role], shuffled[role])
        assert_bits_equal(AITER.restore(layer, operands)[role], tensors[role])


@pytest.mark.parametrize("scheme", ["mxfp4-aiter", "mxfp4-plain"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 256, 256), (33, 288, 320), (257, 512, 64), (0, 256, 256)])
def test_mxfp4_product_is_exact_on_integers(scheme: str, M: int, N: int, K: int) -> None:
    weight, x = exact_weight(N, K), exact_activations(M, K)
    layer, tensors = make_layer(scheme, weight)
    bias = torch.randint(-8, 9, (N,)).bfloat16()
    y = AITER.matmul(layer, x, AITER.prepare(layer, tensors), bias)
    assert_bits_equal(y, (x.float() @ weight.T).bfloat16() + bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_output_has_the_dtype_of_the_caller(dtype: torch.dtype) -> None:
    weight, x = exact_weight(256, 256), exact_activations(3, 256)
    layer, tensors = make_layer("mxfp4-aiter", weight)
    y = AITER.matmul(layer, x.to(dtype), AITER.prepare(layer, tensors), torch.ones(256, dtype=dtype))
    assert_bits_equal(y, (x.float() @ weight.T).bfloat16().to(dtype) + 1)


@pytest.mark.parametrize(
    ("role", "damage", "reason"),
    [
        (WEIGHT_SCALE, lambda scale: scale.fill_(127), "padding is not 0x00"),
        (WEIGHT_SCALE, lambda scale: scale[:, :10].contiguous(), "not padded"),
        (WEIGHT, lambda weight: weight[:, :128].contiguous(), "K differs"),
        (WEIGHT, lambda weight: weight[:240], "N % 32"),
    ],
    ids=["scale padding", "scale shape", "K", "N"],
)
def test_stand_in_refuses_what_aiter_would_read_wrongly(
    role: str, damage: Callable[[Tensor], Tensor], reason: str
) -> None:
    layer, tensors = make_layer("mxfp4-aiter", exact_weight(256, 320))
    operands = AITER.prepare(layer, tensors)
    with pytest.raises(Refused, match=reason):
        AITER.matmul(layer, exact_activations(3, 320), {**operands, role: damage(operands[role])}, None)


# FP8.


@pytest.mark.parametrize("scheme", ["fp8-tensor", "fp8-channel"])
@pytest.mark.parametrize("input_scale", [None, 0.5], ids=["dynamic", "static"])
def test_fp8_product_is_the_quantized_one(scheme: str, input_scale: float | None) -> None:
    layer, tensors = make_layer(scheme, random_weight(272, 192), input_scale)
    x = torch.randn(37, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    operands = AITER.prepare(layer, dict(tensors))
    scale = x.float().abs().amax(1, keepdim=True) / 448 if input_scale is None else torch.tensor(input_scale)
    activations = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
    weight = tensors[WEIGHT].double() * tensors[WEIGHT_SCALE].double().reshape(-1, 1)
    # One rounding to float32, one to BF16, on both sides.
    torch.testing.assert_close(
        AITER.matmul(layer, x, operands, None).double(), activations @ weight.T, rtol=2.0**-8, atol=1e-12
    )
    for role, tensor in AITER.restore(layer, operands).items():
        assert_bits_equal(tensor, tensors[role])


def test_rows_of_zeros_stay_zero() -> None:
    layer, tensors = make_layer("fp8-channel", random_weight(64, 192))
    y = AITER.matmul(layer, torch.zeros(2, 192, dtype=torch.bfloat16), AITER.prepare(layer, tensors), None)
    assert not y.any()


def test_on_gfx942_weights_become_fnuz_with_doubled_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "describe_device", lambda device: MI300)
    weight = random_weight(64, 192)
    weight[0, :2] = torch.tensor([-0.0, 0.0])
    layer, tensors = make_layer("fp8-channel", weight, input_scale=0.5)
    decoded = tensors[WEIGHT].double() * tensors[WEIGHT_SCALE].double().reshape(-1, 1)
    operands = AITER.prepare(layer, {role: tensor.clone() for role, tensor in tensors.items()})
    assert operands[WEIGHT].dtype == torch.float8_e4m3fnuz
    assert_bits_equal(operands[INPUT_SCALE], torch.tensor([1.0]))
    plain = aiter_stand_in._unshuffled_bytes(operands[WEIGHT].view(torch.uint8)).view(torch.float8_e4m3fnuz)
    assert torch.equal(plain.double() * operands[WEIGHT_SCALE].double(), decoded)
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = (x.float() / 0.5).to(torch.float8_e4m3fn).double() * 0.5 @ decoded.T
    # The codes of half the value at twice the scale: the same products.
    torch.testing.assert_close(AITER.matmul(layer, x, operands, None).double(), expected, rtol=2.0**-8, atol=1e-12)
    with pytest.raises(BackendError, match="no -0"):
        AITER.restore(layer, operands)


def test_on_gfx942_a_nan_is_refused_and_not_turned_into_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "describe_device", lambda device: MI300)
    layer, tensors = make_layer("fp8-channel", random_weight(64, 192))
    tensors[WEIGHT].view(torch.uint8)[3, 3] = 0xFF
    with pytest.raises(BackendError, match=r"blocks\.0\.proj: the weight holds NaN"):
        AITER.prepare(layer, tensors)


# torch.compile.


@pytest.mark.parametrize("scheme", ["mxfp4-aiter", "fp8-channel"])
def test_compile_takes_the_product_whole(scheme: str) -> None:
    layer, tensors = make_layer(scheme, random_weight(256, 256))
    operands, bias = AITER.prepare(layer, tensors), torch.ones(256, dtype=torch.bfloat16)
    x = exact_activations(7, 256)

    def story(x: Tensor) -> Tensor:
        return F.silu(AITER.matmul(layer, x * 2, operands, bias))

    assert_bits_equal(torch.compile(story, fullgraph=True, backend="aot_eager")(x), story(x))


# Where it can run.


@pytest.mark.parametrize(
    ("scheme", "N", "K", "device", "reason"),
    [
        ("mxfp4-aiter", 256, 256, MI300, "gfx950 alone"),
        ("mxfp4-aiter", 256, 256, Device("rocm", "gfx1250"), "gfx950 alone"),
        ("mxfp4-aiter", 256, 256, Device("cpu"), "gfx950 alone"),
        ("mxfp4-aiter", 128, 256, MI350, "below 256"),
        ("mxfp4-plain", 272, 256, MI350, "N = 272 is not a multiple of 32"),
        ("mxfp4-plain", 256, 96, MI350, "K = 96 is not a multiple of 64"),
        ("fp8-block", 256, 256, MI350, "one a block"),
        ("fp8-tensor", 256, 128, MI350, "K = 128"),
        ("fp8-tensor", 256, 224, MI350, "K = 224"),
        ("fp8-tensor", 24, 256, MI350, "N = 24"),
        ("fp8-tensor", 256, 256, Device("rocm", "gfx90a"), "gfx942 and gfx950"),
        ("mxfp4-aiter", 256, 256, MI350, None),
        ("mxfp4-aiter", 256, 320, MI350, None),
        ("fp8-tensor", 256, 256, MI300, None),
        ("fp8-channel", 16, 192, MI350, None),
    ],
)
def test_reason_names_what_is_in_the_way(scheme: str, N: int, K: int, device: Device, reason: str | None) -> None:
    answer = AITER.unsupported(describe_layer(scheme, N, K), device)
    assert answer is None if reason is None else reason in (answer or "")
