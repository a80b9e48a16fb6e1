"""Files under BFL's, ComfyUI's and Wan's names: as diffusers' own converters read them, with the bytes of its form."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanAnimateTransformer3DModel, WanVACETransformer3DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert_ckpt.source.component import open_component
from convert_ckpt.source.original import Original, originals
from run_ckpt import load_quantized
from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.module_names import fill_pattern, pattern_regex
from run_ckpt.progress import Silent
from run_ckpt.storage.hashing import hash_path
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.storage.reader import TensorReader
from run_ckpt.tools.verify.component import verify_output
from tests.bits import assert_bits_equal
from tests.checkpoints import convert, load_all, save_checkpoint
from tests.converted import edit_manifest
from tests.models import MODELS, ModelCase, run

PREFIX = "model.diffusion_model."
CONVERTERS = {
    "FluxTransformer2DModel": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "Flux2Transformer2DModel": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    "ZImageTransformer2DModel": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "WanTransformer3DModel": single_file_utils.convert_wan_transformer_to_diffusers,
    "WanVACETransformer3DModel": single_file_utils.convert_wan_transformer_to_diffusers,
    "WanAnimateTransformer3DModel": single_file_utils.convert_wan_transformer_to_diffusers,
    "HunyuanVideoTransformer3DModel": single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
    "LTX2VideoTransformer3DModel": single_file_utils.convert_ltx2_transformer_to_diffusers,
    # SINGLE_FILE_LOADABLE_CLASSES maps it to itself.
    "QwenImageTransformer2DModel": lambda checkpoint: checkpoint,
}
CASES = ("flux1", "flux2", "z-image", "qwen-image", "wan-2.2", "wan-2.1-i2v", "hunyuan-video", "ltx2")
# What no shape tells, and all published models of a class have.
AS_PUBLISHED = {
    "WanTransformer3DModel": {"num_attention_heads": 2, "attention_head_dim": 128},
    "LTX2VideoTransformer3DModel": {
        "num_attention_heads": 32,
        "attention_head_dim": 8,
        "audio_num_attention_heads": 32,
        "audio_attention_head_dim": 4,
        "rope_type": "split",
    },
}
# Z-Image's table of positions, and Wan's, is longer than the small model's, with the same entries.
UNTOLD = {"axes_lens", "rope_max_seq_len"}
_LTX_2_3 = {
    **{f"{stream}{key}": True for stream in ("", "audio_") for key in ("gated_attn", "cross_attn_mod")},
    "caption_channels": 3840,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ltx-2.3": ("ltx2", _LTX_2_3),
    "ltx-2.5": ("ltx2", {**_LTX_2_3, "ff_bias": False, "use_keyframes_abs_pos_embedding": True}),
    "wan-vace": ("wan-2.2", {"vace_layers": [0, 1], "vace_in_channels": 24, "rope_max_seq_len": 1024}),
    "wan-animate": (
        "wan-2.1-i2v",
        {
            "in_channels": 12,
            "latent_channels": 4,
            "rope_max_seq_len": 1024,
            "motion_encoder_channel_sizes": {str(2**power): 8 + power for power in range(9, 1, -1)},
            "motion_encoder_size": 512,
            "motion_style_dim": 24,
            "motion_dim": 6,
            "motion_encoder_dim": 40,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
    ),
    "wan-2.1-flf2v": ("wan-2.1-i2v", {"pos_embed_seq_len": 514, "rope_max_seq_len": 1024}),
}
# ComfyUI's mark: a tensor without values.
MARK_OF_EDIT_2511 = {"__index_timestep_zero__": torch.tensor([])}
KINDS = {"vace_layers": WanVACETransformer3DModel, "motion_encoder_size": WanAnimateTransformer3DModel}
# Renamed by diffusers' scripts, not its package (convert_ltx2_to_diffusers.py, convert_wan_to_diffusers.py; 58eb52c).
BY_SCRIPT = {
    "prompt_adaln_single": "prompt_adaln",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}


def map_of(class_name: str) -> Original:
    found = (original for original in originals() if original.class_name == class_name)
    return next(original for original in found if not original.also_with_config)


def to_original(state: dict[str, Tensor], original: Original) -> dict[str, Tensor]:
    """Undo a map: whether its names are the right ones is for diffusers' converter to say."""
    renamed = {}
    for name in state:
        matches = ((rule, pattern_regex(rule.targets[0]).fullmatch(name)) for rule in original.rules if rule.targets)
        for rule, match in matches:
            if match:
                parts = [state[fill_pattern(target, match.groups())] for target in rule.targets]
                parts = [*parts[0].chunk(2)][::-1] if rule.is_swapped else parts
                whole = torch.cat(parts) if len(parts) > 1 else parts[0]
                stored_as = fill_pattern(rule.pattern, match.groups())
                is_wide = "net_app" in stored_as and stored_as.endswith(".bias")
                renamed[stored_as] = whole.reshape(1, -1, 1, 1) if is_wide else whole
                break
    return renamed


