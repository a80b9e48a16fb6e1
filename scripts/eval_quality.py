"""What quantizing costs in pictures, with and without statistics: latent SNR on examples/flux-digits.

Each format is converted by rounding to nearest and by GPTQ, whose statistics come from 32 samples of other seeds. 500
digits are drawn from the same noise with each: with only weights quantized (W), and with activations too (W+A): MXFP4
by rule even in blocks of 32, as AITER's gemm_a4w4 takes them; FP8 by token, by tensor, or with static scales. The SNR
of all samples summed is carried by a few whose trajectory tips over: it has a standard deviation of 1.2 dB among equal
variants, the median one of 0.2. One run, dB summed (median):

MXFP4, to nearest               W 29.4 (32.7)   W+A 28.3 (31.1)
MXFP4, GPTQ                     W 38.3 (40.7)   W+A 31.8 (34.5)
MXFP4, GPTQ, fold               W 37.1 (40.2)   W+A 33.1 (34.5)
half-way in size, GPTQ          W 44.3 (46.4)   W+A 36.5 (38.8)
FP8, to nearest                 W 40.2 (45.5)   W+A by token 39.7 (44.8)
FP8, GPTQ                       W 49.2 (51.4)   W+A by token 46.2 (48.7), by tensor 46.0 (48.5), static 46.2 (48.7)
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import digits
import torch
from torch import Tensor

from run_ckpt import load_quantized
from run_ckpt.contract.codec import dequantize, fp8_scale, quantize, quantize_fp8
from run_ckpt.contract.formats import CHANNEL_FP8, PLAIN_MXFP4, Scheme
from run_ckpt.contract.formats import MXFP4 as MXFP4_FORMAT
from run_ckpt.contract.manifest import INPUT_SCALE
from run_ckpt.loading.linear import QuantizedLinear

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "examples/flux-digits"

Rounding = Callable[[QuantizedLinear, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """One row: a conversion, and how its layers round their inputs, float32 [tokens, K]; None: not at all."""

    title: str
    options: tuple[str, ...]
    activations: Rounding | None


def by_row(scheme: Scheme) -> Rounding:
    """Round each token for itself."""
    return lambda _, rows: dequantize(*quantize(rows, scheme, "even"), scheme)


def as_stored(layer: QuantizedLinear, rows: Tensor) -> Tensor:
    """Round as the layer's kernel does: MXFP4 in blocks, FP8 by token."""
    return by_row(PLAIN_MXFP4 if layer.layer.scheme.format == MXFP4_FORMAT else CHANNEL_FP8)(layer, rows)


def by_tensor(_: QuantizedLinear, rows: Tensor) -> Tensor:
    """Round to FP8 under one scale for all tokens, which is taken from them."""
    return round_to_fp8(rows, fp8_scale(rows.abs().amax()))


def static(layer: QuantizedLinear, rows: Tensor) -> Tensor:
    """Round to FP8 under the scale in the checkpoint."""
    return round_to_fp8(rows, layer.stored()[INPUT_SCALE])


def round_to_fp8(rows: Tensor, scale: Tensor) -> Tensor:
    return quantize_fp8(rows, scale).float() * scale


GPTQ = ("--calibration", "stats")
MXFP4, FP8 = ("--format", "mxfp4"), ("--format", "fp8")
# Between the sizes of both.
HALF_WAY = ("--max-size", "8030000")
VARIANTS = (
    Variant("MXFP4, to nearest, W", MXFP4, None),
    Variant("MXFP4, to nearest, W+A", MXFP4, by_row(PLAIN_MXFP4)),
    Variant("MXFP4, GPTQ, W", (*MXFP4, *GPTQ), None),
    Variant("MXFP4, GPTQ, W+A", (*MXFP4, *GPTQ), by_row(PLAIN_MXFP4)),
    Variant("MXFP4, GPTQ, fold, W", (*MXFP4, *GPTQ, "--fold"), None),
    Variant("MXFP4, GPTQ, fold, W+A", (*MXFP4, *GPTQ, "--fold"), by_row(PLAIN_MXFP4)),
    Variant("half-way, GPTQ, W", (*MXFP4, *GPTQ, *HALF_WAY), None),
    Variant("half-way, GPTQ, W+A", (*MXFP4, *GPTQ, *HALF_WAY), as_stored),
    Variant("FP8, to nearest, W", FP8, None),
    Variant("FP8, to nearest, W+A by token", FP8, by_row(CHANNEL_FP8)),
    Variant("FP8, GPTQ, W", (*FP8, *GPTQ), None),
    Variant("FP8, GPTQ, W+A by token", (*FP8, *GPTQ), by_row(CHANNEL_FP8)),
    Variant("FP8, GPTQ, W+A by tensor", (*FP8, *GPTQ), by_tensor),
    Variant("FP8, GPTQ, W+A static", (*FP8, *GPTQ, "--static"), static),
)


def main() -> None:
    """Print a row for each variant."""
    arguments = parse_arguments()
    transformer = digits.load_transformer(SOURCE)
    request = digits.make_request(arguments.samples)
    reference = digits.sample(transformer, request)
    with tempfile.TemporaryDirectory() as folder:
        digits.calibrate(transformer, Path(folder) / "stats", seed=arguments.seed)
        for variant in VARIANTS:
            if arguments.only in variant.title:
                images = digits.sample(load(variant, Path(folder)), request)
                print(f"{variant.title:32}{describe(reference, images)}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500, metavar="N", help="digits to draw (default: 500)")
    parser.add_argument("--seed", type=int, default=1000, help="of the statistics' samples (default: 1000)")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose title holds this")
    return parser.parse_args()


def load(variant: Variant, folder: Path) -> torch.nn.Module:
    """Convert, with the command that a user would type, and load the result."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        output = Path(inside) / "output"
        command = [Path(sys.executable).with_name("convert-ckpt"), SOURCE, output, *variant.options, "--quiet"]
        subprocess.run(command, check=True, cwd=folder)
        model = load_quantized(output)
    if variant.activations:
        round_inputs(model, variant.activations)
    return model


def round_inputs(model: torch.nn.Module, activations: Rounding) -> None:
    """Let every quantized layer round its input first."""

    def hook(layer: QuantizedLinear, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        rows = args[0].reshape(-1, args[0].shape[-1]).float()
        return (activations(layer, rows).to(args[0].dtype).reshape(args[0].shape),)

    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_pre_hook(hook)


def describe(reference: Tensor, images: Tensor) -> str:
    """Return both figures as text."""
    median = float(torch.median(digits.snr_db_by_sample(reference, images)))
    return f"{digits.snr_db(reference, images):.1f} ({median:.1f})"


if __name__ == "__main__":
    main()
