"""Which tensors may be quantized at all: linear weights of a shape the kernels take."""

import re

from run_ckpt.contract.dialects import Scheme
from run_ckpt.contract.formats import MXFP4_BLOCK_SIZE
from run_ckpt.contract.tensors import TensorSpec

WEIGHT_SUFFIX = ".weight"
QUANTIZABLE_DTYPES = ("BF16", "F16", "F32")

# gemm_a4w4 returns wrong rows for small N in its untuned heuristic, and SGLang keeps such layers
# BF16 (multimodal_gen/.../mxfp4.py:38-41).
MXFP4_MIN_N = 256
# The scale tile holds 32 rows (aiter/ops/shuffle.py); every tuned GEMM has K % 256 == 0; the
# weight tile holds K = 64.
MXFP4_N_MULTIPLE = 32
MXFP4_K_MULTIPLE = 256
MXFP4_UNALIGNED_K_MULTIPLE = 64
# torch's scaled matmul and CUTLASS want both multiples of 16.
FP8_MULTIPLE = 16
# transformers dequantizes a block-scaled weight in blocks of N // ceil(N / 128), so that any other
# shape comes out silently wrong (integrations/finegrained_fp8.py).
FP8_TRANSFORMERS_BLOCK_MULTIPLE = 128


def linear_module(spec: TensorSpec) -> str | None:
    """Return the module name where ``spec`` looks like a linear layer's weight, else None."""
    if len(spec.shape) == 2 and spec.name.endswith(WEIGHT_SUFFIX) and 0 not in spec.shape:
        return spec.name[: -len(WEIGHT_SUFFIX)]
    return None


def reason_not_linear(spec: TensorSpec) -> str:
    """Return why a tensor is no linear weight."""
    if not spec.name.endswith(WEIGHT_SUFFIX):
        return "not a weight"
    return f"not a linear weight ({len(spec.shape)}-D)"


def guard(spec: TensorSpec, scheme: Scheme, naming: str, *, allow_unaligned_k: bool) -> str | None:
    """Return why the [N, K] weight must stay as it is under ``scheme``, or None."""
    N, K = spec.shape
    if spec.dtype not in QUANTIZABLE_DTYPES:
        return f"dtype {spec.dtype} is not quantized"
    if scheme.format == "fp8":
        strict = scheme.granularity == "block" and naming == "transformers"
        multiple = FP8_TRANSFORMERS_BLOCK_MULTIPLE if strict else FP8_MULTIPLE
        for axis, size in (("N", N), ("K", K)):
            if size % multiple:
                return f"{axis} = {size} is not a multiple of {multiple}"
        return None
    if N < MXFP4_MIN_N:
        return f"N = {N} is under {MXFP4_MIN_N}"
    if N % MXFP4_N_MULTIPLE:
        return f"N = {N} is not a multiple of {MXFP4_N_MULTIPLE}"
    multiple = _k_multiple(scheme, allow_unaligned_k)
    if K % multiple:
        hint = (
            " (see --allow-unaligned-k)" if multiple == MXFP4_K_MULTIPLE and K % MXFP4_UNALIGNED_K_MULTIPLE == 0 else ""
        )
        return f"K = {K} is not a multiple of {multiple}{hint}"
    return None


def in_numbered_block(module: str) -> bool:
    """True where a part of the dotted name is a number, as in ``layers.3.mlp.up``."""
    return re.search(r"(^|\.)\d+\.", module) is not None


def _k_multiple(scheme: Scheme, allow_unaligned_k: bool) -> int:
    if scheme.layout == "plain":
        return MXFP4_BLOCK_SIZE
    return MXFP4_UNALIGNED_K_MULTIPLE if allow_unaligned_k else MXFP4_K_MULTIPLE
