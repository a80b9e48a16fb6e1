"""The whole conversion: what comes out of which checkpoint, in which dialect."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from run_ckpt.contract.codec import fp8_scale, quantize_fp8
from run_ckpt.contract.errors import FaultsError, NonFiniteError, UsageError
from run_ckpt.contract.formats import FP8, MXFP4
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from run_ckpt.storage.manifest_file import read_manifest
from tests.bits import assert_bits_equal
from tests.checkpoints import FLUX_DIGITS, convert, folder_bytes, load_all, random_weight, save_checkpoint
from tests.codec import expand_fp8_scale, quantize_mxfp4

LLM_CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
Z_IMAGE_CONFIG = {"_class_name": "ZImageTransformer2DModel"}


def block(prefix: str, N: int = 256, K: int = 256, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Return the linears of one Llama block."""
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    return {f"{prefix}.{name}.weight": random_weight(N, K, dtype, seed) for seed, name in enumerate(names)}


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    first = block("model.layers.0") | {"model.embed_tokens.weight": random_weight(512, 256)}
    second = block("model.layers.1") | {"model.norm.weight": torch.ones(256, dtype=torch.bfloat16)}
    return save_checkpoint(tmp_path / "llm", [first, second], LLM_CONFIG)


@pytest.mark.parametrize("layout", ["aiter", "plain"])
@pytest.mark.parametrize("scale_rule", ["even", "floor", "roundup", "mse"])
def test_mxfp4_tensors_are_the_references_bytes(llm: Path, tmp_path: Path, layout: str, scale_rule: str) -> None:
    convert(llm, tmp_path / "out", format="mxfp4", layout=layout, scale_rule=scale_rule)
    source, output = load_all(llm), load_all(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    codes, scales = quantize_mxfp4(source[f"{name}.weight"], scale_rule)
    if layout == "aiter":
        codes, scales = AITER_WEIGHT.shuffle(codes), AITER_SCALE.shuffle(AITER_SCALE.pad_to_tile(scales))
    assert_bits_equal(output[f"{name}.weight"], codes)
    assert_bits_equal(output[f"{name}.weight_scale"], scales)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["F16", "F32"])
@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_wider_sources_are_quantized_from_their_own_values(
    tmp_path: Path, dtype: torch.dtype, weight_format: str
) -> None:
    weight = random_weight(256, 512, dtype)
    source = save_checkpoint(tmp_path / "in", [{"blocks.0.proj.weight": weight}], {})
    convert(source, tmp_path / "out", format=weight_format, dialect="mxfp4" if weight_format == "mxfp4" else "fp8")
    output = load_all(tmp_path / "out")
    if weight_format == "mxfp4":
        expected = AITER_WEIGHT.shuffle(quantize_mxfp4(weight, "even")[0])
        assert not torch.equal(expected, AITER_WEIGHT.shuffle(quantize_mxfp4(weight.bfloat16(), "even")[0]))
    else:
        expected = quantize_fp8(weight, fp8_scale(weight.abs().amax()))
    assert_bits_equal(output["blocks.0.proj.weight"], expected)


def test_per_tensor_fp8_shares_one_scale_of_shape_1_in_a_group_across_shards(tmp_path: Path) -> None:
    weights = block("model.layers.0")
    q, rest = {}, dict(weights)
    q["model.layers.0.self_attn.q_proj.weight"] = rest.pop("model.layers.0.self_attn.q_proj.weight") * 3
    source = save_checkpoint(tmp_path / "in", [q, rest], LLM_CONFIG)
    convert(source, tmp_path / "out", format="fp8")
    output, original = load_all(tmp_path / "out"), load_all(source)
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    amax = torch.stack([original[f"{name}.weight"].abs().amax() for name in names]).amax()
    for name in names:
        assert_bits_equal(output[f"{name}.weight_scale"], fp8_scale(amax.reshape(1)))
        assert_bits_equal(output[f"{name}.weight"], quantize_fp8(original[f"{name}.weight"], fp8_scale(amax)))
    alone = original["model.layers.0.self_attn.o_proj.weight"].abs().amax().reshape(1)
    assert_bits_equal(output["model.layers.0.self_attn.o_proj.weight_scale"], fp8_scale(alone))


