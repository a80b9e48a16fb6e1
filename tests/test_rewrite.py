"""dequantize gives plain checkpoints that load; relayout is an exact permutation that can be undone."""

import json
import shutil
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from run_ckpt.contract import codec
from run_ckpt.contract.errors import CheckpointError, FaultsError, UsageError
from run_ckpt.contract.formats import AITER_MXFP4, FP8, MXFP8, NVFP4, PLAIN_NVFP4
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from run_ckpt.contract.manifest import MANIFEST_NAME, WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.progress import Silent
from run_ckpt.storage.components import Checkpoint
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.storage.partial import PartialFolder
from run_ckpt.tools.rewrite.dequantize import dequantize
from run_ckpt.tools.rewrite.frame import Rewrite, rewrite
from run_ckpt.tools.rewrite.relayout import relayout
from run_ckpt.tools.verify.component import verify_output
from tests.codec import dequantize_fp8, dequantize_mxfp4, dequantize_mxfp8
from tests.converted import FLUX_DIGITS, LINEAR, SCHEMES, convert, edit_tensor, make_linear, reseal
from tests.experts import BUILDERS, save_experts
from tests.models import MODELS, save

MXFP4_SCHEMES = [name for name in SCHEMES if name.startswith("mxfp4")]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """flux-digits in every scheme."""
    root = tmp_path_factory.mktemp("converted")
    return {scheme: convert(FLUX_DIGITS, root / scheme, **options) for scheme, options in SCHEMES.items()}


def to_plain(output: Path, target: Path, dtype: str = "bfloat16") -> Path:
    dequantize(output, target, dtype=dtype, progress=Silent())
    return target


def to_layout(output: Path, target: Path, layout: str, dialect: str | None = None) -> Path:
    relayout(output, target, layout=layout, dialect=dialect, progress=Silent())
    return target


