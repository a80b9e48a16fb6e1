"""Converted checkpoints for tests, and ways to tamper with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.contract.manifest_text import seal_manifest
from run_ckpt.storage.hashing import hash_path
from run_ckpt.storage.shards import read_folder
from tests import checkpoints

FLUX_DIGITS = checkpoints.FLUX_DIGITS
LINEAR = "model.layers.0.mlp.down_proj"

SCHEMES: dict[str, dict[str, str]] = {
    "mxfp4-aiter": {"format": "mxfp4", "layout": "aiter"},
    "mxfp4-plain": {"format": "mxfp4", "layout": "plain"},
    "mxfp4-compressed-tensors": {"format": "mxfp4", "layout": "plain", "dialect": "compressed-tensors"},
    "nvfp4": {"format": "nvfp4"},
    "nvfp4-compressed-tensors": {"format": "nvfp4", "dialect": "compressed-tensors"},
    "mxfp8": {"format": "mxfp8"},
    "mxfp8-compressed-tensors": {"format": "mxfp8", "dialect": "compressed-tensors"},
    "fp8-tensor": {"format": "fp8", "granularity": "tensor"},
    "fp8-channel": {"format": "fp8", "granularity": "channel"},
    "fp8-channel-compressed-tensors": {"format": "fp8", "granularity": "channel", "dialect": "compressed-tensors"},
    "fp8-block": {"format": "fp8", "granularity": "block"},
}


def convert(source: Path, output: Path, **options: Any) -> Path:
    """Convert ``source`` to ``output`` and return that."""
    checkpoints.convert(source, output, **options)
    return output


def make_linear(folder: Path, N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a transformers checkpoint of one linear layer [N, K] with a norm, in one file, and return its folder."""
    tensors = {
        f"{LINEAR}.weight": checkpoints.random_weight(N, K, dtype, seed=N + K),
        "model.norm.weight": torch.ones(K, dtype=dtype),
    }
    config: dict[str, object] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    checkpoints.save_checkpoint(folder, [tensors], config)
    (folder / "generation_config.json").write_text("{}")
    return folder


def edit_tensor(folder: Path, name: str, edit: Callable[[bytearray], None]) -> None:
    """Change the bytes of a tensor in place."""
    shard, stored = next((s, t) for s, t in read_folder(folder).tensors() if t.spec.name == name)
    data = bytearray(shard.path.read_bytes())
    part = data[stored.offset : stored.end]
    edit(part)
    data[stored.offset : stored.end] = part
    shard.path.write_bytes(data)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest in place and seal it anew, so that only deeper checks can see the change."""
    path = folder / MANIFEST_NAME
    document = json.loads(path.read_text())
    edit(document)
    path.write_bytes(b"".join(seal_manifest(document)))


def reseal(folder: Path) -> None:
    """Make the manifest agree with the files' sizes and hashes, so that only deeper checks can see a change."""

    def describe(manifest: dict[str, Any]) -> None:
        for name, entry in manifest["files"].items():
            entry.update(nbytes=(folder / name).stat().st_size, blake3=hash_path(folder / name))

    edit_manifest(folder, describe)
