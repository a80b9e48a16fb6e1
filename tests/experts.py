"""Small mixtures of experts of transformers' classes, with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

HIDDEN = 256
_SIZES = {
    "vocab_size": 512,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
# Grouped choice of experts, an expert that all tokens see, and a first block without experts.
_SHARED = {"moe_intermediate_size": 256, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}


def _qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(**_SIZES, moe_intermediate_size=256, head_dim=64, num_experts=4)
    return transformers.Qwen3MoeForCausalLM(config)


def _mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_SIZES, num_local_experts=4))


def _deepseek_v3() -> Any:
    heads = {"kv_lora_rank": 64, "q_lora_rank": 256, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64}
    # As in published configs: vLLM has the correction of the router's choice with this method alone, SGLang asks for
    # the others.
    method = {"topk_method": "noaux_tc", "moe_layer_freq": 1, "scoring_func": "sigmoid"}
    config = transformers.DeepseekV3Config(**_SIZES, **_SHARED, **heads, **method, n_group=2, topk_group=1)
    return transformers.DeepseekV3ForCausalLM(config)


def _glm4_moe() -> Any:
    config = transformers.Glm4MoeConfig(**_SIZES, **_SHARED, head_dim=64, n_group=1, topk_group=1)
    return transformers.Glm4MoeForCausalLM(config)


def _llama4() -> Any:
    sizes = {**_SIZES, "num_experts_per_tok": 1}
    config = transformers.Llama4TextConfig(
        **sizes, intermediate_size_mlp=512, head_dim=64, num_local_experts=4, interleave_moe_layer_step=1
    )
    model = transformers.Llama4ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # their class leaves them as memory was
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def _qwen3_vl_moe() -> Any:
    # transformers has no norm_topk_prob here; the published configs say it, and vLLM reads it.
    text = {**_SIZES, "moe_intermediate_size": 512, "head_dim": 64, "num_experts": 4, "norm_topk_prob": True}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10]}
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**text, "rope_parameters": rope}, vision_config={**vision, "deepstack_visual_indexes": [0]}
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def _gpt_oss() -> Any:
    config = transformers.GptOssConfig(**_SIZES, head_dim=64, num_local_experts=4, sliding_window=32)
    return transformers.GptOssForCausalLM(config)


BUILDERS: dict[str, Callable[[], Any]] = {
    "qwen3-moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek-v3": _deepseek_v3,
    "glm4-moe": _glm4_moe,
    "llama4": _llama4,
    "qwen3-vl-moe": _qwen3_vl_moe,
    "gpt-oss": _gpt_oss,
}
# Whose checkpoints hold the experts of a block in 3-D tensors, transposed as transformers writes them.
FUSED = ("llama4", "qwen3-vl-moe")
# Whose experts servers read in 3-D tensors of codes too.
STACKED = ("gpt-oss",)


def save_experts(name: str, folder: Path) -> Path:
    """Write a small model of the class in BF16, and return its folder."""
    torch.manual_seed(0)
    model = BUILDERS[name]().bfloat16()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):  # float32 in all checkpoints of theirs
            buffer.data = torch.randn(buffer.shape) / 10
    model.save_pretrained(folder)
    return folder


def run_logits(model: Any) -> torch.Tensor:
    """Return the logits of twelve tokens."""
    tokens = torch.randint(0, 512, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits
