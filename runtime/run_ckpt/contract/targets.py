"""Who a result is for: the targets, the results that each of them reads, and the reason where it does not."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from run_ckpt.contract.formats import (
    AITER_MXFP4,
    BLOCK_FP8,
    CHANNEL_FP8,
    PLAIN_MXFP4,
    PLAIN_MXFP8,
    PLAIN_NVFP4,
    TENSOR_FP8,
)
from run_ckpt.contract.manifest import Manifest
from run_ckpt.contract.reading import ENCODER, NAME, PART, TEXT, Reading, Target, model_kind

# Where SGLang and diffusers both find the names of a row-wise FP8 file. Ran: SGLang 0.5.23 --transformer-weights-path
# and diffusers 0.42.1 from_single_file.
_ROWWISE = ("flux1", "flux2", "qwen-image")
# vLLM-Omni 0.30.0 has no pipeline for HunyuanVideo 1.0; under modelopt it rebuilds Wan's transformers by a name that it
# looks up wrongly; and it hands FP8 on to FLUX.2's text encoder, which only modelopt can ignore.
_OMNI_MODELOPT = ("flux1", "flux2", "hunyuan-video-1.5", "ltx2", "qwen-image", "z-image")
_OMNI_FP8 = ("flux1", "hunyuan-video-1.5", "ltx2", "qwen-image", "wan", "wan-vace", "z-image")
_OMNI = ("flux1", "flux2", "hunyuan-video-1.5", "ltx2", "qwen-image", "wan", "wan-vace", "z-image")
# Whose experts servers read all in one tensor.
_GPT_OSS = ("gpt-oss",)
# Whose quantization_config may hold our key, by which our loader and plug-ins know what is quantized.
_OWN = ("fp8", "mxfp4", "modelopt", "quark", "compressed-tensors")
# Of which a weight has one byte.
_BYTES = (TENSOR_FP8, CHANNEL_FP8, PLAIN_MXFP8)
# SGLang 0.5.23, srt/models/llama.py and the classes whose load_weights it is. Ran: Llama, Llama 4; the others: read.
_RENAMED = "loads no block scales of this class, silently: its llama.py renames weight_scale_inv"
_LLAMA = dict.fromkeys(
    ("Llama*", "Mistral*", "Ministral3*", "Phi3ForCausalLM", "InternLM3*", "IQuestCoder*", "TeleFLM*"), _RENAMED
)
# Ran: scripts/check_sglang_llm.py, Llama 4 from a checkpoint in BF16 too.
_LOST = "looks for what is kept under other names, and makes FP8 without a scale of it, silently"
_QWEN3_VL = {"Qwen3VLMoe*": _LOST}
_MIXTRAL = {"MixtralForCausalLM": f"{_LOST}. Use --dialect quark or fp8"}
_DEEPSEEK = {"DeepseekV*": "takes one scale for q_a_proj and kv_a_proj_with_mqa together; use --granularity channel"}
_LLAMA4 = {"Llama4ForCausalLM": "loads no experts of this class, silently, quantized or not"}
# transformers' own code of these reads the dtype of .weight, and packed codes have another name (ran, 5.19 and 5.23).
_PACKED = {
    "*T5EncoderModel": "fails on packed codes, as transformers' T5 asks for a .weight. Use --dialect mxfp4, or"
    " --format fp8"
}
# What transformers 5 writes for an encoder without its decoder, and 4 did not.
_HALF: dict[tuple[str, str, object], str] = {
    ("*T5EncoderModel", "is_encoder_decoder", False): (
        "builds the decoder of this class too, and fails to make up its weights. Write is_encoder_decoder: true into"
        " config.json, as published ones have it"
    )
}
_INPUT_SCALE = {
    "*": "multiplies by an input_scale, which NVFP4 here has not. Use --dialect compressed-tensors, whose activations"
    " stay as they are"
}
# SGLang 0.5.23, runtime/models/dits/flux_2.py, post_load_weights: it takes every NVFP4 file for one in BFL's order.
_SWAPPED = {
    "Flux2Transformer2DModel": "exchanges the halves of norm_out.linear, silently. Use --dialect mxfp4, which our"
    " plug-in reads, or --format fp8"
}
# transformers 5.23, conversion_mapping.py: it merges the experts of most classes, and these it has in 3-D tensors only.
_FUSED_FAULT = (
    "looks for the experts of this class in 3-D tensors and, with a warning, draws them at random. Call"
    " run_ckpt.integrations.transformers.register(), or use load_quantized"
)
_FUSED = {"Qwen3VLMoe*": _FUSED_FAULT}
_NO_EXPERTS = (
    "its mixture of experts takes no FP8 by tensor with activations by token; use --granularity channel or block"
)

# DiffusionPipeline loads text encoders by transformers.
_ENCODERS = (
    Reading("transformers", ENCODER, ("compressed-tensors",), _BYTES),
    Reading("transformers", ENCODER, ("compressed-tensors",), not_for=_PACKED),
    Reading("transformers-fp8", ENCODER, ("fp8",), (BLOCK_FP8,)),
    Reading("transformers-plugin", ENCODER, ("mxfp4",)),
)

_SGLANG_DIT = partial(Reading, "sglang", "diffusers", is_loud=False, fused_scales=True)
_SGLANG_LLM = partial(Reading, "sglang-llm", "transformers", not_for=_LLAMA4, keeps_wrong=_QWEN3_VL, is_loud=False)
_OMNI_DIT = partial(Reading, "vllm-omni", "diffusers", is_loud=False, fused_scales=False)
_OMNI_PLUGIN = partial(Reading, "vllm-omni-plugin", "diffusers", ("mxfp4",), presets=_OMNI)
_VLLM = partial(Reading, "vllm", "transformers")

_TARGETS = (
    Target(
        "sglang",
        "SGLang",
        (
            _SGLANG_DIT(("fp8",), matching=PART, dequantizes=(TENSOR_FP8,)),
            _SGLANG_DIT(("modelopt",), (TENSOR_FP8,), matching=NAME, dequantizes=(TENSOR_FP8,)),
            _SGLANG_DIT(("modelopt",), (PLAIN_NVFP4,), not_for=_SWAPPED, matching=NAME),
            Reading("sglang-plugin", "diffusers", ("mxfp4", "quark", "compressed-tensors")),
            Reading("sglang-weights", "diffusers", ("rowwise",), presets=_ROWWISE, keeps_names=True),
            _SGLANG_LLM(("gpt-oss",), presets=_GPT_OSS),
            _SGLANG_LLM(("quark",), (PLAIN_MXFP4,)),
            _SGLANG_LLM(("quark",), (TENSOR_FP8,), not_for=_LLAMA4 | _DEEPSEEK),
            _SGLANG_LLM(("compressed-tensors",), (TENSOR_FP8,), no_experts=_NO_EXPERTS),
            _SGLANG_LLM(("compressed-tensors",), (CHANNEL_FP8,), keeps_wrong=_QWEN3_VL | _MIXTRAL),
            _SGLANG_LLM(("modelopt",), (PLAIN_NVFP4,), not_for=_INPUT_SCALE),
            _SGLANG_LLM(("fp8",), (BLOCK_FP8,), not_for=_LLAMA4 | _LLAMA),
            _SGLANG_LLM(("fp8", "modelopt"), (TENSOR_FP8,), not_for=_LLAMA4 | _DEEPSEEK),
            # Ran, scripts/encoder_sglang.py: it hands these to transformers, and refuses what it takes for its own.
            Reading("sglang-encoder", ENCODER, ("compressed-tensors",), _BYTES, not_with=_HALF),
            Reading("sglang-encoder", ENCODER, ("compressed-tensors",), not_for=_PACKED, not_with=_HALF),
        ),
    ),
    # Where SGLang builds a plain linear in these classes, the plug-in puts its own.
    Target(
        "sglang+plugin",
        "SGLang with our plug-in",
        (Reading("sglang-plugin", "diffusers", ("mxfp4",), presets=("flux1",)),),
    ),
    Target(
        "vllm-omni",
        "vLLM-Omni",
        (
            _OMNI_DIT(
                ("modelopt",),
                (CHANNEL_FP8, TENSOR_FP8),
                _OMNI_MODELOPT,
                matching=TEXT,
                dequantizes=(CHANNEL_FP8, TENSOR_FP8),
            ),
            _OMNI_DIT(("vllm-omni",), presets=_OMNI_FP8, matching=NAME),
            _OMNI_PLUGIN(schemes=(AITER_MXFP4, PLAIN_MXFP4)),
            # E4M3 codes have the shape of the weight that a plain linear would take them for.
            _OMNI_PLUGIN(schemes=(AITER_MXFP4, PLAIN_MXFP4, PLAIN_MXFP8, TENSOR_FP8), is_loud=False),
        ),
    ),
    Target(
        "vllm",
        "vLLM",
        (
            _VLLM(("gpt-oss",), presets=_GPT_OSS),
            _VLLM(("quark",), (PLAIN_MXFP4,)),
            _VLLM(("compressed-tensors",), (TENSOR_FP8,), no_experts=_NO_EXPERTS),
            _VLLM(("compressed-tensors",), (PLAIN_MXFP4, CHANNEL_FP8)),
            _VLLM(("modelopt",), (PLAIN_NVFP4,), not_for=_INPUT_SCALE, is_loud=False),
            _VLLM(("quark",), (TENSOR_FP8,), no_experts=_NO_EXPERTS),
            _VLLM(("fp8", "modelopt"), (TENSOR_FP8, BLOCK_FP8)),
        ),
    ),
    Target(
        "vllm+plugin",
        "vLLM with our plug-in",
        (
            Reading(
                "vllm-plugin",
                "transformers",
                ("mxfp4",),
                (AITER_MXFP4, PLAIN_MXFP4, PLAIN_MXFP8, TENSOR_FP8),
                no_experts="its plug-in runs no mixture of experts; use --target vllm",
            ),
        ),
    ),
    Target(
        "diffusers",
        "diffusers",
        (
            Reading("diffusers-file", "diffusers", ("rowwise",), presets=_ROWWISE),
            Reading("diffusers-plugin", "diffusers", ("fp8", "mxfp4", "modelopt", "compressed-tensors")),
            Reading("diffusers-quark", "diffusers", ("quark",), (PLAIN_MXFP4,)),
            Reading("diffusers-plugin", "diffusers", ("quark",)),
            *_ENCODERS,
        ),
    ),
    Target(
        "transformers",
        "transformers",
        (
            Reading("transformers-own", "transformers", ("gpt-oss",), presets=_GPT_OSS),
            Reading("transformers", "transformers", ("compressed-tensors",), not_for=_FUSED, is_loud=False),
            Reading(
                "transformers-own",
                "transformers",
                ("fp8",),
                (BLOCK_FP8,),
                not_for=_FUSED | {"Llama4*": _FUSED_FAULT},
                is_loud=False,
            ),
            Reading("transformers-plugin", "transformers", ("mxfp4",)),
            *_ENCODERS,
        ),
    ),
    Target(
        "run-ckpt",
        "run-ckpt",
        (
            Reading("run-ckpt", "diffusers", (*_OWN, "vllm-omni")),
            Reading("run-ckpt-llm", "transformers", (*_OWN, "vllm-omni", "gpt-oss")),
            Reading("run-ckpt-llm", ENCODER, (*_OWN, "vllm-omni")),
        ),
    ),
)
TARGETS: dict[str, Target] = {target.name: target for target in _TARGETS}
# What SGLang's diffusion runtime reads by itself.
SGLANG_DIALECTS = [
    dialect for reading in TARGETS["sglang"].readings if reading.way == "sglang" for dialect in reading.dialects
]
# Whose names and rules hold where no target was asked for.
USUAL_TARGETS = {"diffusers": "sglang", "transformers": "vllm", ENCODER: "sglang"}


def find_readings(manifest: Manifest) -> dict[str, Reading | str]:
    """Return target -> how it reads a result, or why it does not, by its dialect, schemes and class alone."""
    recipe = manifest.recipe
    schemes = {layer.scheme for layer in manifest.layers.values()}
    kind = model_kind(recipe["naming"], recipe["preset"], manifest.source["name"])
    model = (kind, recipe["preset"], recipe.get("class_name") or "", manifest.dialect, schemes)
    return {name: target.find_reading(*model) for name, target in TARGETS.items()}


def judge_again(new: Manifest, old: Manifest, config: Mapping[str, Any]) -> dict[str, str | None]:
    """Return ``targets`` of a result that was made of another by a change of dialect or layout. config: config.json.

    What was said against single layers of the old one holds for the new one too, and what a preset said against the
    class. Whoever could not read the old one at all was asked about no layer: that matters for diffusion models, some
    of whose layers a server builds as plain ones.
    """
    before, after = _reasons(old, config), _reasons(new, config)
    unasked = "its layers were not looked at one by one" if old.recipe["naming"] == "diffusers" else None
    targets: dict[str, str | None] = {}
    for name, reason in after.items():
        said = old.targets.get(name, before[name] or unasked)
        is_of_class = before[name] and said not in (None, before[name])
        targets[name] = said if is_of_class else reason or (unasked if before[name] else said)
    return targets


def _reasons(manifest: Manifest, config: Mapping[str, Any]) -> dict[str, str | None]:
    """Return target -> why no result of the kind is for it, None where its layers decide."""
    class_name = manifest.recipe.get("class_name") or ""
    reasons: dict[str, str | None] = {}
    for name, reading in find_readings(manifest).items():
        if isinstance(reading, str):
            reasons[name] = reading
            continue
        title = TARGETS[name].title
        refusal, fault = reading.refusal(manifest.layers), next(reading.faults(class_name, config, manifest.kept), None)
        sentence = f"dialect {manifest.dialect}: {title} {fault}" if fault else None
        reasons[name] = f"{title}: {refusal}" if refusal else sentence and sentence + "." * (not reading.is_loud)
    return reasons
