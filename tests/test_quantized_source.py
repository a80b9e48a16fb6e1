"""Sources that are quantized already: decoded exactly and quantized anew, or their codes passed through."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from run_ckpt.contract.errors import CheckpointError, FaultsError, NonFiniteError, UsageError
from run_ckpt.contract.formats import AITER_MXFP4
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from run_ckpt.progress import Silent
from run_ckpt.storage.components import open_checkpoint
from run_ckpt.storage.foreign import open_foreign
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.storage.rows import decode_rows, read_codes
from run_ckpt.tools.publish.card import make_card
from run_ckpt.tools.publish.rows import read_result
from run_ckpt.tools.summary import inspect_component
from run_ckpt.tools.verify.component import verify_output
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, folder_bytes, load_all, save_checkpoint
from tests.converted import FLUX_DIGITS, SCHEMES
from tests.foreign import CONFIG, FOREIGN, MODULES, write_foreign
from tests.hub_fixtures import convert_remote, hub
from tests.hub_server import HubServer, read_files

__all__ = ["hub"]

TARGETS: dict[str, dict[str, str]] = {
    "mxfp4": {"format": "mxfp4", "layout": "aiter"},
    "nvfp4": {"format": "nvfp4"},
    "mxfp8": {"format": "mxfp8"},
    "fp8-tensor": {"format": "fp8", "granularity": "tensor"},
    "fp8-channel": {"format": "fp8", "granularity": "channel"},
    "fp8-block": {"format": "fp8", "granularity": "block"},
}
# What a tool's format is called among the targets, where it is one.
SAME = {
    "modelopt-fp8": "fp8-tensor",
    "fp8-tensor": "fp8-tensor",
    "quark-fp8": "fp8-tensor",
    "modelopt-fp8-channel": "fp8-channel",
    "fbgemm": "fp8-channel",
    "compressed-fp8-channel": "fp8-channel",
    "fp8-block": "fp8-block",
    "modelopt-nvfp4": "nvfp4",
    "compressed-nvfp4": "nvfp4",
    "modelopt-mxfp8": "mxfp8",
    "modelopt-mxfp4": "mxfp4",
    "compressed-mxfp4": "mxfp4",
    "quark-mxfp4": "mxfp4",
    "quark-mxfp4-diffusers": "mxfp4",
}


def faults(output: Path, source: Path) -> list[str]:
    return [fault for report in verify_output(output, source, Silent()) for fault in report.faults]


def decoded(output: Path) -> dict[str, Tensor]:
    with open_checkpoint(output) as checkpoint:
        layers = checkpoint.manifest.layers.values()
        return {layer.source_tensor: decode_rows(checkpoint.reader, layer, 0, layer.N) for layer in layers}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FOREIGN)
def test_quantized_anew_it_is_what_its_weights_in_float32_become(tmp_path: Path, name: str, target: str) -> None:
    if SAME[name] == target:
        pytest.skip("passed through")
    source, weights = write_foreign(tmp_path / "source", name)
    plain = save_checkpoint(tmp_path / "plain", [weights], dict(CONFIG))
    convert(source, tmp_path / "out", **TARGETS[target])
    convert(plain, tmp_path / "expected", **TARGETS[target])
    output, expected = load_all(tmp_path / "out"), load_all(tmp_path / "expected")
    assert output.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_bits_equal(output[key].view(torch.uint8), tensor.view(torch.uint8))
    measured, wanted = (read_manifest(tmp_path / folder).layers for folder in ("out", "expected"))
    for module, layer in measured.items():
        assert (layer.sqnr_db, layer.max_abs_error) == (wanted[module].sqnr_db, wanted[module].max_abs_error)
    assert faults(tmp_path / "out", source) == []


@pytest.mark.parametrize("name", FOREIGN)
def test_codes_of_the_same_format_are_passed_through(tmp_path: Path, name: str) -> None:
    source, weights = write_foreign(tmp_path / "source", name)
    convert(source, tmp_path / "out", **TARGETS[SAME[name]])
    values = decoded(tmp_path / "out")
    assert {f"{module}.weight" for module in MODULES} == values.keys()
    for key, value in values.items():
        assert_bits_equal(value, weights[key])
    with open_checkpoint(tmp_path / "out") as ours, open_foreign(source) as theirs:
        for module, layer in ours.manifest.layers.items():
            codes = read_codes(theirs.reader, theirs.manifest.layers[module], 0, layer.N)
            assert_bits_equal(read_codes(ours.reader, layer, 0, layer.N), codes)
            assert (layer.sqnr_db, layer.max_abs_error) == (None, 0.0)
        counts = ours.manifest.source["quantized"]["weights"]
    assert list(counts.values()) == [len(MODULES)]
    assert next(iter(counts)).endswith("passed through")
    assert faults(tmp_path / "out", source) == []


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "fp8-block", "quark-mxfp4"])
def test_a_layer_that_is_kept_is_decoded_to_the_models_dtype(tmp_path: Path, name: str) -> None:
    source, weights = write_foreign(tmp_path / "source", name)
    convert(source, tmp_path / "out", format="mxfp8", ignore=("*.down_proj",))
    key = "model.layers.0.mlp.down_proj.weight"
    assert_bits_equal(load_all(tmp_path / "out")[key], weights[key].bfloat16())
    assert "decoded from" in read_manifest(tmp_path / "out").kept[key].reason
    assert faults(tmp_path / "out", source) == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_results_of_our_own_are_sources_too(tmp_path: Path, scheme: str) -> None:
    convert(FLUX_DIGITS, tmp_path / "first", **SCHEMES[scheme])
    convert(tmp_path / "first", tmp_path / "again", **SCHEMES[scheme])
    first, again = load_all(tmp_path / "first"), load_all(tmp_path / "again")
    assert again.keys() == first.keys()
    for name, tensor in first.items():
        assert_bits_equal(again[name].view(torch.uint8), tensor.view(torch.uint8))
    assert (tmp_path / "again" / "config.json").exists()
    assert faults(tmp_path / "again", tmp_path / "first") == []


def test_pre_shuffled_codes_are_put_in_another_order(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "aiter", format="mxfp4", layout="aiter")
    convert(tmp_path / "aiter", tmp_path / "plain", format="mxfp4", layout="plain")
    shuffled, plain = load_all(tmp_path / "aiter"), load_all(tmp_path / "plain")
    layers = read_manifest(tmp_path / "aiter").layers
    assert {layer.scheme for layer in layers.values()} == {AITER_MXFP4}
    ours = read_manifest(tmp_path / "plain").layers
    for module, layer in layers.items():
        codes = AITER_WEIGHT.unshuffle(shuffled[layer.tensors["weight"]])
        assert_bits_equal(plain[ours[module].tensors["weight"]], codes)
        scales = AITER_SCALE.unshuffle(shuffled[layer.tensors["weight_scale"]])[: layer.N, : layer.K // 32]
        assert_bits_equal(plain[ours[module].tensors["weight_scale"]], scales)


def test_any_number_of_workers_writes_the_same_files(tmp_path: Path) -> None:
    source, _ = write_foreign(tmp_path / "source", "modelopt-nvfp4")
    for n_workers in (1, 4):
        convert(source, tmp_path / str(n_workers), n_workers, format="fp8")
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "4")


def test_the_manifest_and_the_config_say_what_the_source_was(tmp_path: Path) -> None:
    source, _ = write_foreign(tmp_path / "source", "modelopt-nvfp4")
    (source / "hf_quant_config.json").write_text("{}")
    convert(source, tmp_path / "out", format="mxfp4")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.source["quantized"] == {"by": "modelopt", "weights": {"nvfp4 requantized": len(MODULES)}}
    assert manifest.source_quantization == "quantized already by modelopt; its weights: 4 nvfp4 requantized"
    assert inspect_component("", tmp_path / "out", every_layer=False).summary.source_quantization is not None
    card = make_card(read_result(tmp_path / "out"), "me/model")
    assert "The source was quantized already by modelopt; its weights: 4 nvfp4 requantized." in card
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert manifest.source["files"].keys() == {path.name for path in source.glob("*.safetensors")}


def test_a_changed_code_of_the_source_is_found_by_verify(tmp_path: Path) -> None:
    source, _ = write_foreign(tmp_path / "source", "quark-mxfp4")
    convert(source, tmp_path / "out", format="fp8")
    path = min(source.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert any("BLAKE3" in fault for fault in faults(tmp_path / "out", source))


@pytest.mark.parametrize("target", ["fp8-tensor", "mxfp4"])
def test_a_code_that_is_no_number_is_refused(tmp_path: Path, target: str) -> None:
    weight = torch.zeros(256, 256).to(torch.float8_e4m3fn)
    weight.view(torch.uint8)[3, 5] = 0x7F
    tensors = {"model.layers.0.mlp.down_proj.weight": weight}
    tensors["model.layers.0.mlp.down_proj.weight_scale"] = torch.ones(1)
    config = {**CONFIG, "quantization_config": {"quant_method": "fp8"}}
    source = save_checkpoint(tmp_path / "source", [tensors], config)
    with pytest.raises(NonFiniteError, match=r"down_proj\.weight\[3, 5\] is nan"):
        convert(source, tmp_path / "out", **TARGETS[target])
    assert not (tmp_path / "out").exists()


def edit_source(source: Path, edit: dict[str, Tensor]) -> None:
    """Replace tensors of a source's first shard."""
    path = min(source.glob("*.safetensors"))
    save_file({**load_file(path), **edit}, path, {"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"
NO_SECOND_SCALES = [("modelopt-nvfp4", "weight_scale_2", value) for value in (0.0, -1.0, float("inf"))]


def test_a_block_of_another_tool_may_be_zero_by_its_scale(tmp_path: Path) -> None:
    source, weights = write_foreign(tmp_path / "source", "modelopt-nvfp4")
    scale = load_file(min(source.glob("*.safetensors")))[f"{Q}.weight_scale"]
    scale[3, 5] = 0
    edit_source(source, {f"{Q}.weight_scale": scale})
    convert(source, tmp_path / "out", format="nvfp4")
    assert faults(tmp_path / "out", source) == []
    values = decoded(tmp_path / "out")[f"{Q}.weight"]
    assert not values[3, 80:96].any()
    assert torch.equal(values[4], weights[f"{Q}.weight"][4])


@pytest.mark.parametrize(("name", "role", "value"), [("modelopt-fp8", "weight_scale", -1.0), *NO_SECOND_SCALES])
def test_scales_that_verify_rejects_are_not_passed_through(tmp_path: Path, name: str, role: str, value: float) -> None:
    source, _ = write_foreign(tmp_path / "source", name)
    edit_source(source, {f"{module}.{role}": torch.tensor(value) for module in MODULES if "self_attn" in module})
    with pytest.raises(CheckpointError, match="a scale of its codes is not above 0"):
        convert(source, tmp_path / "out", format=name.partition("-")[2])
    assert not (tmp_path / "out").exists()


def test_layers_that_a_consumer_multiplies_by_one_scale_need_one(tmp_path: Path) -> None:
    source, _ = write_foreign(tmp_path / "source", "modelopt-nvfp4")
    edit_source(source, {f"{Q}.weight_scale_2": torch.tensor(2e-5)})
    with pytest.raises(FaultsError, match=r"q_proj\+.*different scales of the whole tensor.*run-ckpt dequantize"):
        convert(source, tmp_path / "out", format="nvfp4")
    convert(source, tmp_path / "mxfp8", format="mxfp8")  # whose scales are of their own making


def test_one_scale_is_needed_of_a_source_on_the_hub_too(hub: HubServer, tmp_path: Path) -> None:
    source, _ = write_foreign(tmp_path / "source", "modelopt-nvfp4")
    hub.add_repo("me/right", read_files(source))
    edit_source(source, {f"{Q}.weight_scale_2": torch.tensor(2e-5)})
    hub.add_repo("me/wrong", read_files(source))
    convert_remote("me/right", tmp_path / "right", format="nvfp4")
    with pytest.raises(FaultsError, match=r"q_proj\+.*different scales of the whole tensor"):
        convert_remote("me/wrong", tmp_path / "wrong", format="nvfp4")
    assert not (tmp_path / "wrong").exists()


def test_static_scales_of_the_source_are_carried_over(tmp_path: Path) -> None:
    source, _ = write_foreign(tmp_path / "source", "modelopt-fp8")
    edit_source(source, {f"{Q}.input_scale": torch.tensor(0.0123)})
    convert(source, tmp_path / "out", format="fp8", static=True)
    tensors = load_all(tmp_path / "out")
    assert_bits_equal(tensors[f"{Q}.input_scale"], torch.tensor([0.0123]))
    assert_bits_equal(tensors["model.layers.0.mlp.down_proj.input_scale"], torch.tensor([0.01]))
    assert faults(tmp_path / "out", source) == []


def test_static_scales_need_a_source_that_has_them(tmp_path: Path) -> None:
    source, _ = write_foreign(tmp_path / "source", "fp8-block")
    with pytest.raises(UsageError, match="or a source with static scales of its own"):
        convert(source, tmp_path / "out", format="fp8", static=True)


def test_static_scales_are_read_of_a_source_that_is_here(hub: HubServer, tmp_path: Path) -> None:
    source, _ = write_foreign(tmp_path / "source", "modelopt-fp8")
    hub.add_repo("me/llm", read_files(source))
    with pytest.raises(UsageError, match=r"--static: the scales of hf://me/llm .*\. Fetch it first"):
        convert_remote("me/llm", tmp_path / "out", format="fp8", static=True)


def test_a_budget_wants_numbers(tmp_path: Path) -> None:
    source, _ = write_foreign(tmp_path / "source", "modelopt-fp8")
    with pytest.raises(UsageError, match="quantized already"):
        convert(source, tmp_path / "out", format="mxfp4", min_sqnr=20.0)
