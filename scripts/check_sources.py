"""Write weights with torchao and comfy-kitchen and compare what is read from them here with what these decode.

    python -m venv DIR; DIR/bin/pip install torch==2.13.0 safetensors
    DIR/bin/pip install --no-deps torchao==0.18.0 comfy-kitchen==0.2.40
    .venv/bin/python scripts/check_sources.py DIR/bin/python

Both quantize, save and decode in an environment of their own, on a CPU. Prints a line per format; exit 1 where a weight
differs in any value. A second argument, a checkout of github.com/mit-han-lab/deepcompressor (69f3473), has its own code
pack weights as Nunchaku reads them.
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
# It packs and decodes nothing: what it is given, on the grid of its codes, is what it should be read as.
NUNCHAKU = """
import sys, torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[2])
from deepcompressor.backend.nunchaku import convert

folder = sys.argv[1]
torch.manual_seed(0)
N, K, RANK = 256, 384, 32
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

def bfloat16(*shape):
    return torch.randn(shape).bfloat16()

def branch():
    return bfloat16(RANK, K) / 8, bfloat16(N, RANK) / 8, (bfloat16(K).abs() + 0.5)

def save(name, module, stored, weight, bias):
    save_file({f"{module}.{leaf}": part.contiguous() for leaf, part in stored.items()}, f"{folder}/{name}.safetensors")
    expected = {f"{module}.weight": weight.float().contiguous(), f"{module}.bias": bias.float()}
    save_file(expected, f"{folder}/{name}.decoded")

# Scales are powers of two and codes have two digits, so that the weights that it takes in BF16 are exact.
for name, module, shift in (("int4", "out_proj", None), ("int4-shifted", "mlp_fc2", torch.tensor(0.171875))):
    scale = torch.exp2(torch.randint(-6, -3, (N, 1, K // 64, 1))).bfloat16()
    weight = (torch.randint(-8, 8, (N, 1, K // 64, 64)) * scale).reshape(N, K)
    (down, up, smooth), bias = branch(), bfloat16(N)
    stored = convert.convert_to_nunchaku_w4x4y16_linear_state_dict(
        weight, scale=scale, bias=bias.clone(), smooth=smooth, lora=(down.clone(), up), shift=shift)
    residual = weight.double() / smooth.double()
    down = down.double() / smooth.double()
    if shift is not None:
        # It is given the bias beside (residual + up down) (x + shift), and stores that beside up down x instead.
        shifts = torch.full((K, 1), 0.171875, dtype=torch.float64)
        bias = (bias.double() + (up.double() @ down @ shifts).view(-1)).bfloat16()
        bias = bias.double() + 0.171875 * residual.sum(1)
    down = down.bfloat16().double()  # as it stores that
    save(f"nunchaku-{name}", f"transformer_blocks.0.{module}", stored, residual + up.double() @ down, bias)

alpha = torch.tensor(2.0**-7).bfloat16()
scale = torch.exp2(torch.randint(-3, 4, (N, 1, K // 16, 1))).bfloat16()
weight = (E2M1[torch.randint(16, (N, 1, K // 16, 16))] * scale * alpha).bfloat16().reshape(N, K)
(down, up, smooth), bias = branch(), bfloat16(N)
stored = convert.convert_to_nunchaku_w4x4y16_linear_state_dict(
    weight, scale=alpha.reshape(1), bias=bias.clone(), smooth=smooth, lora=(down.clone(), up),
    float_point=True, subscale=scale)
down = (down.double() / smooth.double()).bfloat16().double()
weight = weight.double() / smooth.double() + up.double() @ down
save("nunchaku-nvfp4", "transformer_blocks.0.out_proj", stored, weight, bias)

for n, make in ((3, convert.convert_to_nunchaku_w4x16_adanorm_single_state_dict),
                (6, convert.convert_to_nunchaku_w4x16_adanorm_zero_state_dict)):
    scale = torch.exp2(torch.randint(-6, -3, (n * K, 1, K // 64, 1))).bfloat16()
    weight = (torch.randint(-7, 9, (n * K, 1, K // 64, 64)) * scale).reshape(n * K, K)
    bias = torch.randint(-64, 64, (n * K,)).bfloat16() / 64  # exact when 1 is added
    stored = make(weight.clone(), scale=scale, bias=bias.clone())
    module = "single_transformer_blocks.0.norm.linear" if n == 3 else "transformer_blocks.0.norm1.linear"
    save(f"nunchaku-modulation-{n}", module, stored, weight, bias)
"""


def main() -> None:
    python, *checkout = sys.argv[1:]
    n_faults = 0
    with tempfile.TemporaryDirectory() as temporary:
        for interpreter, code in [(python, TORCHAO), (python, COMFY), *((sys.executable, NUNCHAKU) for _ in checkout)]:
            command = [interpreter, "-c", code, temporary, *checkout]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
        for file in sorted(Path(temporary).glob("*.safetensors")):
            expected = load_file(file.with_suffix(".decoded"))
            with open_foreign(file) as checkpoint:
                layers = checkpoint.manifest.layers.values()
                ours = {layer.source_tensor: decode_rows(checkpoint.reader, layer, 0, layer.N) for layer in layers}
            ours = {name: rows.reshape(expected[name].shape) for name, rows in ours.items()}
            is_same = ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
            n_faults += not is_same
            formats = ", ".join(sorted({layer.format.name for layer in layers}))
            print(f"{file.stem:22} read as {formats:14} {'every value the same' if is_same else 'DIFFERS'}", flush=True)
    sys.exit(n_faults > 0)


if __name__ == "__main__":
    main()
