"""verify passes on what convert-ckpt writes, and names every single thing that can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from run_ckpt.cli.main import run_ckpt
from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.manifest import MANIFEST_NAME, sqnr_db
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest, result_hash
from run_ckpt.storage.threads import map_threads
from run_ckpt.tools.verify.component import ComponentReport, verdict, verify_output
from tests.codec import dequantize_mxfp4
from tests.converted import (
    FLUX_DIGITS,
    LINEAR,
    SCHEMES,
    convert,
    edit_json,
    edit_manifest,
    edit_tensor,
    make_linear,
    reseal,
)
from tests.models import MODELS, save

Q = "transformer_blocks.0.attn.to_q"
K = "transformer_blocks.0.attn.to_k"
FIRST_SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """flux-digits in every scheme, and a linear layer [288, 320] whose scales have padding in both directions."""
    root = tmp_path_factory.mktemp("converted")
    folders = {scheme: convert(FLUX_DIGITS, root / scheme, **options) for scheme, options in SCHEMES.items()}
    make_linear(root / "linear", 288, 320)
    folders["padded"] = convert(root / "linear", root / "padded", format="mxfp4", allow_unaligned_k=True)
    return folders


@pytest.fixture
def copy_of(converted: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that gives a converted checkpoint to tamper with."""
    return lambda scheme: shutil.copytree(converted[scheme], tmp_path / "copy")


def check(output: Path, source: Path | None = None) -> list[str]:
    return [fault for report in verify_output(output, source, Silent()) for fault in report.faults]


def the_fault(output: Path, source: Path | None = None) -> str:
    """Return the only fault; anything but exactly one fails."""
    faults = check(output, source)
    assert len(faults) == 1, faults
    return faults[0]


# What verify accepts


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_passes_without_source(converted: dict[str, Path], scheme: str) -> None:
    assert check(converted[scheme]) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_passes_against_its_source(converted: dict[str, Path], scheme: str) -> None:
    (report,) = verify_output(converted[scheme], FLUX_DIGITS, Silent())
    assert report.faults == ()
    assert len(report.measured) == report.n_layers == 23


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_sources_of_every_dtype_are_compared_by_their_own_values(
    tmp_path: Path, scheme: str, dtype: torch.dtype
) -> None:
    if scheme == "fp8-channel":
        pytest.skip("the rowwise dialect is for diffusers models")
    source = make_linear(tmp_path / "source", 288, 320, dtype)
    if scheme == "fp8-block":  # partial blocks are for diffusers naming only, which is assumed without a config
        (source / "config.json").unlink()
    output = convert(source, tmp_path / "output", allow_unaligned_k=True, **SCHEMES[scheme])
    assert check(output, source) == []


@pytest.mark.parametrize("scale_rule", ["even", "floor", "roundup", "mse"])
def test_every_scale_rule_passes(tmp_path: Path, scale_rule: str) -> None:
    output = convert(FLUX_DIGITS, tmp_path / "output", format="mxfp4", scale_rule=scale_rule)
    assert check(output, FLUX_DIGITS) == []


def test_static_fp8_passes(tmp_path: Path) -> None:
    output = convert_static(tmp_path)
    assert check(output, FLUX_DIGITS) == []


def test_single_file_source_passes(tmp_path: Path) -> None:
    file = make_linear(tmp_path / "source", 256, 256) / "model.safetensors"
    assert check(convert(file, tmp_path / "output", format="mxfp4"), file) == []


def test_every_component_of_a_pipeline_is_verified(tmp_path: Path) -> None:
    output, source = convert_pipeline(tmp_path)
    assert [report.name for report in verify_output(output, source, Silent())] == ["transformer", "transformer_2"]
    assert check(output, source) == []


def test_a_fault_in_one_component_is_found(tmp_path: Path) -> None:
    output, source = convert_pipeline(tmp_path)
    edit_tensor(output / "transformer_2", f"{LINEAR}.weight", lambda data: data.__setitem__(0, data[0] ^ 1))
    reports = verify_output(output, source, Silent())
    assert [bool(report.faults) for report in reports] == [False, True]


def test_fused_scales_of_z_image_pass(z_image: Path) -> None:
    assert len(read_manifest(z_image).fused_scales) > 0
    assert check(z_image) == []


