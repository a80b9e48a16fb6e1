"""`run-ckpt relayout`: MXFP4 bytes from one storage order to the other; nothing is quantized anew."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from run_ckpt.contract.dialects import (
    AITER_MXFP4,
    DIALECT_SCHEMES,
    PLAIN_MXFP4,
    Scheme,
    default_dialect,
    header_metadata,
    quantization_config,
    scale_shape,
    tensor_names,
)
from run_ckpt.contract.errors import ProblemsError, UsageError
from run_ckpt.contract.formats import MXFP4_BLOCK_SIZE
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer, Manifest
from run_ckpt.contract.manifest_checks import alignment
from run_ckpt.progress import Progress
from run_ckpt.storage.components import Checkpoint
from run_ckpt.storage.rows import cut_rows, read_packed, read_scale_codes
from run_ckpt.storage.writer import ShardWriter
from run_ckpt.tools.rewrite.frame import Rewrite, read_config, rewrite

SCHEMES = {"plain": PLAIN_MXFP4, "aiter": AITER_MXFP4}


def relayout(output: Path, target: Path, *, layout: str, dialect: str | None, progress: Progress) -> None:
    """Write ``output`` to ``target`` with its MXFP4 layers in ``layout``; all values stay what they are.

    dialect: None for the usual one of that layout. The result is what convert-ckpt would have
    written with that --layout and --dialect for the same layers. Raises UsageError where the
    dialect can't say the layout or nothing would change, ProblemsError where shapes do not fit.
    """
    rewrite(output, target, partial(_plan, scheme=SCHEMES[layout], dialect=dialect), progress)


def _plan(checkpoint: Checkpoint, *, scheme: Scheme, dialect: str | None) -> Rewrite:
    old = checkpoint.manifest
    moved = [layer for layer in old.layers.values() if layer.format == "mxfp4"]
    if not moved:
        raise UsageError(f"{checkpoint.path}: has no MXFP4 layer. FP8 has one layout only; there is nothing to do.")
    new = _new_manifest(old, scheme, _choose_dialect(old, scheme, dialect))
    if new == old:
        raise UsageError(f"{checkpoint.path}: is in layout {scheme.layout}, dialect {old.dialect} already.")
    problems = [fault for layer in moved for fault in _shape_faults(layer, scheme)]
    if problems:
        raise ProblemsError(f"{checkpoint.path}: can't be stored in layout {scheme.layout}", problems)
    replaced = {
        spec.name: (new.layers[layer.module].specs()[role],) for layer in moved for role, spec in layer.specs().items()
    }
    config = {**(read_config(checkpoint) or {}), "quantization_config": quantization_config(new)}
    return Rewrite(
        replaced,
        partial(_write_layer, manifest=new),
        header_metadata(new),
        config,
        manifest=lambda files: replace(new, files=files).to_json(),
    )


def _choose_dialect(manifest: Manifest, scheme: Scheme, dialect: str | None) -> str:
    """Return the dialect asked for, else the usual one. Only ``mxfp4`` can say that FP8 layers are there too."""
    mixed = any(layer.format != "mxfp4" for layer in manifest.layers.values())
    chosen = dialect or ("mxfp4" if mixed else default_dialect(scheme, manifest.recipe["naming"], static=False))
    if scheme not in DIALECT_SCHEMES[chosen]:
        able = ", ".join(name for name, schemes in DIALECT_SCHEMES.items() if scheme in schemes)
        raise UsageError(f"--dialect {chosen}: can't say {scheme}. Choose one of {able}.")
    if mixed and chosen != "mxfp4":
        raise UsageError(f"--dialect {chosen}: can't say that some layers are mxfp4 and some fp8. Use --dialect mxfp4.")
    return chosen


def _new_manifest(manifest: Manifest, scheme: Scheme, dialect: str) -> Manifest:
    layers = {
        module: _new_layer(layer, scheme, dialect, manifest.recipe["naming"]) if layer.format == "mxfp4" else layer
        for module, layer in manifest.layers.items()
    }
    return replace(manifest, layers=layers, recipe={**manifest.recipe, "layout": scheme.layout, "dialect": dialect})


def _new_layer(layer: Layer, scheme: Scheme, dialect: str, naming: str) -> Layer:
    return replace(
        layer,
        layout=scheme.layout,
        tensors=tensor_names(layer.module, scheme, dialect, naming),
        scale_shape=scale_shape(layer.N, layer.K, scheme, dialect),
    )


def _shape_faults(layer: Layer, scheme: Scheme) -> list[str]:
    rows, cols = alignment(scheme)
    if layer.N % rows == 0 and layer.K % cols == 0:
        return []
    return [
        f"{layer.module}: N = {layer.N}, K = {layer.K}; layout {scheme.layout} needs multiples of {rows} and {cols}."
        f" Convert the source with --layout {scheme.layout}, which keeps this layer as it is."
    ]


def _write_layer(checkpoint: Checkpoint, layer: Layer, writer: ShardWriter, *, manifest: Manifest) -> None:
    new = manifest.layers[layer.module]
    n_blocks = layer.K // MXFP4_BLOCK_SIZE
    # Whole padding granules of the scale: the last slab then brings the padding rows with it.
    for start, stop in cut_rows(layer, AITER_SCALE.pad_to[0]):
        packed = read_packed(checkpoint.reader, layer, start, stop)
        codes = read_scale_codes(checkpoint.reader, layer, start, stop)[:, :n_blocks]
        if new.layout == "aiter":
            packed = AITER_WEIGHT.shuffle(packed)
            codes = AITER_SCALE.shuffle(AITER_SCALE.pad_to_tile(codes))
        writer.write(new.tensors[WEIGHT], start * layer.K // 2, packed.contiguous().numpy().data)
        writer.write(new.tensors[WEIGHT_SCALE], start * new.scale_shape[1], codes.contiguous().numpy().data)
