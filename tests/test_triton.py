"""The Triton backend: its cases in Triton's interpreter or on a GPU, and its kernels compiled for GPUs not at hand."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from run_ckpt.backends.backend import Device
from run_ckpt.backends.triton.backend import TRITON
from tests.layers import describe_layer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux")

ROOT = Path(__file__).parents[1]
# Target -> shared memory of one workgroup in bytes.
TARGETS: dict[str, int] = {
    "sm80": 163 * 1024,
    "sm89": 99 * 1024,
    "sm90": 227 * 1024,
    "sm100": 227 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
    "gfx1100": 64 * 1024,
    "gfx1201": 64 * 1024,
}
COMMON_TARGETS = [
    ("sm80", "block"),
    ("sm90", "mxfp4"),
    ("sm90", "mxfp8"),
    ("sm100", "nvfp4"),
    ("gfx90a", "block"),
    ("gfx942", "mxfp4"),
]
POINTERS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SCALES = ["mxfp4", "nvfp4", "mxfp8", "tensor", "channel", "block"]


def run_cases(**environment: str) -> None:
    """Run triton_cases.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_cases.py"]
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=ROOT, env=variables | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr


def test_cases_hold_in_the_interpreter() -> None:
    run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cases_hold_on_the_gpu() -> None:
    run_cases()


@pytest.mark.parametrize(("target", "scales"), COMMON_TARGETS)
def test_kernels_compile_for_a_gpu_that_is_not_here(target: str, scales: str, fresh_cache: None) -> None:
    assert compile_multiply(target, scales, "bf16", 0) <= TARGETS[target]
    compile_dequantize(target, scales, "bf16")


@pytest.mark.parametrize("target", ["sm90", "sm100", "gfx942", "gfx950"])
def test_rounding_compiles_for_a_gpu_that_is_not_here(target: str, fresh_cache: None) -> None:
    for activations in ("mxfp8", "mxfp4"):
        compile_round(target, activations, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", POINTERS)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_and_fits(target: str, scales: str, dtype: str, fresh_cache: None) -> None:
    from run_ckpt.backends.triton.matmul import _TILES

    for index in range(len(_TILES)):
        assert compile_multiply(target, scales, dtype, index) <= TARGETS[target]
    compile_dequantize(target, scales, dtype)
    for activations in ("mxfp8", "mxfp4"):
        compile_round(target, activations, dtype)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # What Triton 3.9 does by itself, with a warning; nothing here adds a product.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")


def compile_multiply(target: str, scales: str, dtype: str, tile_index: int) -> int:
    """Compile multiply_kernel to the target's machine code and return its shared memory in bytes."""
    import triton.language as tl

    from run_ckpt.backends.triton.matmul import _TILES, multiply_kernel

    tiles, constant = _TILES[tile_index], getattr(tl, POINTERS[dtype])
    constants = {
        "SCALES": scales,
        "DTYPE": constant,
        "DOT_DTYPE": constant,
        "BLOCK_M": tiles.M,
        "BLOCK_N": tiles.N,
        "BLOCK_K": tiles.K,
    }
    pointers = {
        "x_ptr": dtype,
        "weight_ptr": "u8",
        "scale_ptr": "u8" if "fp" in scales else "fp32",
        "second_ptr": "fp32",
        "bias_ptr": dtype,
        "out_ptr": dtype,
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return compile_kernel(multiply_kernel, target, pointers, ("M", "N", "K"), constants, options)


def compile_dequantize(target: str, scales: str, dtype: str) -> int:
    import triton.language as tl

    from run_ckpt.backends.triton.matmul import dequantize_kernel

    constants = {"SCALES": scales, "DTYPE": getattr(tl, POINTERS[dtype]), "BLOCK_N": 32, "BLOCK_K": 128}
    pointers = {
        "weight_ptr": "u8",
        "scale_ptr": "u8" if "fp" in scales else "fp32",
        "second_ptr": "fp32",
        "out_ptr": dtype,
    }
    return compile_kernel(dequantize_kernel, target, pointers, ("N", "K"), constants, {})


def compile_round(target: str, activations: str, dtype: str) -> None:
    import triton.language as tl

    from run_ckpt.backends.triton.round import constants, round_kernel

    compiled_for = {**constants(activations), "DTYPE": getattr(tl, POINTERS[dtype]), "N_BLOCKS": 64}
    compile_kernel(round_kernel, target, {"x_ptr": dtype, "out_ptr": dtype}, ("n_blocks",), compiled_for, {})


def compile_kernel(
    kernel: object,
    target: str,
    pointers: dict[str, str],
    sizes: tuple[str, ...],
    constants: dict[str, object],
    options: dict[str, int],
) -> int:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    if target.startswith("sm"):
        gpu = GPUTarget("cuda", int(target.removeprefix("sm")), 32)
    else:
        gpu = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    signature = {name: f"*{dtype}" for name, dtype in pointers.items()}
    signature |= dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    # As at a launch with the usual addresses: every pointer is a multiple of 16 bytes.
    attributes = {(index,): [["tt.divisibility", 16]] for index in range(len(pointers))}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return int(compile(source, target=gpu, options=options).metadata.shared)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (Device("cpu"), "Triton compiles for GPUs, not for cpu"),
        (Device("mps"), "not for mps"),
        (Device("cuda", "sm75"), "sm80 on, this is sm75"),
        (Device("cuda", "sm80"), None),
        (Device("cuda", "sm120"), None),
        (Device("rocm", "gfx90a"), None),
        (Device("rocm", "gfx1201"), None),
    ],
    ids=str,
)
def test_reason_names_what_is_in_the_way(device: Device, reason: str | None) -> None:
    answer = TRITON.unsupported(describe_layer("mxfp4-aiter", 1, 32), device)
    assert answer is None if reason is None else reason in (answer or "")
