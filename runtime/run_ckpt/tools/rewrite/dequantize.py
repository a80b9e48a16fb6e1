"""`run-ckpt dequantize`: a quantized checkpoint, of whatever tool, as a plain one that from_pretrained loads."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.file_names import CONFIG_KEY, GGUF_SUFFIX, SUFFIX
from run_ckpt.contract.manifest import WEIGHT, Layer
from run_ckpt.contract.tensors import DTYPE_BITS, PT_METADATA, TensorSpec
from run_ckpt.progress import Progress
from run_ckpt.storage.components import Checkpoint
from run_ckpt.storage.foreign import open_quantized
from run_ckpt.storage.json_files import read_config
from run_ckpt.storage.rows import TORCH_DTYPES, cut_rows, decode_rows
from run_ckpt.storage.shards import MAIN_STEMS
from run_ckpt.tools.rewrite.files import TensorWriter
from run_ckpt.tools.rewrite.frame import Rewrite, rewrite

SOURCE_DTYPE = "source"
DTYPES = {SOURCE_DTYPE: None, "bfloat16": "BF16"}


def dequantize(output: Path, target: Path, *, dtype: str, progress: Progress) -> bool:
    """Write ``output`` to ``target`` with its quantized weights as numbers, under their source's names.

    dtype: "bfloat16", or "source" for the dtype each weight had in the source. Everything that was
    copied stays bit for bit; scales, manifest and quantization_config are left out. ``output`` may be another tool's.
    """
    return rewrite(output, target, partial(_plan, dtype=DTYPES[dtype]), progress, open_quantized)


def _plan(checkpoint: Checkpoint, *, dtype: str | None) -> Rewrite:
    manifest = checkpoint.manifest
    replaced: dict[str, tuple[TensorSpec, ...]] = dict.fromkeys([*manifest.fused_scales, *checkpoint.unused], ())
    for layer in manifest.layers.values():
        replaced.update(dict.fromkeys(layer.tensors.values(), ()))
        replaced[layer.tensors[WEIGHT]] = (_plain_spec(checkpoint, layer, dtype),)
    config = read_config(checkpoint.path) if checkpoint.path.is_dir() else None
    config = {key: value for key, value in (config or {}).items() if key != CONFIG_KEY} or None
    return Rewrite(replaced, partial(_write_layer, dtype=dtype), PT_METADATA, config, partial(_shard_name, checkpoint))


def _plain_spec(checkpoint: Checkpoint, layer: Layer, dtype: str | None) -> TensorSpec:
    shape: tuple[int, ...] = (layer.N, layer.K)
    name = layer.source_tensor
    if checkpoint.foreign:
        shape = checkpoint.foreign.shapes.get(layer.module, shape)
    if layer.n_stacked:  # gpt-oss has each matrix transposed where it is numbers
        name, shape = layer.module, (layer.n_stacked, layer.K, layer.N // layer.n_stacked)
    return TensorSpec(name, dtype or layer.source_dtype, shape)


def _write_layer(checkpoint: Checkpoint, layer: Layer, writer: TensorWriter, *, dtype: str | None) -> None:
    spec = _plain_spec(checkpoint, layer, dtype)
    target = TORCH_DTYPES[spec.dtype]
    largest = torch.finfo(target).max
    for start, stop in _cut_matrices(layer, spec) if layer.n_stacked else cut_rows(layer):
        decoded = decode_rows(checkpoint.reader, layer, start, stop)
        decoded = decoded.T if layer.n_stacked else decoded
        # A scale rule may round the largest weights up, in F16 past the largest number.
        values = decoded.clamp_(-largest, largest).to(target).contiguous().view(torch.uint8).numpy()
        writer.write(spec.name, start * layer.K * DTYPE_BITS[spec.dtype] // 8, values.data)


def _cut_matrices(layer: Layer, spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the rows of each matrix that is stacked in a layer."""
    n_rows = spec.shape[-1]
    for start in range(0, layer.N, n_rows):
        yield start, start + n_rows


def _shard_name(checkpoint: Checkpoint, name: str) -> str:
    """A dialect may have a name of its own, which from_pretrained would not find."""
    dialect = DIALECTS.get(checkpoint.manifest.dialect)
    if not (dialect and dialect.file_name):
        return name.removesuffix(GGUF_SUFFIX) + SUFFIX if name.endswith(GGUF_SUFFIX) else name
    diffusers, transformers = MAIN_STEMS
    return (transformers if checkpoint.manifest.recipe["naming"] == "transformers" else diffusers) + SUFFIX
