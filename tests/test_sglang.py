"""Unmodified SGLang 0.5.23 loads our checkpoints by the plug-in, refuses damaged ones, and is left alone otherwise.

Needs minutes and a Python with SGLang: SGLANG_PYTHON=DIR/bin/python after scripts/setup_sglang.sh DIR. What
is emulated there is said in scripts/sglang_on_cpu.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from run_ckpt.contract.manifest import MANIFEST_NAME
from tests.converted import convert, edit_json, edit_manifest
from tests.models import MODELS, save

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("SGLANG_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="SGLANG_PYTHON does not name a Python with SGLang"),
]

_UNTOUCHED = """
import json, sys
from pathlib import Path
from sglang_on_cpu import SGLang

sglang = SGLang(Path(sys.argv[1]), persona=None)
from sglang.multimodal_gen.runtime.layers.quantization.fp8 import Fp8Config
from sglang.multimodal_gen.runtime.layers.quantization.mxfp4 import Mxfp4Config
from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry
from sglang.multimodal_gen.runtime.utils.quantization_utils import get_quant_config

assert len(HookRegistry._patched) == 2, HookRegistry._patched
config = get_quant_config({"quantization_config": {"quant_method": "mxfp4"}}, "nowhere")
assert type(config) is Mxfp4Config, type(config)
assert config.is_checkpoint_mxfp4_serialized
ours = json.loads((Path(sys.argv[2]) / "config.json").read_text())
assert type(get_quant_config(ours, sys.argv[2])) is Fp8Config
assert get_quant_config({}, "nowhere") is None
sglang.load(Path(sys.argv[1]))
assert not [name for name in sys.modules if name.startswith("run_ckpt.integrations.sglang.") and "plugin" not in name]
"""


def run_in_sglang(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert PYTHON
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    return subprocess.run([PYTHON, *arguments], capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def flux1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux1") / "bf16"
    save(MODELS["flux1"], MODELS["flux1"].build(), str(folder))
    return folder


def test_every_model_class_loads_in_every_dialect_that_sglang_reads() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "check_sglang_all.py"), str(PYTHON)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def drop_a_scale(folder: Path) -> None:
    """Remove one scale from its shard, and from the index, so that only the manifest knows of it."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    name, shard = next(
        item for item in json.loads(index.read_text())["weight_map"].items() if item[0].endswith("weight_scale")
    )
    tensors = load_file(folder / shard)
    del tensors[name]
    save_file(tensors, folder / shard, {"format": "pt"})
    edit_json(index, lambda document: document["weight_map"].pop(name))


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-manifest": (lambda folder: (folder / MANIFEST_NAME).unlink(), "lacks its quantization_manifest.json"),
    "newer-schema": (
        lambda folder: edit_manifest(folder, lambda document: document.update(schema_version=99)),
        "schema version 99",
    ),
    "other-layout": (
        lambda folder: edit_json(
            folder / "config.json", lambda config: config["quantization_config"].update(layout="plain")
        ),
        "layout is 'plain', the manifest implies 'aiter'",
    ),
    "no-scale": (drop_a_scale, "but no shard holds it"),
}


def test_a_damaged_checkpoint_is_refused_with_the_reason(flux1: Path, tmp_path: Path) -> None:
    for name, (tamper, _) in TAMPERED.items():
        tamper(convert(flux1, tmp_path / name, format="mxfp4"))
    expected = {name: message for name, (_, message) in TAMPERED.items()}

    folders = [str(tmp_path / name) for name in expected]
    done = run_in_sglang(str(ROOT / "scripts" / "check_sglang.py"), *folders, str(flux1), "--persona", "mi355x")
    reports = done.stdout.split("REFUSED (")[1:]
    assert len(reports) == len(expected), done.stdout + done.stderr
    for report, (name, message) in zip(reports, expected.items(), strict=True):
        assert report.startswith(f"{name}:")
        assert message in report


def test_sglang_finds_the_plug_in_and_keeps_its_own_ways_for_what_is_not_ours(flux1: Path, tmp_path: Path) -> None:
    fp8 = convert(flux1, tmp_path / "fp8", format="fp8")
    done = run_in_sglang("-c", _UNTOUCHED, str(flux1), str(fp8))
    assert done.returncode == 0, done.stderr