def test_channel_fp8_has_one_scale_per_row(llm: Path, tmp_path: Path) -> None:
    convert(llm, tmp_path / "out", format="fp8", granularity="channel")
    source, output = load_all(llm), load_all(tmp_path / "out")
    name = "model.layers.1.mlp.gate_proj"
    scale = fp8_scale(source[f"{name}.weight"].abs().amax(1, keepdim=True))
    assert_bits_equal(output[f"{name}.weight_scale"], scale)  # compressed-tensors wants [N, 1]
    assert_bits_equal(output[f"{name}.weight"], quantize_fp8(source[f"{name}.weight"], scale))


def test_block_fp8_has_one_scale_per_128_x_128_also_at_ragged_edges(tmp_path: Path) -> None:
    weight = random_weight(400, 272)
    source = save_checkpoint(tmp_path / "in", [{"blocks.0.proj.weight": weight}], {})
    convert(source, tmp_path / "out", format="fp8", granularity="block")
    output = load_all(tmp_path / "out")
    padded = torch.zeros(512, 384).index_put((torch.arange(400)[:, None], torch.arange(272)), weight.float())
    amax = padded.abs().reshape(4, 128, 3, 128).amax((1, 3))
    assert_bits_equal(output["blocks.0.proj.weight_scale_inv"], fp8_scale(amax))
    expanded = expand_fp8_scale(fp8_scale(amax), 400, 272)
    assert_bits_equal(output["blocks.0.proj.weight"], quantize_fp8(weight, expanded))


def test_everything_not_quantized_is_copied_bit_for_bit_in_its_own_dtype(tmp_path: Path) -> None:
    others = {
        "model.norm.weight": torch.tensor([float("nan"), -0.0, 1.0], dtype=torch.float16),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(256),
        "model.steps": torch.tensor(7),
        "model.mask": torch.tensor([True, False]),
        "model.empty": torch.zeros(0, 4),
        "model.conv.weight": torch.randn(3, 4, 5, 6, dtype=torch.bfloat16),
        "model.embed_tokens.weight": random_weight(512, 256),
    }
    source = save_checkpoint(tmp_path / "in", [block("model.layers.0") | others], LLM_CONFIG)
    convert(source, tmp_path / "out", format="fp8")
    output = load_all(tmp_path / "out")
    for name, tensor in others.items():
        assert_bits_equal(output[name], tensor)


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_z_image_gets_the_fused_scales_that_sglang_looks_for(tmp_path: Path, granularity: str) -> None:
    names = ["attention.to_q", "attention.to_k", "attention.to_v", "feed_forward.w1", "feed_forward.w3"]
    weights = {f"layers.0.{name}.weight": random_weight(256, 256, seed=i) for i, name in enumerate(names)}
    source = save_checkpoint(tmp_path / "in", [weights], Z_IMAGE_CONFIG)
    convert(source, tmp_path / "out", format="fp8", granularity=granularity)
    output = load_all(tmp_path / "out")
    scale = "weight_scale" if granularity == "tensor" else "weight_scale_inv"
    w13 = [output[f"layers.0.feed_forward.{name}.{scale}"] for name in ("w1", "w3")]
    assert_bits_equal(output[f"layers.0.feed_forward.w13.{scale}"], torch.cat(w13))
    qkv = [output[f"layers.0.attention.to_{name}.{scale}"] for name in "qkv"]
    if granularity == "tensor":
        assert_bits_equal(output[f"layers.0.attention.to_qkv.{scale}"], torch.cat(qkv))
    else:
        assert f"layers.0.attention.to_qkv.{scale}" not in output


