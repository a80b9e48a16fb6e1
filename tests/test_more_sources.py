"""Exports of msModelSlim and torchao: INT8 by row, and what says of each tensor what it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.progress import Silent
from run_ckpt.storage.components import open_checkpoint
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.storage.rows import decode_rows
from run_ckpt.tools.rewrite.dequantize import dequantize
from run_ckpt.tools.verify.component import verify_output
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, load_all, save_checkpoint
from tests.foreign import CONFIG, MODULES, fp8_channel, modelopt_nvfp4, mxfp8
from tests.models import MODELS
from tests.test_originals import map_of, to_original

Q = "model.layers.0.self_attn.q_proj"


def int8(N: int, K: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
    scale = ((1 + torch.rand(N, 1, generator=generator)) / 1000).bfloat16()
    return {"weight": codes, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}, codes * scale.float()


def dequantized(source: Path, target: Path) -> dict[str, Tensor]:
    dequantize(source, target, dtype="bfloat16", progress=Silent())
    return load_all(target)


def write_wan(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Write Wan as msModelSlim exports it: original names, INT8 in the blocks; return it and its float32 values."""
    model = MODELS["wan-2.2"].build()
    stored, description = {}, {"model_quant_type": "W8A8_DYNAMIC"}
    values = to_original(model.state_dict(), map_of("WanTransformer3DModel"))
    for seed, (name, tensor) in enumerate(sorted(values.items())):
        stored[name], description[name] = tensor.contiguous(), "FLOAT"
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            tensors, values[name] = int8(*tensor.shape, seed)
            parts = {f"{name.removesuffix('.weight')}.{suffix}": part for suffix, part in tensors.items()}
            stored |= parts
            description |= dict.fromkeys(parts, "W8A8_DYNAMIC")
    folder.mkdir()
    save_file(stored, folder / "quant_model_weight_w8a8_dynamic.safetensors")
    (folder / "quant_model_description_w8a8_dynamic.json").write_text(json.dumps(description))
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 1}))
    return folder, values


def test_wan_by_msmodelslim_has_diffusers_names_and_its_own_values(tmp_path: Path) -> None:
    source, values = write_wan(tmp_path / "source")
    plain = dequantized(source, tmp_path / "plain")
    assert plain.keys() == values.keys()
    for name, value in values.items():
        is_coded = name.startswith("blocks.") and value.ndim == 2
        assert_bits_equal(plain[name], value.bfloat16() if is_coded else value)
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        "config.json",
        "quant_model_weight_w8a8_dynamic.safetensors",
    }
    convert(source, tmp_path / "out", format="mxfp8", target="run-ckpt", preset=None)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.source["quantized"] == {
        "by": "msModelSlim",
        "weights": {"int8 requantized": sum(name.startswith("blocks.") for name in manifest.layers)},
    }
    (report,) = verify_output(tmp_path / "out", source, Silent())
    assert report.faults == ()
    assert not list((tmp_path / "out").glob("quant_model_description*"))


def describe(kind: str, encoded: dict[str, Tensor], **more: Tensor) -> tuple[dict[str, str], dict[str, Tensor]]:
    tensors = {f"{Q}.{suffix}": tensor for suffix, tensor in {**encoded, **more}.items()}
    return dict.fromkeys(tensors, kind), tensors


INT8, _ = int8(256, 256, 0)
REFUSED = {
    "static": (*describe("W8A8", INT8), "q_proj.weight: W8A8: its bias is folded into integers"),
    "4 bits": (*describe("W4A4_MXFP4", INT8), "nothing says in which order its 4 bit codes lie"),
    "unknown": (*describe("W2A2", INT8), "W2A2: is not known here"),
    "smoothed": (*describe("W8A8_DYNAMIC", INT8, mul_scale=torch.ones(256)), "its inputs are scaled by channel"),
    "zero points": (
        *describe("W8A8_DYNAMIC", {**INT8, "weight_offset": torch.ones(256, 1).bfloat16()}),
        "weight_offset: zero points that are not zero",
    ),
    "another shape": (
        *describe("W8A8_DYNAMIC", {**INT8, "weight_scale": torch.ones(2, 128)}),
        "no INT8 weight with a scale for each row",
    ),
    "no scale": (*describe("W8A8_DYNAMIC", {"weight": INT8["weight"]}), "Fetch the checkpoint again"),
    "no MXFP8": (*describe("W8A8_MXFP8", fp8_channel(256, 256, 0)[0]), "F32 scales, which are no MXFP8"),
}


