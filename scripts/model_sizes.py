"""Print README's table of sizes: the plans for models of published shape, whose weights are never there.

    .venv/bin/python scripts/model_sizes.py

A model class of diffusers or transformers, on the meta device with the dimensions of the published config.json,
gives the names and shapes; a safetensors file of such a header and a hole stands for the checkpoint; and what
convert-ckpt plans for it is exact to the byte, up to the header of each further shard. The defaults of diffusers'
classes are the published dimensions of the models named here. Takes a minute and no disk.
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
        plans = {format_: plan_conversion(folder, Options(format_)).components[0] for format_ in FORMATS}
    sizes = [plans["fp8"]["source_nbytes"], *(plan["output_nbytes"] for plan in plans.values())]
    shares = {f"{quantized_share(plan):.1%}" for plan in plans.values()}
    return f"| {name} | {' | '.join(map(format_nbytes, sizes))} | {', '.join(sorted(shares))} |"


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
