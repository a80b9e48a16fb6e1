"""Real model classes, end to end: convert, verify, dequantize, load both, run, compare."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from convert_ckpt.plan.preset import preset_names
from run_ckpt import load_quantized
from run_ckpt.loading.linear import QuantizedLinear
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.rewrite.dequantize import dequantize
from run_ckpt.tools.verify.component import verify_output
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, load_all, save_checkpoint
from tests.model_classes import CLASSES
from tests.models import MODELS, ModelCase, run, save

# Relative error of the output, root mean square. E2M1 keeps one mantissa bit (about 0.11 a weight),
# E4M3 three (about 0.026); random networks of two blocks neither average much out nor blow it up.
LARGEST_ERROR = {"mxfp4": 0.35, "nvfp4": 0.35, "mxfp8": 0.1, "fp8": 0.1}
CASES = {**MODELS, **CLASSES}
Sources = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Each model case once, by name: its folder and its class with the BF16 output."""

    @cache
    def make(name: str) -> tuple[Path, Any]:
        case, folder = CASES[name], tmp_path_factory.mktemp(name) / "bf16"
        model = case.build()
        save(case, model, str(folder))
        return folder, (type(model), run(case, model))

    return make


def reload(case: ModelCase, model_class: type, folder: Path) -> torch.nn.Module:
    """Load a folder as its users do, and insist that nothing is missing or left over."""
    options = {"torch_dtype": "auto"} if case.preset == "dense-llm" else {"torch_dtype": torch.bfloat16}
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)  # type: ignore[attr-defined]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model  # type: ignore[no-any-return]


def summed_alike(model: torch.nn.Module) -> torch.nn.Module:
    """Take away what makes torch sum equal numbers differently.

    Sana's attention gives its output layer rows that lie apart; torch then rounds the product to BF16 before it adds
    the bias, where our layer rounds once (0.6 % in the output of two blocks). Sums of float32 layers differ in the
    last bits by where in memory their weights begin.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not isinstance(module, QuantizedLinear):
            module.weight.data = module.weight.data.clone()
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    return model


def test_every_preset_has_a_real_model() -> None:
    # gpt-oss has its own in tests/experts.py.
    assert {case.preset for case in CASES.values()} | {"gpt-oss"} == set(preset_names())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_what_a_class_keeps_in_float32_is_raised_from_bfloat16(
    sources: Sources, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    case = MODELS["wan-2.2"]
    folder, (model_class, _) = sources("wan-2.2")
    tensors = {name: tensor.bfloat16() for name, tensor in load_all(folder).items()}
    config = json.loads((folder / "config.json").read_text())
    save_checkpoint(tmp_path / "source", [tensors], config, "diffusion_pytorch_model")
    convert(tmp_path / "source", tmp_path / "out", format="fp8")
    dequantize(tmp_path / "out", tmp_path / "plain", dtype="bfloat16", progress=Silent())
    plain = model_class.from_pretrained(tmp_path / "plain", torch_dtype=dtype or torch.bfloat16)
    loaded = load_quantized(tmp_path / "out", dtype=dtype)
    dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert dtypes == {name: parameter.dtype for name, parameter in plain.named_parameters() if name in dtypes}
    assert dtypes["scale_shift_table"] == torch.float32
    if dtype is None:
        assert_bits_equal(run(case, loaded), run(case, plain))


def test_transformers_keeps_float32_by_the_dtype_asked_for(tmp_path: Path) -> None:
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 256, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)).bfloat16()
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", format="fp8", ignore=("*.wo",))
    for dtype in (None, torch.bfloat16, torch.float16):
        plain = transformers.UMT5EncoderModel.from_pretrained(tmp_path / "source", dtype=dtype or "auto")
        loaded = load_quantized(tmp_path / "out", dtype=dtype)
        dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
        assert dtypes == {name: parameter.dtype for name, parameter in plain.named_parameters() if name in dtypes}


@pytest.mark.parametrize(
    "weight_format", ["mxfp4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nvfp4", "mxfp8")), "fp8"]
)
@pytest.mark.parametrize("name", CASES)
def test_convert_verify_dequantize_load_and_run(
    sources: Sources, tmp_path: Path, name: str, weight_format: str
) -> None:
    case = CASES[name]
    source, (model_class, expected) = sources(name)
    options = {} if weight_format in ("mxfp4", "fp8") else {"target": "run-ckpt"}
    convert(source, tmp_path / "out", format=weight_format, **options)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.recipe["preset"] == case.preset

    (report,) = verify_output(tmp_path / "out", source, Silent())
    assert report.faults == ()

    dequantize(tmp_path / "out", tmp_path / "plain", dtype="bfloat16", progress=Silent())
    original, plain = load_all(source), load_all(tmp_path / "plain")
    assert plain.keys() == original.keys()
    for tensor_name in manifest.kept:
        assert_bits_equal(plain[tensor_name], original[tensor_name])
    output = run(case, summed_alike(reload(case, model_class, tmp_path / "plain")))
    assert_bits_equal(run(case, summed_alike(load_quantized(tmp_path / "out", dtype=torch.bfloat16))), output)
    error = ((output - expected).square().mean() / expected.square().mean()).sqrt().item()
    assert 0 < error < LARGEST_ERROR[weight_format], f"{name} {weight_format}: relative error {error:.3f}"


# E2M1 times a power of two is exact in BF16 and float16; FP8 is rounded once more by the decoded checkpoint's BF16.
@pytest.mark.parametrize(
    ("weight_format", "dtype"), [("mxfp4", None), ("mxfp4", torch.float16), ("fp8", None)], ids=str
)
@pytest.mark.parametrize("name", ["T5", "UMT5"])
def test_text_encoders_that_ask_a_layer_for_its_dtype_run(
    tmp_path: Path, name: str, weight_format: str, dtype: torch.dtype | None
) -> None:
    config = getattr(transformers, f"{name}Config")(
        d_model=256, d_kv=128, d_ff=512, num_layers=2, num_heads=2, vocab_size=32, feed_forward_proj="gated-gelu"
    )
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{name}EncoderModel")
    model_class(config).bfloat16().save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", format=weight_format)
    assert any(name.endswith("wo") for name in read_manifest(tmp_path / "out").layers)
    dequantize(tmp_path / "out", tmp_path / "plain", dtype="bfloat16", progress=Silent())
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        loaded, plain = (
            model(tokens).last_hidden_state
            for model in (
                load_quantized(tmp_path / "out", dtype=dtype),
                model_class.from_pretrained(tmp_path / "plain", dtype=dtype or "auto").eval(),
            )
        )
    assert_bits_equal(loaded, plain)
