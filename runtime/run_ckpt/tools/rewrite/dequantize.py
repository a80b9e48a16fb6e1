"""`run-ckpt dequantize`: a converted checkpoint back as a plain one that from_pretrained loads."""

from functools import partial
from pathlib import Path

import torch

from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.file_names import CONFIG_KEY, SUFFIX
from run_ckpt.contract.manifest import WEIGHT, Layer
from run_ckpt.contract.tensors import DTYPE_BITS, PT_METADATA, TensorSpec
from run_ckpt.progress import Progress
from run_ckpt.storage.components import Checkpoint
from run_ckpt.storage.json_files import read_config
from run_ckpt.storage.rows import TORCH_DTYPES, cut_rows, decode_rows
from run_ckpt.storage.shards import MAIN_STEMS
from run_ckpt.storage.writer import ShardWriter
from run_ckpt.tools.rewrite.frame import Rewrite, rewrite

SOURCE_DTYPE = "source"
DTYPES = {SOURCE_DTYPE: None, "bfloat16": "BF16"}


def dequantize(output: Path, target: Path, *, dtype: str, progress: Progress) -> None:
    """Write ``output`` to ``target`` with its quantized weights as numbers, under their source's names.

    dtype: "bfloat16", or "source" for the dtype each weight had in the source. Everything that was
    copied stays bit for bit; scales, manifest and quantization_config are left out.
    """
    rewrite(output, target, partial(_plan, dtype=DTYPES[dtype]), progress)


def _plan(checkpoint: Checkpoint, *, dtype: str | None) -> Rewrite:
    manifest = checkpoint.manifest
    replaced: dict[str, tuple[TensorSpec, ...]] = dict.fromkeys(manifest.fused_scales, ())
    for layer in manifest.layers.values():
        replaced.update(dict.fromkeys(layer.tensors.values(), ()))
        replaced[layer.tensors[WEIGHT]] = (_plain_spec(layer, dtype),)
    config = read_config(checkpoint.path)
    config = {key: value for key, value in (config or {}).items() if key != CONFIG_KEY} or None
    return Rewrite(replaced, partial(_write_layer, dtype=dtype), PT_METADATA, config, partial(_shard_name, checkpoint))


def _plain_spec(layer: Layer, dtype: str | None) -> TensorSpec:
    return TensorSpec(layer.source_tensor, dtype or layer.source_dtype, (layer.N, layer.K))


def _write_layer(checkpoint: Checkpoint, layer: Layer, writer: ShardWriter, *, dtype: str | None) -> None:
    spec = _plain_spec(layer, dtype)
    target = TORCH_DTYPES[spec.dtype]
    largest = torch.finfo(target).max
    for start, stop in cut_rows(layer):
        decoded = decode_rows(checkpoint.reader, layer, start, stop)
        # A scale rule may round the largest weights up, in F16 past the largest number.
        values = decoded.clamp_(-largest, largest).to(target).contiguous().view(torch.uint8).numpy()
        writer.write(spec.name, start * layer.K * DTYPE_BITS[spec.dtype] // 8, values.data)


def _shard_name(checkpoint: Checkpoint, name: str) -> str:
    """A dialect may have a name of its own, which from_pretrained would not find."""
    if not DIALECTS[checkpoint.manifest.dialect].file_name:
        return name
    diffusers, transformers = MAIN_STEMS
    return (transformers if checkpoint.manifest.recipe["naming"] == "transformers" else diffusers) + SUFFIX