def test_z_image_in_nvfp4_gets_both_levels_of_fused_scales(tmp_path: Path) -> None:
    names = ["attention.to_q", "attention.to_k", "attention.to_v", "feed_forward.w1", "feed_forward.w3"]
    weights = {f"layers.0.{name}.weight": random_weight(256, 256, seed=i) for i, name in enumerate(names)}
    source = save_checkpoint(tmp_path / "in", [weights], Z_IMAGE_CONFIG)
    convert(source, tmp_path / "out", format="nvfp4")
    output = load_all(tmp_path / "out")
    for fused, members in {"attention.to_qkv": names[:3], "feed_forward.w13": names[3:]}.items():
        for scale in ("weight_scale", "weight_scale_2"):
            parts = [output[f"layers.0.{name}.{scale}"] for name in members]
            assert_bits_equal(output[f"layers.0.{fused}.{scale}"].view(torch.uint8), torch.cat(parts).view(torch.uint8))
        amax = max(weights[f"layers.0.{name}.weight"].float().abs().max() for name in members)
        assert output[f"layers.0.{fused}.weight_scale_2"].tolist() == [(amax / 2688).item()] * len(members)


@pytest.mark.parametrize("swap", [False, True])
def test_nvfp4_says_what_sglang_reads_and_nothing_that_it_makes_up(tmp_path: Path, swap: bool) -> None:
    source = save_checkpoint(
        tmp_path / "in", [{"layers.0.attention.to_out.0.weight": random_weight(64, 64)}], Z_IMAGE_CONFIG
    )
    convert(source, tmp_path / "out", format="nvfp4", swap_weight_nibbles=swap)
    declared = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    del declared["convert_ckpt"]
    assert declared == {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "quant_type": "NVFP4",
        "group_size": 16,
        "ignore": [],
        "swap_weight_nibbles": swap,
        "dynamic_input_scale": True,
    }


def test_nvfp4_of_flux2_is_not_written_for_sglang_which_would_swap_its_last_modulation(tmp_path: Path) -> None:
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"]
    weights = {f"{name}.weight": random_weight(256, 256, seed=i) for i, name in enumerate(names)}
    source = save_checkpoint(tmp_path / "in", [weights], {"_class_name": "Flux2Transformer2DModel"})
    with pytest.raises(FaultsError, match=r"SGLang exchanges the halves of norm_out\.linear.*--dialect mxfp4"):
        convert(source, tmp_path / "out", format="nvfp4")
    convert(source, tmp_path / "out", format="nvfp4", dialect="mxfp4")
    assert "sglang" in read_manifest(tmp_path / "out").targets


def test_nibbles_that_no_consumer_swaps_are_refused(llm: Path, tmp_path: Path) -> None:
    for options in ({"format": "fp8"}, {"format": "nvfp4"}):
        with pytest.raises(UsageError, match="--swap-weight-nibbles: is for NVFP4"):
            convert(llm, tmp_path / "out", swap_weight_nibbles=True, **options)


def test_nvfp4_language_models_are_not_written_for_readers_that_want_an_input_scale(llm: Path, tmp_path: Path) -> None:
    with pytest.raises(FaultsError, match=r"dialect modelopt: .*input_scale.*--dialect compressed-tensors"):
        convert(llm, tmp_path / "out", format="nvfp4", dialect="modelopt")
    convert(llm, tmp_path / "out", format="nvfp4")
    assert read_manifest(tmp_path / "out").dialect == "compressed-tensors"


def test_calibration_gives_static_modelopt_fp8_with_one_input_scale_per_group(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "in", [block("model.layers.0")], LLM_CONFIG)
    modules = [name.removesuffix(".weight") for name in load_all(source)]
    amax = {f"{module}.input_amax": torch.tensor([float(i + 1)]) for i, module in enumerate(modules)}
    save_file(amax, tmp_path / "amax.safetensors")
    convert(source, tmp_path / "out", format="fp8", calibration=tmp_path / "amax.safetensors")
    output = load_all(tmp_path / "out")
    group = max(amax[f"model.layers.0.self_attn.{p}_proj.input_amax"] for p in "qkv")
    for p in "qkv":
        assert_bits_equal(output[f"model.layers.0.self_attn.{p}_proj.input_scale"], group / 448)
    declared = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {key: declared[key] for key in ("quant_method", "quant_algo", "quant_type")} == {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "quant_type": "FP8",
    }


