"""Activations by choice: what they are rounded to, which backend takes them, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from run_ckpt.backends.activations import round_rows
from run_ckpt.backends.backend import ACTIVATIONS, Device
from run_ckpt.backends.choose import choose_backend, taken_activations
from run_ckpt.backends.reference import REFERENCE
from run_ckpt.contract.errors import BackendError, UsageError
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE
from run_ckpt.integrations.serving.backend import ACTIVATIONS_VARIABLE, choose, summarize
from run_ckpt.loading.linear import QuantizedLinear
from tests.bits import assert_bits_equal
from tests.checkpoints import random_weight
from tests.installed import Installer, install_fixture  # noqa: F401
from tests.layers import SCHEMES, describe_layer, make_layer

GOLDEN_FILE = Path(__file__).parent / "golden" / "aiter_golden.safetensors"
CPU = Device("cpu")


def block(*values: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.tensor([[*values, *[0.0] * (32 - len(values))]], dtype=dtype)


# The bits.


def test_mxfp8_takes_the_least_power_of_two_by_which_nothing_saturates() -> None:
    # 448 = 1.75 * 2^8: at scale 1 E4M3 has steps of 32 up there; 452 needs scale 2, whose steps are 32 from 256 on.
    assert_bits_equal(round_rows(block(448, 33, -17), "mxfp8", None), block(448, 32, -16))
    assert_bits_equal(round_rows(block(452, 34, -17), "mxfp8", None), block(448, 32, -16))
    assert_bits_equal(round_rows(block(452, 35, -18), "mxfp8", None), block(448, 36, -18))


def test_mxfp4_ties_go_to_the_even_code() -> None:
    x = block(6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.2, -5)
    assert_bits_equal(round_rows(x, "mxfp4", None), block(6, 4, 4, 2, 2, 1, 1, 0, -0.0, -4))


@pytest.mark.parametrize("rows", ["m5", "m48"])
def test_mxfp4_product_is_that_of_aiters_own_code(rows: str) -> None:
    golden = load_file(GOLDEN_FILE)
    layer = describe_layer("mxfp4-plain", 304, 512)
    operands = {WEIGHT: golden["normal.even.q"], WEIGHT_SCALE: golden["normal.even.s"]}
    choice = choose_backend(layer, CPU, activations="mxfp4")
    y = choice.matmul(layer, golden[f"gemm.{rows}.x"].float(), operands, None)
    # 512 additions in float32.
    torch.testing.assert_close(y.double(), golden[f"gemm.{rows}.ref_f64"], rtol=512 * 2.0**-24, atol=1e-5)


def test_fp8_has_one_scale_for_each_token_or_that_of_the_layer() -> None:
    x = torch.tensor([[448.0, 17.0], [4.48, 0.17]])
    assert_bits_equal(round_rows(x, "fp8", None), torch.tensor([[448.0, 16.0], [4.48, 0.16]]))
    assert_bits_equal(round_rows(x, "fp8", torch.tensor([2.0])), torch.tensor([[448.0, 16.0], [4.5, 0.171875]]))


@pytest.mark.parametrize("activations", ["mxfp8", "nvfp4", "mxfp4", "fp8"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_has_no_code_becomes_nan_and_not_a_number(activations: str, value: float) -> None:
    x = torch.ones(2, 64)
    x[1, 40] = value
    rounded = round_rows(x, activations, None)
    assert rounded[1, {"fp8": slice(40, 41), "nvfp4": slice(32, 48)}.get(activations, slice(32, 64))].isnan().all()
    assert torch.equal(rounded[0], x[0])


def test_float16_saturates_where_a_code_is_beyond_it() -> None:
    # 65504 / 256 is next to E4M3's 256, and 2^16 is no float16.
    assert_bits_equal(round_rows(block(65504, dtype=torch.float16), "mxfp8", None), block(65504, dtype=torch.float16))


# The product.


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activations", ["fp8", "mxfp8"])
def test_product_is_that_of_the_rounded_activations(scheme: str, activations: str) -> None:
    layer, tensors = make_layer(scheme, random_weight(64, 256))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = REFERENCE.matmul(layer, round_rows(x, activations, None), tensors, None)
    choice = choose_backend(layer, CPU, activations=activations)
    assert_bits_equal(choice.matmul(layer, x, tensors, None), expected)


def test_static_scale_of_the_layer_is_used() -> None:
    layer, tensors = make_layer("fp8-tensor", random_weight(64, 256), input_scale=0.5)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = REFERENCE.matmul(layer, round_rows(x, "fp8", torch.tensor([0.5])), tensors, None)
    assert_bits_equal(choose_backend(layer, CPU, activations="fp8").matmul(layer, x, tensors, None), expected)


@pytest.mark.parametrize("activations", ["nvfp4", "mxfp4"])
def test_no_weight_of_8_bits_takes_activations_of_4(activations: str) -> None:
    layer, tensors = make_layer("fp8-tensor", random_weight(64, 256))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = REFERENCE.matmul(layer, x, tensors, None)
    assert_bits_equal(choose_backend(layer, CPU, activations=activations).matmul(layer, x, tensors, None), expected)


def test_layer_says_what_it_multiplies_and_keeps_its_bytes() -> None:
    layer, tensors = make_layer("mxfp4-aiter", random_weight(288, 256))
    linear = QuantizedLinear(layer, nn.Parameter(torch.ones(288)), activations="mxfp8")
    linear.store(dict(tensors))
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0))
    weight = REFERENCE.matmul(layer, torch.eye(256), tensors, None).T
    rounded = round_rows(x.reshape(10, 256), "mxfp8", None)
    assert_bits_equal(linear(x), F.linear(rounded, weight, linear.bias).reshape(2, 5, 288))
    assert linear.activations == "mxfp8"
    assert "backend=reference, activations=mxfp8" in repr(linear)
    for role, tensor in linear.stored().items():
        assert_bits_equal(tensor, tensors[role])


def test_nothing_is_trained_through_rounded_activations() -> None:
    layer, tensors = make_layer("mxfp4-aiter", random_weight(288, 256))
    linear = QuantizedLinear(layer, activations="mxfp8")
    linear.store(tensors)
    with pytest.raises(BackendError, match=r'no gradient to train with by mxfp8 activations.*activations="bf16"'):
        linear(torch.randn(2, 256, requires_grad=True))


@pytest.mark.parametrize("activations", ["fp8", "mxfp8", "nvfp4", "mxfp4"])
def test_compile_takes_the_product_whole(activations: str) -> None:
    layer, tensors = make_layer("mxfp4-plain", random_weight(64, 256))
    choice = choose_backend(layer, CPU, activations=activations)
    x = torch.randn(3, 256)

    def story(x: Tensor) -> Tensor:
        return F.silu(choice.matmul(layer, x * 2, tensors, None))

    assert_bits_equal(torch.compile(story, fullgraph=True, backend="aot_eager")(x), story(x))


# The choice.

# Machine with AMD's packages -> scheme -> activations -> backend.
CHOICES = {
    "gfx950": {
        "mxfp4-aiter": {"bf16": "triton", "fp8": "triton", "mxfp8": "triton", "nvfp4": "triton", "mxfp4": "aiter"},
        "fp8-tensor": {"bf16": "triton", "fp8": "aiter", "mxfp8": "triton", "nvfp4": "aiter", "mxfp4": "aiter"},
    },
    "gfx942": {
        "mxfp4-aiter": {"bf16": "petit", "fp8": "triton", "mxfp8": "triton", "nvfp4": "triton", "mxfp4": "triton"},
        "fp8-tensor": {"bf16": "triton", "fp8": "aiter", "mxfp8": "triton", "nvfp4": "aiter", "mxfp4": "aiter"},
    },
}


@pytest.mark.parametrize("machine", CHOICES)
def test_first_backend_that_takes_them_is_chosen(machine: str, install: Installer) -> None:
    install.aiter()
    install.petit()
    for scheme, expected in CHOICES[machine].items():
        layer = describe_layer(scheme, 256, 256)
        taken = {
            asked: choose_backend(layer, Device("rocm", machine), activations=asked).backend.name
            for asked in ACTIVATIONS
        }
        assert taken == expected


def test_backend_that_is_asked_for_takes_them_or_refuses(install: Installer) -> None:
    install.aiter()
    layer = describe_layer("mxfp4-aiter", 256, 256)
    reason = "backend aiter can't run it with bf16 activations on rocm gfx950: it multiplies mxfp4 weights by mxfp4"
    with pytest.raises(BackendError, match=reason):
        choose_backend(layer, Device("rocm", "gfx950"), "aiter", "bf16")


def test_what_no_backend_takes_is_an_error_with_every_reason() -> None:
    with pytest.raises(BackendError, match="no backend takes it with mxfp8 activations on mps by itself") as error:
        choose_backend(describe_layer("mxfp4-plain", 256, 256), Device("mps"), activations="mxfp8")
    assert "triton: Triton compiles for GPUs" in str(error.value)


def test_blocks_have_to_be_whole() -> None:
    layer = replace(describe_layer("fp8-tensor", 256, 256), K=48)
    assert taken_activations(REFERENCE, layer) == ("bf16", "fp8")
    with pytest.raises(BackendError, match="K = 48 is not a multiple of 32, the block of mxfp8 activations"):
        choose_backend(layer, CPU, "reference", "mxfp8")


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no activations 'int8'\. Choose one of bf16, fp8, mxfp8, nvfp4, mxfp4"):
        choose_backend(describe_layer("fp8-tensor", 256, 256), CPU, activations="int8")


def test_servers_plug_ins_take_them_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ACTIVATIONS_VARIABLE, "mxfp8")
    choice = choose(describe_layer("mxfp4-aiter", 256, 256), CPU)
    assert (choice.backend, choice.rounded_to) == (REFERENCE, "mxfp8")
    assert "1 by reference with mxfp8 activations" in summarize([choice], CPU)
