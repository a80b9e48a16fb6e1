"""The Petit backend: what it hands to petit_kernel, with a stand-in for the device calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from run_ckpt.backends.backend import Device
from run_ckpt.backends.petit import PETIT
from run_ckpt.contract.errors import BackendError
from run_ckpt.contract.manifest import WEIGHT_SCALE
from tests.bits import assert_bits_equal
from tests.checkpoints import random_weight
from tests.installed import Installer, install_fixture  # noqa: F401
from tests.layers import describe_layer, make_layer

MI250 = Device("rocm", "gfx90a")


@pytest.fixture(autouse=True)
def petit(install: Installer) -> None:
    install.petit()


def exact_weight(N: int, K: int) -> Tensor:
    weight = torch.randint(-4, 5, (N, K), generator=torch.Generator().manual_seed(N + K)).float()
    weight[:, ::32] = 4
    return weight


@pytest.mark.parametrize("scheme", ["mxfp4-aiter", "mxfp4-plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_product_is_exact_on_integers(scheme: str, dtype: torch.dtype) -> None:
    weight = exact_weight(288, 512)
    x = torch.randint(-3, 4, (5, 512), generator=torch.Generator().manual_seed(0)).to(dtype)
    layer, tensors = make_layer(scheme, weight)
    bias = torch.ones(288, dtype=dtype)
    y = PETIT.matmul(layer, x, PETIT.prepare(layer, tensors), bias)
    assert_bits_equal(y, (x.float() @ weight.T).bfloat16().to(dtype) + bias)


def test_block_of_zeros_is_no_obstacle_whatever_its_scale() -> None:
    weight = exact_weight(32, 256)
    weight[3, 32:64], weight[4, 64:96] = 0.0, -0.0
    layer, tensors = make_layer("mxfp4-plain", weight)
    assert tensors[WEIGHT_SCALE][3, 1] == 0
    x = torch.eye(256).bfloat16()
    assert torch.equal(PETIT.matmul(layer, x, PETIT.prepare(layer, tensors), None).T, weight.bfloat16())


@pytest.mark.parametrize("exponent", [-115, 122], ids=["small", "large"])
def test_scale_out_of_range_is_an_error_that_names_the_way_out(exponent: int) -> None:
    weight = exact_weight(32, 256)
    weight[7, 32:64] *= 2.0**exponent
    layer, tensors = make_layer("mxfp4-plain", weight)
    with pytest.raises(BackendError, match=r'blocks\.0\.proj: its scale codes reach .* backend="triton"'):
        PETIT.prepare(layer, tensors)


def test_compile_takes_the_product_whole() -> None:
    layer, tensors = make_layer("mxfp4-plain", random_weight(32, 256))
    operands = PETIT.prepare(layer, tensors)
    x = torch.randn(7, 256).bfloat16()

    def story(x: Tensor) -> Tensor:
        return F.silu(PETIT.matmul(layer, x * 2, operands, None))

    assert_bits_equal(torch.compile(story, fullgraph=True, backend="aot_eager")(x), story(x))


@pytest.mark.parametrize(
    ("scheme", "N", "K", "device", "reason"),
    [
        ("fp8-tensor", 256, 256, MI250, "fp8"),
        ("mxfp4-plain", 256, 256, Device("rocm", "gfx950"), "gfx90a and gfx942"),
        ("mxfp4-plain", 256, 256, Device("cuda", "sm90"), "gfx90a and gfx942"),
        ("mxfp4-plain", 16, 256, MI250, "N = 16"),
        ("mxfp4-plain", 32, 128, MI250, "K = 128"),
        ("mxfp4-aiter", 32, 256, MI250, None),
        ("mxfp4-plain", 32, 256, Device("rocm", "gfx942"), None),
    ],
)
def test_reason_names_what_is_in_the_way(scheme: str, N: int, K: int, device: Device, reason: str | None) -> None:
    answer = PETIT.unsupported(describe_layer(scheme, N, K), device)
    assert answer is None if reason is None else reason in (answer or "")
