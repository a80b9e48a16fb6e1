"""The ways out that the table of mistakes names: a preset for an unknown class, and pickles made safetensors."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.checkpoints import convert, load_all, random_weight
from tests.odd_sources import ODD_SOURCES
from tests.test_hub_source import run_command


@pytest.mark.parametrize("name", ["unknown-class", "no-config"])
def test_a_class_that_no_preset_knows_is_converted_when_asked_for(name: str, tmp_path: Path) -> None:
    ODD_SOURCES[name](tmp_path / "in")
    assert convert(tmp_path / "in", tmp_path / "out", format="fp8", preset="generic").n_converted == 1


def shards(tensors: dict[str, torch.Tensor], n: int) -> Iterable[tuple[str, dict[str, torch.Tensor]]]:
    for i, name in enumerate(tensors):
        yield f"pytorch_model-{i + 1:05}-of-{n:05}.bin", {name: tensors[name]}


def test_the_command_for_pickles_makes_what_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {f"model.layers.{i}.mlp.up_proj.weight": random_weight(256, 256, seed=i) for i in range(2)}
    source = tmp_path / "in"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    for name, part in shards(weights, 2):
        torch.save({"state_dict": part, "step": 3} if name.startswith("pytorch_model-00001") else part, source / name)
    assert run_command(monkeypatch, str(source), str(tmp_path / "out"), "--format", "fp8") == 1
    command = re.search(r'python -c "(.*)"$', capsys.readouterr().err.strip())
    assert command
    subprocess.run([sys.executable, "-c", command[1]], cwd=source, check=True)
    assert load_all(source).keys() == weights.keys()
    assert convert(source, tmp_path / "out", format="fp8").n_converted == 2
