"""A checkpoint as a class of transformers sees it: some have other names than their checkpoints, and leave some out."""

import re
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from run_ckpt.contract.manifest import Layer
from run_ckpt.storage.components import Checkpoint


def renamed_for(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with its layers and tensors named as in ``model``; most are so already.

    What the class leaves out by itself (a layer that predicts further tokens) is unused.
    """
    if not hasattr(model, "base_model_prefix"):  # no class of transformers
        return checkpoint
    from run_ckpt.loading.build import find_renaming

    rename = find_renaming(model)
    is_left_out = left_out_by(model)
    aside = {name for name in checkpoint.manifest.specs() if is_left_out(name)}
    layers = {layer.module: _rename_layer(layer, rename) for layer in checkpoint.manifest.layers.values()}
    coded = {
        name: layers[layer.module].tensors[role]
        for layer in checkpoint.manifest.layers.values()
        for role, name in layer.tensors.items()
    }
    kept = {name: rename(name) for name in checkpoint.manifest.kept}
    manifest = replace(
        checkpoint.manifest,
        layers={layer.module: layer for name, layer in layers.items() if not is_left_out(name)},
        kept={
            kept[name]: replace(tensor, spec=replace(tensor.spec, name=kept[name]))
            for name, tensor in checkpoint.manifest.kept.items()
        },
    )
    unused = checkpoint.unused | {{**coded, **kept}.get(name, name) for name in aside}
    return replace(checkpoint, manifest=manifest, reader=checkpoint.reader.renamed(coded | kept), unused=unused)


def left_out_by(model: nn.Module) -> Callable[[str], bool]:
    """Return what says whether a class of transformers has no use for a tensor of its own checkpoints."""
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _rename_layer(layer: Layer, rename: Callable[[str], str]) -> Layer:
    module = rename(f"{layer.module}.weight").removesuffix(".weight")
    tensors = {role: module + name.removeprefix(layer.module) for role, name in layer.tensors.items()}
    return replace(layer, module=module, tensors=tensors)
