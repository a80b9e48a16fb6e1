"""Text encoders of pipelines: converted by name, loaded under the names that transformers gives them, assembled."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from convert_ckpt import api
from run_ckpt import load_quantized
from run_ckpt.contract.errors import UsageError
from run_ckpt.loading.linear import QuantizedLinear
from run_ckpt.progress import Silent
from run_ckpt.storage.components import find_components
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.assemble import assemble
from run_ckpt.tools.rewrite.dequantize import dequantize
from run_ckpt.tools.verify.component import verify_output
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, load_all
from tests.converted import make_linear
from tests.hub_fixtures import convert_remote, hub
from tests.hub_server import HubServer, read_files
from tests.pipelines import make_pipeline

__all__ = ["hub"]
_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def _qwen() -> nn.Module:
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 256}
    text = {**_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _gemma() -> nn.Module:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=_TEXT, vision_config={**vision, "image_size": 28})
    return transformers.Gemma3ForConditionalGeneration(config)


def _mistral() -> nn.Module:
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.Mistral3Config(
        text_config={**_TEXT, "model_type": "mistral"}, vision_config={**vision, "num_attention_heads": 2}
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def _gemma2() -> nn.Module:
    return transformers.Gemma2Model(transformers.Gemma2Config(**_TEXT))


MODELS = {"qwen2.5-vl": _qwen, "gemma3": _gemma, "mistral3": _mistral, "gemma2": _gemma2}


@pytest.fixture(scope="module", params=MODELS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the names that save_pretrained gives, as published ones have them."""
    folder = tmp_path_factory.mktemp(request.param) / "in"
    torch.manual_seed(0)
    MODELS[request.param]().bfloat16().save_pretrained(folder)
    return folder


def hidden_states(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(input_ids=torch.arange(8)[None], output_hidden_states=True, use_cache=False)
    return torch.cat([state.float() for state in output.hidden_states])


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_a_language_model_with_a_vision_tower_runs_as_its_decoded_weights_do(
    source: Path, tmp_path: Path, weight_format: str
) -> None:
    convert(source, tmp_path / "out", format=weight_format)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.recipe["preset"] == "dense-llm"
    assert len(manifest.layers) == 2 * 7
    assert verify_output(tmp_path / "out", source, Silent())[0].faults == ()
    dequantize(tmp_path / "out", tmp_path / "plain", dtype="bfloat16", progress=Silent())
    model_class = getattr(transformers, manifest.recipe["class_name"])
    plain = model_class.from_pretrained(tmp_path / "plain", dtype="auto")
    loaded = load_quantized(tmp_path / "out")
    assert sum(isinstance(module, QuantizedLinear) for module in loaded.modules()) == 14
    assert_bits_equal(hidden_states(loaded), hidden_states(plain))


@pytest.mark.usefixtures("own_tables")
def test_from_pretrained_and_save_pretrained_keep_the_names(source: Path, tmp_path: Path) -> None:
    from run_ckpt.integrations.transformers import register

    register()
    convert(source, tmp_path / "out", format="mxfp4")
    model_class = getattr(transformers, read_manifest(tmp_path / "out").recipe["class_name"])
    model = model_class.from_pretrained(tmp_path / "out", dtype="auto")
    assert_bits_equal(hidden_states(model), hidden_states(load_quantized(tmp_path / "out")))
    model.save_pretrained(tmp_path / "saved")
    assert load_all(tmp_path / "saved").keys() == load_all(tmp_path / "out").keys()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipeline") / "base")


def test_text_encoders_are_converted_where_they_are_named(pipeline: Path, tmp_path: Path) -> None:
    convert_remote(str(pipeline), tmp_path / "usual", format="fp8")
    assert find_components(tmp_path / "usual").keys() == {"transformer"}
    convert_remote(str(pipeline), tmp_path / "out", format="fp8", components=("transformer", "text_encoder*"))
    found = find_components(tmp_path / "out")
    presets = {name: read_manifest(path).recipe["preset"] for name, path in found.items()}
    assert presets == {"text_encoder": "text-encoder", "text_encoder_2": "text-encoder", "transformer": "flux1"}
    assert all(report.faults == () for report in verify_output(tmp_path / "out", pipeline, Silent()))
    with pytest.raises(
        UsageError, match=r"--component vae: not in SOURCE\. Its components: text_encoder, text_encoder_2"
    ):
        convert_remote(str(pipeline), tmp_path / "no", format="fp8", components=("vae",))


@pytest.mark.usefixtures("own_tables")
@pytest.mark.parametrize("by", ["assemble", "--whole-pipeline"])
def test_a_pipeline_of_converted_transformer_and_text_encoders_loads_as_it_is(
    pipeline: Path, tmp_path: Path, by: str
) -> None:
    from diffusers import DiffusionPipeline

    import run_ckpt.integrations.diffusers
    import run_ckpt.integrations.transformers

    run_ckpt.integrations.diffusers.register()
    run_ckpt.integrations.transformers.register()
    named = ("transformer", "text_encoder*")
    if by == "assemble":
        convert_remote(str(pipeline), tmp_path / "out", format="fp8", components=named)
        assemble(tmp_path / "out", tmp_path / "whole", str(pipeline))
    else:
        for _ in range(2):  # the second time nothing is left to do
            api.convert(pipeline, tmp_path / "whole", format="fp8", component=named, whole_pipeline=True)
        assert all(report.faults == () for report in verify_output(tmp_path / "whole", pipeline, Silent()))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "whole", torch_dtype=torch.bfloat16)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        assert any(isinstance(module, QuantizedLinear) for module in getattr(loaded, name).modules())
    image = loaded("a cat", height=32, width=32, num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 32, 32, 3)


def test_a_whole_pipeline_is_asked_of_a_pipeline_only(tmp_path: Path) -> None:
    source = make_linear(tmp_path / "in", 256, 256)
    with pytest.raises(UsageError, match=r"in: no model_index\.json, so it is no pipeline"):
        api.convert(source, tmp_path / "out", format="fp8", whole_pipeline=True)
    assert not (tmp_path / "out").exists()


def test_the_rest_of_a_pipeline_on_the_hub_is_linked_from_its_cache(
    hub: HubServer, pipeline: Path, tmp_path: Path
) -> None:
    hub.add_repo("me/pipeline", read_files(pipeline))
    api.convert("me/pipeline", tmp_path / "out", format="fp8", whole_pipeline=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in pipeline.iterdir()}
    assert (tmp_path / "out" / "vae").resolve().is_relative_to(tmp_path / "hub-cache")
