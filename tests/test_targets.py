"""Who a result is for: what each target reads, what it costs there, and what is refused because it would go wrong."""

import json
from pathlib import Path

import pytest

from convert_ckpt.api import plan_conversion
from convert_ckpt.options import Options
from convert_ckpt.plan.preset import GENERIC, tell_classes
from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.errors import FaultsError, UsageError
from run_ckpt.contract.file_names import CONFIG_NAME
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.contract.targets import TARGETS
from run_ckpt.loading.linear import QuantizedLinear
from run_ckpt.loading.load import load_quantized
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.assemble import assemble
from run_ckpt.tools.publish.card import make_card
from run_ckpt.tools.publish.consumers import _CONSUMERS
from run_ckpt.tools.publish.rows import read_result
from run_ckpt.tools.rewrite.relayout import relayout
from tests.checkpoints import FLUX_DIGITS, convert, folder_bytes, random_weight, save_checkpoint
from tests.model_classes import CLASSES
from tests.models import MODELS, save

CASES = {**MODELS, **CLASSES}
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


def test_the_plug_in_replaces_what_sglang_builds_plain(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "out", format="mxfp4", target="sglang+plugin")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.layers.keys() >= FEED_FORWARD
    # SGLang reads this dialect by the plug-in alone.
    assert manifest.targets["sglang+plugin"] is manifest.targets["sglang"] is None
    assert manifest.targets["vllm+plugin"] is not None


def test_the_plug_in_for_vllm_takes_shuffled_language_models(tmp_path: Path) -> None:
    llama = language_model(tmp_path)
    plan = plan_conversion(llama, Options("mxfp4", target="vllm+plugin")).components[0]
    assert (plan["dialect"], plan["targets"]["vllm+plugin"]) == ("mxfp4", None)
    assert "vLLM does not read the mxfp4 dialect" in plan["targets"]["vllm"]


def test_the_plug_in_for_vllm_takes_layers_of_different_formats(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rules]]\nmatch = "*.down_proj"\nformat = "fp8"\n')
    asked = Options("mxfp4", target="vllm+plugin", recipe=recipe)
    (plan,) = plan_conversion(language_model(tmp_path), asked).components
    assert (plan["dialect"], plan["targets"]["vllm+plugin"]) == ("mxfp4", None)


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
    for dialect in ("compressed-tensors", "quark"):
        with pytest.raises(FaultsError, match="no FP8 by tensor with activations by token"):
            plan_conversion(mixture, Options("fp8", target="vllm", granularity="tensor", dialect=dialect))
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


@pytest.mark.parametrize("class_name", ["MistralForCausalLM", "Llama4ForCausalLM"])
def test_block_scales_are_lost_in_the_classes_made_of_sglangs_llama(tmp_path: Path, class_name: str) -> None:
    model = language_model(tmp_path, class_name)
    plan = plan_conversion(model, Options("fp8", granularity="block")).components[0]
    assert "SGLang loads no " in plan["targets"]["sglang"]
    with pytest.raises(FaultsError, match=r"llama\.py renames weight_scale_inv"):
        plan_conversion(model, Options("fp8", granularity="block", target="sglang"))


def test_experts_that_sglang_does_not_load_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FaultsError, match="SGLang loads no experts of this class, silently"):
        plan_conversion(language_model(tmp_path, "Llama4ForCausalLM", experts=2), Options("fp8", target="sglang"))


def test_layers_that_sglang_would_not_find_among_the_kept_are_refused(tmp_path: Path) -> None:
    mixture = language_model(tmp_path, "MixtralForCausalLM", experts=2)
    options = {"format": "fp8", "granularity": "channel", "target": "sglang"}
    assert plan_conversion(mixture, Options(**options)).components[0]["targets"]["sglang"] is None
    with pytest.raises(FaultsError, match="looks for what is kept under other names"):
        plan_conversion(mixture, Options(**options, ignore=("*.o_proj",)))


def test_sglangs_experts_take_no_weights_by_tensor_with_activations_by_token(tmp_path: Path) -> None:
    mixture = language_model(tmp_path, "Qwen3MoeForCausalLM", experts=2)
    asked = Options("fp8", granularity="tensor", dialect="compressed-tensors", target="sglang")
    with pytest.raises(FaultsError, match="no FP8 by tensor with activations by token"):
        plan_conversion(mixture, asked)


