"""Checkpoints of other tools: what their tensors stand for, exactly, or a refusal that says why."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from run_ckpt import load_quantized
from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.progress import Silent
from run_ckpt.storage.foreign import read_foreign_manifest
from run_ckpt.tools.rewrite.dequantize import dequantize
from run_ckpt.tools.rewrite.relayout import relayout
from run_ckpt.tools.summary import inspect_component
from tests.bits import assert_bits_equal
from tests.checkpoints import load_all, save_checkpoint
from tests.foreign import FOREIGN, MODULES, fp4_codes, write_foreign


def to_plain(source: Path, target: Path) -> Path:
    dequantize(source, target, dtype="bfloat16", progress=Silent())
    return target


@pytest.mark.parametrize("name", FOREIGN)
def test_dequantized_weights_are_the_tools_own_rounded_to_bfloat16(tmp_path: Path, name: str) -> None:
    source, weights = write_foreign(tmp_path / "source", name)
    plain = load_all(to_plain(source, tmp_path / "plain"))
    assert plain.keys() == weights.keys()
    for key, weight in weights.items():
        assert_bits_equal(plain[key], weight.bfloat16())


def test_dequantized_folder_says_nothing_of_quantization_and_has_the_other_files(tmp_path: Path) -> None:
    source, weights = write_foreign(tmp_path / "source", "modelopt-nvfp4")
    (source / "hf_quant_config.json").write_text("{}")
    plain = to_plain(source, tmp_path / "plain")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    index = json.loads((plain / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    shards = set(index["weight_map"].values())
    assert {path.name for path in plain.iterdir()} == {
        *shards,
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }


def test_modelopts_older_config_beside_config_json_is_enough(tmp_path: Path) -> None:
    source, weights = write_foreign(tmp_path / "source", "modelopt-fp8")
    config = json.loads((source / "config.json").read_text())
    declared = config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    old = {"producer": declared["producer"], "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (source / "hf_quant_config.json").write_text(json.dumps(old))
    assert read_foreign_manifest(source).tool["name"] == "modelopt"
    assert load_all(to_plain(source, tmp_path / "plain")).keys() == weights.keys()


def test_experts_of_gpt_oss_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = {}
    for name, rows, K in (("gate_up_proj", 96, 64), ("down_proj", 64, 96)):
        packed, _ = fp4_codes(4 * rows, K, seed=rows)
        scales = torch.arange(4 * rows * K // 32).remainder(60).add(90).to(torch.uint8)
        tensors[f"model.layers.0.mlp.experts.{name}_blocks"] = packed.reshape(4, rows, K // 32, 16)
        tensors[f"model.layers.0.mlp.experts.{name}_scales"] = scales.reshape(4, rows, K // 32)
        tensors[f"model.layers.0.mlp.experts.{name}_bias"] = torch.ones(4, rows).bfloat16()
    config = {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}
    source = save_checkpoint(tmp_path / "source", [tensors], config)
    plain = load_all(to_plain(source, tmp_path / "plain"))
    assert len(plain) == 4
    for name in ("gate_up_proj", "down_proj"):
        prefix = f"model.layers.0.mlp.experts.{name}"
        parts = tensors[f"{prefix}_blocks"], tensors[f"{prefix}_scales"]
        assert_bits_equal(plain[prefix], mxfp4.convert_moe_packed_tensors(*parts, dtype=torch.bfloat16).contiguous())
        assert_bits_equal(plain[f"{prefix}_bias"], tensors[f"{prefix}_bias"])


def meta_model() -> torch.nn.Module:
    """A model on the meta device with the linears that write_foreign writes, and the embedding."""
    model = torch.nn.Module()
    with torch.device("meta"):
        layers = {module: torch.nn.Linear(K, N, bias=False) for module, (N, K) in MODULES.items()}
        layers |= {"model.embed_tokens": torch.nn.Embedding(64, 512), "lm_head": torch.nn.Linear(512, 64, bias=False)}
    for path, layer in layers.items():
        owner, (*parts, leaf) = model, path.split(".")
        for part in parts:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.add_module(leaf, layer)
    return model


@pytest.mark.parametrize("name", FOREIGN)
def test_loaded_layers_multiply_by_the_tools_own_weights(tmp_path: Path, name: str) -> None:
    source, weights = write_foreign(tmp_path / "source", name)
    model = load_quantized(source, model=meta_model(), dtype=torch.float32, backend="reference")
    for module, (_, K) in MODULES.items():
        # Sums with zeros lose the sign of -0.
        assert torch.equal(model.get_submodule(module)(torch.eye(K)), weights[f"{module}.weight"].T)


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "fp8-block", "compressed-mxfp4"])
def test_inspect_shows_layers_and_sizes_of_another_tools_checkpoint(tmp_path: Path, name: str) -> None:
    source, weights = write_foreign(tmp_path / "source", name)
    inspection = inspect_component("", source, every_layer=True)
    assert {(row.module, row.N, row.K) for row in inspection.layers} == {
        (module, N, K) for module, (N, K) in MODULES.items()
    }
    assert inspection.summary.source_nbytes == sum(2 * weight.numel() for weight in weights.values())
    assert inspection.summary.output_nbytes == sum(path.stat().st_size for path in source.glob("*.safetensors"))


def edit_shard(source: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = min(source.glob("*.safetensors"))
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    (source / "model.safetensors.index.json").unlink()


Q = "model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "AWQ": (
        "modelopt-nvfp4",
        lambda tensors: tensors.update({f"{Q}.pre_quant_scale": torch.ones(512)}),
        r"q_proj\.weight: its inputs are scaled by channel",
    ),
    "zero point": (
        "compressed-mxfp4",
        lambda tensors: tensors.update({f"{Q}.weight_zero_point": torch.ones(256, 16)}),
        r"q_proj\.weight_packed: it has zero points",
    ),
    "no scale": ("fp8-tensor", lambda tensors: tensors.pop(f"{Q}.weight_scale"), "0 weight scales beside it"),
    "another dtype": (
        "fp8-tensor",
        lambda tensors: tensors.update({f"{Q}.weight": torch.ones(256, 512).to(torch.float8_e4m3fnuz)}),
        r"q_proj\.weight: F8_E4M3FNUZ \[256, 512\], codes without a scale",
    ),
    "codes of something else": (
        "fp8-tensor",
        lambda tensors: tensors.update({"model.table": torch.ones(3).to(torch.float8_e4m3fn)}),
        r"model\.table: F8_E4M3 \[3\], codes without a scale",
    ),
    "another block": (
        "fp8-block",
        lambda tensors: tensors.update({f"{Q}.weight_scale_inv": torch.ones(4, 8)}),
        r"q_proj\.weight: .*is no MXFP8 or FP8",
    ),
    "one level of NVFP4": (
        "modelopt-nvfp4",
        lambda tensors: tensors.pop(f"{Q}.weight_scale_2"),
        r"q_proj\.weight: .* is no MXFP4 or NVFP4",
    ),
}


@pytest.mark.parametrize(("name", "edit", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_had_exactly_is_refused_with_the_reason(
    tmp_path: Path, name: str, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    source, _ = write_foreign(tmp_path / "source", name)
    edit_shard(source, edit)
    with pytest.raises(FaultsError, match=message):
        to_plain(source, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_relayout_is_for_results_of_our_own(tmp_path: Path) -> None:
    source, _ = write_foreign(tmp_path / "source", "quark-mxfp4")
    with pytest.raises(CheckpointError, match="no finished result of convert-ckpt"):
        relayout(source, tmp_path / "plain", layout="aiter", dialect=None, progress=Silent())
