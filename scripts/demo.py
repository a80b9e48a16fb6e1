"""The main job on a small trained checkpoint: convert, verify, load, sample, compare."""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
SOURCE = Path("examples/flux-digits")
OUTPUT = Path("demo-output")
PICTURE = OUTPUT / "digits.png"
STATISTICS = OUTPUT / "statistics"


@dataclass(frozen=True)
class Variant:
    """One conversion: the folder it goes to, what to call it, and its options."""

    name: str
    title: str
    options: tuple[str, ...]


VARIANTS = (
    Variant("fp8", "FP8", ("--format", "fp8")),
    Variant("mxfp4", "MXFP4", ("--format", "mxfp4")),
    Variant("mxfp4-gptq", "MXFP4 with statistics", ("--format", "mxfp4", "--calibration", str(STATISTICS))),
)
ALL_LAYERS = (
    Variant("fp8-all", "FP8, all layers", ("--format", "fp8", "--recipe", "examples/all-layers-fp8.toml")),
    Variant("mxfp4-all", "MXFP4, all layers", ("--format", "mxfp4", "--recipe", "examples/all-layers-mxfp4.toml")),
)


@dataclass(frozen=True)
class Result:
    """What is known of one transformer. ``images`` are its samples, float32 [B, 1, 8, 8].

    ``snr_db`` is that of all samples summed and the median of the samples' own.
    """

    title: str
    nbytes: int
    layers: str
    sqnr_db: float | None
    share_correct: float
    snr_db: tuple[float, float] | None
    images: Any


def main() -> None:
    """Run the demo and print its table."""
    arguments = parse_arguments()
    variants = VARIANTS + (ALL_LAYERS if arguments.all_layers else ())
    console = Console()
    try:
        convert_all(console, variants)
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: {shlex.join(_shown(error.cmd))} failed with exit code {error.returncode}")
    results = sample_all(console, variants, arguments.samples)
    draw_picture(results)
    console.print()
    console.print(make_table(results, arguments.samples))
    console.print(
        "All rows have BF16 activations; FP8 and MXFP4 run from their stored codes on the CPU's reference backend, so"
        " this shows what storing them costs. Read correctly: by an SVM fitted on scikit-learn's handwritten digits."
        " Latent SNR: final latents against those of BF16 from the same noise and labels, all samples summed, and the"
        " median of the samples' own. Codes that statistics choose are farther from the weights and nearer to what the"
        " layers compute.",
        style="dim",
    )
    console.print(f"Picture: [bold]{PICTURE}[/bold]")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=_n_samples, default=500, metavar="N", help="digits to sample (default: 500)")
    parser.add_argument("--all-layers", action="store_true", help="also convert the layers that the preset keeps")
    return parser.parse_args()


def _n_samples(text: str) -> int:
    if int(text) < 10:
        raise argparse.ArgumentTypeError("10 is the least, one for each digit")
    return int(text)


def convert_all(console: Console, variants: tuple[Variant, ...]) -> None:
    """Convert and verify every variant with the commands a user would type."""
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)
    (ROOT / OUTPUT).mkdir()
    record_statistics(console)
    for variant in variants:
        folder = OUTPUT / variant.name
        run(console, "convert-ckpt", SOURCE, folder, *variant.options)
        run(console, "run-ckpt", "verify", folder, "--source", SOURCE)


def record_statistics(console: Console) -> None:
    """Record what goes into the source's layers, with other noises than those of the samples."""
    # For a pipeline it is `run-ckpt calibrate`; this example has a sampler of its own.
    import digits

    with console.status("recording statistics of 32 samples"):
        digits.calibrate(digits.load_transformer(ROOT / SOURCE), ROOT / STATISTICS)


def run(console: Console, command: str, *arguments: str | Path) -> None:
    """Print a command and run it in the repository. Raises CalledProcessError if it fails."""
    line = [str(Path(sys.executable).with_name(command)), *map(str, arguments)]
    console.print(f"$ {shlex.join(_shown(line))}", style="bold", highlight=False, soft_wrap=True)
    subprocess.run(line, cwd=ROOT, check=True)


def _shown(line: list[str]) -> list[str]:
    return [Path(line[0]).name, *line[1:]]


def sample_all(console: Console, variants: tuple[Variant, ...], n_samples: int) -> list[Result]:
    """Sample from the source and from every converted variant, the same noise and labels for each."""
    # Here, as torch, diffusers and scikit-learn take seconds, and the commands above need none of them.
    import digits

    from run_ckpt import load_quantized

    request = digits.make_request(n_samples)
    judge = digits.fit_judge()

    def images_of(title: str, load: Callable[[Path], Any], folder: Path) -> Any:
        with console.status(f"sampling {n_samples} digits with {title}"):
            return digits.sample(load(ROOT / folder), request)

    reference = images_of("BF16", digits.load_transformer, SOURCE)
    share = digits.share_read_correctly(judge, reference, request.labels)
    results = [Result("BF16", weights_nbytes(SOURCE), "", None, share, None, reference)]
    for variant in variants:
        images = images_of(variant.title, load_quantized, OUTPUT / variant.name)
        share = digits.share_read_correctly(judge, images, request.labels)
        snr_db = digits.snr_db(reference, images), float(digits.snr_db_by_sample(reference, images).median())
        results.append(_result(variant, images, share, snr_db))
    return results


def _result(variant: Variant, images: Any, share: float, snr_db: tuple[float, float]) -> Result:
    folder = OUTPUT / variant.name
    manifest = json.loads((ROOT / folder / "quantization_manifest.json").read_text(encoding="utf-8"))
    layers = manifest["layers"].values()
    return Result(
        title=variant.title,
        nbytes=weights_nbytes(folder),
        layers=f"{len(layers)} of {len(layers) + len(manifest['unquantized_linears'])}",
        sqnr_db=sum(layer["sqnr_db"] for layer in layers) / len(layers),
        share_correct=share,
        snr_db=snr_db,
        images=images,
    )


def weights_nbytes(folder: Path) -> int:
    """Return the size of a checkpoint's shards on disk."""
    return sum(path.stat().st_size for path in (ROOT / folder).glob("*.safetensors"))


def draw_picture(results: list[Result]) -> None:
    """Write the first ten samples of every transformer, the digits 0 to 9, and their differences to PICTURE."""
    from picture import Row, difference, draw

    rows = []
    for result in results:
        images = result.images[:10]
        rows.append(Row(result.title, f"{result.share_correct:.1%} read correctly", images))
        if result is not results[0]:
            rows.append(Row("difference", "to BF16, times 10", difference(results[0].images[:10], images, times=10)))
    draw(rows, ROOT / PICTURE)


def make_table(results: list[Result], n_samples: int) -> Table:
    """Return the table of results."""
    table = Table(title=f"{SOURCE.name}, {n_samples} samples, 20 Euler steps")
    table.add_column("format")
    for heading in ("on disk", "linears\nquantized", "weight SQNR\n(mean)", "read\ncorrectly", "latent SNR\n(median)"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.title,
            f"{result.nbytes / 1e6:.2f} MB",
            result.layers or "-",
            _decibels(result.sqnr_db),
            f"{result.share_correct:.1%}",
            "-" if result.snr_db is None else "{:.1f} dB ({:.1f})".format(*result.snr_db),
        )
    return table


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"


if __name__ == "__main__":
    main()
