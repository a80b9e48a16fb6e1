"""Write weights with torchao and comfy-kitchen and compare what is read from them here with what these decode.

    python -m venv DIR; DIR/bin/pip install torch==2.13.0 safetensors
    DIR/bin/pip install --no-deps torchao==0.18.0 comfy-kitchen==0.2.40
    .venv/bin/python scripts/check_sources.py DIR/bin/python

Both quantize, save and decode in an environment of their own, on a CPU. Prints a line per format; exit 1 where a weight
differs in any value.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from run_ckpt.storage.foreign import open_foreign
from run_ckpt.storage.rows import decode_rows

# Run in the other Python: each writes FOLDER/NAME.safetensors, and as NAME.decoded the float32 weights it decodes.
TORCHAO = """
import sys, torch
from safetensors.torch import save_file
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerRow, PerTensor, quantize_

folder = sys.argv[1]
torch.manual_seed(0)

def save(name, weights):
    tensors, metadata = flatten_tensor_state_dict(weights)
    save_file(tensors, f"{folder}/{name}.safetensors", metadata)
    decoded = {key: weight.dequantize(torch.float32).contiguous() for key, weight in weights.items()}
    save_file(decoded, f"{folder}/{name}.decoded")

def quantized(config):
    model = torch.nn.Sequential(torch.nn.Linear(256, 192, bias=False)).bfloat16()
    quantize_(model, config)
    return {name: tensor for name, tensor in model.state_dict().items()}

weight = torch.randn(192, 256).bfloat16()
save("torchao-fp8-row", quantized(Float8WeightOnlyConfig()))
save("torchao-int8", quantized(Int8WeightOnlyConfig(version=2)))
save("torchao-mxfp8", {"0.weight": MXTensor.to_mx(weight, torch.float8_e4m3fn, 32)})
save("torchao-mxfp4", {"0.weight": MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)})
scale = per_tensor_amax_to_scale(weight.float().abs().amax())
save("torchao-nvfp4", {"0.weight": NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale)})
"""
COMFY = """
import json, sys, torch
import comfy_kitchen as kitchen
from comfy_kitchen.tensor import TensorCoreFP8Layout, TensorCoreMXFP8Layout, TensorCoreNVFP4Layout
from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout
from comfy_kitchen.tensor.int8_utils import _build_hadamard, _rotate_weight
from safetensors.torch import save_file

folder = sys.argv[1]
torch.manual_seed(0)
with kitchen.registry.use_backend("eager"):
    for name, layout in {
        "comfy-fp8": TensorCoreFP8Layout, "comfy-mxfp8": TensorCoreMXFP8Layout, "comfy-nvfp4": TensorCoreNVFP4Layout
    }.items():
        codes, params = layout.quantize(torch.randn(192, 320))
        parts = layout.state_dict_tensors(codes, params)
        tensors = {f"0.weight{suffix}": part.contiguous() for suffix, part in parts.items()}
        tensors["0.comfy_quant"] = torch.tensor(list(b'{"format": "?"}'), dtype=torch.uint8)
        save_file(tensors, f"{folder}/{name}.safetensors")
        save_file({"0.weight": layout.dequantize(codes, params).float().contiguous()}, f"{folder}/{name}.decoded")
    for rotated in (False, True):
        codes, params = TensorWiseINT8Layout.quantize(torch.randn(192, 512), per_channel=rotated, convrot=rotated)
        mark = {"format": "int8_tensorwise", "convrot": rotated}
        mark = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
        name = f"{folder}/comfy-int8{'-rotated' * rotated}"
        save_file({"0.weight": codes, "0.weight_scale": params.scale, "0.comfy_quant": mark}, f"{name}.safetensors")
        # Its own rotation in float64, so that it rounds once, as here; in float32 it sums what is rounded.
        weight = codes.double() * params.scale.double()
        if rotated:
            weight = _rotate_weight(weight, _build_hadamard(256, dtype=torch.float64), 256)
            loss = (weight - TensorWiseINT8Layout.dequantize(codes, params)).abs().max()
            assert loss < 1e-5 * weight.abs().max(), loss
        else:
            assert torch.equal(weight.float(), TensorWiseINT8Layout.dequantize(codes, params))
        save_file({"0.weight": weight.float()}, f"{name}.decoded")
"""


def main() -> None:
    (python,) = sys.argv[1:]
    n_faults = 0
    with tempfile.TemporaryDirectory() as temporary:
        for code in (TORCHAO, COMFY):
            done = subprocess.run([python, "-c", code, temporary], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
        for file in sorted(Path(temporary).glob("*.safetensors")):
            expected = load_file(file.with_suffix(".decoded"))
            with open_foreign(file) as checkpoint:
                layers = checkpoint.manifest.layers.values()
                ours = {layer.source_tensor: decode_rows(checkpoint.reader, layer, 0, layer.N) for layer in layers}
            is_same = ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
            n_faults += not is_same
            formats = ", ".join(sorted({layer.format.name for layer in layers}))
            print(f"{file.stem:18} read as {formats:14} {'every value the same' if is_same else 'DIFFERS'}", flush=True)
    sys.exit(n_faults > 0)


if __name__ == "__main__":
    main()