def test_a_layer_without_calibration_is_an_error_that_names_it(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "in", [block("model.layers.0")], LLM_CONFIG)
    save_file({"model.layers.0.self_attn.q_proj.input_amax": torch.ones(1)}, tmp_path / "amax.safetensors")
    with pytest.raises(FaultsError, match=r"k_proj: amax.safetensors holds no .*k_proj.input_amax"):
        convert(source, tmp_path / "out", format="fp8", calibration=tmp_path / "amax.safetensors")
    assert not (tmp_path / "out").exists()


def test_no_input_scale_is_invented(llm: Path, tmp_path: Path) -> None:
    convert(llm, tmp_path / "out", format="fp8")
    assert not [name for name in load_all(tmp_path / "out") if "input_scale" in name]


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"format": "mxfp4"}, "mxfp4"),
        ({"format": "mxfp4", "layout": "plain"}, "quark"),
        ({"format": "mxfp4", "layout": "plain", "dialect": "compressed-tensors"}, "compressed-tensors"),
        ({"format": "fp8"}, "compressed-tensors"),
        ({"format": "fp8", "dialect": "quark"}, "quark"),
        ({"format": "fp8", "granularity": "block"}, "fp8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_dense_llms_get_a_dialect_that_their_consumers_read(
    llm: Path, tmp_path: Path, options: dict[str, str], method: str
) -> None:
    convert(llm, tmp_path / "out", **options)
    declared = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert declared["quant_method"] == method


def test_every_safetensors_metadata_is_format_pt_alone(llm: Path, tmp_path: Path) -> None:
    convert(llm, tmp_path / "out", format="mxfp4")
    for path in (tmp_path / "out").glob("*.safetensors"):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert header["__metadata__"] == {"format": "pt"}


def test_the_index_lists_every_tensor_and_the_sum_of_their_bytes(llm: Path, tmp_path: Path) -> None:
    convert(llm, tmp_path / "out", format="fp8")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    output = load_all(tmp_path / "out")
    assert set(index["weight_map"]) == set(output)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in output.values())


def test_the_manifest_holds_the_hash_and_size_of_every_other_file_and_of_the_source(llm: Path, tmp_path: Path) -> None:
    convert(llm, tmp_path / "out", format="mxfp4")
    manifest = read_manifest(tmp_path / "out")
    written = folder_bytes(tmp_path / "out")
    written.pop("quantization_manifest.json")

    def describe(data: bytes) -> dict[str, object]:
        return {"nbytes": len(data), "blake3": blake3(data).hexdigest()}

    assert manifest.files == {name: describe(data) for name, data in written.items()}
    shards = {p.name: describe(p.read_bytes()) for p in llm.glob("*.safetensors")}
    assert manifest.source == {"name": "llm", "revision": None, "files": shards}


def test_sqnr_and_largest_error_are_what_float64_says(llm: Path, tmp_path: Path) -> None:
    convert(llm, tmp_path / "out", format="fp8", granularity="channel")
    weight = load_all(llm)["model.layers.0.mlp.gate_proj.weight"]
    scale = fp8_scale(weight.abs().amax(1, keepdim=True))
    error = weight.float() - quantize_fp8(weight, scale).float() * scale
    sqnr = 10 * torch.log10(weight.double().square().sum() / error.double().square().sum())
    layer = read_manifest(tmp_path / "out").layers["model.layers.0.mlp.gate_proj"]
    assert layer.sqnr_db == round(sqnr.item(), 2)
    assert layer.max_abs_error == error.abs().max().item()


