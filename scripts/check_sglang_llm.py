"""Load converted language models in SGLang 0.5.23's own loader on a CPU, and compare every weight with its source.

    scripts/setup_sglang.sh DIR
    .venv/bin/python scripts/check_sglang_llm.py DIR/bin/python [--models llama qwen3 qwen3-moe] [--variants fp8-block]

The models and the comparing are those of check_vllm.py; what is emulated sglang_llm_on_cpu.py says. A linear's codes
and scales are decoded as the model's load_weights left them, and again after process_weights_after_loading; experts are
compared byte for byte before it. Nothing is multiplied. Prints a line for each; exit 1 where the manifest says
otherwise.
"""

import sys
from pathlib import Path

import torch
from language_models import HELD, LOADED, Server, Tensors, is_of_experts, load_each, run, save
from torch import nn

VARIANTS = {
    "mxfp4": {"format": "mxfp4", "target": "sglang"},
    "mxfp4-compressed-tensors": {"format": "mxfp4", "layout": "plain", "dialect": "compressed-tensors"},
    "nvfp4-compressed-tensors": {"format": "nvfp4"},
    "mxfp8-compressed-tensors": {"format": "mxfp8"},
    "fp8": {"format": "fp8", "target": "sglang"},
    "fp8-channel": {"format": "fp8", "granularity": "channel", "target": "sglang"},
    "fp8-block": {"format": "fp8", "granularity": "block"},
    "fp8-tensor-fp8": {"format": "fp8", "granularity": "tensor", "dialect": "fp8"},
    "fp8-tensor-quark": {"format": "fp8", "granularity": "tensor", "dialect": "quark"},
    "fp8-tensor-compressed-tensors": {"format": "fp8", "granularity": "tensor", "dialect": "compressed-tensors"},
}
VARIANTS |= {f"{name}-first-kept": {**options, "keep_first": 1} for name, options in VARIANTS.items()}


def load_here(folder: Path) -> None:
    """In SGLang's Python: load, and save what the linears hold, decoded, and the parameters of experts."""
    from sglang_llm_on_cpu import load

    def see_loaded(model: nn.Module) -> None:
        experts = {name: parameter.data for name, parameter in model.named_parameters() if is_of_experts(name)}
        save({**decode_linears(model), **experts}, folder, LOADED)

    save(decode_linears(load(folder, see_loaded)), folder, HELD)


def decode_linears(model: nn.Module) -> Tensors:
    """Return name -> float32 [N, K] of each linear of the model."""
    from sglang.srt.layers.linear import LinearBase

    # SGLang loads with another default, by which our decoders would make their tables.
    torch.set_default_dtype(torch.float32)
    linears = {name: decode(module) for name, module in model.named_modules() if isinstance(module, LinearBase)}
    torch.set_default_dtype(torch.bfloat16)
    return linears


def decode(linear: nn.Module) -> torch.Tensor:
    """Return the float32 [N, K] of what a linear holds. SGLang keeps FP8 as a view [K, N] for the product."""
    from run_ckpt.contract.codec import dequantize
    from run_ckpt.contract.formats import PLAIN_MXFP4, PLAIN_NVFP4

    packed = getattr(linear, "weight_packed", None)
    if packed is not None:
        scale = 1 / linear.weight_global_scale.data.float().max()
        return dequantize(packed.data, linear.weight_scale.data, PLAIN_NVFP4, scale.reshape(1))
    weight = linear.weight.data
    if weight.dtype == torch.uint8:
        return dequantize(weight, linear.weight_scale.data, PLAIN_MXFP4, None)
    weight = (weight if weight.is_contiguous() else weight.t()).float()
    if linear.weight.dtype != torch.float8_e4m3fn:
        return weight
    N, K = weight.shape
    if hasattr(linear, "weight_scale_inv"):
        return weight * linear.weight_scale_inv.data.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    scale = linear.weight_scale.data.float().flatten()
    if scale.numel() not in (1, N):
        scale = scale.repeat_interleave(torch.tensor(linear.logical_widths))
    return weight * scale[:, None] if scale.numel() > 1 else weight * scale


def load_all_here(folders: list[str]) -> None:
    """In SGLang's Python: load each folder, one after the other."""
    from sglang_llm_on_cpu import prepare

    prepare()
    load_each(folders, load_here)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load_all_here(sys.argv[2:])
    else:
        sys.exit(run(Server("sglang", __file__, {}, VARIANTS)))
