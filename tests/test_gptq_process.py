"""GPTQ in a process of its own: the memory it takes, and what another CPU would make of it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from run_ckpt.storage.units import parse_nbytes
from tests.checkpoints import load_all, random_weight, save_checkpoint
from tests.test_calibrated import DOWN, MODEL, make_hessian, write_input

N, K = 1536, 1024

_CONVERT = """
import re, sys
from pathlib import Path
from convert_ckpt import convert
from run_ckpt.progress import Silent

class Lines(Silent):
    def log(self, line):
        print(line)

source, output, format, *stats = sys.argv[1:]
convert(source, output, format=format, workers=1, calibration=stats[0] if stats else None, progress=Lines())
print("PEAK", re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer [N, K] in a folder "in", and its statistics in "stats"."""
    folder = tmp_path_factory.mktemp("gptq")
    config: dict[str, object] = {"architectures": [MODEL], "model_type": "llama"}
    save_checkpoint(folder / "in", [{f"{DOWN}.weight": random_weight(N, K)}], config)
    write_input(folder / "stats", folder / "in", (DOWN,), make_hessian(K, 1), make_hessian(K, 2))
    return folder


def convert_apart(*arguments: object, **environment: str) -> str:
    """Convert in a fresh interpreter; return what it printed."""
    command = [sys.executable, "-c", _CONVERT, *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_a_layer_takes_no_more_memory_than_was_said_before_the_run(
    weight_format: str, source: Path, tmp_path: Path
) -> None:
    nearest = convert_apart(source / "in", tmp_path / "rtn", weight_format)
    printed = convert_apart(source / "in", tmp_path / "gptq", weight_format, source / "stats")
    (line,) = (line for line in printed.splitlines() if line.startswith("GPTQ chooses the codes of 1 layers"))
    assert printed.index(line) < printed.index("wrote model.safetensors")
    stated = parse_nbytes(line.partition("up to ")[2].removesuffix(" of memory"))
    peaks = [int(text.rpartition("PEAK ")[2]) * 1024 for text in (nearest, printed)]
    # Of this size the arrays are most of it.
    assert 0.3 * stated < peaks[1] - peaks[0] <= stated


def test_on_a_cpu_of_another_kind_scales_are_the_same_and_few_codes_differ(source: Path, tmp_path: Path) -> None:
    if "openblas" not in str(np.show_config(mode="dicts")).lower():
        pytest.skip("numpy's BLAS is another one")
    for kind in ("Haswell", "Nehalem"):
        convert_apart(source / "in", tmp_path / kind, "fp8", source / "stats", OPENBLAS_CORETYPE=kind)
    first, second = (load_all(tmp_path / kind) for kind in ("Haswell", "Nehalem"))
    assert torch.equal(first[f"{DOWN}.weight_scale"], second[f"{DOWN}.weight_scale"])
    codes = [tensors[f"{DOWN}.weight"].view(torch.uint8) for tensors in (first, second)]
    # One run: 0.03 %; of MXFP4, whose steps are coarser, none.
    assert 0 < (codes[0] != codes[1]).double().mean() < 0.01
