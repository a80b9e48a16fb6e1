"""`run-ckpt dequantize`: a quantized checkpoint, of whatever tool, as a plain one that from_pretrained loads."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.file_names import CONFIG_KEY, SUFFIX, as_safetensors
from run_ckpt.contract.manifest import WEIGHT, Layer
from run_ckpt.contract.tensors import DTYPE_BITS, PT_METADATA, TensorSpec
from run_ckpt.progress import Progress
from run_ckpt.storage.components import Checkpoint
from run_ckpt.storage.foreign import open_quantized
from run_ckpt.storage.json_files import read_config
from run_ckpt.storage.reader import TensorReader
from run_ckpt.storage.rows import TORCH_DTYPES, cut_rows, decode_rows_as
from run_ckpt.storage.shards import MAIN_STEMS
from run_ckpt.tools.rewrite.files import TensorWriter
from run_ckpt.tools.rewrite.frame import Rewrite, rewrite
from run_ckpt.tools.rewrite.joined import join_weights, write_joined

SOURCE_DTYPE = "source"
DTYPES = {SOURCE_DTYPE: None, "bfloat16": "BF16"}


def dequantize(output: Path, target: Path, *, dtype: str, progress: Progress) -> bool:
    """Write ``output`` to ``target`` with its quantized weights as numbers, under their source's names.

    dtype: "bfloat16", or "source" for the dtype each weight had in the source. Everything that was
    copied stays bit for bit; experts that the source had in 3-D tensors are there again; scales, manifest and
    quantization_config are left out. ``output`` may be another tool's.
    """
    return rewrite(output, target, partial(_plan, dtype=DTYPES[dtype]), progress, open_quantized)


def _plan(checkpoint: Checkpoint, *, dtype: str | None) -> Rewrite:
    manifest = checkpoint.manifest
    layers = {layer.source_tensor: layer for layer in manifest.layers.values()}
    all_joined = join_weights(manifest, dtype)
    alone = layers.keys() - {name for joined in all_joined for name in joined.names}
    replaced: dict[str, tuple[TensorSpec, ...]] = dict.fromkeys([*manifest.fused_scales, *checkpoint.unused], ())
    writers: dict[str, Callable[[TensorWriter], None]] = {}
    for layer in layers.values():  # a tensor may be of several: Nunchaku's biases depend on weights
        replaced.update(dict.fromkeys(layer.tensors.values(), ()))
    for name, layer in layers.items():
        if name in alone:
            spec = _plain_spec(checkpoint, layer, dtype)
            replaced[layer.tensors[WEIGHT]] = (spec,)
            writers[layer.tensors[WEIGHT]] = partial(_write_layer, checkpoint.reader, layer, spec)
    for joined in all_joined:
        stored = [layers[name].tensors[WEIGHT] if name in layers else name for name in joined.names]
        replaced |= {**dict.fromkeys(stored, ()), stored[0]: (joined.spec,)}
        writers[stored[0]] = partial(write_joined, checkpoint.reader, layers, joined)
    config = read_config(checkpoint.path) if checkpoint.path.is_dir() else None
    config = {key: value for key, value in (config or {}).items() if key != CONFIG_KEY} or None
    return Rewrite(replaced, writers, PT_METADATA, config, partial(_shard_name, checkpoint))


def _plain_spec(checkpoint: Checkpoint, layer: Layer, dtype: str | None) -> TensorSpec:
    shape: tuple[int, ...] = (layer.N, layer.K)
    if checkpoint.foreign:
        shape = checkpoint.foreign.shapes.get(layer.module, shape)
    return TensorSpec(layer.source_tensor, dtype or layer.source_dtype, shape)


def _write_layer(reader: TensorReader, layer: Layer, spec: TensorSpec, writer: TensorWriter) -> None:
    for start, stop in cut_rows(layer):
        values = decode_rows_as(reader, layer, start, stop, TORCH_DTYPES[spec.dtype])
        writer.write(spec.name, start * layer.K * DTYPE_BITS[spec.dtype] // 8, values.view(torch.uint8).numpy().data)


def _shard_name(checkpoint: Checkpoint, name: str) -> str:
    """A dialect may have a name of its own, which from_pretrained would not find."""
    dialect = DIALECTS.get(checkpoint.manifest.dialect)
    if not (dialect and dialect.file_name):
        return as_safetensors(name)
    diffusers, transformers = MAIN_STEMS
    return (transformers if checkpoint.manifest.recipe["naming"] == "transformers" else diffusers) + SUFFIX
