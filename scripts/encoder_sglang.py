"""Load converted text encoders in unmodified SGLang 0.5.23 on a CPU, as ``sglang generate --model-path`` loads them.

    DIR/bin/python scripts/encoder_sglang.py TRANSFORMER COMPONENT CONVERTED PLAIN [CONVERTED PLAIN ...]

TRANSFORMER is a BF16 transformer of the pipeline, which tells SGLang's settings; COMPONENT is text_encoder or
text_encoder_2; PLAIN is what ``run-ckpt dequantize`` makes of CONVERTED. SGLang's own ComponentLoader.load runs for
both, its fall-back to transformers included, and each weight that the first then holds is decoded and compared with the
second's, in BF16. Prints RIGHT, WRONG or REFUSED for each. The GPU is an EMULATION, see sglang_on_cpu.py.
"""

import sys
from pathlib import Path

import torch
from sglang_on_cpu import PERSONAS, SGLang

# What rounding to BF16 costs of a matrix: scale and product are, in compressed-tensors' decoding by tensor.
MAX_ERROR = 6e-3


def main() -> int:
    transformer, component, *folders = sys.argv[1:]
    sglang = SGLang(Path(transformer), PERSONAS["h100"], plugins=False)
    pairs = zip(folders[::2], folders[1::2], strict=True)
    return max([check(sglang, component, Path(converted), Path(plain)) for converted, plain in pairs])


def check(sglang: SGLang, component: str, converted: Path, plain: Path) -> int:
    """Print the verdict on one folder; return 1 where SGLang took it and holds something else."""
    try:
        held = sglang.load_encoder(converted, component)
    except Exception as error:
        print(f"REFUSED ({converted.name}): {type(error).__name__}: {error}")
        return 0
    by = type(held).__module__.partition(".")[0]
    wanted = dict(sglang.load_encoder(plain, component, natively=by == "transformers").named_modules())
    worst, n_quantized = 0.0, 0
    for name, module in held.named_modules():
        if is_quantized := hasattr(module, "weight_scale"):
            n_quantized += 1
        weight = decode(module) if is_quantized else getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2:
            expected = wanted[name].weight.float()
            worst = max(worst, float((weight.float() - expected).norm() / expected.norm()))
    right = worst <= MAX_ERROR and n_quantized > 0
    print(
        f"{'RIGHT' if right else 'WRONG'} ({converted.name}): {n_quantized} quantized linears by {by}'s"
        f" {type(held).__name__}, worst error {worst:.4f}"
    )
    return 0 if right else 1


def decode(module: torch.nn.Module) -> torch.Tensor:
    """Return the weight [N, K] of a quantized linear: by compressed-tensors' own code where that made it."""
    if hasattr(module, "quantization_scheme"):
        from compressed_tensors.compressors import decompress_module  # wants the libraries that SGLang() fills in

        decompress_module(module)
        return module.weight
    return module.weight.t().float() * module.weight_scale.float().reshape(-1, 1)  # SGLang holds it transposed


if __name__ == "__main__":
    sys.exit(main())
