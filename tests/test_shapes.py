"""Any shape, dtype and split into shards: the guards decide, and what is converted decodes as the reference says."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from run_ckpt.contract.codec import fp8_scale, quantize_fp8
from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.verify.component import verify_output
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, load_all, random_weight, save_checkpoint
from tests.codec import dequantize_mxfp4, quantize_mxfp4

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
NAME = "blocks.0.proj.weight"


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 24).map(lambda n: 16 * n) | st.integers(1, 700),
    K=st.integers(1, 24).map(lambda k: 32 * k) | st.integers(1, 700),
    dtype=DTYPES,
    layout=st.sampled_from(["aiter", "plain"]),
    allow_unaligned_k=st.booleans(),
)
def test_mxfp4_of_any_shape(N: int, K: int, dtype: torch.dtype, layout: str, allow_unaligned_k: bool) -> None:
    multiple = 32 if layout == "plain" else 64 if allow_unaligned_k else 256
    admitted = N >= 256 and N % 32 == 0 and K % multiple == 0
    weight = random_weight(N, K, dtype, seed=N * K)
    options = {"format": "mxfp4", "layout": layout, "allow_unaligned_k": allow_unaligned_k, "dialect": "mxfp4"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = save_checkpoint(folder / "in", [{NAME: weight}, {"blocks.0.norm.weight": torch.ones(3)}], {})
        if not admitted:
            with pytest.raises(FaultsError, match="nothing to convert"):
                convert(source, folder / "out", **options)
            return
        convert(source, folder / "out", **options)
        (report,) = verify_output(folder / "out", source, Silent())
        assert report.faults == ()
        output = load_all(folder / "out")
        codes, scales = output[NAME], output["blocks.0.proj.weight_scale"]
        if layout == "aiter":
            codes = AITER_WEIGHT.unshuffle(codes)
            scales = AITER_SCALE.unshuffle(scales)[:N, : K // 32]
        assert_bits_equal(dequantize_mxfp4(codes, scales), dequantize_mxfp4(*quantize_mxfp4(weight, "even")))


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 20).map(lambda n: 16 * n) | st.integers(1, 300),
    K=st.integers(1, 20).map(lambda k: 16 * k) | st.integers(1, 300),
    dtype=DTYPES,
)
def test_fp8_of_any_shape(N: int, K: int, dtype: torch.dtype) -> None:
    weight = random_weight(N, K, dtype, seed=N + K)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = save_checkpoint(folder / "in", [{NAME: weight}], {})
        if N % 16 or K % 16:
            with pytest.raises(FaultsError, match="nothing to convert"):
                convert(source, folder / "out", format="fp8")
            return
        convert(source, folder / "out", format="fp8")
        assert_bits_equal(load_all(folder / "out")[NAME], quantize_fp8(weight, fp8_scale(weight.abs().amax())))
        assert read_manifest(folder / "out").layers["blocks.0.proj"].scale_shape == (1,)
