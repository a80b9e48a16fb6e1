"""Which linear of SGLang's model holds which layers: decided by its map of names, refused where it can't be right.

Pure decisions, without SGLang; test_sglang.py runs SGLang itself.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from run_ckpt.contract.errors import FaultsError, SliceError
from run_ckpt.contract.formats import AITER_MXFP4, PLAIN_MXFP4, TENSOR_FP8
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, FusedScale, Layer, Manifest
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.integrations.serving.share import Share, Target, cut_evenly
from run_ckpt.integrations.sglang.targets import Place, find_targets, rename_tensors
from tests.bits import assert_bits_equal
from tests.checkpoints import random_weight
from tests.codec import quantize_mxfp4

ROOT = Path(__file__).parents[1]


def make_layer(module: str, N: int = 256, K: int = 256, **changes: object) -> Layer:
    layer = Layer(
        module=module,
        scheme=AITER_MXFP4,
        N=N,
        K=K,
        source_tensor=f"{module}.weight",
        source_dtype="BF16",
        scale_rule="even",
        tensors={WEIGHT: f"{module}.weight", WEIGHT_SCALE: f"{module}.weight_scale"},
        scale_shape=(256, 8),
    )
    return replace(layer, **changes)  # type: ignore[arg-type]


def make_manifest(*layers: Layer, fused_scales: dict[str, FusedScale] | None = None) -> Manifest:
    return Manifest(
        tool={},
        source={},
        recipe={"dialect": "mxfp4"},
        layers={layer.module: layer for layer in layers},
        kept={},
        fused_scales=fused_scales or {},
        unquantized_linears={},
    )


def rename(name: str) -> Place:
    """SGLang's map for a model that fuses q, k, v and renames the output; it knows no scales."""
    if name.endswith(".weight"):
        module, member = name.removesuffix(".weight").rsplit(".", 1)
        if member in ("to_q", "to_k", "to_v"):
            return f"{module}.to_qkv.weight", ("to_q", "to_k", "to_v").index(member), 3
        if member == "to_out":
            return f"{module}.proj.weight", None, None
    return name, None, None


QKV = [make_layer(f"blocks.0.{member}", N) for member, N in (("to_v", 64), ("to_k", 64), ("to_q", 128))]


def test_members_of_a_fused_linear_come_in_the_order_of_its_rows() -> None:
    targets = find_targets(make_manifest(*QKV, make_layer("blocks.0.to_out")), rename)
    assert set(targets) == {"blocks.0.to_qkv", "blocks.0.proj"}
    fused = targets["blocks.0.to_qkv"]
    assert [layer.module for layer in fused.layers] == ["blocks.0.to_q", "blocks.0.to_k", "blocks.0.to_v"]
    assert (fused.N, fused.K) == (256, 256)


def test_scales_go_where_their_weights_go_and_repeated_ones_nowhere() -> None:
    repeated = FusedScale(TensorSpec("blocks.0.to_qkv.weight_scale", "F32", (3,)), WEIGHT_SCALE, ("blocks.0.to_q",))
    manifest = make_manifest(
        *QKV, make_layer("blocks.0.to_out"), fused_scales={"blocks.0.to_qkv.weight_scale": repeated}
    )
    renamed = rename_tensors(manifest, find_targets(manifest, rename), rename)
    assert renamed("blocks.0.to_k.weight_scale") == ("blocks.0.to_qkv.weight_scale", 1, 3)
    assert renamed("blocks.0.to_v.weight") == ("blocks.0.to_qkv.weight", 2, 3)
    assert renamed("blocks.0.to_out.weight_scale") == ("blocks.0.proj.weight_scale", None, None)
    assert renamed("blocks.0.to_qkv.weight_scale") == ("", None, None)
    assert renamed("blocks.0.norm.weight") == ("blocks.0.norm.weight", None, None)


def test_spellings_of_other_dialects_become_the_roles() -> None:
    layer = make_layer(
        "blocks.0.to_out",
        tensors={
            WEIGHT: "blocks.0.to_out.weight_packed",
            WEIGHT_SCALE: "blocks.0.to_out.weight_quantizer.scale",
        },
    )
    manifest = make_manifest(layer)
    renamed = rename_tensors(manifest, find_targets(manifest, rename), rename)
    assert renamed("blocks.0.to_out.weight_packed") == ("blocks.0.proj.weight", None, None)
    assert renamed("blocks.0.to_out.weight_quantizer.scale") == ("blocks.0.proj.weight_scale", None, None)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (QKV[:2], r"to_k, blocks.0.to_v: fused with others into blocks.0.to_qkv.weight \(3 tensors\)"),
        ([*QKV[:2], replace(QKV[2], scheme=TENSOR_FP8)], "fused into .* their .format"),
        ([*QKV[:2], replace(QKV[2], scheme=PLAIN_MXFP4)], "fused into .* their .format"),
    ],
    ids=["a member is missing", "formats differ", "layouts differ"],
)
def test_a_fused_linear_that_would_be_wrong_is_refused(layers: list[Layer], message: str) -> None:
    with pytest.raises(FaultsError, match=message):
        find_targets(make_manifest(*layers), rename)


