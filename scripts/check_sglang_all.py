"""Convert small models of tests/ in every way that SGLang reads, and check each in SGLang 0.5.23.

    scripts/setup_sglang.sh DIR
    .venv/bin/python scripts/check_sglang_all.py DIR/bin/python [--models flux1 wan-2.2] [--variants mxfp4]

Each check is scripts/check_sglang.py in the Python that has SGLang: read there what is emulated and what is
compared. Prints one line per model, variant and number of ranks; exit 1 on a defect. What SGLang reads by
itself is loaded without plug-ins, FP8 a second time with ours, which must leave it alone. FLUX.1 also runs
(scripts/forward_sglang.py). Text encoders are loaded as a pipeline's (scripts/encoder_sglang.py).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from convert_ckpt.options import Options  # noqa: E402
from convert_ckpt.pipeline import convert_checkpoint  # noqa: E402
from run_ckpt.contract.manifest import Layer  # noqa: E402
from run_ckpt.progress import Silent  # noqa: E402
from run_ckpt.storage.manifest_file import read_manifest  # noqa: E402
from run_ckpt.tools.rewrite.dequantize import dequantize  # noqa: E402
from tests.model_classes import CLASSES  # noqa: E402
from tests.models import MODELS, save  # noqa: E402
from tests.test_text_encoders import MODELS as WITH_VISION  # noqa: E402

CASES = {**MODELS, **{name: CLASSES[name] for name in ("anima", "qwen-image-layered")}}
MODEL_NAMES = tuple(name for name, case in CASES.items() if case.preset not in ("dense-llm", "text-encoder"))
# SGLang's name -> diffusers' name, in Z-Image's config.json: in reduced sizes SGLang needs its own.
Z_IMAGE_NAMES = {"num_layers": "n_layers", "num_attention_heads": "n_heads", "out_channels": "in_channels"}
# Heads are shared out whole, and the small Z-Image has six.
MAX_RANKS = {"z-image": 2}
# Wan 2.2 has two transformers.
COMPONENTS = {"wan-2.2": ("transformer", "transformer_2")}
VERDICTS = ("RIGHT", "WRONG", "REFUSED")


@dataclass(frozen=True)
class Variant:
    """One way to convert. ``prepare`` writes a file that an option names; ``refused`` are models that can't be."""

    options: dict[str, str]
    prepare: Callable[[dict[str, Layer], Path], dict[str, Path]] | None = None
    refused: tuple[str, ...] = ()


def write_mixed_recipe(layers: dict[str, Layer], folder: Path) -> dict[str, Path]:
    """A third of the fused groups FP8, a third BF16, the rest MXFP4."""
    groups = sorted({layer.fused_group or layer.module for layer in layers.values()})
    formats = {group: ("mxfp4", "fp8", "keep")[i % 3] for i, group in enumerate(groups)}
    rules = [
        f'[[rules]]\nmatch = "{layer.module}"\nformat = "{formats[layer.fused_group or layer.module]}"\n'
        for layer in layers.values()
    ]
    path = folder / "mixed.toml"
    path.write_text("".join(rules))
    return {"recipe": path}


def write_calibration(layers: dict[str, Layer], folder: Path) -> dict[str, Path]:
    path = folder / "calibration.safetensors"
    save_file({f"{module}.input_amax": torch.tensor([2.0 + i]) for i, module in enumerate(sorted(layers))}, path)
    return {"calibration": path}


@dataclass(frozen=True)
class Session:
    """Variants that one SGLang process loads, name -> variant, with and without tensor parallelism."""

    persona: str
    plugins: bool
    ranks: tuple[int, ...]
    variants: dict[str, Variant]


FP8 = Variant({"format": "fp8"})
SESSIONS = (
    Session(
        "mi355x",
        plugins=True,
        ranks=(1, 2, 4),
        variants={
            "mxfp4": Variant({"format": "mxfp4"}),
            "mxfp4-plain": Variant({"format": "mxfp4", "layout": "plain", "dialect": "mxfp4"}),
            "mxfp4-mixed": Variant({"format": "mxfp4"}, write_mixed_recipe),
            "quark": Variant({"format": "mxfp4", "layout": "plain"}),
            "sglang+plugin": Variant(
                {"format": "mxfp4", "target": "sglang+plugin"},
                refused=tuple(name for name in MODEL_NAMES if name != "flux1"),
            ),
            "nvfp4-plugin": Variant({"format": "nvfp4", "dialect": "mxfp4"}),
        },
    ),
    Session("mi355x", plugins=True, ranks=(1,), variants={"fp8-beside-plugin": FP8}),
    Session(
        "h100",
        plugins=False,
        ranks=(1,),
        variants={
            "fp8": FP8,
            "fp8-block": Variant({"format": "fp8", "granularity": "block"}),
            "fp8-static": Variant({"format": "fp8"}, write_calibration),
        },
    ),
    # The small LTX-2 keeps layers that SGLang gives no names; FLUX.2 see run_ckpt/contract/targets.py.
    Session("b200", False, (1,), {"nvfp4": Variant({"format": "nvfp4"}, refused=("flux2", "ltx2"))}),
)

