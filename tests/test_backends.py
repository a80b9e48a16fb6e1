"""The choice of a backend on emulated machines, and the two backends that every machine has."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from run_ckpt.backends.backend import Backend, Device, describe_device
from run_ckpt.backends.choose import BACKEND_NAMES, choose_backend
from run_ckpt.backends.packages import why_no_aiter, why_no_petit
from run_ckpt.backends.reference import DEQUANTIZE, REFERENCE, decode_weight, from_plain, to_plain
from run_ckpt.contract.codec import tensor_scale
from run_ckpt.contract.errors import BackendError, UsageError
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE
from tests.bits import assert_bits_equal
from tests.checkpoints import random_weight
from tests.installed import AITER_FILES, Installer, install_fixture  # noqa: F401
from tests.layers import SCHEMES, describe_layer, make_layer

MACHINES = {
    "gfx950": Device("rocm", "gfx950"),
    "gfx942": Device("rocm", "gfx942"),
    "gfx90a": Device("rocm", "gfx90a"),
    "sm80": Device("cuda", "sm80"),
    "sm89": Device("cuda", "sm89"),
    "sm90": Device("cuda", "sm90"),
    "sm100": Device("cuda", "sm100"),
    "cpu": Device("cpu"),
}
# Machine, with AMD's packages or without -> backend of MXFP4, of FP8 by tensor or channel, of all others.
CHOICES = {
    ("gfx950", True): ("aiter", "aiter", "triton"),
    ("gfx950", False): ("triton", "scaled_mm", "triton"),
    ("gfx942", True): ("petit", "aiter", "triton"),
    ("gfx942", False): ("triton", "scaled_mm", "triton"),
    ("gfx90a", True): ("petit", "triton", "triton"),
    ("gfx90a", False): ("triton", "triton", "triton"),
    ("sm80", False): ("triton", "triton", "triton"),
    ("sm89", False): ("triton", "scaled_mm", "triton"),
    ("sm90", False): ("triton", "scaled_mm", "triton"),
    ("sm100", False): ("triton", "scaled_mm", "triton"),
    ("cpu", False): ("reference", "reference", "reference"),
}
COLUMN = {"mxfp4-aiter": 0, "mxfp4-plain": 0, "fp8-tensor": 1, "fp8-channel": 1, "fp8-block": 2, "mxfp8": 2, "nvfp4": 2}


def test_backends_stand_in_order_of_preference() -> None:
    assert BACKEND_NAMES == ("aiter", "scaled_mm", "block_scaled_mm", "petit", "triton", "reference", "dequantize")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("machine", "has_packages"), CHOICES, ids=[f"{m}-{p}" for m, p in CHOICES])
def test_one_checkpoint_serves_every_machine(
    scheme: str,
    machine: str,
    has_packages: bool,
    install: Installer,
) -> None:
    if has_packages:
        install.aiter()
        install.petit()
    choice = choose_backend(describe_layer(scheme, 256, 256), MACHINES[machine])
    expected = CHOICES[machine, has_packages][COLUMN[scheme]]
    assert choice.backend.name == expected
    assert tuple(choice.passed_over) == BACKEND_NAMES[: BACKEND_NAMES.index(expected)]
    assert all(choice.passed_over.values())


def test_what_no_backend_takes_by_itself_is_an_error_with_every_reason() -> None:
    with pytest.raises(BackendError) as error:
        choose_backend(describe_layer("mxfp4-plain", 256, 256), Device("mps"))
    text = str(error.value)
    assert text.startswith("blocks.0.proj: no backend takes it on mps by itself")
    assert all(f"{name}: " in text for name in BACKEND_NAMES)


@pytest.mark.parametrize("name", ["scaled_mm", "reference", "dequantize"])
def test_backend_asked_for_by_name_is_taken(name: str) -> None:
    assert choose_backend(describe_layer("fp8-tensor", 256, 256), Device("cpu"), name).backend.name == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [("aiter", "gfx942 and gfx950"), ("petit", "Petit takes MXFP4"), ("triton", "Triton compiles for GPUs")],
)
def test_backend_asked_for_by_name_is_never_another(name: str, reason: str) -> None:
    with pytest.raises(BackendError, match=rf"backend {name} can't run it on cpu: .*{reason}"):
        choose_backend(describe_layer("fp8-tensor", 256, 256), Device("cpu"), name)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="aiter, scaled_mm, block_scaled_mm, petit, triton, reference, dequantize"):
        choose_backend(describe_layer("fp8-tensor", 256, 256), Device("cpu"), "cutlass")


def test_a_cpu_is_described() -> None:
    assert describe_device(torch.device("cpu")) == Device("cpu")


# Optional packages.


@pytest.mark.parametrize(
    ("version", "is_enough"),
    [
        ("0.1.13.post1", False),
        ("0.1.14.dev3+g0123abc", False),
        ("0.1.14rc1", False),
        ("0.1.9", False),
        ("0.1.14", True),
        ("0.1.14+rocm7.1", True),
        ("0.1.14.post1", True),
        ("0.1.20.post1", True),
        ("0.2", True),
        ("1.0.dev1", True),
    ],
)
def test_aiter_is_taken_from_0_1_14_on(version: str, is_enough: bool, install: Installer) -> None:
    install.aiter(version)
    reason = why_no_aiter()
    assert reason is None if is_enough else reason == f"AITER {version} is installed, 0.1.14 or newer is needed"


def test_the_other_package_named_aiter_is_told_apart(install: Installer) -> None:
    install({"aiter/__init__.py": "raise ImportError('must not be imported')\n"}, "aiter", "0.13.20191203")
    assert "nothing to do with AMD's AITER" in (why_no_aiter() or "")


def test_aiter_of_unknown_version_is_not_taken(install: Installer) -> None:
    install(AITER_FILES)
    assert "the version of AITER is unknown" in (why_no_aiter() or "")


def test_absent_packages_are_named(install: Installer) -> None:
    assert why_no_aiter() == "AITER is not installed (package amd-aiter 0.1.14 or newer)"
    assert why_no_petit() == "petit_kernel is not installed (0.0.3 or newer is needed)"


def test_petit_without_mxfp4_is_too_old(install: Installer) -> None:
    install.petit("0.0.2")
    assert why_no_petit() == "petit_kernel 0.0.2 is installed, 0.0.3 or newer is needed"


# The reference.


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("N", "K"), [(256, 256), (160, 320)])
def test_plain_order_is_undone_exactly(scheme: str, N: int, K: int) -> None:
    layer, tensors = make_layer(scheme, random_weight(N, K))
    for role, tensor in from_plain(layer, to_plain(layer, dict(tensors))).items():
        assert_bits_equal(tensor, tensors[role])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", [REFERENCE, DEQUANTIZE], ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_product_is_that_of_the_decoded_weight(scheme: str, backend: Backend, dtype: torch.dtype) -> None:
    layer, tensors = make_layer(scheme, random_weight(160, 320))
    rounded = torch.bfloat16 if backend is DEQUANTIZE else dtype
    weight = decode_weight(tensors[WEIGHT], tensors[WEIGHT_SCALE], layer.scheme, rounded, tensor_scale(tensors)).to(
        dtype
    )
    x = torch.randn(3, 320, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(160, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_bits_equal(backend.matmul(layer, x, backend.prepare(layer, tensors), bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("scheme", ["mxfp4-aiter", "fp8-block"])
@pytest.mark.parametrize("backend", [REFERENCE, DEQUANTIZE], ids=lambda backend: backend.name)
def test_compile_takes_the_product_whole(scheme: str, backend: Backend) -> None:
    layer, tensors = make_layer(scheme, random_weight(64, 256))
    operands = backend.prepare(layer, tensors)
    x = torch.randn(3, 256)

    def story(x: Tensor) -> Tensor:
        return F.silu(backend.matmul(layer, x * 2, operands, None))

    assert_bits_equal(torch.compile(story, fullgraph=True, backend="aot_eager")(x), story(x))