def thin_state(case: ModelCase) -> dict[str, Tensor]:
    """Return what a model as wide as FLUX.1 would hold, but for its columns: two converters cut at row 3072."""
    model = case.build()
    sizes: dict[str, Any] = {"num_attention_heads": 48}
    with init_empty_weights():
        wide = type(model).from_config({**model.config, **sizes})
    return {
        name: torch.randn(tensor.shape[0], *(min(size, 3) for size in tensor.shape[1:])).bfloat16()
        for name, tensor in wide.state_dict().items()
    }


def save_original(case: ModelCase, model: torch.nn.Module, path: Path, prefix: str = "") -> Path:
    tensors = to_original(model.state_dict(), map_of(type(model).__name__))
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(
    ("name", "prefix"), [*((name, "") for name in CASES), ("z-image", PREFIX), ("wan-2.2", "diffusion_model.")]
)
def test_the_tensors_are_those_of_diffusers_own_converter(tmp_path: Path, name: str, prefix: str) -> None:
    case = MODELS[name]
    model = case.build()
    class_name = type(model).__name__
    state = thin_state(case) if name in ("flux1", "hunyuan-video") else model.state_dict()
    original = to_original(state, map_of(class_name))
    save_file({prefix + key: tensor.contiguous() for key, tensor in original.items()}, tmp_path / "it.safetensors")
    expected = CONVERTERS[class_name](dict(original))
    source = open_component(tmp_path / "it.safetensors")
    assert source.class_name == class_name
    assert {view.spec.name: view.spec.shape for view in source.views} == {
        k: tuple(v.shape) for k, v in expected.items()
    }
    with TensorReader(source.folder, source.views) as reader:
        for key, tensor in expected.items():
            assert_bits_equal(reader.read_all(key), tensor.contiguous().reshape(-1).view(torch.uint8))
    assert expected.keys() == state.keys()


def as_published(case: ModelCase, **changes: Any) -> torch.nn.Module:
    """Return the model with what no shape tells as all published ones have it; with changes, with new weights."""
    model = case.build()
    published = AS_PUBLISHED.get(type(model).__name__, {})
    if not published and not changes:
        return model
    torch.manual_seed(1)
    config = {key: value for key, value in model.config.items() if key[0] != "_"}
    kind = next((KINDS[name] for name in changes if name in KINDS), type(model))
    other = kind.from_config({**config, **published, **changes})
    if not changes:
        other.load_state_dict(model.state_dict())
    return other.to(torch.bfloat16).eval()