@pytest.mark.parametrize(("dialect", "key"), [("quark", "exclude"), ("compressed-tensors", "ignore")])
def test_what_servers_fuse_of_kept_layers_is_ignored_by_that_name_too(tmp_path: Path, dialect: str, key: str) -> None:
    """SGLang: a fused linear by another name than its parts' would be FP8 without a scale, silently."""
    convert(language_model(tmp_path), tmp_path / "out", format="fp8", dialect=dialect, ignore=["*.self_attn.*"])
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["quantization_config"]
    names = [f"model.layers.0.self_attn.{name}" for name in ("k_proj", "o_proj", "q_proj", "qkv_proj", "v_proj")]
    assert config[key] == names


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


OMNI = {"format": "fp8", "target": "vllm-omni"}


def declared(folder: Path) -> dict[str, object]:
    return json.loads((folder / CONFIG_NAME).read_text())["quantization_config"]  # type: ignore[no-any-return]


def test_vllm_omni_gets_exactly_the_keys_that_its_fp8_config_takes(tmp_path: Path) -> None:
    """Any other is a TypeError there; without the flag the codes are loaded as weights (vllm 0.30.0, Fp8Config)."""
    convert(FLUX_DIGITS, tmp_path / "tensor", granularity="tensor", **OMNI)
    convert(FLUX_DIGITS, tmp_path / "block", granularity="block", **OMNI)
    tensor, block = declared(tmp_path / "tensor"), declared(tmp_path / "block")
    assert tensor == {
        "quant_method": "fp8",
        "is_checkpoint_fp8_serialized": True,
        "activation_scheme": "dynamic",
        "ignored_layers": [],
    }
    assert block == tensor | {"weight_block_size": [128, 128]}
    assert read_manifest(tmp_path / "tensor").targets["vllm-omni"] is None


def test_flux1_double_blocks_stay_for_vllm_omni_alone(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "out", **OMNI)
    manifest = read_manifest(tmp_path / "out")
    assert {name.split(".")[0] for name in manifest.layers} == {"single_transformer_blocks"}
    reason = manifest.kept["transformer_blocks.0.attn.to_q.weight"].reason
    assert reason == "vLLM-Omni builds it as a plain linear"


def test_vllm_omni_per_channel_is_modelopts_with_a_scale_for_each_row(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "out", **OMNI)
    config = declared(tmp_path / "out")
    assert (config["quant_method"], config["quant_algo"]) == ("modelopt", "FP8_PER_CHANNEL_PER_TOKEN")
    assert {layer.scale_shape for layer in read_manifest(tmp_path / "out").layers.values()} == {(256,), (1024,)}
    assert "text_encoder" in config["ignore"]


WAN = {"_class_name": "WanTransformer3DModel"}
WAN_NAMES = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def wan(folder: Path) -> Path:
    names = [f"blocks.{i}.{name}" for i in range(2) for name in WAN_NAMES] + ["proj_out"]
    return save_checkpoint(
        folder, [{f"{name}.weight": random_weight(64, 64, seed=i) for i, name in enumerate(names)}], WAN
    )


def test_vllm_omni_ignore_list_has_its_own_names(tmp_path: Path) -> None:
    convert(wan(tmp_path / "in"), tmp_path / "out", ignore=("blocks.0.*",), **OMNI)
    names = {"to_q", "to_k", "to_v", "to_qkv", "to_out.0", "to_out"}
    expected = {f"blocks.0.attn1.{name}" for name in names}
    expected |= {f"blocks.0.ffn.{name}" for name in ("net.0.proj", "net_0.proj", "net.2", "net_2")}
    # proj_out is plain there and needs no entry.
    assert set(declared(tmp_path / "out")["ignored_layers"]) == expected
    assert "proj_out.weight" in read_manifest(tmp_path / "out").kept


def test_what_vllm_omni_has_no_sound_form_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="vLLM-Omni does not read that of a WanTransformer3DModel"):
        convert(wan(tmp_path / "wan"), tmp_path / "out", granularity="channel", **OMNI)
    names = ["transformer_blocks.0.attn.to_q", "proj_out"]
    weights = {f"{name}.weight": random_weight(64, 64) for name in names}
    hunyuan = save_checkpoint(tmp_path / "in", [weights], {"_class_name": "HunyuanVideoTransformer3DModel"})
    with pytest.raises(UsageError, match="vLLM-Omni was not seen to load a HunyuanVideoTransformer3DModel"):
        convert(hunyuan, tmp_path / "out", **OMNI)


