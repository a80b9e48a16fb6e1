"""Sources that are not what they seem: one line says what each is and what to do, and nothing is left behind."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import convert, load_all, random_weight, save_checkpoint
from tests.test_hub_source import run_command


def of_tensors(*names: str, config: dict[str, object] | None = None) -> Callable[[Path], Path]:
    """Return a maker of a checkpoint that has linear weights of these names: one file, or a folder with a config."""

    def make(folder: Path) -> Path:
        path = save_checkpoint(folder, [{name: random_weight(256, 256) for name in names}], config)
        return path if config else path / "model.safetensors"

    return make


def of_bytes(name: str, data: bytes) -> Callable[[Path], Path]:
    """Return a maker of a file."""

    def make(folder: Path) -> Path:
        folder.mkdir()
        (folder / name).write_bytes(data)
        return folder / name

    return make


def of_class(class_name: str) -> Callable[[Path], Path]:
    return of_tensors("blocks.0.proj.weight", config={"_class_name": class_name})


def in_folder(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """Give the folder instead of the file in it."""
    return lambda folder: make(folder).parent


def make_pipeline_without_transformer(folder: Path) -> Path:
    for name in ("unet", "vae", "text_encoder"):
        save_checkpoint(folder / name, [{"x.weight": torch.ones(2)}], {"_class_name": name})
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)}, folder / "v1-5.safetensors")
    return folder


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9942567\n"
PICKLE = r'\.ckpt: a pickle .*run: python -c ".*weights_only=True'
MERGE = r"a LoRA.*fuse_lora\(\).*save_pretrained\(MERGED\)"
# What is given -> its maker, and what is said of it.
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "LoRA of diffusers": (of_tensors("transformer.blocks.0.attn.to_q.lora_A.weight", "x.lora_B.weight"), MERGE),
    "LoRA of kohya": (of_tensors("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"), MERGE),
    "LoRA as LoKr": (of_tensors("diffusion_model.layers.0.attention.qkv.lokr_w1"), MERGE),
    "LoRA of peft": (of_tensors("base_model.model.layers.0.q_proj.lora_A.weight"), r"LoRA of peft.*merge_and_unload"),
    "VAE": (of_class("AutoencoderKL"), "a VAE.*Convert the transformer"),
    "VAE in one file": (of_tensors("decoder.conv_in.weight", "encoder.conv_in.weight"), "a VAE"),
    "VAE of Wan": (of_tensors("encoder.conv1.weight", "decoder.conv1.weight"), "a VAE"),
    "UNet": (of_class("UNet2DConditionModel"), "a UNet.*a model with a diffusion transformer"),
    "UNet in one file": (of_tensors("down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.x.weight"), "a UNet"),
    "ControlNet": (of_class("FluxControlNetModel"), "a ControlNet.*beside a converted transformer"),
    "ControlNet in one file": (of_tensors("controlnet_cond_embedding.conv_in.weight"), "a ControlNet"),
    "Stable Diffusion 1.5 in one file": (
        of_tensors("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"),
        "a Stable Diffusion 1, 2 or XL file.*UNets are not converted",
    ),
    "a class without a map": (
        of_tensors("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
        r"SD3Transformer2DModel\.from_single_file\(FILE\)\.save_pretrained\(DIR\)",
    ),
    "git-lfs pointer": (of_bytes("model.safetensors", POINTER), r"a git-lfs pointer.*git lfs pull"),
    "git-lfs pointer in a folder": (in_folder(of_bytes("model.safetensors", POINTER)), r"a git-lfs pointer"),
    "GGUF": (of_bytes("flux-Q4_K.gguf", b"GGUF\3\0\0\0"), "GGUF, whose weights are quantized already.*safetensors"),
    "GGUF under another name": (of_bytes("model.safetensors", b"GGUF\3\0\0\0" + bytes(8)), "GGUF"),
    "pickle": (of_bytes("model.ckpt", b"\x80\x02}q"), PICKLE),
    "pickle in a zip": (of_bytes("model.ckpt", b"PK\3\4"), PICKLE),
    "pickle under another name": (of_bytes("model.safetensors", b"PK\3\4" + bytes(100)), "a pickle"),
    "pickles in a folder": (in_folder(of_bytes("pytorch_model.bin", b"")), r"pytorch_model\.bin: a pickle"),
    "ONNX": (of_bytes("model.onnx", b"\x08\x07"), "an ONNX model"),
    "pipeline without transformer": (
        make_pipeline_without_transformer,
        r"a pipeline \(StableDiffusionPipeline\) without a transformer; it holds text_encoder, unet, vae",
    ),
}
ASKED = {
    "unknown class": (of_class("SomeTransformer"), "no preset knows SomeTransformer.*--preset generic"),
    "no config.json": (of_tensors("blocks.0.proj.weight"), r"no config\.json says what class.*--preset generic"),
}
CASES = [(name, *case, 1) for name, case in REFUSED.items()] + [(name, *case, 2) for name, case in ASKED.items()]


@pytest.mark.parametrize(("make", "says", "code"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_it_is_and_what_to_do_is_said_in_one_line(
    make: Callable[[Path], Path],
    says: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make(tmp_path / "in")
    for more in ((str(tmp_path / "out"),), ("--dry-run",)):
        assert run_command(monkeypatch, str(source), *more, "--format", "mxfp4") == code
        *title, line = capsys.readouterr().err.splitlines()
        assert re.search(says, line)
        assert len(title) <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ASKED)
def test_a_class_that_no_preset_knows_is_converted_when_asked_for(name: str, tmp_path: Path) -> None:
    source = ASKED[name][0](tmp_path / "in")
    assert convert(source, tmp_path / "out", format="fp8", preset="generic").n_converted == 1


def shards(tensors: dict[str, torch.Tensor], n: int) -> Iterable[tuple[str, dict[str, torch.Tensor]]]:
    for i, name in enumerate(tensors):
        yield f"pytorch_model-{i + 1:05}-of-{n:05}.bin", {name: tensors[name]}


def test_the_command_for_pickles_makes_what_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {f"model.layers.{i}.mlp.up_proj.weight": random_weight(256, 256, seed=i) for i in range(2)}
    source = tmp_path / "in"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    for name, part in shards(weights, 2):
        torch.save({"state_dict": part, "step": 3} if name.startswith("pytorch_model-00001") else part, source / name)
    assert run_command(monkeypatch, str(source), str(tmp_path / "out"), "--format", "fp8") == 1
    command = re.search(r'python -c "(.*)"$', capsys.readouterr().err.strip())
    assert command
    subprocess.run([sys.executable, "-c", command[1]], cwd=source, check=True)
    assert load_all(source).keys() == weights.keys()
    assert convert(source, tmp_path / "out", format="fp8").n_converted == 2
