"""Formats are records: what a new one gets without another line, and what every one of ours has."""

from dataclasses import replace

import pytest
import torch

from run_ckpt.contract.codec import dequantize, tensor_scale
from run_ckpt.contract.dialects.dialect import usual_scale_shape
from run_ckpt.contract.dialects.table import DIALECTS, choose_dialect
from run_ckpt.contract.errors import SliceError
from run_ckpt.contract.formats import E4M3, E8M0, FORMATS, FP8, GROUP, QuantFormat, Scheme
from run_ckpt.contract.layouts import PLAIN
from run_ckpt.contract.manifest import INVERSE_TENSOR_SCALE, TENSOR_SCALE, WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.loading.tensor_parallel import concat_rows, slice_columns, slice_rows
from tests.bits import assert_bits_equal

SCHEMES = [
    Scheme(quant_format, layout, granularity)
    for quant_format in FORMATS.values()
    for layout in quant_format.layouts
    for granularity in quant_format.blocks
]
# E4M3 codes with an E8M0 scale for each 64, as none of ours. No module knows it.
WIDE = QuantFormat(
    name="wide",
    label="wide",
    element=E4M3,
    scale=E8M0,
    blocks={GROUP: (1, 64)},
    layouts=(PLAIN,),
    scale_rules=("floor",),
    K_granule=64,
    min_N=1,
    N_multiple=16,
    K_multiple=64,
    summary="float8_e4m3fn, an E8M0 scale",
    machines="",
)


def wide_layer(N: int, K: int) -> tuple[Layer, dict[str, torch.Tensor]]:
    scheme = WIDE.scheme("plain", GROUP)
    layer = Layer(
        module="proj",
        scheme=scheme,
        N=N,
        K=K,
        source_tensor="proj.weight",
        source_dtype="BF16",
        scale_rule="floor",
        tensors={WEIGHT: "proj.weight", WEIGHT_SCALE: "proj.weight_scale"},
        scale_shape=usual_scale_shape(N, K, scheme),
    )
    codes = torch.arange(N * K).remainder(127).to(torch.uint8).reshape(N, K).view(torch.float8_e4m3fn)
    scales = torch.arange(N * K // 64).add(120).remainder(255).to(torch.uint8).reshape(N, K // 64)
    return layer, {WEIGHT: codes, WEIGHT_SCALE: scales}


def test_a_record_gives_a_new_format_its_tensors() -> None:
    layer, _ = wide_layer(64, 192)
    assert {role: (spec.dtype, spec.shape) for role, spec in layer.specs().items()} == {
        WEIGHT: ("F8_E4M3", (64, 192)),
        WEIGHT_SCALE: ("U8", (64, 3)),
    }
    assert layer.scheme.alignment == (1, 64)
    assert str(layer.scheme) == "--format wide"
    facts = {"element_format": "e4m3fn", "scale_format": "e8m0", "scale_bias": 127, "block_size": 64}
    assert WIDE.facts == {**facts, "tie_rule": "half_even"}


def test_a_record_gives_a_new_format_its_decoding() -> None:
    layer, tensors = wide_layer(8, 192)
    factors = torch.ldexp(torch.ones(8, 3), tensors[WEIGHT_SCALE].int() - 127)
    expected = tensors[WEIGHT].float() * factors.repeat_interleave(64, dim=1)
    assert_bits_equal(dequantize(tensors[WEIGHT], tensors[WEIGHT_SCALE], layer.scheme), expected)


def test_a_record_gives_a_new_format_its_tensor_parallelism() -> None:
    part = wide_layer(8, 256)
    whole = dequantize(part[1][WEIGHT], part[1][WEIGHT_SCALE], part[0].scheme)
    layer, tensors = slice_columns(slice_rows(part, (2, 5)), (64, 192))
    assert (layer.N, layer.K, layer.scale_shape) == (3, 128, (3, 2))
    assert_bits_equal(dequantize(tensors[WEIGHT], tensors[WEIGHT_SCALE], layer.scheme), whole[2:5, 64:192])


def two_level_layer(N: int, K: int) -> tuple[Layer, dict[str, torch.Tensor]]:
    layer, tensors = wide_layer(N, K)
    scheme = replace(layer.scheme, format=replace(WIDE, is_two_level=True))
    names = {**layer.tensors, TENSOR_SCALE: "proj.weight_scale_2"}
    return replace(layer, scheme=scheme, tensors=names), {**tensors, TENSOR_SCALE: torch.tensor([0.3])}


def test_a_record_of_two_levels_of_scales_multiplies_them_first() -> None:
    layer, tensors = two_level_layer(8, 192)
    assert layer.specs()[TENSOR_SCALE].shape == (1,)
    assert layer.scheme.has_tensor_scale
    scales = torch.ldexp(torch.ones(8, 3), tensors[WEIGHT_SCALE].int() - 127) * torch.tensor(0.3)
    expected = tensors[WEIGHT].float() * scales.repeat_interleave(64, dim=1)
    decoded = dequantize(tensors[WEIGHT], tensors[WEIGHT_SCALE], layer.scheme, tensor_scale(tensors))
    assert_bits_equal(decoded, expected)
    inverse = {**tensors, INVERSE_TENSOR_SCALE: torch.tensor([3.0])}
    assert_bits_equal(tensor_scale(inverse) or torch.zeros(1), torch.tensor([1 / 3]))


def test_slices_and_joins_keep_the_scale_of_the_tensor() -> None:
    part = two_level_layer(8, 256)
    layer, tensors = concat_rows([slice_rows(part, (0, 2)), slice_rows(part, (5, 8))])
    assert (layer.N, tensors[TENSOR_SCALE].tolist()) == (5, part[1][TENSOR_SCALE].tolist())
    other = (part[0], {**part[1], TENSOR_SCALE: torch.tensor([0.4])})
    with pytest.raises(SliceError, match="weight_scale_2 differ"):
        concat_rows([part, other])


@pytest.mark.parametrize("naming", ["diffusers", "transformers"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_scheme_has_one_usual_dialect(scheme: Scheme, naming: str) -> None:
    usual = [dialect for dialect in DIALECTS.values() if naming in dialect.schemes.get(scheme, ())]
    assert usual == [choose_dialect([scheme], naming)]


def test_a_scheme_is_known_by_its_value() -> None:
    # Layers are copied and pickled with their model.
    assert replace(FP8) == FP8
    assert hash(replace(FP8)) == hash(FP8)