def test_an_exactly_representable_weight_has_no_sqnr_and_no_error(tmp_path: Path) -> None:
    weight = torch.full((256, 256), 6.0, dtype=torch.bfloat16)
    source = save_checkpoint(tmp_path / "in", [{"blocks.0.proj.weight": weight}], {})
    convert(source, tmp_path / "out", format="mxfp4")
    layer = read_manifest(tmp_path / "out").layers["blocks.0.proj"]
    assert (layer.sqnr_db, layer.max_abs_error) == (None, 0.0)


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "-inf"])
def test_a_weight_that_is_not_finite_stops_the_run_and_is_named_with_its_first_index(
    tmp_path: Path, weight_format: str, value: float
) -> None:
    weight = random_weight(256, 512)
    weight[200, 17] = weight[201, 3] = value
    source = save_checkpoint(tmp_path / "in", [{"blocks.0.proj.weight": weight}], {})
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.proj\.weight\[200, 17\]"):
        convert(source, tmp_path / "out", format=weight_format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale_rule", ["even", "roundup"])
def test_a_weight_whose_code_decodes_beyond_float32_is_refused(tmp_path: Path, scale_rule: str) -> None:
    weight = random_weight(256, 256)
    weight[3, 5] = 3.3e38
    source = save_checkpoint(tmp_path / "in", [{"blocks.0.proj.weight": weight}], {})
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.proj\.weight: its largest magnitude"):
        convert(source, tmp_path / "out", format="mxfp4", scale_rule=scale_rule)


@pytest.mark.parametrize("n_workers", [1, 2, 4])
@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, n_workers: int, weight_format: str) -> None:
    convert(FLUX_DIGITS, tmp_path / "one", 1, format=weight_format)
    convert(FLUX_DIGITS, tmp_path / "many", n_workers, format=weight_format)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "many")


def test_slabs_smaller_than_a_tensor_write_the_same_tensors(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(llm, tmp_path / "whole", format="fp8")
    monkeypatch.setattr("convert_ckpt.run.schedule.SLAB_NBYTES", 32 * 256 * 2)
    convert(llm, tmp_path / "slabs", format="fp8")
    whole, slabs = folder_bytes(tmp_path / "whole"), folder_bytes(tmp_path / "slabs")
    assert whole == slabs


def test_a_pipeline_folder_converts_every_transformer_into_its_own_folder(tmp_path: Path) -> None:
    pipeline = tmp_path / "wan"
    for name in ("transformer", "transformer_2"):
        weights = {"blocks.0.attn1.to_q.weight": random_weight(256, 256, seed=len(name))}
        config = {"_class_name": "WanTransformer3DModel"}
        save_checkpoint(pipeline / name, [weights], config, "diffusion_pytorch_model")
    (pipeline / "model_index.json").write_text("{}")
    convert(pipeline, tmp_path / "out", format="mxfp4")
    first, second = (load_all(tmp_path / "out" / name) for name in ("transformer", "transformer_2"))
    assert not torch.equal(first["blocks.0.attn1.to_q.weight"], second["blocks.0.attn1.to_q.weight"])
    assert read_manifest(tmp_path / "out" / "transformer_2").source["name"] == "transformer_2"


def test_one_safetensors_file_converts_to_a_folder_with_a_file_of_that_name(tmp_path: Path) -> None:
    save_file({"blocks.0.proj.weight": random_weight(256, 256)}, tmp_path / "flux.safetensors")
    convert(tmp_path / "flux.safetensors", tmp_path / "out", format="mxfp4")
    assert set(folder_bytes(tmp_path / "out")) == {"config.json", "flux.safetensors", "quantization_manifest.json"}


def test_small_files_come_along_and_other_weights_stay_behind(llm: Path, tmp_path: Path) -> None:
    (llm / "tokenizer.json").write_text("{}")
    (llm / "pytorch_model.bin").write_bytes(b"0")
    convert(llm, tmp_path / "out", format="mxfp4")
    names = set(folder_bytes(tmp_path / "out"))
    assert "tokenizer.json" in names
    assert "pytorch_model.bin" not in names


def test_the_source_is_left_as_it_was(llm: Path, tmp_path: Path) -> None:
    before = folder_bytes(llm)
    convert(llm, tmp_path / "out", format="mxfp4")
    assert folder_bytes(llm) == before


def test_a_rowwise_file_carries_its_declaration_in_the_header_and_none_in_config(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "out", format="fp8", granularity="channel")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    data = path.read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    declared = json.loads(metadata["_quantization_metadata"])
    scaled = {name.removesuffix(".weight_scale") for name in load_all(tmp_path / "out") if "weight_scale" in name}
    assert set(declared["layers"]) == scaled
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_ignoring_one_member_of_a_fused_group_keeps_them_all_and_says_why(llm: Path, tmp_path: Path) -> None:
    convert(llm, tmp_path / "out", format="mxfp4", ignore=("model.layers.0.self_attn.q_proj",))
    manifest = read_manifest(tmp_path / "out")
    assert "model.layers.0.self_attn.k_proj" not in manifest.layers
    reason = manifest.kept["model.layers.0.self_attn.k_proj.weight"].reason
    assert reason == "fused with model.layers.0.self_attn.q_proj, which is kept"


def test_a_recipe_may_mix_formats(llm: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rules]]\nmatch = "*.o_proj"\nformat = "fp8"\n')
    convert(llm, tmp_path / "out", format="mxfp4", recipe=recipe)
    layers = read_manifest(tmp_path / "out").layers
    assert layers["model.layers.0.self_attn.o_proj"].format == FP8
    assert layers["model.layers.0.self_attn.q_proj"].format == MXFP4


