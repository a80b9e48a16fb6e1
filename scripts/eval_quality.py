"""What quantizing costs in pictures, with and without statistics: latent SNR on examples/flux-digits.

Each format is converted by rounding to nearest and by GPTQ, whose statistics come from 32 samples of other seeds. 500
digits are drawn from the same noise with each: with only weights quantized (W), and with activations too (W+A), see
load_quantized's ``activations``. MXFP4 by MXFP4 is what AITER's gemm_a4w4 multiplies. The SNR of all samples summed is
carried by a few whose trajectory tips over: it has a standard deviation of 1.2 dB among equal variants, the median one
of 0.2. Figures: README, "What quantizing costs".
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import digits
import torch
from torch import Tensor

from run_ckpt import load_quantized

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "examples/flux-digits"


@dataclass(frozen=True)
class Variant:
    """One row: a conversion, and what its layers multiply their inputs in."""

    title: str
    options: tuple[str, ...]
    activations: str = "bf16"


GPTQ = ("--calibration", "stats")
MXFP4, FP8 = ("--format", "mxfp4"), ("--format", "fp8")
# Between the sizes of both.
HALF_WAY = ("--max-size", "8030000")
VARIANTS = (
    Variant("MXFP4, to nearest, W", MXFP4),
    Variant("MXFP4, to nearest, W+A MXFP8", MXFP4, "mxfp8"),
    Variant("MXFP4, to nearest, W+A MXFP4", MXFP4, "mxfp4"),
    Variant("MXFP4, GPTQ, W", (*MXFP4, *GPTQ)),
    Variant("MXFP4, GPTQ, W+A MXFP8", (*MXFP4, *GPTQ), "mxfp8"),
    Variant("MXFP4, GPTQ, W+A FP8", (*MXFP4, *GPTQ), "fp8"),
    Variant("MXFP4, GPTQ, W+A MXFP4", (*MXFP4, *GPTQ), "mxfp4"),
    Variant("MXFP4, GPTQ, fold, W", (*MXFP4, *GPTQ, "--fold")),
    Variant("MXFP4, GPTQ, fold, W+A MXFP8", (*MXFP4, *GPTQ, "--fold"), "mxfp8"),
    Variant("MXFP4, GPTQ, fold, W+A MXFP4", (*MXFP4, *GPTQ, "--fold"), "mxfp4"),
    Variant("half-way, GPTQ, W", (*MXFP4, *GPTQ, *HALF_WAY)),
    Variant("half-way, GPTQ, W+A MXFP8", (*MXFP4, *GPTQ, *HALF_WAY), "mxfp8"),
    Variant("half-way, GPTQ, W+A MXFP4", (*MXFP4, *GPTQ, *HALF_WAY), "mxfp4"),
    Variant("FP8, to nearest, W", FP8),
    Variant("FP8, to nearest, W+A FP8", FP8, "fp8"),
    Variant("FP8, GPTQ, W", (*FP8, *GPTQ)),
    Variant("FP8, GPTQ, W+A FP8", (*FP8, *GPTQ), "fp8"),
    Variant("FP8, GPTQ, W+A FP8, static", (*FP8, *GPTQ, "--static"), "fp8"),
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
        return load_quantized(output, activations=variant.activations)


def describe(reference: Tensor, images: Tensor) -> str:
    """Return both figures as text."""
    median = float(torch.median(digits.snr_db_by_sample(reference, images)))
    return f"{digits.snr_db(reference, images):.1f} ({median:.1f})"


if __name__ == "__main__":
    main()
