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

# What rounding the decoded weights to BF16 costs of a matrix.
MAX_ERROR = 4e-3


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
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2:
            n_quantized += weight.dtype == torch.float8_e4m3fn
            worst = max(worst, difference(module, wanted[name].weight))
    right = worst <= MAX_ERROR and n_quantized > 0
    print(
        f"{'RIGHT' if right else 'WRONG'} ({converted.name}): {n_quantized} quantized linears by {by}'s"
        f" {type(held).__name__}, worst error {worst:.4f}"
    )
    return 0 if right else 1


def difference(module: torch.nn.Module, wanted: torch.Tensor) -> float:
    """Return the relative difference of what a linear or a table holds, scales by tensor or row included."""
    weight = module.weight.float()
    if module.weight.dtype == torch.float8_e4m3fn:
        is_transposed = type(module).__module__.startswith("sglang")  # where it has one scale
        weight = (weight.t() if is_transposed else weight) * module.weight_scale.float().reshape(-1, 1)
    return float((weight - wanted.float()).norm() / wanted.float().norm())


if __name__ == "__main__":
    sys.exit(main())