def test_a_recipe_that_makes_all_layers_fp8_is_declared_as_fp8(llm: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rules]]\nmatch = "*"\nformat = "fp8"\n')
    convert(llm, tmp_path / "out", format="mxfp4", recipe=recipe)
    declared = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert declared["format"] == "float-quantized"
    assert declared["config_groups"]["group_0"]["weights"]["num_bits"] == 8


USAGE_FAULTS = {
    "pattern matches nothing": ({"format": "mxfp4", "ignore": ("nothing.*",)}, "nothing.*: matches no linear"),
    "unknown format": ({"format": "int8"}, "--format int8: unknown"),
    "unknown preset": ({"format": "mxfp4", "preset": "sdxl"}, "--preset sdxl: unknown"),
    "dialect can't say it": ({"format": "mxfp4", "dialect": "fp8"}, "--dialect fp8: can't say --format mxfp4"),
    "static dialect without calibration": ({"format": "fp8", "dialect": "modelopt"}, "give --calibration DIR --static"),
}


@pytest.mark.parametrize(("options", "message"), USAGE_FAULTS.values(), ids=USAGE_FAULTS)
def test_options_that_make_no_sense_are_refused(
    llm: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message.replace("*", r"\*")):
        convert(llm, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_ltx2_refuses_fp8_with_a_layer_left_out_since_sglang_would_cast_it_silently(tmp_path: Path) -> None:
    weights = {f"transformer_blocks.0.attn1.to_{p}.weight": random_weight(256, 256) for p in ("q", "k", "v", "out.0")}
    source = save_checkpoint(tmp_path / "in", [weights], {"_class_name": "LTX2VideoTransformer3DModel"})
    with pytest.raises(FaultsError, match=r"to_out\.0: would stay BF16 .* scale 1\.0"):
        convert(source, tmp_path / "out", format="fp8", ignore=("*.to_out.0",))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_wan_has_no_rowwise_dialect(tmp_path: Path, granularity: str) -> None:
    weights = {"blocks.0.attn1.to_q.weight": random_weight(256, 256)}
    source = save_checkpoint(tmp_path / "in", [weights], {"_class_name": "WanTransformer3DModel"})
    with pytest.raises((FaultsError, UsageError), match="rowwise"):
        convert(source, tmp_path / "out", format="fp8", granularity=granularity, dialect="rowwise")


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_a_fused_scale_whose_members_lie_in_different_shards_is_whole_in_every_run(
    tmp_path: Path, granularity: str
) -> None:
    names = ("w1", "w3")
    shards = [{f"layers.{i}.feed_forward.{n}.weight": random_weight(256, 256, seed=i) for i in range(8)} for n in names]
    source = save_checkpoint(tmp_path / "in", shards, Z_IMAGE_CONFIG)
    scale = "weight_scale" if granularity == "tensor" else "weight_scale_inv"
    for run in range(8):
        convert(source, tmp_path / f"out{run}", 4, format="fp8", granularity=granularity)
        output = load_all(tmp_path / f"out{run}")
        manifest = read_manifest(tmp_path / f"out{run}")
        for i in range(8):
            parts = [output[f"layers.{i}.feed_forward.{name}.{scale}"] for name in names]
            assert_bits_equal(output[f"layers.{i}.feed_forward.w13.{scale}"], torch.cat(parts))
        for path in (tmp_path / f"out{run}").glob("*.safetensors"):
            assert manifest.files[path.name]["blake3"] == blake3(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_mixed_formats_take_per_tensor_fp8_alone(llm: Path, tmp_path: Path, granularity: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rules]]\nmatch = "*.o_proj"\nformat = "fp8"\n')
    with pytest.raises(UsageError, match=f"can't say --format fp8 --granularity {granularity}"):
        convert(llm, tmp_path / "out", format="mxfp4", recipe=recipe, granularity=granularity)


FLUX_CONFIG = {"_class_name": "FluxTransformer2DModel"}


def flux_layers() -> dict[str, torch.Tensor]:
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_out"]
    return {f"{name}.weight": random_weight(256, 256, seed=i) for i, name in enumerate([*names, "proj_out"])}


def test_block_scales_are_refused_where_sglang_builds_a_plain_linear(tmp_path: Path) -> None:
    source = save_checkpoint(
        tmp_path / "in", [flux_layers() | {"x_embedder.weight": random_weight(256, 256)}], FLUX_CONFIG
    )
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rules]]\nmatch = "x_embedder"\nformat = "fp8"\n')
    with pytest.raises(FaultsError, match=r"x_embedder: SGLang builds it as a plain linear .* block scales"):
        convert(source, tmp_path / "out", format="fp8", granularity="block", recipe=recipe)
    convert(source, tmp_path / "out", format="fp8", recipe=recipe)