@pytest.mark.parametrize(("description", "tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_what_msmodelslim_leaves_unsaid_is_refused(
    tmp_path: Path, description: dict[str, str], tensors: dict[str, Tensor], message: str
) -> None:
    source = save_checkpoint(tmp_path / "source", [tensors], CONFIG)
    (source / "quant_model_description.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError) as raised:
        dequantized(source, tmp_path / "plain")
    assert message in str(raised.value)
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "out", format="fp8")
    assert not (tmp_path / "out").exists()


# A class of torchao -> the codes of a weight, what it calls its tensors, and the format that takes them as they are.
TORCHAO = {
    "Float8Tensor": (fp8_channel, {"qdata": "weight", "scale": "weight_scale"}, ("fp8", "channel")),
    "MXTensor": (mxfp8, {"qdata": "weight", "scale": "weight_scale"}, ("mxfp8", None)),
    "NVFP4Tensor": (
        modelopt_nvfp4,
        {"qdata": "weight", "scale": "weight_scale", "per_tensor_scale": "weight_scale_2"},
        ("nvfp4", None),
    ),
    "Int8Tensor": (int8, {"qdata": "weight", "scale": "weight_scale", "zero_point": "weight_offset"}, None),
}


def write_torchao(folder: Path, kind: str, **data: object) -> tuple[Path, dict[str, Tensor]]:
    """Write a checkpoint as flatten_tensor_state_dict does; return it and its float32 weights."""
    encode, parts, _ = TORCHAO[kind]
    stored: dict[str, Tensor] = {"model.norm.weight": torch.ones(8).bfloat16()}
    metadata = {"model.norm.weight": '{"_type": "Tensor"}'}
    values = {"model.norm.weight": torch.ones(8)}
    for seed, (module, (N, K)) in enumerate(MODULES.items()):
        tensors, values[f"{module}.weight"] = encode(N, K, seed)
        stored |= {f"{module}._weight_{part}": tensors[suffix] for part, suffix in parts.items()}
        metadata[f"{module}.weight"] = json.dumps({"_type": kind, "_data": data, "_tensor_data_names": list(parts)})
    metadata["tensor_names"] = json.dumps(list(values))
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors", metadata)
    config = {**CONFIG, "quantization_config": {"quant_method": "torchao"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, values


@pytest.mark.parametrize("kind", TORCHAO)
def test_torchaos_weights_are_what_their_codes_and_scales_say(tmp_path: Path, kind: str) -> None:
    source, values = write_torchao(tmp_path / "source", kind, is_swizzled_scales=False)
    plain = dequantized(source, tmp_path / "plain")
    assert plain.keys() == values.keys()
    for name, value in values.items():
        assert_bits_equal(plain[name], value.bfloat16())
    name, granularity = TORCHAO[kind][2] or ("mxfp4", None)
    convert(source, tmp_path / "out", format=name, granularity=granularity)
    if TORCHAO[kind][2]:
        with open_checkpoint(tmp_path / "out") as checkpoint:
            for layer in checkpoint.manifest.layers.values():
                assert_bits_equal(decode_rows(checkpoint.reader, layer, 0, layer.N), values[layer.source_tensor])
    (report,) = verify_output(tmp_path / "out", source, Silent())
    assert report.faults == ()


def test_what_torchao_stores_in_an_order_of_its_kernels_is_refused(tmp_path: Path) -> None:
    source, _ = write_torchao(tmp_path / "tiles", "NVFP4Tensor", is_swizzled_scales=True)
    with pytest.raises(FaultsError, match="NVFP4Tensor with scales in tiles is not read here"):
        dequantized(source, tmp_path / "plain")
    file = source / "model.safetensors"
    broken = {f"{Q}.weight": '{"_type": 7', "tensor_names": "[]"}
    save_file(load_file(file), file, broken)
    with pytest.raises(FaultsError, match=r"q_proj\.weight: Expecting|q_proj\.weight: .*delimiter"):
        dequantized(source, tmp_path / "plain")
    entry = json.dumps({"_type": "Int4Tensor", "_data": {}, "_tensor_data_names": ["qdata"]})
    save_file(load_file(file), file, {f"{Q}.weight": entry, "tensor_names": "[]"})
    with pytest.raises(FaultsError, match="Int4Tensor is not read here"):
        dequantized(source, tmp_path / "plain")
