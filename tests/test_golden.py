"""The torch reference gives the bytes that AITER's own code made (tests/golden/README.md)."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from run_ckpt.contract.codec import fp8_scale, quantize_fp8
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from tests.bits import assert_bits_equal
from tests.codec import dequantize_mxfp4, quantize_mxfp4

GOLDEN_FILE = Path(__file__).parent / "golden" / "aiter_golden.safetensors"
RULE_OF_MODE = {"even": "even", "t_roundup": "roundup", "t_rounddown": "floor"}
# AITER wrote these; `special` holds NaN and Inf, which the converter refuses.
CASES = [
    *((case, "even") for case in ("normal", "k320", "outliers", "ranges", "amax_sweep", "edge")),
    *((case, "t_roundup") for case in ("normal", "k320", "outliers", "ranges", "amax_sweep", "edge")),
    *((case, "t_rounddown") for case in ("ranges", "amax_sweep", "edge")),
]
SHUFFLED_CASES = [(case, mode) for case in ("normal", "k320", "outliers") for mode in ("even", "t_roundup")]
GEMM_ROWS = ("m5", "m48")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN_FILE)


def names(cases: list[tuple[str, str]]) -> list[str]:
    return [f"{case}-{mode}" for case, mode in cases]


def test_readme_and_file_name_the_same_commit_of_aiter() -> None:
    with safe_open(GOLDEN_FILE, "pt") as file:
        commit = re.search(r"ROCm/aiter (\w{40}),", file.metadata()["made_with"])[1]
    assert f"commit {commit} " in GOLDEN_FILE.with_name("README.md").read_text().replace("\n", " ")


def test_every_finite_case_of_the_three_modes_is_compared(golden: dict[str, Tensor]) -> None:
    stored = {tuple(name.split(".")[:2]) for name in golden if name.endswith(".q") and "fp8" not in name}
    assert {(case, mode) for case, mode in stored if mode in RULE_OF_MODE and case != "special"} == set(CASES)


@pytest.mark.parametrize(("case", "mode"), CASES, ids=names(CASES))
def test_element_codes_are_those_of_aiter(golden: dict[str, Tensor], case: str, mode: str) -> None:
    packed, _ = quantize_mxfp4(golden[f"{case}.x"], RULE_OF_MODE[mode])
    assert_bits_equal(packed, golden[f"{case}.{mode}.q"])


@pytest.mark.parametrize(("case", "mode"), CASES, ids=names(CASES))
def test_scale_codes_are_those_of_aiter(golden: dict[str, Tensor], case: str, mode: str) -> None:
    _, scale_codes = quantize_mxfp4(golden[f"{case}.x"], RULE_OF_MODE[mode])
    assert_bits_equal(scale_codes, golden[f"{case}.{mode}.s"])


@pytest.mark.parametrize(("case", "mode"), SHUFFLED_CASES, ids=names(SHUFFLED_CASES))
def test_weight_layout_is_shuffle_weight(golden: dict[str, Tensor], case: str, mode: str) -> None:
    assert_bits_equal(AITER_WEIGHT.shuffle(golden[f"{case}.{mode}.q"]), golden[f"{case}.{mode}.q_shuf"])


@pytest.mark.parametrize(("case", "mode"), SHUFFLED_CASES, ids=names(SHUFFLED_CASES))
def test_weight_layout_is_undone_exactly(golden: dict[str, Tensor], case: str, mode: str) -> None:
    assert_bits_equal(AITER_WEIGHT.unshuffle(golden[f"{case}.{mode}.q_shuf"]), golden[f"{case}.{mode}.q"])


@pytest.mark.parametrize(("case", "mode"), SHUFFLED_CASES, ids=names(SHUFFLED_CASES))
def test_scale_layout_is_e8m0_shuffle_of_the_zero_padded_scale(golden: dict[str, Tensor], case: str, mode: str) -> None:
    padded = AITER_SCALE.pad_to_tile(golden[f"{case}.{mode}.s"])
    assert_bits_equal(AITER_SCALE.shuffle(padded), golden[f"{case}.{mode}.s_shuf"])


@pytest.mark.parametrize(("case", "mode"), SHUFFLED_CASES, ids=names(SHUFFLED_CASES))
def test_scale_layout_is_undone_exactly(golden: dict[str, Tensor], case: str, mode: str) -> None:
    scale_codes = golden[f"{case}.{mode}.s"]
    rows, cols = scale_codes.shape
    unshuffled = AITER_SCALE.unshuffle(golden[f"{case}.{mode}.s_shuf"])
    assert_bits_equal(unshuffled[:rows, :cols], scale_codes)


def test_fp8_tensor_scale_is_that_of_aiter(golden: dict[str, Tensor]) -> None:
    assert_bits_equal(fp8_scale(golden["fp8.x"].abs().amax().reshape(1)), golden["fp8.per_tensor.s"])


def test_fp8_row_scales_are_those_of_aiter(golden: dict[str, Tensor]) -> None:
    assert_bits_equal(fp8_scale(golden["fp8.x"].abs().amax(1, keepdim=True)), golden["fp8.per_row.s"])


@pytest.mark.parametrize("case", ["per_tensor", "per_row"])
def test_fp8_codes_are_those_of_aiter(golden: dict[str, Tensor], case: str) -> None:
    assert_bits_equal(quantize_fp8(golden["fp8.x"], golden[f"fp8.{case}.s"]), golden[f"fp8.{case}.q"])


def test_fp8_weight_layout_is_shuffle_weight(golden: dict[str, Tensor]) -> None:
    # AITER's gemm_a8w8_bpreshuffle takes shuffle_weight(weight): the tile order of MXFP4 with K bytes a row.
    codes = golden["fp8.per_row.q"].view(torch.uint8)
    assert_bits_equal(AITER_WEIGHT.shuffle(codes), golden["fp8.per_row.q_shuf"].view(torch.uint8))


@pytest.mark.parametrize("rows", GEMM_ROWS)
def test_activations_quantize_to_the_bytes_the_gemm_was_given(golden: dict[str, Tensor], rows: str) -> None:
    packed, scale_codes = quantize_mxfp4(golden[f"gemm.{rows}.x"], "even")
    assert_bits_equal(packed, golden[f"gemm.{rows}.xq"])
    assert_bits_equal(scale_codes, golden[f"gemm.{rows}.xs"])


@pytest.mark.parametrize("rows", GEMM_ROWS)
def test_gemm_of_the_decoded_operands_is_the_float64_product(golden: dict[str, Tensor], rows: str) -> None:
    weight = dequantize_mxfp4(golden["normal.even.q"], golden["normal.even.s"]).double()
    activations = dequantize_mxfp4(golden[f"gemm.{rows}.xq"], golden[f"gemm.{rows}.xs"]).double()
    # Decoded values have two significant bits, so each product is exact in float64; the sum of K = 512
    # of them has K roundings at most, in an order that the BLAS chooses.
    bound = 512 * 2.0**-53 * (activations.abs() @ weight.abs().T)
    assert ((activations @ weight.T - golden[f"gemm.{rows}.ref_f64"]).abs() <= bound).all()


@pytest.mark.parametrize("rows", GEMM_ROWS)
def test_gemm_output_of_the_preshuffle_kernel_is_the_float64_product(golden: dict[str, Tensor], rows: str) -> None:
    weight = dequantize_mxfp4(golden["normal.even.q"], golden["normal.even.s"]).double()
    activations = dequantize_mxfp4(golden[f"gemm.{rows}.xq"], golden[f"gemm.{rows}.xs"]).double()
    # The kernel adds K = 512 exact products in float32.
    bound = 512 * 2.0**-24 * (activations.abs() @ weight.abs().T)
    assert ((activations @ weight.T - golden[f"gemm.{rows}.y_f32"].double()).abs() <= bound).all()
