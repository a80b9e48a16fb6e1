"""A slice of a quantized weight is the quantized slice, bit for bit; joined slices are the whole."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from run_ckpt.contract.codec import fp8_scale, quantize_fp8
from run_ckpt.contract.errors import SliceError
from run_ckpt.contract.formats import read_scheme
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.loading.tensor_parallel import Part, Range, concat_rows, slice_columns, slice_rows
from tests.bits import assert_bits_equal
from tests.checkpoints import random_weight
from tests.codec import expand_fp8_scale, quantize_mxfp4

quick = settings(max_examples=20, deadline=None)


def make_layer(format_: str, layout: str, granularity: str, N: int, K: int, scale_shape: tuple[int, ...]) -> Layer:
    return Layer(
        module="blocks.0.to_q",
        scheme=read_scheme(format_, layout, granularity),
        N=N,
        K=K,
        source_tensor="blocks.0.to_q.weight",
        source_dtype="BF16",
        scale_rule="even",
        tensors={WEIGHT: "blocks.0.to_q.weight", WEIGHT_SCALE: "blocks.0.to_q.weight_scale"},
        scale_shape=scale_shape,
    )


def quantize(weight: Tensor, layout: str) -> Part:
    """The whole weight as MXFP4, stored in ``layout``."""
    packed, scale = quantize_mxfp4(weight, "even")
    if layout == "aiter":
        packed, scale = AITER_WEIGHT.shuffle(packed), AITER_SCALE.shuffle(AITER_SCALE.pad_to_tile(scale))
    layer = make_layer("mxfp4", layout, "group", *weight.shape, tuple(scale.shape))
    return layer, {WEIGHT: packed, WEIGHT_SCALE: scale}


def quantize_as_fp8(weight: Tensor, granularity: str) -> Part:
    N, K = weight.shape
    if granularity == "tensor":
        scale = fp8_scale(weight.abs().amax()).reshape(1)
    elif granularity == "channel":
        scale = fp8_scale(weight.abs().amax(1))
    else:
        scale = 0.001 + torch.rand(-(-N // 128), -(-K // 128), generator=torch.Generator().manual_seed(1))
    codes = quantize_fp8(weight, expand_fp8_scale(scale, N, K))
    return make_layer("fp8", "plain", granularity, N, K, tuple(scale.shape)), {WEIGHT: codes, WEIGHT_SCALE: scale}


def decode_fp8(part: Part) -> Tensor:
    layer, tensors = part
    return tensors[WEIGHT].float() * expand_fp8_scale(tensors[WEIGHT_SCALE], layer.N, layer.K)


def assert_same(part: Part, expected: Part) -> None:
    """The same record but for the name, and the same bytes of exactly the shapes it says."""
    layer, tensors = part
    wanted, wanted_tensors = expected
    assert (layer.N, layer.K, layer.scheme.layout.name, layer.scale_shape) == (
        wanted.N,
        wanted.K,
        wanted.scheme.layout.name,
        wanted.scale_shape,
    )
    assert {role: tuple(tensor.shape) for role, tensor in tensors.items()} == {
        role: spec.shape for role, spec in layer.specs().items()
    }
    for role in (WEIGHT, WEIGHT_SCALE):
        assert_bits_equal(tensors[role], wanted_tensors[role])


def pick(weight: Tensor, ranges: list[Range], dim: int) -> Tensor:
    return torch.cat([weight.narrow(dim, start, stop - start) for start, stop in ranges], dim=dim)


@st.composite
def ranges_of(draw: st.DrawFn, size: int, step: int) -> list[Range]:
    """One to three ranges with edges in multiples of ``step``, in any order, also overlapping."""
    edge = st.integers(0, size // step)
    pairs = draw(st.lists(st.tuples(edge, edge).filter(lambda pair: pair[0] != pair[1]), min_size=1, max_size=3))
    return [(min(pair) * step, max(pair) * step) for pair in pairs]


@st.composite
def row_slices(draw: st.DrawFn) -> tuple[int, int, list[Range]]:
    N, K = 32 * draw(st.integers(1, 20)), 64 * draw(st.integers(1, 6))
    return N, K, draw(ranges_of(N, draw(st.sampled_from([1, 16, 32, 256])) if N >= 256 else 16))


@st.composite
def column_slices(draw: st.DrawFn) -> tuple[int, int, list[Range]]:
    N, K = 32 * draw(st.integers(1, 10)), 64 * draw(st.integers(4, 20))
    return N, K, draw(ranges_of(K, draw(st.sampled_from([32, 64, 256]))))


@pytest.mark.parametrize("layout", ["aiter", "plain"])
@given(case=row_slices())
@quick
def test_rows_of_a_quantized_weight_are_the_quantized_rows(layout: str, case: tuple[int, int, list[Range]]) -> None:
    N, K, ranges = case
    weight = random_weight(N, K)
    rows = pick(weight, ranges, dim=0)
    expected = quantize(rows, layout if len(rows) % 32 == 0 else "plain")
    assert_same(slice_rows(quantize(weight, layout), *ranges), expected)


@pytest.mark.parametrize("layout", ["aiter", "plain"])
@given(case=column_slices())
@quick
def test_columns_of_a_quantized_weight_are_the_quantized_columns(
    layout: str, case: tuple[int, int, list[Range]]
) -> None:
    N, K, ranges = case
    weight = random_weight(N, K)
    columns = pick(weight, ranges, dim=1)
    expected = quantize(columns, layout if columns.shape[1] % 64 == 0 else "plain")
    assert_same(slice_columns(quantize(weight, layout), *ranges), expected)


@given(sizes=st.lists(st.integers(1, 12).map(lambda n: 32 * n), min_size=1, max_size=4), tiles=st.integers(1, 6))
@quick
def test_joined_layers_are_the_quantized_joined_weights(sizes: list[int], tiles: int) -> None:
    weights = [random_weight(N, 64 * tiles, seed=N) for N in sizes]
    joined = concat_rows([quantize(weight, "aiter") for weight in weights])
    assert_same(joined, quantize(torch.cat(weights), "aiter"))


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_of_a_fused_layer_hold_their_share_of_each_member(n_ranks: int) -> None:
    q, k, v = (random_weight(N, 256, seed=N) for N in (512, 256, 128))
    whole = concat_rows([quantize(weight, "aiter") for weight in (q, k, v)])
    for rank in range(n_ranks):
        ranges, offset = [], 0
        for weight in (q, k, v):
            share = len(weight) // n_ranks
            ranges.append((offset + rank * share, offset + (rank + 1) * share))
            offset += len(weight)
        expected = torch.cat([weight.chunk(n_ranks)[rank] for weight in (q, k, v)])
        assert_same(slice_rows(whole, *ranges), quantize(expected, "aiter"))


def test_slices_by_rows_joined_again_are_the_whole() -> None:
    whole = quantize(random_weight(320, 192), "aiter")
    # 80 rows are no multiple of 32: these parts are plain, and so is their sum.
    parts = [slice_rows(whole, (start, start + 80)) for start in range(0, 320, 80)]
    assert {layer.scheme.layout.name for layer, _ in parts} == {"plain"}
    assert_same(concat_rows(parts), quantize(random_weight(320, 192), "plain"))
    parts = [slice_rows(whole, (0, 96)), slice_rows(whole, (96, 320))]
    assert_same(concat_rows(parts), whole)


def test_a_role_can_be_cut_without_the_other() -> None:
    layer, tensors = quantize(random_weight(256, 512), "aiter")
    both, alone = slice_rows((layer, tensors), (64, 128)), slice_rows((layer, {WEIGHT: tensors[WEIGHT]}), (64, 128))
    assert alone[0] == both[0]
    assert list(alone[1]) == [WEIGHT]
    assert_bits_equal(alone[1][WEIGHT], both[1][WEIGHT])
    assert slice_rows((layer, {}), (64, 128)) == (both[0], {})


@pytest.mark.parametrize(
    ("granularity", "dim", "ranges"),
    [
        ("tensor", 0, [(0, 16), (100, 117)]),
        ("tensor", 1, [(16, 48), (300, 301)]),
        ("channel", 0, [(3, 5), (100, 300)]),
        ("channel", 1, [(16, 48)]),
        ("block", 0, [(0, 128), (256, 300)]),
        ("block", 1, [(256, 384), (0, 130)]),
    ],
)
def test_fp8_slices_decode_to_the_slice_of_the_decoded_weight(granularity: str, dim: int, ranges: list[Range]) -> None:
    whole = quantize_as_fp8(random_weight(300, 400), granularity)
    part = (slice_rows, slice_columns)[dim](whole, *ranges)
    assert {role: tuple(tensor.shape) for role, tensor in part[1].items()} == {
        role: spec.shape for role, spec in part[0].specs().items()
    }
    assert_bits_equal(decode_fp8(part), pick(decode_fp8(whole), ranges, dim))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_joined_fp8_layers_keep_every_value(granularity: str) -> None:
    parts = [quantize_as_fp8(random_weight(N, 256, seed=N), granularity) for N in (128, 256, 100)]
    joined = concat_rows(parts)
    assert joined[0].scheme.granularity == ("block" if granularity == "block" else "channel")
    assert_bits_equal(decode_fp8(joined), torch.cat([decode_fp8(part) for part in parts]))


WHOLE = quantize(random_weight(64, 256), "aiter")
BLOCKS = quantize_as_fp8(random_weight(256, 256), "block")


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda: slice_columns(WHOLE, (0, 48)), r"columns can't be cut at \[48\]: 32 share one scale"),
        (lambda: slice_columns(WHOLE, (16, 64)), r"\[16\]: 32 share"),
        (lambda: slice_columns(BLOCKS, (64, 256)), r"columns can't be cut at \[64\]: 128 share"),
        (lambda: slice_rows(BLOCKS, (64, 256)), r"rows can't be cut at \[64\]: 128 share"),
        (lambda: slice_rows(BLOCKS, (0, 100), (128, 256)), r"\[100\]: 128 share"),
        (lambda: slice_rows(WHOLE, (0, 65)), "are not ranges of its 64"),
        (lambda: slice_rows(WHOLE, (32, 32)), "are not ranges of its 64"),
        (lambda: slice_rows(WHOLE), "are not ranges of its 64"),
        (lambda: concat_rows([WHOLE, BLOCKS]), "can't be one layer"),
        (
            lambda: concat_rows([slice_rows(BLOCKS, (0, 100)), BLOCKS]),
            r"rows can't be cut at \[100\]: 128 share",
        ),
    ],
)
def test_what_has_no_exact_slice_is_refused_with_the_reason(cut: Callable[[], Part], message: str) -> None:
    with pytest.raises(SliceError, match=message):
        cut()
