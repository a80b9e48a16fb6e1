"""Small checkpoints for tests: tensors -> folder, as diffusers and transformers lay them out."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert_ckpt.options import Options
from convert_ckpt.pipeline import convert_checkpoint
from convert_ckpt.plan.preset import GENERIC, find_preset
from convert_ckpt.run.share import Share
from convert_ckpt.run_summary import RunSummary
from run_ckpt.progress import Silent

FLUX_DIGITS = Path(__file__).parents[1] / "examples" / "flux-digits"


def save_checkpoint(
    folder: Path, shards: list[dict[str, Tensor]], config: dict[str, object] | None = None, stem: str = "model"
) -> Path:
    """Write shards with an index (or one plain file) and config.json; return the folder."""
    folder.mkdir(parents=True)
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    weight_map = {}
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    if len(shards) > 1:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_weight(N: int, K: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Return a seeded normal [N, K] weight with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) * 0.02
    weight[:: max(1, N // 4)] *= 10
    return weight.to(dtype)


def convert(
    source: Path,
    output: Path,
    n_workers: int = 2,
    restart: bool = False,
    share: Share | None = None,
    **options: object,
) -> RunSummary:
    """Convert with the options of the command; classes that tests make up take the generic preset."""
    options.setdefault("preset", None if _knows_class(source) else GENERIC)
    return convert_checkpoint(
        source, output, Options(**options), n_workers=n_workers, restart=restart, progress=Silent(), share=share
    )


def _knows_class(source: Path) -> bool:
    words = {word for path in source.rglob("config.json") for word in re.findall(r'"(\w+)"', path.read_text())}
    return any(find_preset(word).name != GENERIC for word in words)


def load_all(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder, as safetensors itself reads them."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return relative name -> content of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