def test_z_image_has_no_fused_scales_for_vllm_omni(tmp_path: Path) -> None:
    names = [f"layers.0.attention.to_{name}" for name in "qkv"]
    weights = {f"{name}.weight": random_weight(64, 64) for name in names}
    source = save_checkpoint(tmp_path / "in", [weights], {"_class_name": "ZImageTransformer2DModel"})
    convert(source, tmp_path / "omni", granularity="tensor", **OMNI)
    convert(source, tmp_path / "sglang", format="fp8")
    omni, sglang = read_manifest(tmp_path / "omni"), read_manifest(tmp_path / "sglang")
    assert not omni.fused_scales
    assert sglang.fused_scales
    assert (sglang.targets["sglang"], omni.targets["vllm-omni"]) == (None, None)
    assert sglang.targets["vllm-omni"]
    assert omni.targets["sglang"]


def test_our_loader_reads_a_result_for_vllm_omni(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "out", granularity="tensor", **OMNI)
    model = load_quantized(tmp_path / "out")
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 15


def test_assemble_makes_a_whole_pipeline(tmp_path: Path) -> None:
    base = tmp_path / "base"
    for name in ("transformer", "vae"):
        (base / name).mkdir(parents=True)
    (base / "vae" / "config.json").write_text("{}")
    (base / "flux.safetensors").write_bytes(b"")
    (base / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "x"], "vae": ["diffusers", "y"]}))
    convert(FLUX_DIGITS, tmp_path / "out", **OMNI)
    assemble(tmp_path / "out", tmp_path / "pipeline", str(base))
    assert sorted(path.name for path in (tmp_path / "pipeline").iterdir()) == ["model_index.json", "transformer", "vae"]
    assert declared(tmp_path / "pipeline" / "transformer") == declared(tmp_path / "out")
    (base / "model_index.json").write_text("{}")
    with pytest.raises(FaultsError, match="has no transformer"):
        assemble(tmp_path / "out", tmp_path / "other", str(base))
    assert not (tmp_path / "other").exists()


def test_mxfp4_for_vllm_omni_leaves_what_its_plug_in_has_no_linear_for(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "omni", format="mxfp4", target="vllm-omni")
    convert(FLUX_DIGITS, tmp_path / "sglang", format="mxfp4")
    omni, sglang = read_manifest(tmp_path / "omni"), read_manifest(tmp_path / "sglang")
    assert (omni.dialect, omni.targets["vllm-omni"]) == ("mxfp4", None)
    assert omni.layers.keys() < sglang.layers.keys()
    assert "builds it as a plain linear" in str(sglang.targets["vllm-omni"])


def test_a_class_that_no_preset_knows_is_for_no_server(tmp_path: Path) -> None:
    weights = {"blocks.0.attn.to_out.weight": random_weight(64, 64)}
    source = save_checkpoint(tmp_path / "in", [weights], {"_class_name": "SomeTransformer2DModel"})
    convert(source, tmp_path / "out", format="fp8", preset="generic")
    targets = read_manifest(tmp_path / "out").targets
    assert targets["sglang"] == "no preset knows what SGLang makes of a SomeTransformer2DModel"
    assert (targets["diffusers"], targets["run-ckpt"]) == (None, None)
    with pytest.raises(FaultsError, match="no preset knows what SGLang makes of"):
        convert(source, tmp_path / "other", format="fp8", preset="generic", target="sglang")


@pytest.mark.parametrize(
    ("name", "sglang", "omni"),
    [
        ("lumina2", "SGLang has no Lumina2Transformer2DModel", "was not seen to load a Lumina2Transformer2DModel"),
        ("sd3.5", "builds all linears of this class plain", "builds all linears of this class plain"),
        ("cosmos", "has this class for Anima alone", "was not seen to load a CosmosTransformer3DModel"),
        ("anima", None, "was not seen to load a CosmosTransformer3DModel"),
    ],
)
def test_a_result_says_which_servers_have_its_class(
    tmp_path: Path, name: str, sglang: str | None, omni: str | None
) -> None:
    save(CLASSES[name], CLASSES[name].build(), str(tmp_path / "in"))
    convert(tmp_path / "in", tmp_path / "out", format="fp8")
    targets = read_manifest(tmp_path / "out").targets
    for server, reason in (("sglang", sglang), ("vllm-omni", omni)):
        assert (targets[server] is None) == (reason is None)
        assert (reason or "") in (targets[server] or "")


