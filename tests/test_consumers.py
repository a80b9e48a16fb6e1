"""Unmodified consumers load what we write: transformers with compressed-tensors, transformers' own FP8, diffusers."""

from pathlib import Path

import pytest
import torch

from run_ckpt.progress import Silent
from run_ckpt.tools.rewrite.dequantize import dequantize
from tests.checkpoints import convert
from tests.models import MODELS, run, save


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return ((output - expected).square().mean() / expected.square().mean()).sqrt().item()


def dequantized(output: Path, folder: Path) -> Path:
    dequantize(output, folder, dtype="bfloat16", progress=Silent())
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "bf16"
    save(MODELS["llama"], MODELS["llama"].build(), folder)
    return folder


def load_llama(folder: Path, **options: object) -> torch.nn.Module:
    """Load as users do, and insist that no tensor is missing, left over or misshapen."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", output_loading_info=True, **options)
    assert not any(info.values()), info
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "options",
    [
        {"format": "mxfp4", "layout": "plain", "dialect": "compressed-tensors"},
        {"format": "nvfp4"},
        {"format": "mxfp8"},
        {"format": "fp8"},
        {"format": "fp8", "granularity": "channel"},
    ],
    ids=[
        "mxfp4-pack-quantized",
        "nvfp4-pack-quantized",
        "mxfp8-quantized",
        "float-quantized-tensor",
        "float-quantized-channel",
    ],
)
def test_compressed_tensors_decodes_our_weights_exactly(llama: Path, tmp_path: Path, options: dict[str, str]) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    convert(llama, tmp_path / "out", **options)
    expected = run(MODELS["llama"], load_llama(dequantized(tmp_path / "out", tmp_path / "plain")))
    model = load_llama(tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert relative_error(run(MODELS["llama"], model), expected) == 0


def test_transformers_own_fp8_reads_block_scales_exactly(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "out", format="fp8", granularity="block")
    expected = run(MODELS["llama"], load_llama(dequantized(tmp_path / "out", tmp_path / "plain")))
    assert relative_error(run(MODELS["llama"], load_llama(tmp_path / "out")), expected) == 0


@pytest.mark.parametrize("name", ["flux1", "flux2", "qwen-image"])
def test_diffusers_reads_a_rowwise_file_exactly(tmp_path: Path, name: str) -> None:
    diffusers = pytest.importorskip("diffusers", minversion="0.42")
    model = MODELS[name].build()
    save(MODELS[name], model, tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "out", format="fp8", granularity="channel")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    dtype = {"torch_dtype": torch.bfloat16}
    plain = type(model).from_pretrained(dequantized(tmp_path / "out", tmp_path / "plain"), **dtype)
    loaded = type(model).from_single_file(
        str(file), config=str(tmp_path / "out"), quantization_config=diffusers.BFLQuantizationConfig(), **dtype
    )
    assert sum(type(module).__name__ == "BFLFP8RLinear" for module in loaded.modules()) > 0
    assert relative_error(run(MODELS[name], loaded), run(MODELS[name], plain)) == 0


def test_from_pretrained_on_a_rowwise_folder_fails_instead_of_dropping_the_scales(tmp_path: Path) -> None:
    model = MODELS["flux1"].build()
    save(MODELS["flux1"], model, tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "out", format="fp8", granularity="channel")
    with pytest.raises(OSError, match="no file named"):
        type(model).from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_diffusers_without_a_plug_in_refuses_our_folders_loudly(tmp_path: Path, weight_format: str) -> None:
    model = MODELS["flux1"].build()
    save(MODELS["flux1"], model, tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "out", format=weight_format)
    with pytest.raises(ValueError, match="Unknown quantization type"):
        type(model).from_pretrained(tmp_path / "out")
