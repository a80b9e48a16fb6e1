"""Export a small Llama with NVIDIA ModelOpt and compare what is read from it here with what ModelOpt reads from it.

    python -m venv DIR; DIR/bin/pip install torch==2.13.0 nvidia-modelopt==0.47.0 transformers accelerate
    .venv/bin/python scripts/check_modelopt.py DIR/bin/python

ModelOpt quantizes, exports, and decodes its export again by its own classes, all in an environment of its own. Prints a
line per format; exit 1 where a weight differs in any value.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from run_ckpt.storage.foreign import open_foreign
from run_ckpt.storage.rows import decode_rows

FORMATS = ("FP8_DEFAULT", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4_DEFAULT", "MXFP4_DEFAULT", "MXFP8_DEFAULT")
# Runs in ModelOpt's Python: writes the export of a format, and beside it the weights that ModelOpt decodes from it.
EXPORT = """
import copy, sys, torch
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

name, folder = sys.argv[1:]
torch.manual_seed(0)
sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **sizes)).bfloat16()
model.config.architectures = ["LlamaForCausalLM"]
tokens = torch.arange(64)[None]
model = mtq.quantize(model, copy.deepcopy(getattr(mtq, f"{name}_CFG")), forward_loop=lambda model: model(tokens))
export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder)

stored = load_file(folder + "/model.safetensors")
decoded = {}
for key in [key for key in stored if f"{key}_scale" in stored]:
    codes, scale = stored[key], stored[f"{key}_scale"]
    if name.startswith("NVFP4"):
        second = stored[f"{key}_scale_2"]
        tensor = NVFP4QTensor((len(codes), 2 * codes.shape[1]), torch.float32, codes)
        weight = tensor.dequantize(torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16})
    elif name.startswith("MXFP4"):
        tensor = MXFP4QTensor((len(codes), 2 * codes.shape[1]), torch.float32, codes)
        weight = tensor.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})
    elif name.startswith("MXFP8"):
        weight = MXFP8QTensor(codes.shape, torch.float32, codes).dequantize(torch.float32, scale=scale)
    else:
        scale = scale[:, None] if scale.ndim else scale
        weight = FP8QTensor(codes.shape, torch.float32, codes).dequantize(torch.float32, scale=scale)
    decoded[key] = weight.float().reshape(len(codes), -1).contiguous()
save_file(decoded, folder + ".decoded")
"""


def main() -> int:
    (python,) = sys.argv[1:]
    n_wrong = 0
    for name in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            export = Path(folder) / "export"
            done = subprocess.run(
                [python, "-c", EXPORT, name, str(export)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(done.stderr)
            wanted = load_file(f"{export}.decoded")
            with open_foreign(export) as checkpoint:
                layers = checkpoint.manifest.layers.values()
                read = {layer.source_tensor: decode_rows(checkpoint.reader, layer, 0, layer.N) for layer in layers}
        differing = [key for key in wanted.keys() | read.keys() if not torch.equal(wanted[key], read[key])]
        n_wrong += len(differing)
        print(f"{name}: {len(wanted)} weights, {len(differing)} differ", flush=True)
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