# Text encoders as SGLang reads them, and what of them is in packed codes, which transformers' T5 can't take.
ENCODERS = {"t5": MODELS["t5"].build, "qwen3": MODELS["qwen3"].build, **WITH_VISION}
ENCODER_VARIANTS = {
    "fp8": Variant({"format": "fp8", "target": "sglang"}),
    "fp8-channel": Variant({"format": "fp8", "granularity": "channel", "target": "sglang"}),
    "mxfp8": Variant({"format": "mxfp8", "target": "sglang"}),
    "mxfp4": Variant({"format": "mxfp4", "target": "sglang"}, refused=("t5",)),
    "nvfp4": Variant({"format": "nvfp4", "target": "sglang"}, refused=("t5",)),
}
FORWARD_VARIANTS = {"mxfp4", "mxfp4-mixed", "sglang+plugin"}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check what SGLang loads, for small models of every class.")
    parser.add_argument("python", type=Path, help="the Python made by setup_sglang.sh")
    parser.add_argument("--models", nargs="+", choices=(*MODEL_NAMES, *ENCODERS))
    names = [*(name for session in SESSIONS for name in session.variants), *ENCODER_VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    n_wrong = 0
    models = arguments.models or (*MODEL_NAMES, *ENCODERS)
    for name in (name for name in models if name in ENCODERS):
        with tempfile.TemporaryDirectory() as folder:
            n_wrong += check_encoder(arguments.python, name, Path(folder), arguments.variants)
    for name in (name for name in models if name in MODEL_NAMES):
        with tempfile.TemporaryDirectory() as folder:
            source = make_source(name, Path(folder))
            for session in SESSIONS:
                wanted = {
                    key: variant
                    for key, variant in session.variants.items()
                    if key in arguments.variants and name not in variant.refused
                }
                if wanted:
                    n_wrong += check(arguments.python, name, source, replace(session, variants=wanted))
            for variant in FORWARD_VARIANTS & set(arguments.variants) if name == "flux1" else ():
                n_wrong += check_forward(arguments.python, name, source, variant)
    print(f"{n_wrong} wrong" if n_wrong else "all right")
    return 1 if n_wrong else 0


def make_source(name: str, folder: Path) -> Path:
    """Save the BF16 model and return its folder."""
    source = folder / "bf16"
    save(CASES[name], CASES[name].build(), str(source))
    path = source / "config.json"
    config = json.loads(path.read_text())
    if config["_class_name"] == "ZImageTransformer2DModel":
        config |= {sglang: config[diffusers] for sglang, diffusers in Z_IMAGE_NAMES.items()}
        path.write_text(json.dumps(config))
    return source


def check(python: Path, name: str, source: Path, session: Session) -> int:
    """Convert, run check_sglang.py, print its verdicts; return how many are not RIGHT."""
    outputs = [convert_variant(source, key, variant) for key, variant in session.variants.items()]
    ranks = [n for n in session.ranks if n <= MAX_RANKS.get(name, n)]
    options = ["--quiet", "--persona", session.persona, "--tp", *map(str, ranks)]
    options += [] if session.plugins else ["--without-plugins"]
    n_wrong = 0
    for component in COMPONENTS.get(name, ("transformer",)):
        command = [*map(str, outputs), str(source), *options, "--component", component]
        n_wrong += run(python, name, "check_sglang.py", command, n_expected=len(outputs) * len(ranks))
    return n_wrong


def check_forward(python: Path, name: str, source: Path, variant: str) -> int:
    converted, plain = source.parent / variant, source.parent / f"{variant}-dequantized"
    dequantize(converted, plain, dtype="bfloat16", progress=Silent())
    return run(python, name, "forward_sglang.py", [str(converted), str(plain), str(source)], 1)


def check_encoder(python: Path, name: str, folder: Path, wanted: Collection[str]) -> int:
    """Convert a text encoder, run encoder_sglang.py, print its verdicts; return how many are not RIGHT."""
    source = folder / "text_encoder"
    ENCODERS[name]().bfloat16().save_pretrained(source)
    config = source / "config.json"
    if name == "t5":  # as published: transformers 5 writes false, and SGLang builds the decoder too
        config.write_text(config.read_text().replace('"is_encoder_decoder": false', '"is_encoder_decoder": true'))
    variants = {
        key: variant for key, variant in ENCODER_VARIANTS.items() if key in wanted and name not in variant.refused
    }
    pairs = []
    for key, variant in variants.items():
        output, plain = convert_variant(source, key, variant), folder / f"{key}-dequantized"
        dequantize(output, plain, dtype="bfloat16", progress=Silent())
        pairs += [str(output), str(plain)]
    flux = make_source("flux1", folder)  # its pipeline tells SGLang's settings
    return run(python, name, "encoder_sglang.py", [str(flux), "text_encoder", *pairs], len(variants)) if pairs else 0


def run(python: Path, name: str, script: str, arguments: list[str], n_expected: int) -> int:
    """Run a script in SGLang's Python, print its verdicts; return how many of the expected are not RIGHT."""
    # The plug-in of this checkout, whichever is installed there.
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "convert", "runtime"))
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [str(python), str(ROOT / "scripts" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    verdicts = [line for line in done.stdout.splitlines() if line.startswith(VERDICTS)]
    for line in verdicts:
        print(f"{name:14} {line}", flush=True)
    n_wrong = n_expected - sum(line.startswith("RIGHT") for line in verdicts)
    if n_wrong:
        print("\n".join([*done.stdout.splitlines(), *done.stderr.splitlines()[-40:]]), flush=True)
    return n_wrong


def convert_variant(source: Path, name: str, variant: Variant) -> Path:
    output = source.parent / name
    files: dict[str, Path] = {}
    if variant.prepare:
        convert(source, source.parent / "first", variant.options)
        files = variant.prepare(read_manifest(source.parent / "first").layers, source.parent)
        shutil.rmtree(source.parent / "first")
    convert(source, output, {**variant.options, **files})
    return output


def convert(source: Path, output: Path, options: dict[str, str | Path]) -> None:
    convert_checkpoint(source, output, Options(**options), n_workers=2, restart=True, progress=Silent())


if __name__ == "__main__":
    sys.exit(main())