def test_block_scales_are_refused_where_an_ignored_name_takes_quantized_layers_along(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "in", [flux_layers()], FLUX_CONFIG)
    options = {"format": "fp8", "preset": "generic", "ignore": ("proj_out",)}
    with pytest.raises(FaultsError, match=r"single_transformer_blocks\.0\.proj_out in BF16.*without the block scales"):
        convert(source, tmp_path / "out", granularity="block", **options)
    convert(source, tmp_path / "out", **options)


def test_a_processor_without_wide_vectors_writes_the_same_bytes(tmp_path: Path) -> None:
    script = (
        "import sys; from convert_ckpt.cli import main; from convert_ckpt.kernels import jit\n"
        "jit.processor = lambda: ('generic', '')\n"
        "sys.argv[0] = 'convert-ckpt'; main()\n"
    )
    for weight_format in ("mxfp4", "fp8"):
        convert(FLUX_DIGITS, tmp_path / weight_format, format=weight_format)
        narrow = tmp_path / f"{weight_format}-narrow"
        arguments = [str(FLUX_DIGITS), str(narrow), "--format", weight_format, "--quiet"]
        subprocess.run([sys.executable, "-c", script, *arguments], check=True)
        assert folder_bytes(narrow) == folder_bytes(tmp_path / weight_format)