# dequantize


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantized_weights_are_the_codecs_rounded_to_bfloat16(
    converted: dict[str, Path], tmp_path: Path, scheme: str
) -> None:
    plain = load_all(to_plain(converted[scheme], tmp_path / "plain"))
    stored = load_all(converted[scheme])
    for layer in read_manifest(converted[scheme]).layers.values():
        expected = decode_with_codec(layer, stored).to(torch.bfloat16)
        assert_bits_equal(plain[layer.source_tensor], expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantized_checkpoint_has_the_sources_tensors_and_copies_bit_for_bit(
    converted: dict[str, Path], tmp_path: Path, scheme: str
) -> None:
    plain = load_all(to_plain(converted[scheme], tmp_path / "plain"))
    source = load_all(FLUX_DIGITS)
    assert {name: (t.dtype, t.shape) for name, t in plain.items()} == {
        name: (t.dtype, t.shape) for name, t in source.items()
    }
    for name in read_manifest(converted[scheme]).kept:
        assert_bits_equal(plain[name], source[name])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantized_checkpoint_loads_with_diffusers(converted: dict[str, Path], tmp_path: Path, scheme: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = to_plain(converted[scheme], tmp_path / "plain")
    model, info = diffusers.FluxTransformer2DModel.from_pretrained(
        folder, torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    weights = load_all(folder)
    for name, parameter in model.named_parameters():
        assert_bits_equal(parameter.detach(), weights[name])


def test_dequantized_config_is_the_sources(converted: dict[str, Path], tmp_path: Path) -> None:
    folder = to_plain(converted["mxfp4-aiter"], tmp_path / "plain")
    assert json.loads((folder / "config.json").read_text()) == json.loads((FLUX_DIGITS / "config.json").read_text())
    assert not (folder / MANIFEST_NAME).exists()


def test_dequantized_index_is_the_sources(converted: dict[str, Path], tmp_path: Path) -> None:
    folder = to_plain(converted["mxfp4-plain"], tmp_path / "plain")
    (index,) = folder.glob("*.index.json")
    assert json.loads(index.read_text()) == json.loads((FLUX_DIGITS / index.name).read_text())


def test_rowwise_file_gets_the_name_that_from_pretrained_looks_for(converted: dict[str, Path], tmp_path: Path) -> None:
    folder = to_plain(converted["fp8-channel"], tmp_path / "plain")
    assert [path.name for path in folder.glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtype_source_gives_weights_in_the_sources_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    source = make_linear(tmp_path / "source", 256, 256, dtype)
    output = convert(source, tmp_path / "output", format="fp8")
    plain = load_all(to_plain(output, tmp_path / "plain", dtype="source"))
    stored = load_all(output)
    decoded = dequantize_fp8(stored[f"{LINEAR}.weight"], stored[f"{LINEAR}.weight_scale"])
    assert_bits_equal(plain[f"{LINEAR}.weight"], decoded.to(dtype))


def test_values_rounded_past_the_largest_f16_become_the_largest(tmp_path: Path) -> None:
    source = make_linear(tmp_path / "source", 256, 256, torch.float16)
    largest = torch.tensor([65504.0], dtype=torch.float16).numpy().tobytes()
    edit_tensor(source, f"{LINEAR}.weight", lambda data: data.__setitem__(slice(0, 2), largest))
    output = convert(source, tmp_path / "output", format="mxfp4")
    plain = load_all(to_plain(output, tmp_path / "plain", dtype="source"))
    assert plain[f"{LINEAR}.weight"][0, 0].item() == 65504.0


def test_other_files_are_copied(tmp_path: Path) -> None:
    output = convert(make_linear(tmp_path / "source", 256, 256), tmp_path / "output", format="fp8")
    folder = to_plain(output, tmp_path / "plain")
    assert (folder / "generation_config.json").read_text() == "{}"


def test_a_single_file_without_config_comes_back_without_config(tmp_path: Path) -> None:
    file = make_linear(tmp_path / "source", 256, 256) / "model.safetensors"
    folder = to_plain(convert(file, tmp_path / "output", format="mxfp4"), tmp_path / "plain")
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_every_component_of_a_pipeline_is_dequantized(tmp_path: Path) -> None:
    output = convert_pipeline(tmp_path)
    folder = to_plain(output, tmp_path / "plain")
    for name in ("transformer", "transformer_2"):
        assert (folder / name / "model.safetensors").is_file()


# relayout


def test_aiter_to_plain_gives_the_files_of_a_direct_conversion(converted: dict[str, Path], tmp_path: Path) -> None:
    plain = to_layout(converted["mxfp4-aiter"], tmp_path / "plain", "plain")
    assert read_files(plain) == read_files(converted["mxfp4-plain"])


def test_plain_to_aiter_gives_the_files_of_a_direct_conversion(converted: dict[str, Path], tmp_path: Path) -> None:
    aiter = to_layout(converted["mxfp4-plain"], tmp_path / "aiter", "aiter")
    assert_same_result(aiter, converted["mxfp4-aiter"])


def test_compressed_tensors_comes_back_from_aiter_unchanged(converted: dict[str, Path], tmp_path: Path) -> None:
    aiter = to_layout(converted["mxfp4-compressed-tensors"], tmp_path / "aiter", "aiter")
    assert_same_result(aiter, converted["mxfp4-aiter"])
    back = to_layout(aiter, tmp_path / "back", "plain", "compressed-tensors")
    assert_same_result(back, converted["mxfp4-compressed-tensors"])


@pytest.mark.parametrize("shape", [(288, 320), (256, 64), (544, 192)], ids=str)
def test_padded_scales_survive_the_round_trip(tmp_path: Path, shape: tuple[int, int]) -> None:
    source = make_linear(tmp_path / "source", *shape)
    aiter = convert(source, tmp_path / "aiter", format="mxfp4", allow_unaligned_k=True)
    plain = to_layout(aiter, tmp_path / "plain", "plain")
    assert_same_result(to_layout(plain, tmp_path / "back", "aiter"), aiter)
    assert faults(plain, source) == []


@pytest.mark.parametrize("dialect", ["quark", "mxfp4", "compressed-tensors"])
def test_every_dialect_of_plain_passes_verify(converted: dict[str, Path], tmp_path: Path, dialect: str) -> None:
    plain = to_layout(converted["mxfp4-aiter"], tmp_path / "plain", "plain", dialect)
    assert read_manifest(plain).dialect == dialect
    assert faults(plain, FLUX_DIGITS) == []


def test_fp8_layers_of_a_mixed_checkpoint_stay_and_the_dialect_too(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rules]]\nmatch = "transformer_blocks.0.*"\nformat = "fp8"\n')
    aiter = convert(FLUX_DIGITS, tmp_path / "aiter", format="mxfp4", recipe=recipe)
    plain = to_layout(aiter, tmp_path / "plain", "plain")
    assert read_manifest(plain).dialect == "mxfp4"
    assert faults(plain, FLUX_DIGITS) == []
    assert read_files(to_layout(plain, tmp_path / "back", "aiter")) == read_files(aiter)


def test_every_component_of_a_pipeline_is_relaid(tmp_path: Path) -> None:
    output = convert_pipeline(tmp_path)
    plain = to_layout(output, tmp_path / "plain", "plain")
    assert faults(plain, tmp_path / "source") == []
    assert len(verify_output(plain, None, Silent())) == 2


def test_shapes_that_aiter_can_not_hold_are_refused(tmp_path: Path) -> None:
    output = convert(make_linear(tmp_path / "source", 256, 96), tmp_path / "output", format="mxfp4", layout="plain")
    with pytest.raises(FaultsError, match="N = 256, K = 96; layout aiter needs multiples of 32 and 64"):
        to_layout(output, tmp_path / "aiter", "aiter")
    assert not (tmp_path / "aiter").exists()


def test_relayout_to_the_same_layout_is_refused(converted: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is in layout aiter, dialect mxfp4 already"):
        to_layout(converted["mxfp4-aiter"], tmp_path / "aiter", "aiter")


def test_relayout_of_fp8_is_refused(converted: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no MXFP4 layer"):
        to_layout(converted["fp8-tensor"], tmp_path / "plain", "plain")


def test_a_dialect_that_can_not_say_the_layout_is_refused(converted: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dialect quark: can't say"):
        to_layout(converted["mxfp4-plain"], tmp_path / "aiter", "aiter", "quark")


# Both


def test_the_checkpoint_itself_is_refused_as_target(converted: dict[str, Path]) -> None:
    with pytest.raises(FaultsError, match="is the source"):
        to_plain(converted["fp8-tensor"], converted["fp8-tensor"])


def test_a_target_inside_the_checkpoint_is_refused(converted: dict[str, Path]) -> None:
    with pytest.raises(FaultsError, match="lies in the source"):
        to_plain(converted["fp8-tensor"], converted["fp8-tensor"] / "plain")


def test_a_target_that_is_not_empty_is_refused(converted: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").write_text("mine")
    with pytest.raises(FaultsError, match="is not empty"):
        to_plain(converted["fp8-tensor"], tmp_path / "plain")
    assert (tmp_path / "plain" / "file").read_text() == "mine"


@pytest.mark.parametrize("damage", [None, "a byte", "a file more", "a file less"])
def test_the_same_command_says_complete_of_the_same_bytes_alone(
    converted: dict[str, Path], tmp_path: Path, damage: str | None
) -> None:
    def write() -> bool:
        return relayout(converted["mxfp4-aiter"], tmp_path / "out", layout="plain", dialect=None, progress=Silent())

    assert write()
    path = min((tmp_path / "out").glob("*.safetensors"))
    if damage is None:
        assert not write()
        return
    if damage == "a byte":
        path.write_bytes(path.read_bytes()[:-1] + b"\x17")
    elif damage == "a file more":
        path.with_name("mine").write_text("precious")
    else:
        (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(FaultsError, match="is not empty"):
        write()


def test_an_empty_target_is_taken(converted: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert (to_plain(converted["fp8-tensor"], tmp_path / "plain") / "config.json").is_file()


def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(converted: dict[str, Path], tmp_path: Path) -> None:
    output = shutil.copytree(converted["mxfp4-aiter"], tmp_path / "copy")
    edit_tensor(output, "proj_out.weight", lambda data: data.__setitem__(0, data[0] ^ 1))
    with pytest.raises(FaultsError, match="BLAKE3"):
        to_layout(output, tmp_path / "plain", "plain")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_checkpoint_without_a_tensor_is_refused_by_name(converted: dict[str, Path], tmp_path: Path) -> None:
    output = shutil.copytree(converted["fp8-tensor"], tmp_path / "copy")
    shard = sorted(output.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    reseal(output)
    with pytest.raises(FaultsError, match=f"{shard.name}: truncated"):
        to_plain(output, tmp_path / "plain")


def test_a_failure_on_the_way_leaves_nothing(converted: dict[str, Path], tmp_path: Path) -> None:
    def write_layer(*_: object) -> None:
        raise OSError("disk full")

    def plan(checkpoint: Checkpoint) -> Rewrite:
        weights = [layer.tensors["weight"] for layer in checkpoint.manifest.layers.values()]
        return Rewrite(dict.fromkeys(weights, ()), dict.fromkeys(weights, write_layer), {"format": "pt"}, None)

    with pytest.raises(OSError, match="disk full"):
        rewrite(converted["fp8-tensor"], tmp_path / "plain", plan, Silent())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_thrown_away(converted: dict[str, Path], tmp_path: Path) -> None:
    with PartialFolder(tmp_path / "plain", "run-ckpt") as partial:
        (partial.path / "result").mkdir()
        (partial.path / "result" / "old").write_text("")
    folder = to_plain(converted["fp8-tensor"], tmp_path / "plain")
    assert not (folder / "old").exists()
    assert not (tmp_path / "plain.partial").exists()


def test_an_unfinished_conversion_of_the_same_name_is_not_touched(converted: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "plain.partial").mkdir()
    (tmp_path / "plain.partial" / "fingerprint.json").write_text("{}")
    with pytest.raises(CheckpointError, match="in the way and not ours"):
        to_plain(converted["fp8-tensor"], tmp_path / "plain")
    assert (tmp_path / "plain.partial" / "fingerprint.json").is_file()


def decode_with_codec(layer: Layer, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    weight, scale = stored[layer.tensors["weight"]], stored[layer.tensors["weight_scale"]]
    if layer.format == FP8:
        return dequantize_fp8(weight, scale)
    if layer.format == NVFP4:
        return dequantize_nvfp4(layer, stored)
    if layer.format == MXFP8:
        return dequantize_mxfp8(weight, scale)
    if layer.scheme == AITER_MXFP4:
        weight, scale = AITER_WEIGHT.unshuffle(weight), AITER_SCALE.unshuffle(scale)[: layer.N, : layer.K // 32]
    return dequantize_mxfp4(weight, scale)


def dequantize_nvfp4(layer: Layer, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    tensors = {role: stored[name] for role, name in layer.tensors.items()}
    return codec.dequantize(tensors[WEIGHT], tensors[WEIGHT_SCALE], PLAIN_NVFP4, codec.tensor_scale(tensors))


RELAID = [("aiter", "mxfp4"), ("plain", "mxfp4"), ("plain", "quark"), ("plain", "compressed-tensors")]


@pytest.mark.parametrize("name", ["qwen3-vl-moe", "t5"])
def test_a_relaid_language_model_is_for_whom_a_converted_one_is(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    if name in BUILDERS:
        save_experts(name, source)
    else:
        save(MODELS[name], MODELS[name].build(), str(source))
    made = {
        (layout, dialect): convert(
            source, tmp_path / f"{layout}-{dialect}", format="mxfp4", layout=layout, dialect=dialect
        )
        for layout, dialect in RELAID
    }
    for before, after in permutations(RELAID, 2):
        relaid = to_layout(made[before], tmp_path / "-".join([*before, *after]), *after)
        found, expected = read_manifest(relaid).targets, read_manifest(made[after]).targets
        assert {target: reason is None for target, reason in found.items()} == {
            target: reason is None for target, reason in expected.items()
        }, (before, after)


def convert_pipeline(folder: Path) -> Path:
    make_linear(folder / "source" / "transformer", 256, 256)
    make_linear(folder / "source" / "transformer_2", 512, 256)
    (folder / "source" / "model_index.json").write_text("{}")
    return convert(folder / "source", folder / "output", format="mxfp4")


def faults(output: Path, source: Path) -> list[str]:
    return [fault for report in verify_output(output, source, Silent()) for fault in report.faults]


def assert_same_result(actual: Path, expected: Path) -> None:
    """Assert that all is the same, but that ``actual`` may be right for fewer consumers: not all were asked."""
    assert {**read_files(actual), MANIFEST_NAME: b""} == {**read_files(expected), MANIFEST_NAME: b""}
    ours, theirs = read_manifest(actual), read_manifest(expected)
    assert replace(ours, targets={}) == replace(theirs, targets={})
    assert {name for name, reason in ours.targets.items() if reason is None} <= {
        name for name, reason in theirs.targets.items() if reason is None
    }


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_bits_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
