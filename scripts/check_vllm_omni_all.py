"""Convert small models of tests/ in every way that vLLM-Omni reads, and check each in vLLM-Omni 0.30.0.

    scripts/setup_vllm_omni.sh DIR
    .venv/bin/python scripts/check_vllm_omni_all.py DIR/bin/python [--models flux1 wan-2.2]

Each check is scripts/check_vllm_omni.py in the Python that has vLLM-Omni: read there what is emulated and what is
compared. FP8 is loaded without plug-ins, MXFP4 with ours and by 1, 2 and 4 emulated ranks. Prints one line per model,
variant and number of ranks, and what --target vllm-omni refuses; exit 1 on a defect.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from check_sglang_all import write_mixed_recipe

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from convert_ckpt.options import Options  # noqa: E402
from convert_ckpt.pipeline import convert_checkpoint  # noqa: E402
from run_ckpt.contract.errors import UsageError  # noqa: E402
from run_ckpt.progress import Silent  # noqa: E402
from run_ckpt.storage.manifest_file import read_manifest  # noqa: E402
from tests.model_classes import CLASSES  # noqa: E402
from tests.models import MODELS, save  # noqa: E402

CASES = {**MODELS, **CLASSES}
MODEL_NAMES = (
    *("flux1", "flux2", "qwen-image", "wan-2.2", "wan-2.1-i2v", "ltx2", "z-image", "z-image-wide"),
    *("wan-vace", "hunyuan-video-1.5", "qwen-image-layered"),
)
# By a recipe: a third of the layers in FP8, a third in BF16.
MIXED = "mixed"
# Heads are shared out whole.
MAX_RANKS = {"z-image": 2}
VARIANTS = {
    **{f"fp8-{name}": {"format": "fp8", "granularity": name} for name in ("tensor", "channel", "block")},
    "mxfp4": {"format": "mxfp4"},
    "mxfp4-plain": {"format": "mxfp4", "layout": "plain"},
    "mxfp8": {"format": "mxfp8"},
    "fp8-plugin": {"format": "fp8", "granularity": "tensor", "dialect": "mxfp4"},
    MIXED: {"format": "mxfp4"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check what vLLM-Omni loads, for small models of every class.")
    parser.add_argument("python", type=Path, help="the Python made by setup_vllm_omni.sh")
    parser.add_argument("--models", nargs="+", choices=MODEL_NAMES, default=MODEL_NAMES)
    arguments = parser.parse_args()
    n_wrong = 0
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "bf16"
            save(CASES[name], CASES[name].build(), str(source))
            outputs = [output for key in VARIANTS if (output := convert(name, source, key))]
            by_plugin = [output for output in outputs if read_manifest(output).dialect == "mxfp4"]
            by_itself = [output for output in outputs if output not in by_plugin]
            n_wrong += check(arguments.python, name, [*by_itself, source], ["--without-plugins"])
            ranks = [str(n) for n in (1, 2, 4) if n <= MAX_RANKS.get(name, n)]
            n_wrong += check(arguments.python, name, [*by_plugin, source], ["--tp", *ranks])
    print(f"{n_wrong} wrong" if n_wrong else "all right")
    return 1 if n_wrong else 0


def check(python: Path, name: str, folders: list[Path], options: list[str]) -> int:
    """Run check_vllm_omni.py, print its verdicts; return how many are not RIGHT. folders: results and their source."""
    if len(folders) == 1:
        return 0
    # The plug-in of this checkout, whichever is installed there.
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "convert", "runtime"))
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [str(python), str(ROOT / "scripts" / "check_vllm_omni.py"), *map(str, folders), "--quiet"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=environment)
    verdicts = [line for line in done.stdout.splitlines() if line.startswith(("RIGHT", "WRONG", "REFUSED"))]
    for line in verdicts:
        print(f"{name:14} {line}", flush=True)
    n_expected = (len(folders) - 1) * max(1, len(options) - 1)
    n_wrong = n_expected - sum(line.startswith("RIGHT") for line in verdicts)
    if n_wrong:
        print("\n".join([*done.stdout.splitlines(), *done.stderr.splitlines()[-40:]]), flush=True)
    return n_wrong


def convert(name: str, source: Path, key: str) -> Path | None:
    """Return the result for vLLM-Omni, None where it has no sound form."""
    output, options = source.parent / key, Options(**VARIANTS[key], target="vllm-omni")
    try:
        if key == MIXED:
            options = replace(
                options, **write_mixed_recipe(read_manifest(source.parent / "mxfp4").layers, source.parent)
            )
        convert_checkpoint(source, output, options, n_workers=2, restart=True, progress=Silent())
    except UsageError as error:
        print(f"{name:14} {key}: {error}", flush=True)
        return None
    return output


if __name__ == "__main__":
    sys.exit(main())
