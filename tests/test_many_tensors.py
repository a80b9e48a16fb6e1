"""Checkpoints of very many small tensors: the time for each does not grow with their number."""

import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.checkpoints import convert


def test_the_time_for_a_tensor_does_not_grow_with_their_number(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    tensors = {f"model.layers.{i}.input_layernorm.weight": torch.ones(2, dtype=torch.bfloat16) for i in range(20_000)}
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.ones(256, 256, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    started = time.process_time()
    convert(tmp_path / "source", tmp_path / "out", format="mxfp4")
    # 3 s on one machine; 25 s where each tensor was counted again for every tensor after it.
    assert time.process_time() - started < 12