def test_ranks_share_each_segment_of_an_axis() -> None:
    assert cut_evenly([128, 64, 64], 1, 2) == ((64, 128), (160, 192), (224, 256))
    assert cut_evenly([256], 3, 4) == ((192, 256),)


def test_neighbouring_ranks_hold_the_same_of_a_segment_with_copies() -> None:
    ranges = [cut_evenly([128, 64], rank, 4, [1, 2]) for rank in range(4)]
    assert ranges == [
        ((0, 32), (128, 160)),
        ((32, 64), (128, 160)),
        ((64, 96), (160, 192)),
        ((96, 128), (160, 192)),
    ]


def test_one_rank_holds_the_whole_axis() -> None:
    assert cut_evenly([128, 64], 0, 1) is None


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_together_hold_every_row_once(n_ranks: int) -> None:
    rows = [
        row
        for rank in range(n_ranks)
        for start, stop in cut_evenly([96, 32], rank, n_ranks) or ()
        for row in range(start, stop)
    ]
    assert sorted(rows) == list(range(128))


def stored(weights: list[Tensor]) -> tuple[Target, dict[str, Tensor]]:
    """Shuffled MXFP4 layers as a linear that fuses them gets them: each tensor with its own padding, stacked."""
    packed, scales = zip(*(quantize_mxfp4(weight, "even") for weight in weights), strict=True)
    padded = [AITER_SCALE.shuffle(AITER_SCALE.pad_to_tile(scale)) for scale in scales]
    layers = tuple(
        make_layer(f"blocks.0.{i}", *weight.shape, scale_shape=tuple(scale.shape))
        for i, (weight, scale) in enumerate(zip(weights, padded, strict=True))
    )
    shuffled = torch.cat([AITER_WEIGHT.shuffle(codes) for codes in packed])
    return Target("blocks.0.to_qkv", layers), {WEIGHT: shuffled, WEIGHT_SCALE: torch.cat(padded)}


def assert_is(share: Share, tensors: dict[str, Tensor], weight: Tensor) -> None:
    """The rank's tensors are those of its weight quantized by itself, in layout ``aiter``."""
    packed, scale = quantize_mxfp4(weight, "even")
    layer = share.layer()
    assert (layer.N, layer.K, layer.scheme.layout.name) == (*weight.shape, "aiter")
    assert_bits_equal(share.take(WEIGHT, tensors[WEIGHT]), AITER_WEIGHT.shuffle(packed))
    expected = AITER_SCALE.shuffle(AITER_SCALE.pad_to_tile(scale))
    assert_bits_equal(share.take(WEIGHT_SCALE, tensors[WEIGHT_SCALE]), expected)


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_a_column_parallel_rank_holds_its_rows_of_each_member_without_their_padding(n_ranks: int) -> None:
    weights = [random_weight(N, 256, seed=N) for N in (384, 128, 128)]
    target, tensors = stored(weights)
    for rank in range(n_ranks):
        share = Share(target, rows=cut_evenly([384, 128, 128], rank, n_ranks))
        assert_is(share, tensors, torch.cat([weight.chunk(n_ranks)[rank] for weight in weights]))


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_a_row_parallel_rank_holds_its_columns_of_each_segment(n_ranks: int) -> None:
    weight = random_weight(96, 768)
    target, tensors = stored([weight])
    for rank in range(n_ranks):
        share = Share(target, columns=cut_evenly([256, 512], rank, n_ranks))
        columns = [segment.chunk(n_ranks, dim=1)[rank] for segment in weight.split([256, 512], dim=1)]
        assert_is(share, tensors, torch.cat(columns, dim=1))


def test_a_rank_that_would_get_half_a_block_is_an_error_before_any_tensor_is_read() -> None:
    target, _ = stored([random_weight(32, 64)])
    with pytest.raises(SliceError, match="another number of ranks"):
        Share(target, columns=cut_evenly([64], 0, 4)).layer()


def test_the_entry_point_is_a_function_that_costs_nothing_to_import() -> None:
    """SGLang imports it in every process, also where no checkpoint of ours is served."""
    module = "run_ckpt.integrations.sglang.plugin"
    declared = f'[project.entry-points."sglang.multimodal_gen.plugins"]\nconvert-ckpt = "{module}:register"\n'
    assert declared in (ROOT / "pyproject.toml").read_text()
    code = f"import sys, {module} as it; it.register; assert not {{'torch', 'numpy', 'sglang'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