@pytest.mark.parametrize(
    ("squared_signal", "squared_error", "expected"),
    [
        (100.0, 1.0, 20.0),
        (1.0, 2.0, -3.01),
        (0.0, 0.0, None),
        (1.0, 0.0, None),
        (1.0, float("inf"), float("-inf")),
        (1.0, float("nan"), float("-inf")),
    ],
)
def test_sqnr_is_ten_times_the_log_of_signal_by_error(
    squared_signal: float, squared_error: float, expected: float | None
) -> None:
    assert sqnr_db(squared_signal, squared_error) == expected


def test_measured_sqnr_is_that_of_the_reference_codec(converted: dict[str, Path]) -> None:
    (report,) = verify_output(converted["mxfp4-plain"], FLUX_DIGITS, Silent())
    measured = next(measured for measured in report.measured if measured.layer.module == Q)
    weight = load_all(FLUX_DIGITS)[f"{Q}.weight"].double()
    stored = load_all(converted["mxfp4-plain"])
    decoded = dequantize_mxfp4(stored[f"{Q}.weight"], stored[f"{Q}.weight_quantizer.scale"]).double()
    expected = 10 * torch.log10(weight.square().sum() / (weight - decoded).square().sum())
    assert measured.sqnr_db == round(float(expected), 2)
    assert measured.max_abs_error == float((weight - decoded).abs().max())


# Files


@pytest.mark.parametrize("file", [FIRST_SHARD, "config.json", INDEX])
def test_one_changed_byte_in_any_file_is_found(copy_of: Callable[[str], Path], file: str) -> None:
    output = copy_of("mxfp4-aiter")
    data = bytearray((output / file).read_bytes())
    data[-3] ^= 0x20
    (output / file).write_bytes(data)
    assert any(f"{file}: BLAKE3" in fault for fault in check(output))


def test_one_changed_byte_in_a_header_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("mxfp4-aiter")
    data = bytearray((output / FIRST_SHARD).read_bytes())
    data[20] ^= 1
    (output / FIRST_SHARD).write_bytes(data)
    assert any(f"{FIRST_SHARD}: BLAKE3" in fault for fault in check(output))