SERVERS = {"sglang", "vllm", "vllm-omni", "vllm+plugin", "sglang+plugin"}
CHANNEL = {"format": "fp8", "granularity": "channel"}
BLOCK = {"format": "fp8", "granularity": "block"}
MXFP4_CT = {"format": "mxfp4", "layout": "plain", "dialect": "compressed-tensors"}


@pytest.mark.parametrize(
    ("class_name", "options", "servers"),
    [
        ("UMT5EncoderModel", CHANNEL, {"sglang"}),
        ("UMT5EncoderModel", BLOCK, set()),
        ("Qwen3ForCausalLM", CHANNEL, {"sglang"}),
        ("Qwen3ForCausalLM", BLOCK, set()),
        ("Qwen3ForCausalLM", MXFP4_CT, {"sglang"}),
        ("Qwen3ForCausalLM", {"format": "mxfp4"}, set()),
    ],
)
def test_a_text_encoder_of_a_pipeline_is_for_who_was_seen_to_load_it(
    tmp_path: Path, class_name: str, options: dict[str, str], servers: set[str]
) -> None:
    """As scripts/encoder_sglang.py found it; the same folder as a language model is for others too."""
    language_model(tmp_path, class_name).rename(tmp_path / "text_encoder")
    convert(tmp_path / "text_encoder", tmp_path / "out", **options)
    found = read_manifest(tmp_path / "out").targets
    assert {name for name, reason in found.items() if reason is None} & SERVERS == servers
    assert found["transformers"] is found["diffusers"] is None
    assert found["vllm"] == "vLLM was not seen to load a quantized text encoder of a pipeline"
    assert ("--component-paths.text_encoder me/it" in card(tmp_path / "out")) == bool(servers)
    assert "vllm serve" not in card(tmp_path / "out")


def card(output: Path) -> str:
    return make_card(read_result(output), "me/it")


def test_codes_that_t5_asks_for_as_weights_are_refused_or_said(tmp_path: Path) -> None:
    source = language_model(tmp_path, "T5EncoderModel")
    with pytest.raises(FaultsError, match="fails on packed codes, as transformers' T5 asks for a"):
        plan_conversion(source, Options("mxfp4", layout="plain", target="transformers"))
    assert plan_conversion(source, Options("mxfp4")).components[0]["targets"]["transformers"] is None


def test_a_t5_whose_config_has_it_built_whole_is_not_for_sglang(tmp_path: Path) -> None:
    source = language_model(tmp_path, "T5EncoderModel")
    path = source / CONFIG_NAME
    for value, reason in ((True, None), (False, "builds the decoder of this class too")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "is_encoder_decoder": value}))
        found = plan_conversion(source, Options("fp8")).components[0]["targets"]["sglang"]
        assert found is None if reason is None else reason in found


# By their names alone these are one of several classes.
ALIKE = {
    "wan-2.2": {"wan", "wan-animate"},
    "wan-2.1-i2v": {"wan", "wan-animate"},
    "skyreels": {"wan", "wan-animate"},
    "chronoedit": {"wan", "wan-animate"},
}
# Read with a config.json made of their shapes, as ComfyUI's files are.
TOLD_BY_A_MAP = {"qwen-image", "qwen-image-layered"}


@pytest.mark.parametrize("name", sorted(CASES.keys() - TOLD_BY_A_MAP))
def test_names_tell_the_class_or_all_that_it_may_be(name: str) -> None:
    model = CASES[name].build()
    told = tell_classes(list(model.state_dict()))
    assert set(told.values()) - {GENERIC} == ALIKE.get(name, {CASES[name].preset} - {GENERIC})
    if CASES[name].preset not in (GENERIC, "dense-llm"):
        assert type(model).__name__ in told


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chroma", r"named as those of ChromaTransformer2DModel\. .* or add --preset chroma\."),
        ("wan-2.2", r"WanTransformer3DModel \(--preset wan\).* or add the preset of yours\."),
        ("qwen3", r"or add --preset dense-llm\."),
    ],
)
def test_a_folder_without_config_is_told_by_its_tensors(tmp_path: Path, name: str, message: str) -> None:
    save(CASES[name], CASES[name].build(), str(tmp_path / "in"))
    (tmp_path / "in" / "config.json").unlink()
    with pytest.raises(UsageError, match=message):
        convert(tmp_path / "in", tmp_path / "out", format="fp8", preset=None)
