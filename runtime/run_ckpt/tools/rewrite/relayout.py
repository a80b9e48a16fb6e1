"""`run-ckpt relayout`: MXFP4 bytes from one storage order to the other; nothing is quantized anew."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from run_ckpt.contract.dialects.dialect import Dialect
from run_ckpt.contract.dialects.table import DIALECTS, choose_dialect, header_metadata, quantization_config
from run_ckpt.contract.errors import FaultsError, UsageError
from run_ckpt.contract.file_names import CONFIG_KEY
from run_ckpt.contract.formats import Scheme
from run_ckpt.contract.layouts import LAYOUTS, Layout
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer, Manifest
from run_ckpt.contract.targets import judge_again
from run_ckpt.progress import Progress
from run_ckpt.storage.components import Checkpoint
from run_ckpt.storage.json_files import read_config
from run_ckpt.storage.rows import cut_rows, read_codes, read_scales
from run_ckpt.tools.rewrite.files import TensorWriter
from run_ckpt.tools.rewrite.frame import Rewrite, rewrite


def relayout(output: Path, target: Path, *, layout: str, dialect: str | None, progress: Progress) -> bool:
    """Write ``output`` to ``target`` with its MXFP4 layers in ``layout``; all values stay what they are.

    dialect: None for the usual one of that layout. The result is what convert-ckpt would have
    written with that --layout and --dialect for the same layers. Raises UsageError where the
    dialect can't say the layout or nothing would change, FaultsError where shapes do not fit.
    """
    return rewrite(output, target, partial(_plan, layout=LAYOUTS[layout], asked=dialect), progress)


def _plan(checkpoint: Checkpoint, *, layout: Layout, asked: str | None) -> Rewrite:
    old = checkpoint.manifest
    moved = [layer for layer in old.layers.values() if len(layer.format.layouts) > 1]
    if not moved:
        raise UsageError(f"{checkpoint.path}: has no MXFP4 layer. Other formats have one layout; nothing to do.")
    if stacked := next((layer for layer in moved if layer.n_stacked), None):
        raise UsageError(
            f"{checkpoint.path}: holds all experts of a block in one tensor ({stacked.module}), which nobody reads in"
            f" another layout or dialect than {old.dialect}."
        )
    new = _new_manifest(old, layout, asked)
    if new == old:
        raise UsageError(f"{checkpoint.path}: is in layout {layout}, dialect {old.dialect} already.")
    faults = [fault for layer in moved for fault in _shape_faults(new.layers[layer.module])]
    if faults:
        raise FaultsError(f"{checkpoint.path}: can't be stored in layout {layout}", faults)
    replaced = {
        spec.name: (new.layers[layer.module].specs()[role],) for layer in moved for role, spec in layer.specs().items()
    }
    config = read_config(checkpoint.path) or {}
    new = replace(new, targets=judge_again(new, old, config))
    config |= {CONFIG_KEY: quantization_config(new)}
    return Rewrite(
        replaced,
        {layer.tensors[WEIGHT]: partial(_write_layer, checkpoint, layer, new.layers[layer.module]) for layer in moved},
        header_metadata(new),
        config,
        manifest=lambda files: replace(new, files=files).to_json(),
    )


def _new_manifest(manifest: Manifest, layout: Layout, asked: str | None) -> Manifest:
    schemes = {
        module: replace(layer.scheme, layout=layout) if layout in layer.format.layouts else layer.scheme
        for module, layer in manifest.layers.items()
    }
    naming = manifest.recipe["naming"]
    of_joint_experts = DIALECTS[manifest.dialect].experts_only
    sorted_schemes = sorted(set(schemes.values()), key=str)
    dialect = choose_dialect(sorted_schemes, naming, asked=asked, of_joint_experts=of_joint_experts)
    layers = {module: _new_layer(layer, schemes[module], dialect, naming) for module, layer in manifest.layers.items()}
    recipe = {**manifest.recipe, "layout": layout.name, "dialect": dialect.name}
    return replace(manifest, layers=layers, recipe=recipe)


def _new_layer(layer: Layer, scheme: Scheme, dialect: Dialect, naming: str) -> Layer:
    return replace(
        layer,
        scheme=scheme,
        tensors=dialect.tensor_names(layer.module, scheme, naming),
        scale_shape=dialect.scale_shape(layer.N, layer.K, scheme),
    )


def _shape_faults(layer: Layer) -> list[str]:
    (rows, cols), layout = layer.scheme.alignment, layer.scheme.layout
    if layer.N % rows == 0 and layer.K % cols == 0:
        return []
    return [
        f"{layer.module}: N = {layer.N}, K = {layer.K}; layout {layout} needs multiples of {rows} and {cols}."
        f" Convert the source with --layout {layout}, which keeps this layer as it is."
    ]


def _write_layer(checkpoint: Checkpoint, layer: Layer, new: Layer, writer: TensorWriter) -> None:
    layout = new.scheme.layout
    # Whole padding granules of the scale: the last slab then brings the padding rows with it.
    for start, stop in cut_rows(layer, max(known.scale.pad_to[0] for known in layer.format.layouts)):
        codes = layout.weight.shuffle(read_codes(checkpoint.reader, layer, start, stop))
        scales = layout.scale.shuffle(layout.scale.pad_to_tile(read_scales(checkpoint.reader, layer, start, stop)))
        writer.write(new.tensors[WEIGHT], start * codes.shape[1], codes.contiguous().numpy().data)
        writer.write(new.tensors[WEIGHT_SCALE], start * scales.shape[1], scales.contiguous().numpy().data)
