"""Tile layouts put each byte where AITER's sources compute it, give it back exactly, and slice where tiles do."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT, TileLayout, round_up
from tests.bits import assert_bits_equal

Fill = Callable[[int, int], Tensor]
WEIGHT_SHAPES = [(16, 32), (16, 64), (32, 32), (48, 96), (256, 128), (304, 256)]  # [N, K/2]
SCALE_SHAPES = [(32, 8), (32, 16), (96, 8), (256, 24), (512, 16)]  # [pad256(N), pad8(K/32)] or any tile
LAYOUT_SHAPES = [
    *((AITER_WEIGHT, shape) for shape in WEIGHT_SHAPES),
    *((AITER_SCALE, shape) for shape in SCALE_SHAPES),
]
LAYOUT_IDS = [f"{layout.name}-{rows}x{cols}" for layout, (rows, cols) in LAYOUT_SHAPES]


def weight_offset(n: int, kb: int, KB: int) -> int:
    """Byte offset of packed byte (n, kb) of a weight [N, KB]; KB = K / 2. AITER: csrc/kernels/quant_mxfp4.cu."""
    return (n // 16) * 16 * KB + (kb // 16) * 256 + (n % 16) * 16 + kb % 16


def scale_offset(n: int, s: int, SP: int) -> int:
    """Byte offset of scale (n, s) of a padded scale [.., SP]. AITER: mx_scale_shuffle_idx, mx_quant_utils.h."""
    return (n // 32) * 32 * SP + (s // 8) * 256 + (s % 4) * 64 + (n % 16) * 4 + ((s % 8) // 4) * 2 + (n % 32) // 16


OFFSETS = {AITER_WEIGHT.name: weight_offset, AITER_SCALE.name: scale_offset}


def counting(rows: int, cols: int) -> Tensor:
    """int32 tensor whose elements are all different."""
    return torch.arange(rows * cols, dtype=torch.int32).reshape(rows, cols)


def random_bytes(rows: int, cols: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(rows * cols).integers(0, 256, (rows, cols), dtype=np.uint8))


@pytest.mark.parametrize(("layout", "shape"), LAYOUT_SHAPES, ids=LAYOUT_IDS)
def test_each_element_lands_at_the_offset_of_the_closed_formula(layout: TileLayout, shape: tuple[int, int]) -> None:
    rows, cols = shape
    stored = layout.shuffle(counting(rows, cols)).flatten()
    expected = torch.empty_like(stored)
    for row in range(rows):
        for col in range(cols):
            expected[OFFSETS[layout.name](row, col, cols)] = row * cols + col
    assert_bits_equal(stored, expected)


@pytest.mark.parametrize("data", [counting, random_bytes], ids=["counting", "random"])
@pytest.mark.parametrize(("layout", "shape"), LAYOUT_SHAPES, ids=LAYOUT_IDS)
def test_unshuffle_undoes_shuffle(layout: TileLayout, shape: tuple[int, int], data: Fill) -> None:
    logical = data(*shape)
    assert_bits_equal(layout.unshuffle(layout.shuffle(logical)), logical)


@pytest.mark.parametrize(("layout", "shape"), LAYOUT_SHAPES, ids=LAYOUT_IDS)
def test_shuffle_undoes_unshuffle(layout: TileLayout, shape: tuple[int, int]) -> None:
    stored = random_bytes(*shape)
    assert_bits_equal(layout.shuffle(layout.unshuffle(stored)), stored)


def test_shuffle_takes_a_view_that_is_not_contiguous() -> None:
    wide = random_bytes(32, 128)
    assert_bits_equal(AITER_WEIGHT.shuffle(wide[:, ::2]), AITER_WEIGHT.shuffle(wide[:, ::2].contiguous()))


@pytest.mark.parametrize(
    ("shape", "padded"),
    [((256, 8), (256, 8)), ((304, 16), (512, 16)), ((96, 10), (256, 16)), ((1, 1), (256, 8)), ((257, 9), (512, 16))],
    ids=str,
)
def test_scale_is_padded_to_256_rows_and_8_columns(shape: tuple[int, int], padded: tuple[int, int]) -> None:
    assert AITER_SCALE.padded_shape(*shape) == padded


@pytest.mark.parametrize("shape", WEIGHT_SHAPES, ids=str)
def test_weight_is_not_padded(shape: tuple[int, int]) -> None:
    assert AITER_WEIGHT.padded_shape(*shape) == shape


def test_padding_keeps_the_scale_in_its_corner() -> None:
    scale = random_bytes(96, 10)
    assert_bits_equal(AITER_SCALE.pad_to_tile(scale)[:96, :10], scale)


def test_padding_is_zero_on_every_side() -> None:
    padded = AITER_SCALE.pad_to_tile(torch.full((96, 10), 0xFF, dtype=torch.uint8))
    assert int((padded != 0).sum()) == 96 * 10


@pytest.mark.parametrize(
    ("layout", "shape"),
    [(AITER_WEIGHT, (15, 32)), (AITER_WEIGHT, (16, 48)), (AITER_SCALE, (33, 8)), (AITER_SCALE, (32, 10))],
    ids=["weight-rows", "weight-cols", "scale-rows", "scale-cols"],
)
@pytest.mark.parametrize("way", ["shuffle", "unshuffle"])
def test_shape_off_the_tile_is_refused_with_both_shapes(layout: TileLayout, shape: tuple[int, int], way: str) -> None:
    message = rf"{layout.name}: shape \[{shape[0]}, {shape[1]}\] .*\[{layout.tile[0]}, {layout.tile[1]}\]"
    with pytest.raises(ValueError, match=message):
        getattr(layout, way)(random_bytes(*shape))


@pytest.mark.parametrize(("value", "multiple", "expected"), [(0, 8, 0), (1, 8, 8), (8, 8, 8), (9, 8, 16)])
def test_round_up_gives_the_next_multiple(value: int, multiple: int, expected: int) -> None:
    assert round_up(value, multiple) == expected


# Tensor parallelism: which slices of the stored bytes are stored slices.
@pytest.mark.parametrize(("first", "last"), [(0, 16), (16, 48), (96, 304)], ids=str)
def test_weight_rows_in_multiples_of_16_are_contiguous_bytes(first: int, last: int) -> None:
    weight = random_bytes(304, 64)
    stored = AITER_WEIGHT.shuffle(weight).flatten()[first * 64 : last * 64].reshape(-1, 64)
    assert_bits_equal(stored, AITER_WEIGHT.shuffle(weight[first:last]))


@pytest.mark.parametrize(("first", "last"), [(0, 32), (32, 96), (256, 512)], ids=str)
def test_scale_rows_in_multiples_of_32_are_contiguous_bytes(first: int, last: int) -> None:
    scale = random_bytes(512, 16)
    stored = AITER_SCALE.shuffle(scale).flatten()[first * 16 : last * 16].reshape(-1, 16)
    assert_bits_equal(stored, AITER_SCALE.shuffle(scale[first:last]))


def test_concatenated_weights_are_concatenated_bytes() -> None:
    parts = [random_bytes(rows, 64) for rows in (16, 48, 32)]
    joined = torch.cat([AITER_WEIGHT.shuffle(part) for part in parts])
    assert_bits_equal(joined, AITER_WEIGHT.shuffle(torch.cat(parts)))


def test_concatenated_scales_without_padding_are_concatenated_bytes() -> None:
    parts = [random_bytes(rows, 16) for rows in (32, 96, 64)]
    joined = torch.cat([AITER_SCALE.shuffle(part) for part in parts])
    assert_bits_equal(joined, AITER_SCALE.shuffle(torch.cat(parts)))


@pytest.mark.parametrize(("first", "last"), [(0, 32), (32, 128), (96, 160)], ids=str)
def test_weight_columns_slice_on_the_tile_view_in_steps_of_32_bytes(first: int, last: int) -> None:
    weight = random_bytes(48, 160)
    tiles = AITER_WEIGHT.shuffle(weight).reshape(48 // 16, 160 * 16)
    stored = tiles[:, first * 16 : last * 16].reshape(48, last - first)
    assert_bits_equal(stored, AITER_WEIGHT.shuffle(weight[:, first:last]))


@pytest.mark.parametrize(("first", "last"), [(0, 8), (8, 24), (16, 32)], ids=str)
def test_scale_columns_slice_on_the_tile_view_in_steps_of_8(first: int, last: int) -> None:
    scale = random_bytes(96, 32)
    tiles = AITER_SCALE.shuffle(scale).reshape(96 // 32, 32 * 32)
    stored = tiles[:, first * 32 : last * 32].reshape(96, last - first)
    assert_bits_equal(stored, AITER_SCALE.shuffle(scale[:, first:last]))


@pytest.mark.parametrize(
    ("layout", "cols", "part"), [(AITER_WEIGHT, 128, 32), (AITER_SCALE, 32, 8)], ids=["weight", "scale"]
)
def test_a_column_slice_of_the_stored_tensor_is_not_a_stored_slice(layout: TileLayout, cols: int, part: int) -> None:
    logical = counting(96, cols)
    assert not torch.equal(layout.shuffle(logical)[:, :part], layout.shuffle(logical[:, :part]))


def test_a_scale_sliced_by_rows_is_whole_again_after_padding() -> None:
    scale = random_bytes(512, 16)
    part = AITER_SCALE.shuffle(scale).flatten()[: 288 * 16].reshape(288, 16)
    padded = torch.cat((part, part.new_zeros(512 - 288, 16)))
    assert_bits_equal(padded, AITER_SCALE.shuffle(AITER_SCALE.pad_to_tile(scale[:288])))