def test_a_truncated_shard_is_found_with_its_sizes(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("fp8-tensor")
    data = (output / FIRST_SHARD).read_bytes()
    (output / FIRST_SHARD).write_bytes(data[:-1])
    faults = check(output)
    assert any(f"{len(data) - 1:,} bytes, the manifest says {len(data):,}" in fault for fault in faults)
    assert any("truncated" in fault for fault in faults)


@pytest.mark.parametrize("file", [FIRST_SHARD, "config.json", INDEX])
def test_a_missing_file_is_found(copy_of: Callable[[str], Path], file: str) -> None:
    output = copy_of("fp8-tensor")
    (output / file).unlink()
    assert any(f"{file}: missing" in fault for fault in check(output))


def test_an_unlisted_file_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("fp8-tensor")
    (output / "adapter.safetensors").write_bytes(b"")
    assert "adapter.safetensors: not listed" in the_fault(output)


def test_hidden_files_of_hub_downloads_are_accepted(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("fp8-tensor")
    (output / ".gitattributes").write_text("")
    assert check(output) == []


# Headers


def test_a_tensor_too_many_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("padded")
    rewrite_single(output, lambda tensors: tensors.update(extra=torch.zeros(2)))
    assert "extra: not in the manifest" in the_fault(output)


def test_a_missing_scale_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("padded")
    rewrite_single(output, lambda tensors: tensors.pop(f"{LINEAR}.weight_scale"))
    assert f"{LINEAR}.weight_scale: the manifest lists it" in the_fault(output)


def test_a_wrong_dtype_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("padded")
    rewrite_single(output, lambda tensors: tensors.update({"model.norm.weight": torch.ones(320)}))
    assert "is F32 [320], the manifest says BF16 [320]" in the_fault(output)


def test_other_header_metadata_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("padded")
    rewrite_single(output, lambda tensors: None, metadata={"format": "tf"})
    assert "__metadata__ is {'format': 'tf'}" in the_fault(output)


def test_a_scale_in_another_shard_than_its_weight_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("fp8-tensor")
    first, second = sorted(output.glob("*.safetensors"))
    name = f"{Q}.weight_scale"
    tensors, others = load_file(first), load_file(second)
    holder, other = (tensors, others) if name in tensors else (others, tensors)
    other[name] = holder.pop(name)
    save_file(tensors, first, metadata={"format": "pt"})
    save_file(others, second, metadata={"format": "pt"})
    where = dict.fromkeys(tensors, first.name) | dict.fromkeys(others, second.name)
    edit_json(output / INDEX, lambda index: index.update(weight_map=where))
    reseal(output)
    assert f"{name}: in" in the_fault(output)


# Scales and codes; the manifest's hashes are made to agree, so that nothing else gives them away


def test_padding_that_is_not_zero_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("padded")
    edit_tensor(output, f"{LINEAR}.weight_scale", lambda data: data.__setitem__(-1, 0x7F))
    reseal(output)
    assert "padding is not 0x00" in the_fault(output)


@pytest.mark.parametrize("scheme", ["mxfp4-aiter", "mxfp4-plain", "mxfp4-compressed-tensors"])
def test_a_nan_scale_code_is_found(copy_of: Callable[[str], Path], scheme: str) -> None:
    output = copy_of(scheme)
    edit_tensor(output, read_manifest(output).layers[Q].tensors["weight_scale"], lambda data: data.__setitem__(7, 255))
    reseal(output)
    assert "holds code 255 (NaN)" in the_fault(output)


@pytest.mark.parametrize("code", [0x7F, 0xFF], ids=hex)
@pytest.mark.parametrize("scheme", ["fp8-tensor", "fp8-channel", "fp8-block"])
def test_a_nan_code_in_an_fp8_weight_is_found(copy_of: Callable[[str], Path], scheme: str, code: int) -> None:
    output = copy_of(scheme)
    edit_tensor(output, f"{Q}.weight", lambda data: data.__setitem__(256 * 3 + 5, code))
    reseal(output)
    assert "1 NaN codes, the first at [3, 5]" in the_fault(output)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("scheme", ["fp8-tensor", "fp8-channel", "fp8-block"])
def test_an_impossible_fp8_scale_is_found(copy_of: Callable[[str], Path], scheme: str, value: float) -> None:
    output = copy_of(scheme)
    name = read_manifest(output).layers[Q].tensors["weight_scale"]
    edit_tensor(output, name, lambda data: set_float(data, value))
    reseal(output)
    assert any(f"{name}[0" in fault and "not finite and above 0" in fault for fault in check(output))


def test_different_scales_within_a_fused_group_are_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("fp8-tensor")
    edit_tensor(output, f"{K}.weight_scale", lambda data: set_float(data, 0.5))
    reseal(output)
    assert "its members need one weight_scale" in the_fault(output)


def test_different_input_scales_within_a_fused_group_are_found(tmp_path: Path) -> None:
    output = convert_static(tmp_path)
    edit_tensor(output, f"{K}.input_scale", lambda data: set_float(data, 0.5))
    reseal(output)
    assert "its members need one input_scale" in the_fault(output)


def test_a_fused_scale_that_does_not_repeat_its_members_is_found(z_image: Path, tmp_path: Path) -> None:
    output = shutil.copytree(z_image, tmp_path / "copy")
    name = sorted(read_manifest(output).fused_scales)[0]
    edit_tensor(output, name, lambda data: set_float(data, 0.5))
    reseal(output)
    assert f"{name}: does not repeat the weight_scale of" in the_fault(output)


# config.json and index


def test_a_config_without_its_declaration_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("mxfp4-aiter")
    edit_json(output / "config.json", lambda config: config.pop("quantization_config"))
    reseal(output)
    assert "config.json: has no quantization_config" in the_fault(output)


def test_a_changed_declaration_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("mxfp4-aiter")
    edit_json(output / "config.json", lambda config: config["quantization_config"].update(layout="plain"))
    reseal(output)
    assert "layout is 'plain', the manifest implies 'aiter'" in the_fault(output)


def test_a_declaration_in_the_rowwise_dialect_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("fp8-channel")
    edit_json(output / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    reseal(output)
    assert "the rowwise dialect has none" in the_fault(output)


def test_a_wrong_total_size_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("mxfp4-aiter")
    edit_json(output / INDEX, lambda index: index["metadata"].update(total_size=1))
    reseal(output)
    assert "metadata is {'total_size': 1}" in the_fault(output)


def test_an_index_that_forgets_a_tensor_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("mxfp4-aiter")
    edit_json(output / INDEX, lambda index: index["weight_map"].pop(f"{Q}.weight"))
    reseal(output)
    assert f"{Q}.weight" in the_fault(output)


def test_an_index_under_another_name_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("mxfp4-aiter")
    (output / INDEX).rename(output / "model.safetensors.index.json")
    assert any("model.safetensors.index.json: is the index here" in fault for fault in check(output))


def test_shards_without_an_index_are_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("mxfp4-aiter")
    (output / INDEX).unlink()
    edit_manifest(output, lambda manifest: manifest["files"].pop(INDEX))
    assert "2 shards but no" in the_fault(output)


# The manifest itself

MANIFEST_EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown schema version": (lambda m: m.update(schema_version=99), "schema version 99"),
    "schema version of SHA-256": (
        lambda m: m.update(schema_version=1),
        "schema version 1; this version reads 3. Convert the source again with this version, or use the version",
    ),
    "unknown dialect": (lambda m: m["recipe"].update(dialect="klingon"), "dialect 'klingon' is unknown"),
    "other dialect": (lambda m: m["recipe"].update(dialect="quark"), "can't say --format mxfp4 --layout aiter"),
    "no recipe": (lambda m: m.update(recipe={}), "the recipe lacks"),
    "unknown tie rule": (lambda m: m["layers"][Q].update(tie_rule="half_up"), "['tie_rule'] hold values"),
    "other K": (lambda m: m["layers"][Q].update(K=512), "scale_shape is [256, 8], it should be [256, 16]"),
    "K no number": (lambda m: m["layers"][Q].update(K="256"), "no sizes"),
    "N not a multiple of the tile": (lambda m: m["layers"][Q].update(N=250), "not a multiple of [32, 64]"),
    "renamed tensor": (lambda m: m["layers"][Q]["tensors"].update(weight="w"), "the mxfp4 dialect names them"),
    "unknown source dtype": (lambda m: m["layers"][Q].update(source_dtype="I8"), "source_dtype 'I8'"),
    "no layers": (lambda m: m["layers"].clear(), "lists no quantized layer"),
    "missing section": (lambda m: m.pop("kept"), "KeyError: 'kept'"),
    "path out of the folder": (lambda m: m["files"].update({"../x": {"nbytes": 0, "blake3": ""}}), "'../x' is not"),
    "file without a hash": (lambda m: m["files"]["config.json"].pop("blake3"), "needs nbytes and blake3"),
    "source without files": (lambda m: m["source"].pop("files"), "source.files is missing"),
}


@pytest.mark.parametrize("edit", MANIFEST_EDITS)
def test_a_manifest_that_contradicts_itself_is_refused(copy_of: Callable[[str], Path], edit: str) -> None:
    output = copy_of("mxfp4-aiter")
    change, expected = MANIFEST_EDITS[edit]
    edit_manifest(output, change)
    assert any(expected in fault for fault in check(output)), check(output)


def test_a_manifest_that_is_no_json_is_refused(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("mxfp4-aiter")
    (output / "quantization_manifest.json").write_text("{")
    assert "damaged" in the_fault(output)


# Against the source


@pytest.mark.parametrize("scheme", SCHEMES)
def test_changed_codes_are_found_by_decoding(copy_of: Callable[[str], Path], scheme: str) -> None:
    output = copy_of(scheme)
    name = read_manifest(output).layers[Q].tensors["weight"]
    edit_tensor(output, name, lambda data: data.__setitem__(slice(0, 64), bytes(b ^ 0x80 for b in data[:64])))
    reseal(output)
    assert check(output) == []
    assert any(f"{Q}: SQNR is" in fault for fault in check(output, FLUX_DIGITS))


def test_exchanged_scales_are_found_by_decoding(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("mxfp4-aiter")
    scales = {name: load_all(output)[f"{name}.weight_scale"].numpy().tobytes() for name in (Q, K)}
    edit_tensor(output, f"{Q}.weight_scale", lambda data: data.__setitem__(slice(None), scales[K]))
    edit_tensor(output, f"{K}.weight_scale", lambda data: data.__setitem__(slice(None), scales[Q]))
    reseal(output)
    faults = check(output, FLUX_DIGITS)
    assert any(f"{Q}: SQNR" in fault for fault in faults)
    assert any(f"{K}: SQNR" in fault for fault in faults)


@pytest.mark.parametrize(
    ("key", "expected"), [("sqnr_db", "SQNR is"), ("max_abs_error", "the largest error is")], ids=["sqnr", "error"]
)
def test_an_edited_measurement_is_found(copy_of: Callable[[str], Path], key: str, expected: str) -> None:
    output = copy_of("mxfp4-aiter")
    edit_manifest(output, lambda m: m["layers"][Q].update({key: m["layers"][Q][key] + 0.02}))
    assert f"{Q}: {expected}" in the_fault(output, FLUX_DIGITS)


def test_a_changed_bit_in_a_copied_tensor_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("mxfp4-aiter")
    edit_tensor(output, "proj_out.weight", lambda data: data.__setitem__(9, data[9] ^ 1))
    reseal(output)
    assert "proj_out.weight: differs from the source from byte 9 on" in the_fault(output, FLUX_DIGITS)


def test_a_changed_source_is_found(converted: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(FLUX_DIGITS, tmp_path / "source")
    edit_tensor(source, "proj_out.bias", lambda data: data.__setitem__(0, data[0] ^ 1))
    faults = check(converted["mxfp4-aiter"], source)
    assert any(fault.startswith("source ") and "BLAKE3" in fault for fault in faults)
    assert any("proj_out.bias: differs from the source" in fault for fault in faults)


def test_another_source_is_found(converted: dict[str, Path], tmp_path: Path) -> None:
    source = make_linear(tmp_path / "source", 256, 256)
    faults = check(converted["mxfp4-aiter"], source)
    assert any("the checkpoint was not made from it" in fault for fault in faults)


def test_a_source_of_another_model_is_one_fault_and_nothing_is_compared(
    converted: dict[str, Path], tmp_path: Path
) -> None:
    (report,) = verify_output(converted["mxfp4-aiter"], make_linear(tmp_path / "source", 256, 256), Silent())
    assert report.measured == ()
    assert report.faults == (
        "source source: the checkpoint was not made from it: 90 of 90 tensors are not in it, such as"
        " context_embedder.bias. Give the SOURCE it was made from, flux-digits.",
    )


def test_a_fine_tune_of_the_source_is_one_fault(converted: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(FLUX_DIGITS, tmp_path / "tuned")
    for name in (f"{Q}.weight", "single_transformer_blocks.2.proj_out.weight"):  # one in each shard
        edit_tensor(source, name, lambda data: data.__setitem__(0, data[0] ^ 1))
    (report,) = verify_output(converted["mxfp4-aiter"], source, Silent())
    assert report.measured == ()
    assert "no shard has the BLAKE3" in " ".join(report.faults)
    assert len(report.faults) == 1


@pytest.mark.parametrize("source", [None, FLUX_DIGITS], ids=["manifest", "source"])
def test_layers_under_the_sqnr_that_is_asked_for_are_faults(converted: dict[str, Path], source: Path | None) -> None:
    output = converted["mxfp4-aiter"]
    layers = read_manifest(output).layers.values()
    limit = 19.2
    (report,) = verify_output(output, source, Silent(), min_sqnr_db=limit)
    weak = sorted(layer.module for layer in layers if (layer.sqnr_db or 0) < limit)
    assert 0 < len(weak) < len(layers)
    assert sorted(fault.partition(":")[0] for fault in report.faults) == weak
    (report,) = verify_output(output, source, Silent(), min_sqnr_db=18)
    assert report.faults == ()


def test_the_command_prints_json_and_exits_1_below_the_limit(converted: dict[str, Path]) -> None:
    arguments = ["verify", str(converted["mxfp4-aiter"]), "--source", str(FLUX_DIGITS), "--json"]
    done = CliRunner().invoke(run_ckpt, arguments)
    assert done.exit_code == 0
    (component,) = json.loads(done.stdout)["components"]
    assert len(component["layers"]) == 23
    assert all(layer["sqnr_db"] == layer["stated_sqnr_db"] for layer in component["layers"])
    done = CliRunner().invoke(run_ckpt, [*arguments, "--min-sqnr", "30"])
    assert done.exit_code == 1
    (component,) = json.loads(done.stdout)["components"]
    assert len(component["faults"]) == 23


def test_a_config_key_that_differs_from_the_source_is_found(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("mxfp4-aiter")
    edit_json(output / "config.json", lambda config: config.update(num_layers=2))
    reseal(output)
    assert "['num_layers'] differ from the source's" in the_fault(output, FLUX_DIGITS)


def test_a_side_file_that_differs_from_the_source_is_found(tmp_path: Path) -> None:
    source = make_linear(tmp_path / "source", 256, 256)
    output = convert(source, tmp_path / "output", format="fp8")
    (output / "generation_config.json").write_text('{"a": 1}')
    reseal(output)
    assert "generation_config.json: differs from the source's" in the_fault(output, source)


def test_all_faults_are_listed_together(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("fp8-tensor")
    (output / "extra").write_text("")
    edit_json(output / "config.json", lambda config: config.pop("quantization_config"))
    edit_tensor(output, f"{Q}.weight", lambda data: data.__setitem__(0, 0x7F))
    edit_manifest(output, lambda m: m["layers"][K].update(max_abs_error=1.0))
    (report,) = verify_output(output, FLUX_DIGITS, Silent())
    for expected in ("extra: not listed", "has no quantization_config", "NaN codes", f"{K}: the largest", "BLAKE3"):
        assert any(expected in fault for fault in report.faults), expected
    assert verdict([report]) == f"{len(report.faults)} faults found: do not use this checkpoint."


def test_verify_leaves_torch_threads_as_they_were(converted: dict[str, Path]) -> None:
    before = torch.get_num_threads()
    check(converted["fp8-tensor"])
    assert torch.get_num_threads() == before


def test_verdict_says_what_was_verified(converted: dict[str, Path]) -> None:
    reports: list[ComponentReport] = verify_output(converted["mxfp4-aiter"], None, Silent())
    n_files = len(read_manifest(converted["mxfp4-aiter"]).files)
    assert verdict(reports) == (
        f"Verified 23 quantized and 67 copied tensors in {n_files} files against the manifest: no fault."
    )


@pytest.fixture(scope="session")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Z-Image in FP8: the model whose fused scales are on disk too."""
    root = tmp_path_factory.mktemp("z-image")
    case = MODELS["z-image"]
    save(case, case.build(), str(root / "source"))
    return convert(root / "source", root / "output", format="fp8")


def convert_static(folder: Path) -> Path:
    """Convert flux-digits to static FP8, with made-up activation ranges."""
    modules = read_manifest(convert(FLUX_DIGITS, folder / "dynamic", format="fp8")).layers
    calibration = folder / "calibration.safetensors"
    save_file({f"{name}.input_amax": torch.tensor([2.0 + i]) for i, name in enumerate(modules)}, calibration)
    return convert(FLUX_DIGITS, folder / "static", format="fp8", calibration=calibration)


def convert_pipeline(folder: Path) -> tuple[Path, Path]:
    """Return output and source of a pipeline with two transformers."""
    make_linear(folder / "source" / "transformer", 256, 256)
    make_linear(folder / "source" / "transformer_2", 512, 256)
    (folder / "source" / "model_index.json").write_text("{}")
    return convert(folder / "source", folder / "output", format="mxfp4"), folder / "source"


def rewrite_single(output: Path, edit: Callable[[dict[str, torch.Tensor]], object], **metadata: Any) -> None:
    """Change the tensors of a single-file checkpoint, and seal it again."""
    path = output / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, **(metadata or {"metadata": {"format": "pt"}}))
    reseal(output)


def set_float(data: bytearray, value: float) -> None:
    data[:4] = torch.tensor([value]).numpy().tobytes()


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_a_result_is_told_from_another_by_its_hash(copy_of: Callable[[str], Path]) -> None:
    output = copy_of("mxfp4-aiter")
    stated = result_hash({"": output})
    manifest = blake3((output / MANIFEST_NAME).read_bytes()).hexdigest()
    assert stated == blake3(f" {manifest}\n".encode()).hexdigest()
    assert all(not report.faults for report in verify_output(output, None, Silent(), expected=stated))
    for other in ("0" * 64, "", stated[:-1]):
        with pytest.raises(CheckpointError, match=f"its hash is {stated}, expected is {other}"):
            verify_output(output, None, Silent(), expected=other)
    edit_manifest(output, lambda document: document["recipe"].update(preset="other"))
    assert all(not report.faults for report in verify_output(output, None, Silent()))  # sealed anew, it is sound
    with pytest.raises(CheckpointError, match=f"expected is {stated}"):
        verify_output(output, None, Silent(), expected=stated)


def test_the_hash_of_a_pipeline_covers_each_component(tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST_NAME).write_text(name)
    hashes = [blake3(name.encode()).hexdigest() for name in ("transformer", "transformer_2")]
    expected = blake3(f"transformer {hashes[0]}\ntransformer_2 {hashes[1]}\n".encode()).hexdigest()
    assert result_hash({name: tmp_path / name for name in ("transformer_2", "transformer")}) == expected


def test_threads_return_in_order_and_take_nothing_more_after_an_error() -> None:
    taken: list[int] = []

    def double(number: int) -> int:
        taken.append(number)
        if number == 3:
            raise ValueError("three")
        return 2 * number

    assert map_threads(double, [1, 5, 2]) == [2, 10, 4]
    taken.clear()
    with pytest.raises(ValueError, match="three"):
        map_threads(double, [3] * 100_000)
    assert len(taken) < 1000
