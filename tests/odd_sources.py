"""Sources that are not what they seem, for the table of mistakes: name -> what makes the folder."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.checkpoints import random_weight, save_checkpoint


def _of_tensors(*names: str, class_name: str | None = None) -> Callable[[Path], object]:
    """Return a maker of a checkpoint that has linear weights of these names, and a config.json for a class."""
    config: dict[str, object] | None = {"_class_name": class_name} if class_name else None
    return lambda folder: save_checkpoint(folder, [{name: random_weight(256, 256) for name in names}], config)


def _of_bytes(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder.mkdir(), (folder / name).write_bytes(data))


def _pipeline_without_transformer(folder: Path) -> None:
    for name in ("unet", "vae", "text_encoder"):
        save_checkpoint(folder / name, [{"x.weight": torch.ones(2)}], {"_class_name": name})
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)}, folder / "v1-5.safetensors")


_BLOCK = "blocks.0.proj.weight"
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9942567\n"
# Version 3, one tensor, no values; 32 zeros in F32.
_GGUF_OF_LLAMA = (
    b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 17) + b"blk.0.attn_q.bias" + struct.pack("<IQIQ", 1, 32, 0, 0)
).ljust(96, b"\0") + bytes(128)
ODD_SOURCES: dict[str, Callable[[Path], object]] = {
    "lora": _of_tensors("transformer.blocks.0.attn.to_q.lora_A.weight", "x.lora_B.weight"),
    "lora-kohya": _of_tensors("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
    "lora-lokr": _of_tensors("diffusion_model.layers.0.attention.qkv.lokr_w1"),
    "lora-peft": _of_tensors("base_model.model.layers.0.q_proj.lora_A.weight"),
    "vae": _of_tensors(_BLOCK, class_name="AutoencoderKL"),
    "vae-file": _of_tensors("decoder.conv_in.weight", "encoder.conv_in.weight"),
    "vae-wan": _of_tensors("encoder.conv1.weight", "decoder.conv1.weight"),
    "unet": _of_tensors(_BLOCK, class_name="UNet2DConditionModel"),
    "unet-file": _of_tensors("down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.x.weight"),
    "controlnet": _of_tensors(_BLOCK, class_name="FluxControlNetModel"),
    "controlnet-file": _of_tensors("controlnet_cond_embedding.conv_in.weight"),
    "sd15": _of_tensors("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"),
    "sd3": _of_tensors("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
    "vace": _of_tensors(
        "head.modulation", "patch_embedding.weight", "blocks.0.self_attn.norm_q.weight", "vace_blocks.0.x.weight"
    ),
    "flux-misshapen": _of_tensors(
        "img_in.weight",
        "final_layer.linear.weight",
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "double_blocks.0.img_attn.norm.key_norm.scale",
        "double_blocks.0.img_mod.lin.weight",
    ),
    "flux-part": _of_tensors("double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_mod.lin.weight"),
    "wan-part": _of_tensors("head.modulation", "patch_embedding.weight", "blocks.0.self_attn.norm_q.weight"),
    "pointer": _of_bytes("model.safetensors", _POINTER),
    "gguf": _of_bytes("flux-Q4_K.gguf", b"GGUF\3\0\0\0"),
    "gguf-llama": _of_bytes("llama.gguf", _GGUF_OF_LLAMA),
    "gguf-renamed": _of_bytes("model.safetensors", b"GGUF\3\0\0\0" + bytes(8)),
    "pickle": _of_bytes("model.ckpt", b"\x80\x02}q"),
    "pickle-renamed": _of_bytes("model.safetensors", b"PK\3\4" + bytes(100)),
    "pytorch-bin": _of_bytes("pytorch_model.bin", b""),
    "archive": _of_bytes("flux.zip", b"PK\3\4" + bytes(100)),
    "parent": lambda folder: save_checkpoint(folder / "flux" / "transformer", [{_BLOCK: random_weight(256, 256)}], {}),
    "hub-cache": lambda folder: save_checkpoint(
        folder / "models--me--flux" / "snapshots" / ("0123456789" * 4), [{_BLOCK: random_weight(256, 256)}], {}
    ),
    "onnx": _of_bytes("model.onnx", b"\x08\x07"),
    "pipeline-unet": _pipeline_without_transformer,
    "unknown-class": _of_tensors(_BLOCK, class_name="SomeTransformer"),
    "no-config": _of_tensors(_BLOCK),
}
