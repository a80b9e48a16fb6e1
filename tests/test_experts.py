"""Mixtures of experts that are stored one by one run in transformers 5, which holds them in 3-D parameters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from convert_ckpt.options import Options
from convert_ckpt.plan.make_plan import make_plan
from convert_ckpt.source.component import open_component
from run_ckpt import CheckpointError, load_quantized, record_statistics
from run_ckpt.loading.experts import SeparateExperts, separate_experts
from run_ckpt.loading.linear import QuantizedLinear
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.rewrite.dequantize import dequantize
from tests.bits import assert_bits_equal
from tests.checkpoints import load_all, save_checkpoint
from tests.converted import convert
from tests.experts import BUILDERS, FUSED, STACKED, run_logits, save_experts

SEPARATE = [name for name in BUILDERS if name not in (*FUSED, *STACKED)]
FORMATS: dict[str, dict[str, str]] = {
    "mxfp4": {"format": "mxfp4"},
    "fp8": {"format": "fp8"},
    "fp8-block": {"format": "fp8", "granularity": "block"},
    "nvfp4": {"format": "nvfp4"},
    "mxfp8": {"format": "mxfp8"},
}
CASES = [(name, format_) for name in SEPARATE for format_ in FORMATS if name == "qwen3-moe" or format_ == "mxfp4"]


@pytest.fixture
def registered(own_tables: None) -> None:
    import run_ckpt.integrations.transformers

    run_ckpt.integrations.transformers.register()


def n_quantized_experts(model: Any) -> int:
    return sum(isinstance(module, QuantizedLinear) and ".experts." in name for name, module in model.named_modules())


@pytest.mark.parametrize(("name", "format_"), CASES)
def test_experts_run_as_those_of_the_dequantized_model(tmp_path: Path, name: str, format_: str) -> None:
    out = convert(save_experts(name, tmp_path / "bf16"), tmp_path / "out", **FORMATS[format_])
    dequantize(out, tmp_path / "plain", dtype="bfloat16", progress=Silent())
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, experts_implementation="eager"
    )
    model = load_quantized(out, dtype=torch.float32, backend="dequantize")
    assert n_quantized_experts(model) >= 12
    # Sums of gate and up run apart here: their order may differ.
    torch.testing.assert_close(run_logits(model), run_logits(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", SEPARATE)
def test_from_pretrained_runs_like_our_loader_and_saves_what_it_loaded(tmp_path: Path, name: str) -> None:
    out = convert(save_experts(name, tmp_path / "bf16"), tmp_path / "out", format="mxfp4")
    expected = run_logits(load_quantized(out))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert_bits_equal(run_logits(model), expected)

    model.save_pretrained(tmp_path / "saved")
    stored = load_all(out)
    for tensor_name, tensor in load_all(tmp_path / "saved").items():
        assert_bits_equal(tensor, stored[tensor_name])
    assert_bits_equal(run_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "fp8"},
        {"format": "fp8", "granularity": "block"},
        {"format": "mxfp4", "layout": "plain", "dialect": "compressed-tensors"},
    ],
)
def test_transformers_by_itself_has_the_same_experts(tmp_path: Path, options: dict[str, str]) -> None:
    out = convert(save_experts("mixtral", tmp_path / "bf16"), tmp_path / "out", **options)
    dequantize(out, tmp_path / "plain", dtype="bfloat16", progress=Silent())
    blocks = [AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16) for name in ("plain", "out")]
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen, shares = torch.tensor([[0, 1], [1, 2], [2, 3]]), torch.ones(3, 2).bfloat16()
    plain, quantized = (model.model.layers[1].mlp.experts(x, chosen, shares) for model in blocks)
    # Of blocks it keeps the codes, and rounds a weight when it multiplies.
    torch.testing.assert_close(quantized, plain, rtol=0.02, atol=0.02 * plain.abs().max().item())


@pytest.mark.usefixtures("registered")
def test_experts_that_stay_as_they_are_run_beside_quantized_ones(tmp_path: Path) -> None:
    source = save_experts("qwen3-moe", tmp_path / "bf16")
    out = convert(source, tmp_path / "out", format="mxfp4", ignore=("*.0.mlp.experts.*", "*.experts.1.*"))
    model = load_quantized(out)
    assert n_quantized_experts(model) == 9
    assert_bits_equal(run_logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)), run_logits(model))
    none = convert(source, tmp_path / "none", format="mxfp4", ignore=("*.experts.*",))
    assert_bits_equal(
        run_logits(AutoModelForCausalLM.from_pretrained(none, dtype=torch.bfloat16, experts_implementation="eager")),
        run_logits(load_quantized(none)),
    )


@pytest.mark.usefixtures("registered")
def test_a_layer_that_the_class_leaves_out_is_left_out(tmp_path: Path) -> None:
    source = save_experts("deepseek-v3", tmp_path / "bf16")
    # Block 61 of the real one predicts a further token; transformers has no such block.
    more = {name.replace("layers.1.", "layers.61."): weight for name, weight in load_all(source).items()}
    save_checkpoint(tmp_path / "more", [load_all(source) | more], json.loads((source / "config.json").read_text()))
    out = convert(source, tmp_path / "out", format="mxfp4")
    with_more = convert(tmp_path / "more", tmp_path / "more-out", format="mxfp4")
    assert any(".61." in name for name in load_all(with_more))
    expected = run_logits(load_quantized(out))
    assert_bits_equal(run_logits(load_quantized(with_more)), expected)
    assert_bits_equal(run_logits(AutoModelForCausalLM.from_pretrained(with_more, dtype=torch.bfloat16)), expected)


def test_statistics_choose_what_they_know_and_experts_are_rounded(tmp_path: Path) -> None:
    source = save_experts("qwen3-moe", tmp_path / "bf16")
    model = AutoModelForCausalLM.from_pretrained(source)
    with record_statistics(model, tmp_path / "stats"):
        for seed in range(4):
            model(torch.randint(0, 512, (1, 32), generator=torch.Generator().manual_seed(seed)))
    options: dict[str, Any] = {"format": "mxfp4", "layout": "plain"}
    plan = make_plan(open_component(source), Options(**options, calibration=tmp_path / "stats"))
    assert any("24 linear layers of experts have no statistics" in note for note in plan.warnings)
    out = convert(source, tmp_path / "out", **options, calibration=tmp_path / "stats")
    layers = read_manifest(out).layers
    assert {layer.method for name, layer in layers.items() if ".self_attn." in name} <= {"rtn", "gptq"}
    assert {layer.method for name, layer in layers.items() if ".experts." in name} == {None}
    plain = load_all(convert(source, tmp_path / "plain", **options))
    for name, tensor in load_all(out).items():
        if ".experts." in name:
            assert_bits_equal(tensor, plain[name])


def test_experts_with_more_than_linears_are_refused(tmp_path: Path) -> None:
    model = BUILDERS["mixtral"]()
    name = "model.layers.0.mlp.experts"
    model.get_submodule(name).register_parameter("down_proj_bias", torch.nn.Parameter(torch.zeros(4, 256)))
    with pytest.raises(CheckpointError, match=f"{name}: a MixtralExperts, whose experts are more than two or three"):
        separate_experts(model, [f"{name}.0.w1"])
    assert not any(isinstance(module, SeparateExperts) for module in model.modules())
