"""Print README's table of sizes: the plans for models of published shape, whose weights are never there.

    .venv/bin/python scripts/model_sizes.py

A model class of diffusers or transformers, on the meta device with the dimensions of the published config.json,
gives the names and shapes; a safetensors file of such a header and a hole stands for the checkpoint; and what
convert-ckpt plans for it is exact to the byte, up to the header of each further shard. The defaults of diffusers'
classes are the published dimensions of the models named here. Takes minutes and no disk.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights

from convert_ckpt import Options, plan_conversion
from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.formats import FORMATS
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.header import build_header
from run_ckpt.storage.units import format_nbytes

# What these language models' config.json say, as far as it decides a shape.
QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
# What their config.json say where the class's defaults are another model's.
SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
HIDREAM_I1 = {
    "patch_size": 2,
    "in_channels": 16,
    "caption_channels": [4096, 4096],
    "axes_dims_rope": (64, 32, 32),
    "llama_layers": [*range(32), *[31] * 16],
}


def diffusion(class_name: str, **dimensions: Any) -> Callable[[], torch.nn.Module]:
    return lambda: getattr(diffusers, class_name)(**dimensions)


def language(kind: str, **dimensions: Any) -> Callable[[], torch.nn.Module]:
    config = getattr(transformers, f"{kind}Config")(tie_word_embeddings=False, **dimensions)
    return lambda: getattr(transformers, f"{kind}ForCausalLM")(config)


MODELS = {
    "Z-Image-Turbo": diffusion("ZImageTransformer2DModel"),
    "FLUX.1-dev": diffusion("FluxTransformer2DModel", guidance_embeds=True),
    "FLUX.2-dev": diffusion("Flux2Transformer2DModel"),
    "Qwen-Image": diffusion("QwenImageTransformer2DModel"),
    "Wan2.2-T2V-A14B (each of two)": diffusion("WanTransformer3DModel"),
    "HunyuanVideo": diffusion("HunyuanVideoTransformer3DModel"),
    "LTX-2": diffusion("LTX2VideoTransformer3DModel"),
    "Chroma1-HD": diffusion("ChromaTransformer2DModel"),
    "SD3.5-large": diffusion("SD3Transformer2DModel", **SD35_LARGE),
    "HiDream-I1": diffusion("HiDreamImageTransformer2DModel", **HIDREAM_I1),
    "Lumina-Image-2.0": diffusion("Lumina2Transformer2DModel"),
    "CogVideoX-5B": diffusion("CogVideoXTransformer3DModel", num_attention_heads=48, num_layers=42),
    "Cosmos-1.0 7B": diffusion("CosmosTransformer3DModel"),
    "LTX-Video 2B": diffusion("LTXVideoTransformer3DModel"),
    "HunyuanVideo-1.5": diffusion("HunyuanVideo15Transformer3DModel"),
    "HunyuanImage-2.1": diffusion("HunyuanImageTransformer2DModel"),
    "Kandinsky-5.0 Lite": diffusion("Kandinsky5Transformer3DModel"),
    "Wan2.1-VACE-14B": diffusion("WanVACETransformer3DModel"),
    "Wan2.2-Animate-14B": diffusion("WanAnimateTransformer3DModel"),
    "MiniMax-H3": diffusion("MiniMaxH3Transformer3DModel"),
    "Qwen3-8B": language("Qwen3", **QWEN3_8B),
    "Llama-3.1-70B": language("Llama", **LLAMA_70B),
}


def main() -> None:
    labels = [quant_format.label for quant_format in FORMATS.values()]
    print(f"| model | BF16 | {' | '.join(labels)} | parameters quantized |")
    print(f"|---|{'---:|' * (len(labels) + 2)}")
    for name, build in MODELS.items():
        print(row(name, build), flush=True)


def row(name: str, build: Callable[[], torch.nn.Module]) -> str:
    """Return the line of the table for a model."""
    with tempfile.TemporaryDirectory() as folder:
        write_skeleton(build, Path(folder))
        plans = {format_: make_plan(folder, format_) for format_ in FORMATS}
    sizes = [format_nbytes(plan["output_nbytes"]) if plan else "-" for plan in plans.values()]
    shares = {f"{quantized_share(plan):.1%}" for plan in plans.values() if plan}
    source = format_nbytes(plans["fp8"]["source_nbytes"])
    return f"| {name} | {' | '.join([source, *sizes])} | {', '.join(sorted(shares))} |"


def make_plan(folder: str, format_name: str) -> dict[str, Any] | None:
    """Return the plan of the only component, None where the usual server would load the result wrong."""
    try:
        return plan_conversion(folder, Options(format_name)).components[0]
    except FaultsError:
        return None


def write_skeleton(build: Callable[[], torch.nn.Module], folder: Path) -> None:
    """Write the checkpoint of a model as a header with a hole behind it, in BF16, and its config.json."""
    with init_empty_weights():
        model = build()
    specs = [TensorSpec(name, "BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    header = build_header(specs, {"format": "pt"})
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header.data)
        file.truncate(header.file_nbytes)
    class_name = type(model).__name__
    if is_diffusers(model):
        config = {"_class_name": class_name, **model.config}
    else:
        config = {**model.config.to_dict(), "architectures": [class_name]}
    (folder / "config.json").write_text(json.dumps(config))


def is_diffusers(model: torch.nn.Module) -> bool:
    return isinstance(model, diffusers.ModelMixin)


def quantized_share(plan: dict[str, Any]) -> float:
    sizes = {"quantized": 0, "copied": 0}
    for tensor in plan["tensors"]:
        kind = "copied" if tensor["format"] == "copied" else "quantized"
        sizes[kind] += torch.Size(tensor["shape"]).numel()
    return sizes["quantized"] / sum(sizes.values())


if __name__ == "__main__":
    main()
