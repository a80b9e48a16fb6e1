"""Who a result is for: what each target reads, what it costs there, and what is refused because it would go wrong."""

import json
from pathlib import Path

import pytest

from convert_ckpt.api import plan_conversion
from convert_ckpt.options import Options
from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.file_names import CONFIG_NAME
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.contract.targets import TARGETS
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.publish.consumers import _CONSUMERS
from run_ckpt.tools.rewrite.relayout import relayout
from tests.checkpoints import FLUX_DIGITS, convert, folder_bytes, random_weight, save_checkpoint

FEED_FORWARD = {f"transformer_blocks.0.{part}" for part in ("ff.net.0.proj", "ff.net.2")} | {
    f"transformer_blocks.0.{part}" for part in ("ff_context.net.0.proj", "ff_context.net.2")
}


def result_bytes(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in folder_bytes(folder).items() if name != MANIFEST_NAME}


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_sglang_is_the_default_of_a_diffusion_class(tmp_path: Path, weight_format: str) -> None:
    convert(FLUX_DIGITS, tmp_path / "usual", format=weight_format)
    convert(FLUX_DIGITS, tmp_path / "sglang", format=weight_format, target="sglang")
    assert result_bytes(tmp_path / "sglang") == result_bytes(tmp_path / "usual")


def test_what_only_sglang_builds_plain_is_quantized_for_others(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "sglang", format="fp8", target="sglang")
    convert(FLUX_DIGITS, tmp_path / "ours", format="fp8", target="run-ckpt")
    sglang, ours = (read_manifest(tmp_path / name) for name in ("sglang", "ours"))
    assert ours.layers.keys() - sglang.layers.keys() == FEED_FORWARD
    assert not sglang.layers.keys() - ours.layers.keys()
    # Sensitive, whoever runs it.
    assert "sensitive" not in ours.layers
    assert ours.kept["x_embedder.weight"].reason == "embedder, modulation or output layer"


def test_the_plan_says_what_each_target_costs() -> None:
    (component,) = plan_conversion(FLUX_DIGITS, Options("fp8")).components
    costs = component["target_costs"]
    assert costs.keys() == TARGETS.keys()
    assert costs["sglang"]["output_nbytes"] == component["output_nbytes"] > costs["run-ckpt"]["output_nbytes"]
    assert costs["vllm"]["reason"].startswith("--target vllm: ")
    exact = plan_conversion(FLUX_DIGITS, Options("fp8", target="run-ckpt")).components[0]["output_nbytes"]
    assert costs["run-ckpt"]["output_nbytes"] == exact


def test_a_target_chooses_layout_granularity_and_dialect(tmp_path: Path) -> None:
    llama = language_model(tmp_path)
    chosen = {}
    for target in ("vllm", "transformers", "run-ckpt"):
        for weight_format in ("mxfp4", "fp8"):
            plan = plan_conversion(llama, Options(weight_format, target=target)).components[0]
            chosen[target, weight_format] = plan["dialect"]
            assert plan["targets"][target] is None
    assert chosen == {
        ("vllm", "mxfp4"): "quark",
        ("vllm", "fp8"): "compressed-tensors",
        ("transformers", "mxfp4"): "compressed-tensors",
        ("transformers", "fp8"): "compressed-tensors",
        ("run-ckpt", "mxfp4"): "mxfp4",
        ("run-ckpt", "fp8"): "fp8",
    }


def language_model(folder: Path, class_name: str = "LlamaForCausalLM", experts: int = 0) -> Path:
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    parts = [f"mlp.experts.{i}" for i in range(experts)] or ["mlp"]
    names += [f"model.layers.0.{part}.{name}_proj" for part in parts for name in ("gate", "up", "down")]
    tensors = {f"{name}.weight": random_weight(256, 256, seed=i) for i, name in enumerate(names)}
    config = {"architectures": [class_name], "model_type": "llama"}
    return save_checkpoint(folder / class_name, [tensors], config)


def test_experts_are_not_given_scales_by_tensor(tmp_path: Path) -> None:
    """vLLM: an AssertionError for compressed-tensors' weights by tensor with activations by token."""
    mixture = language_model(tmp_path, "Qwen3MoeForCausalLM", experts=2)
    for target in (None, "vllm"):
        plan = plan_conversion(mixture, Options("fp8", target=target)).components[0]
        assert plan["targets"]["vllm"] is None
        assert {tensor["outputs"][1]["shape"][0] for tensor in plan["tensors"]} == {256}
    with pytest.raises(FaultsError, match="no FP8 by tensor with activations by token"):
        plan_conversion(mixture, Options("fp8", target="vllm", granularity="tensor", dialect="compressed-tensors"))
    asked = plan_conversion(mixture, Options("fp8", granularity="tensor")).components[0]
    assert "granularity channel or block" in asked["targets"]["vllm"]


def test_block_scales_that_sglangs_llama_loses_are_refused_or_said(tmp_path: Path) -> None:
    options = {"format": "fp8", "granularity": "block"}
    llama, qwen = language_model(tmp_path), language_model(tmp_path, "Qwen3ForCausalLM")
    with pytest.raises(FaultsError, match=r"llama\.py renames weight_scale_inv"):
        plan_conversion(llama, Options(**options, target="sglang"))
    (plan,) = plan_conversion(llama, Options(**options)).components
    assert any("llama.py renames weight_scale_inv" in warning for warning in plan["warnings"])
    (plan,) = plan_conversion(qwen, Options(**options, target="sglang")).components
    assert plan["targets"]["sglang"] is None


def test_the_manifest_says_whom_a_result_is_for_and_relayout_judges_again(tmp_path: Path) -> None:
    llama = language_model(tmp_path)
    convert(llama, tmp_path / "shuffled", format="mxfp4")
    assert read_manifest(tmp_path / "shuffled").targets["vllm"] == (
        "vLLM does not read the mxfp4 dialect of a LlamaForCausalLM"
    )
    relayout(tmp_path / "shuffled", tmp_path / "plain", layout="plain", dialect=None, progress=Silent())
    convert(llama, tmp_path / "converted", format="mxfp4", layout="plain")
    targets = read_manifest(tmp_path / "plain").targets
    assert targets["vllm"] is None
    assert targets == read_manifest(tmp_path / "converted").targets


def test_a_dialect_that_the_target_does_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FaultsError, match="transformers does not read the quark dialect of a LlamaForCausalLM"):
        convert(language_model(tmp_path), tmp_path / "out", format="fp8", target="transformers", dialect="quark")
    assert not (tmp_path / "out").exists()


def test_every_reading_names_dialects_that_can_say_it_and_has_commands() -> None:
    for target in TARGETS.values():
        for reading in target.readings:
            for dialect in reading.dialects:
                schemes = reading.schemes or tuple(DIALECTS[dialect].schemes)
                assert set(schemes) & set(DIALECTS[dialect].schemes), (target.name, dialect)
    ways = {reading.way for target in TARGETS.values() for reading in target.readings}
    assert {consumer.way for consumer in _CONSUMERS} <= ways


def test_config_of_a_result_for_one_target_is_what_its_manifest_implies(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "out", format="fp8", granularity="channel", dialect="modelopt", target="run-ckpt")
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["quantization_config"]
    assert config["quant_algo"] == config["quant_type"] == "FP8_PER_CHANNEL_PER_TOKEN"