@pytest.mark.parametrize(("name", "changes"), VARIANTS.values(), ids=VARIANTS.keys())
def test_shapes_tell_the_config_of_later_versions(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    case = MODELS[name]
    model = as_published(case, **changes)
    class_name = type(model).__name__
    file = save_original(case, model, tmp_path / "it.safetensors", PREFIX)
    source = open_component(file)
    assert source.config
    assert json.loads(model.to_json_string()).items() >= source.config.items()
    expected = CONVERTERS[class_name](load_file(file))
    for name, ours in BY_SCRIPT.items():
        expected = {key.replace(name, ours): tensor for key, tensor in expected.items()}
    assert {view.spec.name: view.spec.shape for view in source.views} == {
        key: tuple(tensor.shape) for key, tensor in expected.items()
    }
    type(model).from_config(source.config).load_state_dict(expected)


def test_animate_with_biases_as_wide_as_images_gives_the_bytes_of_diffusers_form(tmp_path: Path) -> None:
    name, changes = VARIANTS["wan-animate"]
    model = as_published(MODELS[name], **changes)
    file = save_original(MODELS[name], model, tmp_path / "it.safetensors")
    model.save_pretrained(tmp_path / "diffusers")
    blur = {"motion_encoder.enc.net_app.convs.1.conv2.0.kernel": torch.ones(4, 4)}
    save_file(load_file(file) | blur, file)
    convert(file, tmp_path / "out", format="fp8", preset=None)
    convert(tmp_path / "diffusers", tmp_path / "expected", format="fp8")
    ours, theirs = (load_all(tmp_path / folder) for folder in ("out", "expected"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert_bits_equal(ours[key], tensor)
    assert verify_output(tmp_path / "out", file, Silent())[0].faults == ()


@pytest.mark.parametrize(
    ("changes", "marks"),
    [({"use_additional_t_cond": True, "use_layer3d_rope": True}, {}), ({"zero_cond_t": True}, MARK_OF_EDIT_2511)],
    ids=["layered", "edit-2511"],
)
def test_versions_of_qwen_image_are_told_without_config(
    tmp_path: Path, changes: dict[str, bool], marks: dict[str, Tensor]
) -> None:
    model = as_published(MODELS["qwen-image"], **changes)
    file = tmp_path / "qwen.safetensors"
    save_file(model.state_dict() | marks, file)
    source = open_component(file)
    assert {view.spec.name for view in source.views} == model.state_dict().keys()
    assert source.config
    assert json.loads(model.to_json_string()).items() >= source.config.items()
    convert(file, tmp_path / "out", format="fp8", preset=None)
    assert verify_output(tmp_path / "out", file, Silent())[0].faults == ()


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
@pytest.mark.parametrize("name", CASES)
def test_the_result_is_that_of_diffusers_form(tmp_path: Path, name: str, weight_format: str) -> None:
    case = MODELS[name]
    model = as_published(case)
    file = save_original(case, model, tmp_path / "it.safetensors", PREFIX)
    model.save_pretrained(tmp_path / "diffusers")
    convert(file, tmp_path / "out", format=weight_format, preset=None)
    convert(tmp_path / "diffusers", tmp_path / "expected", format=weight_format)
    (ours,), (theirs,) = ((tmp_path / folder).glob("*.safetensors") for folder in ("out", "expected"))
    assert ours.name == theirs.name
    assert ours.read_bytes() == theirs.read_bytes()
    config, expected = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("out", "expected"))
    assert {key: expected[key] for key in config.keys() - UNTOLD} == {
        key: config[key] for key in config.keys() - UNTOLD
    }
    assert_bits_equal(run(case, load_quantized(tmp_path / "out")), run(case, load_quantized(tmp_path / "expected")))
    (report,) = verify_output(tmp_path / "out", file, Silent())
    assert report.faults == ()
    assert read_manifest(tmp_path / "out").source["files"]["it.safetensors"]["blake3"] == hash_path(file)


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    return save_original(MODELS["flux1"], MODELS["flux1"].build(), tmp_path / "flux.safetensors", PREFIX)


def test_an_ltx2_file_gives_its_transformer_alone(tmp_path: Path) -> None:
    file = save_original(MODELS["ltx2"], MODELS["ltx2"].build(), tmp_path / "ltx2.safetensors", PREFIX)
    others = ("vae.decoder.conv_in.conv.weight", "audio_vae.decoder.conv_in.conv.weight", "vocoder.conv_pre.weight")
    others += (
        f"{PREFIX}video_embeddings_connector.learnable_registers",
        "text_embedding_projection.aggregate_embed.weight",
    )
    save_file(load_file(file) | {name: torch.ones(3, 3) for name in others}, file)
    source = open_component(file)
    assert {view.spec.name for view in source.views} == MODELS["ltx2"].build().state_dict().keys()
    assert source.notes[0].endswith("5 tensors have no place there")


def test_what_else_lies_in_the_file_is_left_out_and_hashed(flux: Path, tmp_path: Path) -> None:
    tensors = load_file(flux)
    others = {"vae.decoder.conv_in.weight": torch.ones(3, 3), "text_encoders.t5xxl.shared.weight": torch.ones(5, 7)}
    save_file(tensors | others, tmp_path / "all.safetensors")
    convert(flux, tmp_path / "expected", format="fp8", preset=None)
    convert(tmp_path / "all.safetensors", tmp_path / "out", format="fp8", preset=None)
    assert load_all(tmp_path / "out").keys() == load_all(tmp_path / "expected").keys()
    assert verify_output(tmp_path / "out", tmp_path / "all.safetensors", Silent())[0].faults == ()
    (note,) = open_component(tmp_path / "all.safetensors").notes
    assert note.startswith("read as FluxTransformer2DModel, with names and config.json as diffusers has them")
    assert note.endswith("2 tensors have no place there")


def test_verify_finds_a_changed_part_of_a_fused_tensor(flux: Path, tmp_path: Path) -> None:
    convert(flux, tmp_path / "out", format="mxfp4", preset=None)
    tensors = load_file(flux)
    tensors[f"{PREFIX}double_blocks.0.img_attn.qkv.weight"][300] += 1  # a row of k
    tensors[f"{PREFIX}final_layer.adaLN_modulation.1.bias"][0] += 1  # of shift, the lower half in diffusers
    save_file(tensors, flux)
    # As if the file had been the changed one all along, so that only its tensors can tell.
    entry = {"blake3": hash_path(flux)}
    edit_manifest(tmp_path / "out", lambda manifest: manifest["source"]["files"][flux.name].update(entry))
    faults = "\n".join(verify_output(tmp_path / "out", flux, Silent())[0].faults)
    assert "transformer_blocks.0.attn.to_k: SQNR" in faults
    assert "attn.to_q: SQNR" not in faults
    assert "norm_out.linear.bias: differs from the source from byte 512 on" in faults


def test_tensors_that_the_class_does_not_have_are_named(flux: Path, tmp_path: Path) -> None:
    strange = {f"{PREFIX}vace_blocks.{i}.proj.weight": torch.ones(2) for i in range(5)}
    save_file(load_file(flux) | strange, tmp_path / "strange.safetensors")
    with pytest.raises(FaultsError, match=r"vace_blocks\.0.*and 2 more: no tensors of FluxTransformer2DModel"):
        convert(tmp_path / "strange.safetensors", tmp_path / "out", format="fp8", preset=None)


def test_swapped_halves_are_only_copied(flux: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('preset = "flux1"\n[[rules]]\nmatch = "norm_out.linear"\nformat = "fp8"\n')
    convert(flux, tmp_path / "out", format="fp8", preset=None, recipe=recipe)
    assert "halves change places" in read_manifest(tmp_path / "out").kept["norm_out.linear.weight"].reason


def test_shards_under_other_names_are_converted_shard_by_shard(tmp_path: Path) -> None:
    """As in Wan-AI/Wan2.1-T2V-14B: an index, and a config.json in words of its own."""
    case = MODELS["wan-2.2"]
    tensors = to_original(case.build().state_dict(), map_of("WanTransformer3DModel"))
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[start::2]} for start in range(2)]
    config: dict[str, object] = {"_class_name": "WanModel", "model_type": "t2v", "dim": 256}
    source = save_checkpoint(tmp_path / "in", parts, config, "diffusion_pytorch_model")
    convert(source, tmp_path / "out", format="fp8", preset=None)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    assert verify_output(tmp_path / "out", source, Silent())[0].faults == ()
