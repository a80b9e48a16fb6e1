"""A table of mistakes: what is typed, the exit code, and what the message says. To add one: a row, and its THINGS.

Each runs in this process, in a folder that holds tests/mistakes.py's THINGS. The message is compared as far as it is
given, white space aside.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from convert_ckpt.cli import cli as convert_ckpt
from run_ckpt.cli.command import run_command
from run_ckpt.cli.main import run_ckpt
from tests.mistakes import make_things

COMMANDS: dict[str, click.Command] = {"convert-ckpt": convert_ckpt, "run-ckpt": run_ckpt}
MOST_LINES = 3


class Mistake(NamedTuple):
    """A command line, its exit code, and (a part of) what it prints to standard error."""

    command: str
    code: int
    message: str


COMMAND_LINE = [
    Mistake("convert-ckpt", 2, "Missing argument 'SOURCE'."),
    Mistake("convert-ckpt good OUT", 2, "Missing option '--format'. Choose from: mxfp4, nvfp4, mxfp8, fp8"),
    Mistake("convert-ckpt good --format fp8", 2, "Missing argument 'OUTPUT' (only --dry-run goes without)."),
    Mistake("convert-ckpt good OUT --format", 2, "Option '--format' requires an argument."),
    Mistake("convert-ckpt good OUT --fromat fp8", 2, "No such option '--fromat'. Did you mean '--format'?"),
    Mistake("convert-ckpt good OUT --format int4", 2, "'--format': 'int4' is not one of 'mxfp4', 'nvfp4', 'mxfp8',"),
    Mistake("convert-ckpt good OUT --format mxfp4 --layout flat", 2, "'--layout': 'flat' is not one of"),
    Mistake(
        "convert-ckpt good OUT --format fp8 --granularity row", 2, "'row' is not one of 'tensor', 'channel', 'block'."
    ),
    Mistake("convert-ckpt good OUT --format mxfp4 --scale-rule best", 2, "'best' is not one of 'even', 'floor',"),
    Mistake(
        "convert-ckpt good OUT --format fp8 --dialect gguf", 2, "'--dialect': 'gguf' is not one of 'mxfp4', 'fp8',"
    ),
    Mistake("convert-ckpt good OUT --format fp8 --preset sdxl", 2, "'--preset': 'sdxl' is not one of '"),
    Mistake("convert-ckpt good OUT --format fp8 --workers 0", 2, "'--workers': 0 is not in the range 1<=x<=64."),
    Mistake("convert-ckpt good OUT --format fp8 --max-memory lots", 2, "'lots' is no size. Write 4GB, say."),
    Mistake("convert-ckpt good OUT --format fp8 --method gptq", 2, "--method gptq: needs --calibration DIR,"),
    Mistake("convert-ckpt good OUT --format fp8 --static", 2, "--static: needs --calibration DIR,"),
    Mistake(
        "convert-ckpt good OUT --format fp8 --calibration nowhere", 2, "'--calibration': Path 'nowhere' does not exist."
    ),
    Mistake(
        "convert-ckpt good OUT --format fp8 --calibration empty",
        2,
        "it holds no .safetensors file. Give the folder that run-ckpt calibrate wrote.",
    ),
    Mistake("convert-ckpt good OUT --format fp8 --calibration file", 2, "file: 4 bytes is too short for a safetensors"),
    Mistake(
        "convert-ckpt good OUT --format fp8 --calibration other/model.safetensors",
        2,
        "expected one F32 value named <layer>.input_amax, found BF16 [512, 256].",
    ),
    Mistake("convert-ckpt good OUT --format fp8 --max-size lots", 2, "'lots' is no size. Write 4GB, say."),
    Mistake("convert-ckpt good OUT --format fp8 --max-size 9GB", 2, "and fits as it is."),
    Mistake(
        "convert-ckpt good OUT --format fp8 --max-size 9kB", 2, "is the smallest size possible, with every layer in"
    ),
    Mistake("convert-ckpt good OUT --format fp8 --max-size 9kB --min-sqnr 9", 2, "Give either."),
    Mistake("convert-ckpt good OUT --format fp8 --sensitivities file", 2, "decides nothing without --max-size SIZE or"),
    Mistake(
        "convert-ckpt good OUT --format fp8 --min-sqnr 9 --sensitivities file", 2, "file: not a readable TOML file"
    ),
    Mistake("convert-ckpt good OUT --format fp8 --keep-first -1", 2, "'--keep-first': -1 is not in the range x>=0."),
    Mistake("convert-ckpt good OUT --format fp8 --private", 2, "--private goes with --push-to-hub OWNER/NAME."),
    Mistake(
        "convert-ckpt good OUT --format fp8 --push-to-hub digits", 2, "digits: not the name of a repo. Give owner/name."
    ),
    Mistake("convert-ckpt good OUT --format fp8 --push-to-hub me/x-4bit", 2, "contains -4bit"),
    Mistake(
        "convert-ckpt good OUT --format mxfp4 --dialect quark",
        2,
        "--dialect quark: can't say --format mxfp4 --layout aiter. Choose one of mxfp4.",
    ),
    Mistake("convert-ckpt good OUT --format fp8 --keep-source", 2, "--keep-source: good is here and always stays."),
    Mistake(
        "convert-ckpt good OUT --format fp8 --component transformer",
        2,
        "--component transformer: not in SOURCE. Its components: none: SOURCE is a single component.",
    ),
    Mistake(
        "convert-ckpt pipeline OUT --format fp8 --component vae",
        2,
        "--component vae: not in SOURCE. Its components: transformer, transformer_2.",
    ),
]

EFFECTS = [
    Mistake(
        "convert-ckpt good OUT --format mxfp4 --layout plain --dialect gpt-oss",
        2,
        "--dialect gpt-oss: is for experts that are stored all in one tensor, those of gpt-oss. Leave it out.",
    ),
    Mistake(
        "run-ckpt relayout result OUT --layout plain --dialect gpt-oss", 2, "--dialect gpt-oss: is for experts that"
    ),
    Mistake(
        "run-ckpt relayout result OUT --layout plain --dialect fp8",
        2,
        "--dialect fp8: can't say --format mxfp4 --layout plain. Choose one of mxfp4, quark, compressed-tensors.",
    ),
    Mistake(
        "convert-ckpt good OUT --format mxfp4 --granularity channel",
        2,
        "--granularity channel: has no effect on mxfp4, only on fp8. Leave it out.",
    ),
    Mistake("convert-ckpt good OUT --format fp8 --layout plain", 2, "--layout plain: has no effect on fp8, only on"),
    Mistake("convert-ckpt good OUT --format fp8 --scale-rule mse", 2, "--scale-rule mse: has no effect on fp8,"),
    Mistake("convert-ckpt good OUT --format mxfp8 --scale-rule mse", 2, "mxfp8 knows roundup, floor. Choose one of"),
]

SHARDS = [
    Mistake("convert-ckpt good OUT --format fp8 --shard-size big", 2, "'big' is no size. Write 4GB, say."),
]

RULES = [
    Mistake("convert-ckpt good OUT --format mxfp4 --min-sqnr 99", 1, "are kept. 4 for: --min-sqnr 99. Ask for less."),
    Mistake("convert-ckpt good OUT --format mxfp4 --keep-first 9", 1, "4 for: --keep-first 9. Keep fewer blocks."),
    Mistake(
        "convert-ckpt good OUT --format fp8 --ignore 'decoder.*'", 2, "decoder.*: matches no linear layer of good."
    ),
    Mistake("convert-ckpt good OUT --format fp8 --ignore '*'", 1, "nothing to convert: all 4 linear layers are kept."),
    Mistake("convert-ckpt good OUT --format fp8 --recipe nowhere.toml", 2, "File 'nowhere.toml' does not exist."),
    Mistake(
        "convert-ckpt good OUT --format fp8 --recipe recipe-broken.toml",
        2,
        "recipe-broken.toml: not a readable TOML file",
    ),
    Mistake("convert-ckpt good OUT --format fp8 --recipe recipe-key.toml", 2, "unknown keys ['presett']. Known keys:"),
    Mistake(
        "convert-ckpt good OUT --format fp8 --recipe recipe-preset.toml", 2, "--preset fluxx: unknown. Known presets:"
    ),
    Mistake(
        "convert-ckpt good OUT --format fp8 --recipe recipe-format.toml",
        2,
        'rule 1: needs match = "PATTERN" and format =',
    ),
    Mistake(
        "convert-ckpt good OUT --format fp8 --recipe recipe-unmatched.toml",
        2,
        "decoder.*: matches no linear layer of good.",
    ),
    Mistake(
        "convert-ckpt good OUT --format mxfp4 --layout plain --recipe recipe-splits.toml",
        2,
        "are fused at load and need one format, but the recipe gives fp8, mxfp4. Name them all in one rule.",
    ),
]

SOURCE = [
    Mistake("convert-ckpt good/config.json OUT --format fp8", 1, "not a .safetensors file. Give its folder: good."),
    Mistake("convert-ckpt pipeline/model_index.json OUT --format fp8", 1, "Give its folder: pipeline."),
    Mistake("convert-ckpt nowhere OUT --format fp8", 1, "nowhere: no such file or folder. Give a checkpoint folder"),
    Mistake(
        "convert-ckpt empty OUT --format fp8",
        1,
        "it holds no .safetensors file. Give the folder that holds config.json",
    ),
    Mistake(
        "convert-ckpt model.txt OUT --format fp8", 1, "model.txt: not a .safetensors file. Give a checkpoint folder"
    ),
    Mistake("convert-ckpt truncated OUT --format fp8", 1, "but the file has 262,300. Fetch or write this file again."),
    Mistake("convert-ckpt shard-missing OUT --format fp8", 1, "model-00002-of-00002.safetensors: missing"),
    Mistake(
        "convert-ckpt unlisted-shard-missing OUT --format fp8", 1, "model: shards [2] of 2 are missing. Fetch them."
    ),
    Mistake("convert-ckpt index-broken OUT --format fp8", 1, "model.safetensors.index.json: not a usable index"),
    Mistake(
        "convert-ckpt index-outside OUT --format fp8",
        1,
        "names '../secret.safetensors', which is not a file of this folder.",
    ),
    Mistake(
        "convert-ckpt index-wrong OUT --format fp8", 1, "the index says model-00002-of-00002.safetensors, but it is in"
    ),
    Mistake("convert-ckpt twice OUT --format fp8", 1, "Remove the copy that does not belong."),
    Mistake(
        "convert-ckpt web-page OUT --format fp8", 1, "This is no safetensors file, or a damaged one; fetch it again."
    ),
    Mistake("convert-ckpt config-broken OUT --format fp8", 1, "config.json: not readable"),
    Mistake(
        "convert-ckpt config-quantized OUT --format fp8", 1, "It has integers with zero points, packed in the order of"
    ),
    Mistake("convert-ckpt fp8-weights OUT --format fp8", 1, "already quantized. Convert the original checkpoint."),
    Mistake("convert-ckpt int4-weights OUT --format fp8", 1, "o_proj.qweight: already quantized. Convert the original"),
    Mistake(
        "convert-ckpt no-linear OUT --format fp8", 1, "nothing to convert: it holds no 2-D weight of a linear layer."
    ),
    Mistake(
        "convert-ckpt small OUT --format mxfp4", 1, "1 for: N = 128 is under 256. Write a --recipe that says otherwise."
    ),
    Mistake("convert-ckpt narrow OUT --format mxfp4", 1, "K = 320 is not a multiple of 256 (see --allow-unaligned-k)."),
    Mistake("convert-ckpt hf://flux OUT --format fp8", 2, "hf://flux: names no model of the Hub."),
    Mistake("convert-ckpt ftpp://host/flux OUT --format fp8", 2, "ftpp://: Protocol not known: ftpp."),
]

OUTPUT = [
    Mistake("convert-ckpt good file/out --format fp8", 1, "file: is a file, in which no folder can be. Choose another"),
    Mistake("convert-ckpt OUT good --format fp8", 1, "good: is not empty. Choose another folder, or remove this one."),
    Mistake("convert-ckpt good good --format fp8", 1, "good: is the source. Choose another folder."),
    Mistake(
        "convert-ckpt good good/fp8 --format fp8", 1, "good/fp8: lies in the source. Choose a folder outside of it."
    ),
    Mistake("convert-ckpt good . --format fp8", 1, ".: holds the source. Choose another folder."),
    Mistake("convert-ckpt good full --format fp8", 1, "full: is not empty. Choose another folder, or remove this one."),
    Mistake(
        "convert-ckpt good result --format fp8",
        1,
        "result: holds another result (recipe.dialect was 'mxfp4', now 'compressed-tensors'; recipe.format was",
    ),
    Mistake("convert-ckpt other result --format mxfp4", 1, "result: holds another result (source.name was 'good', now"),
    Mistake(
        "convert-ckpt good result-file-missing --format mxfp4", 1, "config.json: is missing or of another size than"
    ),
    Mistake("convert-ckpt good file --format fp8", 1, "file: is a file. Choose a folder."),
]

RESULTS = [
    Mistake("run-ckpt quantize good", 2, "No such command 'quantize'. Did you mean 'dequantize'?"),
    Mistake("run-ckpt inspect", 2, "Missing argument 'OUTPUT'."),
    Mistake("run-ckpt inspect nowhere", 1, "nowhere: no such file or folder. Give a checkpoint folder"),
    Mistake("run-ckpt inspect good", 1, "good: no quantization_manifest.json, and no usable quantization_config"),
    Mistake("run-ckpt inspect result-edited", 1, "was changed after it was written. Fetch it again, or convert again."),
    Mistake("run-ckpt inspect result-contradicts", 1, "dialect 'klingon' is unknown; known are mxfp4, fp8,"),
    Mistake("run-ckpt inspect result-of-the-future", 1, "schema version 99; this version reads"),
    Mistake(
        "run-ckpt inspect result --device tpu", 2, "or a GPU's architecture such as gfx950, gfx942, sm90 or sm120."
    ),
    Mistake("run-ckpt verify nowhere", 1, "nowhere: no such file or folder."),
    Mistake("run-ckpt verify good", 1, "fault: good: no quantization_manifest.json."),
    Mistake("run-ckpt verify result-flipped", 1, "its bytes have changed. Fetch it again, or convert again."),
    Mistake("run-ckpt verify result-file-missing", 1, "fault: config.json: missing, but the manifest lists it."),
    Mistake("run-ckpt verify result-with-extra", 1, "fault: notes.txt: not listed in the manifest. Remove it."),
    Mistake("run-ckpt verify result --source nowhere", 1, "nowhere: no such file or folder."),
    Mistake("run-ckpt verify result --source other", 1, "source other: the checkpoint was not made from it: 4 of 4"),
    Mistake("run-ckpt verify good --source result", 2, "write run-ckpt verify result --source good."),
    Mistake("run-ckpt verify result --min-sqnr high", 2, "'--min-sqnr': 'high' is not a valid float."),
    Mistake("run-ckpt verify result --source empty", 1, "fault: source empty: it holds no .safetensors file."),
    Mistake("run-ckpt explain result decoder", 2, "decoder: no such layer or tensor."),
    Mistake("run-ckpt explain result", 2, "Missing argument 'LAYER'."),
    Mistake("run-ckpt explain result model.layers.0.self_attn.q_prj", 2, "Nearest: model.layers.0.self_attn.q_proj"),
    Mistake("run-ckpt diff result", 2, "Missing argument 'B'."),
    Mistake("run-ckpt diff result good", 1, "good: no quantization_manifest.json."),
    Mistake("run-ckpt dequantize result full", 1, "full: is not empty. Choose another folder, or remove this one."),
    Mistake("run-ckpt dequantize result result", 1, "result: is the source. Choose another folder."),
    Mistake("run-ckpt dequantize result", 2, "Missing argument 'DIR'."),
    Mistake("run-ckpt dequantize result-flipped OUT", 1, "nothing was written: the checkpoint is damaged"),
    Mistake("run-ckpt dequantize result OUT --dtype int8", 2, "'--dtype': 'int8' is not one of 'bfloat16', 'source'."),
    Mistake("run-ckpt relayout result OUT", 2, "Missing option '--layout'."),
    Mistake("run-ckpt relayout result OUT --layout aiter", 2, "result: is in layout aiter, dialect mxfp4 already."),
    Mistake(
        "run-ckpt relayout result-fp8 OUT --layout plain",
        2,
        "has no MXFP4 layer. Other formats have one layout; nothing to do.",
    ),
    Mistake("run-ckpt card good", 1, "good: no quantization_manifest.json."),
    Mistake("run-ckpt report good", 1, "good: no quantization_manifest.json."),
    Mistake("run-ckpt push result me/digits", 2, "a placeholder. Give --tool-url URL, or set CONVERT_CKPT_URL."),
    Mistake("run-ckpt push result digits", 2, "digits: not the name of a repo. Give owner/name."),
    Mistake("run-ckpt push result", 2, "Missing argument 'OWNER/NAME'."),
]

RUNNING = [
    Mistake("run-ckpt report result --output nowhere/r.html", 1, "nowhere/r.html: its folder does not exist. Make it"),
    Mistake(
        "run-ckpt generate --model-path pipelin --transformer-path result --prompt cat --output cat.png",
        2,
        "--model-path pipelin: no such folder (did you mean pipeline?). Give a folder or owner/name.",
    ),
    Mistake(
        "run-ckpt generate --model-path good --transformer-path result --prompt cat --output cat.png",
        2,
        "--model-path good: no model_index.json, so it is no pipeline in diffusers' layout.",
    ),
    Mistake(
        "run-ckpt calibrate --model-path nowhere --output OUT --text prompts.txt",
        2,
        "--model-path nowhere: no such folder. Give a folder or owner/name.",
    ),
    Mistake(
        "run-ckpt compare --model-path good --transformer-path result --text prompts.txt",
        1,
        "--model-path good: no language model that transformers can load (",
    ),
    Mistake("run-ckpt bench result --rows few", 2, "'few' is no list of numbers such as 1,16,256,4096."),
    Mistake("run-ckpt bench result --rows 0", 2, "'--rows': each M must be at least 1."),
    Mistake("run-ckpt bench result --backend magic", 2, "no backend 'magic'. Choose one of aiter, scaled_mm,"),
    Mistake("run-ckpt bench result --activations int8", 2, "no activations 'int8'. Choose one of bf16, fp8, mxfp8,"),
    Mistake(
        "run-ckpt bench result-fp8 --backend scaled_mm --activations bf16",
        1,
        "backend scaled_mm can't run it with bf16 activations on cpu: it multiplies fp8 weights by fp8 activations.",
    ),
    Mistake("run-ckpt bench result --device tpu", 2, "'tpu' is no device of this machine, which has"),
    Mistake(
        "run-ckpt compare --model-path good --transformer-path result", 2, "give either --prompts FILE, for a pipeline,"
    ),
    Mistake(
        "run-ckpt compare --model-path good --transformer-path result --prompts nowhere.txt",
        2,
        "'--prompts': File 'nowhere.txt' does not exist.",
    ),
    Mistake(
        "run-ckpt compare --model-path good --transformer-path result --prompts prompts.txt --fail-under beauty=3",
        2,
        "--fail-under beauty=3: 'beauty' is none of snr, snr_summed, cosine, psnr,",
    ),
    Mistake(
        "run-ckpt compare --model-path good --transformer-path result --prompts prompts.txt --fail-under psnr",
        2,
        "--fail-under psnr: '' is no number. Write psnr=0.5, say.",
    ),
    Mistake(
        "run-ckpt calibrate --model-path good --output OUT --prompts prompts.txt --text prompts.txt",
        2,
        "give either --prompts FILE, for a pipeline, or --text FILE, for a language model.",
    ),
    Mistake(
        "run-ckpt calibrate --model-path good --output OUT --text prompts.txt --memory lots", 2, "'lots' is no size."
    ),
    Mistake(
        "run-ckpt generate --model-path good --transformer-path result --prompt cat --output cat.txt",
        2,
        "--output cat.txt: the name must end in one of .png, .jpg,",
    ),
]

ODD_SOURCES = [
    Mistake(
        "convert-ckpt lora OUT --format mxfp4",
        1,
        "it is a LoRA, which changes the weights of a model and is none. Merge it first: pipeline.load_lora",
    ),
    Mistake("convert-ckpt lora-kohya OUT --format mxfp4", 1, "it is a LoRA, which"),
    Mistake("convert-ckpt lora-lokr OUT --format mxfp4", 1, "it is a LoRA, which"),
    Mistake(
        "convert-ckpt lora-peft OUT --format mxfp4",
        1,
        "it is a LoRA of peft, which changes the weights of a model and is none. Merge it first: PeftModel.",
    ),
    Mistake(
        "convert-ckpt vae OUT --format mxfp4",
        1,
        "it is a VAE. It stays as it is, as no format here stores convolutions. Convert the transformer beside it.",
    ),
    Mistake("convert-ckpt vae-file OUT --format mxfp4", 1, "it is a VAE."),
    Mistake("convert-ckpt vae-wan OUT --format mxfp4", 1, "it is a VAE."),
    Mistake(
        "convert-ckpt unet OUT --format mxfp4",
        1,
        "it is a UNet. It stays as it is, as no format here stores convolutions. Give a model with a diffusion",
    ),
    Mistake("convert-ckpt unet-file OUT --format mxfp4", 1, "it is a UNet."),
    Mistake(
        "convert-ckpt controlnet OUT --format mxfp4",
        1,
        "it is a ControlNet. It runs as it is beside a converted transformer",
    ),
    Mistake("convert-ckpt controlnet-file OUT --format mxfp4", 1, "it is a ControlNet."),
    Mistake(
        "convert-ckpt sd15 OUT --format mxfp4",
        1,
        "it is a Stable Diffusion 1, 2 or XL file, with UNet, VAE and text encoder in one. UNets are not converted",
    ),
    Mistake(
        "convert-ckpt sd3 OUT --format mxfp4",
        1,
        "diffusers.SD3Transformer2DModel.from_single_file(FILE).save_pretrained(DIR), and convert DIR.",
    ),
    Mistake(
        "convert-ckpt flux-misshapen OUT --format mxfp4",
        1,
        "its tensors are named as a FluxTransformer2DModel's, but have other shapes. Give a checkpoint in diffusers'",
    ),
    Mistake("convert-ckpt flux-part OUT --format mxfp4", 1, "nothing in it is the x_embedder.weight of a Flux"),
    Mistake(
        "convert-ckpt wan-part OUT --format mxfp4",
        1,
        "nothing in it is the proj_out.weight of a WanTransformer3DModel, which the rest is of. Give the folder with",
    ),
    Mistake(
        "convert-ckpt good/model-00001-of-00002.safetensors OUT --format fp8",
        1,
        "it is one of 2 shards. Give the folder that holds them all: good.",
    ),
    Mistake(
        "convert-ckpt vace OUT --format mxfp4",
        1,
        "vace_blocks.0.x.weight: no tensors of WanTransformer3DModel, which the others are.",
    ),
    Mistake(
        "convert-ckpt pointer OUT --format mxfp4",
        1,
        "model.safetensors: a git-lfs pointer, not the file itself. Fetch the file: run git lfs pull",
    ),
    Mistake(
        "convert-ckpt gguf OUT --format mxfp4",
        1,
        "flux-Q4_K.gguf: the header of this GGUF file is truncated. Fetch it again.",
    ),
    Mistake(
        "convert-ckpt gguf-llama OUT --format mxfp4", 1, "AutoModelForCausalLM.from_pretrained(DIR, gguf_file=FILE)"
    ),
    Mistake(
        "convert-ckpt gguf-renamed OUT --format mxfp4",
        1,
        "model.safetensors: GGUF. Its name has to end in .gguf.",
    ),
    Mistake(
        "convert-ckpt pickle OUT --format mxfp4",
        1,
        "model.ckpt: a pickle (torch.save), which can run code and is not read here. In its folder run: python -c",
    ),
    Mistake("convert-ckpt pickle/model.ckpt OUT --format mxfp4", 1, "model.ckpt: a pickle (torch.save),"),
    Mistake("convert-ckpt pickle-renamed OUT --format mxfp4", 1, "model.safetensors: a pickle (torch.save),"),
    Mistake("convert-ckpt pytorch-bin OUT --format mxfp4", 1, "pytorch_model.bin: a pickle (torch.save),"),
    Mistake(
        "convert-ckpt archive OUT --format mxfp4", 1, "flux.zip: a zip archive. Unpack it, and give the folder with"
    ),
    Mistake("convert-ckpt parent OUT --format mxfp4", 1, "no .safetensors file. Did you mean parent/flux/transformer?"),
    Mistake(
        "convert-ckpt hub-cache/models--me--flux OUT --format mxfp4",
        1,
        "Did you mean hub-cache/models--me--flux/snapshots/0123456789012345678901234567890123456789?",
    ),
    Mistake("convert-ckpt hub-cache OUT --format mxfp4", 1, "Did you mean hub-cache/models--me--flux/snapshots/01234"),
    Mistake("run-ckpt inspect archive/flux.zip", 1, "flux.zip: a zip archive. Unpack it, and give the folder"),
    Mistake("convert-ckpt onnx OUT --format mxfp4", 1, "model.onnx: an ONNX model. Give the model's safetensors files"),
    Mistake(
        "convert-ckpt pipeline-unet OUT --format mxfp4",
        1,
        "a pipeline (StableDiffusionPipeline) without a transformer; it holds text_encoder, unet, vae.",
    ),
    Mistake(
        "convert-ckpt unknown-class OUT --format mxfp4",
        2,
        "no preset knows SomeTransformer, so nothing says which layers its runtime takes quantized. Add --preset",
    ),
    Mistake(
        "convert-ckpt no-config OUT --format mxfp4",
        2,
        "no config.json says what class it is, so nothing says which layers",
    ),
    Mistake("run-ckpt inspect gguf/flux-Q4_K.gguf", 1, "flux-Q4_K.gguf: the header of this GGUF file is truncated."),
    Mistake("convert-ckpt pipelin OUT --format fp8", 1, "pipelin: no such file or folder (did you mean pipeline?)."),
    Mistake("run-ckpt verify s3://bucket/x", 2, "s3://bucket/x: only convert-ckpt reads other stores than the Hub."),
]

TABLE = [*ODD_SOURCES, *COMMAND_LINE, *EFFECTS, *SHARDS, *RULES, *SOURCE, *OUTPUT, *RESULTS, *RUNNING]


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with all THINGS, as the working directory."""
    folder = tmp_path_factory.mktemp("mistakes")
    make_things(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("CONVERT_CKPT_URL", raising=False)
        yield folder


def listing(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("mistake", TABLE, ids=lambda mistake: mistake.command)
def test_a_mistake_is_a_message_with_a_way_out(
    mistake: Mistake, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *args = shlex.split(mistake.command)
    before = listing(workplace)
    with pytest.raises(SystemExit) as stop:
        run_command(COMMANDS[name], name, args)
    printed = capsys.readouterr().err
    assert stop.value.code == mistake.code, printed
    assert " ".join(mistake.message.split()) in " ".join(printed.split())
    # What click puts before its message, and a list of choices, are for wrong usage alone.
    own = [
        line for line in printed.splitlines() if line.startswith(("error: ", "fault: ", "  - ")) or "Error: " in line
    ]
    assert 1 <= len(own) <= MOST_LINES
    assert listing(workplace) == before


def test_the_table_has_a_row_for_each_class_of_mistakes() -> None:
    assert len({mistake.command for mistake in TABLE}) == len(TABLE) >= 60
