"""Unmodified vLLM-Omni 0.30.0 and vLLM load our checkpoints, MXFP4 by the plug-in, and damaged ones are refused.

Needs minutes and a Python with vLLM-Omni: VLLM_OMNI_PYTHON=DIR/bin/python after scripts/setup_vllm_omni.sh DIR. What is
emulated there is said in scripts/vllm_omni_on_cpu.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import convert
from tests.models import MODELS, save

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("VLLM_OMNI_PYTHON")
needs_vllm_omni = pytest.mark.skipif(not PYTHON, reason="VLLM_OMNI_PYTHON does not name a Python with vLLM-Omni")


@needs_vllm_omni
@pytest.mark.slow
def test_every_model_class_loads_in_every_way_that_vllm_omni_reads() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "check_vllm_omni_all.py"), str(PYTHON)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_vllm_omni
@pytest.mark.slow
def test_language_models_load_in_vllm() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "check_vllm.py"), str(PYTHON)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_vllm_omni
@pytest.mark.slow
def test_incomplete_and_mixed_layers_are_refused_with_their_name(tmp_path: Path) -> None:
    """Its own loader notices neither: a missing scale is a number that was never written."""
    save(MODELS["wan-2.1-i2v"], MODELS["wan-2.1-i2v"].build(), str(tmp_path / "bf16"))
    for name, lost in {"no-scale": "blocks.0.attn1.to_k.weight_scale", "no-part": "blocks.0.attn1.to_k.weight"}.items():
        convert(tmp_path / "bf16", tmp_path / name, format="mxfp4", target="vllm-omni")
        (shard,) = (tmp_path / name).glob("*.safetensors")
        tensors = load_file(shard)
        del tensors[lost]
        save_file(tensors, shard, {"format": "pt"})
    command = [str(PYTHON), str(ROOT / "scripts" / "check_vllm_omni.py"), "no-scale", "no-part", "bf16", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.stdout.count("REFUSED (") == 2, done.stdout + done.stderr
    assert "blocks.0.attn1.to_qkv" in done.stdout


@pytest.mark.parametrize("server", ["vllm", "vllm_omni"])
def test_the_entry_point_is_a_function_that_costs_nothing_to_import(server: str) -> None:
    """It is imported in every process, also where no checkpoint of ours is served."""
    module = f"run_ckpt.integrations.{server}.plugin"
    declared = f'[project.entry-points."{server}.general_plugins"]\nconvert-ckpt = "{module}:register"\n'
    assert declared in (ROOT / "pyproject.toml").read_text()
    code = f"import sys, {module} as it; it.register; assert not {{'torch', 'numpy', 'vllm'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
