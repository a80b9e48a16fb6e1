"""A checkpoint under the names of a model: some classes of transformers have other names than their checkpoints."""

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from run_ckpt.contract.manifest import Layer
from run_ckpt.storage.components import Checkpoint


def renamed_for(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with its layers and tensors named as in ``model``; most are so already."""
    if not hasattr(model, "base_model_prefix"):  # no class of transformers
        return checkpoint
    from run_ckpt.loading.build import find_renaming

    rename = find_renaming(model)
    layers = {layer.module: _rename_layer(layer, rename) for layer in checkpoint.manifest.layers.values()}
    coded = {
        name: layers[layer.module].tensors[role]
        for layer in checkpoint.manifest.layers.values()
        for role, name in layer.tensors.items()
    }
    kept = {name: rename(name) for name in checkpoint.manifest.kept}
    manifest = replace(
        checkpoint.manifest,
        layers={layer.module: layer for layer in layers.values()},
        kept={
            kept[name]: replace(tensor, spec=replace(tensor.spec, name=kept[name]))
            for name, tensor in checkpoint.manifest.kept.items()
        },
    )
    return replace(checkpoint, manifest=manifest, reader=checkpoint.reader.renamed(coded | kept))


def _rename_layer(layer: Layer, rename: Callable[[str], str]) -> Layer:
    module = rename(f"{layer.module}.weight").removesuffix(".weight")
    tensors = {role: module + name.removeprefix(layer.module) for role, name in layer.tensors.items()}
    return replace(layer, module=module, tensors=tensors)
