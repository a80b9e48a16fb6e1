"""from_pretrained and save_pretrained of diffusers and transformers, with our quantizers registered."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from run_ckpt import load_quantized
from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.loading.linear import QuantizedLinear
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, load_all, save_checkpoint
from tests.converted import edit_json
from tests.models import MODELS, run, save

FORMATS: dict[str, dict[str, str]] = {
    "mxfp4": {"format": "mxfp4"},
    "mxfp4-plain-quark": {"format": "mxfp4", "layout": "plain"},
    "mxfp4-plain-ours": {"format": "mxfp4", "layout": "plain", "dialect": "mxfp4"},
    "fp8": {"format": "fp8"},
    "fp8-block": {"format": "fp8", "granularity": "block"},
}
USUAL = ("mxfp4", "fp8")
CASES = [(name, format_) for name in MODELS for format_ in FORMATS if format_ in USUAL or name in ("flux1", "llama")]


@pytest.fixture(autouse=True)
def registered(own_tables: None) -> None:
    import run_ckpt.integrations.diffusers
    import run_ckpt.integrations.transformers

    run_ckpt.integrations.diffusers.register()
    run_ckpt.integrations.transformers.register()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, type]]:
    built = {}
    for name, case in MODELS.items():
        folder = tmp_path_factory.mktemp(name) / "bf16"
        model = case.build()
        save(case, model, folder)
        built[name] = (folder, type(model))
    return built


@pytest.fixture
def flux(sources: dict[str, tuple[Path, type]], tmp_path: Path) -> tuple[Path, Any]:
    source, model_class = sources["flux1"]
    convert(source, tmp_path / "out", format="mxfp4")
    return tmp_path / "out", model_class


def n_quantized(model: torch.nn.Module) -> int:
    return sum(isinstance(module, QuantizedLinear) for module in model.modules())


@pytest.mark.parametrize(("name", "format_"), CASES)
def test_from_pretrained_runs_like_our_loader_and_saves_what_it_loaded(
    sources: dict[str, tuple[Path, Any]], tmp_path: Path, name: str, format_: str
) -> None:
    source, model_class = sources[name]
    case, out, saved = MODELS[name], tmp_path / "out", tmp_path / "saved"
    convert(source, out, **FORMATS[format_])
    expected = run(case, load_quantized(out))

    model = model_class.from_pretrained(out, torch_dtype=torch.bfloat16)
    assert n_quantized(model) > 0
    assert_bits_equal(run(case, model), expected)

    model.save_pretrained(saved)
    written, before = load_all(saved), load_all(out)
    for tensor_name, tensor in written.items():
        assert_bits_equal(tensor, before[tensor_name])
    assert_bits_equal(run(case, model_class.from_pretrained(saved, torch_dtype=torch.bfloat16)), expected)
    assert_bits_equal(run(case, load_quantized(saved)), expected)


@pytest.mark.parametrize("name", ["flux1", "llama"])
def test_device_map_and_dtype_are_respected(sources: dict[str, tuple[Path, Any]], tmp_path: Path, name: str) -> None:
    source, model_class = sources[name]
    convert(source, tmp_path / "out", format="fp8")
    model = model_class.from_pretrained(tmp_path / "out", torch_dtype=torch.float16, device_map="cpu")
    linear = next(module for module in model.modules() if isinstance(module, QuantizedLinear))
    stored = load_all(tmp_path / "out")
    assert_bits_equal(linear.state_dict()["weight_scale"], stored[linear.layer.tensors["weight_scale"]])
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert linear(torch.ones(1, linear.in_features, dtype=torch.float16)).dtype == torch.float16


def test_a_missing_scale_is_an_error(flux: tuple[Path, Any]) -> None:
    from safetensors.torch import save_file

    out, model_class = flux
    tensors = load_all(out)
    gone = next(name for name in tensors if name.endswith("to_k.weight_scale"))
    del tensors[gone]
    for path in out.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, out / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(FaultsError, match=f"{gone}: the model wants it, the checkpoint lacks it"):
        model_class.from_pretrained(out, torch_dtype=torch.bfloat16)


def test_a_tensor_too_many_is_an_error(flux: tuple[Path, Any]) -> None:
    from safetensors.torch import save_file

    out, model_class = flux
    tensors = load_all(out) | {"lost.weight_scale": torch.ones(1)}
    for path in out.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, out / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no use for lost\.weight_scale"):
        model_class.from_pretrained(out, torch_dtype=torch.bfloat16)


def test_transformers_may_not_make_up_a_scale(sources: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, model_class = sources["llama"]
    convert(source, tmp_path / "out", format="fp8", granularity="block")
    tensors = load_all(tmp_path / "out")
    gone = next(name for name in tensors if name.endswith("weight_scale_inv"))
    del tensors[gone]
    for path in (tmp_path / "out").glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FaultsError, match=f"{gone}: the model wants it, the checkpoint lacks it"):
        model_class.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: c["convert_ckpt"].update(schema_version=9), "schema version 9"),
        (lambda c: c["convert_ckpt"].pop("quantized_modules"), "convert_ckpt is damaged"),
        (
            lambda c: c["convert_ckpt"]["quantized_modules"].update(gone="mxfp4"),
            "gone: the model has no such nn.Linear",
        ),
        (lambda c: c.update(layout="tiled"), "layout 'tiled' is none of aiter, plain"),
        (lambda c: c.update(layout="plain"), "layout 'plain' contradicts weight_layout 'aiter_weight_16x16'"),
    ],
    ids=["schema-version", "no-list", "no-such-module", "unknown-layout", "other-layout"],
)
def test_a_config_that_does_not_fit_is_refused(flux: tuple[Path, Any], edit: Any, says: str) -> None:
    out, model_class = flux
    edit_json(out / "config.json", lambda config: edit(config["quantization_config"]))
    with pytest.raises(CheckpointError, match=says):
        model_class.from_pretrained(out, torch_dtype=torch.bfloat16)


def test_diffusers_raises_what_a_class_keeps_in_float32(sources: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    case, (folder, model_class) = MODELS["wan-2.2"], sources["wan-2.2"]
    tensors = {name: tensor.bfloat16() for name, tensor in load_all(folder).items()}
    config = json.loads((folder / "config.json").read_text())
    save_checkpoint(tmp_path / "source", [tensors], config, "diffusion_pytorch_model")
    convert(tmp_path / "source", tmp_path / "out", format="fp8")
    model = model_class.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    loaded = load_quantized(tmp_path / "out")
    assert {name: p.dtype for name, p in model.named_parameters()} == {n: p.dtype for n, p in loaded.named_parameters()}
    assert_bits_equal(run(case, model), run(case, loaded))


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_a_text_encoder_that_asks_a_layer_for_its_dtype_runs(tmp_path: Path, weight_format: str) -> None:
    config = transformers.T5Config(d_model=256, d_kv=128, d_ff=512, num_layers=1, num_heads=2, vocab_size=32)
    transformers.T5EncoderModel(config).bfloat16().save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", format=weight_format)
    model = transformers.T5EncoderModel.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert isinstance(model.encoder.block[0].layer[-1].DenseReluDense.wo, QuantizedLinear)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        expected = load_quantized(tmp_path / "out")(tokens).last_hidden_state
        assert_bits_equal(model(tokens).last_hidden_state, expected)


def test_kernels_of_the_hub_are_refused(sources: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    source, model_class = sources["llama"]
    shutil.copytree(source, tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", lambda config: config.update(attn_implementation="owner/kernel"))
    convert(tmp_path / "source", tmp_path / "out", format="fp8")
    with pytest.raises(CheckpointError, match="'owner/kernel' is code that would be fetched"):
        model_class.from_pretrained(tmp_path / "out")
    assert n_quantized(model_class.from_pretrained(tmp_path / "out", attn_implementation="sdpa")) > 0


def test_quantizing_online_is_refused(sources: dict[str, tuple[Path, Any]]) -> None:
    from run_ckpt.integrations.diffusers import ConvertedConfig

    source, model_class = sources["flux1"]
    with pytest.raises(CheckpointError, match="made offline: run convert-ckpt"):
        model_class.from_pretrained(source, quantization_config=ConvertedConfig({}))


def test_what_others_quantized_goes_where_it_went(sources: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    import transformers.quantizers.auto as auto

    config = auto.AutoQuantizationConfig.from_dict({"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert type(config).__name__ == "FineGrainedFP8Config"
    assert auto.AutoHfQuantizer.from_config(config).__class__.__name__ == "FineGrainedFP8HfQuantizer"

    source, model_class = sources["flux1"]
    model_config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(model_config))
    with pytest.raises(ValueError, match="not written by convert-ckpt"):
        model_class.from_pretrained(tmp_path / "theirs")
