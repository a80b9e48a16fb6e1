"""Checkpoints as other tools write them, made by arithmetic, with the weights that they stand for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoints import random_weight, save_checkpoint

# OCP MX v1.0, 5.3.3; the sign is bit 3.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
MODULES = {
    **{f"model.layers.0.self_attn.{letter}_proj": (256, 512) for letter in "qkv"},
    "model.layers.0.mlp.down_proj": (512, 256),
}
KEPT = {"model.embed_tokens.weight": (64, 512), "lm_head.weight": (64, 512)}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}

# A tool's tensors of one weight by what follows the module in their names, and the float32 [N, K] they stand for.
Encoded = tuple[dict[str, Tensor], Tensor]


def fp8_codes(N: int, K: int, seed: int) -> Tensor:
    """float8_e4m3fn [N, K], the largest code among them, no NaN."""
    codes = (random_weight(N, K, torch.float32, seed=seed) * 100).clamp(-448, 448)
    codes[0, 0] = 448
    return codes.to(torch.float8_e4m3fn)


def fp4_codes(N: int, K: int, seed: int) -> tuple[Tensor, Tensor]:
    """Packed uint8 [N, K/2], the low nibble the even k, and their values float32 [N, K]."""
    codes = torch.randint(16, (N, K), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, E2M1[codes.long()]


def scales(*shape: int, seed: int) -> Tensor:
    """float32, between 0.001 and 0.002."""
    return (1 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))) / 1000


def modelopt_fp8(N: int, K: int, seed: int) -> Encoded:
    codes, scale = fp8_codes(N, K, seed), scales(seed=seed)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.01)}, codes.float() * scale


def fp8_channel(N: int, K: int, seed: int) -> Encoded:
    codes, scale = fp8_codes(N, K, seed), scales(N, 1, seed=seed)
    return {"weight": codes, "weight_scale": scale[:, 0]}, codes.float() * scale


def compressed_fp8_channel(N: int, K: int, seed: int) -> Encoded:
    codes, scale = fp8_codes(N, K, seed), scales(N, 1, seed=seed).bfloat16()
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def quark_fp8(N: int, K: int, seed: int) -> Encoded:
    codes, scale = fp8_codes(N, K, seed), scales(seed=seed).bfloat16()
    return {"weight": codes, "weight_scale": scale, "input_scale": scale.clone()}, codes.float() * scale.float()


def fp8_block(N: int, K: int, seed: int) -> Encoded:
    codes, scale = fp8_codes(N, K, seed), scales(-(-N // 128), -(-K // 128), seed=seed).bfloat16()
    expanded = scale.float().repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * expanded


def _e4m3_scales(N: int, K: int, seed: int) -> Tensor:
    return (scales(N, K // 16, seed=seed) * 1e5).to(torch.float8_e4m3fn)


def modelopt_nvfp4(N: int, K: int, seed: int) -> Encoded:
    (packed, values), scale, second = fp4_codes(N, K, seed), _e4m3_scales(N, K, seed), torch.tensor(1e-5)
    tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": second, "input_scale": torch.tensor(0.01)}
    return tensors, values * (scale.float() * second).repeat_interleave(16, 1)


def compressed_nvfp4(N: int, K: int, seed: int) -> Encoded:
    (packed, values), scale, second = fp4_codes(N, K, seed), _e4m3_scales(N, K, seed), torch.tensor([65536.0])
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": second}
    tensors["input_global_scale"] = torch.tensor([100.0])
    return tensors, values * (scale.float() / second).repeat_interleave(16, 1)


def _mx_scales(N: int, K: int, seed: int) -> Tensor:
    return torch.randint(110, 125, (N, K // 32), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def mxfp4(N: int, K: int, seed: int, weight: str = "weight", scale: str = "weight_scale") -> Encoded:
    (packed, values), codes = fp4_codes(N, K, seed), _mx_scales(N, K, seed)
    return {weight: packed, scale: codes}, values * torch.exp2(codes.float() - 127).repeat_interleave(32, 1)


def mxfp8(N: int, K: int, seed: int) -> Encoded:
    values, codes = fp8_codes(N, K, seed), _mx_scales(N, K, seed)
    expanded = torch.exp2(codes.float() - 127).repeat_interleave(32, 1)
    return {"weight": values, "weight_scale": codes}, values.float() * expanded


MODELOPT = {"quant_method": "modelopt", "producer": {"name": "modelopt", "version": "0.47.0"}, "ignore": ["lm_head"]}
COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
# Tool and format -> config.json's quantization_config, and how it stores a weight.
FOREIGN: dict[str, tuple[dict[str, Any], Callable[[int, int, int], Encoded]]] = {
    "modelopt-fp8": ({**MODELOPT, "quant_algo": "FP8"}, modelopt_fp8),
    "modelopt-fp8-channel": ({**MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, fp8_channel),
    "modelopt-nvfp4": ({**MODELOPT, "quant_algo": "NVFP4", "group_size": 16}, modelopt_nvfp4),
    "modelopt-mxfp4": ({**MODELOPT, "quant_algo": "mxfp4"}, mxfp4),
    "modelopt-mxfp8": ({**MODELOPT, "quant_algo": "MXFP8", "group_size": 32}, mxfp8),
    # DeepSeek-V3, Qwen3-FP8
    "fp8-block": ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, fp8_block),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, modelopt_fp8),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8_channel),
    "compressed-fp8-channel": ({**COMPRESSED, "format": "float-quantized"}, compressed_fp8_channel),
    "compressed-nvfp4": ({**COMPRESSED, "format": "nvfp4-pack-quantized"}, compressed_nvfp4),
    "compressed-mxfp4": (
        {**COMPRESSED, "format": "mxfp4-pack-quantized"},
        lambda N, K, seed: mxfp4(N, K, seed, "weight_packed"),
    ),
    "quark-fp8": ({"quant_method": "quark", "export": {"pack_method": "reorder"}}, quark_fp8),
    "quark-mxfp4": ({"quant_method": "quark", "export": {"pack_method": "reorder"}}, mxfp4),
    "quark-mxfp4-diffusers": (
        {"quant_method": "quark"},
        lambda N, K, seed: mxfp4(N, K, seed, scale="weight_quantizer.scale"),
    ),
}


def write_foreign(folder: Path, name: str) -> tuple[Path, dict[str, Tensor]]:
    """Write a checkpoint in two shards, its last module's scales apart from its weight; return it and its weights.

    The weights are float32, under the names of a plain checkpoint, with the BF16 ones that no tool quantizes.
    """
    config, encode = FOREIGN[name]
    stored, plain = {}, {}
    for seed, (module, (N, K)) in enumerate(MODULES.items()):
        tensors, plain[f"{module}.weight"] = encode(N, K, seed)
        stored |= {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}
    kept = {key: random_weight(*shape) for key, shape in KEPT.items()}
    last = [key for key in stored if key.startswith("model.layers.0.mlp.down_proj.") and "scale" in key]
    unused = {f"model.layers.0.self_attn.{letter}_proj.{letter}_scale": torch.tensor(1.0) for letter in "kv"}
    shards = [{key: tensor for key, tensor in stored.items() if key not in last} | unused]
    shards.append({key: stored[key] for key in last} | kept)
    save_checkpoint(folder, shards, {**CONFIG, "quantization_config": config})
    (folder / "generation_config.json").write_text("{}")
    return folder, plain | kept
